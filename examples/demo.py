"""The main job from end to end, on this machine, in a folder that is gone afterwards.

An embedded nats-server and a worker; an image; web servers, a talker, a nosy one, a greedy one; the worker is
killed and its containers are adopted; everything is removed. Run it by `make demo`.
"""

import asyncio
import contextlib
import hashlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from schemas import queries as q
from schemas.commands import RegisterImage, Remove, Run, Stop
from schemas.spec import ServiceSpec, decode_spec
from schemas.status import ContainerStatus, State
from worker.bus.failures import NoAnswer, NoResponders
from worker.bus.server import EmbeddedServer
from worker.client import FleetClient, new_id
from worker.config import NatsConfig

T = TypeVar("T")

LINES = 200_000
NODE = "demo"
BIN = Path(sys.executable).parent
PYTHON = os.path.realpath(sys.executable)
PREFIX = os.path.realpath(sys.base_prefix)

WEB = """
import http.server, os
class Hello(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = f"hello from {os.environ['SANDFLEET_CONTAINER']}".encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args): pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Hello).serve_forever()
"""
TALKER = """
import sys
sys.stdout.write("".join(f"line {n:06d}\\n" for n in range(LINES)))
"""
NOSY = """
import socket
try: open({secret!r}).read(); print("file: READ")
except OSError as e: print("file:", e.strerror)
try: socket.create_connection(("127.0.0.1", {port}), 2); print("port: CONNECTED")
except OSError as e: print("port:", e.strerror)
"""
GREEDY = """
hoard = []
while True: hoard.append(bytearray(4 << 20))
"""
TICKER = """
import time
n = 0
while True: print(n, flush=True); n += 1; time.sleep(0.005)
"""


@dataclass
class Step:
    title: str
    detail: str = ""
    took_s: float | None = None
    began: float | None = None
    failed: bool = False


class View:
    """The list of steps: live on a terminal, a line for each in a pipe."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.steps: list[Step] = []
        self._spinner = Spinner("dots", style="cyan")
        self._live: Live | None = None

    def __enter__(self) -> "View":
        if self.console.is_terminal:
            self._live = Live(self, console=self.console, refresh_per_second=12)
            self._live.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.refresh()
            self._live.__exit__(None, None, None)

    def __rich__(self) -> Group:
        table = Table.grid(padding=(0, 1))
        table.add_column(width=2)
        table.add_column(min_width=26, no_wrap=True)
        table.add_column(overflow="fold")
        table.add_column(justify="right", style="dim", width=7)
        for step in self.steps:
            if step.took_s is None and not step.failed:
                mark: Text | Spinner = self._spinner
                took = f"{time.monotonic() - (step.began or 0):.1f} s" if step.began else ""
            else:
                mark = Text("✗", style="bold red") if step.failed else Text("✓", style="bold green")
                took = "" if step.took_s is None else f"{step.took_s:.2f} s"
            table.add_row(mark, Text(step.title, style="bold"), Text.from_markup(step.detail), took)
        return Group(Text(), table)

    @contextlib.asynccontextmanager
    async def step(self, title: str) -> AsyncIterator[Step]:
        step = Step(title, began=time.monotonic())
        self.steps.append(step)
        try:
            yield step
        except BaseException:
            step.failed = True
            raise
        finally:
            step.took_s = time.monotonic() - (step.began or 0)
            if self._live is None:
                mark = "FAILED" if step.failed else "ok"
                detail = Text.from_markup(step.detail).plain
                line = f"{mark:6} {step.title:26} {detail}  ({step.took_s:.2f} s)"
                self.console.print(line, markup=False, soft_wrap=True)


class Demo:
    def __init__(self, folder: Path, view: View) -> None:
        self.folder = folder
        self.view = view
        self.data = folder / "data"
        self.token = secrets.token_urlsafe(24)
        self.server = EmbeddedServer(store_dir=folder / "nats", token=self.token)
        self.worker: subprocess.Popen[bytes] | None = None
        self.fleet: FleetClient | None = None
        self.tick = Ticks()
        self.lacking: list[str] = []
        self.boot = ""
        self._following: asyncio.Task[None] | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._killing = False

    # -- the machinery

    def start_worker(self) -> None:
        with (self.folder / "worker.log").open("ab") as log:
            self.worker = subprocess.Popen(
                [str(BIN / "sandfleet"), "worker", "--config", str(self.folder / "node.toml"), "--setup"],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    async def keep(self) -> None:
        """A service manager's part: a worker that somebody ended is started again."""
        while True:
            if self.worker is not None and self.worker.poll() is not None and not self._killing:
                self.start_worker()
            await asyncio.sleep(0.05)

    async def ask(self, question: Callable[..., Awaitable[T]], *given: object) -> T:
        """Queries are not kept for a worker that is away, as commands are: they are asked again."""
        deadline = time.monotonic() + 15
        while True:
            try:
                return await question(*given)
            except (NoResponders, NoAnswer):
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(0.05)

    async def wait_ready(self, but_not: str | None = None) -> float:
        """Wait until the node answers (under a new boot); gives the seconds it took."""
        assert self.fleet is not None
        began = time.monotonic()
        while True:
            with contextlib.suppress(Exception):
                info = await self.fleet.info(NODE)
                if info.boot != but_not:
                    self.boot = info.boot
                    return time.monotonic() - began
            if self._keeping is None and self.worker is not None and self.worker.poll() is not None:
                said = (self.folder / "worker.log").read_text()[-2000:]
                raise RuntimeError(f"the worker ended ({self.worker.returncode}) before it was ready\n{said}")
            if time.monotonic() - began > 20:
                raise RuntimeError("the worker did not answer within 20 s")
            await asyncio.sleep(0.01)

    def spec(self, code: str, **fields: object) -> ServiceSpec:
        return decode_spec(
            {
                "image": {"name": "demo/hello:1"},
                "command": {"entrypoint": [PYTHON, "-c", code]},
                "sandbox": {"read": [PREFIX]},
                "labels": {"app": "demo"},
                **fields,
            }
        )

    async def run(self, cid: str, spec: ServiceSpec) -> ContainerStatus:
        assert self.fleet is not None
        done = await self.fleet.command(NODE, cid, Run(id=new_id(), spec=spec))
        assert done.status is not None
        return done.status

    async def output(self, cid: str, until: Callable[[bytes], bool] = lambda data: False) -> bytes:
        """Everything `cid` printed, each chunk checked to follow the one before, until its run ends."""
        assert self.fleet is not None
        data = bytearray()
        async with contextlib.aclosing(
            self.fleet.log_chunks(NODE, cid, stream="stdout", follow=True)
        ) as chunks:
            async for chunk in chunks:
                if chunk.offset != len(data) or chunk.lost:
                    raise RuntimeError(f"{cid}: bytes are missing at {len(data)}")
                data += chunk.data
                if chunk.eof is not None or until(bytes(data)):
                    break
        return bytes(data)

    async def follow_ticks(self) -> None:
        assert self.fleet is not None
        async with contextlib.aclosing(
            self.fleet.log_chunks(NODE, "ticker-0", stream="stdout", follow=True)
        ) as chunks:
            async for chunk in chunks:
                self.tick.add(chunk.offset, chunk.data, chunk.eof is not None)

    # -- the story

    async def play(self) -> None:
        step = self.view.step
        async with step("a server and a worker") as told:
            url = await self.server.start()
            source = self.write_files(url)
            self.start_worker()
            self.fleet = await FleetClient.connect(NatsConfig(url=url))
            took = await self.wait_ready()
            info = await self.fleet.info(NODE)
            self._keeping = asyncio.create_task(self.keep())
            told.detail = (
                f"node [cyan]{NODE}[/] ready in {took:.2f} s under [cyan]{info.capabilities.sandbox}[/]"
            )
        lacking = [n.feature for n in info.capabilities.not_enforced if n.isolation in (None, "process")]
        async with step("an image") as told:
            done = await self.fleet.command(
                NODE, None, RegisterImage(id=new_id(), image="demo/hello:1", source_dir=str(source))
            )
            told.detail = f"demo/hello:1 is {(done.result or {})['digest'][:19]}…"
        await self.web()
        await self.talk()
        await self.nose(info.capabilities.sandbox)
        await self.hoard()
        async with step("exec inside a running one") as told:
            request = q.ExecRequest(container="web-0", argv=["/bin/sh", "-c", "cat greeting.txt"])
            reply = await self.ask(self.fleet.exec, NODE, request)
            told.detail = f"web-0 says [green]{reply.stdout.strip()}[/] (exit code {reply.exit_code})"
        await self.kill_and_adopt()
        await self.remove()
        self.lacking = sorted(set(lacking))

    def write_files(self, url: str) -> Path:
        source = self.folder / "image"
        source.mkdir()
        (source / "greeting.txt").write_text("hello from inside the image\n")
        (self.folder / "secret.txt").write_text("nobody should read this\n")
        config = self.folder / "node.toml"
        config.touch(mode=0o600)
        config.write_text(
            f'[nats]\nurl = "{url}"\n[node]\nname = "{NODE}"\ndata_dir = "{self.data}"\n'
            f'[policy]\nregister_roots = ["{source}"]\nread = ["{PREFIX}"]\n'
        )
        return source

    async def web(self) -> None:
        async with self.view.step("two replicas of a web server") as told:
            endpoints = [{"name": "http", "protocol": "http", "port": 8080}]
            spec = self.spec(WEB, endpoints=endpoints)
            both = await asyncio.gather(self.run("web-0", spec), self.run("web-1", spec))
            answers = await asyncio.gather(*(asyncio.to_thread(fetch, s.port or 0) for s in both))
            told.detail = ", ".join(
                f"[cyan]:{status.port}[/] {text}" for status, text in zip(both, answers, strict=True)
            )
            if answers != ["hello from web-0", "hello from web-1"]:
                raise RuntimeError(f"the web servers answered {answers}")

    async def talk(self) -> None:
        async with self.view.step(f"{LINES:,} lines") as told:
            expected = hashlib.sha256("".join(f"line {n:06d}\n" for n in range(LINES)).encode())
            began = time.monotonic()
            await self.run("talker-0", self.spec(TALKER.replace("LINES", str(LINES))))
            data = await self.output("talker-0")
            took = time.monotonic() - began
            if hashlib.sha256(data).digest() != expected.digest():
                raise RuntimeError("the log differs from what was printed")
            told.detail = (
                f"{len(data):,} bytes, every one confirmed: sha256 [green]{expected.hexdigest()[:16]}…[/]"
                f" ({LINES / took / 1e6:.2f} M lines/s)"
            )

    async def nose(self, sandbox: str) -> None:
        async with self.view.step("one that is too curious") as told:
            with socket.create_server(("127.0.0.1", 0)) as private:
                code = NOSY.format(secret=str(self.folder / "secret.txt"), port=private.getsockname()[1])
                await self.run("nosy-0", self.spec(code, network={"access": "localhost"}))
                lines = (await self.output("nosy-0")).decode().splitlines()
            refused = not any(line.endswith(("READ", "CONNECTED")) for line in lines)
            if not refused and "landlock" in sandbox:
                raise RuntimeError(f"the kernel did not refuse: {lines}")
            word = (
                "refused by the kernel" if refused else "[yellow]not refused: this kernel has no Landlock[/]"
            )
            told.detail = f"{word}: {'; '.join(lines)}"

    async def hoard(self) -> None:
        async with self.view.step("one that outgrows its memory") as told:
            assert self.fleet is not None
            await self.run("greedy-0", self.spec(GREEDY, resources={"memory": "96Mi"}))
            status = await self.fleet.wait(NODE, "greedy-0", timeout_s=15)
            told.detail = f"killed at 96 MiB, reason [yellow]{status.reason}[/]"
            if status.reason != "memory_limit":
                raise RuntimeError(f"greedy-0 ended with reason {status.reason}")

    async def kill_and_adopt(self) -> None:
        assert self.fleet is not None
        async with self.view.step("kill -9 of the worker") as told:
            ticker = await self.run("ticker-0", self.spec(TICKER))
            self._following = asyncio.create_task(self.follow_ticks())
            await self.until(lambda: self.tick.count > 20)
            assert self.worker is not None
            self._killing = True
            self.worker.kill()
            await asyncio.to_thread(self.worker.wait)
            await asyncio.sleep(0.5)
            living = [s.pid for s in (ticker,) if s.pid and alive(s.pid)]
            text = await asyncio.to_thread(fetch, (await self.port_of("web-0")))
            told.detail = f"the worker is dead; ticker-0 lives (pid {living[0] if living else '-'}), {text!r}"
        async with self.view.step("a new worker adopts them") as told:
            before, dead = self.tick.count, self.boot
            self._killing = False
            took = await self.wait_ready(but_not=dead)
            again = await self.ask(self.fleet.state, NODE, "ticker-0")
            if again.pid != ticker.pid or again.run != ticker.run:
                raise RuntimeError(f"ticker-0 had pid {ticker.pid} and has {again.pid}")
            await self.until(lambda: self.tick.count > before + 150)
            if self.tick.gaps:
                raise RuntimeError(f"lines are missing: {self.tick.gaps}")
            told.detail = (
                f"in {took:.2f} s, same pid {again.pid}; {self.tick.count} lines in order, none lost"
            )

    async def port_of(self, cid: str) -> int:
        assert self.fleet is not None
        snapshot = await self.ask(self.fleet.snapshot, NODE, cid)
        return next(iter(snapshot.values())).port or 0

    async def remove(self) -> None:
        assert self.fleet is not None
        async with self.view.step("stop, remove, nothing left") as told:
            statuses = await self.ask(self.fleet.containers, NODE)
            running = [s for s in statuses if s.state is State.RUNNING]
            await asyncio.gather(
                *(self.fleet.command(NODE, s.container, Stop(id=new_id(), timeout_s=2)) for s in running)
            )
            await asyncio.gather(
                *(self.fleet.command(NODE, s.container, Remove(id=new_id())) for s in statuses)
            )
            left = await self.ask(self.fleet.containers, NODE)
            pids = [s.pid for s in running if s.pid and alive(s.pid)]
            folders = list((self.data / "containers").iterdir())
            if left or pids or folders:
                raise RuntimeError(f"left behind: {left} {pids} {folders}")
            told.detail = f"{len(statuses)} containers gone: no process, no directory"

    async def until(self, condition: Callable[[], bool], deadline_s: float = 15.0) -> None:
        deadline = time.monotonic() + deadline_s
        while not condition():
            if time.monotonic() > deadline:
                raise RuntimeError("waited too long")
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        for task in (self._keeping, self._following):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        if self.fleet is not None:
            await self.fleet.close()
        if self.worker is not None and self.worker.poll() is None:
            self.worker.terminate()
            try:
                await asyncio.to_thread(self.worker.wait, 10)
            except subprocess.TimeoutExpired:
                self.worker.kill()
        await end_launcher(self.data)
        await self.server.stop()


class Ticks:
    """The numbers that ticker-0 prints, checked to be 0, 1, 2 … whoever ships them."""

    def __init__(self) -> None:
        self.count = 0
        self.gaps: list[str] = []
        self._rest = b""
        self._next_offset = 0

    def add(self, offset: int, data: bytes, last: bool) -> None:
        if offset != self._next_offset:
            self.gaps.append(f"offset {offset} instead of {self._next_offset}")
        self._next_offset = offset + len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if int(line) != self.count:
                self.gaps.append(f"{line!r} instead of {self.count}")
            self.count += 1


def fetch(port: int) -> str:
    deadline = time.monotonic() + 10
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2) as reply:
                return str(reply.read().decode())
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def end_launcher(data: Path) -> None:
    """The launcher outlives its worker on purpose; a demo that is over needs it no more."""
    from worker.datadir import DataDir
    from worker.supervisor import Launcher

    if not data.exists():
        return
    directory = DataDir.open(data, node=NODE)
    try:
        launcher = await Launcher.attach(directory, spawn=False)
        await launcher.shutdown(kill=True)
    except Exception as failure:
        print(f"the launcher was not there any more: {failure}", file=sys.stderr)
    finally:
        directory.close()


async def main() -> int:
    console = Console(highlight=False)
    folder = Path(tempfile.mkdtemp(prefix="sandfleet-demo-"))
    view = View(console)
    demo = Demo(folder, view)
    began = time.monotonic()
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    code = 0
    try:
        with view:
            await demo.play()
    except asyncio.CancelledError:
        code = 130
    except Exception as failure:
        console.print(f"\n[bold red]The demo failed:[/] {failure}")
        log = folder / "worker.log"
        if log.exists():
            console.print(log.read_text()[-3000:], markup=False)
        code = 1
    finally:
        await demo.close()
        shutil.rmtree(folder, ignore_errors=True)
    if code == 0:
        if demo.lacking:
            names = ", ".join(demo.lacking)
            console.print(f"\n  [dim]Not enforced on this machine: {names}; `sandfleet info` says why.[/]")
        console.print(f"\n  All of it in [bold]{time.monotonic() - began:.1f} s[/]. Now try it yourself:\n")
        for command, what in (
            (".venv/bin/sandfleet dev", "a node of your own; in a second terminal:"),
            (".venv/bin/sandfleet register web:1 examples/web", "then: sandfleet run examples/web.yaml"),
            (".venv/bin/sandfleet top", "watch it"),
        ):
            console.print(f"    [cyan]{command:50}[/] [dim]{what}[/]")
        console.print()
    return code


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(asyncio.run(main()))
    sys.exit(130)
