"""One run: the storm, then calm, the node's list, everything removed, and the judge."""

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from .history import EVENTS, LOGS, History, Listed, Violation
from .injector import Injector
from .judge import judge
from .plan import Action, plan
from .programs import IMAGE, read_witnesses
from .publisher import Publisher
from .reader import Reader, ReadFailed, connect
from .scheduler import NAMES, QUIET
from .world import NODE, World, open_world

READY_S = 30.0
CALM_S = 30.0
POLL_S = 0.25
UNFINISHED = frozenset({"no completion", "no rejection", "no eof", "log bytes lost"})
COMMAND_KINDS = frozenset({"send", "again", "other", "malformed"})

Say = Callable[[str], None]


class Run:
    """The parts of one run, once the world is open."""

    def __init__(self, world: World, history: History, reader: Reader, nc: Any, say: Say) -> None:
        self.world = world
        self.history = history
        self.reader = reader
        self.say = say
        self._nc = nc
        self._ids = 0
        paths = {"witness": str(world.witness), "image": str(world.image)}
        self.publisher = Publisher(nc, history, reader, paths)
        self.injector = Injector(world, reader, history, nc, self.publisher, self.poke)

    async def command(self, cid: str | None, verb: str, **fields: Any) -> bool:
        """One of our own, and its answer. False when none came."""
        self._ids += 1
        body = {"type": verb, "id": f"run-{self._ids}", **fields}
        await self.publisher.send(cid, verb, body)
        return await self.until(lambda: body["id"] in self.reader.answered)

    async def poke(self) -> None:
        await self.command(None, "tag_image", source=IMAGE, target=f"{IMAGE}:poked")

    async def until(self, condition: Callable[[], bool], patience_s: float = READY_S) -> bool:
        deadline = time.monotonic() + patience_s
        while not condition():
            self.reader.check()
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.02)
        return True

    async def prepare(self) -> None:
        self.world.worker.start()
        begun = self.world.worker
        await self.until(lambda: bool(self.reader.events) or not begun.running)
        if not begun.running or not await self.command(
            None, "register_image", image=IMAGE, source_dir=str(self.world.image)
        ):
            raise RuntimeError(f"the node did not begin: {self.world.worker.log_text()[-3000:]}")

    async def storm(self, actions: Sequence[Action]) -> None:
        """Every action at its time; those that take long run beside each other."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with asyncio.TaskGroup() as tasks:
            for action in actions:
                await asyncio.sleep(max(0.0, began + action.at_s - loop.time()))
                tasks.create_task(self._do(action), name=action.kind)

    async def _do(self, action: Action) -> None:
        if action.kind in COMMAND_KINDS:
            await self.publisher.do(action)
            return
        self.say(f"  {self.publisher.now():7.3f} begin {action.kind} {action.args}")
        await self.injector.do(action)
        self.say(f"  {self.publisher.now():7.3f} done  {action.kind}")

    async def calm(self) -> None:
        """Nothing hinders any more: wait until every answer and every log is there, or patience ends."""
        await self.injector.heal()
        await self.command(None, "resume")
        left: list[Violation] = []
        deadline = time.monotonic() + CALM_S
        while time.monotonic() < deadline:
            await self._look()
            left = [v for v in judge(self.history) if v.name in UNFINISHED]
            if not left:
                return
            await asyncio.sleep(POLL_S)
        self.say(f"no calm after {CALM_S:g} s: {left[0]} and {len(left) - 1} more")

    async def _look(self) -> None:
        self.reader.check()
        self.history.witnesses = read_witnesses(self.world.witness)
        for stream in (EVENTS, LOGS):
            with contextlib.suppress(ReadFailed):
                await self.reader.catch_up(stream)

    async def compare_lists(self) -> None:
        """Ask for the list until it agrees with the events, or patience ends; the last answer is kept."""
        deadline = time.monotonic() + READY_S
        while True:
            await self.poke()  # whatever the node has yet to find out about its stream, it does now
            before = await self._list()
            with contextlib.suppress(ReadFailed):
                await self.reader.catch_up(EVENTS)
            listed = Listed(
                generation=self.reader.generation[EVENTS],
                last=self.reader.last(EVENTS),
                containers=before or [],
            )
            trial = History(
                node=NODE, events=self.history.events, losses=self.history.losses, listed=[listed]
            )
            agrees = not any(v.name in ("wrong fold", "state not told again") for v in judge(trial))
            if (before is not None and agrees) or time.monotonic() > deadline:
                self.history.listed.append(listed)
                return
            await asyncio.sleep(POLL_S)

    async def _list(self) -> list[dict[str, Any]] | None:
        found: list[dict[str, Any]] = []
        cursor = None
        while True:
            page = await self._query("list", cursor=cursor)
            if page is None:
                return None
            found += page["containers"]
            cursor = page["cursor"]
            if cursor is None:
                return found

    async def _query(self, verb: str, **fields: Any) -> dict[str, Any] | None:
        with contextlib.suppress(Exception):
            subject = f"{self.history.prefix}.rpc.{NODE}.{verb}"
            answer = await self._nc.request(subject, json.dumps(fields).encode(), timeout=5)
            return dict(json.loads(answer.data))
        return None

    async def remove_all(self) -> None:
        """Remove every container, and wait until that is told and everything of them is gone."""
        deadline = time.monotonic() + READY_S
        names = {*NAMES, *QUIET}
        while names and time.monotonic() < deadline:
            # Asked again where it was refused: after a loss of commands a new one may be taken for a late one.
            for cid in sorted(names):
                await self.command(cid, "remove")
            names = {status["container"] for status in await self._list() or []}
        await self.calm()
        await self.compare_lists()
        deadline = time.monotonic() + READY_S
        while self.world.leftovers() and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S)

    async def end(self) -> None:
        """Look what is left, first of the containers, then of all."""
        self.history.left += self.world.leftovers()
        await self._look()
        self.history.faults += await self.world.end_nodes()
        self.history.left += self.world.ended()


async def run(
    seed: int,
    seconds: float,
    *,
    faults: Sequence[str] | None,
    private: bool,
    say: Say,
    servers: int = 1,
    keep: bool = False,
) -> tuple[History, list[Violation]]:
    actions = plan(seed, seconds, faults, cluster=servers > 1)
    for action in actions:
        say(str(action))
    history = History(node=NODE)
    async with open_world(private=private, servers=servers, keep=keep) as world:
        say(f"in {world.folder}")
        try:
            await _act(world, history, actions, say)
            found = judge(history)
        except BaseException:
            _show_logs(world, say)
            raise
        if found:
            _show_logs(world, say)
    return history, found


async def _act(world: World, history: History, actions: Sequence[Action], say: Say) -> None:
    async with Reader(world.url, history) as reader:
        nc = await connect(world.url)
        watching: asyncio.Task[None] | None = None
        try:
            one = Run(world, history, reader, nc, say)
            await one.prepare()
            watching = asyncio.create_task(one.injector.watch(), name="watch")
            await one.storm(actions)
            say("calm")
            await one.calm()
            await one.compare_lists()
            say("removing everything")
            await one.remove_all()
            watching.cancel()
            await one.end()
        finally:
            if watching is not None:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
            await nc.close()


def _show_logs(world: World, say: Say) -> None:
    for worker in (world.worker, *world.others):
        say(f"--- the end of the log of {worker.log_path.parent.name}")
        say(worker.log_text()[-6000:])
