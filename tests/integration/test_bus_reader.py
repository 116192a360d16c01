"""Reading streams in order with a cursor of one's own."""

import asyncio
import contextlib
from datetime import timedelta

import pytest

from tests.integration.conftest import Connect, ServerFactory, until
from tests.integration.proxy import Proxy
from worker.bus import reader as reader_module
from worker.bus.connection import Bus
from worker.bus.failures import JetStreamError
from worker.bus.messages import StreamMessage
from worker.bus.reader import StreamReader, read_bucket
from worker.bus.server import EmbeddedServer

STREAM = "READ"


@pytest.fixture
async def admin(nats_server: EmbeddedServer, connect: Connect) -> Bus:
    bus = await connect(nats_server)
    await make(bus)
    return bus


async def make(bus: Bus) -> None:
    with contextlib.suppress(JetStreamError):
        await bus.js.api(f"STREAM.DELETE.{STREAM}")
    await bus.js.api(f"STREAM.CREATE.{STREAM}", {"name": STREAM, "subjects": ["r.>"], "allow_direct": True})


async def fill(bus: Bus, first: int, count: int, subjects: int = 10) -> None:
    for number in range(first, first + count):
        await bus.publish(f"r.{number % subjects}", b"%d" % number)
    await bus.js.publish("r.end", b"end")


async def take(reader: StreamReader, count: int) -> list[bytes]:
    async with asyncio.timeout(10):
        return [(await reader.__anext__()).data for _ in range(count)]


async def everything(reader: StreamReader) -> list[StreamMessage]:
    async with asyncio.timeout(10), reader:
        return [message async for message in reader]


async def test_all_then_the_end(admin: Bus) -> None:
    assert await everything(StreamReader(admin, STREAM, follow=False)) == []
    await fill(admin, 0, 3000)
    found = await everything(StreamReader(admin, STREAM, follow=False))
    assert [message.stream_seq for message in found] == list(range(1, 3002))
    assert found[5].data == b"5"
    assert found[-1].pending == 0


async def test_where_to_begin(admin: Bus) -> None:
    await fill(admin, 0, 30)
    found = await everything(StreamReader(admin, STREAM, start_seq=29, follow=False))
    assert [message.stream_seq for message in found] == [29, 30, 31]
    assert await everything(StreamReader(admin, STREAM, start_seq=99, follow=False)) == []
    later = found[1].time + timedelta(hours=1)
    assert await everything(StreamReader(admin, STREAM, start_time=later, follow=False)) == []
    at = StreamReader(admin, STREAM, start_time=found[0].time, follow=False)
    assert [message.stream_seq for message in await everything(at)][-2:] == [30, 31]
    last = await everything(StreamReader(admin, STREAM, last_per_subject=True, follow=False))
    assert [message.stream_seq for message in last] == list(range(21, 32))
    some = await everything(StreamReader(admin, STREAM, ["r.3", "r.end"], follow=False))
    assert [message.stream_seq for message in some] == [4, 14, 24, 31]
    one = await everything(StreamReader(admin, STREAM, ["r.3"], follow=False))
    assert [message.stream_seq for message in one] == [4, 14, 24]


async def test_following(admin: Bus) -> None:
    await fill(admin, 0, 5)
    async with StreamReader(admin, STREAM, ["r.*"], last_per_subject=True) as reader:
        assert len(await take(reader, 6)) == 6
        assert reader.caught_up.is_set()
        assert await reader.next(0.05) is None
        await fill(admin, 5, 2000)
        assert (await take(reader, 2001))[-1] == b"end"
        assert reader.cursor == 2007


async def test_only_new_ones(admin: Bus) -> None:
    await fill(admin, 0, 5)
    async with StreamReader(admin, STREAM, new_only=True) as reader:
        assert await reader.next(0.1) is None
        await fill(admin, 5, 1)
        assert await take(reader, 2) == [b"5", b"end"]


async def test_the_first_error_is_raised(admin: Bus) -> None:
    with pytest.raises(JetStreamError) as missing:
        await everything(StreamReader(admin, "NOTHING"))
    assert missing.value.err_code == JetStreamError.STREAM_NOT_FOUND
    with pytest.raises(JetStreamError):
        await read_bucket(admin, "NOTHING")


async def test_its_consumer_goes_away(admin: Bus) -> None:
    await fill(admin, 0, 5)
    async with StreamReader(admin, STREAM) as reader:
        await take(reader, 6)
        await admin.js.api(f"CONSUMER.DELETE.{STREAM}.{reader._consumer}")
        await fill(admin, 5, 5)
        assert (await take(reader, 6))[0] == b"5"


async def test_it_leaves_no_consumer_behind(admin: Bus) -> None:
    await fill(admin, 0, 5)
    await everything(StreamReader(admin, STREAM, follow=False))
    info = await admin.js.api(f"CONSUMER.NAMES.{STREAM}")
    assert info["consumers"] is None or info["consumers"] == []


async def test_reconnects_and_restarts(start_server: ServerFactory, connect: Connect) -> None:
    server = await start_server()
    admin = await connect(server)
    await make(admin)
    async with Proxy(server.port) as proxy:
        bus = await connect(proxy.url)
        got: list[int] = []

        async def follow() -> None:
            async with StreamReader(bus, STREAM) as reader:
                async for message in reader:
                    got.append(message.stream_seq)

        following = asyncio.create_task(follow())
        for turn in range(6):
            await fill(admin, turn * 500, 500)
            if turn % 2:
                await proxy.break_all()
            else:
                await server.restart(kill=True)
                await admin.wait_connected()
        await until(lambda: len(got) == 3006, 20)
        assert got == list(range(1, 3007))
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def test_silence_is_noticed(
    start_server: ServerFactory, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The heartbeats of a consumer that is gone without a word do not come."""
    monkeypatch.setattr(reader_module, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(reader_module, "SILENCE_S", 0.3)
    server = await start_server()
    admin = await connect(server)
    await make(admin)
    async with Proxy(server.port) as proxy:
        bus = await connect(proxy.url)
        async with StreamReader(bus, STREAM) as reader:
            assert await reader.next(0.5) is None
            assert not reader._lost
            proxy.deaf = True
            await fill(admin, 0, 3)
            await until(lambda: proxy.lost_bytes)
            reading = asyncio.create_task(take(reader, 4))
            await asyncio.sleep(0.5)
            proxy.deaf = False
            assert await reading == [b"0", b"1", b"2", b"end"]


async def test_the_stream_is_made_anew(admin: Bus) -> None:
    await fill(admin, 0, 50)
    async with StreamReader(admin, STREAM) as reader:
        await take(reader, 51)
        await make(admin)
        await fill(admin, 100, 3)
        assert await take(reader, 4) == [b"100", b"101", b"102", b"end"]


async def test_slow_readers_are_bounded(admin: Bus) -> None:
    await fill(admin, 0, 5000)
    async with StreamReader(admin, STREAM) as reader:
        await take(reader, 1)
        await admin.flush()
        assert len(reader._arrived) <= reader_module.PULL_MESSAGES
        await take(reader, 5000)
