"""Commands and events in bulk: the ledger's burst, the way of an event into the stream, a backlog, adoption."""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from nats.js.api import ConsumerConfig, DeliverPolicy

from schemas.events import CommandAccepted
from schemas.subjects import Subjects
from tests.acceptance.harness import Fleet, P
from worker.bus.connection import Bus
from worker.bus.outbox import OutboxPublisher
from worker.bus.reader import StreamReader
from worker.config import NatsConfig
from worker.journal import EventHead, Journal, Tx

Row = Callable[[str, float | None, str, str, bool | None], dict[str, Any]]

CONTAINERS = 200
COMMANDS = 10_000
BACKLOG = 100_000
ADOPTED = 500


def rss_peak(pid: int) -> int:
    """The most bytes that were ever resident."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


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
) -> tuple[float, bool, float]:
    """Commands per second from the first published to the last completed, whether each container's came in order,
    and what of the time the publishing took.
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
    published = time.perf_counter()
    assert not refused, refused[:1]
    ended = await asyncio.wait_for(seen.done, 120)
    await acks.unsubscribe()
    await watch.unsubscribe()
    return commands / (ended - began), seen.order == sent, published - began


async def bench_commands(fleet: Fleet, row: Row) -> list[dict[str, Any]]:
    """10,000 commands for 200 containers at once."""
    worker = fleet.worker.process
    assert worker is not None
    spec = {"image": {"name": "base"}, "command": {"entrypoint": ["/bin/true"]}}
    for n in range(CONTAINERS):
        await fleet.client.send(f"burst-{n}", "create", spec=spec)
    for n in range(CONTAINERS):
        await fleet.client.state(f"burst-{n}", "pending", message="ready")
    await fleet.client._stop_reading()
    rows = []
    for what, verbs, name in (
        ("kill of pending ones", ("kill",), "burst"),
        ("stop, kill, stop of exited ones", ("stop", "kill"), "burst"),
        ("remove of unknown ones", ("remove",), "none"),
    ):
        rate, ordered, took = await burst(fleet, verbs, COMMANDS, CONTAINERS, name)
        print(what, took)
        rows.append(row(f"10,000 × {what}", rate, "commands/s", "1,000/s or more", rate >= 1000 and ordered))
    peak = rss_peak(worker.pid)
    rows.append(row("worker, at most", peak / 2**20, "MiB", "below 200 MB", peak < 200e6))
    return rows
