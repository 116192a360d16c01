"""The launcher's socket and process as the worker meets them: frames, connecting, starting."""

import asyncio
import hashlib
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, cast

import msgspec

from worker.errors import Unavailable
from worker.launcher.identity import EXIT_ALREADY_RUNNING, TREES_S
from worker.launcher.processes import system
from worker.launcher.protocol import FrameBuffer, ProtocolError, frame
from worker.supervisor_types import LauncherHome

SPAWN_TIMEOUT_S = TREES_S + 15.0
CONNECT_TIMEOUT_S = 2.0

# All that the launcher sees of this worker's environment: where its interpreter may have to find its libraries.
_KEPT_ENVIRONMENT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(dict[str, Any]).decode


class ConnectionEnded(Unavailable):
    """The launcher was there, and is not any more, or does not want this connection."""


class LauncherGone(Unavailable):
    """It has died, and its containers with it. What it was asked last, it may have done."""


class Wire(asyncio.Protocol):
    """Frames on a connected socket. `on_end` is called once, with the reason."""

    def __init__(
        self, on_message: Callable[[dict[str, Any]], None], on_end: Callable[["Wire", str], None]
    ) -> None:
        self.ended = asyncio.Event()
        self._on_message = on_message
        self._on_end = on_end
        self._frames = FrameBuffer()
        self._transport: asyncio.Transport | None = None
        self._broken = ""

    @classmethod
    async def open(
        cls,
        sock: socket.socket,
        on_message: Callable[[dict[str, Any]], None],
        on_end: Callable[["Wire", str], None],
    ) -> "Wire":
        loop = asyncio.get_running_loop()
        try:
            _, wire = await loop.create_unix_connection(lambda: cls(on_message, on_end), sock=sock)
        except BaseException:
            sock.close()
            raise
        return wire

    def send(self, message: dict[str, Any]) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame(_encode(message)))

    def abandon(self) -> None:
        """End the connection without waiting for anything."""
        if self._transport is not None:
            self._transport.abort()

    async def close(self) -> None:
        """End the connection after what was sent has gone out."""
        if self._transport is not None:
            self._transport.close()
            await self.ended.wait()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none of asyncio's classes.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._frames.feed(data)
        try:
            while (body := self._frames.next()) is not None:
                self._on_message(_decode(body))
        except (ProtocolError, msgspec.DecodeError) as failure:
            self._broken = f"it sent what cannot be understood: {failure}"
            self.abandon()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()
        self._on_end(self, self._broken or str(exc or "end of stream"))


def connect(home: LauncherHome) -> socket.socket | None:
    """A socket connected to a process of our own user; None when nobody listens there."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(CONNECT_TIMEOUT_S)
        sock.connect(str(home.launcher_socket))
        _, uid = system().peer(sock)
        sock.setblocking(False)
    except OSError:
        # Nobody is there, or its queue is full; either way it is tried again.
        sock.close()
        return None
    if uid != os.geteuid():
        sock.close()
        raise Unavailable(f"uid {uid} listens at {home.launcher_socket}, where our launcher should")
    return sock


def read_key(home: LauncherHome) -> str:
    """The secret that the launcher wants to see. Unavailable when there is none to be read."""
    try:
        return home.key_path.read_text("ascii").strip()
    except (OSError, ValueError) as failure:
        raise Unavailable(f"{home.key_path} cannot be read: {failure}") from failure


def is_alive(pid: int, start_time: int) -> bool:
    """Whether the process with this pid is still the one that started then."""
    process = system().find(pid)
    return process is not None and process.alive and process.start == start_time


def launcher_program() -> tuple[str, str]:
    """The interpreter, and this worker's own code of the launcher."""
    return sys.executable, str(Path(__file__).resolve().parent / "launcher" / "__main__.py")


@cache
def launcher_build() -> str:
    """A name for the launcher's code that this worker has: of two that are the same code it is the same.

    Reads some 70 small files, once.
    """
    here = Path(__file__).resolve().parent
    digest = hashlib.sha256(sys.version.encode())
    for folder in (here / "launcher", here / "platform", here / "platform" / os.uname().sysname.lower()):
        for file in sorted(folder.glob("*.py")):
            digest.update(f"\n{file.relative_to(here)}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


async def spawn_launcher(home: LauncherHome, *, unsandboxed: bool = False) -> bool:
    """Start a launcher in a session of its own; it listens when this returns.

    False when another one holds the directory, which is to be asked, or when this one was killed before it
    listened. Unavailable, with what it said, when it cannot start.
    """
    python, program = launcher_program()
    arguments = ["--data-dir", str(home.root), "--key-file", str(home.key_path)]
    arguments += ["--socket", str(home.launcher_socket), "--build", await asyncio.to_thread(launcher_build)]
    if unsandboxed:
        arguments.append("--unsandboxed-for-tests")
    environment = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
    # A file, not a pipe: what the launcher inherits must not keep us waiting for the end of it.
    with tempfile.TemporaryFile() as said:
        process = await asyncio.create_subprocess_exec(
            python,
            "-I",
            "-S",
            program,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=said,
            cwd="/",
            env={"LC_ALL": "C.UTF-8", **environment},
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(SPAWN_TIMEOUT_S):
                code = await process.wait()
        except BaseException as failure:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            if isinstance(failure, TimeoutError):
                raise Unavailable(f"the launcher did not start within {SPAWN_TIMEOUT_S:g} s") from None
            raise
        said.seek(0)
        reason = said.read(4096).decode(errors="replace").strip()
    if code in (EXIT_ALREADY_RUNNING, -signal.SIGKILL):
        return False
    if code:
        raise Unavailable(f"the launcher did not start: {reason or f'exit code {code}'}")
    return True
