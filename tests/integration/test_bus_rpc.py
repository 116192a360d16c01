"""The micro service of a node: queries, errors, bounds, discovery; and its line in the bucket of nodes."""

import asyncio
import json
from typing import Any

import msgspec
import pytest

from schemas.errors import Error, ErrorCode, InvalidCommand
from schemas.subjects import Subjects
from tests.integration.conftest import Connect, ServerFactory, until
from worker.bus.connection import Bus
from worker.bus.failures import NoResponders
from worker.bus.messages import Headers
from worker.bus.presence import Presence
from worker.bus.reader import BucketWatcher, read_bucket
from worker.bus.rpc import query, serve_queries
from worker.bus.server import EmbeddedServer
from worker.bus.streams import setup_streams
from worker.errors import Conflict, Internal, NotFound, ResourceExhausted, Unsupported

SUBJECTS = Subjects()


async def echo(body: bytes, headers: Headers) -> bytes:
    return body + headers.get("X", "").encode()


async def missing(body: bytes, headers: Headers) -> bytes:
    raise NotFound("no container ürks\nthere", field="container")


async def conflict(body: bytes, headers: Headers) -> bytes:
    raise Conflict("busy")


async def invalid(body: bytes, headers: Headers) -> bytes:
    raise InvalidCommand("x", field="y")


async def buggy(body: bytes, headers: Headers) -> bytes:
    raise ZeroDivisionError("secret detail")


async def big(body: bytes, headers: Headers) -> bytes:
    return bytes(int(body))


HANDLERS = {
    "echo": echo,
    "missing": missing,
    "conflict": conflict,
    "invalid": invalid,
    "buggy": buggy,
    "big": big,
}


async def ask(bus: Bus, verb: str, body: bytes = b"", node: str = "n1", **more: Any) -> bytes:
    return await query(bus, SUBJECTS.rpc(node, verb), body, 5, **more)


async def test_queries_and_their_errors(nats_server: EmbeddedServer, connect: Connect) -> None:
    bus, client = await connect(nats_server, node="n1"), await connect(nats_server)
    service = await serve_queries(bus, "n1", HANDLERS, "1.2.3")
    await bus.flush()
    assert await ask(client, "echo", b"hello ", headers={"X": "you"}) == b"hello you"
    with pytest.raises(NotFound, match="ürks") as not_found:
        await ask(client, "missing")
    assert not_found.value.field == "container"
    with pytest.raises(Conflict):
        await ask(client, "conflict")
    with pytest.raises(InvalidCommand):
        await ask(client, "invalid")
    with pytest.raises(Unsupported, match="frobnicate"):
        await ask(client, "frobnicate")
    with pytest.raises(Internal) as internal:
        await ask(client, "buggy")
    assert "secret" not in internal.value.message
    assert len(await ask(client, "big", b"%d" % client.max_payload)) == client.max_payload
    with pytest.raises(ResourceExhausted, match="ask for less"):
        await ask(client, "big", b"%d" % (client.max_payload + 1))
    with pytest.raises(NoResponders):
        await ask(client, "echo", node="n2")
    await service.stop()
    await bus.flush()
    with pytest.raises(NoResponders):
        await ask(client, "echo")


@pytest.mark.parametrize(
    ("verb", "status", "code"),
    [
        ("missing", "404", ErrorCode.NOT_FOUND),
        ("conflict", "409", ErrorCode.CONFLICT),
        ("invalid", "422", ErrorCode.INVALID_COMMAND),
        ("nothing", "501", ErrorCode.UNSUPPORTED),
        ("buggy", "500", ErrorCode.INTERNAL),
    ],
)
async def test_the_form_of_an_error(
    nats_server: EmbeddedServer, connect: Connect, verb: str, status: str, code: ErrorCode
) -> None:
    bus, client = await connect(nats_server, node="n1"), await connect(nats_server)
    await serve_queries(bus, "n1", HANDLERS, "1.2.3")
    await bus.flush()
    reply = await client.request(SUBJECTS.rpc("n1", verb), b"")
    assert reply.headers["Nats-Service-Error-Code"] == status
    assert reply.headers["Nats-Service-Error"].isascii()
    assert msgspec.json.decode(reply.data, type=Error).code == code


async def test_handlers_run_side_by_side_up_to_a_bound(nats_server: EmbeddedServer, connect: Connect) -> None:
    bus, client = await connect(nats_server, node="n1"), await connect(nats_server)
    gate, inside = asyncio.Event(), 0

    async def wait(body: bytes, headers: Headers) -> bytes:
        nonlocal inside
        inside += 1
        await gate.wait()
        return b"done"

    service = await serve_queries(bus, "n1", {"wait": wait, "echo": echo}, "1.2.3", max_running=10)
    await bus.flush()
    waiting = [asyncio.create_task(ask(client, "wait")) for _ in range(10)]
    await until(lambda: inside == 10)
    with pytest.raises(ResourceExhausted, match="under way"):
        await ask(client, "echo", b"x")
    gate.set()
    assert await asyncio.gather(*waiting) == [b"done"] * 10
    assert await ask(client, "echo", b"x") == b"x"
    gate.clear()
    hanging = asyncio.create_task(client.request(SUBJECTS.rpc("n1", "wait"), b"", 0.5))
    await until(lambda: inside == 11)
    await service.stop()
    assert service.running == 0
    hanging.cancel()
    await asyncio.gather(hanging, return_exceptions=True)


async def test_discovery_by_the_micro_protocol(nats_server: EmbeddedServer, connect: Connect) -> None:
    """ADR-32: what `nats micro list`, `info` and `stats` ask."""
    client = await connect(nats_server)
    services = []
    for node in ("n1", "n2"):
        bus = await connect(nats_server, node=node)
        services.append(await serve_queries(bus, node, HANDLERS, "1.2.3", "a node"))
        await bus.flush()
    await ask(client, "echo")
    with pytest.raises(NotFound):
        await ask(client, "missing")

    async def all_of(subject: str) -> list[dict[str, Any]]:
        inbox = client.new_inbox()
        async with await client.queue(inbox) as replies:
            await client.publish(subject, b"", reply=inbox)
            found = [json.loads((await replies.get(2)).data) for _ in range(2)]
        return sorted(found, key=lambda one: str(one["metadata"]["node"]))

    for subject in ("$SRV.PING", "$SRV.PING.sandfleet"):
        pings = await all_of(subject)
        assert [ping["type"] for ping in pings] == ["io.nats.micro.v1.ping_response"] * 2
        assert [ping["id"] for ping in pings] == [service.id for service in services]
        assert (pings[0]["name"], pings[0]["version"]) == ("sandfleet", "1.2.3")
    info = (await all_of("$SRV.INFO"))[0]
    assert (info["type"], info["description"]) == ("io.nats.micro.v1.info_response", "a node")
    assert {endpoint["name"]: endpoint["subject"] for endpoint in info["endpoints"]} == {
        verb: SUBJECTS.rpc("n1", verb) for verb in HANDLERS
    }
    reply = await client.request(f"$SRV.STATS.sandfleet.{services[0].id}", b"")
    stats = json.loads(reply.data)
    assert stats["type"] == "io.nats.micro.v1.stats_response"
    by_name = {endpoint["name"]: endpoint for endpoint in stats["endpoints"]}
    assert (by_name["echo"]["num_requests"], by_name["echo"]["num_errors"]) == (1, 0)
    assert (by_name["missing"]["num_requests"], by_name["missing"]["num_errors"]) == (1, 1)
    assert by_name["missing"]["last_error"].startswith("404:")
    assert by_name["echo"]["average_processing_time"] > 0


async def test_presence(start_server: ServerFactory, connect: Connect) -> None:
    server = await start_server()
    admin, bus = await connect(server), await connect(server, node="n1")
    await setup_streams(admin)
    state = {"node": "n1", "state": "ready", "slots_used": 0}
    presence = Presence(bus, "n1", lambda: dict(state), interval_s=60)
    async with BucketWatcher(admin, "SANDFLEET_NODES") as watcher:
        running = asyncio.create_task(presence.run())
        entry = await asyncio.wait_for(watcher.__anext__(), 5)
        assert (entry.key, json.loads(entry.value or b"")) == ("n1", state)
        state["slots_used"] = 3
        presence.refresh()
        entry = await asyncio.wait_for(watcher.__anext__(), 5)
        assert json.loads(entry.value or b"")["slots_used"] == 3
        assert json.loads((await read_bucket(admin, "SANDFLEET_NODES"))["n1"])["slots_used"] == 3
        state["slots_used"] = 4
        await server.restart()
        entry = await asyncio.wait_for(watcher.__anext__(), 15)  # written again at the reconnect
        assert json.loads(entry.value or b"")["slots_used"] == 4
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await presence.withdraw()
        entry = await asyncio.wait_for(watcher.__anext__(), 5)
        assert (entry.key, entry.value) == ("n1", None)
        assert await read_bucket(admin, "SANDFLEET_NODES") == {}


async def test_a_watcher_sees_a_node_vanish(start_server: ServerFactory, connect: Connect) -> None:
    """By the delete marker of an expired key; the bucket of this test expires fast."""
    server = await start_server()
    admin, bus = await connect(server), await connect(server, node="n1")
    await admin.js.api(
        "STREAM.CREATE.KV_SANDFLEET_NODES",
        {
            "name": "KV_SANDFLEET_NODES",
            "subjects": ["$KV.SANDFLEET_NODES.>"],
            "max_age": 1_000_000_000,
            "max_msgs_per_subject": 1,
            "allow_rollup_hdrs": True,
            "allow_msg_ttl": True,
            "allow_direct": True,
            "subject_delete_marker_ttl": 60_000_000_000,
            "duplicate_window": 1_000_000_000,
        },
    )
    async with BucketWatcher(admin, "SANDFLEET_NODES") as watcher:
        running = asyncio.create_task(Presence(bus, "n1", lambda: {"node": "n1"}).run())
        assert (await asyncio.wait_for(watcher.__anext__(), 5)).value is not None
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert (await asyncio.wait_for(watcher.__anext__(), 10)).value is None
