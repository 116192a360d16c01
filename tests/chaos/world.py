"""The processes and folders of one run. Nothing outside of them is ever touched."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

from tests.acceptance.harness import Server, Worker, alive

from .entry import write_knobs
from .link import Link

REPO = Path(__file__).parents[2]
NODE = "n1"
DISK_BYTES = 192 * 1024 * 1024
END_S = 30.0
CONFIG = """
[policy]
register_roots = ["{images}"]
write = ["{witness}"]
"""


class ChaosWorker(Worker):
    """A worker behind the link, with knobs to its disk and clock."""

    def __init__(self, folder: Path, server: Server, config: str, url: str, data: Path | None = None) -> None:
        super().__init__(folder, server, NODE, config)
        self.url = url
        self.data = data or folder / "data"
        self.knobs = folder / "knobs"
        write_knobs(self.knobs)

    def argv(self, *extra: str) -> list[str]:
        return [
            sys.executable, "-m", "tests.chaos.entry", "worker", "--nats", self.url, "--node", self.node,
            "--data-dir", str(self.data), "--config", str(self.config), "--setup", "--insecure", *extra,
        ]  # fmt: skip

    def start(self, *extra: str) -> None:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.argv(*extra),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                cwd=REPO,
                env={**os.environ, "CHAOS_KNOBS": str(self.knobs)},
            )

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal(self, number: int) -> None:
        if self.running and self.process is not None:
            self.process.send_signal(number)


class World:
    """Made by `open_world`. `private`: this process has mounts of its own, so a small disk can be mounted."""

    def __init__(self, folder: Path, link: Link, server: Server, *, private: bool) -> None:
        self.folder = folder
        self.link = link
        self.server = server
        self.private = private
        self.disk = folder / "disk"
        self.witness = folder / "witness"
        self.image = folder / "images" / "chaos"
        for made in (self.disk, self.witness, self.image):
            made.mkdir(parents=True, exist_ok=True)
        (self.image / "readme").write_text("for the chaos test\n")
        if private:
            _mount(self.disk)
        self.worker = ChaosWorker(folder / "node", server, self.config, link.url, self.disk / "data")
        self.server_lock = asyncio.Lock()
        self.worker_lock = asyncio.Lock()
        self.others: list[ChaosWorker] = []

    @property
    def config(self) -> str:
        return CONFIG.replace("{images}", str(self.image.parent)).replace("{witness}", str(self.witness))

    def another(self, name: str, data: Path | None = None) -> ChaosWorker:
        """A second worker under the same name, straight to the server."""
        made = ChaosWorker(self.folder / name, self.server, self.config, self.server.url, data)
        self.others.append(made)
        return made

    # -- what is left

    def leftovers(self) -> list[str]:
        """Of containers, while worker and launcher still run."""
        found = [f"process {p}" for p in self._processes() if "SANDFLEET_INSTANCE=" in _environ(p)]
        for place in ("containers", "spool", "volumes"):
            folder = self.worker.data / place
            entries = [e.name for e in folder.iterdir()] if folder.is_dir() else []
            found += [f"{place}/{name}" for name in entries if name != "sent.log"]
        found += [f"mount {line}" for line in _mounts_below(self.worker.data)]
        launcher = self.worker.launcher_pid()
        if launcher is not None:
            found += [f"port {port}" for port in _listening(launcher)]
        return found

    def processes(self) -> list[str]:
        """Everything that is still alive of this run, in words."""
        server = self.server.process
        ours = {os.getpid(), server.pid if server is not None else 0}
        return [
            f"process {pid}: {_cmdline(pid)}" for pid in self._processes() if pid not in ours and alive(pid)
        ]

    def _processes(self) -> list[int]:
        """All that name this run's folder in their arguments or environment."""
        mark = str(self.folder)
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                pid = int(entry.name)
                if pid != os.getpid() and (mark in _cmdline(pid) or mark in _environ(pid)):
                    found.append(pid)
        return found

    # -- the end

    async def end_nodes(self) -> list[str]:
        """End workers and launchers in order; gives what went wrong."""
        wrong = []
        for worker in (self.worker, *self.others):
            if worker.running:
                code = await asyncio.to_thread(worker.terminate)
                if code != 0:
                    wrong.append(f"the worker ended with {code} when it was told to end")
            launcher = worker.launcher_pid()
            if launcher is not None:
                os.kill(launcher, signal.SIGTERM)
                if not await _gone(launcher):
                    wrong.append(f"the launcher {launcher} does not end")
        return wrong

    def kill_all(self) -> None:
        """Whatever is left of this run, by pid."""
        for pid in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextlib.asynccontextmanager
async def open_world(*, private: bool, keep: bool = False) -> AsyncIterator[World]:
    folder = Path(tempfile.mkdtemp(prefix="sandfleet-chaos-"))
    server = Server(folder / "nats")
    try:
        await asyncio.to_thread(server.start)
        async with Link(server.port) as link:
            world = World(folder, link, server, private=private)
            try:
                yield world
            finally:
                world.kill_all()
                for worker in (world.worker, *world.others):
                    if worker.process is not None:
                        await asyncio.to_thread(worker.process.wait, 10)
    finally:
        if server.process is not None:
            await asyncio.to_thread(server.kill)
        if private and os.path.ismount(folder / "disk"):
            subprocess.run(["umount", "-l", str(folder / "disk")], check=True)
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _mount(disk: Path) -> None:
    """A small disk in memory, in this process's own mount namespace: it can be filled without harm."""
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=0700", "sandfleet-chaos", str(disk)],
        check=True,
    )


async def _gone(pid: int) -> bool:
    deadline = time.monotonic() + END_S
    while alive(pid):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.02)
    return True


def _cmdline(pid: int) -> str:
    return _proc(pid, "cmdline").replace("\0", " ")


def _environ(pid: int) -> str:
    return _proc(pid, "environ")


def _proc(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _mounts_below(folder: Path) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if line.split()[4].startswith(f"{folder}/")]


def _listening(pid: int) -> list[int]:
    """TCP ports on which a process listens."""
    inodes = set()
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                target = os.readlink(entry)
                if target.startswith("socket:["):
                    inodes.add(target[8:-1])
    ports = []
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[9] in inodes:
            ports.append(int(fields[1].split(":")[1], 16))
    return ports
