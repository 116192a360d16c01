"""Which chunks were sent and which were acknowledged, kept in a small file through a kill of the worker.

The journal knows a cursor per stream, at most a second old. This file adds what happened since: a record
before each chunk is sent and one after it was acknowledged. It is never synced: it outlives the process,
which is what it is for, and after a power failure `log_chunks.resume` does with the newest message of the
stream. When the cursors are in the journal the file is made anew with what is left, so it stays as small as
one second's work.
"""

import errno
import os
import struct
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from loguru import logger

from worker.capture_files import STREAMS
from worker.log_chunks import REASONS, START, Cut, Position, Resume, What

_RECORD = struct.Struct(
    "<26sBBBBIQQQ"
)  # instance, stream, operation, what, flags, run, offset, length, unix µs
_SENT, _ACKED, _AT, _TAIL = range(4)
_EOF, _INCOMPLETE = 1, 2
_STREAM_CODES = {name: code for code, name in enumerate(STREAMS)}
_REASON_CODES = {reason: code for code, reason in enumerate(REASONS)}

Key = tuple[str, str]


class Flight:
    """One chunk on its way. `time_us`: when it was sent first."""

    __slots__ = ("acked", "cut", "time_us")

    def __init__(self, cut: Cut, time_us: int) -> None:
        self.cut, self.time_us, self.acked = cut, time_us, False


class Flights:
    """The chunks of a stream on their way, in order of offset.

    `position` is where everything before was acknowledged. `tail` is behind the chunk that was acknowledged
    last: another place than `position` when chunks were stored out of order.
    """

    __slots__ = ("position", "tail", "waiting")

    def __init__(self, position: Position = START) -> None:
        self.position = self.tail = position
        self.waiting: deque[Flight] = deque()

    def send(self, cut: Cut, time_us: int) -> bool:
        """False when it was sent before."""
        if any(flight.cut == cut for flight in self.waiting):
            return False
        self.waiting.append(Flight(cut, time_us))
        return True

    def advance(self, position: Position) -> None:
        """All before `position` is known to be acknowledged."""
        if self.tail == START:
            self.tail = position
        self.position = max(self.position, position)
        self.waiting = deque(flight for flight in self.waiting if flight.cut.after > self.position)

    def ack(self, cut: Cut) -> None:
        for flight in self.waiting:
            if flight.cut == cut:
                flight.acked = True
                break
        self.tail = cut.after
        self._pass_acked()

    def settle(self, cut: Cut) -> None:
        """It is in the stream, although nobody has heard so."""
        for flight in self.waiting:
            if flight.cut == cut:
                flight.acked = True
        self._pass_acked()

    def replace(self, cut: Cut, by: Cut) -> None:
        for flight in self.waiting:
            if flight.cut == cut:
                flight.cut = by

    @property
    def oldest_us(self) -> int | None:
        """When the oldest unacknowledged one was sent first."""
        return min((flight.time_us for flight in self.waiting if not flight.acked), default=None)

    def resume(self, decided: Resume) -> None:
        """Take over what was decided about the chunks of a dead worker."""
        again = set(decided.again)
        kept = [f for f in self.waiting if f.cut in again or f.cut.after <= decided.position]
        self.waiting = deque([] if decided.doubtful else kept)
        for flight in self.waiting:
            flight.acked = flight.cut not in again
        self._pass_acked()
        if not self.waiting:
            self.position = decided.position
        self.tail = decided.tail

    def _pass_acked(self) -> None:
        while self.waiting and self.waiting[0].acked:
            self.position = max(self.position, self.waiting.popleft().cut.after)


class SentLog:
    """The file. A disk that does not take a record is told once and stops nothing: without the record, a
    crash in the same second is decided by the newest message of the stream alone.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = -1
        self._acks: list[bytes] = []
        self._failed = False
        self.size = 0

    def open(self) -> dict[Key, Flights]:
        """What a dead worker left, by (instance, stream)."""
        found: dict[Key, Flights] = {}
        try:
            self._reopen()
            raw = self._path.read_bytes()
        except OSError as failure:
            self._complain(failure)
            return found
        whole = len(raw) - len(raw) % _RECORD.size
        for name, stream, operation, what, flags, run, offset, length, time_us in _RECORD.iter_unpack(
            raw[:whole]
        ):
            key = (name.rstrip(b"\0").decode("ascii", "replace"), STREAMS[stream & 1])
            flights = found.setdefault(key, Flights())
            if operation in (_AT, _TAIL):
                position = Position(offset, run)
                if operation == _AT:
                    flights.position = position
                flights.tail = position
                continue
            if what >> 4 > What.EOF or what & 15 >= len(REASONS):
                continue  # a torn or foreign record
            cut = Cut(
                What(what >> 4),
                offset,
                length,
                run,
                eof=bool(flags & _EOF),
                incomplete=bool(flags & _INCOMPLETE),
                reason=REASONS[what & 15],
            )
            if operation == _ACKED:
                flights.ack(cut)
            elif operation == _SENT:
                flights.send(cut, time_us)
        if whole != len(raw):
            os.ftruncate(self._file, whole)
        self.size = whole
        return found

    def sent(self, key: Key, cut: Cut, time_us: int) -> None:
        """Before the chunk is sent."""
        self._acks.append(_pack(key, _SENT, cut, time_us))
        self._write(b"".join(self._acks))

    def acked(self, key: Key, cut: Cut) -> None:
        """Written with the next chunk; one that is not written in time is sent again and dropped by the
        stream.
        """
        self._acks.append(_pack(key, _ACKED, cut, 0))

    def rewrite(self, streams: Sequence[tuple[Key, Flights]]) -> None:
        """Begin the file anew with the state of these streams; the journal has all of the others."""
        self._acks.clear()
        if self._file >= 0 and not self._failed and self.size == 0 and not streams:
            return
        records = []
        for key, flights in streams:
            records.append(_pack_position(key, _AT, flights.position))
            if flights.tail != flights.position:
                records.append(_pack_position(key, _TAIL, flights.tail))
            for flight in flights.waiting:
                records.append(_pack(key, _SENT, flight.cut, flight.time_us))
                if flight.acked:
                    records.append(_pack(key, _ACKED, flight.cut, 0))
        data = b"".join(records)
        fresh = self._path.with_suffix(".new")
        try:
            fresh.write_bytes(data)
            fresh.chmod(0o600)
            fresh.replace(self._path)
            self._reopen()
        except OSError as failure:
            self._complain(failure)
            return
        self.size = len(data)
        self._failed = False

    def close(self) -> None:
        if self._acks:
            self._write(b"".join(self._acks))
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _reopen(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(self._path, flags, 0o600)

    def _write(self, data: bytes) -> None:
        self._acks.clear()
        if self._file < 0 or self._failed:
            return
        try:
            written = os.write(self._file, data)
        except OSError as failure:
            self._complain(failure)
            return
        self.size += written
        if written < len(data):
            self._complain(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    def _complain(self, failure: OSError) -> None:
        if not self._failed:
            logger.warning("{} cannot be written: {}", self._path, failure.strerror)
        self._failed = True


def _pack(key: Key, operation: int, cut: Cut, time_us: int) -> bytes:
    flags = (_EOF if cut.eof else 0) | (_INCOMPLETE if cut.incomplete else 0)
    what = cut.what << 4 | _REASON_CODES[cut.reason]
    return _RECORD.pack(
        key[0].encode(),
        _STREAM_CODES[key[1]],
        operation,
        what,
        flags,
        cut.run,
        cut.offset,
        cut.length,
        time_us,
    )


def _pack_position(key: Key, operation: int, position: Position) -> bytes:
    offset, eof_run = position
    return _RECORD.pack(key[0].encode(), _STREAM_CODES[key[1]], operation, 0, 0, eof_run, offset, 0, 0)
