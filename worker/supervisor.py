"""The worker's end of the launcher's socket: find the launcher or start one, ask, hear of exits and output.

Requests carry an id and are answered in any order. A connection that ends is made again; only when the
launcher itself is gone is `on_lost` called, once. What was asked meanwhile fails with Unavailable: whether
it was done is not known, `containers` tells.
"""

import asyncio
import base64
import itertools
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from loguru import logger

from worker.errors import (
    Conflict,
    ContractError,
    Internal,
    InvalidCommand,
    NotFound,
    ResourceExhausted,
    Unavailable,
    Unsupported,
)
from worker.launcher import records
from worker.launcher.protocol import (
    CONFLICT,
    EXHAUSTED,
    INVALID,
    NOT_FOUND,
    PROTOCOL_MAX,
    PROTOCOL_MIN,
    START_FAILED,
    STREAMS,
    UNAVAILABLE,
    UNSUPPORTED,
)
from worker.supervisor_news import News
from worker.supervisor_types import (
    ExecRequest,
    ExecResult,
    ExitRecord,
    LaunchedContainer,
    LauncherHome,
    LaunchFailed,
    Started,
    StartRequest,
    Usage,
)
from worker.supervisor_wire import (
    ConnectionEnded,
    LauncherGone,
    Wire,
    connect,
    is_alive,
    launcher_build,
    launcher_program,
    read_key,
    spawn_launcher,
)

__all__ = [
    "ExecRequest",
    "ExecResult",
    "ExitRecord",
    "LaunchFailed",
    "LaunchedContainer",
    "Launcher",
    "LauncherGone",
    "LauncherHome",
    "StartRequest",
    "Started",
    "Usage",
    "read_exit_record",
]

ATTACH_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 10.0
START_TIMEOUT_S = 30.0
END_TIMEOUT_S = 60.0  # beyond a stop's own: a tree that is hard to kill, or a disk that is slow
SHUTDOWN_TIMEOUT_S = 120.0
RECOVERY_TIMEOUT_S = 10.0
POLL_S = 0.005

_ERRORS: dict[str, type[ContractError]] = {
    CONFLICT: Conflict,
    EXHAUSTED: ResourceExhausted,
    INVALID: InvalidCommand,
    NOT_FOUND: NotFound,
    UNAVAILABLE: Unavailable,
    UNSUPPORTED: Unsupported,
}


class Launcher(News):
    """A connection to the launcher of one data directory. Make one with `attach`."""

    def __init__(self, home: LauncherHome) -> None:
        super().__init__()
        self.pid = 0
        self.start_time = 0
        self.build = ""
        self._home = home
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._wire: Wire | None = None
        self._recovery: asyncio.Task[None] | None = None
        self._changing: asyncio.Future[None] | None = None
        self._closed = False

    # -- finding it

    @classmethod
    async def attach(cls, home: LauncherHome, *, spawn: bool = True, unsandboxed: bool = False) -> "Launcher":
        """Connect to the launcher that is there, or with `spawn` start one. Unavailable when neither works.

        A launcher that is started here waits until the trees of one that died are gone. `unsandboxed` is
        for tests: plans of platform `none` are carried out.
        """
        launcher = cls(home)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + ATTACH_TIMEOUT_S
        while not await launcher._try_connect():
            if not spawn or loop.time() > deadline:
                raise Unavailable(f"no launcher answers at {home.launcher_socket}")
            # One that is just starting or ending is waited for; ours may have been killed before it could answer.
            if not await spawn_launcher(home, unsandboxed=unsandboxed):
                await asyncio.sleep(POLL_S)
        return launcher

    async def _try_connect(self) -> bool:
        """False when nobody takes the connection. Unavailable when somebody does, and does not obey."""
        sock = connect(self._home)
        if sock is None:
            return False
        wire = await Wire.open(sock, self._heard, self._ended)
        try:
            hello = {"key": read_key(self._home), "protocol": [PROTOCOL_MIN, PROTOCOL_MAX], "events": True}
            answer = await self._ask_on(wire, "hello", hello, ANSWER_TIMEOUT_S)
        except BaseException as failure:
            wire.abandon()
            await wire.ended.wait()
            if isinstance(failure, ConnectionEnded):
                return False
            if isinstance(failure, ContractError):
                raise Unavailable(
                    f"the launcher at {self._home.launcher_socket} does not take this worker: {failure}"
                ) from failure
            raise
        self.pid, self.start_time = answer["pid"], answer["start_time"]
        self.build = str(answer.get("build", ""))
        self._wire = wire
        return True

    async def close(self) -> None:
        """Leave the launcher alone; it and its containers go on. `on_lost` is not called."""
        self._closed = True
        if self._recovery is not None:
            self._recovery.cancel()
            await asyncio.wait([self._recovery])
        if self._wire is not None:
            await self._wire.close()

    @property
    def busy(self) -> bool:
        """Whether something was asked that is not answered yet."""
        return bool(self._waiting)

    # -- ops

    async def containers(self) -> list[LaunchedContainer]:
        """Every container that it runs, and every one that ended and is not forgotten."""
        answer = await self._ask("containers")
        return [_read(c, LaunchedContainer) for c in answer["containers"]]

    async def ports(self) -> dict[str, int]:
        """The port assigned to each container."""
        return dict((await self._ask("containers"))["ports"])

    async def reserve_port(self, cid: str, *, port: int | None = None) -> int:
        """Hold a port of 127.0.0.1 for `cid`: a given one, or any; the same again when it has one.

        Unavailable when the given one is somebody else's, ResourceExhausted when there is none.
        """
        return int((await self._ask("reserve_port", cid=cid, port=port))["port"])

    async def release_port(self, cid: str) -> None:
        await self._ask("release_port", cid=cid)

    async def start(self, request: StartRequest) -> Started:
        """Run a program; returns when it was reached. LaunchFailed names the step that failed.

        Asking again for a run that is running gives the same answer; Conflict for one that has ended, or
        while another run of the container lives. LauncherGone: it died meanwhile, and whether the program ran is
        not known.
        """
        fields = msgspec.structs.asdict(request)
        limits = {
            name: value
            for name in ("max_log_bytes", "max_rate", "cpu_time_limit_s")
            if (value := fields.pop(name)) is not None
        }
        while True:
            try:
                answer = await self._ask("start", START_TIMEOUT_S, limits=limits, **fields)
                return _read(answer, Started)
            except ConnectionEnded as failure:  # the same launcher is found again, or it is gone
                logger.info("the start of {} is asked for again: {}", request.cid, failure.message)

    async def signal(self, cid: str, instance: str, run: int, signum: int) -> None:
        """Send a signal to the program. NotFound when it does not run."""
        await self._ask("signal", cid=cid, instance=instance, run=run, signum=signum)

    async def stop(self, cid: str, instance: str, run: int, signum: int, timeout_s: float) -> ExitRecord:
        """Signal the program, kill the tree after `timeout_s`; returns when no process of it is left.

        Of several stops the earliest deadline counts. NotFound when the run is not known (any more), or
        when it was stopped before its program was reached.
        """
        answer = await self._ask(
            "stop",
            timeout_s + END_TIMEOUT_S,
            cid=cid,
            instance=instance,
            run=run,
            signum=signum,
            timeout_s=timeout_s,
        )
        if answer["record"] is None:
            raise NotFound(f"run {run} of {cid} never reached its program")
        return _read(answer["record"], ExitRecord)

    async def kill_tree(self, cid: str, instance: str, run: int) -> ExitRecord | None:
        """SIGKILL for every process of the run; returns when none is left. None: it never reached its
        program.
        """
        answer = await self._ask("kill_tree", END_TIMEOUT_S, cid=cid, instance=instance, run=run)
        return None if answer["record"] is None else _read(answer["record"], ExitRecord)

    async def exec(self, cid: str, request: ExecRequest) -> ExecResult:
        """Run a program in a running container. Conflict when that does not run; LaunchFailed."""
        answer = await self._ask(
            "exec",
            request.timeout_s + END_TIMEOUT_S,
            cid=cid,
            program=request.program,
            argv=request.argv,
            env=request.env,
            cwd=request.cwd,
            stdin=base64.b64encode(request.stdin).decode(),
            timeout_s=request.timeout_s,
            max_output=request.max_bytes,
        )
        return ExecResult(
            exit_code=answer["exit_code"],
            stdout=base64.b64decode(answer["stdout"]),
            stderr=base64.b64decode(answer["stderr"]),
            truncated=answer["truncated"],
            timed_out=answer["timed_out"],
        )

    def ack_output(self, cid: str, stream: str, offset: int) -> None:
        """What was captured before `offset` is dealt with: tell again when there is more."""
        if self._wire is not None:
            self._wire.send({"op": "ack_output", "cid": cid, "stream": stream, "offset": offset})

    async def forget(self, cid: str, instance: str) -> None:
        """The exit is in the journal: the launcher need not keep it. Conflict while the container runs."""
        await self._ask("forget", cid=cid, instance=instance)
        self._forget_told(cid, instance)

    async def reexec(self) -> None:
        """Have the launcher replace itself by this worker's code of it; its containers go on.

        What is asked meanwhile waits; what was asked before and is not answered fails with Unavailable. Conflict
        while an exec or a start is under way, Unsupported when its code or ours cannot do that: the launcher then
        goes on as it is.
        """
        python, program = launcher_program()
        build = await asyncio.to_thread(launcher_build)
        wire, changing = self._wire, asyncio.get_running_loop().create_future()
        if wire is None or self._changing is not None:
            raise Unavailable("the launcher is gone, or is being replaced already")
        self._changing = changing
        try:
            fields = {"python": python, "program": program, "build": build}
            await self._ask_on(wire, "reexec", fields, START_TIMEOUT_S)
            await wire.ended.wait()
            if self._recovery is not None:
                await asyncio.wait([self._recovery])
        finally:
            self._changing = None
            changing.set_result(None)

    async def shutdown(self, *, kill: bool) -> None:
        """End the launcher, and this connection. With `kill` its containers end first, else Conflict while
        any runs.
        """
        await self._ask("shutdown", SHUTDOWN_TIMEOUT_S, kill=kill)
        self._closed = True
        if self._wire is not None:
            await self._wire.ended.wait()
        await self.close()

    # -- requests

    async def _ask(self, op: str, timeout_s: float = ANSWER_TIMEOUT_S, /, **fields: Any) -> dict[str, Any]:
        if self._changing is not None:
            await asyncio.wait([self._changing])
        if self._recovery is not None:
            await asyncio.wait([self._recovery])
        if self._wire is None:
            raise LauncherGone("the launcher is gone")
        return await self._ask_on(self._wire, op, fields, timeout_s)

    async def _ask_on(self, wire: Wire, op: str, fields: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        if wire.ended.is_set():
            raise ConnectionEnded("the connection to the launcher has ended")
        number = next(self._ids)
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            async with asyncio.timeout(timeout_s):
                wire.send({"id": number, "op": op, **fields})
                return await future
        except TimeoutError:
            raise Unavailable(f"the launcher did not answer {op} within {timeout_s:g} s") from None
        finally:
            self._waiting.pop(number, None)

    def _heard(self, message: dict[str, Any]) -> None:
        event = message.get("event")
        if event == "exit":
            self._tell_exit(_read(message["record"], ExitRecord))
        elif event == "output":
            self._tell_output([(cid, stream, end) for cid, stream, end in message["items"]])
        else:
            future = self._waiting.get(message.get("id", 0))
            if future is None or future.done():
                return
            if "error" in message:
                future.set_exception(_failure(message["error"]))
            else:
                future.set_result(message["ok"])

    # -- the end of a connection

    def _ended(self, wire: Wire, reason: str) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(ConnectionEnded("the launcher ended the connection before it answered"))
        if wire is not self._wire:
            return
        self._wire = None
        if not self._closed and self._recovery is None:
            logger.warning("the connection to the launcher ended ({}); looking for it", reason)
            self._recovery = asyncio.get_running_loop().create_task(self._recover(), name="launcher recovery")

    async def _recover(self) -> None:
        """Connect again to the very same launcher and tell what was missed, or find that it is gone."""
        try:
            async with asyncio.timeout(RECOVERY_TIMEOUT_S):
                found = await self._reconnect() and await self._catch_up()
        except (TimeoutError, ContractError) as failure:
            logger.warning("the launcher does not come back: {}", failure or "no answer")
            found = False
        self._recovery = None
        if not found:
            self._closed = True
            if self._wire is not None:
                self._wire.abandon()
            self._tell_lost()

    async def _reconnect(self) -> bool:
        known = self.pid, self.start_time
        while not await self._try_connect():
            if not is_alive(*known):
                return False
            await asyncio.sleep(POLL_S)
        return (self.pid, self.start_time) == known

    async def _catch_up(self) -> bool:
        if self._wire is None:
            return False
        answer = await self._ask_on(self._wire, "containers", {}, ANSWER_TIMEOUT_S)
        containers = [_read(c, LaunchedContainer) for c in answer["containers"]]
        for container in containers:
            if container.exit is not None:
                self._tell_exit(container.exit)
        items = [(c.cid, name, c.ends[name]) for c in containers for name in STREAMS if c.ends.get(name)]
        if items:
            self._tell_output(items)
        return True


def read_exit_record(state_dir: Path) -> ExitRecord | None:
    """The record that a launcher left beside the container's state; None when there is none to be read."""
    try:
        raw = (state_dir / records.NAME).read_bytes()
        return msgspec.json.decode(raw, type=ExitRecord)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as failure:
        logger.warning("{} cannot be read: {}", state_dir / records.NAME, failure)
        return None


T = TypeVar("T")


def _read(wire: object, kind: type[T]) -> T:
    try:
        return msgspec.convert(wire, kind)
    except msgspec.ValidationError as failure:
        raise Internal(f"the launcher's {kind.__name__} cannot be read: {failure}") from failure


def _failure(wire: dict[str, Any]) -> ContractError:
    code, message = wire.get("code", ""), str(wire.get("message", "the launcher refused"))
    if code == START_FAILED:
        return LaunchFailed(
            message,
            step=str(wire.get("step", "")),
            errno=int(wire.get("errno", 0)),
            detail=str(wire.get("detail", "")),
        )
    return _ERRORS.get(code, Internal)(message)
