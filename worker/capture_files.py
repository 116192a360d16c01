"""Capture files: what the launcher keeps of a container's output, and how to read it.

Per stream there are segments, each two files named by the offset of the segment's first byte:

    stdout.00000000000000000000.log      the bytes, and nothing else
    stdout.00000000000000000000.marks    32-byte marks, written after the bytes that they describe

Offsets count from the start of the instance, over its runs. A mark is (offset, unix µs, argument, kind):
`DATA` one captured read (argument: its length), `LOST_*` bytes that were discarded (argument: how many;
they are counted by the offsets but stand in no file), `EOF*` the end of a run (argument: its number). The
launcher deletes the oldest segment when there are too many: what is missing below the oldest one was lost
by size.
"""

import os
import re
import struct
import time
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

STREAMS = ("stdout", "stderr")
MARK = struct.Struct("<QQQBxxxxxxx")

_FIRST_READ = 64 * MARK.size
_BLOCK = 1024 * MARK.size
_NAME = re.compile(r"(stdout|stderr)\.([0-9]{20})\.(log|marks)")


class MarkKind(IntEnum):
    DATA = 0
    LOST_RATE = 1
    LOST_DISK = 2
    EOF = 3
    EOF_INCOMPLETE = 4


EOF_KINDS = (MarkKind.EOF, MarkKind.EOF_INCOMPLETE)


class Mark(NamedTuple):
    offset: int
    time_us: int
    argument: int
    kind: int


def segment_path(folder: Path | str, stream: str, base: int, suffix: str) -> str:
    return f"{folder}/{stream}.{base:020d}.{suffix}"


def list_segments(folder: Path | str, stream: str) -> list[int]:
    """The offsets at which segments begin, oldest first; none when the folder is not there."""
    lead, bases = stream + ".", []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name.endswith(".log") and name.startswith(lead) and _NAME.fullmatch(name):
                    bases.append(int(name[len(lead) : -4]))
    except FileNotFoundError:
        return []
    return sorted(bases)


def captured_end(folder: Path | str, stream: str) -> int:
    """About where the captured output ends: bytes that were lost behind the last file's own are not counted."""
    bases = list_segments(folder, stream)
    try:
        return bases[-1] + os.stat(segment_path(folder, stream, bases[-1], "log")).st_size if bases else 0
    except FileNotFoundError:
        return bases[-1]  # deleted since it was listed


class Segment:
    """The two open files of one segment."""

    __slots__ = ("_log", "_marks", "base")

    def __init__(self, base: int, log: int, marks: int) -> None:
        self.base, self._log, self._marks = base, log, marks

    @classmethod
    def open(cls, folder: Path | str, stream: str, base: int) -> "Segment | None":
        """None when one of its files is not there: not made yet, or deleted."""
        try:
            log = os.open(segment_path(folder, stream, base, "log"), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            marks = os.open(segment_path(folder, stream, base, "marks"), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as failure:
            os.close(log)
            if isinstance(failure, FileNotFoundError):
                return None
            raise
        return cls(base, log, marks)

    def read(self, position: int, length: int) -> bytes:
        """Up to `length` bytes; fewer when the file ends before."""
        data = os.pread(self._log, length, position)
        while len(data) < length:
            more = os.pread(self._log, length - len(data), position + len(data))
            if not more:
                break
            data += more
        return data

    def blocks(self, position: int) -> Iterator[bytes]:
        """Whole marks from byte `position` of the marks file on: a few first, then more at a time."""
        size = _FIRST_READ
        while True:
            block = os.pread(self._marks, size, position)
            whole = len(block) - len(block) % MARK.size
            if whole:
                yield block if whole == len(block) else block[:whole]
            if len(block) < size:
                return
            position += whole
            size = _BLOCK

    def marks(self, position: int = 0) -> Iterator[Mark]:
        for block in self.blocks(position):
            yield from map(Mark._make, MARK.iter_unpack(block))

    def run_ends(self, position: int = 0) -> tuple[list[Mark], int]:
        """The marks of ends of runs from byte `position` of the marks on, and the offset that all marks
        reach.
        """
        found, reached = [], self.base
        for block in self.blocks(position):
            words = memoryview(block).cast("Q")
            if any(words[3::4]):
                marks = [Mark._make(mark) for mark in MARK.iter_unpack(block)]
                found += [mark for mark in marks if mark.kind in EOF_KINDS]
                reached = max(
                    [reached, *(m.offset + m.argument for m in marks if m.kind <= MarkKind.LOST_DISK)]
                )
            else:
                reached = max(reached, words[-4] + words[-2])
        return found, reached

    def deleted(self) -> bool:
        return os.fstat(self._log).st_nlink == 0

    def log_size(self) -> int:
        return os.fstat(self._log).st_size

    def close(self) -> None:
        os.close(self._log)
        os.close(self._marks)


class Extent(NamedTuple):
    """Bytes that follow one another, in the stream as in the file. A lost range or the end of a run ends
    it.
    """

    offset: int
    position: int
    length: int


def extents(segment: Segment) -> list[Extent]:
    found: list[Extent] = []
    offset, position, length, expected = segment.base, 0, 0, segment.base
    for mark in segment.marks():
        if mark.kind == MarkKind.DATA and mark.offset == expected:
            length += mark.argument
            expected += mark.argument
            continue
        if length:
            found.append(Extent(offset, position, length))
            position += length
        length = 0
        if mark.kind == MarkKind.DATA:
            length = mark.argument
        if mark.kind in (MarkKind.DATA, MarkKind.LOST_RATE, MarkKind.LOST_DISK):
            expected = mark.offset + mark.argument
        offset = mark.offset if mark.kind == MarkKind.DATA else expected
    if length:
        found.append(Extent(offset, position, length))
    return found


def capture_files(folder: Path) -> list[str]:
    """The names of all capture files in `folder`."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if _NAME.fullmatch(entry.name))
    except FileNotFoundError:
        return []


def move_capture_files(source: Path, target: Path) -> None:
    """Into another folder of the same file system. May be repeated after a crash in the middle of it."""
    for name in capture_files(source):
        os.rename(source / name, target / name)


def delete_capture_files(folder: Path) -> None:
    for name in capture_files(folder):
        (folder / name).unlink(missing_ok=True)


def write_incomplete_eof(state_dir: Path, run: int) -> None:
    """End `run` on both streams when the launcher that captured it is gone: what stood in its pipes is lost.

    Bytes that it had written and not marked yet are kept. Does nothing where the run's end is marked
    already. Only for a run whose launcher and processes are dead.
    """
    for stream in STREAMS:
        bases = list_segments(state_dir, stream)
        if _last_eof(state_dir, stream, bases) >= run:
            continue
        _end_run(state_dir, stream, bases[-1] if bases else 0, run)


def _last_eof(folder: Path, stream: str, bases: list[int]) -> int:
    for base in reversed(bases):
        segment = Segment.open(folder, stream, base)
        if segment is None:
            continue
        try:
            ends, _ = segment.run_ends()
        finally:
            segment.close()
        if ends:
            return max(mark.argument for mark in ends)
    return 0


def _end_run(folder: Path, stream: str, base: int, run: int) -> None:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    log = os.open(segment_path(folder, stream, base, "log"), flags, 0o600)
    try:
        marks = os.open(segment_path(folder, stream, base, "marks"), flags, 0o600)
    except OSError:
        os.close(log)
        raise
    segment = Segment(base, log, marks)
    try:
        end, stored, used = base, 0, 0
        for mark in segment.marks():
            used += MARK.size
            if mark.kind > MarkKind.LOST_DISK:
                continue
            end = mark.offset + mark.argument
            if mark.kind == MarkKind.DATA:
                stored += mark.argument
        now_us = time.time_ns() // 1000
        new = []
        unmarked = segment.log_size() - stored
        if unmarked > 0:
            new.append(MARK.pack(end, now_us, unmarked, MarkKind.DATA))
            end += unmarked
        new.append(MARK.pack(end, now_us, run, MarkKind.EOF_INCOMPLETE))
        # A mark of which the launcher wrote a part only is overwritten.
        os.ftruncate(marks, used)
        os.pwrite(marks, b"".join(new), used)
    finally:
        segment.close()
