"""The one unix socket of a container that has no others: the host API's. Standard library only.

A system-call filter cannot read a path, and Landlock before ABI 9 does not see who connects to a socket by its
path. So where nothing but the API is granted, the filter (`seccomp.Options.gate`) lets no program make a unix
socket itself. It hands two calls over to the container's shim, through a listener (seccomp_unotify(2)):

socket(AF_UNIX, SOCK_STREAM)  The shim makes the socket, connects it to the API and puts it into the program. When
                              the API does not take it, it puts in one end of a pair whose other end is closed.
connect()                     For such a socket, and the API's path, the answer is 0, or the error that the shim met;
                              for another path EACCES. Any other connect goes on in the kernel.

A program can change address and descriptor while its call waits, so letting a call go on is usually no check at
all. Here it is none either: no unix socket in the container is unconnected, and the kernel connects none of them
a second time (EISCONN). TCP goes on in the program, under its own Landlock rules.

The API sees the shim as its peer (SO_PEERCRED), not the program: it is to go by the token. It also sees connections
that end without a word, of programs that look for another socket (glibc looks for nscd's).
"""

import errno
import os
import socket
import struct
import time
from typing import NamedTuple

from .notify import Listener, Notice, number_of

_ADDRESS_BYTES = 110  # struct sockaddr_un
_MOST_MADE = 1024
# A full queue of the API's is waited for, as the kernel would, but not for ever: the wait is in socket(), where a
# program does not look for it.
_PATIENCE_S = 5.0
_PAUSE_MS = 5


class Waiting(NamedTuple):
    """A call for a socket, and until when the API's queue may stay full."""

    call: int
    kind: int
    deadline: float


class Gate:
    """Answers the calls of all programs under one filter. `path` is the API's socket, absolute and normal."""

    ended = False  # by itself: whoever polls the listener sees it

    def __init__(self, listener: Listener, path: bytes) -> None:
        self._listener = listener
        self._path = path
        self._connect = number_of("connect")
        # Sockets put into programs and not connected by them yet: inode, and the errno that connect is to give.
        self._made: dict[int, int] = {}
        self._waiting: list[Waiting] = []

    def fileno(self) -> int:
        return self._listener.fd

    def serve(self) -> None:
        """Answer the one call that the listener is readable for."""
        notice = self._listener.receive()
        if notice is not None:  # else whoever called is gone
            self.answer(notice)

    def answer(self, notice: Notice) -> None:
        call, pid, number, (first, second, third, *_) = notice
        try:
            if number == self._connect:
                self._connects(call, pid, first, second, third)
            else:
                self._makes(call, second, third)
        except OSError as failure:
            self._listener.answer(call, failure.errno or errno.EACCES)

    def retry(self) -> int | None:
        """Try again for those who wait for a place in the API's queue, in their order.

        Gives the milliseconds until that should be done again, None when nobody waits.
        """
        while self._waiting:
            first = self._waiting[0]
            try:
                if not self._put(first.call, first.kind, last=time.monotonic() >= first.deadline):
                    return _PAUSE_MS
            except OSError as failure:
                self._listener.answer(first.call, failure.errno or errno.EACCES)
            del self._waiting[0]
        return None

    def close(self) -> None:
        self._listener.close()

    def _makes(self, call: int, kind: int, protocol: int) -> None:
        if protocol & 0xFFFFFFFF not in (0, socket.AF_UNIX):
            raise OSError(errno.EPROTONOSUPPORT, "no such protocol")
        hasty = bool(kind & os.O_NONBLOCK)
        if (self._waiting and not hasty) or not self._put(call, kind, last=hasty):
            self._waiting.append(Waiting(call, kind, time.monotonic() + _PATIENCE_S))

    def _put(self, call: int, kind: int, *, last: bool) -> bool:
        """Put a socket into the program. False when the API's queue is full, unless this is the last attempt."""
        made, error = self._made_socket()
        with made:
            if error == errno.EAGAIN and not last:
                return False
            if error == errno.EAGAIN and not kind & os.O_NONBLOCK:
                error = errno.ECONNREFUSED
            os.set_blocking(made.fileno(), not kind & os.O_NONBLOCK)
            inode = os.fstat(made.fileno()).st_ino
            self._listener.give(call, made.fileno(), cloexec=bool(kind & os.O_CLOEXEC))
        if len(self._made) >= _MOST_MADE:
            del self._made[next(iter(self._made))]
        self._made[inode] = error
        return True

    def _made_socket(self) -> tuple[socket.socket, int]:
        """One that is connected to the API, or to nothing, and the error in that case."""
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        made.setblocking(False)  # the shim waits for nobody
        try:
            made.connect(self._path)
        except OSError as failure:
            error = failure.errno or errno.ECONNREFUSED
        else:
            return made, 0
        made.close()
        made, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        other.close()
        return made, error

    def _connects(self, call: int, pid: int, descriptor: int, address: int, length: int) -> None:
        inode = _inode(pid, descriptor & 0xFFFFFFFF)
        error = self._made.get(inode)
        if error is None:
            self._listener.go_on(call)
        elif not self._is_path(pid, address, length & 0xFFFFFFFF):
            self._listener.answer(call, errno.EACCES)
        elif self._listener.answer(call, error) and not error:
            del self._made[inode]  # once answered: an interrupted call is made again

    def _is_path(self, pid: int, address: int, length: int) -> bool:
        """Whether a program means the API. It can do no harm otherwise; it would only talk to a stranger."""
        try:
            memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
            try:
                raw = os.pread(memory, min(length, _ADDRESS_BYTES), address)
            finally:
                os.close(memory)
        except PermissionError:
            return True  # one that hides its memory
        except (OSError, OverflowError):
            return False
        if raw[:2] != struct.pack("=H", socket.AF_UNIX):
            return False
        return os.path.normpath(raw[2:].partition(b"\0")[0]) == self._path


def _inode(pid: int, descriptor: int) -> int:
    """Of a socket in another process; 0 for what is none, or cannot be seen."""
    try:
        link = os.readlink(f"/proc/{pid}/fd/{descriptor}")
    except OSError:
        return 0
    return int(link[8:-1]) if link.startswith("socket:[") else 0
