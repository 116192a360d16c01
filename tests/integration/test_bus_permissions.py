"""A worker's whole traffic under exactly the permissions of the contract, on a real server, without one violation."""

import asyncio
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from schemas.events import CommandAccepted
from schemas.subjects import Subjects
from tests.integration.conftest import Connect, ServerFactory, until
from worker.bus.chunks import ChunkPublisher
from worker.bus.connection import Bus
from worker.bus.consumer import CommandConsumer, Delivery
from worker.bus.jetstream import StreamNames
from worker.bus.messages import Headers
from worker.bus.outbox import OutboxPublisher
from worker.bus.permissions import config_block, node_permissions
from worker.bus.presence import Presence
from worker.bus.reader import StreamReader, read_bucket
from worker.bus.rpc import query, serve_queries
from worker.bus.server import EmbeddedServer, find_binary
from worker.bus.streams import setup_streams, wait_for_streams
from worker.journal import EventHead, Journal

NODE = "Mac-1_x"
EXAMPLES = Path(__file__).parents[2] / "deploy" / "nats"


async def two_users(
    start_server: ServerFactory, connect: Connect, *, prefix: str, stream_prefix: str, domain: str | None
) -> tuple[EmbeddedServer, Bus, Bus]:
    """A server, an administrator, and a node with nothing but its permissions."""
    permissions = node_permissions(
        NODE, subjects=Subjects(prefix), names=StreamNames(stream_prefix), pools=("build",), domain=domain
    )
    server = await start_server(
        domain=domain,
        config='accounts { A: { jetstream: enabled, users: [ { user: "admin", password: "a" }\n'
        f'{{ user: "node", password: "n"\n{config_block(permissions)} }} ] }} }}',
    )
    settings = {"stream_prefix": stream_prefix, "domain": domain}
    admin = await connect(f"nats://admin:a@127.0.0.1:{server.port}", **settings)
    bus = await connect(f"nats://node:n@127.0.0.1:{server.port}", node=NODE, insecure=False, **settings)
    return server, admin, bus


@pytest.mark.parametrize(
    ("prefix", "stream_prefix", "domain"),
    [("sandfleet.v1", "SANDFLEET", None), ("acme.fleet", "ACME", "site")],
    ids=["defaults", "own names and a domain"],
)
async def test_everything_a_worker_does(
    start_server: ServerFactory,
    connect: Connect,
    tmp_path: Path,
    prefix: str,
    stream_prefix: str,
    domain: str | None,
) -> None:
    server, admin, bus = await two_users(
        start_server, connect, prefix=prefix, stream_prefix=stream_prefix, domain=domain
    )
    of, names = Subjects(prefix), StreamNames(stream_prefix)
    waiting = asyncio.create_task(wait_for_streams(bus))
    await setup_streams(admin, subjects=of, pools=["build"])
    await asyncio.wait_for(waiting, 5)
    journal = await Journal.open(tmp_path / "a.db", node=NODE)
    outbox = OutboxPublisher(bus, journal, of)
    await outbox.fence()
    seen: list[bytes] = []

    async def handle(delivery: Delivery) -> None:
        seen.append(delivery.data)
        await delivery.in_progress()
        await (delivery.ack(wait=True) if len(seen) % 2 else delivery.term())

    async def echo(body: bytes, headers: Headers) -> bytes:
        return body

    consumer = CommandConsumer(bus, node=NODE, subjects=of, check_fence=outbox.check_fence)
    presence = Presence(bus, NODE, lambda: {"node": NODE}, interval_s=0.05)
    sink = ChunkPublisher(bus)
    tasks = [asyncio.create_task(work) for work in (outbox.run(), consumer.run(handle), presence.run())]
    service = await serve_queries(bus, NODE, {"echo": echo}, "1.0.0", subjects=of)

    async def use(turn: int) -> None:
        count = 4
        for number in range(count):
            await admin.js.publish(of.command(NODE, f"c-{number}", "start"), b"%d" % turn)
        await until(lambda: seen.count(b"%d" % turn) == count)
        await add_events(journal, of, 1)
        await add_events(journal, of, 100)
        assert await outbox.drained(10)
        subject = of.log(NODE, "c-0", "stdout")
        await sink.publish(subject, b"abc", {"Nats-Msg-Id": f"i/stdout/{turn}+3"})
        last = await sink.last(subject)
        assert last is not None
        assert last.headers["Nats-Msg-Id"] == f"i/stdout/{turn}+3"
        assert await sink.publish_stats(of.stat(NODE, "c-0"), b"{}")
        await bus.publish(of.progress(NODE), b"{}")
        await bus.publish(of.exec_out(NODE, "s1"), b"")
        assert await query(admin, of.rpc(NODE, "echo"), b"hello", 5) == b"hello"
        assert (await admin.request("$SRV.PING.sandfleet", b"")).data
        assert NODE in await read_bucket(admin, names.nodes_bucket)

    frames = await bus.queue(of.exec_in_of(NODE))
    await use(1)
    await admin.publish(of.exec_in(NODE, "s1"), b"frame")
    assert (await frames.get(5)).data == b"frame"
    await admin.js.api(f"CONSUMER.DELETE.{names.commands}.{NODE}")
    await use(2)
    await server.restart()
    await admin.wait_connected()
    await asyncio.wait_for(consumer.ready.wait(), 10)
    await bus.wait_connected()
    await use(3)
    # Its share of a pool, too.
    await bus.js.api(f"CONSUMER.INFO.{names.jobs}.build")

    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await presence.withdraw()
    await service.stop()
    await bus.flush()
    assert await read_bucket(admin, names.nodes_bucket) == {}
    assert bus.complaints == []
    assert admin.complaints == []
    await journal.close()
    async with StreamReader(admin, names.stats, follow=False) as reader:
        assert len([message async for message in reader]) == 3


async def add_events(journal: Journal, of: Subjects, count: int) -> None:
    def make(head: EventHead) -> CommandAccepted:
        return CommandAccepted(**head.fields(), command="run")

    subject = of.command_event(NODE, None)
    await journal.transact(lambda tx: [tx.event(subject, make) for _ in range(count)])


async def test_a_node_cannot_be_another_one(start_server: ServerFactory, connect: Connect) -> None:
    _, admin, bus = await two_users(
        start_server, connect, prefix="sandfleet.v1", stream_prefix="SANDFLEET", domain=None
    )
    await setup_streams(admin)
    of = Subjects()
    forbidden = [
        of.state("other", "web-0"),
        of.log("other", "web-0", "stdout"),
        of.command(NODE, "web-0", "start"),
        "$KV.SANDFLEET_NODES.other",
        "$JS.API.STREAM.DELETE.SANDFLEET_EVT",
        "$JS.API.STREAM.PURGE.SANDFLEET_EVT",
        f"$JS.API.CONSUMER.CREATE.SANDFLEET_CMD.{NODE}.{of.commands_of('other')}",
        f"$JS.API.CONSUMER.CREATE.SANDFLEET_CMD.{NODE}",
        "$JS.API.DIRECT.GET.SANDFLEET_EVT.sandfleet.v1.evt.other.>",
    ]
    for subject in forbidden:
        await bus.publish(subject, b"")
    for subject in (of.commands_of(), of.rpc_of("other"), "_INBOX.>"):
        await bus.subscribe(subject, lambda message: None)
    await bus.flush()
    await until(lambda: len(bus.complaints) == len(forbidden) + 3)
    assert bus.session == 1


def test_the_example_is_what_the_code_says() -> None:
    text = (EXAMPLES / "node-permissions.conf").read_text()
    assert text.endswith(config_block(node_permissions("mac-1", pools=("build",))))


@pytest.mark.parametrize("name", ["server.conf", "cluster.conf", "leaf.conf"])
def test_the_examples_are_valid(name: str, tmp_path: Path) -> None:
    text = (EXAMPLES / name).read_text()
    asked = {found for found in re.findall(r"\$(NATS_\w+)", text) if not found.endswith("_STORE")}
    values = {found: "4222" if found.endswith("PORT") else f"nats://{found}:7422" for found in asked}
    environment: dict[str, Any] = {**os.environ, **values, "NATS_STORE": str(tmp_path)}
    checked = subprocess.run(
        [str(find_binary()), "-t", "-c", str(EXAMPLES / name)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr
