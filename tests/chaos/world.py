"""The processes and folders of one run. Nothing outside of them is ever touched."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

from .link import Link
from .processes import Server, Worker, alive, cluster, cmdline, environ

NODE = "n1"
DISK_BYTES = 192 * 1024 * 1024
END_S = 30.0
CONFIG = """
[nats]
replicas = {replicas}

[policy]
register_roots = ["{images}"]
write = ["{witness}"]
"""


class World:
    """Made by `open_world`. `private`: this process has mounts of its own, so a small disk can be mounted."""

    def __init__(self, folder: Path, link: Link, servers: list[Server], *, private: bool) -> None:
        self.folder = folder
        self.link = link
        self.servers = servers
        self.private = private
        self.disk = folder / "disk"
        self.witness = folder / "witness"
        self.image = folder / "images" / "chaos"
        self.tmp = folder / "tmp"
        for made in (self.disk, self.witness, self.image, self.tmp):
            made.mkdir(parents=True, exist_ok=True)
        (self.image / "readme").write_text("for the chaos test\n")
        if private:
            _mount(self.disk)
        self.worker = Worker(NODE, folder / "node", self.config, link.url, self.disk / "data", self.tmp)
        self.server_lock = asyncio.Lock()
        self.worker_lock = asyncio.Lock()
        self.others: list[Worker] = []

    @property
    def url(self) -> str:
        """The servers' own addresses, past the link."""
        return ",".join(server.url for server in self.servers)

    @property
    def is_cluster(self) -> bool:
        return len(self.servers) > 1

    @property
    def config(self) -> str:
        words = {"images": self.image.parent, "witness": self.witness, "replicas": len(self.servers)}
        config = CONFIG
        for name, value in words.items():
            config = config.replace(f"{{{name}}}", str(value))
        return config

    def another(self, name: str, data: Path) -> Worker:
        """A second worker under the same name, straight to the servers."""
        made = Worker(NODE, self.folder / name, self.config, self.url, data, self.tmp)
        self.others.append(made)
        return made

    # -- what is left

    def leftovers(self) -> list[str]:
        """Of containers, while worker and launcher still run."""
        found = [f"process {p}" for p in self._processes() if "SANDFLEET_INSTANCE=" in environ(p)]
        for place in ("containers", "spool", "volumes"):
            folder = self.worker.data / place
            entries = [e.name for e in folder.iterdir()] if folder.is_dir() else []
            found += [f"{place}/{name}" for name in entries if name != "sent.log"]
        launcher = self.worker.launcher_pid()
        watched = ["self", *(str(p.pid) for p in [self.worker.process] if p is not None)]
        watched += [str(launcher)] if launcher is not None else []
        found += [f"mount {line}" for pid in watched for line in _mounts_below(self.worker.data, pid)]
        if launcher is not None:
            found += [f"port {port}" for port in _listening(launcher)]
        return found

    def ended(self) -> list[str]:
        """Everything of this run that workers and launchers left although they have ended, in words."""
        ours = {os.getpid(), *(s.process.pid for s in self.servers if s.process is not None)}
        found = [
            f"process {pid}: {cmdline(pid)}" for pid in self._processes() if pid not in ours and alive(pid)
        ]
        return found + [f"directory {entry}" for entry in self.tmp.iterdir()]

    def _processes(self) -> list[int]:
        """All that name this run's folder in their arguments or environment."""
        mark = str(self.folder)
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                pid = int(entry.name)
                if pid != os.getpid() and (mark in cmdline(pid) or mark in environ(pid)):
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
async def open_world(*, private: bool, servers: int = 1, keep: bool = False) -> AsyncIterator[World]:
    folder = Path(tempfile.mkdtemp(prefix="sandfleet-chaos-"))
    made = cluster(folder, servers)
    try:
        for server in made:
            await asyncio.to_thread(server.start)
        async with Link(*(server.port for server in made)) as link:
            world = World(folder, link, made, private=private)
            try:
                yield world
            finally:
                world.kill_all()
                for worker in (world.worker, *world.others):
                    if worker.process is not None:
                        await asyncio.to_thread(worker.process.wait, 10)
    finally:
        for server in made:
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


def _mounts_below(folder: Path, pid: str) -> list[str]:
    """Of what a process sees; of one that has just ended nothing."""
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
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
