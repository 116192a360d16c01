"""One stream of one instance on its way out: when a chunk is due, and which bytes go into it. No tasks, no
NATS.
"""

import asyncio
from bisect import bisect_left
from pathlib import Path
from typing import NamedTuple

from worker.capture_files import STREAMS, captured_end
from worker.capture_reader import CaptureReader, Span
from worker.log_chunks import (
    MAX_CHUNK_BYTES,
    RESEND_S,
    Chunk,
    Cut,
    Position,
    Sent,
    StoredChunk,
    What,
    make_headers,
    newline_cut,
    resume,
)
from worker.log_sent import Flights, Key

WINDOW_S = 0.1
ENOUGH_BYTES = 64 * 1024
SHORTEST_LOOK_S = 0.002
EARLY_LOOK_S = 0.01
EARLY_BYTES = 4096
MAX_UNDER_WAY = 48


class Next(NamedTuple):
    """What a look at a stream gave: a chunk or none, and in how many seconds to look again.

    `look_s` None: when the launcher tells that there is more.
    """

    chunk: Chunk | None
    look_s: float | None


class LogStream:
    """Where a stream stands and what it waits for. It holds no bytes, and no open file for long."""

    __slots__ = (
        "_again",
        "_last_sent",
        "_thorough",
        "captured",
        "doubts",
        "due",
        "exhausted",
        "failures",
        "flights",
        "key",
        "known_end",
        "located",
        "lost_bytes",
        "name",
        "queued",
        "reader",
        "saved",
        "source",
        "subject",
        "told",
        "waiters",
        "waits_for_ack",
    )

    def __init__(self, source: "LogSource", name: str, subject: str) -> None:
        self.source = source
        self.name = name
        self.subject = subject
        self.key: Key = (source.instance, name)
        self.reader = CaptureReader(source.folder, name)
        self.flights = Flights()
        self.saved = self.flights.position  # what the journal has
        self.located = False
        self.doubts = self.failures = 0
        self.known_end = 0
        self.captured = 0  # the end of what was found in the files when they were taken over
        self.lost_bytes = 0
        self.told = -1  # the offset the launcher was told last
        self.queued = False
        self.exhausted = False  # the source is closing, and a look found nothing more
        self.waits_for_ack = False
        self.due: float | None = None
        self.waiters: list[tuple[int, asyncio.Future[None]]] = []
        self._again: list[Cut] = []
        self._last_sent = float("-inf")
        self._thorough = True

    @property
    def unsettled(self) -> bool:
        """Whether something that was sent, or is to be sent again, is not acknowledged."""
        return bool(self.flights.waiting or self._again)

    @property
    def full(self) -> bool:
        """Whether so much is under way that the other streams come first."""
        return len(self.flights.waiting) - len(self._again) >= MAX_UNDER_WAY

    @property
    def end(self) -> int:
        """Where the captured output ends, as far as is known without looking into the files."""
        return max(self.known_end, self.captured, self.reader.offset)

    def end_in_files(self) -> int:
        """The same with a look: the launcher tells of more only when what it told of before is acknowledged."""
        return max(self.end, captured_end(self.source.folder, self.name))

    def look_thoroughly(self) -> None:
        self._thorough = True

    def delay_after_notice(self, end: int, now: float) -> float:
        """The launcher says that there is output up to `end`: in how many seconds to look at it."""
        self.known_end = max(self.known_end, end)
        waiting = self.known_end - self.reader.offset
        left_s = self._last_sent + WINDOW_S - now
        if waiting <= 0 or waiting >= ENOUGH_BYTES or left_s <= 0:
            return 0.0
        # Where much came at once more is likely to follow: it may be enough before the window ends.
        return min(left_s, EARLY_LOOK_S) if waiting >= EARLY_BYTES else left_s

    # -- where to go on

    def nothing_new(self, acked: Position) -> bool:
        """Put the reader there; True when the files hold nothing beyond, so that the stream need not be
        asked.
        """
        self.reader.seek(*acked)
        nothing = self.reader.span(1) is None
        if nothing:
            self.captured = 0
        return nothing and not self.flights.waiting

    def locate(self, acked: Position, newest: StoredChunk | None, now_us: int, *, sure: bool) -> bool:
        """Decide where to go on (`log_chunks.resume`). False: acknowledged bytes seem gone, and `sure` is
        not set.
        """
        oldest = self.flights.oldest_us
        decided = resume(
            self.source.instance,
            acked=acked,
            sent=[Sent(flight.cut, flight.acked) for flight in self.flights.waiting],
            fresh=oldest is not None and abs(now_us - oldest) < RESEND_S * 1e6,
            tail=self.flights.tail,
            newest=newest,
        )
        if decided.doubtful and not sure:
            return False
        self.flights.resume(decided)
        gone = {cut for cut in decided.there if cut.what is What.DATA and self._read_again(cut) is None}
        for cut in gone:
            self.flights.settle(cut)
        self._again = [cut for cut in decided.again if cut not in gone]
        self.reader.seek(*decided.position)
        self.located = True
        return True

    # -- the next chunk

    def next(self, now: float) -> Next:
        """The next chunk, if it is due. `now` is the loop's time."""
        if self._again:
            return self._sent(self._repeat(self._again.pop(0)), 0.0, now)
        thorough = self._thorough or self.known_end > self.reader.offset
        span = self.reader.span(MAX_CHUNK_BYTES, thorough=thorough)
        if span is None:
            self._thorough = False
            self.captured = 0  # what stands behind the offset, if anything, was not captured whole
            return Next(None, None)
        if span.lost is not None:
            return self._sent(self._lost(span, span.lost), 0.0, now)
        if span.end is not None and not span.length:
            self.reader.commit(span)
            cut = Cut(What.EOF, span.offset, 0, span.end.run, eof=True, incomplete=span.end.incomplete)
            return self._sent(self._chunk(cut), 0.0, now)
        wait_s = self._must_wait(span, now)
        if wait_s > 0:
            return Next(None, wait_s)
        return self._data(span, now)

    def _must_wait(self, span: Span, now: float) -> float:
        """Seconds until it is due or may have grown to be enough; 0: it is due."""
        if span.end is not None or not span.last or span.length >= ENOUGH_BYTES or self.source.closing:
            return 0.0
        quiet_s = now - self._last_sent
        left_s = WINDOW_S - quiet_s
        if left_s < SHORTEST_LOOK_S or self._continues(span):
            return 0.0
        return min(left_s, max(quiet_s * (ENOUGH_BYTES / span.length - 1), SHORTEST_LOOK_S))

    def _data(self, span: Span, now: float) -> Next:
        """One chunk of data, over the end of a file if need be."""
        reader, offset, run = self.reader, span.offset, self.reader.run_of(span, self.source.run)
        data = b""
        times: list[tuple[int, int]] = []
        following: Span | None = span
        continued = False
        while following is not None:
            span = following
            part = reader.read(span)
            times += span.times
            following = None
            if len(part) < span.length:
                break  # the machine stopped between the bytes and the mark that was written after them
            if self._continues(span):
                continued = True
                reader.commit(span)
                data += part
                part = b""
                following = self._following(run, MAX_CHUNK_BYTES - len(data))
            elif span.full or (span.last and len(part) >= ENOUGH_BYTES):
                part = part[: newline_cut(part)]
        if part:
            reader.commit(span, len(part))
            data += part
        if not data:
            return self._sent(self._lost(span, "disk"), 0.0, now)
        reader.eof_run = max(reader.eof_run, run - 1)
        end = span.end if reader.offset == span.stop else None
        del times[bisect_left(times, (offset + len(data), 0)) :]
        cut = Cut(
            What.DATA,
            offset,
            len(data),
            run,
            eof=end is not None,
            incomplete=end is not None and end.incomplete,
        )
        chunk = Chunk(cut, data, make_headers(self.source.instance, self.name, cut, times))
        return self._sent(chunk, 0.0 if continued else self._next_look(span, cut, now), now)

    def _continues(self, span: Span) -> bool:
        """Whether what follows stands in the next file. Not asked when the launcher told of nothing beyond."""
        return (self._thorough or self.known_end > span.stop) and self.reader.continues(span)

    def _following(self, run: int, limit: int) -> Span | None:
        """The data of the next file that can stand in the same chunk."""
        span = self.reader.span(limit) if limit > 0 else None
        if span is None or not span.length or span.lost is not None:
            return None
        return span if self.reader.run_of(span, self.source.run) == run else None

    def _next_look(self, span: Span, cut: Cut, now: float) -> float | None:
        """At once when more is there; when another 64 KiB may be; else when the launcher tells."""
        if span.full or cut.eof or not span.last or self._thorough:
            return 0.0
        quiet_s = now - self._last_sent
        expected_s = ENOUGH_BYTES * quiet_s / cut.length
        if expected_s < WINDOW_S:
            return max(expected_s, SHORTEST_LOOK_S)
        return WINDOW_S if self.reader.offset < span.stop else None

    def _lost(self, span: Span, reason: str) -> Chunk:
        run = self.reader.run_of(span, self.source.run)
        self.reader.commit(span._replace(end=None))
        self.reader.eof_run = max(self.reader.eof_run, run - 1)
        self.lost_bytes += span.length
        return self._chunk(Cut(What.LOST, span.offset, span.length, run, reason=reason))

    def _chunk(self, cut: Cut) -> Chunk:
        return Chunk(cut, b"", make_headers(self.source.instance, self.name, cut))

    def _sent(self, chunk: Chunk, look_s: float | None, now: float) -> Next:
        self._last_sent = now
        return Next(chunk, look_s)

    # -- the same chunk again

    def _repeat(self, cut: Cut) -> Chunk:
        if cut.what is not What.DATA:
            return self._chunk(cut)
        read = self._read_again(cut)
        if read is None:
            return self._lost_again(cut)
        data, times = read
        return Chunk(cut, data, make_headers(self.source.instance, self.name, cut, times))

    def _read_again(self, cut: Cut) -> tuple[bytes, list[tuple[int, int]]] | None:
        """The bytes of a chunk and their times; None when they are not there any more."""
        reader = CaptureReader(self.source.folder, self.name, cut.offset, cut.run - 1)
        data = b""
        times: list[tuple[int, int]] = []
        try:
            while len(data) < cut.length:
                span = reader.span(cut.length - len(data))
                part = b"" if span is None or span.lost is not None or not span.length else reader.read(span)
                if span is None or not part:
                    return None
                times += span.times
                data += part
                reader.commit(span, len(part))
        finally:
            reader.close()
        return data, times

    def _lost_again(self, cut: Cut) -> Chunk:
        """The bytes were deleted meanwhile, and the stream does not show that it has them."""
        lost = cut._replace(what=What.LOST, reason="size")
        self.lost_bytes += cut.length
        self.flights.replace(cut, lost)
        return self._chunk(lost)


class LogSource:
    """The two streams of an instance. `run` was begun last; `closing`: the container is gone, nothing more
    comes. `blocked`: an older instance of the container goes first.
    """

    __slots__ = ("blocked", "cid", "closing", "folder", "instance", "run", "streams")

    def __init__(self, cid: str, instance: str, folder: Path, run: int, subjects: dict[str, str]) -> None:
        self.cid, self.instance, self.folder, self.run = cid, instance, folder, run
        self.closing = self.blocked = False
        self.streams = {name: LogStream(self, name, subjects[name]) for name in STREAMS}

    def move_to(self, folder: Path) -> None:
        self.folder = folder
        for stream in self.streams.values():
            stream.reader.folder = folder
