"""`make bench`: what a fleet feels, each figure beside its rival or limit, measured in the same run.

Prints tables and writes bench-results.json. Give names to run only some: start sandbox network burst logs quiet idle adopt images pulls
commands journal visible backlog far overload.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.acceptance.harness import Fleet, P, until
from tests.bench import far, images, journal, ledger, network, overload, pulls, sandbox

CONFIG = '[node]\nstats_interval_s = 10\n[policy]\nregister_roots = ["{images}"]\nread = ["{prefix}"]\n'
BWRAP = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "true"]
TRUE = {"image": {"name": "base"}, "command": {"entrypoint": ["/bin/true"]}}
SLEEP = {"image": {"name": "base"}, "command": {"entrypoint": ["/bin/sleep", "3600"]}}
PYTHON = os.path.realpath(sys.executable)
PREFIX = os.path.realpath(sys.base_prefix)

Rows = list[dict[str, Any]]


def row(what: str, value: float | None, unit: str, limit: str, ok: bool | None) -> dict[str, Any]:
    return {
        "what": what,
        "value": None if value is None else round(value, 3),
        "unit": unit,
        "beside": limit,
        "ok": ok,
    }


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def rival(argv: list[str], rounds: int) -> list[float] | None:
    """Milliseconds of whole runs of another program; None when it is not there or does not work here."""
    if shutil.which(argv[0]) is None:
        return None
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        if subprocess.run(argv, capture_output=True, check=False).returncode != 0:
            return None
        times.append((time.perf_counter() - began) * 1e3)
    return times


class Watch:
    """The node's state events as they arrive: the moment each container was seen in a state."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, str, int], float] = {}
        self._waiting: dict[tuple[str, str, int], asyncio.Future[float]] = {}

    async def start(self, fleet: Fleet) -> None:
        await fleet.client.follow_live(self._on)

    def _on(self, event: dict[str, Any]) -> None:
        if event["type"] != "state_changed":
            return
        now = time.perf_counter()
        status = event["status"]
        key = (status["container"], status["state"], status["run"])
        self.seen.setdefault(key, now)
        if key in self._waiting and not self._waiting[key].done():
            self._waiting[key].set_result(now)

    async def when(self, cid: str, state: str, run: int) -> float:
        key = (cid, state, run)
        if key not in self.seen:
            self._waiting[key] = asyncio.get_running_loop().create_future()
            await asyncio.wait_for(self._waiting[key], 30)
        return self.seen[key]


async def bench_start(fleet: Fleet) -> Rows:
    """Published → `running` seen, one at a time, with the rivals run in between."""
    watch = Watch()
    await watch.start(fleet)
    await fleet.client.ok("start-0", "create", spec=TRUE)
    times: dict[str, list[float]] = {"start": [], "run": [], "bwrap": [], "true": []}
    have_bwrap = rival(BWRAP, 3) is not None
    for n in range(1, 201):
        began = time.perf_counter()
        await fleet.client.send("start-0", "start")
        times["start"].append((await watch.when("start-0", "running", n) - began) * 1e3)
        await watch.when("start-0", "exited", n)
        began = time.perf_counter()
        await fleet.client.send(f"once-{n}", "run", spec=TRUE)
        times["run"].append((await watch.when(f"once-{n}", "running", 1) - began) * 1e3)
        await watch.when(f"once-{n}", "exited", 1)
        await fleet.client.ok(f"once-{n}", "remove")
        if have_bwrap:
            times["bwrap"] += rival(BWRAP, 1) or []
        times["true"] += rival(["true"], 1) or []
    rows = [
        row(
            "fork, exec, wait of /bin/true by Python",
            statistics.median(times["true"]),
            "ms p50",
            "for scale",
            None,
        )
    ]
    bwrap = statistics.median(times["bwrap"]) if times["bwrap"] else None
    rows.append(
        row(
            "bwrap --unshare-all … true",
            bwrap,
            "ms p50",
            "the rival" if bwrap else "bwrap is not installed",
            None,
        )
    )
    for verb in ("start", "run"):
        p50, p99 = statistics.median(times[verb]), percentile(times[verb], 0.99)
        rows.append(
            row(
                f"`{verb}` published → running seen",
                p50,
                "ms p50",
                "below bwrap",
                None if bwrap is None else p50 < bwrap,
            )
        )
        rows.append(row(f"`{verb}` published → running seen", p99, "ms p99", "below 20 ms", p99 < 20))
    return rows


async def bench_sandbox(fleet: Fleet) -> Rows:
    have_bwrap = rival(BWRAP, 1) is not None
    path = shutil.which("bwrap") or ""
    return await asyncio.to_thread(
        sandbox.rows, row, [path, *BWRAP[1:]] if have_bwrap else None, [os.path.realpath("/bin/true")]
    )


async def bench_network(fleet: Fleet) -> Rows:
    return await network.rows(fleet, row)


async def bench_burst(fleet: Fleet) -> Rows:
    watch = Watch()
    await watch.start(fleet)
    began = time.perf_counter()
    for n in range(200):
        await fleet.client.nc.publish(*command(fleet, f"burst-{n}", "run", spec=SLEEP))
    last = max(await asyncio.gather(*(watch.when(f"burst-{n}", "running", 1) for n in range(200))))
    rate = 200 / (last - began)
    for n in range(200):
        await fleet.client.nc.publish(*command(fleet, f"burst-{n}", "remove"))
    await asyncio.gather(*(watch.when(f"burst-{n}", "removed", 1) for n in range(200)))
    return [row("200 `run` at once", rate, "starts/s", "100/s or more", rate >= 100)]


async def bench_pulls(fleet: Fleet) -> Rows:
    return await asyncio.to_thread(pulls.rows, row)


def command(fleet: Fleet, cid: str, verb: str, **fields: Any) -> tuple[str, bytes]:
    body = {"type": verb, "id": f"{cid}-{verb}-{time.time_ns()}", **fields}
    return f"{P}.cmd.{fleet.client.node}.{cid}.{verb}", json.dumps(body).encode()


async def bench_logs(fleet: Fleet) -> Rows:
    """Lines of 100 bytes from a container to a core subscriber, beside a bare JetStream publisher."""
    lines = 3_000_000
    bare = await bare_publisher(fleet, lines)
    total = done = 0
    finished: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    async def on(message: Any) -> None:
        nonlocal total
        total += len(message.data)
        if "Sandfleet-Eof" in (message.headers or {}) and not finished.done():
            finished.set_result(time.perf_counter())

    sub = await fleet.client.nc.subscribe(
        f"{P}.log.{fleet.client.node}.chatty-0.stdout",
        cb=on,
        pending_bytes_limit=1 << 30,
        pending_msgs_limit=1 << 20,
    )
    code = f"import os\nb = (b'x' * 99 + b'\\n') * 640\nfor _ in range({lines // 640}): os.write(1, b)"
    spec = {"image": {"name": "base"}, "command": {"entrypoint": [PYTHON, "-c", code]}, "sandbox": {"read": [PREFIX]},
            "logs": {"max_size_bytes": 1 << 30}}  # fmt: skip
    began = time.perf_counter()
    await fleet.client.send("chatty-0", "run", spec=spec)
    ended = await asyncio.wait_for(finished, 120)
    await sub.unsubscribe()
    done = total // 100
    rate = done / (ended - began) / 1e6
    await fleet.client.ok("chatty-0", "remove")
    ratio = rate / bare
    return [
        row("bare JetStream publisher, 64 KiB chunks", bare, "M lines/s", "the limit", None),
        row("container → core subscriber", rate, "M lines/s", "", None),
        row("container ÷ bare", ratio, "", "0.6 or more", ratio >= 0.6 and done == lines // 640 * 640),
    ]


async def bare_publisher(fleet: Fleet, lines: int) -> float:
    """M lines/s of 64 KiB chunks into the log stream, 32 in flight, with a subscriber counting them."""
    nc = fleet.client.nc
    chunk = (b"x" * 99 + b"\n") * 640
    window = asyncio.Semaphore(32)
    inbox = nc.new_inbox()

    async def on_ack(_: Any) -> None:
        window.release()

    got = 0

    async def on_chunk(message: Any) -> None:
        nonlocal got
        got += 1

    subject = f"{P}.log.bare.bench-0.stdout"
    acks = await nc.subscribe(inbox, cb=on_ack)
    reader = await nc.subscribe(subject, cb=on_chunk, pending_bytes_limit=1 << 30, pending_msgs_limit=1 << 20)
    began = time.perf_counter()
    for n in range(lines // 640):
        await window.acquire()
        await nc.publish(subject, chunk, reply=inbox, headers={"Nats-Msg-Id": f"bare/{n}/{began}"})
    for _ in range(32):
        await window.acquire()
    await until(lambda: got >= lines // 640, deadline_s=60)
    took = time.perf_counter() - began
    await acks.unsubscribe()
    await reader.unsubscribe()
    return lines / took / 1e6


async def bench_quiet(fleet: Fleet) -> Rows:
    delays: list[float] = []

    async def on(message: Any) -> None:
        now = time.time()
        delays.extend((now - float(line)) * 1e3 for line in message.data.split())

    sub = await fleet.client.nc.subscribe(f"{P}.log.{fleet.client.node}.quiet-0.stdout", cb=on)
    code = "import time\nfor _ in range(40): print(time.time(), flush=True); time.sleep(0.25)"
    spec = {
        "image": {"name": "base"},
        "command": {"entrypoint": [PYTHON, "-c", code]},
        "sandbox": {"read": [PREFIX]},
    }
    await fleet.client.ok("quiet-0", "run", spec=spec)
    await until(lambda: len(delays) >= 40, deadline_s=30)
    await sub.unsubscribe()
    await fleet.client.ok("quiet-0", "remove")
    p50 = statistics.median(delays)
    return [
        row("a line after silence, printed → seen", p50, "ms p50", "below 5 ms", p50 < 5),
        row("a line after silence, printed → seen", percentile(delays, 0.99), "ms p99", "", None),
    ]


async def bench_idle(fleet: Fleet) -> Rows:
    """300 containers that sleep: processor and memory of worker and launcher; then a new worker."""
    worker = fleet.worker.process
    assert worker is not None
    empty = rss(worker.pid)
    watch = Watch()
    await watch.start(fleet)
    for n in range(300):
        await fleet.client.nc.publish(*command(fleet, f"idle-{n}", "run", spec=SLEEP))
    await asyncio.gather(*(watch.when(f"idle-{n}", "running", 1) for n in range(300)))
    launcher = fleet.worker.launcher_pid()
    assert launcher is not None
    await asyncio.sleep(3)
    before, began = cpu_s(worker.pid) + cpu_s(launcher), time.perf_counter()
    await asyncio.sleep(20)
    share = (cpu_s(worker.pid) + cpu_s(launcher) - before) / (time.perf_counter() - began) * 100
    full = rss(worker.pid)
    rows = [
        row("300 idle containers, worker + launcher", share, "% of a core", "below 3 %", share < 3),
        row("launcher", rss(launcher) / 2**20, "MiB", "below 40 MB", rss(launcher) < 40e6),
        row("worker", full / 2**20, "MiB", "below 120 MB", full < 120e6),
        row(
            "worker, per container",
            (full - empty) / 300 / 1024,
            "KiB",
            "below 100 KB",
            (full - empty) / 300 < 100e3,
        ),
    ]
    pids = {s["container"]: s["pid"] for s in await all_statuses(fleet)}
    fleet.worker.kill()
    began = time.perf_counter()
    fleet.worker.start()
    while True:
        with contextlib.suppress(Exception):
            now = await all_statuses(fleet)
            if len(now) == 300:
                break
        await asyncio.sleep(0.005)
    took = time.perf_counter() - began
    same = {s["container"]: s["pid"] for s in now if s["state"] == "running"} == pids
    rows.append(
        row(
            "new worker: started → 300 containers adopted, answering",
            took,
            "s",
            "below 1 s",
            took < 1 and same,
        )
    )
    for n in range(300):
        await fleet.client.nc.publish(*command(fleet, f"idle-{n}", "remove"))
    await asyncio.gather(*(watch.when(f"idle-{n}", "removed", 1) for n in range(300)))
    fleet.worker.terminate()
    began = time.perf_counter()
    fleet.worker.start()
    while True:
        with contextlib.suppress(Exception):
            await fleet.client.nc.request(f"{P}.rpc.{fleet.client.node}.info", b"{}", timeout=0.2)
            break
        await asyncio.sleep(0.005)
    took = time.perf_counter() - began
    rows.append(row("worker: started → answering", took, "s", "below 1 s", took < 1))
    return rows


async def all_statuses(fleet: Fleet) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    cursor = None
    while True:
        fields = {} if cursor is None else {"cursor": cursor}
        page = await fleet.client.query("list", timeout=0.5, **fields)
        found += page["containers"]
        cursor = page["cursor"]
        if cursor is None:
            return found


def rss(pid: int) -> int:
    """Resident bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def bench_images(fleet: Fleet) -> Rows:
    """See `images`."""
    return await images.measure(fleet, row)


BENCHES: dict[str, Callable[[Fleet], Awaitable[Rows]]] = {
    "start": bench_start,
    "sandbox": bench_sandbox,
    "network": bench_network,
    "burst": bench_burst,
    "logs": bench_logs,
    "quiet": bench_quiet,
    "idle": bench_idle,
    "images": bench_images,
    "pulls": bench_pulls,
    "commands": lambda fleet: ledger.commands(fleet, row),
    "visible": lambda fleet: ledger.visible(fleet, row),
    "backlog": lambda fleet: ledger.backlog(fleet, row),
    "adopt": lambda fleet: ledger.adopt(fleet, row),
    "journal": lambda fleet: journal.measure(fleet, row),
    "far": lambda fleet: far.measure(fleet, row),
    "overload": lambda fleet: overload.measure(fleet, row),
}


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="which to run (default: all)")
    parser.add_argument("--output", default="bench-results.json")
    options = parser.parse_args()
    console = Console()
    results: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.release()}",
        "rows": {},
    }
    missed = 0
    for name in options.names or BENCHES:
        async with Fleet(CONFIG) as fleet:
            await fleet.register("base")
            rows = await BENCHES[name](fleet)
        results["rows"][name] = rows
        table = Table(title=name, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
        for column in ("what", "value", "", "beside", ""):
            table.add_column(column, justify="right" if column == "value" else "left")
        for r in rows:
            verdict = {True: "[green]✓[/]", False: "[red]missed[/]", None: ""}[r["ok"]]
            missed += r["ok"] is False
            value = "-" if r["value"] is None else f"{r['value']:,.2f}"
            table.add_row(r["what"], value, r["unit"], r["beside"], verdict)
        console.print(table)
        console.print()
    Path(options.output).write_text(json.dumps(results, indent=2) + "\n")
    console.print(f"{missed} limits missed; written to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
