"""Folders that the file system holds to a size: subvolumes of btrfs with a quota group, and elsewhere (ext4, xfs)
folders with a project id.

Both exist only where the operator has switched quotas on for the file system: `btrfs quota enable`, the mount option
`prjquota`. Whether a way works is tried by writing too much, as a program without capabilities would. Numbers and
layouts: linux/btrfs.h, linux/fs.h and linux/quota.h of Linux 6.1; quotactl_fd is there from Linux 5.14 on.

What a deleted folder leaves in the file system's table of quotas is a number with nothing in it.
"""

import ctypes
import errno
import fcntl
import os
import random
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from worker.errors import is_out_of_space
from worker.platform.base import FolderLimits
from worker.platform.descent import OPEN_DIRECTORY

from .libc import syscall
from .privileges import drop_capabilities
from .syscall_table import NUMBERS

_SUBVOL_CREATE = 0x5000940E
_QGROUP_LIMIT = 0x8030942B
_MAX_REFERENCED = 1
_GET_ATTRIBUTES, _SET_ATTRIBUTES = 0x801C581F, 0x401C5820
_ATTRIBUTES = struct.Struct("=5I8s")
_INHERIT_PROJECT = 0x200
_GET_QUOTA, _SET_QUOTA = (command << 8 | 2 for command in (0x800007, 0x800008))  # of type project
_QUOTA = struct.Struct("=8QI4x")
_SPACE_LIMIT = 1
_UNIT = 1024
_PROJECTS = (1 << 30, (1 << 31) - 1)
_TRIES = 8
_TRIED_BYTES = 256 << 10


class Subvolumes:
    """Of btrfs. The limit is on what the subvolume refers to, its own tree of 16 KiB included."""

    def make(self, folder: Path, size_bytes: int, mode: int) -> None:
        name = os.fsencode(folder.name)
        if len(name) > 255:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(folder))
        parent = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(parent, _SUBVOL_CREATE, bytearray(struct.pack("=q4088s", 0, name)))
        finally:
            os.close(parent)
        with _filling(folder, mode) as fd:
            # The group of the subvolume itself is number 0.
            fcntl.ioctl(fd, _QGROUP_LIMIT, struct.pack("=6Q", 0, _MAX_REFERENCED, size_bytes, 0, 0, 0))


class Projects:
    """Of ext4 and xfs."""

    def make(self, folder: Path, size_bytes: int, mode: int) -> None:
        folder.mkdir()
        with _filling(folder, mode) as fd:
            project = _free_project(fd)
            _set_limit(fd, project, size_bytes)
            before = _ATTRIBUTES.unpack(fcntl.ioctl(fd, _GET_ATTRIBUTES, bytes(_ATTRIBUTES.size)))
            after = (before[0] | _INHERIT_PROJECT, *before[1:3], project, *before[4:])
            fcntl.ioctl(fd, _SET_ATTRIBUTES, _ATTRIBUTES.pack(*after))


def find_limits(place: Path) -> FolderLimits | None:
    """The way that works where `place` is to be, a path at which nothing stands; None when there is none.

    Blocking, some milliseconds. OSError when even an ordinary folder cannot be made or deleted there.
    """
    ways: tuple[FolderLimits, ...] = (Subvolumes(), Projects())
    for way in ways:
        try:
            way.make(place, _TRIED_BYTES, 0o700)
        except OSError:
            continue  # not this file system's, switched off, or not for this user
        try:
            if _is_held(place):
                return way
        finally:
            os.rmdir(place)
    return None


def _is_held(folder: Path) -> bool:
    """Whether twice as much as fits is refused. In a thread of its own: capabilities are a thread's, and project quotas
    do not bind the one that has CAP_SYS_RESOURCE.
    """
    held: list[bool] = []

    def write() -> None:
        drop_capabilities(lock_bits=False)
        held.append(_is_refused(folder / "much"))

    writer = threading.Thread(target=write, name="sizes")
    writer.start()
    writer.join()
    return held == [True]


def _is_refused(file: Path) -> bool:
    fd = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        return any(os.write(fd, bytes(1 << 16)) < 1 << 16 for _ in range(2 * _TRIED_BYTES >> 16))
    except OSError as failure:
        return is_out_of_space(failure.errno)
    finally:
        os.close(fd)
        os.unlink(file)


@contextmanager
def _filling(folder: Path, mode: int) -> Iterator[int]:
    """A new folder, open while it is given its limit; it gets its mode then, or goes again when that fails."""
    try:
        fd = os.open(folder, OPEN_DIRECTORY)
        try:
            yield fd
            os.fchmod(fd, mode)
        finally:
            os.close(fd)
    except BaseException:
        os.rmdir(folder)
        raise


def _free_project(fd: int) -> int:
    """A number of no limit and no use yet, far from those that people give by hand."""
    for _ in range(_TRIES):
        project = random.randint(*_PROJECTS)
        found = ctypes.create_string_buffer(_QUOTA.size)
        try:
            _quota(fd, _GET_QUOTA, project, found)
        except OSError as failure:
            if failure.errno != errno.ENOENT:  # xfs: of this number nothing is known
                raise
            return project
        if not any(_QUOTA.unpack(found.raw)[:6]):
            return project
    raise OSError(errno.EBUSY, "no free project number was found")


def _set_limit(fd: int, project: int, size_bytes: int) -> None:
    blocks = -(-size_bytes // _UNIT)
    limit = _QUOTA.pack(blocks, blocks, 0, 0, 0, 0, 0, 0, _SPACE_LIMIT)
    _quota(fd, _SET_QUOTA, project, ctypes.create_string_buffer(limit, _QUOTA.size))


def _quota(fd: int, command: int, project: int, data: "ctypes.Array[ctypes.c_char]") -> None:
    number = NUMBERS["quotactl_fd"][0]  # the same on both architectures
    assert number is not None
    syscall(number, fd, command, project, data)
