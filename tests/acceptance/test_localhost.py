"""The level `localhost` of containers with a root of their own: a network of their own, and granted ports of the host."""

import asyncio
import contextlib
import json
import os
import socket
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio

from tests.acceptance.harness import DEADLINE_S, Fleet
from worker.platform.linux import landlock, notify
from worker.platform.linux.able import Able

_able = Able()
_WHY_NOT = (
    _able.reason or _able.blind or ("" if notify.supported() and landlock.abi() >= 4 else "needs Linux 6.7")
)
pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(bool(_WHY_NOT), reason=f"no network of its own here: {_WHY_NOT}"),
]

PYTHON, PREFIX = os.path.realpath(sys.executable), os.path.realpath(sys.base_prefix)
CONFIG = """
[node]
isolation = "rootfs"
[policy]
register_roots = ["{images}"]
read = ["{prefix}"]
"""

# Says hello on its port; once more for each connection.
SERVE = """
import os, socket
server = socket.socket()
server.setsockopt(1, 2, 1)
server.bind(("0.0.0.0", int(os.environ["PORT"])))
server.listen()
print("up", flush=True)
while True:
    one, _ = server.accept()
    one.sendall(b"hello")
    one.close()
"""
# As an exec: how an attempt to reach each place ends, as one line of JSON.
REACH = """
import errno, json, socket, sys
def reach(kind, host, port):
    one = socket.socket(type=kind)
    one.settimeout(5)
    try:
        one.connect((host, port))
        one.send(b"x")
        return one.recv(9).decode()
    except OSError as failure:
        return errno.errorcode.get(failure.errno, type(failure).__name__)
print(json.dumps([reach(*place) for place in json.loads(sys.argv[1])]))
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet() -> AsyncIterator[Fleet]:
    async with Fleet(CONFIG) as made:
        await made.register("base")
        yield made


class Host:
    """A TCP server of the host that says who it is, and counts who came."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.served = 0
        self._server = socket.create_server((host, 0))
        self.port: int = self._server.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                one, _ = self._server.accept()
            except OSError:
                return
            self.served += 1
            with one:
                one.sendall(b"the host")

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._server.close()


@pytest.fixture
def granted() -> Iterator[Host]:
    made = Host("0.0.0.0")
    yield made
    made.close()


@pytest.fixture
def stranger() -> Iterator[Host]:
    made = Host()
    yield made
    made.close()


def own_address() -> str | None:
    """An address of this machine that is not loopback; None when it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            any_socket.connect(("192.0.2.1", 9))
        except OSError:
            return None
        host: str = any_socket.getsockname()[0]
        return None if host.startswith("127.") else host


def spec(script: str, **fields: Any) -> dict[str, Any]:
    return {
        "image": {"name": "base"},
        "command": {"entrypoint": [PYTHON, "-c", script]},
        "network": {"access": "localhost"},
        "sandbox": {"read": [PREFIX]},
        **fields,
    }


async def serving(fleet: Fleet, cid: str, **fields: Any) -> dict[str, Any]:
    await fleet.client.ok(cid, "run", spec=spec(SERVE, **fields), replace=True)
    await fleet.client.log_seen(cid, b"up\n")
    found: dict[str, Any] = await fleet.client.query("state", container=cid)
    return found


async def heard_from(port: int, host: str = "127.0.0.1") -> bytes:
    async with asyncio.timeout(DEADLINE_S):
        reader, writer = await asyncio.open_connection(host, port)
        data = await reader.read(9)
        writer.close()
        return data


async def reaches(fleet: Fleet, cid: str, *places: tuple[int, str, int]) -> list[str]:
    argv = [PYTHON, "-c", REACH, json.dumps(places)]
    reply = await fleet.client.query("exec", container=cid, argv=argv)
    assert reply.get("exit_code") == 0, reply
    found: list[str] = json.loads(reply["stdout"])
    return found


TCP, UDP = int(socket.SOCK_STREAM), int(socket.SOCK_DGRAM)


async def test_its_port_is_the_hosts(fleet: Fleet, cid: str) -> None:
    status = await serving(fleet, cid)
    assert await heard_from(status["port"]) == b"hello"
    lan = own_address()
    if lan is not None:
        with pytest.raises(ConnectionRefusedError):
            await heard_from(status["port"], lan)
    # Again after a restart, whatever lingers of the last run's connections.
    await fleet.client.ok(cid, "restart")
    await fleet.client.state(cid, "running", run=2)
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                assert await heard_from(status["port"]) == b"hello"
                break
            except ConnectionRefusedError:
                await asyncio.sleep(0.02)


async def test_a_target_port_is_the_hosts(fleet: Fleet, cid: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    endpoints = [{"name": "web", "protocol": "http", "port": 80, "target_port": port}]
    await serving(fleet, cid, endpoints=endpoints, env={"PORT": str(port)})
    assert await heard_from(port) == b"hello"


async def test_what_it_reaches(fleet: Fleet, cid: str, granted: Host, stranger: Host) -> None:
    neighbour = await serving(fleet, "neighbour-0")
    status = await serving(fleet, cid, network={"access": "localhost", "connect_ports": [granted.port]})
    lan = own_address() or "192.0.2.77"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(("0.0.0.0", 0))
        datagrams.setblocking(False)
        udp = datagrams.getsockname()[1]
        found = await reaches(
            fleet,
            cid,
            (TCP, "127.0.0.1", granted.port),
            (TCP, "127.0.0.1", status["port"]),
            (TCP, "127.0.0.1", stranger.port),
            (TCP, "127.0.0.1", neighbour["port"]),
            (TCP, "127.0.0.1", fleet.server.port),
            (TCP, lan, granted.port),
            (TCP, lan, stranger.port),
            (UDP, "127.0.0.1", udp),
            (UDP, lan, udp),
        )
        assert found[:2] == ["the host", "hello"]
        assert found[2:5] == ["ECONNREFUSED"] * 3
        assert found[5:7] == ["ENETUNREACH"] * 2
        assert found[7:] == ["ECONNREFUSED", "ENETUNREACH"]
        with pytest.raises(BlockingIOError):
            datagrams.recv(9)
    assert (granted.served, stranger.served) == (1, 0)
    await fleet.client.ok("neighbour-0", "remove")


ECHO = """
import os, socket
server = socket.socket(type=socket.SOCK_DGRAM)
server.bind(("", int(os.environ["UDP"])))
print("up", flush=True)
while True:
    data, peer = server.recvfrom(99)
    server.sendto(data.upper(), peer)
"""


async def test_an_endpoint_of_udp(fleet: Fleet, cid: str, granted: Host) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(DEADLINE_S)
        client.bind(("127.0.0.1", 0))
        body = spec(
            ECHO,
            endpoints=[{"name": "echo", "protocol": "udp", "port": port}],
            network={"access": "localhost", "connect_ports": [client.getsockname()[1]]},
            env={"UDP": str(port)},
        )
        await fleet.client.ok(cid, "run", spec=body)
        await fleet.client.log_seen(cid, b"up\n")
        client.sendto(b"from the host", ("127.0.0.1", port))
        assert await asyncio.to_thread(client.recv, 99) == b"FROM THE HOST"
        asking = asyncio.create_task(reaches(fleet, cid, (UDP, "127.0.0.1", client.getsockname()[1])))
        data, peer = await asyncio.to_thread(client.recvfrom, 99)
        client.sendto(b"answer", peer)
        assert (data, await asking) == (b"x", ["answer"])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's containers have users of their own")
async def test_a_container_of_another_user(fleet: Fleet, cid: str, granted: Host) -> None:
    """Its shim is root's, and looks into its programs all the same."""
    shell = "/bin/bash -c 'exec 3<>/dev/tcp/127.0.0.1/$0 && cat <&3'"
    script = (
        f"id -u; {shell} {granted.port}; {shell} {fleet.server.port} 2>&1 | grep -q refused && echo , refused"
    )
    body = {
        "image": {"name": "base"},
        "command": {"entrypoint": ["/bin/bash", "-c", script]},
        "network": {"access": "localhost", "connect_ports": [granted.port]},
        "user": "65534:65534",
    }
    await fleet.client.ok(cid, "run", spec=body)
    log = await fleet.client.log(cid)
    assert log.data == b"65534\nthe host, refused\n"


async def test_the_node_says_so(fleet: Fleet, cid: str) -> None:
    info = await fleet.client.query("info")
    short = {(one["feature"], one["isolation"]) for one in info["capabilities"]["not_enforced"]}
    assert ("network.localhost", "process") in short
    assert ("network.localhost", "rootfs") not in short
    required = {"read": [PREFIX], "require": ["network.localhost", "network.udp", "unix_sockets"]}
    await serving(fleet, cid, sandbox=required)
    done = await fleet.client.do(
        f"{cid[:-2]}-1", "run", spec=spec(SERVE, sandbox={**required, "isolation": "process"})
    )
    assert done["error"]["code"] == "unsupported"
    assert "network.localhost" in done["error"]["message"]


async def test_what_the_profile_tells(fleet: Fleet, cid: str, granted: Host) -> None:
    status = await serving(fleet, cid, network={"access": "localhost", "connect_ports": [granted.port]})
    text = (await fleet.client.query("profile", container=cid))["text"]
    assert f"bind     tcp {status['port']}\n" in text
    assert "connect  udp 53\n" in text
    assert "user" in text or os.geteuid() == 0
    assert " net\n" in text
    for operation, argument, decision in (
        ("bind", str(status["port"]), "allow"),
        ("bind", "9999", "allow"),
        ("connect", f"localhost:{granted.port}", "allow"),
        ("connect", "localhost:9999", "deny"),
        ("connect", f"192.0.2.7:{granted.port}", "deny"),
        ("connect", "localhost:53/udp", "allow"),
        ("connect", "localhost:54/udp", "deny"),
    ):
        found = await fleet.client.query("check", container=cid, operation=operation, argument=argument)
        assert found["decision"] == decision, (operation, argument, found)


async def test_nothing_is_left(fleet: Fleet, cid: str) -> None:
    status = await serving(fleet, cid)
    assert await heard_from(status["port"]) == b"hello"
    held = os.open(f"/proc/{status['pid']}/ns/net", os.O_RDONLY)  # so that no other gets its number
    network = os.readlink(f"/proc/self/fd/{held}")
    assert network != os.readlink("/proc/self/ns/net")
    await fleet.client.ok(cid, "remove")
    with socket.create_server(("127.0.0.1", status["port"])):  # free at once
        pass
    inside = []
    for folder in os.listdir("/proc"):
        if folder.isdigit():
            with contextlib.suppress(OSError):
                inside += [folder] * (os.readlink(f"/proc/{folder}/ns/net") == network)
    os.close(held)
    assert inside == []


async def test_a_killed_worker_changes_nothing(fleet: Fleet, cid: str, granted: Host) -> None:
    status = await serving(fleet, cid, network={"access": "localhost", "connect_ports": [granted.port]})
    fleet.worker.kill()
    assert await heard_from(status["port"]) == b"hello"
    boots = len({e["boot"] for e in fleet.client.events if e["type"] == "node_changed"})
    fleet.worker.start()
    await fleet.ready(boots + 1)
    assert await reaches(fleet, cid, (TCP, "127.0.0.1", granted.port)) == ["the host"]
    assert await heard_from(status["port"]) == b"hello"
