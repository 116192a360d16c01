"""What a run leaves behind for the judge: all that was published, read and found, as plain data.

A *generation* is one life of a stream: it ends when the stream is deleted and made anew, or put back from an
older copy. Within one, sequences of the stream only grow.
"""

import gzip
import hashlib
from typing import Any, Literal

import msgspec

EVENTS, LOGS, COMMANDS = "SANDFLEET_EVT", "SANDFLEET_LOG", "SANDFLEET_CMD"

Outcome = Literal["stored", "refused", "unknown"]
Expect = Literal["command", "rejection"]
What = Literal["purged", "made anew", "put back"]


class Published(msgspec.Struct, kw_only=True):
    """One message to the command stream. Times are seconds since the run began.

    `expect` is what its sender meant: a command, or something that can only be rejected. Messages of one id
    and one `variant` have the same decoded body. `outcome`: acknowledged by the stream (as
    `stream_seq`, at `stored_at`), refused by it, or no answer came.
    """

    subject: str
    body: bytes
    expect: Expect
    id: str | None = None
    variant: int = 0
    sent_at: float = 0.0
    outcome: Outcome = "unknown"
    stream_seq: int = 0
    stored_at: float = 0.0


class Message(msgspec.Struct, kw_only=True):
    """One message of the event or log stream, in the order in which the stream holds them."""

    generation: int
    stream_seq: int
    subject: str
    data: bytes
    headers: dict[str, str] = {}


class Loss(msgspec.Struct, kw_only=True):
    """A stream lost messages by the injector's hand: of events and logs none that had not been read before.

    `purged`: all up to `upto` of `generation`. `made anew`: `generation` began empty. `put back`:
    `generation` begins with what an older copy held, `upto` its last sequence, of which the first `purged`
    had been purged before the copy was made. `taken`: of the command stream, what it held unacknowledged and
    has no more, by (sequence, digest of subject and body).
    """

    what: What
    stream: str
    at: float
    generation: int
    upto: int = 0
    purged: int = 0
    taken: list[tuple[int, str]] = []


class Refusal(msgspec.Struct, kw_only=True):
    """From here on the log stream may have refused a chunk: it was away, its server began anew, or its leader
    changed. `after`: what it held before, of `generation`.
    """

    generation: int
    after: int


class Witness(msgspec.Struct, kw_only=True):
    """What a program noted of itself: it was the `number`-th of its instance and had printed so many whole
    lines (and at most one more on each stream); `ended` when it came to its last line.
    """

    instance: str
    number: int
    pad: int
    stdout: int
    stderr: int
    ended: bool


class Listed(msgspec.Struct, kw_only=True):
    """What the node answered to `list` when nothing was under way. `generation`: of the event stream then;
    `last`: its last sequence.
    """

    generation: int
    last: int
    containers: list[dict[str, Any]]


class History(msgspec.Struct, kw_only=True):
    """`takeovers` counts starts with `--takeover` that succeeded; `doomed` are epochs of journals that were
    destroyed on purpose. `left`: what was found on the machine after everything was removed. `faults`: what the
    run itself saw going wrong (a worker that ended by itself, a wait that came to nothing).
    """

    node: str
    prefix: str = "sandfleet.v1"
    published: list[Published] = []
    events: list[Message] = []
    logs: list[Message] = []
    losses: list[Loss] = []
    witnesses: list[Witness] = []
    listed: list[Listed] = []
    takeovers: int = 0
    refusals: list[Refusal] = []
    doomed: list[str] = []
    left: list[str] = []
    faults: list[str] = []

    def lost(self, stream: str) -> list[Loss]:
        return [loss for loss in self.losses if loss.stream == stream]


def digest(subject: str, body: bytes) -> str:
    return hashlib.sha256(subject.encode() + b" " + body).hexdigest()


class Violation(msgspec.Struct, frozen=True):
    """A promise that was broken: a short fixed name, and what is wrong where."""

    name: str
    detail: str

    def __str__(self) -> str:
        return f"{self.name}: {self.detail}"


def dump(history: History) -> bytes:
    """Compressed, and without what no judge looks at: who the node is, and the scripts of the programs."""
    variants: dict[str | None, set[int]] = {}
    for sent in history.published:
        variants.setdefault(sent.id, set()).add(sent.variant)
    published = [
        msgspec.structs.replace(sent, body=_without(sent.body, "entrypoint"))
        if sent.expect == "command" and len(variants[sent.id]) == 1
        else sent
        for sent in history.published
    ]
    events = [msgspec.structs.replace(event, data=_without(event.data, "info")) for event in history.events]
    shorter = {
        digest(sent.subject, sent.body): digest(kept.subject, kept.body)
        for sent, kept in zip(history.published, published, strict=True)
    }
    losses = [
        msgspec.structs.replace(loss, taken=[(seq, shorter.get(name, name)) for seq, name in loss.taken])
        for loss in history.losses
    ]
    slim = msgspec.structs.replace(history, published=published, events=events, losses=losses)
    return gzip.compress(msgspec.json.encode(slim), mtime=0)


def load(raw: bytes) -> History:
    return msgspec.json.decode(gzip.decompress(raw), type=History)


def _without(raw: bytes, name: str) -> bytes:
    """The same JSON with every field of that name left empty."""

    def emptied(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: None if key == name else emptied(item) for key, item in value.items()}
        return [emptied(item) for item in value] if isinstance(value, list) else value

    return msgspec.json.encode(emptied(msgspec.json.decode(raw))) if name.encode() in raw else raw
