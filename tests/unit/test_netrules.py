"""Which addresses are the host's, for a container with a network of its own."""

import ipaddress
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.platform.linux.netrules import (
    Place,
    Ports,
    bind_place,
    connect_place,
    granted,
    is_loopback,
    is_unspecific,
    port_in,
)

V4, V6 = socket.AF_INET, socket.AF_INET6
GRANTED = frozenset({80, 8080})


def address(host: str, port: int) -> bytes:
    """struct sockaddr_in or sockaddr_in6."""
    if ":" in host:
        return struct.pack("=H", V6) + struct.pack("!HI16sI", port, 0, socket.inet_pton(V6, host), 0)
    return struct.pack("=H", V4) + struct.pack("!H4s8x", port, socket.inet_aton(host))


@pytest.mark.parametrize(
    ("host", "connected", "bound"),
    [
        ("127.0.0.1", "127.0.0.1", "127.0.0.1"),
        ("127.0.0.53", "127.0.0.53", "127.0.0.53"),
        ("127.255.255.255", "127.255.255.255", "127.255.255.255"),
        ("0.0.0.0", "127.0.0.1", "127.0.0.1"),
        ("10.0.0.1", None, None),
        ("128.0.0.1", None, None),
        ("126.255.255.255", None, None),
        ("255.255.255.255", None, None),
        ("0.0.0.1", None, None),
        ("::1", "::1", "::1"),
        ("::", "::1", "::"),
        ("::2", None, None),
        ("::127.0.0.1", None, None),
        ("::ffff:127.0.0.1", "::ffff:127.0.0.1", "::ffff:127.0.0.1"),
        ("::ffff:0.0.0.0", "::ffff:127.0.0.1", "::ffff:127.0.0.1"),
        ("::ffff:10.0.0.1", None, None),
        ("64:ff9b::127.0.0.1", None, None),
        ("fe80::1", None, None),
        ("ff02::1", None, None),
    ],
)
def test_loopback_is_the_hosts(host: str, connected: str | None, bound: str | None) -> None:
    family = V6 if ":" in host else V4
    raw = address(host, 8080)
    assert connect_place(raw, family, GRANTED) == (None if connected is None else Place(connected, 8080))
    found = bind_place(raw, family, GRANTED, only_v6=False)
    assert found == (None if bound is None else Place(bound, 8080, both=bound == "::"))
    assert is_loopback(raw, family) is (connected is not None)
    assert connect_place(address(host, 81), family, GRANTED) is None
    assert bind_place(address(host, 81), family, GRANTED, only_v6=False) is None


def test_every_address_of_a_socket_for_ipv6_alone() -> None:
    assert bind_place(address("::", 80), V6, GRANTED, only_v6=True) == Place("::1", 80)


@pytest.mark.parametrize(
    ("place", "v4"),
    [
        (Place("127.0.0.9", 1), "127.0.0.9"),
        (Place("::ffff:127.0.0.9", 1), "127.0.0.9"),
        (Place("::", 1, both=True), "127.0.0.1"),
        (Place("::1", 1), ""),
    ],
)
def test_the_part_of_ipv4(place: Place, v4: str) -> None:
    assert place.v4 == v4


@pytest.mark.parametrize(
    ("raw", "family"),
    [
        (b"", V4),
        (address("127.0.0.1", 80)[:15], V4),
        (address("::1", 80)[:23], V6),
        (address("127.0.0.1", 80) + bytes(12), V6),  # an address of the other family
        (address("::1", 80), V4),
        (bytes(2) + address("127.0.0.1", 80)[2:], V4),
        (address("127.0.0.1", 0), V4),
    ],
)
def test_what_the_kernel_will_refuse_is_left_to_it(raw: bytes, family: int) -> None:
    assert connect_place(raw, family, GRANTED) is None
    assert bind_place(raw, family, GRANTED, only_v6=False) is None
    assert port_in(raw, family) == 0


def test_taking_a_connection_back() -> None:
    assert is_unspecific(bytes(16))
    assert not is_unspecific(address("127.0.0.1", 80))
    assert not is_unspecific(b"\0")


families = st.sampled_from([V4, V6])
addresses = st.tuples(families, st.binary(max_size=30)).map(
    lambda parts: struct.pack("=H", parts[0]) + parts[1]
)


@given(st.binary(max_size=40) | addresses, families, st.sets(st.integers(0, 65535)))
def test_no_address_leads_off_loopback_or_to_another_port(raw: bytes, family: int, ports: set[int]) -> None:
    for place in (
        connect_place(raw, family, frozenset(ports)),
        bind_place(raw, family, frozenset(ports), only_v6=False),
    ):
        if place is not None:
            host = ipaddress.ip_address(place.host.removeprefix("::ffff:"))
            assert host.is_loopback or (place.both and host.is_unspecified)
            assert place.port in ports
            assert place.port == int.from_bytes(raw[2:4])


some_ports = st.sets(st.integers(1, 65535), max_size=50)


@given(st.tuples(some_ports, some_ports, some_ports, some_ports))
def test_ports_are_told_as_they_are(kinds: tuple[set[int], ...]) -> None:
    ports = Ports(*map(frozenset, kinds))
    assert Ports.unpack(ports.packed()) == ports


def test_every_port_there_is_can_be_told() -> None:
    ports = Ports(*[frozenset(range(1, 65536))] * 4)
    assert Ports.unpack(ports.packed()) == ports


@given(some_ports, some_ports, some_ports, some_ports)
def test_denied_ports_beat_every_grant(
    bind: set[int], connect: set[int], udp: set[int], denied: set[int]
) -> None:
    ports = Ports.of_plan(granted(bind, connect, udp, denied))
    assert ports.bind == bind - denied
    assert ports.connect == connect - denied
    assert ports.udp_bind == udp - denied
    assert ports.udp_connect <= ports.connect
    assert not any(kind & denied for kind in ports)


def test_udp_goes_to_name_servers_unless_a_port_of_udp_is_granted() -> None:
    assert granted([8080], [53, 80, 8080], [], [])["udp_connect"] == [53]
    assert granted([8080, 9999], [53, 80, 8080, 9999], [9999], [])["udp_connect"] == [53, 80]
    assert granted([8080], [80], [], [])["udp_connect"] == []
