"""Copying a tree on Linux.

Shared blocks where the file system can (FICLONE), else in the kernel, else by hand.
"""

import errno
import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from worker.platform.base import CloneReport
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

# Found by name: typeshed shows them to Linux only, and this file is checked for macOS too.
# A Mac, where this module is read to show profiles of Linux, has no copy_file_range.
_copy_file_range: Callable[[int, int, int], int] | None = vars(os).get("copy_file_range")
_SEEK_DATA: int = vars(os)["SEEK_DATA"]
_SEEK_HOLE: int = vars(os)["SEEK_HOLE"]


class LinuxCopier:
    """Tries the best way first and remembers, for one tree, what the file system refused."""

    def __init__(self, *, reflink: bool = True, ranges: bool = True) -> None:
        self._reflink = reflink
        self._ranges = ranges
        self._used: set[str] = set()

    @property
    def method(self) -> str:
        return "+".join(sorted(self._used, reverse=True)) or ("reflink" if self._reflink else "copy")

    def copy(self, source: int, target: int, size: int) -> None:
        if self._reflink and self._try_reflink(source, target):
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


def probe_method(folder: Path) -> str:
    """`reflink` or `copy`: what this file system can do, found by doing it."""
    with (
        tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-") as source,
        tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-") as target,
    ):
        source.write(b"\0" * _SMALL)
        source.seek(0)
        copier = LinuxCopier()
        copier.copy(source.fileno(), target.fileno(), _SMALL)
        return copier.method
