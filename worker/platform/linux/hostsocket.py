"""TCP sockets of the host's network, made by the shim to take the place of a program's own. Standard library only.

A socket belongs for ever to the network of whoever made it, so a program that is given one of the host's holds a way
out. What it can do with it the kernel bounds, whatever the program does in whatever moment:

- Landlock refuses the program every connect and bind of TCP (the plan grants it no port): the shim does them for it,
  and listen, too.
- The socket is bound to loopback before the program gets it, a server's for all addresses to the device: it keeps
  that for good, and another device takes a capability that no container has in the host's network.

Facts are those of socket(7), tcp(7), ip(7), ipv6(7), and of linux/net/core/sock.c and net/ipv4/af_inet.c.
"""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator

from .netrules import Place

_IPPROTO_TCP, _IPPROTO_IP, _IPPROTO_IPV6 = socket.IPPROTO_TCP, socket.IPPROTO_IP, socket.IPPROTO_IPV6
_SO_COOKIE, _SO_BUF_LOCK, _SO_NETNS_COOKIE = 57, 72, 71
_SO_SNDBUF, _SO_RCVBUF, _SO_BINDTODEVICE = 7, 8, 25
_AF_NETLINK = 16
_SO_PROTOCOL, _SO_DOMAIN = 38, 39
_BIND_ADDRESS_NO_PORT = 24
_IPV6_V6ONLY = 26
_TCP_INFO, _CLOSED, _SYN_SENT = 11, 7, 2
_WIDEST = 16  # bytes of an option's value
_BUFFERS = ((1, _SO_SNDBUF), (2, _SO_RCVBUF))  # bits of SO_BUF_LOCK

# What a program may have set before it binds or connects. A congestion algorithm is the host's to choose; marks,
# devices, IP options and filters are not carried over, nor the owner for SIGIO.
_CARRIED = (
    *((socket.SOL_SOCKET, option) for option in (2, 9, 10, 12, 13, 15, 18, 20, 21, 29, 35, 60)),
    *((_IPPROTO_TCP, option) for option in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 18, 25)),
    (_IPPROTO_IP, 1),  # IP_TOS
    (_IPPROTO_IPV6, _IPV6_V6ONLY),
    (_IPPROTO_IPV6, 67),  # IPV6_TCLASS
)
_defaults: dict[int, dict[tuple[int, int], bytes]] = {}


class Kind:
    """What a descriptor is, as its options tell."""

    def __init__(self, sock: socket.socket) -> None:
        """OSError: ENOTSOCK."""
        self.family = sock.getsockopt(socket.SOL_SOCKET, _SO_DOMAIN)
        self.inet = self.family in (socket.AF_INET, socket.AF_INET6)
        self.protocol = sock.getsockopt(socket.SOL_SOCKET, _SO_PROTOCOL) if self.inet else 0
        self.tcp = self.inet and self.protocol == _IPPROTO_TCP
        self.udp = self.inet and self.protocol == socket.IPPROTO_UDP
        # All that a program can have of these belongs to its own network.
        self.harmless = self.udp or self.family in (socket.AF_UNIX, _AF_NETLINK)


def taken(fd: int) -> socket.socket:
    """A descriptor of whatever it is, to ask for options and addresses: no more, as its family is only said to be
    the one with the longer addresses.
    """
    return socket.socket(socket.AF_INET6, socket.SOCK_STREAM, _IPPROTO_TCP, fd)


def network_of(sock: socket.socket) -> bytes:
    """What tells its network namespace apart from every other (Linux 5.14)."""
    return sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)


def cookie_of(sock: socket.socket) -> bytes:
    """A number that no other socket ever has."""
    return sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8)


def is_closed(sock: socket.socket) -> bool:
    """Whether it is neither connected nor on the way, nor does it listen."""
    return _state(sock) == _CLOSED


def is_connecting(sock: socket.socket) -> bool:
    return _state(sock) == _SYN_SENT


def only_v6(sock: socket.socket, family: int) -> bool:
    return family == socket.AF_INET6 and bool(sock.getsockopt(_IPPROTO_IPV6, _IPV6_V6ONLY))


def is_bound(sock: socket.socket) -> bool:
    return bool(sock.getsockname()[1])


@contextlib.contextmanager
def like(old: socket.socket) -> Iterator[socket.socket]:
    """A socket of this process's network with the options of another; closed in the end. It does not block."""
    family = old.getsockopt(socket.SOL_SOCKET, _SO_DOMAIN)
    with socket.socket(family, socket.SOCK_STREAM | os.O_NONBLOCK, _IPPROTO_TCP) as new:
        for (level, option), default in _defaults_of(family).items():
            value = old.getsockopt(level, option, _WIDEST)
            if value != default:
                # The host may refuse what it does not know, or what needs a capability that nobody here has.
                with contextlib.suppress(PermissionError, FileNotFoundError):
                    new.setsockopt(level, option, value)
        set_by_hand = old.getsockopt(socket.SOL_SOCKET, _SO_BUF_LOCK)
        for bit, option in _BUFFERS:
            if set_by_hand & bit:
                # The kernel tells twice what it was given (socket(7)).
                new.setsockopt(socket.SOL_SOCKET, option, old.getsockopt(socket.SOL_SOCKET, option) // 2)
        yield new


def bind(new: socket.socket, place: Place) -> None:
    """Make it a server of a granted port. OSError, as of bind(2)."""
    if place.both:
        # One socket for both families; packets from other machines come by other devices than this one.
        new.setsockopt(socket.SOL_SOCKET, _SO_BINDTODEVICE, b"lo")
    new.bind((place.host, place.port))


def connect(new: socket.socket, place: Place) -> int:
    """Begin to connect it to a granted port: 0, EINPROGRESS, or the errno that it failed with."""
    own = "127.0.0.1" if new.family == socket.AF_INET else "::ffff:127.0.0.1" if place.v4 else "::1"
    new.setsockopt(_IPPROTO_IP, _BIND_ADDRESS_NO_PORT, 1)
    new.bind((own, 0))
    error = new.connect_ex((place.host, place.port))
    if error != errno.EINPROGRESS:
        return error
    # On loopback the answer is there already, but for a server whose queue is full. It may be over, too.
    if is_connecting(new):
        return errno.EINPROGRESS
    return new.connect_ex((place.host, place.port)) or errno.ECONNREFUSED if is_closed(new) else 0


def _state(sock: socket.socket) -> int:
    return sock.getsockopt(_IPPROTO_TCP, _TCP_INFO, 1)[0]


def _defaults_of(family: int) -> dict[tuple[int, int], bytes]:
    """The value of each option that is carried over in a socket where nobody has set it."""
    if family not in _defaults:
        with socket.socket(family, socket.SOCK_STREAM) as fresh:
            found = {}
            for level, option in _CARRIED:
                if level != _IPPROTO_IPV6 or family == socket.AF_INET6:
                    found[level, option] = fresh.getsockopt(level, option, _WIDEST)
            _defaults[family] = found
    return _defaults[family]
