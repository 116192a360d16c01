"""The server and the workers of a run: processes of our own, to be stopped, killed and started again.

Always processes, whatever server the other tests use: this one is killed, and its store is changed behind its back.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from .entry import write_knobs

REPO = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PATIENCE_S = 15.0


class Server:
    """A nats-server with JetStream on one port, and a store that survives it. With `routes` one of a cluster."""

    def __init__(self, folder: Path, *, route_port: int = 0, routes: str = "") -> None:
        self.folder = folder
        self.name = folder.name
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self._cluster = [
            *("-n", self.name, "--cluster_name", "chaos", "--no_advertise=true"),
            *("--cluster", f"nats://127.0.0.1:{route_port}", "--routes", routes),
        ]
        if not routes:
            self._cluster = []

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        argv = ["-a", "127.0.0.1", "-p", str(self.port), "-js", "-sd", str(self.folder), *self._cluster]
        with self.folder.with_suffix(".log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(BIN / "nats-server"), *argv], stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 0.2):
                return
            time.sleep(0.01)
        raise AssertionError("nats-server did not start")

    def signal(self, number: int) -> None:
        if self.process is not None:
            self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(PATIENCE_S)
            self.process = None


def cluster(folder: Path, count: int) -> list[Server]:
    """Servers that know each other and tell no client of each other; one alone is no cluster."""
    if count == 1:
        return [Server(folder / "nats")]
    ports = [free_port() for _ in range(count)]
    routes = ",".join(f"nats://127.0.0.1:{port}" for port in ports)
    return [
        Server(folder / f"nats-{number}", route_port=port, routes=routes) for number, port in enumerate(ports)
    ]


class Worker:
    """A worker (`entry`) on a data directory of its own, with knobs to its disk and clock."""

    def __init__(self, node: str, folder: Path, config: str, url: str, data: Path, tmp: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.node = node
        self.url = url
        self.data = data
        self.tmp = tmp
        self.log_path = folder / "worker.log"
        self.config = folder / "node.toml"
        self.config.write_text(config)
        self.knobs = folder / "knobs"
        write_knobs(self.knobs)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *extra: str) -> None:
        argv = [
            sys.executable, "-m", "tests.chaos.entry", "worker", "--nats", self.url, "--node", self.node,
            "--data-dir", str(self.data), "--config", str(self.config), "--setup", "--insecure", *extra,
        ]  # fmt: skip
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                argv,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                cwd=REPO,
                env={**os.environ, "CHAOS_KNOBS": str(self.knobs), "TMPDIR": str(self.tmp)},
            )

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal(self, number: int) -> None:
        if self.running and self.process is not None:
            self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(PATIENCE_S)
            self.process = None

    def terminate(self) -> int:
        """The exit code of a worker that was told to end."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(2 * PATIENCE_S)
        self.process = None
        return code

    def launcher_pid(self) -> int | None:
        """The launcher of this data directory: of all that have its command line, the one with no such parent."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and self._is_launcher(int(entry.name)):
                with contextlib.suppress(OSError, ValueError):
                    parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                    if not self._is_launcher(parent):
                        return int(entry.name)
        return None

    def _is_launcher(self, pid: int) -> bool:
        words = cmdline(pid).split(" ")
        return any(word.endswith("launcher/__main__.py") for word in words) and str(self.data) in words

    def log_text(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""


def alive(pid: int) -> bool:
    """True while a process exists that is not a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] not in "ZX"


def cmdline(pid: int) -> str:
    return _proc(pid, "cmdline").replace("\0", " ")


def environ(pid: int) -> str:
    return _proc(pid, "environ")


def _proc(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
