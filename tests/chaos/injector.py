"""Does to the processes of a run what `faults` planned, and tells the history what that may have cost."""

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from .entry import write_knobs
from .history import EVENTS, History
from .plan import Action
from .processes import Worker
from .publisher import Publisher
from .reader import Reader
from .servers import API_S, PATIENCE_S, POLL_S, ServerFaults
from .world import World

START_S = 5.0  # a worker that saw the full disk may take so long to end
REFUSED = 4  # the exit code of a worker that may not run here


class Injector(ServerFaults):
    """`nc` is a connection straight to the servers; `poke` has the node publish something."""

    def __init__(
        self,
        world: World,
        reader: Reader,
        history: History,
        nc: Any,
        publisher: Publisher,
        poke: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(world, reader, history, nc, publisher)
        self._poke = poke
        self._disk_lock = asyncio.Lock()
        self._full_until = float("-inf")

    async def do(self, action: Action) -> None:
        act: Callable[..., Awaitable[None]] = getattr(self, f"do_{action.kind}")
        await act(**action.args)

    async def heal(self) -> None:
        """Everything runs again, unhindered."""
        world = self._world
        world.link.heal()
        write_knobs(world.worker.knobs)
        async with world.server_lock, world.worker_lock:
            for server in world.servers:
                if server.process is None:
                    await asyncio.to_thread(server.start)
            if not world.worker.running:
                world.worker.start()

    async def watch(self) -> None:
        """A worker that ends by itself is a fault; it is started again. That it does not begin on a full disk is
        none.
        """
        while True:
            await asyncio.sleep(POLL_S * 5)
            if self._world.worker_lock.locked():
                continue
            process = self._world.worker.process
            if process is not None and process.poll() is not None:
                if not self._had_no_space(process.returncode):
                    self._history.faults.append(f"the worker ended by itself with {process.returncode}")
                self._world.worker.start()

    def _had_no_space(self, code: int) -> bool:
        """A worker that does not begin on a full disk says so and ends, whoever waits for it."""
        return code == REFUSED and self._publisher.now() <= self._full_until

    # -- processes

    async def do_worker_kill(self, pause_s: float) -> None:
        async with self._world.worker_lock:
            await self._kill_worker()
            await asyncio.sleep(pause_s)
            self._world.worker.start()

    async def _kill_worker(self) -> None:
        if self._world.worker.process is not None:
            await asyncio.to_thread(self._world.worker.kill)

    async def do_worker_restart(self, pause_s: float) -> None:
        """In order, as for an upgrade."""
        async with self._world.worker_lock:
            if self._world.worker.running:
                code = await asyncio.to_thread(self._world.worker.terminate)
                # The signal itself, when it had hardly begun.
                if code not in (0, -signal.SIGTERM) and not self._had_no_space(code):
                    self._history.faults.append(f"the worker ended with {code} when it was told to end")
            await asyncio.sleep(pause_s)
            self._world.worker.start()

    async def do_worker_stop(self, hold_s: float) -> None:
        async with self._world.worker_lock:
            worker = self._world.worker
            worker.signal(signal.SIGSTOP)
            await asyncio.sleep(hold_s)
            worker.signal(signal.SIGCONT)

    async def do_launcher_kill(self) -> None:
        self._signal_launcher(signal.SIGKILL)

    async def do_launcher_stop(self, hold_s: float) -> None:
        pid = self._signal_launcher(signal.SIGSTOP)
        await asyncio.sleep(hold_s)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def _signal_launcher(self, number: int) -> int | None:
        pid = self._world.worker.launcher_pid()
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return pid

    async def do_both_kill(self, pause_s: float) -> None:
        async with self._world.worker_lock:
            launcher = self._world.worker.launcher_pid()
            await self._kill_worker()
            if launcher is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(launcher, signal.SIGKILL)
            await asyncio.sleep(pause_s)
            self._world.worker.start()

    # -- the link

    async def do_link_cut(self) -> None:
        await self._world.link.cut()

    async def do_link_delay(self, delay_s: float, hold_s: float) -> None:
        self._world.link.delay_s = delay_s
        await asyncio.sleep(hold_s)
        self._world.link.delay_s = 0.0

    async def do_link_half_open(self, way: str, then: str, hold_s: float) -> None:
        self._world.link.hold(*(("up", "down") if way == "both" else (way,)))
        await asyncio.sleep(hold_s)
        if then == "cut":
            await self._world.link.cut()
        self._world.link.hold()

    async def do_link_throttle(self, bytes_per_s: int, hold_s: float) -> None:
        self._world.link.bytes_per_s = bytes_per_s
        await asyncio.sleep(hold_s)
        self._world.link.bytes_per_s = 0

    # -- disk and clock

    async def do_disk_full(self, hold_s: float) -> None:
        """Only where the node's disk is one of the run's own (`World.private`)."""
        filler = self._world.disk / "filler"
        async with self._disk_lock:
            self._full_until = float("inf")
            try:
                await asyncio.to_thread(_fill, filler)
                await asyncio.sleep(hold_s)
            finally:
                filler.unlink(missing_ok=True)
                self._full_until = self._publisher.now() + START_S

    async def do_slow_fsync(self, commit_ms: int, hold_s: float) -> None:
        write_knobs(self._world.worker.knobs, commit_ms=commit_ms)
        await asyncio.sleep(hold_s)
        write_knobs(self._world.worker.knobs)

    async def do_clock_jump(self, by_s: float, hold_s: float) -> None:
        write_knobs(self._world.worker.knobs, clock_s=by_s)
        await asyncio.sleep(hold_s)
        write_knobs(self._world.worker.knobs)

    # -- others under the same name

    async def do_second_worker(self, data: str) -> None:
        """It must find out that it may not run, publish nothing, and end."""
        world = self._world
        async with world.server_lock, world.worker_lock:
            if not await self._answers() or not (await self._state(EVENTS))["messages"]:
                return  # nothing there that could tell it
            number = len(world.others)
            folder = world.folder / f"second-{number}-data"
            if data == "copied":
                await asyncio.to_thread(_copy_journal, world.worker.data, folder)
                await self._poke()
            second = world.another(f"second-{number}", world.worker.data if data == "same" else folder)
            second.start()
            code = await self._end_of(second)
            if code != REFUSED:
                self._history.faults.append(f"a second worker ({data} data) ended with {code}")
            if data != "same":
                await self._end_launcher(second)

    async def do_usurp(self, hold_s: float) -> None:
        """Another one takes the name over; the first is fenced. Later the other is lost, and the first
        takes the name back.
        """
        world, worker = self._world, self._world.worker
        async with world.server_lock, world.worker_lock:
            if not await self._answers():
                return
            number = len(world.others)
            usurper = world.another(f"usurper-{number}", world.folder / f"usurper-{number}-data")
            epochs = {event["epoch"] for event in self._reader.events}
            usurper.start("--takeover")
            doomed = await self._new_epoch(epochs)
            if doomed is None:
                self._history.faults.append("a takeover was not completed")
                return
            self._history.takeovers += 1
            self._history.doomed.append(doomed)
            code = await self._end_of(worker)
            if code != REFUSED:
                self._history.faults.append(f"the worker whose name was taken ended with {code}")
            await asyncio.sleep(hold_s)
            await asyncio.to_thread(usurper.terminate)
            await self._end_launcher(usurper)
            if await self._take_back({*epochs, doomed}) is None:
                self._history.faults.append("the name was not taken back")
            self._history.takeovers += 1

    async def _take_back(self, known: set[str]) -> str | None:
        """The epoch with which the worker goes on under its name.

        Where a full disk kept it from beginning nobody else starts it again while this fault has the worker, and it
        must be told of the takeover again.
        """
        worker = self._world.worker
        deadline = time.monotonic() + PATIENCE_S
        worker.start("--takeover")
        while (epoch := self._seen_epoch(known)) is None and time.monotonic() < deadline:
            code = worker.process.poll() if worker.process is not None else None
            if code is not None:
                if not self._had_no_space(code):
                    self._history.faults.append(f"the worker that took its name back ended with {code}")
                    return None
                worker.start("--takeover")
            await asyncio.sleep(POLL_S)
        return epoch

    async def _answers(self) -> bool:
        """Whether the node is there."""
        with contextlib.suppress(Exception):
            subject = f"{self._history.prefix}.rpc.{self._history.node}.info"
            await self._nc.request(subject, b"{}", timeout=API_S)
            return self._world.worker.running
        return False

    async def _new_epoch(self, known: set[str]) -> str | None:
        deadline = time.monotonic() + PATIENCE_S
        while (epoch := self._seen_epoch(known)) is None and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S)
        return epoch

    def _seen_epoch(self, known: set[str]) -> str | None:
        for event in self._reader.events:
            if event["epoch"] not in known and event["type"] == "node_changed":
                return str(event["epoch"])
        return None

    async def _end_of(self, worker: Worker) -> int | None:
        """The exit code of a worker that must end by itself; None when it does not."""
        process = worker.process
        assert process is not None
        deadline = time.monotonic() + PATIENCE_S
        while process.poll() is None:
            if time.monotonic() > deadline:
                await asyncio.to_thread(worker.kill)
                return None
            await asyncio.sleep(POLL_S)
        worker.process = None
        return process.returncode

    async def _end_launcher(self, worker: Worker) -> None:
        pid = worker.launcher_pid()
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


def _copy_journal(data: Path, to: Path) -> None:
    """What a careless administrator copies: everything but the containers and the launcher's own files."""
    to.mkdir(mode=0o700)
    for path in data.iterdir():
        if path.is_file() and not path.name.startswith("launcher"):
            shutil.copy2(path, to / path.name)


def _fill(path: Path) -> None:
    """Write until the disk takes no more."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 20))
    with path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(512))
