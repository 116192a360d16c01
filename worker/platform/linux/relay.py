"""Carries datagrams between a container's own network and the granted UDP ports of the host. Standard library only.

No UDP socket of the host's is ever in a program's hands: one could send to any port of the host, connected or not, and
no filter sees the addresses that sendmsg(2) is given. So datagrams are carried across, a few at each turn.

outward   A socket in the container's network on each granted port, at all its addresses. Whoever sends there gets a
          socket outside that is connected to the same address and port of the host.
inward    A socket outside on each granted port that a program has bound, and one inside, from which each peer
          outside appears at an address of its own, 127.128.0.1 and on. Nobody else is ever sent to.

IPv4 only. That nobody listens outside is not told: datagrams are lost then.
"""

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

from .netrules import Ports

_IP_PKTINFO = 8
_PKTINFO = struct.Struct("=i4s4s")  # struct in_pktinfo: device, own address, the packet's destination
_CONTROL_BYTES = socket.CMSG_SPACE(_PKTINFO.size)
_MOST_BYTES = 65536
_MOST_FLOWS = 256
_MOST_PEERS = 4096
_TURN = 32
_ALIASES = (127 << 24) | (128 << 16)
_ALIAS_COUNT = 1 << 23
# What a datagram may end in without harm: nobody listens, or there is no room for it now.
_LOST = (errno.ECONNREFUSED, errno.EAGAIN, errno.ENOBUFS, errno.EPERM, errno.EMSGSIZE, errno.EINVAL)

Address = tuple[str, int]
# (descriptor, what to do when it is readable)
Watch = Callable[[int, Callable[[], None]], None]


class Flow(NamedTuple):
    """One asker inside, and the address of the host that it asks; `inside` is where it is answered from."""

    inside: socket.socket
    asker: Address
    asked: Address


class Peer(NamedTuple):
    """Somebody outside who has sent to a port of the container."""

    outside: socket.socket
    port: int
    address: Address


class Relay:
    """Owns its sockets. `inside` are those of `sockets`."""

    def __init__(
        self, inside: Iterable[int], ports: Ports, watch: Watch, forget: Callable[[int], None]
    ) -> None:
        self._watch = watch
        self._forget = forget
        self._buffer = bytearray(_MOST_BYTES)
        self._flows: dict[Flow, socket.socket] = {}
        self._served: dict[Address, socket.socket] = {}
        self._peers: dict[str, Peer] = {}
        self._aliases: dict[Peer, str] = {}
        self._next = 0
        self._sockets = [_socket(fd) for fd in inside]
        for port, sock in zip(sorted(ports.udp_connect), self._sockets, strict=False):
            watch(sock.fileno(), partial(self._outward, sock, port))
        self._inward = self._sockets[-1] if ports.udp_bind else None
        if self._inward is not None:
            watch(self._inward.fileno(), partial(self._answered, self._inward))

    def close(self) -> None:
        for sock in (*self._sockets, *self._flows.values(), *self._served.values()):
            self._drop(sock)

    def serves(self, place: Address) -> bool:
        return place in self._served

    def open(self, place: Address) -> None:
        """Let the host send to a port of the container's. OSError, as of bind(2)."""
        outside = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | os.O_NONBLOCK)
        try:
            outside.bind(place)
        except OSError:
            outside.close()
            raise
        self._served[place] = outside
        self._watch(outside.fileno(), lambda: self._arrived(outside, place))

    def shut(self, place: Address) -> None:
        self._drop(self._served.pop(place))

    def _drop(self, sock: socket.socket) -> None:
        self._forget(sock.fileno())
        sock.close()

    # -- outward

    def _outward(self, inside: socket.socket, port: int) -> None:
        for _ in range(_TURN):
            got = self._receive(inside)
            if got is None:
                return
            data, asker, target = got
            flow = Flow(inside, asker, (target, port))
            with _lossy():
                outside = self._flows.pop(flow, None) or self._make_flow(flow)
                self._flows[flow] = outside  # the last used comes last
                outside.send(data)

    def _make_flow(self, flow: Flow) -> socket.socket:
        while len(self._flows) >= _MOST_FLOWS:
            self._drop(self._flows.pop(next(iter(self._flows))))
        outside = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | os.O_NONBLOCK)
        try:
            outside.connect(flow.asked)
        except OSError:
            outside.close()
            raise
        self._watch(outside.fileno(), lambda: self._replied(outside, flow))
        return outside

    def _replied(self, outside: socket.socket, flow: Flow) -> None:
        for _ in range(_TURN):
            with _lossy():
                try:
                    length = outside.recv_into(self._buffer)
                except BlockingIOError:
                    return
                self._send(flow.inside, memoryview(self._buffer)[:length], flow.asked[0], flow.asker)

    # -- inward

    def _arrived(self, outside: socket.socket, place: Address) -> None:
        for _ in range(_TURN):
            with _lossy():
                try:
                    length, address = outside.recvfrom_into(self._buffer)
                except BlockingIOError:
                    return
                if self._inward is not None:
                    alias = self._alias(Peer(outside, place[1], address))
                    self._send(self._inward, memoryview(self._buffer)[:length], alias, place)

    def _alias(self, peer: Peer) -> str:
        """An address inside; one that was given up comes again only after all others."""
        found = self._aliases.get(peer)
        if found is None:
            while len(self._aliases) >= _MOST_PEERS:
                oldest = next(iter(self._aliases))
                del self._peers[self._aliases.pop(oldest)]
            self._next = self._next % (_ALIAS_COUNT - 2) + 1
            found = socket.inet_ntoa(struct.pack("!I", _ALIASES | self._next))
            self._aliases[peer] = found
            self._peers[found] = peer
        return found

    def _answered(self, inside: socket.socket) -> None:
        for _ in range(_TURN):
            got = self._receive(inside)
            if got is None:
                return
            data, sender, target = got
            peer = self._peers.get(target)
            # A port answers its own peers only.
            if peer is not None and peer.port == sender[1] and peer.outside.fileno() >= 0:
                with _lossy():
                    peer.outside.sendto(data, peer.address)

    # -- datagrams

    def _receive(self, sock: socket.socket) -> tuple[memoryview, Address, str] | None:
        """(what, from whom, to which address); None when there is no more."""
        try:
            length, ancillary, _, sender = sock.recvmsg_into([self._buffer], _CONTROL_BYTES)
        except OSError as failure:
            if failure.errno in _LOST:
                return None
            raise
        for level, kind, raw in ancillary:
            if level == socket.IPPROTO_IP and kind == _IP_PKTINFO:
                target = socket.inet_ntoa(_PKTINFO.unpack(raw)[2])
                return memoryview(self._buffer)[:length], sender, target
        return None

    def _send(self, sock: socket.socket, data: memoryview, source: str, to: Address) -> None:
        control = _PKTINFO.pack(0, socket.inet_aton(source), bytes(4))
        sock.sendmsg([data], [(socket.IPPROTO_IP, _IP_PKTINFO, control)], 0, to)


def _socket(fd: int) -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_UDP, fd)


@contextlib.contextmanager
def _lossy() -> Iterator[None]:
    try:
        yield
    except OSError as failure:
        if failure.errno not in (*_LOST, errno.EMFILE, errno.ENFILE):
            raise


def sockets(ports: Ports) -> list[int]:
    """For `Relay`, of this process's network, which is the container's. OSError, as of bind(2).

    They are there before the program is: what it sends to a granted port waits in them, and is not refused.
    """
    with contextlib.ExitStack() as made:
        found = []
        for port in (*sorted(ports.udp_connect), *([0] if ports.udp_bind else [])):
            sock = made.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM | os.O_NONBLOCK))
            sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
            sock.bind(("0.0.0.0", port))
            found.append(sock)
        return [sock.detach() for sock in found]
