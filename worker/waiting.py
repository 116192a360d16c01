"""How many commands may wait for their turn, and how much memory they may take: of one queue and of the node. Pure.

Whoever waits behind another command holds its decoded form, which is several times its body when that is made of many
small parts. Nothing but this bounds their sum: the stream forgets a command as soon as it is accepted, and there
may be as many containers as a publisher has names for.
"""

from worker.work import ENDING, Work

MAX_WAITING, MAX_WAITING_BYTES = 1000, 4 * 1024 * 1024
MAX_NODE_WEIGHT = 64 * 1024 * 1024

# Measured with CPython 3.11 (tests/unit/test_waiting.py): no command weighs more than this makes of it.
BASE_WEIGHT, SPEC_WEIGHT, PART_WEIGHT, WIDEST_CHARACTER = 2560, 1536, 100, 4


def weight_of(body: bytes) -> int:
    """At most so many bytes of memory a command of this body takes while it waits."""
    narrow = body.isascii() and b"\\u" not in body  # one wide character makes its whole string wide
    text = len(body) * (1 if narrow else WIDEST_CHARACTER)
    parts = body.count(b",") + body.count(b"{")
    return BASE_WEIGHT + SPEC_WEIGHT * (b'"spec"' in body) + PART_WEIGHT * parts + text


class NodeWaiting:
    """The sum over all queues of the node."""

    def __init__(self, most: int = MAX_NODE_WEIGHT) -> None:
        self.most = most
        self.weight = 0


class Waiting:
    """The sums of one queue. Whoever is added is removed once."""

    def __init__(self, node: NodeWaiting) -> None:
        self._node = node
        self._count = 0
        self._bytes = 0

    def add(self, work: Work) -> None:
        self._count += 1
        self._bytes += work.size
        self._node.weight += work.weight

    def remove(self, work: Work) -> None:
        self._count -= 1
        self._bytes -= work.size
        self._node.weight -= work.weight

    def refusal(self, work: Work) -> str | None:
        """Why one more cannot wait, None when it can. What may end the wait of others is let in for longer."""
        factor = 2 if work.verb in ENDING else 1
        if self._count >= factor * MAX_WAITING or self._bytes + work.size > factor * MAX_WAITING_BYTES:
            return f"too many commands wait for {work.container or 'the node'} already"
        if self._node.weight + work.weight > factor * self._node.most:
            return "too many commands wait on this node already"
        return None
