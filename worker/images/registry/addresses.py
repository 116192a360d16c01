"""Which addresses a pull may connect to.

Whoever may publish a command names the registry, and a registry names further hosts (its token server, where
its blobs lie). None of that may make the node ask its own neighbours: an address that is not public is used
only for a registry that the operator has written down, and those that serve a cloud's credentials never.
"""

import ipaddress
from collections.abc import Iterable
from fnmatch import fnmatchcase

NOT_PUBLIC = "an address that is not public"

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Link-local: where clouds serve a machine's credentials, and what no registry has. The single addresses are the
# metadata services of AWS (IPv6), Alibaba, Azure (the wire server) and Oracle.
_NEVER = tuple(
    ipaddress.ip_network(text)
    for text in (
        "169.254.0.0/16",
        "fe80::/10",
        "fd00:ec2::254/128",
        "100.100.100.200/32",
        "168.63.129.16/32",
        "192.0.0.192/32",
    )
)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052


def refused(text: str, *, private: bool) -> str | None:
    """Why nothing may connect to this address, or None. `private`: the operator named the registry."""
    address = _inner(ipaddress.ip_address(text.partition("%")[0]))
    if any(address in network for network in _NEVER if network.version == address.version):
        return "a link-local or metadata address"
    if address.is_multicast or address.is_unspecified or (address.is_reserved and not address.is_loopback):
        return "no address of a host"
    if not address.is_global and not private:
        return NOT_PUBLIC
    return None


def _inner(address: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for: mapped, 6to4 or NAT64."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


def is_loopback_name(host: str) -> bool:
    """`localhost` and loopback addresses, as they are written in a name; nothing is looked up."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def names_host(patterns: Iterable[str], host: str) -> bool:
    """Whether one of the `[policy] images` patterns says this registry's host, not just "any".

    `registry.lan:5000/*` and `*.lan/*` do; `*` and `*/tools:*` do not.
    """
    for pattern in patterns:
        first, slash, _ = pattern.partition("/")
        if slash and any(char.isalnum() for char in first) and fnmatchcase(host, first.lower()):
            return True
    return False
