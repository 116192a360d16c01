"""Datagrams of a container with a network of its own: to name servers, to and from granted ports, and nowhere else."""

import socket
import threading
from collections.abc import Iterator

import pytest

from tests.integration.netgate_help import (
    WHY_NOT,
    Box,
    Listening,
    appears,
    free_port,
    make_box,
    make_child,
    make_listening,
    own_address,
    port_of,
    refused,
)

__all__ = ["make_box", "make_child", "make_listening"]

pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)

DATAGRAM = socket.SOCK_DGRAM
LAN = own_address()


class Answering:
    """A UDP server of the host that sends back what it gets, upper case."""

    def __init__(self, server: socket.socket) -> None:
        self.port = port_of(server)
        self.peers: set[tuple[str, int]] = set()
        self._server = server
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            data, peer = self._server.recvfrom(65536)
            if data == b"end":
                return
            self.peers.add(peer)
            self._server.sendto(data.upper(), peer)

    def close(self) -> None:
        with socket.socket(socket.AF_INET, DATAGRAM) as one:
            one.sendto(b"end", self._server.getsockname())
        self._thread.join(5)


@pytest.fixture(name="answering")
def make_answering(listening: Listening) -> Iterator[Answering]:
    made = Answering(listening(DATAGRAM))
    yield made
    made.close()


def udp_port() -> int:
    return free_port(DATAGRAM)


def test_a_granted_port_is_reached(box: Box, answering: Answering) -> None:
    """Connected or not, by every call that sends; the answer comes from where it was asked."""
    box.udp, box.connect = (udp_port(),), (answering.port,)
    code = """
where = ('127.0.0.1', PORT)
one = socket.socket(type=socket.SOCK_DGRAM); one.settimeout(10)
one.sendto(b'one', where); say(*one.recvfrom(99))
one.sendmsg([b'two'], [], 0, where); say(*one.recvfrom(99))
one.connect(where); one.send(b'three'); say(*one.recvfrom(99))
two = socket.socket(type=socket.SOCK_DGRAM); two.settimeout(10); two.connect(where)
two.send(b'x' * 60000); say(len(two.recv(65536)))
for n in range(40): two.send(b'%d' % n)
say(sorted(int(two.recv(99)) for n in range(40)) == list(range(40)))
"""
    said = box.run(code, PORT=answering.port)
    place = f"('127.0.0.1', {answering.port})"
    assert said == [f"b'ONE' {place}", f"b'TWO' {place}", f"b'THREE' {place}", "60000", "True"]
    assert len(answering.peers) == 2


def test_many_askers(box: Box, answering: Answering) -> None:
    """More at once than the relay has sockets for: the oldest are forgotten, and nobody gets another's answer."""
    box.udp, box.connect = (udp_port(),), (answering.port,)
    code = """
right = 0
for n in range(400):
    one = socket.socket(type=socket.SOCK_DGRAM); one.settimeout(10)
    one.sendto(b'%d' % n, ('127.0.0.1', PORT)); right += one.recv(99) == b'%d' % n
say(right)
"""
    assert box.run(code, PORT=answering.port) == ["400"]
    assert len(answering.peers) >= 256


def test_a_name_server_is_reached_without_any_grant_of_udp(box: Box) -> None:
    try:
        server = socket.socket(socket.AF_INET, DATAGRAM)
        server.settimeout(10)
        server.bind(("127.0.0.53", 53))
    except OSError as failure:
        pytest.skip(f"port 53 cannot be had: {failure}")
    with server:
        code = """
one = socket.socket(type=socket.SOCK_DGRAM); one.settimeout(10); one.connect(('127.0.0.53', 53))
one.send(b'who is?'); say(*one.recvfrom(99))
"""
        box.start(code)
        data, peer = server.recvfrom(99)
        server.sendto(b"nobody", peer)
        assert data == b"who is?"
        assert box.answer()[0] == ["b'nobody' ('127.0.0.53', 53)"]


EXACT = {
    "another port": ("('127.0.0.1', OTHER)", "one.sendto(b'x', WHERE)"),
    "another port, connected first to a granted one": (
        "('127.0.0.1', OTHER)",
        "one.connect(('127.0.0.1', PORT)); one.sendto(b'x', WHERE)",
    ),
    "another port, by sendmsg from a bound socket": (
        "('127.0.0.1', OTHER)",
        "one.bind(('127.0.0.1', UDP)); one.sendmsg([b'x'], [], 0, WHERE)",
    ),
    "another port by IPv6": (
        "('::ffff:127.0.0.1', OTHER)",
        "one = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); one.sendto(b'x', WHERE)",
    ),
    "a granted port of another address": ("(LAN, PORT)", "one.sendto(b'x', WHERE)"),
    "all of a network": (
        "('255.255.255.255', OTHER)",
        "one.setsockopt(1, 6, 1); one.sendto(b'x', WHERE)",
    ),
}


@pytest.mark.parametrize("what", EXACT)
@pytest.mark.parametrize("granted", [True, False], ids=["with a port of UDP", "without"])
def test_nothing_else_is_reached(box: Box, listening: Listening, what: str, granted: bool) -> None:
    if LAN is None and "LAN" in EXACT[what][0]:
        pytest.skip("this machine has no other address")
    open_to_all, other = listening(DATAGRAM, "0.0.0.0"), listening(DATAGRAM, "0.0.0.0")
    if granted:
        box.udp, box.connect = (udp_port(),), (port_of(open_to_all),)
    where, act = EXACT[what]
    code = f"""
WHERE = {where}
one = socket.socket(type=socket.SOCK_DGRAM)
def act():
    {act}
say(attempt(act))
"""
    given = {"PORT": port_of(open_to_all), "OTHER": port_of(other), "LAN": LAN, "UDP": udp_port()}
    heard = open_to_all if "PORT" in where else other
    if "255" not in where:
        assert box.run(code, free=True, **given) == ["done"]
        assert heard.recv(9) == b"x", "it is no attempt"
    box.run(code, **{**given, "UDP": box.udp[0] if granted else given["UDP"]})
    for sock in (open_to_all, other):
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(9)


SERVE = """
one = socket.socket(FAMILY, socket.SOCK_DGRAM)
one.settimeout(10)
one.bind((HOST, PORT))
open('/up', 'w').close()
for _ in range(TIMES):
    data, peer = one.recvfrom(65536)
    say(len(data), peer[1] != 0)
    one.sendto(data.upper(), peer)
"""


@pytest.mark.parametrize(
    ("host", "family", "address"),
    [
        ("127.0.0.1", socket.AF_INET, "127.0.0.1"),
        ("0.0.0.0", socket.AF_INET, "127.0.0.1"),
        ("127.0.0.9", socket.AF_INET, "127.0.0.9"),
        ("::", socket.AF_INET6, "127.0.0.1"),
        ("::ffff:127.0.0.1", socket.AF_INET6, "127.0.0.1"),
    ],
)
def test_a_granted_port_is_served(box: Box, host: str, family: int, address: str) -> None:
    box.udp = (udp_port(),)
    port = box.udp[0]
    box.start(SERVE, FAMILY=int(family), HOST=host, PORT=port, TIMES=6)
    appears(box.rootfs / "up")
    clients = [socket.socket(socket.AF_INET, DATAGRAM) for _ in range(3)]
    for turn in ("a", "b" * 50000):
        for n, client in enumerate(clients):
            client.settimeout(10)
            client.sendto(f"{turn}{n}".encode(), (address, port))
        for n, client in enumerate(clients):
            data, peer = client.recvfrom(65536)
            assert data == f"{turn}{n}".upper().encode()
            assert peer == (address, port)
    for client in clients:
        client.close()
    said, _ = box.answer()
    assert said == ["2 True"] * 3 + ["50001 True"] * 3
    assert refused_udp(port)


def refused_udp(port: int) -> bool:
    """Nobody is there: only a connected socket is told."""
    with socket.socket(socket.AF_INET, DATAGRAM) as one:
        one.settimeout(10)
        one.connect(("127.0.0.1", port))
        one.send(b"x")
        try:
            one.recv(9)
        except ConnectionRefusedError:
            return True
    return False


def test_ports_that_are_not_granted_are_its_own(box: Box) -> None:
    box.udp = (udp_port(),)
    code = """
one, two = socket.socket(type=socket.SOCK_DGRAM), socket.socket(type=socket.SOCK_DGRAM)
for where in (('127.0.0.1', OTHER), ('127.0.0.1', 0)):
    one = socket.socket(type=socket.SOCK_DGRAM); one.bind(where)
    two.sendto(b'inside', one.getsockname()); say(one.recv(9))
open('/up', 'w').close()
while not os.path.exists('/go'): time.sleep(0.005)
"""
    other = udp_port()
    box.start(code, OTHER=other)
    appears(box.rootfs / "up")
    assert refused_udp(other)
    assert refused(other)
    (box.rootfs / "go").touch()
    assert box.answer()[0] == ["b'inside'"] * 2


def test_only_who_asked_is_answered(box: Box, listening: Listening) -> None:
    """The addresses by which peers outside are known inside lead nowhere else."""
    box.udp = (udp_port(), udp_port())
    other = listening(DATAGRAM)
    code = """
one = socket.socket(type=socket.SOCK_DGRAM); one.bind(('127.0.0.1', PORT)); one.settimeout(10)
open('/up', 'w').close()
data, peer = one.recvfrom(99)
two = socket.socket(type=socket.SOCK_DGRAM); two.sendto(b'not asked', peer)
one.sendto(b'lost', ('127.128.0.99', peer[1])); one.sendto(b'lost', (peer[0], OTHER))
one.sendto(b'answer', peer)
"""
    box.start(code, PORT=box.udp[0], OTHER=port_of(other))
    appears(box.rootfs / "up")
    with socket.socket(socket.AF_INET, DATAGRAM) as client:
        client.settimeout(10)
        client.sendto(b"?", ("127.0.0.1", box.udp[0]))
        assert client.recv(99) == b"answer"
    box.answer()
    other.setblocking(False)
    with pytest.raises(BlockingIOError):
        other.recv(9)


def test_a_port_that_the_host_uses_is_in_use(box: Box, listening: Listening) -> None:
    taken = listening(DATAGRAM)
    box.udp = (port_of(taken), udp_port())
    code = """
one = socket.socket(type=socket.SOCK_DGRAM)
say(*(attempt(one.bind, ('127.0.0.1', port)) for port in (TAKEN, PORT, PORT)))
"""
    assert box.run(code, TAKEN=box.udp[0], PORT=box.udp[1]) == ["EADDRINUSE done EINVAL"]
