"""The ledger keeps a command as long as the stream could deliver it again, and at least eight days."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from schemas.subjects import Subjects
from tests.integration.conftest import Connect, until
from tests.integration.test_bus_consumer import STREAM, Taker, consuming, send
from worker.bus.connection import Bus
from worker.bus.consumer import SETTLED_ALL, Delivery
from worker.bus.server import EmbeddedServer
from worker.bus.streams import setup_streams
from worker.clock import utc_now
from worker.journal import Journal, LedgerEntry
from worker.ledger_upkeep import LedgerKeeper

SUBJECTS = Subjects()


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    opened = await Journal.open(tmp_path / "a.db", node="n1")
    yield opened
    await opened.close()


@pytest.fixture
async def admin(nats_server: EmbeddedServer, connect: Connect) -> Bus:
    bus = await connect(nats_server)
    await setup_streams(bus)
    await bus.js.api(f"STREAM.PURGE.{STREAM}")
    return bus


async def complete(journal: Journal, delivery: Delivery) -> None:
    """What a worker does with a command, nine days ago."""
    then = utc_now() - timedelta(days=9)
    entry = LedgerEntry(
        id=delivery.data.decode(),
        verb="start",
        container="web-0",
        digest="",
        subject=delivery.subject,
        stream_seq=delivery.stream_seq,
        stream_time=then,
        accepted_at=then,
    )
    await journal.transact(lambda tx: (tx.accept(entry), tx.complete(entry.id, b"{}", then)))


async def known(journal: Journal, *ids: str) -> list[bool]:
    return await journal.read(lambda tx: [tx.command(one) is not None for one in ids])


async def test_an_old_command_stays_while_it_can_come_again(
    nats_server: EmbeddedServer, admin: Bus, connect: Connect, journal: Journal
) -> None:
    bus, taker = await connect(nats_server, node="n1"), Taker()
    taker.hold = True
    await send(admin, "n1", b"a", b"b", b"c")
    async with consuming(bus, taker) as consumer:
        await until(lambda: len(taker.held) == 3)
        for delivery in taker.held:
            await complete(journal, delivery)
        keeper = LedgerKeeper(journal, consumer)
        assert await keeper.prune() == 0, "none was acknowledged: all can come again"
        await taker.held[0].ack(wait=True)
        await taker.held[2].ack(wait=True)
        assert await keeper.prune() == 1
        assert await known(journal, "a", "b", "c") == [False, True, True]
        await taker.held[1].ack(wait=True)
        assert await consumer.settled() == SETTLED_ALL
        assert await keeper.prune() == 2


async def test_a_worker_that_was_away_forgets_nothing_that_waits_for_it(
    nats_server: EmbeddedServer, admin: Bus, connect: Connect, journal: Journal
) -> None:
    """Its acknowledgements were lost, and it was away for longer than the ledger keeps: the stream still has them."""
    bus, taker = await connect(nats_server, node="n1"), Taker()
    taker.hold = True
    await send(admin, "n1", b"a", b"b")
    async with consuming(bus, taker):
        await until(lambda: len(taker.held) == 2)
        for delivery in taker.held:
            await complete(journal, delivery)
    again = Taker()
    again.hold = True
    async with consuming(await connect(nats_server, node="n1"), again) as consumer:
        keeper = LedgerKeeper(journal, consumer)
        await keeper.prune()
        await until(lambda: len(again.held) == 2)
        await keeper.prune()
        assert await known(journal, "a", "b") == [True, True]
        for delivery in again.held:
            await delivery.ack(wait=True)
        assert await keeper.prune() == 2


async def test_a_young_command_stays(
    nats_server: EmbeddedServer, admin: Bus, connect: Connect, journal: Journal
) -> None:
    bus, taker = await connect(nats_server, node="n1"), Taker()
    taker.hold = True
    await send(admin, "n1", b"a")
    async with consuming(bus, taker) as consumer:
        await until(lambda: len(taker.held) == 1)
        await complete(journal, taker.held[0])
        await taker.held[0].ack(wait=True)
        for days, forgotten in ((-2, 0), (0, 1)):
            moved = timedelta(days=days)
            keeper = LedgerKeeper(journal, consumer, clock=lambda m=moved: utc_now() + m)  # type: ignore[misc]
            assert await keeper.prune() == forgotten


async def test_it_prunes_by_itself(
    nats_server: EmbeddedServer, admin: Bus, connect: Connect, journal: Journal
) -> None:
    bus, taker = await connect(nats_server, node="n1"), Taker()
    taker.hold = True
    await send(admin, "n1", *(b"%d" % n for n in range(30)))
    async with consuming(bus, taker) as consumer:
        await until(lambda: len(taker.held) == 30)
        for delivery in taker.held:
            await complete(journal, delivery)
            await delivery.ack(wait=True)
        running = asyncio.create_task(LedgerKeeper(journal, consumer).run())
        async with asyncio.timeout(10):
            while any(await known(journal, *(str(n) for n in range(30)))):
                await asyncio.sleep(0.01)
        assert not running.done()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
