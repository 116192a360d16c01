"""Addresses in Seatbelt filters and in requests.

A filter names `*` or `localhost` and a port or `*`, and nothing else: the compiler refuses host names,
addresses, ranges and port 0.
"""

import ipaddress
import re

import msgspec

from .sbpl_reader import Rejected

PROTOCOLS = ("ip", "ip4", "ip6", "tcp", "tcp4", "tcp6", "udp", "udp4", "udp6")

_PORT = re.compile(r"[0-9]{1,5}")
_LOCALHOST = ("127.0.0.1", "::1")
# Nothing bound yet, or all of the machine's addresses.
_WILDCARDS = ("*", "0.0.0.0", "::")


class Pattern(msgspec.Struct, frozen=True):
    """What `(remote tcp "localhost:80")` says: None for any port."""

    protocol: str
    host: str = "*"
    port: int | None = None


class Address(msgspec.Struct, frozen=True):
    """Of a request: a textual host without brackets, a port, and the protocol `tcp` or `udp`."""

    host: str
    port: int
    protocol: str

    @property
    def family(self) -> str | None:
        """`4` or `6`; None for a name."""
        try:
            return str(ipaddress.ip_address(self.host).version)
        except ValueError:
            return None


def pattern(protocol: str, text: str | None, line: int) -> Pattern:
    """Rejected with the words of the real compiler for an address that it does not take."""
    if protocol not in PROTOCOLS:
        raise Rejected(f"{protocol} is no protocol of a network address", line)
    if text is None:
        return Pattern(protocol)
    host, colon, port = text.rpartition(":")
    if not colon:
        raise Rejected(f"port missing in network address {text!r}", line)
    if host not in ("*", "localhost"):
        raise Rejected(f"host must be * or localhost in network address {text!r}", line)
    if port == "*":
        return Pattern(protocol, host)
    if not _PORT.fullmatch(port) or not 1 <= int(port) <= 65535:
        raise Rejected(f"invalid port in network address {text!r}", line)
    return Pattern(protocol, host, int(port))


def address(text: str, protocol: str | None) -> Address:
    """`127.0.0.1:80`, `[::1]:80`, `*:80`, `localhost:80`, `example.com:443`; without protocol, `tcp`.

    ValueError for anything else.
    """
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        ipaddress.IPv6Address(host)
    elif ":" in host:
        raise ValueError(f"{text!r} needs brackets around its IPv6 address")
    if not colon or not host or not _PORT.fullmatch(port) or int(port) > 65535:
        raise ValueError(f"{text!r} is not HOST:PORT")
    if protocol not in (None, "tcp", "udp"):
        raise ValueError(f"{protocol!r} is neither tcp nor udp")
    return Address("127.0.0.1" if host == "localhost" else _plain(host), int(port), protocol or "tcp")


def _plain(host: str) -> str:
    """One spelling for one address."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host


def matches_remote(wanted: Pattern, asked: Address) -> bool | None:
    if wanted.port not in (None, asked.port):
        return False
    return _both(_family(wanted, asked), _remote_host(wanted, asked))


def matches_local(wanted: Pattern, asked: Address) -> bool | None:
    """The side that binds, listens and accepts."""
    if wanted.port not in (None, asked.port):
        return False
    if wanted.host == "*" or asked.host in _LOCALHOST:
        return _family(wanted, asked)
    # Reported to take every local address (NIX#11270, ocaml/opam#5221), and not to (BAZEL#30865).
    return _both(_family(wanted, asked), None)


def matches_unbound(wanted: Pattern) -> bool | None:
    """A local filter on an outgoing connection, whose socket has no address of its own yet.

    It matches whatever host is named (NIX#10078, SRT#131); a port was not measured.
    """
    return True if wanted.port is None else None


def _remote_host(wanted: Pattern, asked: Address) -> bool | None:
    # Measured: localhost takes 127.0.0.1, ::1 and 0.0.0.0, not 127.0.0.2 nor ::ffff:127.0.0.1
    # (openai/codex#42925, SRT#494, and public notes from macOS 15 and 27).
    if wanted.host == "*" or asked.host in (*_LOCALHOST, "0.0.0.0"):
        return True
    return None if asked.host in _WILDCARDS else False


def _family(wanted: Pattern, asked: Address) -> bool | None:
    kind, version = wanted.protocol.rstrip("46"), wanted.protocol[-1:]
    if kind not in ("ip", asked.protocol):
        return False
    if version not in ("4", "6"):
        return True
    return None if asked.family is None else asked.family == version


def _both(one: bool | None, other: bool | None) -> bool | None:
    if one is False or other is False:
        return False
    return True if one and other else None
