"""Log chunks as the contract sends them, put back in order, and cut into lines. Pure.

A chunk's place is its offset, not its position in the stream: one whose storing failed at a server's failover
may come after later ones. `LogOrder` holds such later ones back for a while.
"""

import heapq
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import msgspec

from schemas.queries import BASE64

Stream = Literal["stdout", "stderr"]

HELD_CHUNKS = 64
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class LogChunk(msgspec.Struct, frozen=True, kw_only=True):
    """One message of `P.log.<node>.<cid>.<stream>`. `marks` are (offset from the instance's start, time)."""

    stream: str
    instance: str
    run: int
    offset: int
    data: bytes
    time: datetime
    seq: int
    marks: tuple[tuple[int, datetime], ...] = ()
    lost: int = 0
    lost_reason: str | None = None
    eof: int | None = None
    incomplete: str | None = None


def parse_chunk(
    stream: str, data: bytes, headers: dict[str, str], *, time: datetime, seq: int
) -> LogChunk | None:
    """None for a message that is no log chunk of the contract."""
    try:
        offset = int(headers["Sandfleet-Offset"])
        return LogChunk(
            stream=stream,
            instance=headers["Sandfleet-Instance"],
            run=int(headers.get("Sandfleet-Run", "0")),
            offset=offset,
            data=data,
            time=time,
            seq=seq,
            marks=tuple(_marks(headers.get("Sandfleet-Times", ""), offset)),
            lost=int(headers.get("Sandfleet-Lost", "0")),
            lost_reason=headers.get("Sandfleet-Lost-Reason"),
            eof=int(headers["Sandfleet-Eof"]) if "Sandfleet-Eof" in headers else None,
            incomplete=headers.get("Sandfleet-Incomplete"),
        )
    except (KeyError, ValueError):
        return None


def _marks(text: str, offset: int) -> Iterator[tuple[int, datetime]]:
    for mark in text.split(","):
        relative, colon, micros = mark.partition(":")
        if colon:
            yield offset + int(relative), _EPOCH + timedelta(microseconds=int(micros))


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """What comes next in a stream: `data`, or `missing` bytes and why. `eof`: that run has ended."""

    stream: str
    instance: str
    offset: int
    time: datetime
    data: bytes = b""
    marks: tuple[tuple[int, datetime], ...] = ()
    missing: int = 0
    reason: str | None = None
    eof: int | None = None
    incomplete: str | None = None


class LogOrder:
    """Puts chunks in order of offset, each byte once, for the newest instance seen.

    `from_start`: the first byte is expected at offset 0, and what is older than the stream keeps is told as
    missing; otherwise the first chunk of a stream is where reading begins.
    """

    def __init__(self, *, from_start: bool, instance: str | None = None) -> None:
        self.instance = instance
        self._fixed = instance is not None
        self._from_start = from_start
        self._next: dict[str, int] = {}
        self._held: dict[str, list[tuple[int, int, LogChunk]]] = {}
        self._count = 0

    def put(self, chunk: LogChunk) -> list[Piece]:
        """The pieces that `chunk` makes available, in order."""
        if self.instance is None:
            self.instance = chunk.instance
        pieces: list[Piece] = []
        if chunk.instance != self.instance:
            if self._fixed or chunk.instance < self.instance:
                return []
            pieces += self.give_up()
            self.instance, self._next, self._held = chunk.instance, {}, {}
            self._from_start = True
        self._next.setdefault(chunk.stream, 0 if self._from_start else chunk.offset)
        held = self._held.setdefault(chunk.stream, [])
        self._count += 1
        heapq.heappush(held, (chunk.offset, self._count, chunk))
        pieces += self._ready(chunk.stream)
        if len(held) > HELD_CHUNKS:
            pieces += self._skip(chunk.stream)
        return pieces

    @property
    def waiting(self) -> bool:
        """Whether chunks are held back because earlier bytes have not come."""
        return any(self._held.values())

    def give_up(self) -> list[Piece]:
        """What is held back, with the bytes before it as missing."""
        pieces: list[Piece] = []
        for stream in sorted(self._held):
            while self._held[stream]:
                pieces += self._skip(stream)
        return pieces

    def _skip(self, stream: str) -> list[Piece]:
        offset, _, chunk = self._held[stream][0]
        expected = self._next[stream]
        # The oldest chunks of a stream fall out by age and size.
        reason = "evicted" if expected == 0 else "missing"
        pieces = [_gap(chunk, expected, offset - expected, reason)] if offset > expected else []
        self._next[stream] = max(expected, offset)
        return pieces + self._ready(stream)

    def _ready(self, stream: str) -> list[Piece]:
        held, pieces = self._held[stream], []
        while held and held[0][0] <= self._next[stream]:
            _, _, chunk = heapq.heappop(held)
            pieces += self._place(chunk)
        return pieces

    def _place(self, chunk: LogChunk) -> list[Piece]:
        expected = self._next[chunk.stream]
        end = chunk.offset + len(chunk.data) + chunk.lost
        fresh = chunk.data[expected - chunk.offset :]
        lost = chunk.lost if not chunk.data and end > expected else 0
        if not fresh and not lost and chunk.eof is None:
            return []
        self._next[chunk.stream] = max(expected, end)
        return [
            Piece(
                stream=chunk.stream,
                instance=chunk.instance,
                offset=expected if fresh else chunk.offset,
                time=chunk.time,
                data=fresh,
                marks=chunk.marks,
                missing=min(lost, end - expected) if lost else 0,
                reason=chunk.lost_reason if lost else None,
                eof=chunk.eof,
                incomplete=chunk.incomplete,
            )
        ]


def _gap(chunk: LogChunk, offset: int, count: int, reason: str) -> Piece:
    return Piece(
        stream=chunk.stream,
        instance=chunk.instance,
        offset=offset,
        time=chunk.time,
        missing=count,
        reason=reason,
    )


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """A line without its newline; `partial` when none has come yet."""

    time: datetime
    stream: str
    data: bytes
    partial: bool = False

    def wire(self) -> dict[str, Any]:
        """As the query `logs` writes it."""
        import base64

        head = {"time": self.time, "stream": self.stream}
        try:
            return {**head, "text": self.data.decode()}
        except UnicodeDecodeError:
            return {**head, "text": base64.b64encode(self.data).decode(), "encoding": BASE64}


class LineCutter:
    """Cuts pieces into lines, with the capture time of each line's first byte."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[datetime, list[bytes]]] = {}

    def put(self, piece: Piece) -> list[Line]:
        lines: list[Line] = []
        at, last = piece.offset, piece.data.count(b"\n")
        for number, part in enumerate(piece.data.split(b"\n")):
            if number == last and not part:
                break
            begun, parts = self._open.pop(piece.stream, (time_at(piece, at), []))
            parts.append(part)
            if number < last:
                lines.append(Line(time=begun, stream=piece.stream, data=b"".join(parts)))
            else:
                self._open[piece.stream] = (begun, parts)
            at += len(part) + 1
        if piece.eof is not None or piece.missing:
            lines += self.rest(piece.stream)
        return lines

    def rest(self, stream: str | None = None) -> list[Line]:
        """The lines whose newline has not come."""
        names = list(self._open) if stream is None else [stream] if stream in self._open else []
        lines = []
        for name in names:
            begun, parts = self._open.pop(name)
            lines.append(Line(time=begun, stream=name, data=b"".join(parts), partial=True))
        return lines


def time_at(piece: Piece, offset: int) -> datetime:
    """When the byte at `offset` was captured: the last mark at or before it."""
    found = piece.time
    for start, moment in piece.marks:
        if start > offset:
            break
        found = moment
    return found
