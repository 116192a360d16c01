"""Extended attributes of an open file or directory. Python has them for Linux, and not for macOS."""

import ctypes
import errno
import os
from typing import Any, Protocol

# What a file system says that keeps no attributes, or none on this kind of file.
_NONE = frozenset({errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.ENOSYS})

# macOS writes these by itself, differently on each machine.
VOLATILE = ("com.apple.provenance", "com.apple.quarantine", "com.apple.lastuseddate", "com.apple.metadata:")


class Xattrs(Protocol):
    """Attributes that belong to the file's content.

    Those of the kernel (capabilities, labels) are not given.
    """

    def read(self, fd: int) -> list[tuple[str, bytes]]:
        """Sorted; empty where the file system has none."""

    def write(self, fd: int, items: list[tuple[str, bytes]]) -> None:
        """Left out silently where the file system keeps none."""

    def remove(self, fd: int, names: list[str]) -> None:
        """Of those that `read` gave."""


class LinuxXattrs:
    """`user.*`, the only name space that is a user's own (xattr(7))."""

    def __init__(self) -> None:
        # Found by name: typeshed shows them to Linux only, and this file is checked for macOS too.
        self._list: Any = vars(os)["listxattr"]
        self._get: Any = vars(os)["getxattr"]
        self._set: Any = vars(os)["setxattr"]
        self._remove: Any = vars(os)["removexattr"]

    def read(self, fd: int) -> list[tuple[str, bytes]]:
        try:
            names = self._list(fd)
        except OSError as failure:
            if failure.errno in _NONE:
                return []
            raise
        if not names:
            return []
        return sorted((name, self._get(fd, name)) for name in names if name.startswith("user."))

    def write(self, fd: int, items: list[tuple[str, bytes]]) -> None:
        for name, value in items:
            try:
                self._set(fd, name, value)
            except OSError as failure:
                if failure.errno not in _NONE:
                    raise

    def remove(self, fd: int, names: list[str]) -> None:
        for name in names:
            self._remove(fd, name)


class DarwinXattrs:
    """flistxattr(2), fgetxattr(2), fsetxattr(2) and fremovexattr(2) of macOS, whose arguments differ from Linux's."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._list = library.flistxattr
        self._list.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int]
        self._list.restype = ctypes.c_ssize_t
        self._get = library.fgetxattr
        self._get.argtypes = [
            ctypes.c_int,
            ctypes.c_char_p,
            ctypes.c_char_p,
            ctypes.c_size_t,
            ctypes.c_uint32,
            ctypes.c_int,
        ]
        self._get.restype = ctypes.c_ssize_t
        self._set = library.fsetxattr
        self._set.argtypes = self._get.argtypes
        self._set.restype = ctypes.c_int
        self._library = library

    def read(self, fd: int) -> list[tuple[str, bytes]]:
        found = []
        for raw in self._names(fd):
            name = os.fsdecode(raw)
            if not name.startswith(VOLATILE):
                found.append((name, self._value(fd, raw)))
        return sorted(found)

    def _names(self, fd: int) -> list[bytes]:
        size = self._list(fd, None, 0, 0)
        if size < 0 and ctypes.get_errno() in _NONE:
            return []
        buffer = ctypes.create_string_buffer(max(_checked(size, fd), 1))
        size = _checked(self._list(fd, buffer, len(buffer), 0), fd)
        return [name for name in buffer.raw[:size].split(b"\0") if name]

    def _value(self, fd: int, name: bytes) -> bytes:
        size = _checked(self._get(fd, name, None, 0, 0, 0), fd)
        buffer = ctypes.create_string_buffer(max(size, 1))
        size = _checked(self._get(fd, name, buffer, len(buffer), 0, 0), fd)
        return buffer.raw[:size]

    def write(self, fd: int, items: list[tuple[str, bytes]]) -> None:
        for name, value in items:
            if self._set(fd, os.fsencode(name), value, len(value), 0, 0) != 0:
                code = ctypes.get_errno()
                if code not in _NONE:
                    raise OSError(code, os.strerror(code), name)

    def remove(self, fd: int, names: list[str]) -> None:
        remove = self._library.fremovexattr
        remove.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
        remove.restype = ctypes.c_int
        for name in names:
            _checked(remove(fd, os.fsencode(name), 0), fd)


def _checked(size: int, fd: int) -> int:
    if size < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), f"descriptor {fd}")
    return size


def system_xattrs() -> Xattrs:
    """The ones of this machine."""
    if hasattr(os, "listxattr"):
        return LinuxXattrs()
    return DarwinXattrs(ctypes.CDLL("/usr/lib/libSystem.B.dylib", use_errno=True))
