"""One stream's capture files: bounded segments of raw bytes, and marks that say what each byte is.

`<stream>.<offset of the first byte, 20 digits>.log` holds bytes, the `.marks` beside it records of 32 bytes
(offset, time in unix µs, length, kind), each written after the bytes that it describes. Offsets count from
the start of the instance and go on across runs. Bytes that were not stored are counted by a mark of their
own and by the offsets, and stand in no file: a byte's place is the sum of the stored lengths before it in
its segment.

A full or broken disk never blocks: what cannot be written is counted, and marked as soon as something can be.
"""

import errno
import os
import struct
import time
from collections.abc import Callable

MARK = struct.Struct("<QQQBxxxxxxx")
DATA, LOST_RATE, LOST_DISK, EOF, EOF_INCOMPLETE = range(5)

DEFAULT_MAX_BYTES = 64 * 1024 * 1024
MIN_SEGMENT, MAX_SEGMENT = 256 * 1024, 4 * 1024 * 1024
MAX_SEGMENTS = 1024
_SMALLEST = 4096
_RETRY_S = 0.25

_NO_LINK = os.O_NOFOLLOW | os.O_CLOEXEC
_APPEND = os.O_WRONLY | os.O_APPEND | _NO_LINK
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | _NO_LINK


class OpenFiles:
    """Keeps the files of at most `limit` streams open; those opened first are closed first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._writers: dict[SegmentWriter, None] = {}

    @property
    def open(self) -> int:
        """How many streams have their files open; two each."""
        return len(self._writers)

    def opened(self, writer: "SegmentWriter") -> None:
        self._writers.pop(writer, None)
        self._writers[writer] = None
        if len(self._writers) > self.limit:
            next(iter(self._writers)).close()

    def closed(self, writer: "SegmentWriter") -> None:
        self._writers.pop(writer, None)


class SegmentWriter:
    """Appends to the capture files of one stream of one instance.

    `max_bytes` bounds bytes and marks together; the oldest segment goes first. `on_trouble` hears of each
    stretch of disk errors once.
    """

    def __init__(
        self,
        state_dir: str,
        stream: str,
        max_bytes: int | None,
        files: OpenFiles,
        on_trouble: Callable[[str], None],
    ) -> None:
        self._dir = state_dir
        self._stream = stream
        self._max = max(max_bytes or DEFAULT_MAX_BYTES, 2 * _SMALLEST)
        self._limit = min(max(self._max // 16, MIN_SEGMENT), MAX_SEGMENT, self._max // 2)
        self._files = files
        self._on_trouble = on_trouble
        self._older: list[tuple[int, int]] = []  # (base, bytes on disk) of closed segments, oldest first
        self._older_bytes = 0
        self._base = -1
        self._log_size = 0
        self._marks_size = 0
        self._log = self._marks = -1
        self._loaded = False
        self._spoilt = False
        self.lost = (0, LOST_DISK)  # bytes that are not marked yet, and why they are lost
        self._in_trouble = False
        self._retry_at = 0.0
        self.end = 0

    # -- writing

    def load(self) -> None:
        """Find the end of what is there already, which the first write does otherwise."""
        try:
            directory = os.open(self._dir, _DIRECTORY)
            try:
                self._load(directory)
            finally:
                os.close(directory)
        except OSError as failure:
            self._trouble(failure)

    def append(self, data: memoryview, now_us: int) -> None:
        """Store bytes, or count them as lost by the disk."""
        if self._retry_at and time.monotonic() < self._retry_at:
            self._lose(len(data), LOST_DISK)
            return
        done = 0
        try:
            self._settle_loss(now_us)
            while done < len(data):
                room = self._limit - self._log_size - self._marks_size
                if not self._log_size:
                    room = max(room, _SMALLEST)  # marks alone (of runs that said nothing) cannot fill it
                if self._log < 0 or room <= 0 or self._spoilt:
                    self._open_segment()
                    continue
                done += self._store(data[done : done + room], now_us)
            self._recovered()
        except OSError as failure:
            self._trouble(failure)
            self._lose(len(data) - done, LOST_DISK)

    def lose(self, length: int) -> None:
        """Count bytes that the rate limit keeps from being stored."""
        self._lose(length, LOST_RATE)

    def finish_run(self, run: int, now_us: int) -> bool:
        """Mark the end of a run; False when the disk refuses even that."""
        try:
            self._settle_loss(now_us)
            self._ready()
            self._mark(self.end, now_us, run, EOF)
            self._recovered()
        except OSError as failure:
            self._trouble(failure)
            return False
        return True

    def close(self) -> None:
        """Close the files; the next write opens them again."""
        if self._log >= 0:
            os.close(self._log)
            os.close(self._marks)
            self._log = self._marks = -1
        self._files.closed(self)

    def _store(self, piece: memoryview, now_us: int) -> int:
        """Write bytes and their mark; gives how many are stored. OSError when none could be."""
        written = 0
        trouble: OSError | None = None
        try:
            while written < len(piece):
                written += os.write(self._log, piece[written:])
        except OSError as failure:
            trouble = failure
        if written:
            try:
                self._mark(self.end, now_us, written, DATA)
            except OSError:
                # Bytes without a mark would shift all that follow.
                os.ftruncate(self._log, self._log_size)
                raise
        self._log_size += written
        self.end += written
        if trouble is not None and not written:
            raise trouble
        return written

    def _mark(self, offset: int, now_us: int, length: int, kind: int) -> None:
        written = os.write(self._marks, MARK.pack(offset, now_us, length, kind))
        if written != MARK.size:
            os.ftruncate(self._marks, self._marks_size)
            raise OSError(errno.ENOSPC, "no room for a mark")
        self._marks_size += written

    # -- what is lost

    def _lose(self, length: int, kind: int) -> None:
        if length:
            before, before_kind = self.lost
            self.lost = (before + length, kind if not before or kind == LOST_DISK else before_kind)

    def _settle_loss(self, now_us: int) -> None:
        """Write down what was lost before anything that follows it."""
        length, kind = self.lost
        if length:
            self._ready()
            self._mark(self.end, now_us, length, kind)
            self.end += length
            self.lost = (0, LOST_DISK)

    def _trouble(self, failure: OSError) -> None:
        self.close()
        self._retry_at = time.monotonic() + _RETRY_S
        if not self._in_trouble:
            self._in_trouble = True
            self._on_trouble(f"{self._dir}/{self._stream}: {failure.strerror or failure}; bytes are lost")

    def _recovered(self) -> None:
        self._retry_at = 0.0
        self._in_trouble = False

    # -- segments

    def _ready(self) -> None:
        if self._log < 0:
            self._open_segment()

    def _open_segment(self) -> None:
        """Open the current segment again, or begin the next one when it is full or spoilt."""
        directory = os.open(self._dir, _DIRECTORY)
        try:
            if not self._loaded:
                self._load(directory)
            full = self._log_size + self._marks_size >= self._limit
            if self._base < 0 or ((full or self._spoilt) and self._base != self.end):
                self._begin(directory)
            else:
                self._reopen(directory)
        finally:
            os.close(directory)
        self._spoilt = False
        self._files.opened(self)

    def _begin(self, directory: int) -> None:
        self.close()
        self._log = os.open(self._name(self.end, "log"), _APPEND | os.O_CREAT, 0o600, dir_fd=directory)
        try:
            self._marks = os.open(
                self._name(self.end, "marks"), _APPEND | os.O_CREAT, 0o600, dir_fd=directory
            )
        except OSError:
            os.close(self._log)
            self._log = -1
            raise
        if self._base >= 0:
            size = self._log_size + self._marks_size
            self._older.append((self._base, size))
            self._older_bytes += size
        self._base = self.end
        self._log_size = self._marks_size = 0
        self._shrink(directory)

    def _reopen(self, directory: int) -> None:
        self.close()
        try:
            log = os.open(self._name(self._base, "log"), _APPEND, dir_fd=directory)
        except FileNotFoundError:
            self._base = -1
            self._begin(directory)
            return
        try:
            self._marks = os.open(
                self._name(self._base, "marks"), _APPEND | os.O_CREAT, 0o600, dir_fd=directory
            )
        except OSError:
            os.close(log)
            raise
        self._log = log

    def _shrink(self, directory: int) -> None:
        """Delete the oldest segments until the current one may grow full."""
        while self._older and (
            self._older_bytes + self._limit > self._max or len(self._older) >= MAX_SEGMENTS
        ):
            base, size = self._older.pop(0)
            self._older_bytes -= size
            for kind in ("log", "marks"):
                try:
                    os.unlink(self._name(base, kind), dir_fd=directory)
                except FileNotFoundError:
                    continue

    def _load(self, directory: int) -> None:
        """Find what earlier runs left, possibly under another launcher."""
        sizes: dict[int, int] = {}
        for name in os.listdir(directory):
            stream, _, rest = name.partition(".")
            base, _, kind = rest.partition(".")
            if stream == self._stream and kind in ("log", "marks") and base.isdigit() and len(base) == 20:
                size = os.stat(name, dir_fd=directory, follow_symlinks=False).st_size
                sizes[int(base)] = sizes.get(int(base), 0) + size
        bases = sorted(sizes)
        if bases:
            self._resume(directory, bases.pop())
            self._older = [(base, sizes[base]) for base in bases]
            self._older_bytes = sum(size for _, size in self._older)
        self._loaded = True

    def _resume(self, directory: int, base: int) -> None:
        """Go on behind the newest segment: in it when bytes and marks agree, in a new one otherwise."""
        self._base = base
        self._log_size = _size(self._name(base, "log"), directory)
        raw = self._all_marks(directory, base)
        self._marks_size = len(raw) - len(raw) % MARK.size
        end, stored = base, 0
        for offset, _, length, kind in MARK.iter_unpack(raw[: self._marks_size]):
            if kind in (DATA, LOST_RATE, LOST_DISK):
                end = offset + length
            if kind == DATA:
                stored += length
        # Bytes that were captured but not marked, by a launcher that was killed, count too.
        self.end = end + max(self._log_size - stored, 0)
        self._spoilt = stored != self._log_size or len(raw) != self._marks_size
        if self._spoilt and self.end == base:
            # A new segment would have the same name, so this one must do.
            self._cut(directory, base)

    def _all_marks(self, directory: int, base: int) -> bytes:
        try:
            fd = os.open(self._name(base, "marks"), os.O_RDONLY | _NO_LINK, dir_fd=directory)
        except FileNotFoundError:
            return b""
        try:
            data = b""
            while chunk := os.read(fd, 1 << 20):
                data += chunk
            return data
        finally:
            os.close(fd)

    def _cut(self, directory: int, base: int) -> None:
        fd = os.open(self._name(base, "marks"), os.O_WRONLY | _NO_LINK, dir_fd=directory)
        try:
            os.ftruncate(fd, self._marks_size)
        finally:
            os.close(fd)
        self._spoilt = False

    def _name(self, base: int, kind: str) -> str:
        return f"{self._stream}.{base:020d}.{kind}"


def _size(name: str, directory: int) -> int:
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False).st_size
    except FileNotFoundError:
        return 0
