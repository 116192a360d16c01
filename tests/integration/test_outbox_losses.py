"""What a stream can lose, on a real server: what is sent again, what is said to be lost, and what is told anew."""

import asyncio
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from schemas.events import StateChanged
from schemas.status import ContainerStatus, State
from schemas.subjects import Subjects
from tests.integration.conftest import Connect, ServerFactory, until
from tests.integration.test_bus_outbox import STREAM, events, publishing, seqs, stored
from worker.bus.connection import Bus
from worker.bus.outbox import OutboxPublisher
from worker.bus.server import EmbeddedServer
from worker.bus.streams import setup_streams
from worker.clock import utc_now
from worker.errors import Fenced, Unavailable
from worker.journal import EventHead, Journal
from worker.repeating import Repeater

SUBJECTS = Subjects()
Journals = Callable[..., Awaitable[Journal]]


@pytest.fixture
async def journals(tmp_path: Path) -> AsyncIterator[Journals]:
    opened: list[Journal] = []

    async def open_journal(name: str = "a", *, node: str = "n1", **options: Any) -> Journal:
        journal = await Journal.open(tmp_path / f"{name}.db", node=node, **options)
        opened.append(journal)
        return journal

    yield open_journal
    for journal in opened:
        await journal.close()


@pytest.fixture
async def server(start_server: ServerFactory) -> EmbeddedServer:
    return await start_server()


@pytest.fixture
async def admin(server: EmbeddedServer, connect: Connect) -> Bus:
    bus = await connect(server)
    await setup_streams(bus)
    return bus


async def forget_sent(journal: Journal) -> None:
    """As ten minutes after the acknowledgement."""
    async with asyncio.timeout(10):
        while (await journal.read(lambda tx: tx.outbox_state())).unsent:
            await asyncio.sleep(0.01)
    await journal.transact(lambda tx: tx.outbox_drop(tx.last_seq))


# -- what is lost


async def test_evicted_by_others(
    server: EmbeddedServer, admin: Bus, connect: Connect, journals: Journals
) -> None:
    """The stream is full and drops its oldest: among them all of a node that has been quiet."""
    config = (await admin.js.stream_info(STREAM)).config
    await admin.js.api(f"STREAM.UPDATE.{STREAM}", {**config, "max_msgs": 50})
    bus, journal = await connect(server, node="n1"), await journals()
    other, others = await connect(server, node="n2"), await journals("b", node="n2")
    async with publishing(bus, journal) as publisher, publishing(other, others) as second:
        await events(journal, 5)
        assert await publisher.drained(10)
        await events(others, 100)
        assert await second.drained(10)
        assert await seqs(admin, "n1") == []
        await events(journal, 3)
        assert await publisher.drained(10)
        assert await seqs(admin, "n1") == [6, 7, 8]
        assert publisher.lost.is_set()
        assert not second.lost.is_set(), "its own newest were never lost"
    assert await seqs(admin, "n2") == list(range(54, 101))


async def test_partly_evicted_is_no_loss_to_the_outbox(
    server: EmbeddedServer, admin: Bus, connect: Connect, journals: Journals
) -> None:
    config = (await admin.js.stream_info(STREAM)).config
    await admin.js.api(f"STREAM.UPDATE.{STREAM}", {**config, "max_msgs": 50})
    bus, journal = await connect(server, node="n1"), await journals()
    async with publishing(bus, journal) as publisher:
        for _ in range(4):
            await events(journal, 30)
            assert await publisher.drained(10)
        assert await seqs(admin, "n1") == list(range(71, 121))
        assert not publisher.lost.is_set()


@pytest.mark.parametrize("kept", [True, False], ids=["what is kept is enough", "some is not kept any more"])
async def test_deleted_and_made_again(
    server: EmbeddedServer, admin: Bus, connect: Connect, journals: Journals, kept: bool
) -> None:
    bus, journal = await connect(server, node="n1"), await journals()
    async with publishing(bus, journal) as publisher:
        await events(journal, 10)
        assert await publisher.drained(10)
        if not kept:
            await forget_sent(journal)
        await admin.js.api(f"STREAM.DELETE.{STREAM}")
        await setup_streams(admin)
        await events(journal, 2)
        assert await publisher.drained(15)
        assert await seqs(admin, "n1") == (list(range(1, 13)) if kept else [11, 12])
        assert publisher.lost.is_set()


async def test_purged(server: EmbeddedServer, admin: Bus, connect: Connect, journals: Journals) -> None:
    bus, journal = await connect(server, node="n1"), await journals()
    async with publishing(bus, journal) as publisher:
        await events(journal, 10)
        assert await publisher.drained(10)
        await admin.js.api(f"STREAM.PURGE.{STREAM}")
        await events(journal, 2)
        assert await publisher.drained(10)
        assert await seqs(admin, "n1") == [11, 12]
        assert publisher.lost.is_set()


@pytest.mark.parametrize("kill", [False, True], ids=["in order", "killed"])
async def test_another_server_in_its_place(
    server: EmbeddedServer, admin: Bus, connect: Connect, journals: Journals, kill: bool
) -> None:
    """At the same address, with nothing of the old one."""
    bus, journal = await connect(server, node="n1"), await journals()
    async with publishing(bus, journal) as publisher:
        await events(journal, 10)
        assert await publisher.drained(10)
        await server.stop(kill=kill)
        await events(journal, 150)
        shutil.rmtree(server.store_dir)
        await server.start()
        await admin.wait_connected()
        await setup_streams(admin)
        assert await publisher.drained(20)
        assert await seqs(admin, "n1") == list(range(1, 161))
        assert publisher.lost.is_set()


async def test_an_older_copy_from_before_what_is_kept(
    server: EmbeddedServer, admin: Bus, connect: Connect, journals: Journals
) -> None:
    """The copy ends at event 5; events 6 to 10 are kept nowhere any more. What follows goes on behind 5."""
    bus, journal = await connect(server, node="n1"), await journals()
    async with publishing(bus, journal) as publisher:
        await events(journal, 5)
        assert await publisher.drained(10)
        await server.stop()
        copy = server.store_dir.with_name("copy")
        shutil.copytree(server.store_dir, copy)
        await server.start()
        await events(journal, 5)
        assert await publisher.drained(10)
        await forget_sent(journal)
        await events(journal, 5)
        assert await publisher.drained(10)
        await server.stop()
        shutil.rmtree(server.store_dir)
        shutil.move(copy, server.store_dir)
        await server.start()
        await admin.wait_connected()
        await until(publisher.lost.is_set, timeout_s=15)
        assert await publisher.drained(10)
        async with asyncio.timeout(10):
            while await seqs(admin, "n1") != [1, 2, 3, 4, 5, 11, 12, 13, 14, 15]:
                await asyncio.sleep(0.02)


# -- crashes


async def test_killed_again_and_again(
    server: EmbeddedServer, admin: Bus, connect: Connect, tmp_path: Path
) -> None:
    """Between a commit, a publish, its acknowledgement and the note of it."""
    path = tmp_path / "killed.db"
    made = 0
    for number in range(6):
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.integration.outbox_child",
            server.url,
            str(path),
            stdout=asyncio.subprocess.PIPE,
        )
        assert child.stdout is not None
        async with asyncio.timeout(60):
            for _ in range(3 + 7 * number):
                made = max(made, int(await child.stdout.readline()))
        child.send_signal(signal.SIGKILL)
        rest = await child.stdout.read()
        await child.wait()
        whole = rest[: rest.rfind(b"\n") + 1].split()
        made = max(made, *map(int, whole)) if whole else made
    journal = await Journal.open(path, node="n1")
    try:
        last = (await journal.read(lambda tx: tx.outbox_state())).last_seq
        async with publishing(await connect(server, node="n1"), journal) as publisher:
            assert await publisher.drained(20)
    finally:
        await journal.close()
    assert last >= made > 0, "what was committed is there"
    assert await seqs(admin, "n1") == list(range(1, last + 1))


# -- the claim


async def test_of_two_copies_that_pass_the_fence_one_claims_the_name(
    server: EmbeddedServer, admin: Bus, connect: Connect, journals: Journals, tmp_path: Path
) -> None:
    journal = await journals("a")
    async with publishing(await connect(server, node="n1"), journal) as publisher:
        await events(journal, 3)
        assert await publisher.drained(10)
    await events(journal, 2)  # unsent, and so in both
    await journal.close()
    shutil.copy(tmp_path / "a.db", tmp_path / "copy.db")
    copies = [await journals("a"), await journals("copy")]
    publishers = [OutboxPublisher(await connect(server, node="n1"), copy, SUBJECTS) for copy in copies]
    for publisher in publishers:
        await publisher.fence()
        assert not publisher.owns
    running = [asyncio.create_task(publisher.run()) for publisher in publishers]
    claims = []
    for copy, publisher in zip(copies, publishers, strict=True):
        await events(copy, 1, text=copy.boot)
        claims.append(asyncio.create_task(publisher.claim()))
    async with asyncio.timeout(15):
        await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait(claims, return_when=asyncio.FIRST_COMPLETED)
    ended = [task.done() for task in running]
    assert sorted(ended) == [False, True]
    loser = ended.index(True)
    with pytest.raises(Fenced, match="copy of this journal"):
        running[loser].result()
    assert [claim.done() for claim in claims] == [not lost for lost in ended]
    assert publishers[1 - loser].owns
    with pytest.raises(Unavailable):
        await publishers[loser].owned(0.01)
    for task in (*running, *claims):
        task.cancel()
    await asyncio.gather(*running, *claims, return_exceptions=True)
    found = await stored(admin, "n1")
    assert [event.seq for event in found] == [1, 2, 3, 4, 5, 6]
    assert found[-1].command == copies[1 - loser].boot


async def test_after_a_reconnect_the_name_is_known_again_only_after_a_look(
    server: EmbeddedServer, admin: Bus, connect: Connect, journals: Journals
) -> None:
    bus, journal = await connect(server, node="n1"), await journals()
    async with publishing(bus, journal) as publisher:
        await events(journal, 1)
        await publisher.claim()
        assert publisher.owns
        await server.stop()
        await until(lambda: not bus.connected)
        await server.start()
        await bus.wait_connected()
        await publisher.owned(10)
        assert publisher.owns


# -- statuses are told again


def status(cid: str, state: State = State.RUNNING, run: int = 1) -> ContainerStatus:
    service, _, replica = cid.rpartition("-")
    return ContainerStatus(
        container=cid,
        service=service,
        replica=int(replica),
        instance="01J00000000000000000000000",
        run=run,
        state=state,
        created_at=utc_now(),
    )


class Node:
    """What the repeater needs of a runtime: statuses, and a way to tell one again."""

    def __init__(self, journal: Journal, *containers: ContainerStatus) -> None:
        self.journal = journal
        self.containers = {one.container: one for one in containers}
        self.repeated: list[str] = []

    def statuses(self) -> list[ContainerStatus]:
        return list(self.containers.values())

    def status(self, cid: str) -> ContainerStatus | None:
        return self.containers.get(cid)

    async def tell(self, cid: str, *, repeat: bool = False) -> None:
        told = self.containers[cid]

        def make(head: EventHead) -> StateChanged:
            return StateChanged(
                **head.fields(),
                container=cid,
                instance=told.instance,
                from_=told.state,
                status=told,
                repeat=repeat,
            )

        await self.journal.transact(lambda tx: tx.event(SUBJECTS.state(tx.node, cid), make))

    async def repeat(self, due: Callable[[Any, Any], bool]) -> int:
        found = [cid for cid, told in self.containers.items() if due(_Record(told), utc_now())]
        for cid in found:
            await self.tell(cid, repeat=True)
        self.repeated += found
        return len(found)


class _Record:
    def __init__(self, told: ContainerStatus) -> None:
        self.status = told


async def shown(bus: Bus, cid: str) -> dict[str, Any] | None:
    found = await bus.js.last_message(STREAM, SUBJECTS.state("n1", cid))
    return None if found is None else msgspec.json.decode(found.data)


async def test_every_status_the_stream_lost_is_told_again(
    server: EmbeddedServer, admin: Bus, connect: Connect, journals: Journals
) -> None:
    bus, journal = await connect(server, node="n1"), await journals()
    node = Node(journal, *(status(f"web-{n}") for n in range(40)))
    async with publishing(bus, journal) as publisher:
        repeater = Repeater(bus, publisher, node, SUBJECTS)  # type: ignore[arg-type]
        for cid in node.containers:
            await node.tell(cid)
        assert await publisher.drained(10)
        assert await repeater.look() == 0
        # Somebody tidies up after one container: the outbox has no reason to look, the repeater has.
        await admin.js.api(f"STREAM.PURGE.{STREAM}", {"filter": SUBJECTS.state("n1", "web-7")})
        assert await repeater.look() == 1
        assert node.repeated == ["web-7"]
        assert await publisher.drained(10)
        assert await repeater.look() == 0
        # Everything goes, and nothing of it is kept any more.
        await forget_sent(journal)
        await admin.js.api(f"STREAM.PURGE.{STREAM}")
        await events(journal, 1)
        assert await publisher.drained(10)
        assert publisher.lost.is_set()
        assert await repeater.look() == 40
        assert await publisher.drained(10)
        for cid, told in node.containers.items():
            event = await shown(admin, cid)
            assert event is not None
            assert (event["repeat"], event["status"]["instance"]) == (True, told.instance)
        assert await repeater.look() == 0
        assert not publisher.lost.is_set()


async def test_a_status_older_than_the_present_one_is_told_again(
    server: EmbeddedServer, admin: Bus, connect: Connect, journals: Journals
) -> None:
    """An older copy of the stream shows an earlier run, whose later events are kept nowhere."""
    bus, journal = await connect(server, node="n1"), await journals()
    node = Node(journal, status("web-0"), status("web-1"))
    async with publishing(bus, journal) as publisher:
        for cid in node.containers:
            await node.tell(cid)
        assert await publisher.drained(10)
        await forget_sent(journal)
        node.containers["web-1"] = status("web-1", run=2)
        repeater = Repeater(bus, publisher, node, SUBJECTS)  # type: ignore[arg-type]
        assert await repeater.look() == 1
        assert node.repeated == ["web-1"]
        assert await publisher.drained(10)
        event = await shown(admin, "web-1")
        assert event is not None
        assert event["status"]["run"] == 2


async def test_a_loss_is_heeded_at_once(
    server: EmbeddedServer, admin: Bus, connect: Connect, journals: Journals
) -> None:
    bus, journal = await connect(server, node="n1"), await journals()
    node = Node(journal, status("web-0"))
    async with publishing(bus, journal) as publisher:
        await node.tell("web-0")
        running = asyncio.create_task(Repeater(bus, publisher, node, SUBJECTS).run())  # type: ignore[arg-type]
        assert await publisher.drained(10)
        await admin.js.api(f"STREAM.PURGE.{STREAM}")
        await events(journal, 1)
        await until(lambda: node.repeated == ["web-0"])
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
