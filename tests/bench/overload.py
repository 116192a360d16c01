"""More than can be sent: 1 GB of output without a connection, what comes of it afterwards, and memory meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from tests.acceptance.distance import messages_in, peak_bytes
from tests.acceptance.harness import Fleet, P, until
from tests.bench.ledger import percentile
from tests.integration.proxy import Proxy

Row = Callable[[str, float | None, str, str, bool | None], dict[str, Any]]
Rows = list[dict[str, Any]]

MOST_BYTES = 200e6
CONTAINERS = 8
EACH_BYTES = 128_000_000
NARROW_BYTES_PER_S = 10_000_000
NARROW_S = 15.0
PROBE_EVERY_S = 0.1
COMMANDS = 20_000
PYTHON = os.path.realpath(sys.executable)
PREFIX = os.path.realpath(sys.base_prefix)
WRITER = """
import os, sys, time
total, began = int(sys.argv[1]), time.monotonic()
piece = (b"x" * 99 + b"\\n") * 640
for _ in range(total // len(piece)): os.write(1, piece)
os.write(2, b"%f" % (time.monotonic() - began))
"""


def writer(total: int) -> dict[str, Any]:
    """A container that prints so much, and then tells on its other stream how many seconds it took."""
    return {
        "image": {"name": "base"},
        "command": {"entrypoint": [PYTHON, "-c", WRITER, str(total)]},
        "sandbox": {"read": [PREFIX]},
    }


async def measure(fleet: Fleet, row: Row) -> Rows:
    fleet.worker.terminate()
    async with Proxy(fleet.server.port) as proxy:
        fleet.worker.server = proxy  # type: ignore[assignment]
        fleet.worker.start()
        await fleet.ready(boots=2)
        rows = await output(fleet, proxy, row)
        rows += await commands(fleet, row)
        fleet.worker.terminate()
    fleet.worker.server = fleet.server
    fleet.worker.start()
    return rows


class Ends:
    """The log messages of the containers as they are stored: bytes, marked losses, and when each one ended."""

    def __init__(self, cids: list[str]) -> None:
        self.bytes = dict.fromkeys(cids, 0)
        self.lost = dict.fromkeys(cids, 0)
        self.next = dict.fromkeys(cids, 0)
        self.ordered = True
        self.took = dict.fromkeys(cids, 0.0)
        self.ended: dict[str, float] = {}
        self._seen: set[str] = set()

    async def on(self, message: Any) -> None:
        cid, stream = message.subject.split(".")[-2:]
        headers = message.headers or {}
        # What was sent twice is published twice, and stored once.
        if cid not in self.bytes or headers["Nats-Msg-Id"] in self._seen:
            return
        self._seen.add(headers["Nats-Msg-Id"])
        if stream == "stderr":
            if message.data:
                self.took[cid] = float(message.data)
            return
        lost = int(headers.get("Sandfleet-Lost", 0))
        self.ordered = self.ordered and int(headers["Sandfleet-Offset"]) == self.next[cid]
        self.next[cid] += len(message.data) + lost
        self.bytes[cid] += len(message.data)
        self.lost[cid] += lost
        if "Sandfleet-Eof" in headers:
            self.ended[cid] = time.perf_counter()


async def output(fleet: Fleet, proxy: Proxy, row: Row) -> Rows:
    client, node = fleet.client, fleet.client.node
    await client.follow_live(lambda event: None)
    alone = await with_a_connection(fleet)
    cids = [f"loud{n}-0" for n in range(CONTAINERS)]
    ends = Ends(cids)
    sub = await client.nc.subscribe(
        f"{P}.log.{node}.>", cb=ends.on, pending_bytes_limit=1 << 30, pending_msgs_limit=1 << 20
    )
    for cid in cids:
        await client.ok(cid, "create", spec=writer(EACH_BYTES))
    for cid in cids:
        await client.ok(cid, "start")
    proxy.closed = True
    await proxy.break_all()
    records = [fleet.worker.data / "containers" / cid / "state" / "exit.json" for cid in cids]
    await until(lambda: all(record.exists() for record in records), 300, "all have printed")
    rows = memory(fleet, row, "1 GB printed without a connection")

    proxy.bytes_per_s, proxy.closed = NARROW_BYTES_PER_S, False
    await fleet_answers(fleet)
    narrow = await probe(fleet, asyncio.sleep(NARROW_S))
    still = len(ends.ended) < CONTAINERS
    proxy.bytes_per_s = 0
    began, before = time.perf_counter(), sum(ends.bytes.values())
    wide = await probe(fleet, until(lambda: len(ends.ended) == CONTAINERS, 300, "all is delivered"))
    rate = (sum(ends.bytes.values()) - before) / (max(ends.ended.values()) - began)
    await until(lambda: all(ends.took.values()), 30, "all have told how long they took")
    await sub.unsubscribe()
    together = CONTAINERS * EACH_BYTES / max(ends.took.values())
    printed = EACH_BYTES // 64000 * 64000
    whole = ends.ordered and all(ends.bytes[cid] + ends.lost[cid] == printed for cid in cids)
    delivered, lost = sum(ends.bytes.values()), sum(ends.lost.values())
    rows = [
        row("one container prints, with a connection", alone / 1e6, "MB/s", "for scale", None),
        row(f"{CONTAINERS} print 1 GB, without", together / 1e6, "MB/s", "no less", together >= 0.5 * alone),
        *rows,
        row("of that delivered afterwards", delivered / 1e6, "MB", "in order, the rest marked", whole),
        row("of that marked as lost", lost / 1e6, "MB", "more than 64 MiB each", whole),
        row("delivered, on a way without limit", rate / 1e6, "MB/s", "", None),
    ]
    way = f"on a way of {NARROW_BYTES_PER_S / 1e6:.0f} MB/s" + ("" if still else " (idle at the end)")
    for where, times in ((way, narrow), ("on a way without limit", wide)):
        p50, most = statistics.median(times), max(times)
        rows.append(row(f"a command beside the backlog, {where}", p50, "s p50", "below 1 s", p50 < 1))
        rows.append(row(f"a command beside the backlog, {where}", percentile(times, 0.95), "s p95", "", None))
        rows.append(row(f"a command beside the backlog, {where}", most, "s at most", "below 5 s", most < 5))
    rows += memory(fleet, row, "while it is delivered")
    for cid in cids:
        await client.ok(cid, "remove")
    return rows


async def with_a_connection(fleet: Fleet) -> float:
    """Bytes per second as one container sees them."""
    ends = Ends(["alone-0"])
    sub = await fleet.client.nc.subscribe(f"{P}.log.{fleet.client.node}.alone-0.stderr", cb=ends.on)
    await fleet.client.ok("alone-0", "run", spec=writer(EACH_BYTES))
    await until(lambda: ends.took["alone-0"], 120, "it has printed")
    await sub.unsubscribe()
    await fleet.client.ok("alone-0", "remove")
    return EACH_BYTES / ends.took["alone-0"]


async def fleet_answers(fleet: Fleet) -> None:
    await fleet.client.event(lambda e: _is(e, "loud0-0", "exited"), 60)


def _is(event: dict[str, Any], cid: str, state: str) -> bool:
    return event["type"] == "state_changed" and (event["container"], event["status"]["state"]) == (cid, state)


async def probe(fleet: Fleet, while_: Any) -> list[float]:
    """Seconds from a command to the completion seen, again and again until `while_` is done."""
    times: list[float] = []
    working = asyncio.ensure_future(while_)
    while not working.done():
        began = time.perf_counter()
        await fleet.client.do(f"none-{len(times)}", "remove")
        times.append(time.perf_counter() - began)
        await asyncio.wait({working}, timeout=PROBE_EVERY_S)
    await working
    return times


async def commands(fleet: Fleet, row: Row) -> Rows:
    """Commands for one container that is busy stopping: all are accepted, and wait in the worker."""
    client = fleet.client
    script = (
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(3600)"
    )
    spec = {**writer(0), "command": {"entrypoint": [PYTHON, "-c", script]}}
    await client.ok("busy-0", "run", spec=spec)
    await client.log_seen("busy-0", b"up\n")
    await client.send("busy-0", "stop", timeout_s=120)
    await client.state("busy-0", "stopping")
    labels = {f"label{n}": "v" * 30 for n in range(50)}
    numbers = iter(range(COMMANDS))
    began = time.perf_counter()

    async def publish() -> None:
        for n in numbers:
            body = {"type": "create", "id": f"busy-{n}", "spec": {**spec, "labels": labels}}
            await client.publish(f"{P}.cmd.{client.node}.busy-0.create", json.dumps(body).encode())

    await asyncio.gather(*(publish() for _ in range(16)))
    async with asyncio.timeout(120):
        while await messages_in(client, "SANDFLEET_CMD"):
            await asyncio.sleep(0.05)
    rate = COMMANDS / (time.perf_counter() - began)
    refused = sum(
        e["type"] == "command_completed" and (e["error"] or {}).get("code") == "resource_exhausted"
        for e in client.events
    )
    await client.send("busy-0", "remove")
    await client.event(lambda e: _is(e, "busy-0", "removed"), 120)
    what = f"{COMMANDS:,} commands for a busy container"
    return [
        row(what, rate, "commands/s", "", None),
        row(f"{what}: of these refused", refused, "commands", "", None),
        *memory(fleet, row, what),
    ]


def memory(fleet: Fleet, row: Row, when: str) -> Rows:
    process, launcher = fleet.worker.process, fleet.worker.launcher_pid()
    assert process is not None
    assert launcher is not None
    rows = []
    for name, pid in (("worker", process.pid), ("launcher", launcher)):
        peak = peak_bytes(pid)
        rows.append(
            row(f"{when}: {name}'s memory, at most", peak / 2**20, "MiB", "below 200 MB", peak < MOST_BYTES)
        )
    return rows
