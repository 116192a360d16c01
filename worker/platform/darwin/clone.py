"""Copying a tree on macOS: one clonefile(2) for all of it on APFS, else file by file.

Sources: clonefile(2), copyfile(3), <sys/clonefile.h>, <copyfile.h>. The manual advises against cloning a
directory that others may change meanwhile; here nobody does, and a registration proves it afterwards.
"""

import contextlib
import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path

from worker.platform.base import CloneChoice, CloneReport
from worker.platform.descent import OPEN_DIRECTORY, open_directory
from worker.platform.treecopy import TreeCopy, measure
from worker.platform.xattrs import DarwinXattrs

from .libsystem import declare

_CLONE_NOFOLLOW = 0x0001
_CLONE_NOOWNERCOPY = 0x0002
_COPYFILE_DATA = 1 << 3

COPY = CloneChoice(method="copy")

# Another volume, or a file system that shares no blocks. EEXIST is not among them: a place that is taken is
# an error.
_CANNOT_CLONE = frozenset({errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV, errno.ENOSYS})


class CopyFile:
    """fcopyfile(3), for the bytes only; all else is set by the walk."""

    method = "copy"
    shared_from = None

    def __init__(self, library: ctypes.CDLL) -> None:
        c_int = ctypes.c_int
        self._fcopyfile = declare(library, "fcopyfile", c_int, c_int, c_int, ctypes.c_void_p, ctypes.c_uint32)

    def copy(self, source: int, target: int, size: int) -> None:
        if self._fcopyfile(source, target, None, _COPYFILE_DATA) != 0:
            raise _last_error()
        if os.fstat(target).st_size < size:
            raise OSError(errno.ESTALE, "became shorter while it was being read")


class DarwinCloner:
    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        c_int, c_char_p = ctypes.c_int, ctypes.c_char_p
        self._clonefileat = declare(
            library, "clonefileat", c_int, c_int, c_char_p, c_int, c_char_p, ctypes.c_uint32
        )

    def measure(self, source: Path, target: Path) -> CloneChoice:
        """One call for a whole tree is never slower than a copy of each file: it is used where it works. OSError."""
        tried = source / f".probe-{os.urandom(8).hex()}"
        copied = target / tried.name
        os.mkdir(tried, 0o700)
        try:
            report = self.clone_tree(tried, copied)
        finally:
            os.rmdir(tried)
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(copied)
        return CloneChoice(method="clonefile", shared_from=0) if report.method == "clonefile" else COPY

    def clone_tree(
        self,
        src: Path,
        dst: Path,
        choice: CloneChoice | None = None,
        *,
        stop: Callable[[], bool] | None = None,
    ) -> CloneReport:
        """Copy `src`, a canonical path, to `dst`, which must not exist; with the `choice` to copy each file, do that.

        TreeError naming the file, FileExistsError for `dst`, other OSErrors for `src` itself. On failure,
        and when `stop` answered true, what was made stays at `dst` for the caller to remove.
        """
        above = open_directory(src.parent)
        try:
            source = os.open(src.name, OPEN_DIRECTORY, dir_fd=above)
            try:
                if choice != COPY and self._clone_whole(above, src.name, dst):
                    return measure(source, "clonefile")
                return self._copy(source, dst, stop)
            finally:
                os.close(source)
        finally:
            os.close(above)

    def _clone_whole(self, above: int, name: str, dst: Path) -> bool:
        into = os.open(dst.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            flags = _CLONE_NOFOLLOW | _CLONE_NOOWNERCOPY
            if self._clonefileat(above, os.fsencode(name), into, os.fsencode(dst.name), flags) == 0:
                return True
            failure = _last_error(str(dst))
        finally:
            os.close(into)
        if failure.errno not in _CANNOT_CLONE:
            raise failure
        return False

    def _copy(self, source: int, dst: Path, stop: Callable[[], bool] | None) -> CloneReport:
        os.mkdir(dst, 0o700)
        target = os.open(dst, OPEN_DIRECTORY)
        try:
            copier = CopyFile(self._library)
            return TreeCopy(source, target, copier, DarwinXattrs(self._library), stop).run()
        finally:
            os.close(target)


def _last_error(path: str | None = None) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), path)
