"""The programs' output pipes: read without ever blocking, stored in segments, told to the worker.

Pacing: after a pass over the pipes they are left alone for up to 5 ms, or until the fastest of them could
be half full, so that many quiet programs cost one wake-up together. After silence the first byte is read at
once.
"""

import os
import time
from collections.abc import Callable

from worker.launcher.mux import Mux
from worker.launcher.processes import System
from worker.launcher.segments import OpenFiles, SegmentWriter

READ_BYTES = 1024 * 1024
PASS_BYTES = 4 * 1024 * 1024
_BATCH = 32
_MAX_GAP_NS = 5_000_000
_MIN_GAP_NS = 1_000_000  # what the wait can resolve
_PIPE_BYTES, _GROWN_BYTES = 64 * 1024, 256 * 1024
_GROWTH_BUDGET = 16 * 1024 * 1024
_DRAIN_BYTES = 2 * 1024 * 1024


class RateLimit:
    """A token bucket. Once empty it stays shut until it is half full, so that losses come in few stretches."""

    def __init__(self, bytes_per_s: int, now_ns: int) -> None:
        self._rate = bytes_per_s
        self._burst = max(bytes_per_s, 4096)
        self._tokens = float(self._burst)
        self._shut = False
        self._at = now_ns

    def take(self, length: int, now_ns: int) -> int:
        """How many of `length` bytes may be stored now."""
        self._tokens = min(self._burst, self._tokens + (now_ns - self._at) * self._rate / 1e9)
        self._at = now_ns
        if self._shut:
            if self._tokens < self._burst / 2:
                return 0
            self._shut = False
        allowed = min(length, int(self._tokens))
        self._tokens -= allowed
        self._shut = allowed < length
        return allowed


class StreamCapture:
    """One stream of one run. `outstanding` is set from a notice to the worker until it has caught up."""

    __slots__ = ("capacity", "cid", "fd", "full", "name", "outstanding", "rate", "read_at", "told", "writer")

    def __init__(self, cid: str, name: str, fd: int, writer: SegmentWriter, rate: RateLimit | None) -> None:
        self.cid = cid
        self.name = name
        self.fd = fd
        self.writer = writer
        self.rate = rate
        self.capacity = _PIPE_BYTES
        self.full = 0
        self.read_at = 0
        self.outstanding = False
        self.told = 0


class Capture:
    """All streams of the launcher."""

    def __init__(self, mux: Mux, table: System, files: OpenFiles, log: Callable[[str], None]) -> None:
        self._mux = mux
        self._table = table
        self.files = files
        self._log = log
        self._buffer = bytearray(READ_BYTES)
        self._view = memoryview(self._buffer)
        self._streams: dict[int, StreamCapture] = {}
        self._budget = _GROWTH_BUDGET
        self._notices: dict[tuple[str, str], StreamCapture] = {}
        self._resume_ns = 0

    # -- streams

    def writer(self, state_dir: str, name: str, max_bytes: int | None) -> SegmentWriter:
        return SegmentWriter(state_dir, name, max_bytes, self.files, self._log)

    def open(
        self, cid: str, name: str, fd: int, writer: SegmentWriter, max_rate: int | None
    ) -> StreamCapture:
        """Take over the reading end of a program's pipe; -1 stands for one that is closed already."""
        rate = RateLimit(max_rate, time.monotonic_ns()) if max_rate else None
        stream = StreamCapture(cid, name, fd, writer, rate)
        if fd >= 0:
            os.set_blocking(fd, False)
            self._streams[fd] = stream
            self._mux.watch_output(fd)
        return stream

    def drain(self, stream: StreamCapture) -> None:
        """Read what a dead tree left in the pipe and close it; a process that escaped cannot hold it open."""
        left = _DRAIN_BYTES
        while stream.fd >= 0 and left > 0:
            length = self._read(stream, time.monotonic_ns())
            if length <= 0:
                break
            left -= length
        self._close(stream)

    def _close(self, stream: StreamCapture) -> None:
        if stream.fd >= 0:
            self._mux.unwatch_output(stream.fd)
            del self._streams[stream.fd]
            os.close(stream.fd)
            stream.fd = -1
            self._budget += stream.capacity - _PIPE_BYTES

    def dispose(self, stream: StreamCapture) -> None:
        """Forget a stream whose run is over."""
        self._close(stream)
        stream.writer.close()
        if self._notices.get((stream.cid, stream.name)) is stream:
            del self._notices[stream.cid, stream.name]

    # -- passes

    def muted_for(self) -> float:
        """Seconds until output is to be looked at again; 0 when it may be now."""
        left = self._resume_ns - time.monotonic_ns()
        return left / 1e9 if left > 0 else 0.0

    def read_ready(self) -> None:
        """One pass over the pipes that are readable, at most about PASS_BYTES."""
        now = time.monotonic_ns()
        total = 0
        gap = _MAX_GAP_NS
        while total < PASS_BYTES:
            ready = self._mux.ready_output(_BATCH)
            for fd in ready:
                stream = self._streams.get(fd)
                if stream is None:
                    continue
                before = stream.read_at
                length = self._read(stream, now)
                if length > 0:
                    total += length
                    gap = min(gap, _half_full_in(stream.capacity, length, now - before))
            if len(ready) < _BATCH:
                break
        self._resume_ns = now + gap if gap >= _MIN_GAP_NS else 0

    def _read(self, stream: StreamCapture, now_ns: int) -> int:
        """One read into the files; 0 at the end of the pipe (which is closed then), -1 when nothing is
        there.
        """
        try:
            length = os.readv(stream.fd, [self._buffer])
        except BlockingIOError:
            return -1
        if not length:
            self._close(stream)
            return 0
        stream.read_at = now_ns
        data = self._view[:length]
        writer = stream.writer
        if stream.rate is None:
            writer.append(data, time.time_ns() // 1000)
        else:
            self._append_limited(stream, stream.rate, data, now_ns)
        if not stream.outstanding and writer.end > stream.told:
            self._notice(stream)
        if length >= stream.capacity - 4096:
            self._found_full(stream)
        return length

    def _append_limited(self, stream: StreamCapture, rate: RateLimit, data: memoryview, now_ns: int) -> None:
        allowed = rate.take(len(data), now_ns)
        if 0 < allowed < len(data):
            # A whole line less reads better than half of one.
            allowed = bytes(data[:allowed]).rfind(b"\n") + 1 or allowed
        if allowed:
            stream.writer.append(data[:allowed], time.time_ns() // 1000)
        if allowed < len(data):
            stream.writer.lose(len(data) - allowed)

    def _found_full(self, stream: StreamCapture) -> None:
        """Grow a pipe that keeps its program waiting; an unprivileged user has a budget for that."""
        stream.full += 1
        wanted = _GROWN_BYTES - stream.capacity
        if stream.full == 2 and 0 < wanted <= self._budget:
            before = stream.capacity
            stream.capacity = max(self._table.grow_pipe(stream.fd, _GROWN_BYTES), before)
            self._budget -= stream.capacity - before

    # -- notices

    def _notice(self, stream: StreamCapture) -> None:
        self._notices[stream.cid, stream.name] = stream

    def take_notices(self) -> list[list[object]]:
        """What the worker is to be told now: [cid, stream, end offset], each once until it is acknowledged."""
        if not self._notices:
            return []
        items: list[list[object]] = []
        for stream in self._notices.values():
            stream.outstanding = True
            stream.told = stream.writer.end
            items.append([stream.cid, stream.name, stream.told])
        self._notices.clear()
        return items

    def announce(self, stream: StreamCapture) -> None:
        """Tell of a stream again: something was added to its marks."""
        stream.told = 0
        if not stream.outstanding:
            self._notice(stream)

    def acknowledge(self, stream: StreamCapture, offset: int) -> None:
        stream.outstanding = False
        stream.told = offset
        if stream.writer.end > offset:
            self._notice(stream)

    def rearm(self, stream: StreamCapture) -> None:
        """A new worker listens: what an older one was told does not count."""
        stream.outstanding = False
        stream.told = 0
        self._notices.pop((stream.cid, stream.name), None)


def _half_full_in(capacity: int, length: int, elapsed_ns: int) -> int:
    """Nanoseconds in which a pipe gets half full at the pace of its last read; 0 when it was that full."""
    half = capacity // 2
    return 0 if length >= half else half * max(elapsed_ns, 0) // length
