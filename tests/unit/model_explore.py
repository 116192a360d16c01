"""Every state that one container can get into, each looked at for the promises.

Up at rest, a worker is given each command, and at each effect of it one thing happens; or something happens to it while
it rests. Down, things happen, and then a worker comes up, and at each effect of that something happens again. Two
states that differ only in names, times and numbers are one.
"""

import asyncio
import sqlite3
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from schemas.status import State as Life
from tests.unit.model_world import (
    COMMANDS,
    Killed,
    State,
    Violation,
    World,
    message,
    open_tables,
    record_of,
    rows_of,
    with_exit,
    without_launcher,
)
from worker.lifecycle import LIVE, TRANSITIONS

Story = Callable[[World], Awaitable[None]]
Happening = Callable[[World], None]

STEPS = {(before, after) for (before, _), after in TRANSITIONS.items()}
# What may arrive while another command is under way: all that overtakes, and what it overtakes.
SECOND = ("stop", "kill", "remove", "start")
OVERTAKEN = ("create", "run", "run-replace", "start", "restart", "stop")
WORKER_KILLED, LAUNCHER_KILLED = "the worker is killed", "the launcher is killed"
PROGRAM_ENDS, START_FAILS = "the program ends", "the start fails"
HAPPENINGS: dict[str, Happening] = {
    WORKER_KILLED: World.kill_worker,
    LAUNCHER_KILLED: World.kill_launcher,
    PROGRAM_ENDS: lambda world: world.end_program(0),
    START_FAILS: World.fail_start,
    **{f"{name} arrives": (lambda world, name=name: world.deliver(name)) for name in SECOND},  # type: ignore[misc]
}


def _matters(what: str, command: str, effect: str, runs: bool) -> bool:
    """Whether anything comes of it there."""
    if what == PROGRAM_ENDS:
        return runs
    if what == START_FAILS:
        return effect == "start"
    return command in OVERTAKEN or not what.endswith("arrives")


@dataclass
class Explored:
    up: int = 0
    down: int = 0
    episodes: int = 0
    effects: set[str] = field(default_factory=set)
    steps: set[tuple[Life | None, Life]] = field(default_factory=set)
    codes: set[str] = field(default_factory=set)
    reasons: set[str | None] = field(default_factory=set)


# What a worker finds: nothing it did not leave in order, what one crash left, or what more than one thing did.
UP, DIED, DIED_AGAIN = 0, 1, 2


class Explorer:
    def __init__(self, commands: Iterable[str] = tuple(COMMANDS)) -> None:
        self._commands = tuple(commands)
        self.found = Explored()
        self._connection = open_tables()
        self._seen: set[Any] = set()
        self._todo: deque[tuple[int, State, str]] = deque()

    async def explore(self) -> Explored:
        self._meet(UP, State(), "nothing")
        while self._todo:
            kind, state, path = self._todo.popleft()
            if kind == UP:
                self.found.up += 1
                await self._from_rest(state, path)
            else:
                self.found.down += 1
                await self._from_death(state, path, kind)
        return self.found

    def _meet(self, kind: int, state: State, path: str) -> None:
        key = (kind == UP, essence(state))
        if key not in self._seen:
            self._seen.add(key)
            self._todo.append((kind, state, path))

    async def _from_rest(self, state: State, path: str) -> None:
        for name in self._commands:

            async def give(world: World, name: str = name) -> None:
                world.state, made = message(world.state, name)
                await world.handle(made)

            effects = await self._episode(state, give, f"{path}; {name}")
            for at, (effect, runs) in enumerate(effects, start=1):
                for what, happening in HAPPENINGS.items():
                    if _matters(what, name, effect, runs):
                        told = f"{path}; {name}, at {effect!r} {what}"
                        await self._episode(state, give, told, at, happening)
        for what in (LAUNCHER_KILLED, PROGRAM_ENDS):

            async def suffer(world: World, what: str = what) -> None:
                HAPPENINGS[what](world)
                await world.rest()

            effects = await self._episode(state, suffer, f"{path}; {what}")
            for at, (effect, _) in enumerate(effects, start=1):
                told = f"{path}; {what}, at {effect!r} the worker is killed"
                await self._episode(state, suffer, told, at, World.kill_worker)
        self._meet(DIED, state, f"{path}; the worker is killed")

    async def _from_death(self, state: State, path: str, kind: int) -> None:
        if kind == DIED_AGAIN:
            await self._episode(state, _nothing, f"{path}; a worker comes")
            return
        if state.launched is not None and state.launched.exit is None:
            self._meet(DIED_AGAIN, replace(state, **with_exit(state, 0)), f"{path}; the program ends")
        if state.launcher:
            self._meet(DIED_AGAIN, replace(state, **without_launcher()), f"{path}; the launcher is killed")
            rebooted = replace(state, **without_launcher(), boot=state.boot + 1)
            self._meet(DIED_AGAIN, rebooted, f"{path}; reboot")
        if not state.late and (state.stream or open_commands(state)):
            self._meet(DIED_AGAIN, replace(state, late=True), f"{path}; a day passes")
        effects = await self._episode(state, _nothing, f"{path}; a worker comes", count_boot=True)
        for at, (effect, runs) in enumerate(effects, start=1):
            for what in (WORKER_KILLED, LAUNCHER_KILLED, PROGRAM_ENDS):
                if _matters(what, "", effect, runs):
                    told = f"{path}; a worker comes, at {effect!r} {what}"
                    await self._episode(state, _nothing, told, at, HAPPENINGS[what], count_boot=True)

    async def _episode(
        self,
        state: State,
        story: Story,
        path: str,
        at: int | None = None,
        what: Happening | None = None,
        *,
        count_boot: bool = False,
    ) -> list[tuple[str, bool]]:
        """One life of a worker. Gives the effects it had on the outside, and whether a program ran then."""
        self.found.episodes += 1
        world = World(state, self._connection)
        world.at, world.what = at, what
        try:
            try:
                after = await world.live(story, count_boot=count_boot)
            except Killed:
                check_dead(world.state)
                self._meet(DIED_AGAIN if count_boot else DIED, world.state, path)
                return world.effects
            check_rest(after, self.found)
            self._meet(UP, await settled(after, self._connection), path)
        except Violation as broken:
            raise Violation(f"{path}: {broken}") from broken
        self.found.effects.update(effect for effect, _ in world.effects)
        return world.effects


async def _nothing(world: World) -> None:
    await asyncio.sleep(0)


# -- which states are one

ID, STREAM_SEQ, COMPLETED_AT = 1, 6, 11  # columns of `commands`


def essence(state: State) -> Any:
    """What of a state has any influence on what comes."""
    record = record_of(state)
    waiting = open_commands(state)
    names = {command_id: name_of(command_id) for command_id in waiting}
    told: Any = None
    if record is not None:
        status = record.status
        told = (
            status.state,
            record.ready,
            record.intent,
            status.port is not None,
            status.run > 0,
            record.spec.lifecycle.delete_on_exit,
            names.get(record.created_by or ""),
            names.get(record.started_by or ""),
            _relation(record, state.launched),
        )
        if status.state in LIVE:
            same_boot = record.boot_id == f"boot-{state.boot}"
            told += (record.shim_pid is not None, same_boot, _relation(record, state.exit_record))
    return (
        told,
        None if state.launched is None else state.launched.exit is None,
        state.launcher,
        state.guarded,
        state.directory,
        state.late,
        tuple(names.values()),
        tuple((one.name, one.id in waiting, is_known(state, one.id)) for one in state.stream),
    )


def _relation(record: Any, other: Any) -> Any:
    """How a run that the launcher or the disk tells of stands to the record's."""
    if other is None:
        return None
    if other.instance != record.status.instance:
        return "another instance"
    return "this run" if other.run == record.status.run else "another run"


def name_of(command_id: str) -> str:
    return command_id.rpartition("--")[0]


def open_commands(state: State) -> list[str]:
    waiting = [row for row in rows_of(state, "commands") if row[COMPLETED_AT] is None]
    return [row[ID] for row in sorted(waiting, key=lambda row: int(row[STREAM_SEQ]))]


def is_known(state: State, command_id: str) -> bool:
    return any(row[ID] == command_id for row in rows_of(state, "commands"))


# -- the promises


def check_dead(state: State) -> None:
    """Whatever was committed follows the table, also in the middle of things."""
    check_story(events_of(state), None)


def check_rest(state: State, found: Explored) -> None:
    """A worker has nothing left to do: everything is answered, and all that is told is so."""
    events = events_of(state)
    check_story(events, found)
    _expect(not state.stream, "a message was not acknowledged")
    _expect(not open_commands(state), "a command that was accepted is not answered")
    check_answers(events, found)
    record, launched = record_of(state), state.launched
    runs = launched is not None and launched.exit is None
    if record is None:
        _expect(launched is None, "the launcher still has what is gone")
        _expect(state.directory == 0, "a directory is left behind")
        _expect(not state.guarded, "a port is left behind")
        return
    status = record.status
    _expect(status.state in (Life.PENDING, Life.RUNNING, Life.EXITED, Life.FAILED), f"at rest {status.state}")
    _expect(runs == (status.state is Life.RUNNING), f"{status.state}, and a process runs: {runs}")
    if runs and launched is not None:
        same = (launched.instance, launched.run, launched.pid) == (status.instance, status.run, status.pid)
        _expect(same, "another run is alive than the journal says")
    _expect(record.ready, f"a {status.state} container was never made ready")
    _expect(state.directory == 2, "its directory is gone")
    _expect(status.port is not None and state.guarded, "its port is not guarded")
    _expect((status.pid is not None) == runs, "a pid without a process")
    gone = record.spec.lifecycle.delete_on_exit and status.run > 0
    _expect(not gone or status.state is not Life.EXITED, "it was to go at its end")


def check_story(events: list[dict[str, Any]], found: Explored | None) -> None:
    """The states of each instance follow the table, and no command starts anything twice."""
    _expect([one["seq"] for one in events] == list(range(1, len(events) + 1)), "a number is missing")
    begun: list[str] = []
    state: str | None = None
    instance = None
    for event in (one for one in events if one["type"] == "state_changed"):
        before, after = event["from"], event["status"]["state"]
        if event["seq"] == 1 and before is not None:  # of a story whose beginning was cut off
            state, instance = before, event["instance"]
        if before is None:
            _expect(state in (None, "removed"), f"an instance appears where one is {state}")
        else:
            _expect(before == state and event["instance"] == instance, f"{before} is told after {state}")
        _expect(
            before == after or (before and Life(before), Life(after)) in STEPS,
            f"the table has no {before} → {after}",
        )
        if before != after and after == "initializing" and event["command_id"]:
            begun.append(event["command_id"])
        if found is not None and before != after:
            found.steps.add((before and Life(before), Life(after)))
            found.reasons.add(event["status"]["reason"])
        state, instance = after, event["instance"]
    _expect(len(begun) == len(set(begun)), "a command began two runs")


# What the status of a completion says where all went well.
DONE = {
    "create": {"pending"},
    # What a dead worker had started may have ended since.
    "run": {"running", "exited", "failed"},
    "start": {"initializing", "running", "exited", "failed"},
    "restart": {"running", "exited", "failed"},
    "stop": {"exited", "failed"},
}


def check_answers(events: list[dict[str, Any]], found: Explored) -> None:
    accepted = [one["command_id"] for one in events if one["type"] == "command_accepted"]
    _expect(len(accepted) == len(set(accepted)), "a command was accepted twice")
    answers: dict[str, list[dict[str, Any]]] = {command_id: [] for command_id in accepted}
    for event in (one for one in events if one["type"] == "command_completed" and not one["duplicate"]):
        _expect(event["command_id"] in answers, "an answer to what was never accepted")
        answers[event["command_id"]].append(event)
    # A stop that overtook a create leaves nothing.
    overtaken = any(
        one["command"] in ("create", "run")
        and one["error"] is not None
        and one["error"]["code"] == "conflict"
        for given in answers.values()
        for one in given
    )
    for command_id, given in answers.items():
        _expect(len(given) == 1, f"{command_id} has {len(given)} answers")
        answer = given[0]
        if answer["error"] is not None:
            found.codes.add(answer["error"]["code"])
            _expect(answer["error"]["code"] != "internal", f"a bug of ours: {answer['error']['message']}")
            continue
        status = answer["status"]
        state = None if status is None else status["state"]
        if answer["command"] == "remove":
            _expect(state in (None, "removed"), f"removed, and {state}")
        elif answer["command"] == "stop" and state is None:
            _expect(overtaken, "stopped, and not there")
        elif answer["command"] == "kill":
            _expect(state is not None, "killed, and not there")
        else:
            _expect(state in DONE[answer["command"]], f"{answer['command']} went well, and it is {state}")


def events_of(state: State) -> list[dict[str, Any]]:
    return [msgspec.json.decode(row[2]) for row in rows_of(state, "outbox")]


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Violation(otherwise)


async def settled(state: State, connection: sqlite3.Connection) -> State:
    """The ledger answers a repetition of each command with what it recorded, and does nothing. Then the past is cut
    off, so that states do not grow: the last event of the container stays, as the beginning of its further story.
    """
    events = events_of(state)
    answers = {
        one["command_id"]: one
        for one in events
        if one["type"] == "command_completed" and not one["duplicate"]
    }
    again = state
    for command_id in answers:
        again, _ = message(again, name_of(command_id), command_id=command_id)
    if answers:
        after = await World(again, connection).live(_nothing, count_boot=False)
        told = events_of(after)[len(events) :]
        _expect([one["command_id"] for one in told] == list(answers), "a repetition is not answered once")
        for one in told:
            first = answers[one["command_id"]]
            _expect(one["type"] == "command_completed" and one["duplicate"], "a repetition was executed")
            same = all(one[name] == first[name] for name in ("command", "ok", "error", "result"))
            _expect(same, "a repetition is answered otherwise")
        _expect(essence(after) == essence(state), "a repetition has changed something")
    return cut_off(state)


def cut_off(state: State) -> State:
    record = record_of(state)
    outbox: tuple[tuple[object, ...], ...] = ()
    if record is not None:
        known = {
            "type": "state_changed",
            "seq": 1,
            "from": record.status.state,
            "instance": record.status.instance,
        }
        known |= {"command_id": None, "status": msgspec.to_builtins(record.status)}
        outbox = ((1, "s", msgspec.json.encode(known), None),)
    tables = (("containers", rows_of(state, "containers")), ("outbox", outbox))
    return replace(state, tables=tables, last_seq=len(outbox), late=False, starts=(), signals=0)
