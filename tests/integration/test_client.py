"""FleetClient against a real server and a scripted node: it relies on the contract and on nothing else."""

import asyncio
from contextlib import aclosing
from datetime import UTC, datetime, timedelta

import pytest

from schemas.commands import Remove, Resume, Run, Start, Stop
from schemas.errors import Error, ErrorCode
from schemas.events import StateChanged
from schemas.node import NodeInfo
from schemas.queries import WaitUntil
from schemas.spec import ImageSpec, ServiceSpec
from schemas.status import State
from worker import client as client_module
from worker.bus.failures import NoAnswer, NoResponders
from worker.bus.server import EmbeddedServer
from worker.client import FleetClient, new_id
from worker.errors import (
    Configuration,
    Conflict,
    DeadlineExceeded,
    InvalidSpec,
    NotFound,
    ResourceExhausted,
    from_wire,
)

from .conftest import Connect, NatsSettings, ServerFactory, until
from .fake_node import INSTANCE, FakeNode, status

SPEC = ServiceSpec(image=ImageSpec(name="web:1"))


@pytest.fixture
async def fleet(start_server: ServerFactory, connect: Connect) -> FleetClient:
    server: EmbeddedServer = await start_server()
    return FleetClient(await connect(server))


@pytest.fixture
async def node(fleet: FleetClient, connect: Connect) -> FakeNode:
    bus = await connect(fleet.bus.cfg.url)
    return await FakeNode.start(
        bus, "mac", status("web-0"), status("web-1"), status("db-0", State.EXITED, exit_code=3)
    )


async def test_a_command_is_waited_for(fleet: FleetClient, node: FakeNode) -> None:
    command = Run(id=new_id(), spec=SPEC)
    done = await fleet.command("mac", "web-7", command)
    assert done.ok
    assert done.command_id == command.id
    assert done.result == {"instance": INSTANCE}
    (sent,) = node.commands
    assert (sent["container"], sent["type"], sent["id"]) == ("web-7", "run", command.id)
    assert "Nats-Msg-Id" not in sent
    assert (await fleet.command("mac", None, Resume(id=new_id()))).command == "resume"


async def test_an_earlier_completion_of_another_command_is_not_taken(
    fleet: FleetClient, node: FakeNode
) -> None:
    first, second = Start(id="one"), Start(id="two")
    done = await asyncio.gather(fleet.command("mac", "web-0", first), fleet.command("mac", "web-0", second))
    assert [one.command_id for one in done] == ["one", "two"]


async def test_a_failure_is_raised_or_given(fleet: FleetClient, node: FakeNode) -> None:
    node.on_command = lambda cid, body: Error(code=ErrorCode.CONFLICT, message="it runs", field="container")
    with pytest.raises(Conflict, match="it runs") as caught:
        await fleet.command("mac", "web-0", Remove(id=new_id(), force=False))
    assert caught.value.field == "container"
    done = await fleet.command("mac", "web-0", Remove(id=new_id()), check=False)
    assert done.error is not None
    assert not done.ok


async def test_a_rejection_is_from_wire(fleet: FleetClient, node: FakeNode) -> None:
    node.rejecting = True
    with pytest.raises(InvalidSpec, match="no such field"):
        await fleet.command("mac", "web-0", Run(id=new_id(), spec=SPEC), check=False)


async def test_an_absent_node_is_told_early_and_the_command_waits(fleet: FleetClient, node: FakeNode) -> None:
    told: list[str] = []
    with pytest.raises(NoAnswer, match="node pc is not there"):
        await fleet.command("pc", "web-0", Stop(id=new_id()), absent_s=0.2, on_absent=told.append)
    assert told == ["pc"]
    assert (await fleet.bus.js.stream_info("SANDFLEET_CMD")).last_seq == 1


async def test_a_silent_node_runs_into_the_timeout(fleet: FleetClient, node: FakeNode) -> None:
    node.silent = True
    with pytest.raises(NoAnswer, match=r"within 0\.3 s"):
        await fleet.command("mac", "web-0", Stop(id=new_id()), timeout_s=0.3)


async def test_too_many_commands_for_one_container_are_told(fleet: FleetClient, node: FakeNode) -> None:
    for _ in range(64):
        await fleet.send("pc", "web-0", Start(id=new_id()))
    with pytest.raises(ResourceExhausted, match="is node pc there"):
        await fleet.send("pc", "web-0", Start(id=new_id()))


async def test_a_server_without_streams_says_what_to_do(fleet: FleetClient) -> None:
    for attempt in (
        fleet.command("mac", "web-0", Start(id=new_id())),
        fleet.send("mac", "web-0", Start(id=new_id())),
        fleet.nodes(),
        fleet.snapshot(),
    ):
        with pytest.raises((Configuration, NoResponders), match="run sandfleet setup"):
            await attempt


async def test_nodes_come_and_go(fleet: FleetClient, node: FakeNode, connect: Connect) -> None:
    assert await fleet.default_node() == "mac"
    other = await FakeNode.start(await connect(fleet.bus.cfg.url), "pc")
    assert [presence.node for presence in await fleet.nodes()] == ["mac", "pc"]
    with pytest.raises(Conflict, match=r"mac, pc.*--node"):
        await fleet.default_node()
    await other.vanish()
    assert not await fleet.is_present("pc")
    assert await fleet.default_node() == "mac"
    assert set(await fleet.last_seen()) == {"mac", "pc"}
    await node.vanish()
    with pytest.raises(NotFound, match="sandfleet dev"):
        await fleet.default_node()


async def test_queries_and_their_errors(fleet: FleetClient, node: FakeNode) -> None:
    assert (await fleet.info("mac")).hostname == "host"
    assert [one.container for one in await fleet.containers("mac")] == ["db-0", "web-0", "web-1"]
    assert [one.container for one in await fleet.containers("mac", state=State.EXITED)] == ["db-0"]
    assert (await fleet.state("mac", "db-0")).exit_code == 3
    assert (await fleet.stats("mac", "web-0")).processes == 3
    assert [image.name for image in await fleet.images("mac")] == ["web:1"]
    with pytest.raises(NotFound) as caught:
        await fleet.state("mac", "nope-0")
    assert caught.value.field == "container"
    with pytest.raises(NoResponders, match="node pc does not answer"):
        await fleet.info("pc")
    with pytest.raises(Exception, match="no query 'nope'"):
        await fleet.query("mac", "nope", None, NodeInfo)


async def test_detail_is_the_status_and_the_spec(fleet: FleetClient, node: FakeNode) -> None:
    node.spec = {"image": {"name": "web:1"}, "env": {"A": "b"}}
    detail = await fleet.detail("mac", "web-0")
    assert (detail.container, detail.spec) == ("web-0", node.spec)
    with pytest.raises(NotFound):
        await fleet.detail("mac", "nope-0")


async def test_wait_goes_on_as_long_as_it_takes(
    fleet: FleetClient, node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "WAIT_STEP_S", 0.05)
    waiting = asyncio.ensure_future(fleet.wait("mac", "web-0"))
    await until(lambda: sum(verb == "wait" for verb, _ in node.requests) >= 3)
    node.containers["web-0"] = status("web-0", State.EXITED, exit_code=0)
    assert (await waiting).exit_code == 0
    assert (await fleet.wait("mac", "db-0", until=WaitUntil.FINAL)).exit_code == 3
    with pytest.raises(DeadlineExceeded, match=r"web-1 has not ended within 0\.1 s"):
        await fleet.wait("mac", "web-1", timeout_s=0.1)


async def test_wait_survives_a_worker_that_is_replaced(
    fleet: FleetClient, node: FakeNode, connect: Connect
) -> None:
    await node.vanish()
    waiting = asyncio.ensure_future(fleet.wait("mac", "web-0"))
    await asyncio.sleep(0)
    await FakeNode.start(await connect(fleet.bus.cfg.url), "mac", status("web-0", State.EXITED, exit_code=7))
    assert (await waiting).exit_code == 7


async def test_the_snapshot_is_the_newest_status_of_all_kinds_of_events(
    fleet: FleetClient, node: FakeNode
) -> None:
    await node.become("web-0", State.RUNNING)
    await node.become("web-0", State.EXITED, exit_code=1)
    await node.become("web-1", State.RUNNING)
    await node.become("web-1", State.REMOVED)
    node.containers["web-0"] = status("web-0", State.FAILED)
    await fleet.command("mac", "web-0", Start(id=new_id()))
    found = await fleet.snapshot()
    assert {key: one.state for key, one in found.items()} == {("mac", "web-0"): State.FAILED}
    assert await fleet.snapshot("mac", "web-1") == {}


async def test_events_since_a_place_a_time_and_followed(fleet: FleetClient, node: FakeNode) -> None:
    before = await fleet.event_position()
    await node.become("web-0", State.STOPPING)
    await node.bus.js.publish("sandfleet.v1.evt.mac.web-0.state", b'{"type": "of_tomorrow"}')
    seen = [one async for one in fleet.read_events(("sandfleet.v1.evt.mac.web-0.>",), after=before)]
    assert isinstance(seen[0].event, StateChanged)
    assert seen[1].event is None
    old = datetime.now(UTC) + timedelta(hours=1)
    assert [one async for one in fleet.read_events(("sandfleet.v1.evt.>",), since=old)] == []
    events = fleet.read_events(("sandfleet.v1.evt.>",), after=seen[1].seq, follow=True)
    async with aclosing(events), asyncio.timeout(10):
        coming = asyncio.ensure_future(anext(events))
        await node.become("db-0", State.REMOVED)
        event = (await coming).event
        assert isinstance(event, StateChanged)
        assert event.status.container == "db-0"


async def test_log_chunks_of_one_container(fleet: FleetClient, node: FakeNode) -> None:
    await node.log("web-0", "stdout", 0, b"a\n")
    await node.log("web-1", "stdout", 0, b"other\n")
    await node.log("web-0", "stderr", 0, b"b\n", eof=1)
    await node.bus.js.publish("sandfleet.v1.log.mac.web-0.stdout", b"no chunk")
    chunks = [chunk async for chunk in fleet.log_chunks("mac", "web-0")]
    assert [(chunk.stream, chunk.data, chunk.eof) for chunk in chunks] == [
        ("stdout", b"a\n", None),
        ("stderr", b"b\n", 1),
    ]
    assert await fleet.log_position() == 4


def test_every_code_of_the_contract_has_its_class() -> None:
    for code in ErrorCode:
        known = from_wire(Error(code=code, message="m"))
        assert type(known).code == code
    failure = from_wire(Error(code=ErrorCode("of_tomorrow"), message="new"))
    assert (failure.code, failure.message) == ("of_tomorrow", "new")


def test_ids_are_unique_and_fit() -> None:
    ids = {new_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(len(one) <= 64 for one in ids)


async def test_no_server_is_told() -> None:
    with pytest.raises(Exception, match="no NATS server"):
        await FleetClient.connect(NatsSettings(url="nats://127.0.0.1:1"))
