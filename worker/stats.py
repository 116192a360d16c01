"""What running containers use: a sample of each every few seconds, and the watchdog over their memory.

The watchdog must see a program that grows by a gigabyte a second, and cost next to nothing while nothing
grows. Where the platform counts all memory ever handed out, a container cannot have grown by more than that
counter did: it is measured again only when the counter has risen by what it had left to its limit.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from typing import NamedTuple, TypeVar

from loguru import logger

from schemas.status import Stats
from worker.clock import Clock, utc_now
from worker.errors import Unavailable
from worker.platform.base import ProcessTable

# How often the watchdog looks; and where measuring is costly, how much of its time it may spend on that.
TICK_S = 0.2
MAX_TICK_S = 0.5
_MAX_SHARE = 0.05
# How soon a container that is still above its limit is reported again.
_REPEAT_S = 1.0
# CPU percent of a shorter time than this says nothing: the kernel counts in hundredths of a second.
_MIN_SPAN_S = 0.1


T = TypeVar("T")


class Target(NamedTuple):
    """A run to be measured: the tree below its shim, which `shim_pid` and `shim_start` name for good, and who
    holds its `marker`.
    """

    container: str
    instance: str
    run: int
    shim_pid: int
    shim_start: int
    memory_limit: int | None
    marker: str = ""


class _Last(NamedTuple):
    at_s: float
    cpu_usec: int


class _Watch(NamedTuple):
    """The counter when a container was measured, and how far it may rise before it must be measured again."""

    allocated: int
    room: int


class _Calm(NamedTuple):
    """As long as these are all, and the counter has not passed `until`, nobody needs to be measured."""

    targets: list[Target]
    until: int


class Sampler:
    """Owns the thread in which /proc, or its like, is read. `run` it in a task; `close` it after."""

    def __init__(
        self,
        *,
        node: str,
        interval_s: float,
        targets: Callable[[], Iterable[Target]],
        processes: Callable[[], ProcessTable],
        allocated_bytes: Callable[[], int | None],
        publish: Callable[[Stats], Awaitable[None]],
        on_memory_limit: Callable[[str, int], None],
        clock: Clock = utc_now,
    ) -> None:
        self._node = node
        self._interval_s = interval_s
        self._targets = targets
        self._processes = processes
        self._allocated_bytes = allocated_bytes
        self._publish = publish
        self._on_memory_limit = on_memory_limit
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stats")
        self._last: dict[Target, _Last] = {}
        self._cpu_usec: dict[Target, int] = {}
        self._watched: dict[Target, _Watch] = {}
        self._reported: dict[Target, float] = {}
        self._calm = _Calm([], -1)

    async def run(self) -> None:
        """Sample and watch until cancelled."""
        due = time.monotonic() + self._interval_s
        tick_s = TICK_S
        while True:
            await asyncio.sleep(max(0.0, min(tick_s, due - time.monotonic())))
            if time.monotonic() >= due:
                due = time.monotonic() + self._interval_s
                await self.sample_all()
            else:
                tick_s = await self.watch()

    def close(self) -> None:
        self._thread.shutdown(wait=True)

    async def measure(self, target: Target) -> Stats | None:
        """One container now; None when it has just ended."""
        [(_, stats)] = await self._in_thread(self._sample, [target])
        return stats

    async def sample_all(self) -> None:
        """Publish a sample of every target. One that cannot be sent now is dropped."""
        targets = list(self._targets())
        self._forget_ended(targets)
        sampled = await self._in_thread(self._sample, targets)
        for target, stats in sampled:
            if stats is None:
                continue
            self._last[target] = _Last(time.monotonic(), stats.cpu_usec)
            self._judge(target, stats.memory_bytes)
            try:
                await self._publish(stats)
            except Unavailable as failure:
                logger.debug("the stats of {} were not sent: {}", target.container, failure.message)

    async def watch(self) -> float:
        """Measure whoever may have reached his memory limit; gives the seconds until the next look."""
        limited = [target for target in self._targets() if target.memory_limit is not None]
        if not limited:
            return MAX_TICK_S
        # Read before measuring: what is handed out meanwhile counts against the next look.
        allocated = self._allocated_bytes()
        if allocated is not None and limited == self._calm.targets and allocated <= self._calm.until:
            return TICK_S
        began = time.monotonic()
        for target, used in await self._in_thread(partial(self._measure_due, allocated), limited):
            self._judge(target, used)
        if allocated is not None:
            watched = [self._watched[target] for target in limited if target in self._watched]
            until = min((watch.allocated + watch.room for watch in watched), default=allocated)
            self._calm = _Calm(limited, until if len(watched) == len(limited) else -1)
        return min(MAX_TICK_S, max(TICK_S, (time.monotonic() - began) / _MAX_SHARE))

    def _judge(self, target: Target, used: int) -> None:
        if target.memory_limit is None or used <= target.memory_limit:
            return
        now = time.monotonic()
        if now - self._reported.get(target, -_REPEAT_S) >= _REPEAT_S:
            self._reported[target] = now
            self._on_memory_limit(target.container, used)

    def _forget_ended(self, targets: list[Target]) -> None:
        running = set(targets)
        for known in (self._last, self._cpu_usec, self._watched, self._reported):
            for ended in known.keys() - running:
                known.pop(ended, None)

    async def _in_thread(self, call: Callable[[list[Target]], T], targets: list[Target]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, targets)

    # -- in the thread

    def _sample(self, targets: list[Target]) -> list[tuple[Target, Stats | None]]:
        table = self._processes()
        return [(target, self._stats(table, target, self._clock())) for target in targets]

    def _stats(self, table: ProcessTable, target: Target, now: datetime) -> Stats | None:
        alive = table.alive(target.shim_pid, target.shim_start)
        sample = table.tree(target.shim_pid, target.marker) if alive else None
        if sample is None:
            return None
        # A process whose parent never waits for it takes its time along when it ends.
        cpu_usec = self._cpu_usec[target] = max(sample.cpu_usec, self._cpu_usec.get(target, 0))
        last = self._last.get(target)
        percent = None
        if last is not None and (span_s := time.monotonic() - last.at_s) >= _MIN_SPAN_S:
            percent = round((cpu_usec - last.cpu_usec) / (span_s * 10_000), 2)
        return Stats(
            node=self._node,
            container=target.container,
            instance=target.instance,
            time=now,
            cpu_usec=cpu_usec,
            cpu_percent=percent,
            memory_bytes=sample.memory_bytes,
            memory_limit=target.memory_limit,
            processes=sample.processes,
            threads=sample.threads,
            open_files=sample.open_files,
            read_bytes=sample.read_bytes,
            write_bytes=sample.write_bytes,
        )

    def _measure_due(self, allocated: int | None, limited: list[Target]) -> list[tuple[Target, int]]:
        due = [target for target in limited if self._is_due(target, allocated)]
        if not due:
            return []
        table = self._processes()
        measured = []
        for target in due:
            limit = target.memory_limit
            if limit is None or not table.alive(target.shim_pid, target.shim_start):
                continue
            used = table.memory(target.shim_pid, limit, target.marker)
            if used is None:
                continue
            measured.append((target, used))
            if allocated is not None:
                self._watched[target] = _Watch(allocated, limit - used)
        return measured

    def _is_due(self, target: Target, allocated: int | None) -> bool:
        watch = self._watched.get(target)
        return watch is None or allocated is None or allocated - watch.allocated > watch.room
