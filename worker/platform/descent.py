"""Walking a directory tree through descriptors: no link is followed, no path is trusted twice, any depth.

A path that is looked up twice can mean two things; a descriptor cannot. Everything that copies, measures,
hashes or deletes a tree which a container may have written stands on this.
"""

import errno
import os
from pathlib import Path

OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

# Descriptors held at once by one walk; launchd gives a process 256.
_HELD = 32

_O_PATH = getattr(os, "O_PATH", 0)
_O_NOFOLLOW_ANY = getattr(os, "O_NOFOLLOW_ANY", 0)


class Moved(OSError):
    """A directory was moved away while the walk stood below it."""


def open_directory(path: Path) -> int:
    """A descriptor of the directory at this absolute path; ELOOP or ENOTDIR when any component is a link."""
    if not path.is_absolute():
        raise ValueError(f"{path} is not absolute")
    if _O_NOFOLLOW_ANY:
        return os.open(path, OPEN_DIRECTORY | _O_NOFOLLOW_ANY)
    # O_PATH asks only for the right to pass through, as a lookup of the whole path would.
    through = OPEN_DIRECTORY | _O_PATH
    fd = os.open(path.anchor, through)
    try:
        for index, part in enumerate(path.parts[1:], start=2):
            last = index == len(path.parts)
            deeper = os.open(part, OPEN_DIRECTORY if last else through, dir_fd=fd)
            os.close(fd)
            fd = deeper
        if len(path.parts) == 1:
            deeper = os.open(".", OPEN_DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = deeper
    except OSError as failure:
        os.close(fd)
        failure.filename = os.fspath(path)
        raise
    return fd


class Descent:
    """Where a walk stands: the directories from the top of a tree down to the current one.

    Owns the descriptor it is given. Only the nearest descriptors are kept open; one given up is reached again
    through `..`, and must turn out to be the directory that was left.
    """

    def __init__(self, top: int) -> None:
        self._fds: list[int | None] = [top]
        self._ids = [_identity(os.fstat(top))]
        self.names: list[str] = []

    @property
    def fd(self) -> int:
        fd = self._fds[-1]
        assert fd is not None
        return fd

    @property
    def top(self) -> int:
        fd = self._fds[0]
        assert fd is not None
        return fd

    def path(self, name: str | None = None) -> str:
        """The path of the current directory, or of a name in it, relative to the top."""
        return "/".join(self.names if name is None else [*self.names, name])

    def down(self, name: str) -> os.stat_result:
        """Enter a subdirectory; OSError, and nothing changed, when it is no directory."""
        fd = os.open(name, OPEN_DIRECTORY, dir_fd=self.fd)
        try:
            stat = os.fstat(fd)
        except OSError:
            os.close(fd)
            raise
        self._enter(fd, name, stat)
        return stat

    def adopt(self, fd: int, name: str) -> None:
        """Enter a subdirectory that is open already; the descriptor is owned from here on."""
        self._enter(fd, name, os.fstat(fd))

    def _enter(self, fd: int, name: str, stat: os.stat_result) -> None:
        self._fds.append(fd)
        self._ids.append(_identity(stat))
        self.names.append(name)
        if len(self._fds) > _HELD:
            # The top stays: names relative to it are wanted.
            far = len(self._fds) - _HELD
            held = self._fds[far]
            if held is not None:
                os.close(held)
                self._fds[far] = None

    def up(self) -> str:
        """Back to the parent; gives the name of the directory that was left. Raises Moved."""
        fd = self.fd
        if self._fds[-2] is None:
            parent = os.open("..", OPEN_DIRECTORY, dir_fd=fd)
            if _identity(os.fstat(parent)) != self._ids[-2]:
                os.close(parent)
                raise Moved(errno.ESTALE, "moved while it was being walked", self.path())
            self._fds[-2] = parent
        os.close(fd)
        self._fds.pop()
        self._ids.pop()
        return self.names.pop()

    def close(self) -> None:
        for fd in self._fds:
            if fd is not None:
                os.close(fd)
        self._fds.clear()


def _identity(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino
