"""What the Linux kernel refuses to a confined program: sockets.

Each attempt is proved alive: without the plan it succeeds.
"""

import errno
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from schemas.status import Network
from tests.integration.sandbox_help import FULL, Place, attempt, make_helper, make_place, needs_sandbox
from worker.platform.base import NetworkPolicy

__all__ = ["make_helper", "make_place"]

pytestmark = needs_sandbox

LOCALHOST = "localhost"
OTHER_PORT = "('127.0.0.1', closed_port)"
FREE_PORT = "('127.0.0.1', free_port)"

# name: (level, code, errno of the refusal). `open_port` is granted and somebody listens, `closed_port` is not
# granted and somebody listens, `free_port` is neither.
NETWORK: dict[str, tuple[str, str, int]] = {
    "a TCP socket under none": ("none", "socket.socket()", errno.EACCES),
    "a UDP socket under none": ("none", "socket.socket(type=socket.SOCK_DGRAM)", errno.EACCES),
    "a netlink socket under none": ("none", "socket.socket(16, socket.SOCK_RAW)", errno.EACCES),
    "connect to another port": (LOCALHOST, f"socket.socket().connect({OTHER_PORT})", errno.EACCES),
    "connect to another port by IPv6": (
        LOCALHOST,
        "socket.socket(socket.AF_INET6).connect(('::ffff:127.0.0.1', closed_port))",
        errno.EACCES,
    ),
    "connect while sending": (
        LOCALHOST,
        f"socket.socket().sendto(b'x', 0x20000000, {OTHER_PORT})",
        errno.EOPNOTSUPP,
    ),
    "connect by MPTCP": (LOCALHOST, f"socket.socket(proto=262).connect({OTHER_PORT})", errno.EACCES),
    "bind another port": (LOCALHOST, f"socket.socket().bind({FREE_PORT})", errno.EACCES),
    "bind any port": (LOCALHOST, "socket.socket().bind(('127.0.0.1', 0))", errno.EACCES),
    "a UDP socket": (LOCALHOST, "socket.socket(type=socket.SOCK_DGRAM)", errno.EACCES),
    "bind another port under outbound": ("outbound", f"socket.socket().bind({FREE_PORT})", errno.EACCES),
    "a unix socket": ("full", "socket.socket(socket.AF_UNIX).connect(unix_path)", errno.EACCES),
    "an abstract one": ("full", "socket.socket(socket.AF_UNIX).connect('\\0' + unix_path)", errno.EACCES),
    "a datagram pair turned to a path": (
        "full",
        "socket.socketpair(type=socket.SOCK_DGRAM)[0].sendto(b'x', unix_path + '.dgram')",
        errno.EACCES,
    ),
    "the kernel's ciphers": (
        "full",
        "socket.socket(38, socket.SOCK_SEQPACKET).bind(('hash', 'sha256'))",
        errno.EACCES,
    ),
}


@pytest.fixture
def ports(place: Place) -> Iterator[dict[str, Any]]:
    """Servers outside of the sandbox: two TCP ports, stream, datagram and abstract unix sockets."""
    path = str(place.outside / "s")
    made = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    with made.pop() as closed:
        free_port = closed.getsockname()[1]
    streams = [socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)]
    streams[0].bind(path)
    streams[1].bind("\0" + path)
    datagram = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    datagram.bind(path + ".dgram")
    for name in (path, path + ".dgram"):
        os.chmod(name, 0o777)
    for one in streams:
        one.listen()
    yield {
        "open_port": made[0].getsockname()[1],
        "closed_port": made[1].getsockname()[1],
        "free_port": free_port,
        "unix_path": path,
    }
    for one in (*made, *streams, datagram):
        one.close()


def network(level: str, **changes: Any) -> NetworkPolicy:
    return NetworkPolicy(level=Network(level), udp=level in ("outbound", "full"), **changes)


@pytest.mark.parametrize("what", NETWORK)
def test_network(place: Place, ports: dict[str, Any], what: str) -> None:
    level, code, refusal = NETWORK[what]
    setup = "".join(f"{name} = {value!r}\n" for name, value in ports.items())
    free = attempt(place, code, None, setup=setup)
    if free.errno in (errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT, errno.ENOPROTOOPT, errno.ENOENT):
        pytest.skip(f"this kernel has no such thing: {free.error}")
    assert free.errno == 0, free
    policy = place.policy(network=network(level, connect_ports=(ports["open_port"],)))
    refused = attempt(place, code, policy, setup=setup)
    assert refused.errno == refusal, refused


def test_named_ports_are_open(place: Place, ports: dict[str, Any]) -> None:
    code = (
        f"socket.socket().connect(('127.0.0.1', {ports['open_port']}))\n"
        f"socket.socket().bind(('127.0.0.1', {ports['free_port']}))\n"
        "socket.socket(socket.AF_INET6, socket.SOCK_STREAM).close()\n"
        "socket.if_nameindex()\n"
    )
    allowed = network(LOCALHOST, bind_ports=(ports["free_port"],), connect_ports=(ports["open_port"],))
    assert attempt(place, code, place.policy(network=allowed)).errno == 0
    # A denied port beats a grant.
    denied = network(
        LOCALHOST,
        bind_ports=(ports["free_port"],),
        connect_ports=(ports["open_port"],),
        denied_ports=(ports["open_port"],),
    )
    assert attempt(place, code, place.policy(network=denied)).errno == errno.EACCES


def test_udp_where_an_endpoint_asks_for_it(place: Place) -> None:
    code = "socket.socket(type=socket.SOCK_DGRAM).bind(('127.0.0.1', 0))"
    policy = place.policy(network=NetworkPolicy(level=Network.LOCALHOST, udp=True))
    assert attempt(place, code, policy).errno == 0


def test_outbound_connects_anywhere_and_full_binds_anywhere(place: Place, ports: dict[str, Any]) -> None:
    connect = f"socket.socket().connect(('127.0.0.1', {ports['closed_port']}))"
    assert attempt(place, connect, place.policy(network=network("outbound"))).errno == 0
    bind = f"socket.socket().bind(('127.0.0.1', {ports['free_port']}))"
    assert attempt(place, bind, place.policy(network=FULL)).errno == 0


@pytest.mark.parametrize("kind", ["STREAM", "SEQPACKET"])
def test_a_pair_cannot_be_turned_to_a_path(place: Place, ports: dict[str, Any], kind: str) -> None:
    """Why these two kinds are allowed: the kernel itself refuses to connect or send them elsewhere."""
    path = ports["unix_path"]
    code = (
        f"a, b = socket.socketpair(type=socket.SOCK_{kind}); b.close()\n"
        f"for act in (lambda: a.connect({path!r}), lambda: a.sendto(b'x', {path!r}), lambda: a.listen()):\n"
        "    try: act()\n"
        "    except OSError as error: say('refused')\n"
    )
    assert attempt(place, code, place.policy(network=FULL)).said == "refused\n" * 3


def test_granted_unix_sockets(place: Place, ports: dict[str, Any]) -> None:
    policy = place.policy(network=network("none", unix_sockets=(ports["unix_path"],)))
    code = (
        f"socket.socket(socket.AF_UNIX).connect({ports['unix_path']!r})\n"
        "socket.socket(socket.AF_UNIX).bind(tmp + '/own')"
    )
    done = attempt(place, code, policy)
    assert done.errno == 0, done
    # What Landlock can still close: abstract names of other processes.
    code = f"socket.socket(socket.AF_UNIX).connect('\\0' + {ports['unix_path']!r})"
    assert attempt(place, code, policy).errno == errno.EPERM
