"""Copying a tree through descriptors; how a file's bytes get across is the platform's part.

Kept: directories (empty ones too), files, symbolic links as they are, hard links among the tree's own
files, modes without setuid and setgid, modification and access times to the nanosecond, extended attributes
of the user, holes. Not kept: owners (all becomes the worker's), access lists. A fifo, socket or device is
an error that names it.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from .base import CloneReport
from .descent import Descent, Moved
from .xattrs import Xattrs

KEPT_MODE = 0o1777

# O_NONBLOCK: a fifo put in a file's place must not hold up the walk.
OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

_KINDS = {
    stat.S_IFIFO: "a fifo",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


class TreeError(Exception):
    """A tree cannot be read, copied or hashed.

    `path` is relative to its top; `errno` is the cause, or None.
    """

    def __init__(self, path: str, reason: str, code: int | None = None) -> None:
        shown = printable(path) or "the directory itself"
        super().__init__(f"{shown}: {reason}")
        self.path = path
        self.reason = reason
        self.errno = code


class FileCopier(Protocol):
    """Brings the bytes of one file across, whole, or raises OSError."""

    @property
    def method(self) -> str:
        """How it was done, for the report."""

    @property
    def shared_from(self) -> int | None:
        """As in `CloneReport`."""

    def copy(self, source: int, target: int, size: int) -> None: ...


def printable(path: str) -> str:
    """A file name for a message: bytes that are no UTF-8 and control characters are escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def kind_refused(mode: int) -> str | None:
    """Why a file of this type has no place in an image; None when it has one."""
    kind = _KINDS.get(stat.S_IFMT(mode))
    return f"{kind} cannot be part of an image" if kind else None


@contextmanager
def naming(walk: Descent, name: str | None = None) -> Iterator[None]:
    """Turns an OSError into a TreeError that says which file of the tree it was about."""
    try:
        yield
    except OSError as failure:
        raise tree_error(walk.path(name), failure) from failure


def visit(walk: Descent, scan: Callable[[], list[str]]) -> None:
    """Have `scan` look at each directory, from the current one down; it gives the names of those below. TreeError."""
    pending = [scan()]
    while pending:
        if pending[-1]:
            name = pending[-1].pop()
            with naming(walk, name):
                walk.down(name)
            pending.append(scan())
        else:
            pending.pop()
            if pending:
                with naming(walk):
                    walk.up()


def tree_error(path: str, failure: OSError) -> TreeError:
    if isinstance(failure, Moved) or failure.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
        return TreeError(path, "changed while it was being read", failure.errno)
    return TreeError(path, failure.strerror or str(failure), failure.errno)


class TreeCopy:
    """One copy of one tree, from an open directory into another that is empty. Closes neither of the two."""

    def __init__(
        self,
        source: int,
        target: int,
        copier: FileCopier,
        xattrs: Xattrs,
        stop: Callable[[], bool] | None = None,
    ) -> None:
        self._from = Descent(os.dup(source))
        self._to = Descent(os.dup(target))
        self._copier = copier
        self._xattrs = xattrs
        self._stop = stop
        self._links: dict[tuple[int, int], str] = {}
        self._stats = [os.fstat(source)]
        self._pending: list[list[str]] = []
        self._files = self._directories = self._bytes = 0

    def run(self) -> CloneReport:
        try:
            self._pending.append(self._copy_entries())
            while self._pending:
                if self._pending[-1]:
                    self._go_down(self._pending[-1].pop())
                else:
                    self._finish_directory()
                    self._pending.pop()
                    if self._pending:
                        self._go_up()
        finally:
            self._from.close()
            self._to.close()
        return CloneReport(
            method=self._copier.method,
            files=self._files,
            directories=self._directories,
            bytes=self._bytes,
            shared_from=self._copier.shared_from,
        )

    def _go_down(self, name: str) -> None:
        with naming(self._from, name):
            found = self._from.down(name)
        self._stats.append(found)
        with naming(self._from):
            os.mkdir(name, 0o700, dir_fd=self._to.fd)
            self._to.down(name)
        self._pending.append(self._copy_entries())

    def _go_up(self) -> None:
        with naming(self._from):
            self._from.up()
            self._to.up()

    def _copy_entries(self) -> list[str]:
        """Everything of the current directory but its subdirectories, whose names are given back."""
        self._directories += 1
        subdirectories = []
        name = ""
        try:
            with os.scandir(self._from.fd) as entries:
                for entry in entries:
                    name = entry.name
                    if entry.is_dir(follow_symlinks=False):
                        subdirectories.append(name)
                    elif entry.is_file(follow_symlinks=False):
                        self._copy_file(name)
                    elif entry.is_symlink():
                        self._copy_link(name)
                    else:
                        mode = entry.stat(follow_symlinks=False).st_mode
                        raise TreeError(self._from.path(name), kind_refused(mode) or "of an unknown type")
                    if self._stop is not None and self._stop():
                        raise TreeError(self._from.path(name), "the copy was called off", errno.ECANCELED)
        except OSError as failure:
            raise tree_error(self._from.path(name or None), failure) from failure
        return subdirectories

    def _copy_file(self, name: str) -> None:
        source = os.open(name, OPEN_FILE, dir_fd=self._from.fd)
        try:
            found = os.fstat(source)
            if not stat.S_ISREG(found.st_mode):
                raise TreeError(
                    self._from.path(name), kind_refused(found.st_mode) or "changed while it was being read"
                )
            if found.st_nlink > 1 and self._link_again(found, name):
                return
            target = os.open(name, _CREATE, 0o600, dir_fd=self._to.fd)
            try:
                if found.st_size:
                    self._copier.copy(source, target, found.st_size)
                self._set_metadata(source, target, found)
            finally:
                os.close(target)
            self._files += 1
            self._bytes += found.st_size
        finally:
            os.close(source)

    def _link_again(self, found: os.stat_result, name: str) -> bool:
        """True when another name of this file was copied before, and the new name now leads to that copy."""
        identity = found.st_dev, found.st_ino
        first = self._links.setdefault(identity, self._from.path(name))
        if first == self._from.path(name):
            return False
        os.link(first, name, src_dir_fd=self._to.top, dst_dir_fd=self._to.fd, follow_symlinks=False)
        return True

    def _copy_link(self, name: str) -> None:
        found = os.stat(name, dir_fd=self._from.fd, follow_symlinks=False)
        os.symlink(os.readlink(name, dir_fd=self._from.fd), name, dir_fd=self._to.fd)
        times = (found.st_atime_ns, found.st_mtime_ns)
        os.utime(name, ns=times, dir_fd=self._to.fd, follow_symlinks=False)

    def _finish_directory(self) -> None:
        """A directory's own mode and times come last: filling it changes the one and needs the other."""
        with naming(self._from):
            self._set_metadata(self._from.fd, self._to.fd, self._stats.pop())

    def _set_metadata(self, source: int, target: int, found: os.stat_result) -> None:
        attributes = self._xattrs.read(source)
        if attributes:
            self._xattrs.write(target, attributes)
        os.fchmod(target, found.st_mode & KEPT_MODE)
        os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))


def measure(top: int, method: str) -> CloneReport:
    """The report for a tree that was copied as one. Closes nothing; raises TreeError."""
    walk = Descent(os.dup(top))
    files = directories = size = 0

    def scan() -> list[str]:
        nonlocal files, directories, size
        directories += 1
        subdirectories = []
        with naming(walk), os.scandir(walk.fd) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    subdirectories.append(entry.name)
                elif entry.is_file(follow_symlinks=False):
                    files += 1
                    size += entry.stat(follow_symlinks=False).st_size
        return subdirectories

    try:
        visit(walk, scan)
    finally:
        walk.close()
    return CloneReport(method=method, files=files, directories=directories, bytes=size, shared_from=0)
