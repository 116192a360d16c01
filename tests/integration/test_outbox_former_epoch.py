"""An old copy of the stream that shows what this journal made before its name was taken and taken back."""

import shutil

from tests.integration.conftest import Connect, ServerFactory
from tests.integration.test_bus_outbox import Journals, events, journals, publishing, stored
from worker.bus.streams import setup_streams

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
