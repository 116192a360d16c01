"""Commands and events in bulk: the ledger's bursts, the way of an event into the stream, a backlog, adoption."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from schemas.events import CommandAccepted
from schemas.subjects import Subjects
from tests.acceptance.harness import Fleet, P
from worker.bus.connection import Bus
from worker.bus.outbox import OutboxPublisher
from worker.config import NatsConfig
from worker.journal import EventHead, Journal, Tx

Row = Callable[[str, float | None, str, str, bool | None], dict[str, Any]]
Rows = list[dict[str, Any]]

CONTAINERS = 200
COMMANDS = 10_000
BACKLOG = 100_000
ADOPTED = 500


class Completions:
    """Completions of the node's commands as they are published: their order per container, and when the last came."""

    def __init__(self) -> None:
        self.order: dict[str, list[str]] = defaultdict(list)
        self.failed: list[dict[str, Any]] = []
        self.count = 0
        self.wanted = 0
        self.done: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    async def on(self, message: Any) -> None:
        event = json.loads(message.data)
        if event["type"] == "command_completed":
            self.order[event["container"]].append(event["command_id"])
            self.count += 1
            if self.count == self.wanted and not self.done.done():
                self.done.set_result(time.perf_counter())


async def burst(
    fleet: Fleet, verbs: tuple[str, ...], commands: int, containers: int, name: str
) -> tuple[float, bool]:
    """Commands per second from the first published to the last completed, and whether each container's were in
    order.
    """
    nc, node = fleet.client.nc, fleet.client.node
    seen = Completions()
    seen.wanted = commands
    watch = await nc.subscribe(
        f"{P}.evt.{node}.*.command", cb=seen.on, pending_msgs_limit=1 << 20, pending_bytes_limit=1 << 30
    )
    await nc.flush()
    sent: dict[str, list[str]] = defaultdict(list)
    window, inbox = asyncio.Semaphore(500), nc.new_inbox()
    refused: list[bytes] = []

    async def stored(message: Any) -> None:
        window.release()
        if b'"error"' in message.data:
            refused.append(message.data)

    acks = await nc.subscribe(inbox, cb=stored)
    began = time.perf_counter()
    for n in range(commands):
        cid, verb = f"{name}-{n % containers}", verbs[(n // containers) % len(verbs)]
        command_id = f"{name}-{n}-{time.time_ns()}"
        sent[cid].append(command_id)
        await window.acquire()
        await nc.publish(
            f"{P}.cmd.{node}.{cid}.{verb}", json.dumps({"type": verb, "id": command_id}).encode(), reply=inbox
        )
    for _ in range(500):
        await window.acquire()
    assert not refused, refused[:1]
    ended = await asyncio.wait_for(seen.done, 120)
    await acks.unsubscribe()
    await watch.unsubscribe()
    return commands / (ended - began), seen.order == sent


async def commands(fleet: Fleet, row: Row) -> Rows:
    """10,000 commands for 200 containers at once, of kinds that cost nothing but their answer."""
    worker = fleet.worker.process
    assert worker is not None
    spec = {"image": {"name": "base"}, "command": {"entrypoint": ["/bin/true"]}}
    for n in range(CONTAINERS):
        await fleet.client.send(f"burst-{n}", "create", spec=spec)
    for n in range(CONTAINERS):
        await fleet.client.state(f"burst-{n}", "pending", message="ready")
    await fleet.client.follow_live(lambda event: None)
    rows = []
    for what, verbs, name in (
        ("`kill` of pending containers", ("kill",), "burst"),
        ("`stop` and `kill` of exited ones", ("stop", "kill"), "burst"),
        ("`remove` of unknown ones", ("remove",), "none"),
    ):
        before = cpu_s(worker.pid)
        rate, ordered = await burst(fleet, verbs, COMMANDS, CONTAINERS, name)
        cost = (cpu_s(worker.pid) - before) / COMMANDS * 1e6
        ok = rate >= 1000 and ordered
        rows.append(row(f"{COMMANDS:,} × {what}, in order", rate, "commands/s", "1,000/s or more", ok))
        rows.append(row("  the worker's processor time", cost, "µs each", "", None))
    peak = peak_bytes(worker.pid)
    rows.append(row("worker's memory, at most", peak / 2**20, "MiB", "below 200 MB", peak < 200e6))
    return rows


async def visible(fleet: Fleet, row: Row) -> Rows:
    """From an event's own time, which is before its commit, to a consumer of the stream."""
    nc, node = fleet.client.nc, fleet.client.node
    delays: list[float] = []

    async def on(message: Any) -> None:
        event = json.loads(message.data)
        delays.append((time.time() - datetime.fromisoformat(event["time"]).timestamp()) * 1e3)

    config = ConsumerConfig(deliver_policy=DeliverPolicy.NEW, ack_policy=AckPolicy.NONE)
    sub = await fleet.client.js.subscribe(
        f"{P}.evt.{node}.*.command", stream="SANDFLEET_EVT", config=config, cb=on
    )
    await nc.flush()
    for n in range(300):
        await fleet.client.do(f"none-{n}", "remove")
    await sub.unsubscribe()
    p50, p99 = statistics.median(delays), percentile(delays, 0.99)
    return [
        row("event made → read from the stream", p50, "ms p50", "below 5 ms", p50 < 5),
        row("event made → read from the stream", p99, "ms p99", "", None),
    ]


async def backlog(fleet: Fleet, row: Row) -> Rows:
    """100,000 events of a node without a connection, once it has one."""
    took, stored = await drain(fleet, fleet.server.url, "backlog", BACKLOG)
    rate = BACKLOG / took
    ok = rate >= 10_000 and stored == BACKLOG
    return [row(f"a backlog of {BACKLOG:,} events", rate, "events/s", "10,000/s or more", ok)]


async def drain(fleet: Fleet, url: str, node: str, count: int) -> tuple[float, int]:
    """How long it takes to send so many events of a node's journal to the server at `url`; and how many are there."""
    subjects = Subjects()
    with tempfile.TemporaryDirectory() as folder:
        journal = await Journal.open(Path(folder) / "worker.db", node=node)
        bus = await Bus.connect(NatsConfig(url=url, insecure=True), node=node, name="bench", retry=False)
        publisher = OutboxPublisher(bus, journal, subjects)
        await publisher.fence()

        def add(tx: Tx) -> None:
            for n in range(1000):
                subject = subjects.command_event(node, f"web-{n % 200}")
                tx.event(subject, partial(_event, replica=n % 200))

        for _ in range(count // 1000):
            await journal.transact(add)
        began = time.perf_counter()
        sending = asyncio.create_task(publisher.run())
        try:
            assert await publisher.drained(120)
            took = time.perf_counter() - began
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            await bus.close()
            await journal.close()
    info = await fleet.client.js.stream_info("SANDFLEET_EVT", subjects_filter=subjects.events_of(node))
    return took, sum((info.state.subjects or {}).values())


def _event(head: EventHead, replica: int) -> CommandAccepted:
    return CommandAccepted(
        **head.fields(), container=f"web-{replica}", command="start", command_id="01J" + "0" * 23
    )


async def adopt(fleet: Fleet, row: Row) -> Rows:
    """A worker is killed; a new one answers for all its containers, their pids unchanged.

    Its modules are compiled, as after an installation; the first of four starts does that.
    """
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(fleet.folder / "compiled")
    spec = {"image": {"name": "base"}, "command": {"entrypoint": ["/bin/sleep", "3600"]}}
    client = fleet.client
    for n in range(ADOPTED):
        await client.send(f"idle-{n}", "run", spec=spec)
    for n in range(ADOPTED):
        await client.state(f"idle-{n}", "running")
    before = {status["container"]: status["pid"] for status in await all_statuses(fleet)}
    times = []
    for _ in range(4):
        fleet.worker.kill()
        began = time.perf_counter()
        fleet.worker.start()
        while True:
            with contextlib.suppress(Exception):
                found = await all_statuses(fleet)
                if len(found) == ADOPTED:
                    break
            await asyncio.sleep(0.005)
        times.append(time.perf_counter() - began)
        assert {
            status["container"]: status["pid"] for status in found if status["state"] == "running"
        } == before
    for n in range(ADOPTED):
        await client.send(f"idle-{n}", "remove")
    for n in range(ADOPTED):
        await client.state(f"idle-{n}", "removed")
    took = statistics.median(times[1:])
    return [
        row(
            f"new worker: started → {ADOPTED} containers adopted, answering", took, "s", "below 1 s", took < 1
        )
    ]


async def all_statuses(fleet: Fleet) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    cursor = None
    while True:
        page = await fleet.client.query("list", timeout=0.5, **({} if cursor is None else {"cursor": cursor}))
        found += page["containers"]
        cursor = page["cursor"]
        if cursor is None:
            return found


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_bytes(pid: int) -> int:
    """The most that was ever resident."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")
