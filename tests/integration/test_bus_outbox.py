"""Events from the journal into the stream: exactly once, in order, through everything that can happen to either."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from schemas.events import CommandAccepted
from schemas.subjects import Subjects
from tests.integration.conftest import Connect, ServerFactory, until
from tests.integration.proxy import Proxy
from worker.bus.connection import Bus
from worker.bus.outbox import OutboxPublisher
from worker.bus.reader import StreamReader
from worker.bus.server import EmbeddedServer
from worker.bus.streams import setup_streams
from worker.clock import utc_now
from worker.errors import Configuration, Fenced
from worker.journal import EventHead, Journal, Tx

SUBJECTS = Subjects()
STREAM = "SANDFLEET_EVT"


class Event(msgspec.Struct):
    epoch: str
    boot: str
    seq: int
    command: str


def add(tx: Tx, text: str = "run", cid: str = "web-0") -> CommandAccepted:
    def make(head: EventHead) -> CommandAccepted:
        return CommandAccepted(**head.fields(), container=cid, command=text)

    return tx.event(SUBJECTS.command_event(tx.node, cid), make)


async def events(journal: Journal, count: int, text: str = "run", cid: str = "web-0") -> None:
    await journal.transact(lambda tx: [add(tx, text, cid) for _ in range(count)])


async def stored(bus: Bus, node: str) -> list[Event]:
    """All events of a node in the stream."""
    found = []
    async with StreamReader(bus, STREAM, [SUBJECTS.events_of(node)], follow=False) as reader:
        async for message in reader:
            found.append(msgspec.json.decode(message.data, type=Event))
    return found


async def seqs(bus: Bus, node: str) -> list[int]:
    return [event.seq for event in await stored(bus, node)]


@asynccontextmanager
async def publishing(bus: Bus, journal: Journal, *, takeover: bool = False) -> AsyncIterator[OutboxPublisher]:
    publisher = OutboxPublisher(bus, journal, SUBJECTS)
    await publisher.fence(takeover)
    task = asyncio.create_task(publisher.run())
    try:
        yield publisher
    finally:
        task.cancel()
        await asyncio.wait([task])
    if not task.cancelled():
        task.result()  # it ended by itself: with the reason


@pytest.fixture
async def journals(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[Journal]]]:
    opened: list[Journal] = []

    async def open_journal(name: str = "a", *, node: str = "n1", **options: Any) -> Journal:
        journal = await Journal.open(tmp_path / f"{name}.db", node=node, **options)
        opened.append(journal)
        return journal

    yield open_journal
    for journal in opened:
        await journal.close()


@pytest.fixture
async def admin(nats_server: EmbeddedServer, connect: Connect) -> Bus:
    bus = await connect(nats_server)
    await setup_streams(bus)
    await bus.js.api(f"STREAM.PURGE.{STREAM}")
    return bus


Journals = Callable[..., Awaitable[Journal]]


# -- the ordinary case


async def test_events_go_out_in_order_once(
    nats_server: EmbeddedServer, admin: Bus, connect: Connect, journals: Journals
) -> None:
    bus, journal = await connect(nats_server, node="n1"), await journals()
    await events(journal, 3)
    async with publishing(bus, journal) as publisher:
        for _ in range(50):
            await events(journal, 1)
        await events(journal, 1000)
        await events(journal, 2, text="x" * 60_000)
        await events(journal, 2)
        assert await publisher.drained(10)
        await asyncio.wait_for(publisher.idle.wait(), 5)
    assert await seqs(admin, "n1") == list(range(1, 1058))
    state = await journal.read(lambda tx: tx.outbox_state())
    assert (state.first_seq, state.acked_seq, state.unsent) == (1, 1057, 0)


async def test_an_event_is_on_the_wire_at_once(
    nats_server: EmbeddedServer, admin: Bus, connect: Connect, journals: Journals
) -> None:
    bus, journal = await connect(nats_server, node="n1"), await journals()
    loop, took = asyncio.get_running_loop(), []
    async with publishing(bus, journal), await admin.queue(SUBJECTS.events_of("n1")) as seen:
        await admin.flush()
        for _ in range(100):
            await events(journal, 1)
            began = loop.time()
            await seen.get(5)
            took.append(loop.time() - began)
    assert sorted(took)[50] < 0.02


async def test_headers_travel(
    nats_server: EmbeddedServer, admin: Bus, connect: Connect, journals: Journals
) -> None:
    bus, journal = await connect(nats_server, node="n1"), await journals()

    def make(head: EventHead) -> CommandAccepted:
        return CommandAccepted(**head.fields(), command="run")

    subject = SUBJECTS.command_event("n1", None)
    async with publishing(bus, journal) as publisher:
        for count in (1, 100):

            def add_all(tx: Tx, count: int = count) -> None:
                for _ in range(count):
                    tx.event(subject, make, headers={"traceparent": "00-1-2-01"})

            await journal.transact(add_all)
            assert await publisher.drained(10)
    async with StreamReader(admin, STREAM, follow=False) as reader:
        found = [message.headers async for message in reader]
    assert len(found) == 101
    assert all(headers["traceparent"] == "00-1-2-01" for headers in found)
    assert not any("Nats-Msg-Id" in headers for headers in found)


async def test_a_restart_goes_on_where_it_was(
    nats_server: EmbeddedServer, admin: Bus, connect: Connect, journals: Journals
) -> None:
    for number in range(3):
        bus, journal = await connect(nats_server, node="n1"), await journals()
        async with publishing(bus, journal) as publisher:
            await events(journal, 10)
            assert await publisher.drained(10)
        await events(journal, 5)  # not sent before the "crash"
        await journal.close()
        assert len(await seqs(admin, "n1")) == 10 + number * 15
    assert await seqs(admin, "n1") == list(range(1, 41))


async def test_many_nodes_in_one_stream(
    nats_server: EmbeddedServer, admin: Bus, connect: Connect, journals: Journals
) -> None:
    names = [f"m{number}" for number in range(4)]
    pairs = [(await connect(nats_server, node=name), await journals(name, node=name)) for name in names]

    async def one(bus: Bus, journal: Journal) -> None:
        async with publishing(bus, journal) as publisher:
            for count in (1, 40, 3, 250, 1, 7):
                await events(journal, count)
            assert await publisher.drained(20)

    await asyncio.gather(*(one(bus, journal) for bus, journal in pairs))
    for name in names:
        assert await seqs(admin, name) == list(range(1, 303))


async def test_a_stream_without_atomic_batches(
    start_server: ServerFactory, connect: Connect, journals: Journals
) -> None:
    server = await start_server()
    admin = await connect(server)
    config = {"name": STREAM, "subjects": ["sandfleet.v1.evt.>"], "storage": "file", "allow_direct": True}
    await admin.js.api(f"STREAM.CREATE.{STREAM}", config)
    bus, journal = await connect(server, node="n1"), await journals()
    await events(journal, 100)
    async with publishing(bus, journal) as publisher:
        assert await publisher.drained(10)
    assert await seqs(admin, "n1") == list(range(1, 101))


async def test_a_stream_without_direct_get(
    start_server: ServerFactory, connect: Connect, journals: Journals
) -> None:
    server = await start_server()
    admin = await connect(server)
    config = {"name": STREAM, "subjects": ["sandfleet.v1.evt.>"], "storage": "file"}
    await admin.js.api(f"STREAM.CREATE.{STREAM}", config)
    bus, journal = await connect(server, node="n1"), await journals()
    with pytest.raises(Configuration, match="direct get"):
        await OutboxPublisher(bus, journal, SUBJECTS).fence()


# -- what can happen to an answer


async def test_lost_acknowledgements(
    start_server: ServerFactory, connect: Connect, journals: Journals
) -> None:
    server = await start_server()
    admin = await connect(server)
    await setup_streams(admin)
    journal = await journals()
    async with Proxy(server.port) as proxy:
        bus = await connect(proxy.url, node="n1")
        async with publishing(bus, journal) as publisher:
            total = 0
            for count in (1, 60, 1, 300):
                proxy.deaf = True
                await events(journal, count)
                total += count
                await until(lambda: proxy.lost_bytes)
                await proxy.break_all()
                proxy.deaf, proxy.lost_bytes = False, 0
                assert await publisher.drained(10)
            assert bus.session == 5
    assert await seqs(admin, "n1") == list(range(1, total + 1))


async def test_broken_at_any_moment(
    start_server: ServerFactory, connect: Connect, journals: Journals
) -> None:
    server = await start_server()
    admin = await connect(server)
    await setup_streams(admin)
    journal = await journals()
    async with Proxy(server.port) as proxy:
        bus = await connect(proxy.url, node="n1")
        async with publishing(bus, journal) as publisher:
            for _ in range(20):
                await events(journal, 120)
                await proxy.break_all()
            assert await publisher.drained(20)
    assert await seqs(admin, "n1") == list(range(1, 2401))


@pytest.mark.parametrize("kill", [False, True], ids=["in order", "killed"])
async def test_the_server_restarts(
    start_server: ServerFactory, connect: Connect, journals: Journals, kill: bool
) -> None:
    server = await start_server()
    admin = await connect(server)
    await setup_streams(admin)
    bus, journal = await connect(server, node="n1"), await journals()
    async with publishing(bus, journal) as publisher:
        for _ in range(3):
            await events(journal, 150)
            await server.stop(kill=kill)
            await events(journal, 20)
            await server.start()
            await events(journal, 1)
            assert await publisher.drained(10)
    await admin.wait_connected()
    assert await seqs(admin, "n1") == list(range(1, 514))


# -- what can happen to the stream


async def test_purged(nats_server: EmbeddedServer, admin: Bus, connect: Connect, journals: Journals) -> None:
    bus, journal = await connect(nats_server, node="n1"), await journals()
    async with publishing(bus, journal) as publisher:
        await events(journal, 10)
        assert await publisher.drained(5)
        await admin.js.api(f"STREAM.PURGE.{STREAM}")
        await events(journal, 2)
        assert await publisher.drained(5)
        assert await seqs(admin, "n1") == [11, 12]


async def test_purged_by_subject(
    nats_server: EmbeddedServer, admin: Bus, connect: Connect, journals: Journals
) -> None:
    """Somebody tidies up after one container, whose event was our last; it does not come back."""
    bus, journal = await connect(nats_server, node="n1"), await journals()
    other, others = await connect(nats_server, node="n2"), await journals("b", node="n2")
    async with publishing(bus, journal) as publisher, publishing(other, others) as second:
        await events(journal, 2, cid="web-0")
        await events(journal, 2, cid="old-0")
        assert await publisher.drained(5)
        await events(others, 1)
        assert await second.drained(5)
        subject = SUBJECTS.command_event("n1", "old-0")
        await admin.js.api(f"STREAM.PURGE.{STREAM}", {"filter": subject})
        await events(journal, 2, cid="web-0")
        assert await publisher.drained(5)
        assert await seqs(admin, "n1") == [1, 2, 5, 6]


async def test_deleted_and_made_again(
    nats_server: EmbeddedServer, admin: Bus, connect: Connect, journals: Journals
) -> None:
    bus, journal = await connect(nats_server, node="n1"), await journals()
    async with publishing(bus, journal) as publisher:
        await events(journal, 10)
        assert await publisher.drained(5)
        await admin.js.api(f"STREAM.DELETE.{STREAM}")
        await events(journal, 1)
        await asyncio.sleep(0.1)
        await setup_streams(admin)
        assert await publisher.drained(10)
        await events(journal, 1)
        assert await publisher.drained(10)
        assert await seqs(admin, "n1") == list(range(1, 13))


async def test_restored_from_an_older_copy(
    start_server: ServerFactory, connect: Connect, journals: Journals
) -> None:
    server = await start_server()
    admin = await connect(server)
    await setup_streams(admin)
    bus, journal = await connect(server, node="n1"), await journals()
    async with publishing(bus, journal) as publisher:
        await events(journal, 10)
        assert await publisher.drained(5)
        await server.stop()
        copy = server.store_dir.with_name("copy")
        shutil.copytree(server.store_dir, copy)
        await server.start()
        await events(journal, 30)
        assert await publisher.drained(10)
        await server.stop()
        shutil.rmtree(server.store_dir)
        shutil.move(copy, server.store_dir)
        await server.start()
        await admin.wait_connected()
        # Without anything new to send: the reconnect is enough.
        async with asyncio.timeout(10):
            while await seqs(admin, "n1") != list(range(1, 41)):
                await asyncio.sleep(0.02)
        await events(journal, 1)
        assert await publisher.drained(5)
    assert await seqs(admin, "n1") == list(range(1, 42))


async def test_restored_and_filled_up_by_others(
    start_server: ServerFactory, connect: Connect, journals: Journals
) -> None:
    server = await start_server()
    admin = await connect(server)
    await setup_streams(admin)
    bus, journal = await connect(server, node="n1"), await journals()
    async with publishing(bus, journal) as publisher:
        await events(journal, 10)
        assert await publisher.drained(5)
    await server.stop()
    copy = server.store_dir.with_name("copy")
    shutil.copytree(server.store_dir, copy)
    await server.start()
    await bus.wait_connected()
    async with publishing(bus, journal) as publisher:
        await events(journal, 5)
        assert await publisher.drained(5)
    await bus.close()
    await server.stop()
    shutil.rmtree(server.store_dir)
    shutil.move(copy, server.store_dir)
    await server.start()
    others = await journals("b", node="n2")
    async with publishing(await connect(server, node="n2"), others) as second:
        await events(others, 50)
        assert await second.drained(5)
    async with publishing(await connect(server, node="n1"), journal) as publisher:
        assert await publisher.drained(5)
        await until(publisher.idle.is_set)
    await admin.wait_connected()
    assert await seqs(admin, "n1") == list(range(1, 16))


async def test_rows_are_kept_and_then_forgotten(
    nats_server: EmbeddedServer, admin: Bus, connect: Connect, journals: Journals
) -> None:
    ahead = timedelta()
    bus, journal = await connect(nats_server, node="n1"), await journals(clock=lambda: utc_now() + ahead)
    publisher = OutboxPublisher(bus, journal, SUBJECTS, clock=lambda: utc_now() + ahead)
    await publisher.fence()
    task = asyncio.create_task(publisher.run())
    await events(journal, 10)
    assert await publisher.drained(5)

    async def first() -> int:
        return (await journal.read(lambda tx: tx.outbox_state())).first_seq

    async with asyncio.timeout(5):
        while (await journal.read(lambda tx: tx.outbox_state())).unsent:
            await asyncio.sleep(0.01)
    ahead = timedelta(minutes=9)
    await publisher._expire()
    assert await first() == 1
    ahead = timedelta(minutes=11)
    await publisher._expire()
    assert await first() == 11
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


# -- a second owner of the name


async def test_a_second_worker_with_its_own_journal_is_fenced(
    nats_server: EmbeddedServer, admin: Bus, connect: Connect, journals: Journals
) -> None:
    first, second = await journals("a"), await journals("b")
    bus, other = await connect(nats_server, node="n1"), await connect(nats_server, node="n1")
    async with publishing(bus, first) as publisher:
        await events(first, 3)
        assert await publisher.drained(5)
        with pytest.raises(Fenced, match="--takeover"):
            await OutboxPublisher(other, second, SUBJECTS).fence()
        await events(first, 1)
        assert await publisher.drained(5)
    assert await seqs(admin, "n1") == [1, 2, 3, 4]


async def test_takeover_begins_a_new_epoch_and_fences_the_other(
    nats_server: EmbeddedServer, admin: Bus, connect: Connect, journals: Journals
) -> None:
    first, second = await journals("a"), await journals("b")
    bus, other = await connect(nats_server, node="n1"), await connect(nats_server, node="n1")
    await events(second, 2, text="made before the takeover")
    publisher = OutboxPublisher(bus, first, SUBJECTS)
    await publisher.fence()
    task = asyncio.create_task(publisher.run())
    await events(first, 3)
    assert await publisher.drained(5)
    old_epoch = second.epoch
    taken = OutboxPublisher(other, second, SUBJECTS)
    assert await taken.fence(takeover=True)
    assert second.epoch > max(first.epoch, old_epoch)
    async with publishing(other, second) as taker:  # a restart before anything was sent stands on the same
        assert await taker.drained(5)
        await events(first, 1)
        with pytest.raises(Fenced):
            await asyncio.wait_for(task, 5)
        await events(second, 1)
        assert await taker.drained(5)
    found = await stored(admin, "n1")
    assert [(event.epoch, event.seq) for event in found] == [
        *((first.epoch, seq) for seq in (1, 2, 3)),
        *((second.epoch, seq) for seq in (1, 2, 3)),
    ]
    with pytest.raises(Fenced):
        await publisher.check_fence()


async def test_two_copies_of_one_journal(
    nats_server: EmbeddedServer, admin: Bus, connect: Connect, journals: Journals, tmp_path: Path
) -> None:
    first = await journals("a")
    bus, other = await connect(nats_server, node="n1"), await connect(nats_server, node="n1")
    async with publishing(bus, first) as publisher:
        await events(first, 3)
        assert await publisher.drained(5)
    await first.close()
    shutil.copy(tmp_path / "a.db", tmp_path / "copy.db")
    original, copy = await journals("a"), await journals("copy")
    publisher, copied = (
        OutboxPublisher(bus, original, SUBJECTS),
        OutboxPublisher(other, copy, SUBJECTS),
    )
    await publisher.fence()
    await copied.fence()  # nobody has published since: both may think so
    tasks = [asyncio.create_task(publisher.run()), asyncio.create_task(copied.run())]
    await events(original, 1, text="original")
    assert await publisher.drained(5)
    await events(copy, 1, text="copy")
    with pytest.raises(Fenced, match="copy of this journal"):
        await asyncio.wait_for(tasks[1], 5)
    tasks[0].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert [(event.seq, event.command) for event in await stored(admin, "n1")][3:] == [(4, "original")]


async def test_a_journal_put_back_from_an_older_copy(
    nats_server: EmbeddedServer, admin: Bus, connect: Connect, journals: Journals, tmp_path: Path
) -> None:
    journal, bus = await journals("a"), await connect(nats_server, node="n1")
    async with publishing(bus, journal) as publisher:
        await events(journal, 3)
        assert await publisher.drained(5)
    await journal.close()
    shutil.copy(tmp_path / "a.db", tmp_path / "old.db")
    journal = await journals("a")
    async with publishing(bus, journal) as publisher:
        await events(journal, 3)
        assert await publisher.drained(5)
    await journal.close()
    restored = await journals("old")
    publisher = OutboxPublisher(bus, restored, SUBJECTS)
    with pytest.raises(Fenced):
        await publisher.fence()
    assert await publisher.fence(takeover=True)
    async with publishing(bus, restored) as publisher:
        await events(restored, 1)
        assert await publisher.drained(5)
    assert await seqs(admin, "n1") == [1, 2, 3, 4, 5, 6, 1]


async def test_something_else_on_the_nodes_subjects(
    nats_server: EmbeddedServer, admin: Bus, connect: Connect, journals: Journals
) -> None:
    bus, journal = await connect(nats_server, node="n1"), await journals()
    await admin.js.publish(SUBJECTS.command_event("n1", None), b"\xffno event")
    publisher = OutboxPublisher(bus, journal, SUBJECTS)
    with pytest.raises(Fenced, match="no event"):
        await publisher.fence()
    assert await publisher.fence(takeover=True)
    async with publishing(bus, journal) as publisher:
        await events(journal, 2)
        assert await publisher.drained(5)
