"""Which addresses of a container with a network of its own are the host's: the rules. Pure, standard library only.

A container at the level `localhost` has a loopback of its own. Its granted ports alone lie on the host's: these it may
bind and connect to there; everything else stays in its own network, which holds nothing but its own programs.
Addresses are those of ip(7) and ipv6(7).
"""

import array
import socket
import struct
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

_V4 = struct.Struct("!2xH4s")  # the family, in the machine's order, is read by itself
_V6 = struct.Struct("!2xH4x16s")
_LEAST: dict[int, int] = {
    socket.AF_INET: 16,
    socket.AF_INET6: 24,
}  # bytes of an address that the kernel wants
MOST_BYTES = 128  # struct sockaddr_storage
_MAPPED = bytes(10) + b"\xff\xff"
_ANY4, _ANY6 = bytes(4), bytes(16)
_LOOPBACK4 = 127  # the first byte of all of them
_LOOPBACK6 = bytes(15) + b"\1"
_NAME_PORT = 53


class Ports(NamedTuple):
    """Granted ports: of TCP and of UDP, to bind and to connect to."""

    bind: frozenset[int]
    connect: frozenset[int]
    udp_bind: frozenset[int]
    udp_connect: frozenset[int]

    @classmethod
    def of_plan(cls, plan: Mapping[str, Iterable[int]]) -> "Ports":
        return cls(*(frozenset(plan[name]) for name in cls._fields))

    def packed(self) -> bytes:
        """For `unpack`; shorter than any text, because a spec may name every port there is."""
        kinds = [array.array("H", sorted(ports)) for ports in self]
        return struct.pack("=4H", *map(len, kinds)) + b"".join(kind.tobytes() for kind in kinds)

    @classmethod
    def unpack(cls, raw: bytes) -> "Ports":
        found = array.array("H")
        found.frombytes(raw[8:])
        kinds, at = [], 0
        for length in struct.unpack_from("=4H", raw):
            kinds.append(frozenset(found[at : at + length]))
            at += length
        return cls(*kinds)


class Place(NamedTuple):
    """An address on the host's loopback. With `both`, every one of it, of IPv4 and IPv6."""

    host: str
    port: int
    both: bool = False

    @property
    def v4(self) -> str:
        """Its IPv4 address, empty when it has none."""
        if self.both:
            return "127.0.0.1"
        host = self.host.removeprefix("::ffff:")
        return host if "." in host else ""


def granted(
    bind: Iterable[int], connect: Iterable[int], udp: Iterable[int], denied: Iterable[int]
) -> dict[str, Any]:
    """The `ports` of a plan. `udp` are those to bind by UDP; without any, UDP reaches name servers only."""
    never = {*denied}
    binds, connects, datagrams = ({*ports} - never for ports in (bind, connect, udp))
    outward = connects - binds if datagrams else connects & {_NAME_PORT}
    kinds = (binds, connects, datagrams, outward)
    return {name: sorted(ports) for name, ports in zip(Ports._fields, kinds, strict=True)}


def connect_place(raw: bytes, family: int, ports: frozenset[int]) -> Place | None:
    """Where on the host a socket of this family is to be connected to; None: nowhere, it stays in its own network."""
    host, port = _parse(raw, family)
    if port not in ports:
        return None
    return _on_loopback(host, port)


def bind_place(raw: bytes, family: int, ports: frozenset[int], *, only_v6: bool) -> Place | None:
    """Where on the host it is to be bound; None: in its own network."""
    host, port = _parse(raw, family)
    if port not in ports:
        return None
    if host == _ANY6 and not only_v6:
        return Place("::", port, both=True)
    return _on_loopback(host, port)


def port_in(raw: bytes, family: int) -> int:
    """The port of an address, 0 when it has none or the kernel will refuse it."""
    return _parse(raw, family)[1]


def is_unspecific(raw: bytes) -> bool:
    """An address that takes a connection back (AF_UNSPEC)."""
    return raw[:2] == struct.pack("=H", socket.AF_UNSPEC)


def is_loopback(raw: bytes, family: int) -> bool:
    host, port = _parse(raw, family)
    return _on_loopback(host, port) is not None


def _parse(raw: bytes, family: int) -> tuple[bytes, int]:
    """(address, port); (b"", 0) for what the kernel will refuse for a socket of this family."""
    if len(raw) < _LEAST[family] or raw[:2] != struct.pack("=H", family):
        return b"", 0
    layout = _V4 if family == socket.AF_INET else _V6
    port, host = layout.unpack_from(raw)
    return host, port


def _on_loopback(host: bytes, port: int) -> Place | None:
    """An address that means every one stands for the first."""
    if len(host) == 4:
        if host == _ANY4:
            return Place("127.0.0.1", port)
        return Place(socket.inet_ntoa(host), port) if host[0] == _LOOPBACK4 else None
    if host.startswith(_MAPPED):
        found = _on_loopback(host[12:], port)
        return None if found is None else Place(f"::ffff:{found.host}", port)
    return Place("::1", port) if host in (_ANY6, _LOOPBACK6) else None
