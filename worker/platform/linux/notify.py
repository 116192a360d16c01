"""System calls handed over to another process: the kernel's interface (seccomp_unotify(2)). Standard library only.

A filter's verdict ASK makes a call wait until somebody answers it at the filter's listener. The caller is stopped in
the call meanwhile: with the flag that `seccomp.install` sets, only a fatal signal ends its wait (Linux 5.19).
"""

import ctypes
import errno
import fcntl
import os
import re
import struct
from typing import NamedTuple

from . import seccomp
from .libc import syscall
from .syscall_table import NUMBERS

# linux/seccomp.h: struct seccomp_notif (with seccomp_data), seccomp_notif_resp, seccomp_notif_addfd.
_NOTICE = struct.Struct("=QII iIQ6Q")
_ANSWER = struct.Struct("=QqiI")
_ADD = struct.Struct("=QIIII")
_RECEIVE, _SEND, _IS_VALID, _ADD_DESCRIPTOR = 0xC0502100, 0xC0182101, 0x40082102, 0x40182103
_SET_FLAGS, _SYNC_WAKE_UP = 0x40082104, 1
_GO_ON = 1
_REPLACE, _ADD_AND_ANSWER = 1, 2
_GET_SIZES = 3

# The first kernel where a call that was heard of is not given up for a signal; adding a descriptor, in the place of
# another or as the answer itself, is older.
_NEEDED = (5, 19)


class Notice(NamedTuple):
    """A call that waits. `pid` is the thread's number as this process sees it."""

    call: int
    pid: int
    number: int
    arguments: tuple[int, ...]


def supported() -> bool:
    """Whether the kernel can hand calls over. False also where no filter is known for the machine."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    machine = seccomp.machine()
    if machine is None or found is None or (int(found[1]), int(found[2])) < _NEEDED:
        return False
    sizes = (ctypes.c_uint16 * 3)()
    try:
        syscall(number_of("seccomp"), _GET_SIZES, 0, ctypes.byref(sizes))
    except OSError:
        return False
    return (sizes[0], sizes[1]) == (_NOTICE.size, _ANSWER.size)


def number_of(call: str) -> int:
    """Of a call of `NUMBERS` on this machine; -1 where there is no such call."""
    machine = seccomp.machine()
    number = None if machine is None else NUMBERS[call][list(seccomp.AUDIT_ARCH).index(machine)]
    return -1 if number is None else number


class Listener:
    """Owns the descriptor at which the calls under one filter are heard of."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def answer_nearby(self) -> None:
        """Ask the kernel to run caller and answerer on one processor in turn, as they never run at once (Linux 6.6)."""
        fcntl.ioctl(self.fd, _SET_FLAGS, _SYNC_WAKE_UP)

    def receive(self) -> Notice | None:
        """The next call; None when whoever made it is gone."""
        notice = bytearray(_NOTICE.size)
        try:
            fcntl.ioctl(self.fd, _RECEIVE, notice)
        except OSError as failure:
            if failure.errno in (errno.ENOENT, errno.EINTR):
                return None
            raise
        call, pid, _, number, _, _, *arguments = _NOTICE.unpack(notice)
        return Notice(call, pid, number, tuple(arguments))

    def waits(self, call: int) -> bool:
        """Whether it still does. If so, what was opened of its process before is that of no later one."""
        try:
            _ask(self.fd, _IS_VALID, struct.pack("=Q", call))
        except OSError as failure:
            if failure.errno != errno.ENOENT:
                raise
            return False
        return True

    def answer(self, call: int, error: int) -> bool:
        """0 or the errno that the call is to give. False when the caller does not wait any more."""
        return self._send(_ANSWER.pack(call, 0, -error, 0))

    def go_on(self, call: int) -> bool:
        """Let the kernel do the call, with whatever its arguments have become by now."""
        return self._send(_ANSWER.pack(call, 0, 0, _GO_ON))

    def give(self, call: int, fd: int, *, cloexec: bool) -> None:
        """Put a descriptor into the caller and let its number be the call's result. OSError."""
        flags = os.O_CLOEXEC if cloexec else 0
        _ask(self.fd, _ADD_DESCRIPTOR, _ADD.pack(call, _ADD_AND_ANSWER, fd, 0, flags))

    def replace(self, call: int, fd: int, number: int, *, cloexec: bool) -> None:
        """Put a descriptor into the caller in the place of its own `number`, as dup2 would. OSError."""
        flags = os.O_CLOEXEC if cloexec else 0
        _ask(self.fd, _ADD_DESCRIPTOR, _ADD.pack(call, _REPLACE, fd, number, flags))

    def close(self) -> None:
        os.close(self.fd)

    def _send(self, answer: bytes) -> bool:
        try:
            _ask(self.fd, _SEND, answer)
        except OSError as failure:
            if failure.errno != errno.ENOENT:
                raise
            return False
        return True


def _ask(fd: int, request: int, argument: bytes) -> None:
    """Once more when a signal of this process's came between, such as a child's end: the kernel takes its lock, and
    waits for the caller to take a descriptor, interruptibly, and has then done nothing (`seccomp_notify_addfd`).
    """
    while True:
        try:
            fcntl.ioctl(fd, request, argument)
        except InterruptedError:
            continue
        return
