"""Paths inside a container's root, seen from outside of it.

A root is full of links that somebody else wrote. Here `/` and `..` in them mean what they would mean to a
process whose root it is, so that no path leads out.
"""

import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from worker.platform.base import VolumeMount

# As many as Linux follows in one lookup (path_resolution(7)).
MAX_LINKS = 40
MAX_DEPTH = 128

# O_PATH asks only for the right to pass through, which is all that a lookup needs.
_DIRECTORY = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC


def resolve_in_root(root: Path, path: str) -> Path:
    """The host path, below `root` and free of links, of what `path` names to a process whose root is `root`.

    Raises FileNotFoundError, NotADirectoryError, OSError (ELOOP, ENAMETOOLONG), each naming `path`;
    ValueError for a NUL. It is read through descriptors, so a link that is planted meanwhile makes it fail,
    not escape.
    """
    walk = _Walk(os.open(root, _DIRECTORY))
    try:
        walk.follow(path)
    except OSError as failure:
        raise type(failure)(failure.errno, failure.strerror, path) from failure
    finally:
        walk.close()
    return root.joinpath(*walk.names)


class _Walk:
    """Where the lookup stands: the names below the root and the directories that they led through."""

    def __init__(self, root: int) -> None:
        self.names: list[str] = []
        self._fds = [root]
        self._links = 0

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)

    def follow(self, path: str) -> None:
        waiting = _parts(path)
        while waiting:
            name = waiting.pop()
            if name == "..":
                self._up()
            elif name != ".":
                self._step(name, waiting)

    def _up(self) -> None:
        if self.names:
            self.names.pop()
            os.close(self._fds.pop())

    def _step(self, name: str, waiting: list[str]) -> None:
        found = os.stat(name, dir_fd=self._fds[-1], follow_symlinks=False)
        if stat.S_ISLNK(found.st_mode):
            self._links += 1
            if self._links > MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            target = os.readlink(name, dir_fd=self._fds[-1])
            if target.startswith("/"):
                while self.names:
                    self._up()
            waiting.extend(_parts(target))
        elif stat.S_ISDIR(found.st_mode):
            if len(self.names) == MAX_DEPTH:
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
            self._fds.append(os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=self._fds[-1]))
            self.names.append(name)
        elif waiting:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        else:
            self.names.append(name)


def _parts(path: str) -> list[str]:
    """The last component first; a slash at the end asks for a directory, as `.` does."""
    if "\0" in path:
        raise ValueError("a path cannot hold a NUL")
    parts = [part for part in path.split("/") if part]
    if path.endswith("/"):
        parts.append(".")
    return parts[::-1]


def locate(rootfs: Path, volumes: Iterable[VolumeMount], path: str) -> Path:
    """As `resolve_in_root`, but what lies at or below a volume's target is looked for in its source.

    Without a mount namespace a volume is a link in the root to a folder of the host.
    """
    inside = os.path.normpath("/" + path).replace("//", "/")
    best: tuple[str, Path] | None = None
    for volume in volumes:
        covers = inside == volume.target or inside.startswith(volume.target.rstrip("/") + "/")
        if covers and (best is None or len(volume.target) > len(best[0])):
            best = volume.target, Path(volume.source)
    if best is None:
        return resolve_in_root(rootfs, path)
    target, source = best
    return resolve_in_root(source, inside[len(target) :] or "/")
