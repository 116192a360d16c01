"""The worker's end of the launcher's socket: find the launcher or start one, ask, hear of exits and output.

Requests carry an id and are answered in any order. When the socket ends, the launcher is gone: what was asked
fails with Unavailable, and `on_lost` is called once.
"""

import asyncio
import base64
import itertools
import json
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, cast

import msgspec
from loguru import logger

from worker.errors import (
    Conflict,
    ContractError,
    Internal,
    InvalidCommand,
    NotFound,
    ResourceExhausted,
    StartFailed,
    Unavailable,
    Unsupported,
)
from worker.launcher import records
from worker.launcher.protocol import (
    CONFLICT,
    EXHAUSTED,
    HEADER_BYTES,
    INVALID,
    MAX_FRAME,
    NOT_FOUND,
    PROTOCOL_MAX,
    PROTOCOL_MIN,
    START_FAILED,
    UNSUPPORTED,
    ProtocolError,
    decode_body,
    encode_frame,
)

START_TIMEOUT_S = 20.0
CONNECT_TIMEOUT_S = 10.0
POLL_S = 0.01
ALREADY_RUNNING = 75

_ERRORS: dict[str, type[ContractError]] = {
    CONFLICT: Conflict,
    EXHAUSTED: ResourceExhausted,
    INVALID: InvalidCommand,
    NOT_FOUND: NotFound,
    START_FAILED: StartFailed,
    UNSUPPORTED: Unsupported,
}


class ExitRecord(msgspec.Struct, frozen=True, kw_only=True):
    """How a run ended. `exit_code` is the status or minus the signal; `lost`: nobody saw it end.

    `killed_by_us` is what of ours ended it: `stop`, `kill_tree`, `signal` (a SIGKILL), `shutdown`, or None.
    """

    cid: str
    instance: str
    run: int
    exit_code: int
    finished_at_us: int
    cpu_limit: bool = False
    killed_by_us: str | None = None
    lost: bool = False
    usage: dict[str, Any] = {}


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """A program that runs: it and its shim, each by pid and start time (the platform's unit)."""

    pid: int
    start_time: int
    started_at_us: int
    shim_pid: int
    shim_start_time: int


class LaunchedContainer(msgspec.Struct, frozen=True, kw_only=True):
    """What the launcher knows of a container; `exit` is set once its run has ended."""

    cid: str
    instance: str
    run: int
    pid: int | None
    start_time: int
    started_at_us: int
    shim_pid: int
    shim_start_time: int
    port: int | None = None
    exit: ExitRecord | None = None


class StartRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A run to begin. `max_log_bytes` and `max_rate` (bytes, bytes per second) bound each stream."""

    cid: str
    instance: str
    run: int
    program: str
    argv: list[str]
    env: dict[str, str]
    cwd: str
    plan: dict[str, Any]
    state_dir: str
    max_log_bytes: int | None = None
    max_rate: int | None = None
    cpu_time_limit_s: float | None = None


class ExecRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A program to run beside the container's own, under the sandbox that the run began with."""

    program: str
    argv: list[str]
    env: dict[str, str]
    cwd: str
    stdin: bytes = b""
    timeout_s: float = 60.0
    max_bytes: int = 256 * 1024


class ExecResult(msgspec.Struct, frozen=True, kw_only=True):
    exit_code: int
    stdout: bytes
    stderr: bytes
    truncated: bool
    timed_out: bool


class Home(Protocol):
    """What of the data directory counts here."""

    root: Path
    key_path: Path

    @property
    def launcher_socket(self) -> Path: ...


class Launcher:
    """A connection to the launcher of one data directory. Make one with `attach`."""

    def __init__(self, home: Home) -> None:
        self.on_exit: Callable[[ExitRecord], None] = _ignore
        self.on_output: Callable[[list[tuple[str, str, int]]], None] = _ignore
        self.on_lost: Callable[[], None] = _nothing
        self.pid = 0
        self._home = home
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._wire: _Wire | None = None
        self._closed = False

    @classmethod
    async def attach(cls, home: Home, *, spawn: bool = True) -> "Launcher":
        """Connect to the launcher that is there, or with `spawn` start one. Unavailable when neither works."""
        launcher = cls(home)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + CONNECT_TIMEOUT_S
        may_spawn = spawn
        while True:
            sock = _connect(home.launcher_socket)
            if sock is not None:
                await launcher._greet(sock)
                return launcher
            if may_spawn:
                # Only one spawn: when another worker's launcher is just starting, it is waited for.
                may_spawn = not await _spawn(home)
            elif not spawn or loop.time() > deadline:
                raise Unavailable(f"no launcher answers at {home.launcher_socket}")
            else:
                await asyncio.sleep(POLL_S)

    async def _greet(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        sock.setblocking(False)
        self._wire = _Wire(self)
        await loop.create_unix_connection(lambda: self._wire or _Wire(self), sock=sock)
        key = self._home.key_path.read_text("ascii").strip()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                answer = await self._ask("hello", key=key, protocol=[PROTOCOL_MIN, PROTOCOL_MAX], events=True)
        except TimeoutError:
            await self.close()
            raise Unavailable(f"the launcher at {self._home.launcher_socket} does not answer") from None
        except ContractError as failure:
            await self.close()
            raise Unavailable(f"the launcher refuses this worker: {failure.message}") from failure
        self.pid = answer["pid"]

    async def close(self) -> None:
        """Leave the launcher alone; it and its containers go on. `on_lost` is not called."""
        self._closed = True
        if self._wire is not None:
            await self._wire.close()

    # -- ops

    async def containers(self) -> list[LaunchedContainer]:
        answer = await self._ask("containers")
        return [msgspec.convert(c, LaunchedContainer) for c in answer["containers"] if c["shim_pid"]]

    async def reserve_port(self, cid: str, *, port: int | None = None) -> int:
        """Hold a port of 127.0.0.1 for `cid`: a given one, or any. ResourceExhausted when it is taken."""
        return int((await self._ask("reserve_port", cid=cid, port=port))["port"])

    async def release_port(self, cid: str) -> None:
        await self._ask("release_port", cid=cid)

    async def start(self, request: StartRequest) -> Started:
        """Run a program. StartFailed names the step between fork and exec that failed."""
        answer = await self._ask(
            "start",
            cid=request.cid,
            instance=request.instance,
            run=request.run,
            program=request.program,
            argv=request.argv,
            env=request.env,
            cwd=request.cwd,
            plan=request.plan,
            state_dir=request.state_dir,
            limits={
                "max_log_bytes": request.max_log_bytes,
                "max_rate": request.max_rate,
                "cpu_time_limit_s": request.cpu_time_limit_s,
            },
        )
        return msgspec.convert(answer, Started)

    async def signal(self, cid: str, instance: str, run: int, signum: int) -> None:
        """Send a signal to the program. NotFound when it does not run."""
        await self._ask("signal", cid=cid, instance=instance, run=run, signum=signum)

    async def stop(self, cid: str, instance: str, run: int, signum: int, timeout_s: float) -> ExitRecord:
        """Signal the program, kill the tree after `timeout_s`; returns when no process of it is left."""
        answer = await self._ask(
            "stop", cid=cid, instance=instance, run=run, signum=signum, timeout_s=timeout_s
        )
        return _record(answer["record"])

    async def kill_tree(self, cid: str, instance: str, run: int) -> ExitRecord | None:
        """SIGKILL for every process of the run; returns when none is left. None: it never ran."""
        record = (await self._ask("kill_tree", cid=cid, instance=instance, run=run))["record"]
        return None if record is None else _record(record)

    async def exec(self, cid: str, request: ExecRequest) -> ExecResult:
        """Run a program in a running container. Conflict when it does not run, StartFailed."""
        answer = await self._ask(
            "exec",
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
        """What was captured before `offset` has been read: tell again when there is more."""
        if self._wire is not None:
            self._wire.send({"op": "ack_output", "cid": cid, "stream": stream, "offset": offset})

    async def forget(self, cid: str, instance: str) -> None:
        """The exit is in the journal: the launcher need not keep it."""
        await self._ask("forget", cid=cid, instance=instance)

    async def shutdown(self, *, kill: bool) -> None:
        """End the launcher. With `kill` its containers end first, else Conflict while any runs."""
        self._closed = True
        try:
            await self._ask("shutdown", kill=kill)
        except Unavailable as failure:
            # The answer may be lost with the process that sent it.
            logger.debug("the launcher ended: {}", failure.message)
        await self.close()

    # -- frames

    async def _ask(self, op: str, **fields: Any) -> dict[str, Any]:
        if self._wire is None or not self._wire.open:
            raise Unavailable("the launcher is gone")
        number = next(self._ids)
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            self._wire.send({"id": number, "op": op, **fields})
            return await future
        finally:
            self._waiting.pop(number, None)

    def _heard(self, message: dict[str, Any]) -> None:
        event = message.get("event")
        if event == "exit":
            self.on_exit(_record(message["record"]))
        elif event == "output":
            self.on_output([(cid, stream, end) for cid, stream, end in message["items"]])
        else:
            future = self._waiting.get(message.get("id", 0))
            if future is None or future.done():
                return
            if "error" in message:
                future.set_exception(_failure(message["error"]))
            else:
                future.set_result(message["ok"])

    def _lost(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(Unavailable("the launcher died before it answered"))
        if not self._closed:
            self._closed = True
            self.on_lost()


class _Wire(asyncio.Protocol):
    """Frames on a socket."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._transport: asyncio.Transport | None = None
        self._data = bytearray()
        self._ended = asyncio.Event()

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, message: dict[str, Any]) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode_frame(message))

    async def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
            await self._ended.wait()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none of asyncio's classes.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._data += data
        at = 0
        while len(self._data) - at >= HEADER_BYTES:
            length = int.from_bytes(self._data[at : at + HEADER_BYTES], "big")
            if length > MAX_FRAME:
                self._break(f"a frame of {length} bytes")
                return
            end = at + HEADER_BYTES + length
            if len(self._data) < end:
                break
            try:
                message = decode_body(bytes(self._data[at + HEADER_BYTES : end]))
            except ProtocolError as failure:
                self._break(str(failure))
                return
            at = end
            self._launcher._heard(message)
        del self._data[:at]

    def _break(self, why: str) -> None:
        logger.error("the launcher sent what cannot be understood: {}", why)
        if self._transport is not None:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended.set()
        self._launcher._lost()


def read_exit_record(state_dir: Path) -> ExitRecord | None:
    """The record that a launcher left beside the container's state; None when there is none to be read."""
    try:
        raw = (state_dir / records.NAME).read_bytes()
        return _record(json.loads(raw))
    except (OSError, ValueError, ContractError):
        return None


def _record(wire: dict[str, Any]) -> ExitRecord:
    try:
        return msgspec.convert(wire, ExitRecord)
    except msgspec.ValidationError as failure:
        raise Internal(f"the launcher's exit record cannot be read: {failure}") from failure


def _failure(wire: dict[str, Any]) -> ContractError:
    kind = _ERRORS.get(wire.get("code", ""), Internal)
    return kind(str(wire.get("message", "the launcher refused")))


def _connect(path: Path) -> socket.socket | None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(str(path))
    except OSError:
        sock.close()
        return None
    return sock


async def _spawn(home: Home) -> bool:
    """Start a launcher of its own session; it answers when this returns. False: another one is starting."""
    program = Path(__file__).parent / "launcher" / "__main__.py"
    # A file, not a pipe: what the launcher inherits must not keep us waiting for the end of it.
    with tempfile.TemporaryFile() as said:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-S",
            str(program),
            "--data-dir",
            str(home.root),
            "--key-file",
            str(home.key_path),
            "--socket",
            str(home.launcher_socket),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=said,
            env={"PATH": os.defpath, "LC_ALL": "C.UTF-8"},
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                code = await process.wait()
        except TimeoutError:
            with suppress(ProcessLookupError):
                process.kill()
            raise Unavailable(f"the launcher did not start within {START_TIMEOUT_S:g} s") from None
        said.seek(0)
        reason = said.read(4096).decode(errors="replace").strip()
    if code not in (0, ALREADY_RUNNING):
        raise Unavailable(f"the launcher did not start: {reason or f'exit code {code}'}")
    return code == 0


def _ignore(_: object) -> None:
    """Nobody has asked to be told yet."""


def _nothing() -> None:
    """Nobody has asked to be told yet."""
