"""Takeovers of a name: one that is in use, and an old copy of the stream from before the name was taken."""

import asyncio
import shutil

import pytest

from tests.integration.conftest import Connect, ServerFactory
from tests.integration.test_bus_outbox import SUBJECTS, Journals, events, journals, publishing, stored
from worker.bus.outbox import OutboxPublisher
from worker.bus.streams import setup_streams
from worker.errors import Fenced

__all__ = ["journals"]  # a fixture


async def test_a_copy_from_before_a_takeover_fences_nobody(
    start_server: ServerFactory, connect: Connect, journals: Journals
) -> None:
    server = await start_server()
    admin = await connect(server)
    await setup_streams(admin)
    bus, first = await connect(server, node="n1"), await journals("a")
    async with publishing(bus, first) as publisher:
        await events(first, 5)
        assert await publisher.drained(5)
    before = first.epoch
    await server.stop()
    copy = server.store_dir.with_name("copy")
    shutil.copytree(server.store_dir, copy)
    await server.start()
    await bus.wait_connected()

    other = await journals("b")
    async with publishing(await connect(server, node="n1"), other, takeover=True) as publisher:
        await events(other, 2)
        assert await publisher.drained(5)
    async with publishing(bus, first, takeover=True) as publisher:
        await events(first, 3)
        assert await publisher.drained(5)
    assert first.epoch > other.epoch > before

    await server.stop()
    shutil.rmtree(server.store_dir)
    shutil.move(copy, server.store_dir)
    await server.start()
    await bus.wait_connected()
    async with publishing(bus, first) as publisher:
        assert publisher.lost.is_set()
        await events(first, 1)
        assert await publisher.drained(5)
    await admin.wait_connected()
    found = [(event.epoch, event.seq) for event in await stored(admin, "n1")]
    kept = [(first.epoch, seq) for seq in (1, 2, 3, 4)]
    assert found == [*((before, seq) for seq in (1, 2, 3, 4, 5)), *kept]


async def test_a_takeover_goes_on_behind_what_the_other_adds_meanwhile(
    start_server: ServerFactory, connect: Connect, journals: Journals
) -> None:
    server = await start_server()
    admin = await connect(server)
    await setup_streams(admin)
    old, new = await journals("a"), await journals("b")
    first = OutboxPublisher(await connect(server, node="n1"), old, SUBJECTS)
    second = OutboxPublisher(await connect(server, node="n1"), new, SUBJECTS)
    await first.fence()
    publishing_first = asyncio.create_task(first.run())
    await events(old, 2)
    assert await first.drained(5)

    await second.fence(takeover=True)
    await events(old, 3)  # the name is taken, and its former owner has had no way to notice
    assert await first.drained(5)
    publishing_second = asyncio.create_task(second.run())
    await events(new, 2)
    assert await second.drained(5)

    await events(old, 1)
    async with asyncio.timeout(5):
        with pytest.raises(Fenced):
            await publishing_first
    publishing_second.cancel()
    await asyncio.wait([publishing_second])
    found = [(event.epoch, event.seq) for event in await stored(admin, "n1")]
    assert found == [*((old.epoch, n) for n in (1, 2, 3, 4, 5)), *((new.epoch, n) for n in (1, 2))]
