"""A node far from its server: commands, events and logs at 20, 100 and 300 ms round trip, and near it for scale.

The node's side runs through a delay line in a process of its own (tests/integration/proxy.py); a publisher that
keeps nothing back and expects nothing goes through the same line, as the limit.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import nats

from tests.acceptance.harness import Fleet, P, until
from tests.bench.ledger import burst, drain, peak_bytes

Row = Callable[[str, float | None, str, str, bool | None], dict[str, Any]]
Rows = list[dict[str, Any]]

ROUND_TRIPS_MS = (0, 20, 100, 300)
LIMITED_MS = 20
CONTAINERS = 200
COMMANDS = 4000
EVENTS = {0: 20_000, 20: 20_000, 100: 10_000, 300: 5_000}
LOG_BYTES = {0: 400_000_000, 20: 400_000_000, 100: 200_000_000, 300: 200_000_000}
CHUNK = (b"x" * 99 + b"\n") * 2560
WINDOW = 64
PYTHON = os.path.realpath(sys.executable)
PREFIX = os.path.realpath(sys.base_prefix)


class Line:
    """Stands where a worker expects its server."""

    def __init__(self, port: int) -> None:
        self.url = f"nats://127.0.0.1:{port}"


@asynccontextmanager
async def line(server_port: int, round_trip_ms: int) -> AsyncIterator[Line]:
    argv = [sys.executable, "-m", "tests.integration.proxy", str(server_port), str(round_trip_ms / 2000)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield Line(int(await asyncio.to_thread(process.stdout.readline)))
    finally:
        process.terminate()
        process.communicate()


async def measure(fleet: Fleet, row: Row) -> Rows:
    spec = {"image": {"name": "base"}, "command": {"entrypoint": ["/bin/true"]}}
    for n in range(CONTAINERS):
        await fleet.client.send(f"far-{n}", "create", spec=spec)
    for n in range(CONTAINERS):
        await fleet.client.state(f"far-{n}", "pending", message="ready")
    rows: Rows = []
    await fleet.client.follow_live(lambda event: None)  # it costs less beside what is measured
    for boots, round_trip_ms in enumerate(ROUND_TRIPS_MS, 2):
        fleet.worker.terminate()
        async with line(fleet.server.port, round_trip_ms) as way:
            fleet.worker.server = way  # type: ignore[assignment]
            fleet.worker.start()
            await fleet.ready(boots)
            rows += await at(fleet, row, way, round_trip_ms)
            fleet.worker.terminate()
        fleet.worker.server = fleet.server
        fleet.worker.start()
    return rows


async def at(fleet: Fleet, row: Row, way: Line, round_trip_ms: int) -> Rows:
    limited = round_trip_ms == LIMITED_MS
    here = f"at {round_trip_ms} ms: " if round_trip_ms else "near: "
    bare_events, bare_bytes = await bare(way, round_trip_ms)
    rows = [
        row(f"{here}bare publisher, small messages", bare_events, "messages/s", "the limit", None),
        row(f"{here}bare publisher, 256 KB", bare_bytes / 1e6, "MB/s", "the limit", None),
    ]
    count = EVENTS[round_trip_ms]
    took, stored = await drain(fleet, way.url, f"backlog{round_trip_ms}", count)
    events, wanted = count / took, "2,000/s or more, each once" if limited else "each once"
    ok = stored == count and (not limited or events >= 2000)
    rows.append(row(f"{here}{count:,} events of a journal", events, "events/s", wanted, ok))
    commands, ordered = await burst(fleet, ("kill",), COMMANDS, CONTAINERS, "far")
    rows.append(row(f"{here}{COMMANDS:,} commands done", commands, "commands/s", "in order", ordered))
    rate, whole = await logs(fleet, LOG_BYTES[round_trip_ms])
    wanted = "50 MB/s or more, every byte" if limited else "every byte"
    rows.append(row(f"{here}logs", rate / 1e6, "MB/s", wanted, whole and (not limited or rate >= 50e6)))
    assert fleet.worker.process is not None
    peak = peak_bytes(fleet.worker.process.pid)
    rows.append(row(f"{here}worker's memory, at most", peak / 2**20, "MiB", "below 200 MB", peak < 200e6))
    return rows


async def logs(fleet: Fleet, total: int) -> tuple[float, bool]:
    """Bytes per second from `run` to the last one seen at the server, and whether each was there once."""
    nc, seen, whole = fleet.client.nc, 0, True
    finished: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    async def on(message: Any) -> None:
        nonlocal seen, whole
        headers = message.headers or {}
        whole = whole and int(headers["Sandfleet-Offset"]) == seen and "Sandfleet-Lost" not in headers
        seen += len(message.data)
        if "Sandfleet-Eof" in headers and not finished.done():
            finished.set_result(time.perf_counter())

    sub = await nc.subscribe(
        f"{P}.log.{fleet.client.node}.chatty-0.stdout",
        cb=on,
        pending_bytes_limit=1 << 30,
        pending_msgs_limit=1 << 20,
    )
    await nc.flush()
    code = f"import os\nb = (b'x' * 99 + b'\\n') * 640\nfor _ in range({total // 64000}): os.write(1, b)"
    spec = {"image": {"name": "base"}, "command": {"entrypoint": [PYTHON, "-c", code]}, "sandbox": {"read": [PREFIX]},
            "logs": {"max_size_bytes": 1 << 30}}  # fmt: skip
    began = time.perf_counter()
    await fleet.client.send("chatty-0", "run", spec=spec)
    ended = await asyncio.wait_for(finished, 120)
    await sub.unsubscribe()
    await fleet.client.ok("chatty-0", "remove")
    return total / (ended - began), whole and seen == total


async def bare(way: Line, round_trip_ms: int) -> tuple[float, float]:
    """Messages per second of 500 bytes into the event stream, unordered, 500 under way, and bytes per second into the
    log stream, 64 chunks under way.
    """
    nc = await nats.connect(way.url, pending_size=1 << 30)
    try:
        small = await pipelined(nc, f"{P}.evt.bare.x-0.state", b"x" * 500, EVENTS[round_trip_ms], 500)
        chunks = LOG_BYTES[round_trip_ms] // 4 // len(CHUNK)
        large = await pipelined(nc, f"{P}.log.bare.x-0.stdout", CHUNK, chunks, WINDOW)
    finally:
        await nc.close()
    return small, large * len(CHUNK)


async def pipelined(nc: Any, subject: str, data: bytes, count: int, window: int) -> float:
    places, inbox = asyncio.Semaphore(window), nc.new_inbox()
    failed: list[bytes] = []
    stored = 0

    async def on_ack(message: Any) -> None:
        nonlocal stored
        if b'"error"' in message.data or not message.data:
            failed.append(message.data)
        stored += 1
        places.release()

    acks = await nc.subscribe(inbox, cb=on_ack)
    began = time.perf_counter()
    for _ in range(count):
        await places.acquire()
        await nc.publish(subject, data, reply=inbox)
    await until(lambda: stored == count, deadline_s=120)
    took = time.perf_counter() - began
    await acks.unsubscribe()
    assert not failed, json.dumps([text.decode() for text in failed[:2]])
    return count / took
