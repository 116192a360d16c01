"""One container's world for the model: a node's runtime, ledger and actors for real, and all outside of them as data.

A `State` is all that outlives a killed worker: the journal, what the launcher has, the disk, the stream. `World` brings
a worker up on it, gives it commands, and can let anything happen at any of the numbered effects that the worker has on
the outside: there the worker is killed, or the launcher, or the program ends, or another command arrives.
"""

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import msgspec

from schemas.status import Gpu
from schemas.subjects import Subjects
from tests.unit.model_launcher import CID, ModelLauncher
from worker.handlers import CommandHandler
from worker.images.model import ImageConfig
from worker.journal import Tx
from worker.journal_schema import MIGRATIONS
from worker.records import ContainerRecord, decode_record
from worker.runtime import Runtime
from worker.supervisor_types import ExitRecord, LaunchedContainer, StartRequest

NODE, EPOCH, BOOT = "n1", "01JDEPCH000000000000000000", "01JDB00T000000000000000000"
START = datetime.now(UTC).replace(microsecond=0)  # a deadline is measured against the real clock
SUBJECTS = Subjects()
SPEC = {"image": {"name": "base"}, "command": {"entrypoint": ["/bin/true"]}}
GONE_SPEC = {**SPEC, "lifecycle": {"delete_on_exit": True}}

# Every command with its options, under the name it has in the model.
COMMANDS: dict[str, tuple[str, dict[str, Any]]] = {
    "create": ("create", {"spec": SPEC}),
    "create-gone": ("create", {"spec": GONE_SPEC}),
    "create-replace": ("create", {"spec": SPEC, "replace": True}),
    "run": ("run", {"spec": SPEC}),
    "run-replace": ("run", {"spec": SPEC, "replace": True}),
    "start": ("start", {}),
    "start-late": ("start", {"deadline": "2026-11-24T11:59:59Z"}),
    "stop": ("stop", {}),
    "stop-other": ("stop", {"if_instance": "01JDOTHER00000000000000000"}),
    "kill": ("kill", {}),
    "kill-usr1": ("kill", {"signal": "SIGUSR1"}),
    "restart": ("restart", {}),
    "remove": ("remove", {}),
    "remove-gently": ("remove", {"force": False}),
}


class Killed(Exception):
    """The worker died where it was to die."""


class Violation(AssertionError):
    """A promise is broken."""


@dataclass(frozen=True, slots=True)
class Message:
    """One command in the stream."""

    name: str
    id: str
    seq: int
    verb: str
    body: bytes


@dataclass(frozen=True, slots=True)
class State:
    """`directory`: 0 none, 1 made, 2 with its rootfs. `late`: a day and more has passed since the last command."""

    tables: tuple[tuple[str, tuple[tuple[Any, ...], ...]], ...] = ()
    last_seq: int = 0
    next_message: int = 1
    stream: tuple[Message, ...] = ()
    boot: int = 1
    launcher: bool = True
    launched: LaunchedContainer | None = None
    guarded: bool = False
    exit_record: ExitRecord | None = None
    directory: int = 0
    late: bool = False
    starts: tuple[tuple[str, int], ...] = ()
    signals: int = 0


def message(state: State, name: str, *, command_id: str | None = None) -> tuple[State, Message]:
    verb, fields = COMMANDS[name]
    number = state.next_message
    known = command_id or f"{name}--{number}"
    body = msgspec.json.encode({"type": verb, "id": known, **fields})
    made = Message(name, known, number, verb, body)
    return replace(state, next_message=number + 1, stream=(*state.stream, made)), made


TABLES = ("containers", "commands", "outbox", "applied", "rejections")


def rows_of(state: State, table: str) -> tuple[tuple[Any, ...], ...]:
    return dict(state.tables).get(table, ())


def open_tables() -> sqlite3.Connection:
    """The journal's tables; one connection is enough for all lives, one after the other."""
    connection = sqlite3.connect(":memory:", isolation_level=None, cached_statements=256)
    connection.executescript(MIGRATIONS[0])
    return connection


class Memory:
    """A journal of the real tables and the real `Tx`, without the thread and the disk."""

    def __init__(self, world: "World", state: State, connection: sqlite3.Connection) -> None:
        self._world = world
        self.connection = connection
        for table in TABLES:
            connection.execute(f"DELETE FROM {table}")
            rows = rows_of(state, table)
            if rows:
                places = ", ".join("?" * len(rows[0]))
                connection.executemany(f"INSERT INTO {table} VALUES ({places})", rows)
        self.tx = Tx(
            self.connection, node=NODE, epoch=EPOCH, boot=BOOT, last_seq=state.last_seq, clock=world.now
        )

    async def transact(self, function: Callable[[Tx], Any], *, lazy: bool = False) -> Any:
        await self._world.effect("commit")
        before = self.tx.last_seq
        self.connection.execute("BEGIN")
        self.tx._writable = True
        try:
            found = function(self.tx)
        except BaseException:
            self.connection.execute("ROLLBACK")
            self.tx.last_seq = before
            raise
        finally:
            self.tx._writable = False
        self.connection.execute("COMMIT")
        self._world.change(last_seq=self.tx.last_seq)
        await asyncio.sleep(0)
        return found

    async def read(self, function: Callable[[Tx], Any]) -> Any:
        await asyncio.sleep(0)
        return function(self.tx)


class World:
    """A worker's life on a `State`. `at` and `what` say what happens at the n-th effect after `count_from_here`."""

    def __init__(self, state: State, connection: sqlite3.Connection) -> None:
        self.state = state
        self.effects: list[tuple[str, bool]] = []
        self.counting = False
        self.at: int | None = None
        self.what: Callable[[World], None] | None = None
        self.fails = False
        self.resting = 0
        self.launcher_life = 0
        self.dead = False
        self._ending = False
        self.died = asyncio.Event()
        self.lost = asyncio.Event()
        self.runtime: Runtime | None = None
        self.handler: CommandHandler | None = None
        self.wired = False
        self.journal = Memory(self, state, connection)

    def now(self) -> datetime:
        passed = timedelta(days=2) if self.state.late else timedelta()
        return START + passed + timedelta(seconds=self.state.next_message)

    def change(self, **fields: Any) -> None:
        assert not self.dead
        self.state = replace(self.state, **fields)

    async def effect(self, what: str) -> None:
        """The worker is about to change something outside of itself, or to hear of it."""
        if not self.dead and self.counting:
            found = self.state.launched
            self.effects.append((what, found is not None and found.exit is None))
            if len(self.effects) == self.at and self.what is not None:
                self.what(self)
                if not self.dead:
                    await self.rest(inside=True)  # the others go on meanwhile
        await self._unless_dead()
        await asyncio.sleep(0)
        await self._unless_dead()

    async def _unless_dead(self) -> None:
        if self.dead:
            if self._ending:
                raise asyncio.CancelledError
            await asyncio.Event().wait()

    # -- what may happen

    def kill_worker(self) -> None:
        self.state = self.frozen()
        self.dead = True
        self.died.set()

    def kill_launcher(self) -> None:
        self.launcher_life += 1
        self.change(**without_launcher())
        if self.wired:
            self.lost.set()

    def fail_start(self) -> None:
        self.fails = True

    def end_program(self, code: int, instance: str | None = None, run: int | None = None) -> None:
        found = self.state.launched
        if found is None or found.exit is not None:
            return
        if instance is not None and (found.instance, found.run) != (instance, run):
            return
        self.change(**with_exit(self.state, code))
        if self.wired and self.runtime is not None and self.state.launched is not None:
            ended = self.state.launched.exit
            assert ended is not None
            asyncio.get_running_loop().call_soon(self._tell_exit, ended)

    def _tell_exit(self, ended: ExitRecord) -> None:
        if not self.dead and self.runtime is not None:
            self.runtime.on_exit(ended)

    def deliver(self, name: str) -> None:
        """A command arrives."""
        self.state, made = message(self.state, name)
        assert self.runtime is not None
        self.runtime.spawn(self.handle(made), "handle")

    async def handle(self, made: Message) -> None:
        assert self.handler is not None
        await self.handler.handle(Delivered(self, made))

    def frozen(self) -> State:
        """What is on the disk now."""
        if self.journal.connection.in_transaction:
            raise Violation("a transaction is open across an effect")
        read = self.journal.connection.execute
        tables = tuple((table, tuple(read(f"SELECT * FROM {table}").fetchall())) for table in TABLES)
        return replace(self.state, tables=tables)

    # -- the worker's life

    async def live(self, story: Callable[["World"], Awaitable[None]], *, count_boot: bool) -> State:
        """Come up, do `story`, come to rest. Raises Killed when the worker died; its state is `self.state` then."""
        self.counting = count_boot
        living = asyncio.ensure_future(self._live(story))
        dying = asyncio.ensure_future(self.died.wait())
        try:
            await asyncio.wait((living, dying), return_when=asyncio.FIRST_COMPLETED)
            if self.dead:
                raise Killed
            await living
            return self.frozen()
        except BaseExceptionGroup as group:
            raise Violation(f"the worker failed: {_leaf(group)!r}") from group
        finally:
            self.dead = self._ending = True
            living.cancel()
            dying.cancel()
            await asyncio.gather(living, dying, return_exceptions=True)

    async def _live(self, story: Callable[["World"], Awaitable[None]]) -> None:
        services = self._services()
        if not self.state.launcher:
            self.change(launcher=True)
        runtime = Runtime(services)
        runtime.starter.start_request = _request  # type: ignore[method-assign]
        async with runtime.open():
            self.runtime = runtime
            self.wired = True
            await runtime.adopt()
            watching = asyncio.ensure_future(self._watch())
            self.handler = CommandHandler(services, runtime, None, runtime.spawn)  # type: ignore[arg-type]
            try:
                await runtime.end_strangers()
                await self.handler.recover()
                runtime.let_leave()
                for waiting in self.state.stream:
                    await self.handle(waiting)
                await self.rest()
                self.counting = True
                await story(self)
                await self.rest()
                if runtime.busy():
                    raise Violation("a command is stuck")
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            await self.lost.wait()
            self.lost.clear()
            assert self.runtime is not None
            await self.runtime.launcher_lost()

    async def rest(self, *, inside: bool = False) -> None:
        """Until nothing of the worker is about to run; `inside` of one of its tasks, nothing but that and who waits."""
        loop: Any = asyncio.get_running_loop()
        self.resting += 1
        try:
            for _ in range(5000):
                await asyncio.sleep(0)
                if len(loop._ready) <= (self.resting - 1 if inside else 0):
                    return
        finally:
            self.resting -= 1
        raise Violation("the worker does not come to rest")

    def _services(self) -> Any:
        async def in_thread(call: Callable[..., Any], *args: Any) -> Any:
            await self.effect("the disk")
            return call(*args)

        async def attach() -> None:
            await self.effect("attach")
            self.lost.clear()
            self.change(launcher=True)
            services.launcher = ModelLauncher(self)

        async def nothing(*_: Any, **__: Any) -> None:
            return None

        async def pull(*_: Any, **__: Any) -> Any:
            return SimpleNamespace(image=SimpleNamespace(digest="sha256:1"), fetched=False)

        async def clone(*_: Any, **__: Any) -> None:
            await self.effect("clone")
            self.change(directory=2)

        quiet = lambda *_, **__: None  # noqa: E731
        policy = SimpleNamespace(
            network=SimpleNamespace(level="full"),
            gpu=Gpu.NONE,
            limits=SimpleNamespace(memory_bytes=None),
            user=None,
            isolation="process",
            volumes=(),
        )
        services = SimpleNamespace(
            config=SimpleNamespace(node=SimpleNamespace(slots=None)),
            node=NODE,
            subjects=SUBJECTS,
            journal=self.journal,
            data=SimpleNamespace(container=lambda cid: _Places(self)),
            driver=SimpleNamespace(
                processes=lambda: SimpleNamespace(alive=lambda *_: False), end_leftovers=lambda *_: True
            ),
            images=SimpleNamespace(keep_for=quiet, let_go=quiet, clone=clone),
            puller=SimpleNamespace(pull=pull),
            logs=SimpleNamespace(attach=quiet, spool=nothing, ended=quiet),
            launcher=ModelLauncher(self),
            host_api=SimpleNamespace(begin=lambda *_, **__: {}),
            mirrors=SimpleNamespace(written_back=nothing, ended=quiet, released=quiet, fetch=nothing),
            boot_id=f"boot-{self.state.boot}",
            draining=False,
            on_record=quiet,
            remove_later=quiet,
            attach_launcher=attach,
            container_count=lambda: 0,
            live_count=lambda: 0,
            in_thread=in_thread,
            check_features=quiet,
            check_platform=quiet,
            check_slots=quiet,
            check_image=quiet,
            make_policy=lambda *_, **__: policy,
            policy_of=lambda record: policy,
            image_config=lambda digest: ImageConfig(),
            new_container=lambda dirs, cid: self.change(directory=1),
            write_container_files=lambda dirs, record, made, config: made,
            sweep_container=lambda cid: self.change(directory=0),
            sweep_strangers=lambda known: None if CID in known else self.change(directory=0),
            read_exit=self._read_exit,
            incomplete_logs=quiet,
            dropped=quiet,
        )
        return services

    def _read_exit(self, state_dir: Any, status: Any) -> ExitRecord | None:
        found = self.state.exit_record
        same = found is not None and (found.instance, found.run) == (status.instance, status.run)
        return found if same and self.state.directory else None


class _Places:
    """The places of the container, as far as they are asked for."""

    def __init__(self, world: World) -> None:
        self.state = self.root = None
        self.rootfs = SimpleNamespace(exists=lambda: world.state.directory == 2)

    def marker(self, instance: str) -> str:
        return instance


class Delivered:
    """A message in the worker's hands."""

    def __init__(self, world: World, made: Message) -> None:
        self.headers: dict[str, str] = {}
        self._world = world
        self._message = made
        self.subject = SUBJECTS.command(NODE, CID, made.verb)
        self.data = made.body
        self.stream_seq = made.seq
        self.time = START + timedelta(seconds=made.seq)

    async def ack(self) -> None:
        await self._world.effect("ack")
        left = tuple(one for one in self._world.state.stream if one is not self._message)
        self._world.change(stream=left)

    async def nak(self, delay_s: float) -> None:
        raise Violation(f"{self._message.id} was sent back")

    async def term(self) -> None:
        await self.ack()


def _request(record: ContainerRecord, policy: Any, told: Any = None) -> StartRequest:
    status = record.status
    return StartRequest(
        cid=CID,
        instance=status.instance,
        run=status.run,
        program="/bin/true",
        argv=[],
        env={},
        cwd="/",
        plan={},
        state_dir="/",
    )


def _leaf(group: BaseException) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group


# -- what happens to a state while no worker is there


def without_launcher() -> dict[str, Any]:
    """The launcher dies, and every process with it; nobody writes an exit record."""
    return {"launcher": False, "launched": None, "guarded": False}


def with_exit(state: State, code: int) -> dict[str, Any]:
    found = state.launched
    assert found is not None
    ended = ExitRecord(cid=CID, instance=found.instance, run=found.run, exit_code=code, finished_at_us=2)
    return {"launched": msgspec.structs.replace(found, exit=ended), "exit_record": ended}


def record_of(state: State) -> ContainerRecord | None:
    rows = rows_of(state, "containers")
    return decode_record(rows[0][2]) if rows else None
