"""The granted ports of a container with a network of its own, made real in the host's. Standard library only.

At the level `localhost` a container with a root of its own has a network with nothing but a loopback. Its filter
(`seccomp.Options.ports`) hands these calls over to the container's shim, which lives in the host's network:

bind      A TCP socket and a granted port, on loopback or every address: the shim makes a socket of the host's with the
          same options, binds it to loopback and puts it in the place of the program's. Of UDP: see `relay`.
connect   A TCP socket and a granted port on loopback: likewise, with a socket that is connected or on the way.
listen    Done by the shim; a socket of the host's listens on granted ports only.
epoll_create  Goes on. That there are such sets is remembered, see `epolls`.

Every other bind and connect of TCP the shim does too, with the program's own socket, in the program's own network.

Why no race of threads leads out. The shim judges its own copy of the address and acts on that copy, on a duplicate of
the descriptor (pidfd_getfd(2)): changing memory or descriptors meanwhile changes nothing that it does. What goes on
is done by the kernel with what the program has put there by then. Of that, a bind or connect of TCP, with any socket
of either network, is refused by Landlock: the plan grants it no port. Sockets of UDP, netlink and unix pairs are all
of the container's own network, where nothing of the host is, and a TCP socket cannot be made one that Landlock does
not know (the filter refuses TCP_ULP). No listen goes on. `hostsocket` says what a program can do with a socket of
the host's: talk by it, and give it up.

The shim never waits: a connect that has to (the other's queue is full) is left at once, looked after, and answered in
the end. Meanwhile no signal but a fatal one ends the program's wait.
"""

import ctypes
import errno
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from . import hostsocket, netrules
from .callers import Caller
from .epolls import Epolls, put_in
from .gate import Gate
from .hostsocket import Kind
from .libc import function
from .netrules import Place, Ports
from .notify import Listener, Notice, number_of
from .relay import Relay

# A connect that has not come back by then is interrupted, and again if that was before it began.
_AT_MOST_S = 0.005
_MOST_PENDING = 256
_MOST_SERVERS = 1024
_LOOK_AGAIN_MS = 100
_TURN = 8
_UNPRIVILEGED = "/proc/sys/net/ipv4/ip_unprivileged_port_start"
_READABLE, _WRITABLE = 0x1, 0x4  # EPOLLIN, EPOLLOUT
_SO_SNDTIMEO, _TIMEVAL = 21, struct.Struct("@qq")

_connect = function("connect")
_bind = function("bind")
_listen = function("listen")


class Outside:
    """What all gates of one container share: its ports, and the host's side of them."""

    def __init__(self, ports: Ports) -> None:
        self.ports = ports
        self.epolls = Epolls()
        self.relay: Relay | None = None
        self._servers: dict[bytes, None] = {}
        with socket.socket() as any_socket:
            self._network = hostsocket.network_of(any_socket)

    def holds(self, sock: socket.socket) -> bool:
        """Whether a socket is one of the host's."""
        return hostsocket.network_of(sock) == self._network

    def serves(self, sock: socket.socket) -> None:
        """Remember one that is bound to a granted port: what getsockname says outlives the binding."""
        while len(self._servers) >= _MOST_SERVERS:
            del self._servers[next(iter(self._servers))]
        self._servers[hostsocket.cookie_of(sock)] = None

    def may_listen(self, sock: socket.socket) -> bool:
        return hostsocket.cookie_of(sock) in self._servers


class Target(NamedTuple):
    """Whose descriptor a call is about; `inode` is that of the socket when the call was made."""

    call: int
    pid: int
    number: int
    inode: int


class Pending(NamedTuple):
    """A connect that is on the way. `place` is the host's; None: `sock` is the program's own, and `raw` where to."""

    target: Target
    sock: socket.socket
    place: Place | None
    raw: bytes
    deadline: float | None


class NetGate:
    """Answers the calls of all programs under one filter.

    `api` answers those for unix sockets, where there is a host API. `inside` are sockets for the relay, which the
    first gate of a container has. CALLS are all that the filter asks about, beside those of `api`.
    """

    CALLS = ("bind", "connect", "listen", "epoll_create", "epoll_create1")

    def __init__(self, listener: Listener, outside: Outside, api: Gate | None, inside: Sequence[int]) -> None:
        self.ended = False
        self.outside = outside
        self._listener = listener
        self._api = api
        self._pending: dict[int, Pending] = {}
        self._events: Any = vars(select)["epoll"]()  # which only Linux has
        self._watched: dict[int, Callable[[], None]] = {}
        bind, connect, listen, *epoll_creates = (number_of(call) for call in self.CALLS)
        self._calls = {bind: self._binds, connect: self._connects, listen: self._listens}
        self._epoll_creates = frozenset(epoll_creates)
        self._events.register(listener.fd, _READABLE)
        listener.answer_nearby()
        self._relay: Relay | None = None
        if inside:
            relay = Relay(inside, outside.ports, self._watch, self._forget)
            self._relay = outside.relay = relay
        signal.signal(signal.SIGALRM, _interrupt)

    def fileno(self) -> int:
        fd: int = self._events.fileno()
        return fd

    def serve(self) -> None:
        """Answer whatever is ready, for a while."""
        for _ in range(_TURN):
            ready = self._events.poll(0)
            for fd, event in ready:
                if fd != self._listener.fd:
                    watched = self._watched.get(fd)
                    if watched is not None:
                        watched()
                elif event & _READABLE:
                    self._serve_one()
                else:
                    self.ended = True  # the last program under this filter
            if not ready or self.ended:
                return

    def retry(self) -> int | None:
        """Look after what waits. Gives the milliseconds until that should be done again, None: when there is news."""
        now = time.monotonic()
        for pending in [*self._pending.values()]:
            if not self._listener.waits(pending.target.call):
                self._leave(pending)
            elif pending.deadline is not None and now >= pending.deadline:
                self._leave(pending)
                self._listener.answer(pending.target.call, errno.EINPROGRESS)
        waits = [None if self._api is None else self._api.retry(), _LOOK_AGAIN_MS if self._pending else None]
        return min((wait for wait in waits if wait is not None), default=None)

    def close(self) -> None:
        for pending in [*self._pending.values()]:
            self._leave(pending)
        if self._relay is not None:
            self._relay.close()
        self._events.close()
        self._listener.close()

    def _watch(self, fd: int, on_readable: Callable[[], None], event: int = _READABLE) -> None:
        self._events.register(fd, event)
        self._watched[fd] = on_readable

    def _forget(self, fd: int) -> None:
        self._events.unregister(fd)
        del self._watched[fd]

    def _serve_one(self) -> None:
        notice = self._listener.receive()
        if notice is None:
            return
        handler = self._calls.get(notice.number)
        if handler is not None:
            self._answer(notice, handler)
        elif notice.number in self._epoll_creates:
            self.outside.epolls.one_more()
            self._listener.go_on(notice.call)
        elif self._api is not None:
            self._api.answer(notice)

    def _answer(
        self, notice: Notice, handler: "Callable[[Notice, Caller, socket.socket], int | None]"
    ) -> None:
        """`handler` gives the errno, or None when it has seen to the answer."""
        try:
            with Caller(notice.pid) as caller:
                if not self._listener.waits(notice.call):
                    return
                with hostsocket.taken(caller.descriptor(notice.arguments[0] & 0xFFFFFFFF)) as sock:
                    error = handler(notice, caller, sock)
        except OSError as failure:
            # The program hides (EPERM), or is about to end.
            error = (
                errno.EACCES if failure.errno in (errno.EPERM, errno.ESRCH) else failure.errno or errno.EACCES
            )
        if error is not None:
            self._listener.answer(notice.call, error)

    def _goes_on(self, notice: Notice) -> int | None:
        self._listener.go_on(notice.call)
        return None

    # -- connect

    def _connects(self, notice: Notice, caller: Caller, sock: socket.socket) -> int | None:
        kind = Kind(sock)
        if kind.family == socket.AF_UNIX and self._api is not None:
            self._api.answer(notice)
            return None
        if kind.harmless:
            return self._goes_on(notice)
        if not kind.tcp:
            return errno.EACCES
        raw = _address(notice, caller)
        target = Target(
            notice.call, notice.pid, notice.arguments[0] & 0xFFFFFFFF, os.fstat(sock.fileno()).st_ino
        )
        if not hostsocket.is_closed(sock) or netrules.is_unspecific(raw):
            return self._connect_own(target, sock, raw)
        place = netrules.connect_place(raw, kind.family, self.outside.ports.connect)
        if place is not None:
            return self._connect_host(target, caller, sock, place)
        if self.outside.holds(sock):
            # What it wants is not in the host's network, and it is no longer one of its own.
            return errno.ECONNREFUSED if netrules.is_loopback(raw, kind.family) else errno.ENETUNREACH
        return self._connect_own(target, sock, raw)

    def _connect_own(self, target: Target, sock: socket.socket, raw: bytes) -> int | None:
        """With the socket that the program has. One that blocks would block the shim."""
        error = _soon(_connect, sock.fileno(), raw, len(raw))
        if error != errno.EINTR:
            return error
        return self._wait_for(Pending(target, sock, None, raw, _deadline(sock)))

    def _connect_host(self, target: Target, caller: Caller, sock: socket.socket, place: Place) -> int | None:
        blocks = os.get_blocking(sock.fileno())
        with hostsocket.like(sock) as new:
            error = hostsocket.connect(new, place)
            if error == errno.EINPROGRESS and blocks:
                return self._wait_for(Pending(target, new, place, b"", _deadline(sock)))
            if error not in (0, errno.EINPROGRESS):
                return error
            if blocks:
                new.connect_ex((place.host, place.port))  # now it says that it is connected
            self._put(target, caller, new, blocks=blocks)
        return 0 if blocks else errno.EINPROGRESS  # as of any that does not block

    def _wait_for(self, pending: Pending) -> int | None:
        """Look after a connect. The socket stays the caller's, who closes it."""
        if len(self._pending) >= _MOST_PENDING:
            return errno.EAGAIN
        sock = pending.sock
        copy = socket.socket(sock.family, sock.type, sock.proto, os.dup(sock.fileno()))
        kept = pending._replace(sock=copy)
        fd = kept.sock.fileno()
        self._pending[fd] = kept
        self._watch(fd, lambda: self._came(kept), _WRITABLE)
        return None

    def _came(self, pending: Pending) -> None:
        """It is connected, or has failed: to connect once more tells."""
        target, sock, place, raw, _ = pending
        try:
            if place is None:
                error = _soon(_connect, sock.fileno(), raw, len(raw))
                if error == errno.EINTR:
                    return
            else:
                error = sock.connect_ex((place.host, place.port))
                if error == 0:
                    with Caller(target.pid) as caller:
                        if self._listener.waits(target.call):
                            self._put(target, caller, sock, blocks=True)
        except OSError as failure:
            error = failure.errno or errno.EACCES
        self._leave(pending)
        self._listener.answer(target.call, error)

    def _leave(self, pending: Pending) -> None:
        fd = pending.sock.fileno()
        self._forget(fd)
        del self._pending[fd]
        pending.sock.close()

    def _put(self, target: Target, caller: Caller, new: socket.socket, *, blocks: bool) -> None:
        """Put a socket in the place of the program's own, also where the program waits for events. OSError."""
        new.setblocking(blocks)
        sets = self.outside.epolls.of(target.pid)
        put_in(caller, sets, target.number, target.inode, new.fileno())
        cloexec = caller.closes_on_exec(target.number)
        self._listener.replace(target.call, new.fileno(), target.number, cloexec=cloexec)

    # -- bind and listen

    def _binds(self, notice: Notice, caller: Caller, sock: socket.socket) -> int | None:
        kind = Kind(sock)
        if not kind.inet:
            return self._goes_on(notice) if kind.harmless else errno.EACCES
        raw = _address(notice, caller)
        only_v6 = hostsocket.only_v6(sock, kind.family)
        ports = self.outside.ports
        place = netrules.bind_place(
            raw, kind.family, ports.bind if kind.tcp else ports.udp_bind, only_v6=only_v6
        )
        if 0 < netrules.port_in(raw, kind.family) < _first_open_port():
            return errno.EACCES
        if kind.udp:
            return self._bind_udp(notice, sock, raw, place)
        if not kind.tcp:
            return errno.EACCES
        if self.outside.holds(sock):
            return errno.EINVAL  # it is bound
        if place is None or hostsocket.is_bound(sock):
            return _error_of(_bind(sock.fileno(), raw, len(raw)))
        with hostsocket.like(sock) as new:
            hostsocket.bind(new, place)
            inode = os.fstat(sock.fileno()).st_ino
            target = Target(notice.call, notice.pid, notice.arguments[0] & 0xFFFFFFFF, inode)
            self.outside.serves(new)
            self._put(target, caller, new, blocks=os.get_blocking(sock.fileno()))
        return 0

    def _bind_udp(self, notice: Notice, sock: socket.socket, raw: bytes, place: Place | None) -> int | None:
        relay = self.outside.relay
        if place is None or relay is None or not place.v4:
            return self._goes_on(notice)
        address = (place.v4, place.port)
        known = relay.serves(address)
        if not known:
            relay.open(address)
        error = _error_of(_bind(sock.fileno(), raw, len(raw)))
        if error and not known:
            relay.shut(address)
        return error

    def _listens(self, notice: Notice, caller: Caller, sock: socket.socket) -> int | None:
        kind = Kind(sock)
        if not kind.inet and not kind.harmless:
            return errno.EACCES
        if kind.tcp and self.outside.holds(sock) and not self.outside.may_listen(sock):
            return errno.EINVAL
        return _error_of(_listen(sock.fileno(), _int(notice.arguments[1])))


def _address(notice: Notice, caller: Caller) -> bytes:
    """The shim's own copy of the address that a call names. OSError."""
    length = _int(notice.arguments[2])
    if not 0 <= length <= netrules.MOST_BYTES:
        raise OSError(errno.EINVAL, "no length of an address")
    return caller.memory(notice.arguments[1], length)


def _int(argument: int) -> int:
    """As the kernel cuts an argument to an int."""
    cut = argument & 0xFFFFFFFF
    return cut - (1 << 32) if cut >> 31 else cut


def _deadline(sock: socket.socket) -> float | None:
    """Until when the program lets its connect wait (SO_SNDTIMEO)."""
    seconds, micros = _TIMEVAL.unpack(sock.getsockopt(socket.SOL_SOCKET, _SO_SNDTIMEO, _TIMEVAL.size))
    return time.monotonic() + seconds + micros / 1e6 if seconds or micros else None


def _first_open_port() -> int:
    """What a program without capabilities may bind begins here. The shim may more, in either network."""
    with open(_UNPRIVILEGED, "rb") as file:
        return int(file.read())


def _soon(call: Callable[..., int], *arguments: object) -> int:
    """The errno of a call that may not take long: EINTR when it would have. Whether it blocks the program decides,
    at any moment, so it is never asked.
    """
    signal.setitimer(signal.ITIMER_REAL, _AT_MOST_S, _AT_MOST_S)
    try:
        return _error_of(call(*arguments))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _error_of(result: int) -> int:
    return ctypes.get_errno() if result < 0 else 0


def _interrupt(number: int, frame: object) -> None:
    """That a call was interrupted is all that this signal is for."""
