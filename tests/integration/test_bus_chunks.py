"""Log chunks into their stream: stored once, in order, through lost answers and servers."""

import asyncio
from typing import Any

import pytest

from tests.integration.conftest import Connect, ServerFactory, until
from tests.integration.proxy import Proxy
from worker.bus import chunks as chunks_module
from worker.bus.chunks import ChunkPublisher
from worker.bus.connection import Bus
from worker.bus.messages import StreamMessage
from worker.bus.reader import StreamReader
from worker.bus.server import EmbeddedServer
from worker.bus.streams import setup_streams
from worker.errors import Internal, ResourceExhausted

STREAM = "SANDFLEET_LOG"
SUBJECT = "sandfleet.v1.log.n1.web-0.stdout"


def headers(offset: int, length: int, instance: str = "I1") -> dict[str, str]:
    return {
        "Sandfleet-Instance": instance,
        "Sandfleet-Offset": str(offset),
        "Nats-Msg-Id": f"{instance}/stdout/{offset}+{length}",
    }


@pytest.fixture
async def admin(nats_server: EmbeddedServer, connect: Connect) -> Bus:
    bus = await connect(nats_server)
    await setup_streams(bus)
    await bus.js.api(f"STREAM.DELETE.{STREAM}")  # its memory of ids too
    await setup_streams(bus)
    return bus


async def stored(bus: Bus, subject: str = SUBJECT) -> list[StreamMessage]:
    async with StreamReader(bus, STREAM, [subject], follow=False) as reader:
        return [message async for message in reader]


async def publish(sink: ChunkPublisher, first: int, count: int, size: int = 100, **where: Any) -> None:
    async with asyncio.TaskGroup() as group:
        for number in range(first, first + count):
            data = (b"%d " % number).ljust(size, b"x")
            group.create_task(sink.publish(where.get("subject", SUBJECT), data, headers(number * size, size)))


def offsets(messages: list[StreamMessage]) -> list[int]:
    return [int(message.headers["Sandfleet-Offset"]) for message in messages]


async def test_many_under_way_are_stored_in_order(
    nats_server: EmbeddedServer, admin: Bus, connect: Connect
) -> None:
    sink = ChunkPublisher(await connect(nats_server, node="n1"))
    await publish(sink, 0, 500)
    found = await stored(admin)
    assert offsets(found) == [number * 100 for number in range(500)]
    assert found[7].data.startswith(b"7 x")
    assert sink.retries == 0


async def test_what_is_told_of_a_chunk(nats_server: EmbeddedServer, admin: Bus, connect: Connect) -> None:
    sink = ChunkPublisher(await connect(nats_server, node="n1"))
    assert await sink.last(SUBJECT) is None
    first = await sink.publish(SUBJECT, b"abc", headers(0, 3))
    again = await sink.publish(SUBJECT, b"abc", headers(0, 3))
    assert (first.duplicate, again.duplicate, again.seq) == (False, True, first.seq)
    lost = {**headers(3, 5), "Sandfleet-Lost": "5", "Nats-Msg-Id": "I1/stdout/3+lost5"}
    await sink.publish(SUBJECT, b"", lost)
    last = await sink.last(SUBJECT)
    assert last is not None
    assert (last.size, last.headers["Sandfleet-Lost"], last.stream_seq) == (0, "5", first.seq + 1)
    with pytest.raises(Internal):
        await sink.publish(SUBJECT, b"abc", {})
    with pytest.raises(ResourceExhausted):
        await sink.publish(SUBJECT, bytes(2 << 20), headers(8, 2 << 20))


async def test_lost_acknowledgements(start_server: ServerFactory, connect: Connect) -> None:
    server = await start_server()
    admin = await connect(server)
    await setup_streams(admin)
    async with Proxy(server.port) as proxy:
        sink = ChunkPublisher(await connect(proxy.url, node="n1"))
        for turn in range(3):
            proxy.deaf = True
            sending = asyncio.create_task(publish(sink, turn * 40, 40))
            await until(lambda: proxy.lost_bytes)
            await proxy.break_all()
            proxy.deaf, proxy.lost_bytes = False, 0
            await asyncio.wait_for(sending, 10)
        assert sink.retries > 0
    assert offsets(await stored(admin)) == [number * 100 for number in range(120)]


async def test_an_answer_that_never_comes(start_server: ServerFactory, connect: Connect) -> None:
    server = await start_server()
    admin = await connect(server)
    await setup_streams(admin)
    async with Proxy(server.port) as proxy:
        sink = ChunkPublisher(await connect(proxy.url, node="n1"), ack_timeout_s=0.2)
        proxy.deaf = True
        sending = asyncio.create_task(sink.publish(SUBJECT, b"abc", headers(0, 3)))
        await until(lambda: proxy.lost_bytes)
        proxy.deaf = False
        assert (await asyncio.wait_for(sending, 10)).duplicate
    assert len(await stored(admin)) == 1


async def test_after_a_long_absence_the_newest_message_decides(
    start_server: ServerFactory, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream has forgotten the ids: only what it shows says what was stored."""
    monkeypatch.setattr(chunks_module, "DOUBT_S", 0.0)
    server = await start_server()
    admin = await connect(server)
    config = {
        "name": STREAM,
        "subjects": ["sandfleet.v1.log.>"],
        "allow_direct": True,
        "duplicate_window": 100_000_000,
    }
    await admin.js.api(f"STREAM.CREATE.{STREAM}", config)
    async with Proxy(server.port) as proxy:
        sink = ChunkPublisher(await connect(proxy.url, node="n1"))
        proxy.deaf = True
        sending = asyncio.create_task(publish(sink, 0, 20))
        async with asyncio.timeout(5):
            while (await admin.js.stream_info(STREAM)).messages < 20:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)  # longer than the window
        await proxy.break_all()
        proxy.deaf = False
        await asyncio.wait_for(sending, 10)
        await publish(sink, 20, 5)
    assert offsets(await stored(admin)) == [number * 100 for number in range(25)]


async def test_the_stream_is_not_there_yet(start_server: ServerFactory, connect: Connect) -> None:
    server = await start_server()
    admin = await connect(server)
    sink = ChunkPublisher(await connect(server, node="n1"))
    sending = asyncio.create_task(publish(sink, 0, 10))
    await until(lambda: sink.retries > 3)
    await setup_streams(admin)
    await asyncio.wait_for(sending, 10)
    assert sorted(offsets(await stored(admin))) == [number * 100 for number in range(10)]


async def test_the_server_restarts(start_server: ServerFactory, connect: Connect) -> None:
    server = await start_server()
    admin = await connect(server)
    await setup_streams(admin)
    sink = ChunkPublisher(await connect(server, node="n1"))
    sending = asyncio.create_task(publish(sink, 0, 3000, size=2000))
    async with asyncio.timeout(10):
        while not (await admin.js.stream_info(STREAM)).messages:
            await asyncio.sleep(0)
    await server.restart(kill=True)
    await asyncio.wait_for(sending, 20)
    await admin.wait_connected()
    assert offsets(await stored(admin)) == [number * 2000 for number in range(3000)]


async def test_giving_up_frees_the_place(nats_server: EmbeddedServer, connect: Connect) -> None:
    bus = await connect(nats_server, node="n1")
    sink = ChunkPublisher(bus, max_in_flight=2)
    sending = [
        asyncio.create_task(sink.publish(f"no.stream.{number}", b"x", headers(number, 1)))
        for number in range(5)
    ]
    await until(lambda: sink.retries)
    for task in sending:
        task.cancel()
    await asyncio.gather(*sending, return_exceptions=True)
    admin = await connect(nats_server)
    await setup_streams(admin)
    await asyncio.wait_for(sink.publish(SUBJECT, b"x", headers(9, 1)), 5)


async def test_stats_are_not_waited_for(nats_server: EmbeddedServer, admin: Bus, connect: Connect) -> None:
    bus = await connect(nats_server, node="n1")
    sink = ChunkPublisher(bus)
    assert await sink.publish_stats("sandfleet.v1.stat.n1.web-0", b"{}")
    await bus.flush()
    async with StreamReader(admin, "SANDFLEET_STAT", follow=False) as reader:
        assert [message.data async for message in reader] == [b"{}"]
    await bus.close()
    assert not await sink.publish_stats("sandfleet.v1.stat.n1.web-0", b"{}")
