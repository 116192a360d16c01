"""The canonical listing of a tree. Its sha256 is the tree's digest, and it is kept as the image's layer blob.

Text, one line an entry; fields are separated by one space. In names every byte but letters, digits and
`/_.-~` is `%XX`, so one that is no UTF-8 or holds a newline is no exception:

    sandfleet tree 1
    d <mode> <mtime> <path>                     a directory, `.` for the top; its entries follow, sorted
                                                by their bytes, then its subdirectories in the same
                                                order, each with all below it
    f <mode> <mtime> <size> <sha256> <path>     a file
    h <path> <first>                            another name of the file that was listed as <first>
    l <mtime> <path> <target>                   a symbolic link
    x <name> <value in hex>                     an extended attribute of the entry above

Modes are octal without setuid and setgid, times nanoseconds since 1970. Owners, access times, inode
numbers, block sizes and holes have no part in it.
"""

import hashlib
import os
import stat
from typing import BinaryIO
from urllib.parse import quote_from_bytes

import msgspec

from worker.platform.descent import Descent
from worker.platform.treecopy import KEPT_MODE, OPEN_FILE, TreeError, kind_refused, naming, visit
from worker.platform.xattrs import Xattrs

HEADER = b"sandfleet tree 1\n"

_CHUNK = 1 << 20


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """`digest` is of the listing, `size` its length.

    `bytes` sums the files, `newest_ns` is the latest mtime.
    """

    digest: str
    size: int
    bytes: int
    entries: int
    newest_ns: int


def write_listing(top: int, out: BinaryIO, xattrs: Xattrs, *, sync: bool = False) -> Listing:
    """List the tree below an open directory, reading every file; raises TreeError.

    With `sync` each file and directory is brought to the disk while it is open.
    """
    return _Lister(top, out, xattrs, sync).run()


class _Lister:
    def __init__(self, top: int, out: BinaryIO, xattrs: Xattrs, sync: bool) -> None:
        self._walk = Descent(os.dup(top))
        self._out = out
        self._xattrs = xattrs
        self._sync = sync
        self._hash = hashlib.sha256()
        self._links: dict[tuple[int, int], str] = {}
        self._size = self._bytes = self._entries = self._newest = 0

    def run(self) -> Listing:
        try:
            self._emit(HEADER)
            visit(self._walk, self._directory)
        finally:
            self._walk.close()
        return Listing(
            digest=f"sha256:{self._hash.hexdigest()}",
            size=self._size,
            bytes=self._bytes,
            entries=self._entries,
            newest_ns=self._newest,
        )

    def _emit(self, line: bytes) -> None:
        self._hash.update(line)
        self._out.write(line)
        self._size += len(line)

    def _line(self, *fields: str) -> None:
        self._emit(" ".join(fields).encode("ascii") + b"\n")
        self._entries += 1

    def _directory(self) -> list[str]:
        """The current directory and all in it but its subdirectories, given back last one first."""
        with naming(self._walk):
            found = os.fstat(self._walk.fd)
            self._line("d", _mode(found), self._time(found), _quoted(self._walk.path() or "."))
            self._attributes(self._walk.fd)
            if self._sync:
                os.fsync(self._walk.fd)
            with os.scandir(self._walk.fd) as entries:
                listed = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        listed.sort(key=lambda item: os.fsencode(item[0]))
        for name, is_directory in listed:
            if not is_directory:
                with naming(self._walk, name):
                    self._entry(name)
        return [name for name, is_directory in reversed(listed) if is_directory]

    def _entry(self, name: str) -> None:
        found = os.stat(name, dir_fd=self._walk.fd, follow_symlinks=False)
        if stat.S_ISLNK(found.st_mode):
            target = os.readlink(name, dir_fd=self._walk.fd)
            self._line("l", self._time(found), _quoted(self._walk.path(name)), _quoted(target))
        elif stat.S_ISREG(found.st_mode):
            self._file(name)
        else:
            raise TreeError(self._walk.path(name), kind_refused(found.st_mode) or "of an unknown type")

    def _file(self, name: str) -> None:
        path = self._walk.path(name)
        fd = os.open(name, OPEN_FILE, dir_fd=self._walk.fd)
        try:
            found = os.fstat(fd)
            if found.st_nlink > 1:
                first = self._links.setdefault((found.st_dev, found.st_ino), path)
                if first != path:
                    self._line("h", _quoted(path), _quoted(first))
                    return
            size, digest = _hash_file(fd)
            if self._sync:
                os.fsync(fd)
            self._bytes += size
            self._line("f", _mode(found), self._time(found), str(size), digest, _quoted(path))
            self._attributes(fd)
        finally:
            os.close(fd)

    def _time(self, found: os.stat_result) -> str:
        self._newest = max(self._newest, found.st_mtime_ns)
        return str(found.st_mtime_ns)

    def _attributes(self, fd: int) -> None:
        for name, value in self._xattrs.read(fd):
            self._emit(f"x {_quoted(name)} {value.hex()}\n".encode("ascii"))


def _hash_file(fd: int) -> tuple[int, str]:
    running, size = hashlib.sha256(), 0
    while chunk := os.read(fd, _CHUNK):
        running.update(chunk)
        size += len(chunk)
    return size, running.hexdigest()


def _mode(found: os.stat_result) -> str:
    return f"{found.st_mode & KEPT_MODE:o}"


def _quoted(text: str) -> str:
    return quote_from_bytes(os.fsencode(text))
