"""Deleting and measuring trees that somebody else may have written, or may still be writing.

Links are never followed, mount points never crossed, directories of mode 0000 and trees of any depth or
width are no obstacle. Every deletion of a tree in the worker goes through `remove_tree`.
"""

import errno
import os
import stat
import time
from pathlib import Path

import msgspec

from worker.platform.descent import OPEN_DIRECTORY, Descent, Moved
from worker.platform.treecopy import naming, printable, visit

# How long a tree may keep growing while it is deleted.
PATIENCE_S = 30.0

_GONE = (errno.ENOENT,)
_NOT_A_DIRECTORY = (errno.ENOTDIR, errno.ELOOP)
_O_PATH = getattr(os, "O_PATH", 0)


class TreeSize(msgspec.Struct, frozen=True, kw_only=True):
    """`bytes` are those of the files, `disk_bytes` what they take up; a file of several names counts once."""

    bytes: int
    disk_bytes: int
    entries: int


def remove_tree(path: Path, *, patience_s: float = PATIENCE_S) -> None:
    """Delete what stands at `path`: a tree, a file or a link; nothing there is fine.

    Links above `path` are followed, as they are its owner's. Deletes all that can be deleted, then raises
    the first OSError met, with the whole path: EBUSY for a mount point, ENOTEMPTY when others kept writing
    for `patience_s`.
    """
    try:
        parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        _Removal(parent, path, time.monotonic() + patience_s).run()
    finally:
        os.close(parent)


class _Level:
    """A directory on the way down: subdirectories still to be entered, and whether something in it stays."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.stuck = False


class _Removal:
    def __init__(self, parent: int, path: Path, deadline: float) -> None:
        self._parent = parent
        self._path = path
        self._deadline = deadline
        self._failure: OSError | None = None
        self._standing = (0, 0)

    def run(self) -> None:
        while not self._attempt():
            if self._failure is not None:
                raise self._failure
            self._give_up_when_late(str(self._path))

    def _attempt(self) -> bool:
        """True when nothing is left; False when it must be tried again or something failed."""
        name = self._path.name
        try:
            top = _open_to_delete(self._parent, name)
        except OSError as failure:
            if failure.errno in _GONE:
                return True
            if failure.errno not in _NOT_A_DIRECTORY:
                raise OSError(failure.errno, failure.strerror, str(self._path)) from failure
            os.unlink(name, dir_fd=self._parent)
            return True
        walk = Descent(top)
        self._standing = _standing(top)
        if _mount_id(self._parent) != _mount_id(top):
            walk.close()
            raise OSError(errno.EBUSY, "is a mount point", str(self._path))
        try:
            self._empty(walk)
        except Moved:
            return False
        finally:
            walk.close()
        if self._failure is not None:
            return False
        try:
            os.rmdir(name, dir_fd=self._parent)
        except OSError as failure:
            if failure.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return False
            if failure.errno not in _GONE:
                raise OSError(failure.errno, failure.strerror, str(self._path)) from failure
        return True

    def _empty(self, walk: Descent) -> None:
        """Depth first. A directory in which something could not be deleted stays, with all above it."""
        levels = [self._sweep(walk)]
        while True:
            level = levels[-1]
            while level.names:
                if self._enter(walk, level.names.pop(), level):
                    level = self._sweep(walk)
                    levels.append(level)
            levels.pop()
            if not levels:
                return
            name = walk.up()
            if level.stuck:
                levels[-1].stuck = True
            else:
                self._remove_empty(walk, name, levels[-1])

    def _sweep(self, walk: Descent) -> _Level:
        """Delete everything in the current directory but its subdirectories."""
        level = _Level()
        try:
            with os.scandir(walk.fd) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        level.names.append(entry.name)
                    else:
                        self._unlink(walk, entry.name, level)
        except OSError as failure:
            self._note(failure, walk.path(), level)
        return level

    def _enter(self, walk: Descent, name: str, level: _Level) -> bool:
        """Go down into `name` if it is a directory of this mount; what is none is deleted."""
        try:
            fd = _open_to_delete(walk.fd, name)
        except OSError as failure:
            if failure.errno in _NOT_A_DIRECTORY:
                self._unlink(walk, name, level)
            elif failure.errno not in _GONE:
                self._note(failure, walk.path(name), level)
            return False
        if _standing(fd) != self._standing:
            os.close(fd)
            self._note(OSError(errno.EBUSY, "is a mount point"), walk.path(name), level)
            return False
        walk.adopt(fd, name)
        return True

    def _unlink(self, walk: Descent, name: str, level: _Level) -> None:
        try:
            os.unlink(name, dir_fd=walk.fd)
        except OSError as failure:
            if failure.errno == errno.EISDIR:
                level.names.append(name)
            elif failure.errno not in _GONE:
                self._note(failure, walk.path(name), level)

    def _remove_empty(self, walk: Descent, name: str, level: _Level) -> None:
        try:
            os.rmdir(name, dir_fd=walk.fd)
        except OSError as failure:
            if failure.errno in (errno.ENOTEMPTY, errno.EEXIST, *_NOT_A_DIRECTORY):
                # Filled or replaced meanwhile: once more.
                self._give_up_when_late(walk.path(name))
                level.names.append(name)
            elif failure.errno not in _GONE:
                self._note(failure, walk.path(name), level)

    def _give_up_when_late(self, path: str) -> None:
        if time.monotonic() > self._deadline:
            raise OSError(errno.ENOTEMPTY, "keeps being filled while it is deleted", self._whole(path))

    def _note(self, failure: OSError, path: str, level: _Level) -> None:
        level.stuck = True
        if self._failure is None:
            self._failure = OSError(failure.errno, failure.strerror, self._whole(path))

    def _whole(self, path: str) -> str:
        return printable(os.path.join(self._path, path))


def _open_to_delete(parent: int, name: str) -> int:
    """Open a directory that is about to be emptied, whatever mode its writer gave it."""
    try:
        fd = os.open(name, OPEN_DIRECTORY, dir_fd=parent)
    except PermissionError:
        make_accessible(parent, name)
        fd = os.open(name, OPEN_DIRECTORY, dir_fd=parent)
    found = os.fstat(fd)
    if found.st_mode & stat.S_IRWXU != stat.S_IRWXU and found.st_uid == os.geteuid():
        os.fchmod(fd, 0o700)
    return fd


def make_accessible(parent: int, name: str) -> None:
    """chmod of a directory that cannot be opened, and never of what a link planted in its place leads to."""
    if not _O_PATH:
        os.chmod(name, 0o700, dir_fd=parent, follow_symlinks=False)
        return
    fd = os.open(name, _O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        # fchmod(2) refuses an O_PATH descriptor; its name in /proc is bound to the same directory.
        os.chmod(f"/proc/self/fd/{fd}", 0o700)
    finally:
        os.close(fd)


def _standing(fd: int) -> tuple[int, int]:
    """Which mount a descriptor stands on. The device tells only where nothing else does: a subvolume of btrfs has one
    of its own, and everybody may make one in a folder that is theirs to write.
    """
    mount = _mount_id(fd)
    return (0, os.fstat(fd).st_dev) if mount is None else (1, mount)


def _mount_id(fd: int) -> int | None:
    """Which mount a descriptor stands on, as a bind mount shares its device number (proc_pid_fdinfo(5)).

    None where the system does not say (macOS): a file system has one mount there, and the device tells.
    """
    try:
        info = os.open(f"/proc/self/fdinfo/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        for line in os.read(info, 1024).splitlines():
            if line.startswith(b"mnt_id:"):
                return int(line[7:])
    finally:
        os.close(info)
    return None


def tree_size(path: Path) -> TreeSize:
    """Measure a tree without following links or crossing mount points.

    Raises TreeError naming what changed.
    """
    walk = Descent(os.open(path, OPEN_DIRECTORY))
    try:
        return _measure(walk)
    finally:
        walk.close()


def _measure(walk: Descent) -> TreeSize:
    device = os.fstat(walk.fd).st_dev
    seen: set[tuple[int, int]] = set()
    total = disk = entries = 0

    def scan() -> list[str]:
        nonlocal total, disk, entries
        subdirectories = []
        with naming(walk), os.scandir(walk.fd) as found:
            for entry in found:
                info = entry.stat(follow_symlinks=False)
                entries += 1
                disk += info.st_blocks * 512
                if stat.S_ISDIR(info.st_mode):
                    if info.st_dev == device:
                        subdirectories.append(entry.name)
                    continue
                if info.st_nlink > 1:
                    if (info.st_dev, info.st_ino) in seen:
                        disk -= info.st_blocks * 512
                        continue
                    seen.add((info.st_dev, info.st_ino))
                if stat.S_ISREG(info.st_mode):
                    total += info.st_size
        return subdirectories

    visit(walk, scan)
    return TreeSize(bytes=total, disk_bytes=disk, entries=entries)
