"""Real launcher processes in short temporary folders, and what tests ask of them."""

import asyncio
import contextlib
import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from worker.capture_files import STREAMS
from worker.capture_reader import CaptureReader, RunEnd
from worker.launcher.processes import system
from worker.launcher.protocol import FrameBuffer, decode_body, encode_frame
from worker.supervisor import ExitRecord, Launcher, StartRequest

SH = "/bin/sh"
NO_SANDBOX = {"platform": "none"}
PATH = "/usr/local/bin:/usr/bin:/bin"


class Home:
    """A data directory as far as a launcher needs one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.key_path = root / "launcher.key"
        self.key_path.write_text(secrets.token_hex(32))
        self.key_path.chmod(0o600)

    @property
    def launcher_socket(self) -> Path:
        return self.root / "launcher.sock"

    def state(self, cid: str) -> Path:
        return self.root / "containers" / cid / "state"

    def request(self, cid: str, *argv: str, **fields: Any) -> StartRequest:
        self.state(cid).mkdir(parents=True, exist_ok=True)
        given: dict[str, Any] = {
            "cid": cid,
            "instance": "I",
            "run": 1,
            "program": argv[0],
            "argv": list(argv),
            "env": {"PATH": PATH},
            "cwd": "/",
            "plan": NO_SANDBOX,
            "state_dir": str(self.state(cid)),
        }
        return StartRequest(**{**given, **fields})

    def shell(self, cid: str, script: str, **fields: Any) -> StartRequest:
        return self.request(cid, SH, "-c", script, **fields)

    def output(self, cid: str, stream: str = "stdout") -> bytes:
        return read_stream(self.state(cid), stream).data

    def log(self) -> str:
        return (self.root / "launcher.log").read_text()


class Hearing:
    """What a launcher told on its own."""

    def __init__(self, launcher: Launcher, *, acknowledge: bool = True) -> None:
        self.launcher = launcher
        self.exits: list[ExitRecord] = []
        self.notices: list[tuple[str, str, int]] = []
        self.lost = 0
        self._acknowledge = acknowledge
        launcher.on_exit = self.exits.append
        launcher.on_output = self._output
        launcher.on_lost = self._lost

    def _output(self, items: list[tuple[str, str, int]]) -> None:
        self.notices += items
        if self._acknowledge:
            for cid, stream, end in items:
                self.launcher.ack_output(cid, stream, end)

    def _lost(self) -> None:
        self.lost += 1

    async def exit_of(self, cid: str, run: int = 1) -> ExitRecord:
        await until(lambda: any((e.cid, e.run) == (cid, run) for e in self.exits))
        return next(e for e in self.exits if (e.cid, e.run) == (cid, run))


class StreamContent:
    """A stream's files as the worker's own reader sees them."""

    def __init__(self) -> None:
        self.data = b""
        self.lost: list[tuple[int, int, str]] = []
        self.ends: list[RunEnd] = []
        self.end = 0


def read_stream(state_dir: Path, stream: str) -> StreamContent:
    content = StreamContent()
    reader = CaptureReader(state_dir, stream)
    while (span := reader.span(256 * 1024)) is not None:
        if span.lost is not None:
            content.lost.append((span.offset, span.length, span.lost))
        elif span.length:
            content.data += reader.read(span)
        if span.end is not None:
            content.ends.append(span.end)
        reader.commit(span)
    content.end = reader.offset
    reader.close()
    return content


async def until(condition: Callable[[], object], timeout_s: float = 15.0) -> None:
    """Wait for a condition, with a deadline."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def data_directory() -> AsyncIterator[Home]:
    """A home whose launcher, if one runs in the end, is killed with all that it runs."""
    home = Home(Path(tempfile.mkdtemp(prefix="sf-", dir="/tmp")))
    try:
        yield home
    finally:
        pid = launcher_pid(home)
        if pid is not None:
            below = descendants(pid)
            os.kill(pid, signal.SIGKILL)
            await until(lambda: not alive(pid) and not any(map(alive, below)))
        shutil.rmtree(home.root)


def launcher_pid(home: Home) -> int | None:
    """The launcher that is alive in a home."""
    try:
        facts = json.loads((home.root / "launcher.json").read_text())
    except FileNotFoundError:
        return None
    process = system().find(facts["pid"])
    same = process is not None and process.alive and process.start == facts["start_time"]
    return facts["pid"] if same else None


def alive(pid: int) -> bool:
    process = system().find(pid)
    return process is not None and process.alive


def descendants(pid: int) -> list[int]:
    return [p.pid for p in system().members(pid, (), ()) if p.alive]


class Raw:
    """A client without manners: frames and bytes as the test wants them."""

    def __init__(self, home: Home) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(10)
        self.sock.connect(str(home.launcher_socket))
        self._key = home.key_path.read_text()
        self._frames = FrameBuffer()

    def send(self, **message: Any) -> None:
        self.sock.sendall(encode_frame(message))

    def receive(self) -> dict[str, Any] | None:
        """The next frame; None at the end."""
        while (body := self._frames.next()) is None:
            try:
                data = self.sock.recv(65536)
            except ConnectionResetError:
                return None
            if not data:
                return None
            self._frames.feed(data)
        return decode_body(body)

    def hello(self, **changes: Any) -> dict[str, Any] | None:
        self.send(**{"id": 1, "op": "hello", "key": self._key, "protocol": [1, 1], **changes})
        return self.receive()

    def close(self) -> None:
        self.sock.close()


def look_into(read: Callable[[], object]) -> object:
    """What only root may see of a process that hides its memory; None for everybody else."""
    if os.geteuid() == 0:
        return read()
    try:
        read()
    except PermissionError:
        return None
    raise AssertionError("another process of the same user could look into the launcher")


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


__all__ = [
    "NO_SANDBOX",
    "PATH",
    "SH",
    "STREAMS",
    "Hearing",
    "Home",
    "Raw",
    "alive",
    "data_directory",
    "descendants",
    "digest",
    "launcher_pid",
    "look_into",
    "read_stream",
    "until",
]
