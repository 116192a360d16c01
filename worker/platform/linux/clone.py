"""Copying a tree on Linux.

Shared blocks where the file system can (FICLONE), else in the kernel, else by hand.
"""

import errno
import fcntl
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from worker.platform.base import CloneChoice, CloneReport
from worker.platform.descent import open_directory
from worker.platform.treecopy import FileCopier, TreeCopy
from worker.platform.xattrs import LinuxXattrs

# linux/fs.h: FICLONE _IOW(0x94, 9, int)
_FICLONE = 0x40049409

# What a file system answers that shares no blocks, or not between these two files (ioctl_ficlone(2)).
_NO_REFLINK = frozenset(
    {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM, errno.ETXTBSY}
)
# What copy_file_range(2) answers where it cannot serve.
_NO_RANGE = frozenset({errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ETXTBSY})

_SMALL = 64 * 1024
_STEP = 1 << 30

_PROBE = ".probe-"
_SIZES = (4 << 10, 64 << 10, 1 << 20)
_FILES = 6
_TOLERANCE = 1.5

# Found by name: typeshed shows them to Linux only, and this file is checked for macOS too.
# A Mac, where this module is read to show profiles of Linux, has no copy_file_range.
_copy_file_range: Callable[[int, int, int], int] | None = vars(os).get("copy_file_range")
_SEEK_DATA: int = vars(os)["SEEK_DATA"]
_SEEK_HOLE: int = vars(os)["SEEK_HOLE"]


class LinuxCopier:
    """Tries the best way first and remembers, for one tree, what the file system refused.

    Files of less than `reflink_from` bytes are copied at once.
    """

    def __init__(self, *, reflink: bool = True, ranges: bool = True, reflink_from: int = 0) -> None:
        self._reflink = reflink
        self._reflink_from = reflink_from
        self._ranges = ranges
        self._used: set[str] = set()

    @property
    def method(self) -> str:
        return "+".join(sorted(self._used, reverse=True)) or ("reflink" if self._reflink else "copy")

    @property
    def shared_from(self) -> int | None:
        return self._reflink_from if "reflink" in self._used else None

    def copy(self, source: int, target: int, size: int) -> None:
        if self._reflink and size >= self._reflink_from and self._try_reflink(source, target):
            self._used.add("reflink")
            return
        self._used.add("copy")
        if os.fstat(source).st_blocks * 512 < size:
            self._copy_extents(source, target, size)
        else:
            self._copy_span(source, target, size)

    def _try_reflink(self, source: int, target: int) -> bool:
        try:
            fcntl.ioctl(target, _FICLONE, source)
        except OSError as failure:
            if failure.errno not in _NO_REFLINK:
                raise
            # Refused once may be this file's fault (btrfs keeps tiny ones inline); refused first, it is the
            # rule.
            self._reflink = "reflink" in self._used
            return False
        return True

    def _copy_span(self, source: int, target: int, length: int) -> None:
        while length > 0:
            done = self._copy_some(source, target, length)
            if done == 0:
                raise OSError(errno.ESTALE, "became shorter while it was being read")
            length -= done

    def _copy_some(self, source: int, target: int, length: int) -> int:
        if self._ranges and _copy_file_range is not None:
            try:
                return _copy_file_range(source, target, min(length, _STEP))
            except OSError as failure:
                if failure.errno not in _NO_RANGE:
                    raise
                self._ranges = False
        data = os.read(source, min(length, 16 * _SMALL))
        view = memoryview(data)
        while view:
            view = view[os.write(target, view) :]
        return len(data)

    def _copy_extents(self, source: int, target: int, size: int) -> None:
        """Only what is data; holes stay holes."""
        position = 0
        while position < size:
            try:
                start = os.lseek(source, position, _SEEK_DATA)
            except OSError as failure:
                if failure.errno != errno.ENXIO:
                    raise
                break
            end = min(os.lseek(source, start, _SEEK_HOLE), size)
            os.lseek(source, start, os.SEEK_SET)
            os.lseek(target, start, os.SEEK_SET)
            self._copy_span(source, target, end - start)
            position = end
        os.ftruncate(target, size)


def clone_tree(
    src: Path, dst: Path, *, stop: Callable[[], bool] | None = None, copier: FileCopier | None = None
) -> CloneReport:
    """Copy `src`, a canonical path, to `dst`, which must not exist.

    Raises TreeError naming the file, FileExistsError for `dst`, other OSErrors for what is wrong with `src`
    itself. On failure, and when `stop` answered true, what was made stays at `dst` for the caller to
    remove.
    """
    source = open_directory(src)
    try:
        os.mkdir(dst, 0o700)
        target = os.open(dst, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            return TreeCopy(source, target, copier or LinuxCopier(), LinuxXattrs(), stop).run()
        finally:
            os.close(target)
    finally:
        os.close(source)


def copier_of(choice: CloneChoice | None) -> LinuxCopier:
    if choice is None or choice.method != "reflink":
        return LinuxCopier(reflink=choice is None)
    return LinuxCopier(reflink_from=choice.shared_from or 0)


def measure(source: Path, target: Path) -> CloneChoice:
    """Copies files of several sizes from one folder to the other, by both ways. OSError.

    Sharing blocks saves the disk their writing, so it may take a little longer; files for which it takes much longer
    are copied.
    """
    usec: dict[str, float] = {}
    shared_from = None
    with (
        tempfile.TemporaryDirectory(dir=source, prefix=_PROBE) as there,
        tempfile.TemporaryDirectory(dir=target, prefix=_PROBE) as here,
    ):
        for size in sorted(_SIZES, reverse=True):
            files = [_probe_file(Path(there) / f"{size}-{n}", size) for n in range(_FILES)]
            shared = _time(files, Path(here), reflink=True)
            copied = _time(files, Path(here), reflink=False)
            if copied is not None:
                usec[f"copy {size}"] = copied
            if shared is None or copied is None:
                continue
            usec[f"reflink {size}"] = shared
            if shared > copied * _TOLERANCE:
                break
            shared_from = size
    if shared_from is None:
        return CloneChoice(method="copy", usec=usec)
    return CloneChoice(
        method="reflink", shared_from=0 if shared_from == min(_SIZES) else shared_from, usec=usec
    )


def _probe_file(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.write(os.urandom(size))
        file.flush()
        os.fsync(file.fileno())  # as an image's are: blocks that are not written yet cannot be shared at once
    return path


def _time(files: list[Path], folder: Path, *, reflink: bool) -> float | None:
    """Microseconds for the quickest of these files; None when they cannot be shared."""
    best = None
    for path in files:
        with path.open("rb") as source, tempfile.NamedTemporaryFile(dir=folder) as target:
            # copy_file_range(2) shares blocks by itself where it can, so the other way is by hand.
            copier = LinuxCopier(reflink=reflink, ranges=False)
            began = time.perf_counter()
            copier.copy(source.fileno(), target.fileno(), os.fstat(source.fileno()).st_size)
            took = (time.perf_counter() - began) * 1e6
            if reflink and copier.shared_from is None:
                return None
            best = took if best is None else min(best, took)
    return None if best is None else round(best, 1)
