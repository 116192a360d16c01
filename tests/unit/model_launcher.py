"""The launcher of the model: what it was asked for is done, whether or not the worker that asked still lives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.errors import Conflict, NotFound
from worker.supervisor import LauncherGone
from worker.supervisor_types import ExitRecord, LaunchedContainer, LaunchFailed, Started, StartRequest

if TYPE_CHECKING:
    from tests.unit.model_world import World

CID = "web-0"
PORT = 20_000


class ModelLauncher:
    """The launcher as its protocol describes it: it does what it was asked whether or not the asker still lives."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._life = world.launcher_life

    async def containers(self) -> list[LaunchedContainer]:
        await self._asked("containers")
        found = self._world.state.launched
        return [] if found is None else [found]

    async def reserve_port(self, cid: str, *, port: int | None = None) -> int:
        await self._asked("reserve_port")
        self._world.change(guarded=True)
        return PORT

    async def release_port(self, cid: str) -> None:
        await self._asked("release_port")
        self._world.change(guarded=False)

    async def start(self, request: StartRequest) -> Started:
        await self._asked("start")
        world = self._world
        if world.fails:
            world.fails = False
            raise LaunchFailed("exec: No such file or directory", step="exec", errno=2, detail="")
        old, wanted = world.state.launched, (request.instance, request.run)
        if old is not None and ((old.instance, old.run) == wanted or old.exit is None):
            raise Conflict(f"run {old.run} is there")
        made = LaunchedContainer(
            cid=CID,
            instance=request.instance,
            run=request.run,
            pid=100 + len(world.state.starts),
            start_time=1,
            started_at_us=1,
            shim_pid=99,
            shim_start_time=1,
        )
        world.change(launched=made, starts=(*world.state.starts, wanted))
        await self._answers("start")
        assert made.pid is not None
        return Started(pid=made.pid, start_time=1, started_at_us=1, shim_pid=99, shim_start_time=1)

    async def signal(self, cid: str, instance: str, run: int, signum: int) -> None:
        await self._asked("signal")
        if self._run(instance, run).exit is not None:
            raise NotFound("it does not run")
        self._world.change(signals=self._world.state.signals + 1)
        if signum == 9:
            self._world.end_program(-9)
        await self._answers("signal")

    async def stop(self, cid: str, instance: str, run: int, signum: int, timeout_s: float) -> ExitRecord:
        await self._asked("stop")
        self._run(instance, run)
        await self._world.effect("the program is about to end")  # it takes its time
        self._world.end_program(-signum, instance, run)
        await self._answers("stop")
        ended = self._run(instance, run).exit
        assert ended is not None
        return ended

    async def kill_tree(self, cid: str, instance: str, run: int) -> ExitRecord | None:
        await self._asked("kill_tree")
        self._run(instance, run)
        self._world.end_program(-9, instance, run)
        await self._answers("kill_tree")
        return self._run(instance, run).exit

    async def forget(self, cid: str, instance: str) -> None:
        await self._asked("forget")
        found = self._world.state.launched
        if found is None or found.instance != instance:
            return
        if found.exit is None:
            raise Conflict("it runs")
        self._world.change(launched=None)

    def _run(self, instance: str, run: int) -> LaunchedContainer:
        self._expect_alive()
        found = self._world.state.launched
        if found is None or (found.instance, found.run) != (instance, run):
            raise NotFound(f"run {run} is not known")
        return found

    async def _asked(self, op: str) -> None:
        await self._world.effect(op)
        self._expect_alive()

    async def _answers(self, op: str) -> None:
        await self._world.effect(f"the answer to {op}")
        self._expect_alive()

    def _expect_alive(self) -> None:
        if self._life != self._world.launcher_life or not self._world.state.launcher:
            raise LauncherGone("the launcher is gone")
