"""Capture files as lines: forwards from an offset, and where the last lines begin. Blocking, in bounded memory.

A line ends with its newline, with the end of its run, before lost bytes, or when it is longer than LINE_BYTES.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from worker.capture_files import Segment, extents, list_segments
from worker.capture_reader import CaptureReader, Span

LINE_BYTES = 64 * 1024
BLOCK_BYTES = 128 * 1024
SETTLED_US = 250_000


class Line(NamedTuple):
    """`data` without the newline; `stop` is the offset behind it. The time is that of its first byte."""

    time_us: int
    start: int
    stop: int
    data: bytes


class LineReader:
    """The lines of one stream in `start` … `stop`.

    What stands at the end without a newline is a line too, once nothing followed it for a quarter of a second:
    it may be a prompt, and it may be a line that is just being written. `now_us` is when to judge that.
    """

    def __init__(self, folder: Path, stream: str, start: int, stop: int, now_us: int) -> None:
        self._reader = CaptureReader(folder, stream, start, 0)
        self._stop = stop
        self._now_us = now_us
        self._parts = b""
        self._begin = start
        self._begin_us = 0

    def __iter__(self) -> Iterator[Line]:
        newest_us = 0
        try:
            while self._reader.offset < self._stop:
                span = self._reader.span(BLOCK_BYTES)
                if span is None:
                    break
                if span.lost is None and span.length:
                    newest_us = span.times[-1][1]
                    yield from self._split(span)
                else:
                    self._reader.commit(span)
                if span.lost is not None or span.end is not None:
                    yield from self._rest()
            if self._now_us - newest_us >= SETTLED_US:
                yield from self._rest()
        finally:
            self._reader.close()

    def _split(self, span: Span) -> Iterator[Line]:
        data = self._reader.read(span)
        self._reader.commit(span)
        data = data[: self._stop - span.offset]
        times, at = span.times, 0
        position = 0
        while position < len(data):
            offset = span.offset + position
            while at + 1 < len(times) and times[at + 1][0] <= offset:
                at += 1
            if not self._parts:
                self._begin, self._begin_us = offset, times[at][1]
            room = LINE_BYTES - len(self._parts)
            newline = data.find(b"\n", position, position + room + 1)
            stop = position + room if newline < 0 else newline
            if newline < 0 and stop >= len(data):
                self._parts += data[position:]
                return
            line = self._parts + data[position:stop]
            self._parts = b""
            position = stop if newline < 0 else stop + 1
            yield Line(self._begin_us, self._begin, span.offset + position, line)

    def _rest(self) -> Iterator[Line]:
        if self._parts:
            line, self._parts = self._parts, b""
            yield Line(self._begin_us, self._begin, self._begin + len(line), line)


def stream_end(folder: Path, stream: str) -> int:
    """The offset that the marks reach."""
    for base in reversed(list_segments(folder, stream)):
        segment = Segment.open(folder, stream, base)
        if segment is not None:
            try:
                return segment.run_ends()[1]
            finally:
                segment.close()
    return 0


def tail_start(folder: Path, stream: str, count: int, stop: int) -> int:
    """Where a line begins that has at least `count` lines from there to `stop`, else the oldest byte's offset.

    Only newlines are counted. What else ends a line gives some more lines than were asked for.
    """
    ends = oldest = 0
    for base in reversed(list_segments(folder, stream)):
        segment = Segment.open(folder, stream, base)
        if segment is None:
            continue
        try:
            for extent in reversed(extents(segment)):
                length = min(extent.length, stop - extent.offset)
                if length <= 0:
                    continue
                position = length
                while position > 0:
                    begin = max(0, position - BLOCK_BYTES)
                    block = segment.read(extent.position + begin, position - begin)
                    found = block.count(b"\n")
                    if ends + found > count:
                        at = len(block)
                        for _ in range(count + 1 - ends):
                            at = block.rfind(b"\n", 0, at)
                        return extent.offset + begin + at + 1
                    ends += found
                    position = begin
                oldest = extent.offset
        finally:
            segment.close()
    return oldest


def since_start(folder: Path, stream: str, since_us: int) -> int:
    """Where the first line begins whose first byte was captured at `since_us` or later."""
    before: int | None = None
    for base in list_segments(folder, stream):
        segment = Segment.open(folder, stream, base)
        if segment is None:
            continue
        try:
            first = next(segment.marks(), None)
            if first is not None and first.time_us >= since_us:
                break
            before = base
        finally:
            segment.close()
    return 0 if before is None else before
