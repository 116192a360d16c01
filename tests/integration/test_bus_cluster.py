"""Three servers and three replicas: leaders come and go, servers die, and nothing is lost or stored twice."""

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from schemas.subjects import Subjects
from tests.integration.conftest import Connect, ServerFactory, until
from tests.integration.test_bus_outbox import add
from worker.bus.chunks import ChunkPublisher
from worker.bus.connection import Bus
from worker.bus.consumer import CommandConsumer, Delivery
from worker.bus.outbox import OutboxPublisher
from worker.bus.reader import StreamReader
from worker.bus.server import EmbeddedServer
from worker.bus.streams import setup_streams
from worker.errors import Unavailable
from worker.journal import Journal

SUBJECTS = Subjects()


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def member(port: int, ports: list[int]) -> str:
    """The configuration of a server that listens on `port` for the others of its cluster, which are on `ports`."""
    routes = ", ".join(f'"nats://127.0.0.1:{port}"' for port in ports)
    return f'cluster {{ name: "test", listen: "127.0.0.1:{port}", routes: [{routes}] }}'


@pytest.fixture
async def cluster(start_server: ServerFactory) -> list[EmbeddedServer]:
    ports = free_ports(3)
    return await asyncio.gather(
        *(start_server(name=f"s{number}", config=member(port, ports)) for number, port in enumerate(ports))
    )


async def patiently(call: Any, timeout_s: float = 20.0) -> Any:
    """Again until it works: a cluster without a leader refuses or does not answer."""
    async with asyncio.timeout(timeout_s):
        while True:
            try:
                return await call()
            except Unavailable:
                await asyncio.sleep(0.1)


async def leader(bus: Bus, stream: str) -> str:
    info = await patiently(lambda: bus.js.api(f"STREAM.INFO.{stream}", timeout=1.0))
    return str(info["cluster"].get("leader", ""))


async def test_leaders_change_and_servers_die(
    cluster: list[EmbeddedServer], connect: Connect, tmp_path: Path
) -> None:
    url = ",".join(server.url for server in cluster)
    admin = await connect(url, replicas=3)
    await patiently(lambda: setup_streams(admin))
    bus = await connect(url, node="n1", replicas=3)
    journal = await Journal.open(tmp_path / "a.db", node="n1")
    outbox = OutboxPublisher(bus, journal, SUBJECTS)
    await outbox.fence()
    seen: list[bytes] = []

    async def handle(delivery: Delivery) -> None:
        seen.append(delivery.data)
        await delivery.ack()

    consumer = CommandConsumer(bus, node="n1", subjects=SUBJECTS, check_fence=outbox.check_fence)
    sink = ChunkPublisher(bus, ack_timeout_s=2.0)
    tasks = [asyncio.create_task(outbox.run()), asyncio.create_task(consumer.run(handle))]
    await asyncio.wait_for(consumer.ready.wait(), 10)

    async def chunk(number: int) -> None:
        name = {"Nats-Msg-Id": f"i/stdout/{number}+3"}
        await sink.publish(SUBJECTS.log("n1", "c-0", "stdout"), b"%03d" % number, name)

    async def load(turn: int) -> None:
        for number in range(5):
            await journal.transact(lambda tx: [add(tx) for _ in range(40)])
            subject = SUBJECTS.command("n1", f"c-{number}", "start")
            body = b"%d" % (turn * 5 + number)
            # A retry may store it twice; the contract's ledger would see one id.
            await patiently(lambda subject=subject, body=body: admin.js.publish(subject, body, timeout=2.0))

    disturbances = [
        lambda: admin.js.api("STREAM.LEADER.STEPDOWN.SANDFLEET_EVT"),
        lambda: admin.js.api("CONSUMER.LEADER.STEPDOWN.SANDFLEET_CMD.n1"),
        lambda: admin.js.api("STREAM.LEADER.STEPDOWN.SANDFLEET_LOG"),
    ]
    for turn, disturb in enumerate(disturbances):
        chunks = [asyncio.create_task(chunk(turn * 50 + number)) for number in range(50)]
        working = asyncio.create_task(load(turn))
        await patiently(disturb)
        await asyncio.wait_for(asyncio.gather(working, *chunks), 30)

    name = await leader(admin, "SANDFLEET_EVT")
    dying = next(server for number, server in enumerate(cluster) if f"s{number}" == name)
    chunks = [asyncio.create_task(chunk(150 + number)) for number in range(50)]
    working = asyncio.create_task(load(3))
    await dying.stop(kill=True)
    await asyncio.wait_for(asyncio.gather(working, *chunks), 30)
    assert await outbox.drained(30)
    await until(lambda: set(seen) == {b"%d" % number for number in range(20)}, 30)

    for task in tasks:
        task.cancel()
    assert all(
        isinstance(ended, asyncio.CancelledError)
        for ended in await asyncio.gather(*tasks, return_exceptions=True)
    )
    await journal.close()
    for stream in ("SANDFLEET_EVT", "SANDFLEET_LOG"):
        assert await leader(admin, stream)
    async with StreamReader(admin, "SANDFLEET_EVT", follow=False) as reader:
        sequence = [b'"seq":%d,' % number in message.data async for number, message in numbered(reader)]
    assert sequence == [True] * 800
    async with StreamReader(admin, "SANDFLEET_LOG", follow=False) as reader:
        stored = sorted([message.data async for message in reader])
    assert stored == [b"%03d" % number for number in range(200)]
    first_seen = sorted(set(seen), key=seen.index)
    assert first_seen == [b"%d" % number for number in range(20)]


async def numbered(reader: StreamReader) -> AsyncIterator[tuple[int, Any]]:
    number = 0
    async for message in reader:
        number += 1
        yield number, message


async def test_other_servers_of_the_cluster_are_learned(
    cluster: list[EmbeddedServer], connect: Connect
) -> None:
    bus = await connect(cluster[0])
    await until(lambda: len(bus.peer_ports) == 3)
    await cluster[0].stop(kill=True)
    await until(lambda: bus.session == 2, 20)
    assert bus.url != f"nats://127.0.0.1:{cluster[0].port}"


async def test_a_server_that_joins_later_is_learned(start_server: ServerFactory, connect: Connect) -> None:
    ports = free_ports(2)
    first = await start_server(name="s0", config=member(ports[0], ports))
    bus = await connect(first)
    assert bus.peer_ports == {first.port}
    second = await start_server(name="s1", config=member(ports[1], ports))
    await until(lambda: bus.peer_ports == {first.port, second.port}, 30)
    await first.stop(kill=True)
    await until(lambda: bus.session == 2, 30)
    assert bus.url == second.url
