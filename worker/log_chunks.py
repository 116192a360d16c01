"""Log chunks as they go to the stream: what one covers, its headers, and where to go on after a crash. No
I/O.

A chunk is fixed by its `Cut` before it is sent. Whoever sends it again sends the same cut, so that its
message id names the same bytes.

Where a new worker goes on (`resume`) is decided from four things: the position up to which everything was
acknowledged, the cuts that were sent and not acknowledged when the last worker died, where the chunk stands
that was stored last, and the newest message of the subject.

- Chunks of one stream are sent in order on one connection, so the newest message of this instance means
  that all before it is stored. Only while a server fails over may one in the middle be refused and sent
  again later. Within the duplicate window therefore all unacknowledged cuts are sent again: the stream
  drops what it has. After it, the newest message decides. Of those sent before one that was answered
  nothing was heard because they were refused: these go out in any case.
- No message of this instance: it aged out, was purged, or the stream is a new one. What was acknowledged
  has been in the stream once, and is not sent again. What was not goes out.
- The newest message stands below what was acknowledged: the server lost its newest messages (a power
  failure before its fsync, a restored backup), so what is still in the capture files is sent again from
  there. Not so if that message is known to be the one stored last, which happens when a retried chunk was
  stored after later ones. A replica that lags behind looks the same for a moment: the caller asks again
  before it believes it.
"""

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple, Protocol

MAX_CHUNK_BYTES = 256 * 1024
MAX_TIMES = 64
RESEND_S = 100.0
"""Less than the stream's duplicate window (120 s): how long after its first sending a cut may be repeated."""

INSTANCE = "Sandfleet-Instance"
RUN = "Sandfleet-Run"
OFFSET = "Sandfleet-Offset"
TIMES = "Sandfleet-Times"
LOST = "Sandfleet-Lost"
LOST_REASON = "Sandfleet-Lost-Reason"
EOF = "Sandfleet-Eof"
INCOMPLETE = "Sandfleet-Incomplete"
MESSAGE_ID = "Nats-Msg-Id"
SUPERVISOR_LOST = "supervisor_lost"


class StoredChunk(Protocol):
    """The newest message of a subject, without its bytes."""

    @property
    def headers(self) -> Mapping[str, str]: ...
    @property
    def size(self) -> int: ...


class Position(NamedTuple):
    """Bytes before `offset` and the ends of runs up to `eof_run` are dealt with. Positions of a stream are
    ordered.
    """

    offset: int
    eof_run: int


START = Position(0, 0)


class What(IntEnum):
    DATA = 0
    LOST = 1
    EOF = 2


REASONS = ("", "size", "rate", "disk")


class Cut(NamedTuple):
    """`length` bytes at `offset`, or as many lost ones, or none and the end of a run. `eof` ends the run
    with data.
    """

    what: What
    offset: int
    length: int
    run: int
    eof: bool = False
    incomplete: bool = False
    reason: str = ""

    @property
    def after(self) -> Position:
        return Position(self.offset + self.length, self.run if self.eof else self.run - 1)

    def name(self) -> str:
        match self.what:
            case What.DATA:
                return f"{self.offset}+{self.length}"
            case What.LOST:
                return f"{self.offset}+lost{self.length}"
            case What.EOF:
                return f"{self.offset}+eof{self.run}"


class Chunk(NamedTuple):
    cut: Cut
    data: bytes
    headers: dict[str, str]


def make_headers(
    instance: str, stream: str, cut: Cut, times: Sequence[tuple[int, int]] = ()
) -> dict[str, str]:
    headers = {
        INSTANCE: instance,
        RUN: str(cut.run),
        OFFSET: str(cut.offset),
        MESSAGE_ID: f"{instance}/{stream}/{cut.name()}",
    }
    if times:
        headers[TIMES] = format_times(times)
    if cut.what is What.LOST:
        headers[LOST] = str(cut.length)
        headers[LOST_REASON] = cut.reason
    if cut.eof:
        headers[EOF] = str(cut.run)
        if cut.incomplete:
            headers[INCOMPLETE] = SUPERVISOR_LOST
    return headers


def format_times(times: Sequence[tuple[int, int]]) -> str:
    """At most 64, evenly thinned; the first, which times the first byte, always stays.

    `times` are (offset in the stream, unix µs), the first being the chunk's offset.
    """
    count = len(times)
    if count > MAX_TIMES:
        times = [times[i * count // MAX_TIMES] for i in range(MAX_TIMES)]
    start = times[0][0]
    return ",".join([f"{offset - start}:{unix_us}" for offset, unix_us in times])


def newline_cut(data: bytes) -> int:
    """How much of `data` to send when more follows: up to a newline in its last eighth, else all of it."""
    at = data.rfind(b"\n", len(data) - len(data) // 8)
    return at + 1 if at >= 0 else len(data)


def stored_position(instance: str, stored: StoredChunk) -> Position | None:
    """The position behind a stored chunk; None when it is not of this instance, or not one of ours at all."""
    headers = stored.headers
    if headers.get(INSTANCE) != instance:
        return None
    try:
        offset, run = int(headers[OFFSET]), int(headers[RUN])
        lost = int(headers.get(LOST, "0"))
        eof = int(headers.get(EOF, str(run - 1)))
    except (KeyError, ValueError):
        return None
    return Position(offset + stored.size + lost, eof)


class Sent(NamedTuple):
    """A chunk that was sent beyond the acknowledged position; `acked`: alone, while one before it was not."""

    cut: Cut
    acked: bool


class Resume(NamedTuple):
    """Send `again` as they are, then go on from `position`. `doubtful`: acknowledged bytes seem to be gone.

    `there`: those of `again` that the stream has by its newest message, and that are sent all the same because one
    of them may have been refused. Where their bytes are gone meanwhile, they are left: to call them lost would
    be wrong.
    `tail` is the position behind the subject's newest message, as far as it is known.
    """

    position: Position
    tail: Position
    again: tuple[Cut, ...] = ()
    doubtful: bool = False
    there: frozenset[Cut] = frozenset()


def resume(
    instance: str,
    *,
    acked: Position,
    sent: Sequence[Sent],
    fresh: bool,
    tail: Position,
    newest: StoredChunk | None,
) -> Resume:
    """Where to go on; the reasons stand above. `sent` in order of offset, `fresh`: within the duplicate
    window.
    """
    stored, name = None, ""
    if newest is not None:
        stored = stored_position(instance, newest)
        name = newest.headers.get(MESSAGE_ID, "").rpartition("/")[2]
    answered = [i for i, one in enumerate(sent) if one.acked]
    known = sent[answered[-1]].cut.after if answered else acked
    unanswered = [one.cut for one in sent if not one.acked]
    if stored is None:
        name = ""
    elif stored < known and stored != tail and name not in {cut.name() for cut in unanswered}:
        return Resume(stored, stored, doubtful=True)
    reached = known if stored is None else max(known, stored)
    if fresh:
        reached = max([reached, *(cut.after for cut in unanswered)])
    elif answered:
        # The answers come in the order of storing: what is older than an answered one was refused.
        unanswered = [one.cut for one in sent[: answered[-1]] if not one.acked]
    else:
        unanswered = []
    again = tuple(cut for cut in unanswered if cut.name() != name)
    refused = {one.cut for one in sent[: answered[-1]] if not one.acked} if answered else set()
    there = frozenset(cut for cut in again if stored is not None and cut.after <= stored) - refused
    return Resume(reached, reached if stored is None else stored, again, there=there)
