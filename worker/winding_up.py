"""The end of a worker's work: commands that were begun get their completion, containers stay or are stopped."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from loguru import logger

from schemas.commands import Stop
from schemas.status import ContainerStatus
from worker.config_model import STOP
from worker.ids import new_ulid
from worker.lifecycle import LIVE
from worker.runtime import Runtime
from worker.services import Services
from worker.shutdown import COMMANDS_S, Shutdown

POLL_S = 0.02
# The longest that a container has between its stop signal and SIGKILL.
GRACE_S = 5.0

Spawn = Callable[[Coroutine[Any, Any, None], str], object]


class Counted:
    """Spawns and counts what has not ended. What only waits is not counted: it is not to keep a worker."""

    def __init__(self, spawn: Spawn, *, waiting: frozenset[str] = frozenset()) -> None:
        self.under_way = 0
        self._spawn = spawn
        self._waiting = waiting

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        if name in self._waiting:
            self._spawn(work, name)
            return
        self.under_way += 1
        self._spawn(self._count(work), name)

    async def _count(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        finally:
            self.under_way -= 1


class WindingUp:
    """`stopped` are the containers that were stopped: the ends of their logs are still to be sent."""

    def __init__(self, shutdown: Shutdown, services: Services, runtime: Runtime) -> None:
        self.accepting = Counted(runtime.spawn)
        self.node_work = Counted(runtime.spawn, waiting=frozenset({"drain"}))
        self.stopped: list[ContainerStatus] = []
        self._shutdown = shutdown
        self._services = services
        self._runtime = runtime

    async def run(self) -> None:
        """No further command may come. Returns when all is done, forced, or out of time."""
        if not await self._shutdown.give(self._settle(), COMMANDS_S) and not self._shutdown.forced.is_set():
            busy = [actor.cid for actor in self._runtime.containers() if not actor.idle]
            what = ", ".join(busy[:10]) or "commands of the node"
            logger.warning("still under way, for the next worker to go on with: {}", what)

    async def _settle(self) -> None:
        await _until(lambda: not self.accepting.under_way)
        if self._services.config.node.on_shutdown == STOP:
            await self._stop_all()
        await _until(lambda: not self.node_work.under_way and not self._runtime.busy())

    async def _stop_all(self) -> None:
        """Also those that a command under way starts meanwhile. Each is told once."""
        told: set[tuple[str, int]] = set()
        while True:
            live = [actor for actor in self._runtime.containers() if actor.state in LIVE]
            for actor in live:
                status, record = actor.status, actor.record
                if record is None or (status.instance, status.run) in told:
                    continue
                told.add((status.instance, status.run))
                self.stopped.append(status)
                grace_s = min(record.spec.stop_grace_s, GRACE_S)
                command = Stop(id=f"shutdown-{new_ulid()}", timeout_s=grace_s, if_instance=status.instance)
                self._runtime.submit_internal(actor, command, "stop")
            if not self._runtime.busy() and all((a.status.instance, a.status.run) in told for a in live):
                return
            await asyncio.sleep(POLL_S)


async def _until(condition: Callable[[], bool]) -> None:
    while True:
        if condition():
            return
        await asyncio.sleep(POLL_S)
