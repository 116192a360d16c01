"""Epoll sets of a program that know a socket which is about to be replaced. Standard library only.

A set holds open files, not descriptors (epoll(7)): with the old file the entry goes, and a program that put its
socket in before it connected, as nginx and Boost.Asio do, would wait for ever. So the new file is put in under the
same number, with the same events and data, which /proc/<pid>/fdinfo tells (proc_pid_fdinfo(5)).
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import re
import signal
import struct
import time
from collections.abc import Iterator

from .callers import Caller
from .libc import function, last_error

_LINK = "anon_inode:[eventpoll]"
_ENTRY = re.compile(
    rb"^tfd:\s*(\d+) events:\s*([0-9a-f]+) data:\s*([0-9a-f]+) .*ino:([0-9a-f]+)", re.MULTILINE
)
_ADD = 1
# struct epoll_event, which is packed on x86-64 alone.
_EVENT = struct.Struct("=IQ" if platform.machine() in ("x86_64", "amd64") else "=I4xQ")
_MOST_KNOWN = 64
# A set is there some time after it was told of.
_SETTLED_S = 1.0

_epoll_ctl = function("epoll_ctl")
_epoll_ctl.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_char_p]


class Epolls:
    """Of all programs of one container. To look costs as much as the program has descriptors, so it is remembered."""

    def __init__(self) -> None:
        self._made = 0
        self._last = 0.0
        self._known: dict[int, tuple[int, list[int]]] = {}

    def one_more(self) -> None:
        """A program is about to make a set."""
        self._made += 1
        self._last = time.monotonic()

    def of(self, pid: int) -> list[int]:
        """The program's sets. OSError when it is gone."""
        if not self._made:
            return []
        made, known = self._known.get(pid, (0, []))
        if made == self._made and all(_is_set(pid, number) for number in known):
            return known
        known = [int(name) for name in os.listdir(f"/proc/{pid}/fd") if _is_set(pid, int(name))]
        if time.monotonic() - self._last > _SETTLED_S:
            while len(self._known) >= _MOST_KNOWN:
                del self._known[next(iter(self._known))]
            self._known[pid] = (self._made, known)
        return known


def put_in(caller: Caller, sets: list[int], number: int, inode: int, new: int) -> None:
    """Put this process's file `new` into the caller's sets, as its descriptor `number`, where the socket `inode` is.

    Other threads may close their sets meanwhile, and open others under the same numbers. OSError.
    """
    for one in sets:
        try:
            epoll = caller.descriptor(one)
        except OSError as failure:
            if failure.errno != errno.EBADF:
                raise
            continue
        try:
            entry = _entry(epoll, number, inode)
            if entry is None:
                continue
            with _under(number, new, epoll) as moved:
                if _epoll_ctl(moved, _ADD, number, _EVENT.pack(*entry)) < 0:
                    raise last_error()
        finally:
            os.close(epoll)


def _entry(epoll: int, number: int, inode: int) -> tuple[int, int] | None:
    """Events and data of the caller's socket in a set of which this process has a duplicate; None: not in there."""
    with open(f"/proc/self/fdinfo/{epoll}", "rb") as info:
        found = _ENTRY.findall(info.read())
    for target, events, data, where in found:
        if int(target) == number and int(where, 16) == inode:
            return int(events, 16), int(data, 16)
    return None


def _is_set(pid: int, number: int) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/fd/{number}") == _LINK
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _under(number: int, fd: int, other: int) -> Iterator[int]:
    """Have `fd` under another number for a moment, and give back what is there; `other` is wherever it is put.

    A set knows its files by their numbers in the process that put them in. No signal may write to the wake-up
    descriptor meanwhile: it could be that number.
    """
    before = signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    kept = []
    try:
        kept.append(fcntl.fcntl(other, fcntl.F_DUPFD_CLOEXEC, number + 1))
        if fd == number:
            yield kept[0]
            return
        try:
            kept.append(fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, number + 1))
        except OSError as failure:
            if failure.errno != errno.EBADF:
                raise
        os.dup2(fd, number, inheritable=False)
        try:
            yield kept[0]
        finally:
            if len(kept) > 1:
                os.dup2(kept[1], number, inheritable=False)
            else:
                os.close(number)
    finally:
        for one in kept:
            os.close(one)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
