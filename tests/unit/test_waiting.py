"""What may wait for its turn: by number, by bytes, and by what it takes in memory."""

import gc
import json
import tracemalloc
from datetime import UTC, datetime
from typing import Any

import pytest

from schemas.decode import MAX_COMMAND_BYTES, decode_command
from worker.waiting import (
    MAX_NODE_WEIGHT,
    MAX_WAITING,
    MAX_WAITING_BYTES,
    NodeWaiting,
    Waiting,
    weight_of,
)
from worker.work import Work

NOW = datetime(2026, 11, 24, tzinfo=UTC)
IMAGE = {"name": "base"}
FULL = MAX_COMMAND_BYTES - 1000


def run_of(**spec: Any) -> bytes:
    body = {"type": "run", "id": "x", "spec": {"image": IMAGE, **spec}}
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


def work_of(body: bytes, verb: str = "run", container: str | None = "web-0") -> Work:
    command = decode_command(verb, body)
    return Work(
        command=command,
        verb=verb,
        container=container,
        seq=1,
        time=NOW,
        size=len(body),
        weight=weight_of(body),
    )


def small(verb: str) -> Work:
    return work_of(json.dumps({"type": verb, "id": "x"}).encode(), verb)


# Each makes as much as it can of the largest body.
BODIES = {
    "a small command": b'{"type":"stop","id":"x"}',
    "a small run": run_of(),
    "many variables": run_of(env={f"{n:x}": "" for n in range(FULL // 10)}),
    "many words": run_of(command={"entrypoint": ["ab"] * (FULL // 5)}),
    "other words": run_of(command={"entrypoint": [f"{n:x}" for n in range(FULL // 8)]}),
    "mounts": run_of(storage=[{"type": "anonymous", "target": f"/{n:x}"} for n in range(FULL // 45)]),
    "endpoints": run_of(
        endpoints=[{"name": f"e{n}", "protocol": "tcp", "port": 80} for n in range(FULL // 50)]
    ),
    "one long word": run_of(env={"a": "x" * FULL}),
    "one wide character": run_of(env={"a": "x" * FULL + "\U0001f600"}),
    "one wide character, escaped": run_of(env={"a": "x" * FULL + "?"}).replace(b"?", b"\\ud83d\\ude00"),
    "steps": run_of(
        init={"steps": [{"id": f"s{n}", "uses": "init.run", "with": {"command": "x"}} for n in range(3000)]}
    ),
}


def memory_of(body: bytes, verb: str) -> int:
    """Bytes that one of several such commands takes, with everything that is made for it."""
    count = 2 if len(body) > 10_000 else 100
    work_of(body, verb)  # what is made once is none of its own
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        kept = [work_of(body, verb) for _ in range(count)]
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return (after - before) // len(kept)


@pytest.mark.parametrize("name", BODIES)
def test_no_command_takes_more_than_its_weight(name: str) -> None:
    body = BODIES[name]
    assert len(body) <= MAX_COMMAND_BYTES
    verb = "stop" if b'"stop"' in body else "run"
    assert memory_of(body, verb) <= weight_of(body)


def test_a_queue_is_full_by_number() -> None:
    waiting = Waiting(NodeWaiting())
    for _ in range(MAX_WAITING):
        assert waiting.refusal(small("start")) is None
        waiting.add(small("start"))
    assert waiting.refusal(small("start")) == "too many commands wait for web-0 already"
    for _ in range(MAX_WAITING):
        assert waiting.refusal(small("stop")) is None, "what ends the wait is let in for longer"
        waiting.add(small("stop"))
    assert waiting.refusal(small("remove")) is not None
    waiting.remove(small("stop"))
    assert waiting.refusal(small("remove")) is None


def test_a_queue_is_full_by_bytes() -> None:
    waiting = Waiting(NodeWaiting(most=1 << 40))
    large = work_of(BODIES["one long word"])
    for _ in range(MAX_WAITING_BYTES // large.size):
        waiting.add(large)
    assert waiting.refusal(large) is not None
    assert waiting.refusal(small("start")) is None


def test_all_queues_together_are_full_by_weight() -> None:
    """Each has room, and yet: the sum is what the memory of the node bounds."""
    node, large = NodeWaiting(), work_of(BODIES["many variables"])
    queues = [Waiting(node) for _ in range(1000)]
    let_in = 0
    for queue in queues:
        if queue.refusal(large) is None:
            queue.add(large)
            let_in += 1
    assert let_in == MAX_NODE_WEIGHT // large.weight
    assert queues[-1].refusal(large) == "too many commands wait on this node already"
    assert queues[-1].refusal(small("stop")) is None
    for queue in queues[:let_in]:
        queue.remove(large)
    assert node.weight == 0
    assert queues[-1].refusal(large) is None


@pytest.mark.parametrize(("containers", "commands"), [(200, 10_000), (500, 20_000)])
def test_bursts_of_small_commands_are_let_in(containers: int, commands: int) -> None:
    node = NodeWaiting()
    queues = [Waiting(node) for _ in range(containers)]
    start = small("start")
    for number in range(commands):
        queue = queues[number % containers]
        assert queue.refusal(start) is None
        queue.add(start)
