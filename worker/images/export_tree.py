"""A container's files as a tar archive, while its programs go on writing.

Nothing is copied first: each file is as it was when its turn came, and the archive is whole whatever happens to
the tree meanwhile. What vanishes is left out, a file that shrinks under the reader is filled up with zeros; the
second is noted. No link is followed and no mount point crossed; nothing is changed, so what its owner may not
read is left out and noted. Sockets, devices and fifos are nothing but names and are left out.
"""

import errno
import os
import stat
from collections.abc import Iterator

from worker.platform.descent import Descent
from worker.platform.treecopy import KEPT_MODE, OPEN_FILE, printable
from worker.platform.xattrs import Xattrs

from .pack_tar import DIRECTORY, END, FILE, HARD_LINK, SYMLINK, Member, header, padding, zeros
from .unpack_model import Notes

_READ = 256 * 1024
# Names of files with several: what a program can make without end is not remembered without end.
_MAX_LINKS = 1_000_000
_MAX_SEGMENTS = 10_000
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE)
_CLOSED = (errno.EACCES, errno.EPERM)
_SEEK_DATA: int | None = vars(os).get("SEEK_DATA")
_SEEK_HOLE: int | None = vars(os).get("SEEK_HOLE")


def tree_pieces(top: int, xattrs: Xattrs, notes: Notes) -> Iterator[bytes]:
    """The archive from front to back, without an entry for the top itself. Closes nothing.

    Raises OSError when the tree is moved about so that the way back is lost.
    """
    work = _Export(top, xattrs, notes)
    try:
        yield from work.run()
    finally:
        work.walk.close()


class _Export:
    def __init__(self, top: int, xattrs: Xattrs, notes: Notes) -> None:
        self.walk = Descent(os.dup(top))
        self._device = os.fstat(top).st_dev
        self._xattrs = xattrs
        self._notes = notes
        self._first: dict[tuple[int, int], bytes] = {}

    def run(self) -> Iterator[bytes]:
        pending: list[list[str]] = []
        yield from self._directory(pending)
        while pending:
            if pending[-1]:
                name = pending[-1].pop()
                if self._down(name):
                    yield self._header(self.walk.fd, os.fstat(self.walk.fd), self.walk.path(), DIRECTORY)
                    yield from self._directory(pending)
            else:
                pending.pop()
                if pending:
                    self.walk.up()
        yield END

    def _down(self, name: str) -> bool:
        path = self.walk.path(name)
        try:
            found = self.walk.down(name)
        except OSError as failure:
            self._pass_over(failure, path)
            return False
        if found.st_dev != self._device:
            self.walk.up()
            self._notes.add("another file system, left out", printable(path))
            return False
        return True

    def _directory(self, pending: list[list[str]]) -> Iterator[bytes]:
        """Everything of the current directory but its directories, which are put on the pile."""
        directories = []
        try:
            with os.scandir(self.walk.fd) as listed:
                names = sorted(
                    (os.fsencode(entry.name), entry.is_dir(follow_symlinks=False)) for entry in listed
                )
        except OSError as failure:
            self._pass_over(failure, self.walk.path())
            names = []
        for raw, is_directory in names:
            name = os.fsdecode(raw)
            if is_directory:
                directories.append(name)
                continue
            try:
                yield from self._entry(name)
            except OSError as failure:
                self._pass_over(failure, self.walk.path(name))
        directories.reverse()
        pending.append(directories)

    def _pass_over(self, failure: OSError, path: str) -> None:
        if failure.errno in _CLOSED:
            self._notes.add("cannot be read, left out", printable(path))
        elif failure.errno not in _GONE:
            raise failure

    def _entry(self, name: str) -> Iterator[bytes]:
        """Raises OSError before anything is yielded, and never after."""
        found = os.stat(name, dir_fd=self.walk.fd, follow_symlinks=False)
        path = self.walk.path(name)
        if stat.S_ISLNK(found.st_mode):
            text = os.readlink(name, dir_fd=self.walk.fd)
            yield self._header(None, found, path, SYMLINK, link=os.fsencode(text))
        elif stat.S_ISREG(found.st_mode):
            fd = os.open(name, OPEN_FILE, dir_fd=self.walk.fd)
            try:
                yield from self._file(fd, path)
            finally:
                os.close(fd)
        else:
            self._notes.add("a socket, fifo or device, left out", printable(path))

    def _file(self, fd: int, path: str) -> Iterator[bytes]:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            return  # something else by now
        if found.st_nlink > 1:
            identity = (found.st_dev, found.st_ino)
            first = self._first.get(identity)
            if first is not None:
                yield self._header(None, found, path, HARD_LINK, link=first)
                return
            if len(self._first) < _MAX_LINKS:
                self._first[identity] = os.fsencode(path)
        segments = _segments(fd, found)
        yield self._header(fd, found, path, FILE, size=found.st_size, segments=segments)
        stored = 0
        for offset, length in segments if segments is not None else [(0, found.st_size)]:
            stored += length
            yield from self._content(fd, offset, length, path)
        yield padding(stored)

    def _content(self, fd: int, offset: int, length: int, path: str) -> Iterator[bytes]:
        while length:
            try:
                data = os.pread(fd, min(_READ, length), offset)
            except OSError as failure:
                self._notes.add(f"cannot be read ({failure.strerror}), zeros from here on", printable(path))
                data = b""
            if not data:
                self._notes.add("changed while it was read", printable(path))
                yield from zeros(length)
                return
            offset += len(data)
            length -= len(data)
            yield data

    def _header(
        self,
        fd: int | None,
        found: os.stat_result,
        path: str,
        kind: bytes,
        *,
        size: int = 0,
        link: bytes = b"",
        segments: list[tuple[int, int]] | None = None,
    ) -> bytes:
        member = Member(
            name=os.fsencode(path),
            kind=kind,
            mode=0o777 if kind == SYMLINK else found.st_mode & KEPT_MODE,
            mtime_ns=found.st_mtime_ns,
            size=size,
            link=link,
            xattrs=() if fd is None else self._attributes(fd, path),
            uid=found.st_uid,
            gid=found.st_gid,
            segments=segments,
        )
        return header(member)

    def _attributes(self, fd: int, path: str) -> list[tuple[bytes, bytes]]:
        try:
            found = self._xattrs.read(fd)
        except OSError as failure:
            self._notes.add(f"attributes left out ({failure.strerror})", printable(path))
            return []
        kept = [(os.fsencode(name), value) for name, value in found if "=" not in name]
        if len(kept) < len(found):
            self._notes.add("an attribute with `=` in its name left out", printable(path))
        return kept


def _segments(fd: int, found: os.stat_result) -> list[tuple[int, int]] | None:
    """Where a file with holes has its data; None for one without any.

    A program can make a file of petabytes that holds nothing: without this an archive of it would have no end.
    """
    if _SEEK_DATA is None or _SEEK_HOLE is None or found.st_blocks * 512 >= found.st_size:
        return None
    segments: list[tuple[int, int]] = []
    at = 0
    while at < found.st_size:
        try:
            start = os.lseek(fd, at, _SEEK_DATA)
            end = min(os.lseek(fd, start, _SEEK_HOLE), found.st_size)
        except OSError as failure:
            if failure.errno == errno.ENXIO:
                break  # nothing but a hole up to the end
            return None  # this file system does not tell
        if start >= found.st_size or end <= start:
            break
        if len(segments) == _MAX_SEGMENTS:
            segments.append((start, found.st_size - start))
            break
        segments.append((start, end - start))
        at = end
    return segments
