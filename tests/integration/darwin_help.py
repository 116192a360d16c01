"""Real launchers of this system that take it for a Mac: the stand-in of libSystem shows its processes.

The stand-in (tests/unit/libsystem) tells of real processes as libproc would, but of those only that a launcher
of this test started, and keeps sandboxes in what is inherited over fork and exec. The launcher is the shipped
one; only the entry script below gives it another machine.
"""

import contextlib
import itertools
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import worker.launcher
from tests.integration.launcher_help import Home, data_directory, until
from tests.unit.fake_kqueue import names
from worker import supervisor, supervisor_wire
from worker.launcher.darwin import DarwinSystem
from worker.platform.base import Limits, PathRule, SandboxPolicy
from worker.platform.darwin.driver import DarwinDriver
from worker.platform.darwin.libproc import LibProc
from worker.platform.darwin.libsystem import load
from worker.supervisor import StartRequest

ENTRY = """
import runpy, sys
runpy.run_path({main!r}, run_name="entry")["make_packages"]()
from worker.launcher.darwin import DarwinSystem
from worker.launcher.linux import LinuxSystem
from worker.launcher.main import Machine, main
from worker.platform.darwin.enforce import Enforcer
from worker.platform.darwin.libsystem import load

class System(DarwinSystem):
    peer = LinuxSystem.peer  # the sockets are this system's

library = load({library!r})
library.fake_live({folder!r})
library.fake_live_tag({tag})
library.fake_live_reaper({reaper})
library.fake_live_join()
sys.exit(main(sys.argv[1:], Machine(System(library), ("darwin", Enforcer({library!r})))))
"""

# A child, and an orphan that is nobody's child, in a session of its own, without any environment.
FAMILY = """
import os, sys, time
folder = sys.argv[1]
def note(name):
    with open(f'{folder}/{name}.new', 'w') as file:
        file.write(str(os.getpid()))
    os.rename(f'{folder}/{name}.new', f'{folder}/{name}')
if os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
    os.environ.clear()
    held = bytearray(int(sys.argv[2]))
    held[::4096] = b'x' * len(held[::4096])
    note('orphan')
    time.sleep(600)
if os.fork() == 0:
    note('child')
    time.sleep(600)
time.sleep(600)
"""

_tags = itertools.count(random.SystemRandom().randrange(399_000))


class Family:
    """The program FAMILY: itself, its child and its orphan, all alive."""

    def __init__(self, main: int, shim: int, shim_start: int, child: int, orphan: int) -> None:
        self.main, self.shim, self.shim_start = main, shim, shim_start
        self.child, self.orphan = child, orphan
        self.pids = (main, child, orphan)


class Mac:
    """A data directory whose launchers see a Mac. `folder` is where the stand-in writes."""

    def __init__(self, home: Home, library: Path) -> None:
        self.home = home
        self.folder = home.root / "mac"
        self.folder.mkdir()
        # A library of its own, as it holds on to this folder.
        own = self.folder / library.name
        shutil.copy(library, own)
        tag = next(_tags)
        self.library = load(str(own))
        self.library.fake_live(os.fsencode(self.folder))
        self.library.fake_live_tag(tag)
        reaper = reaper_of_orphans()
        self.library.fake_live_reaper(reaper)
        self.driver = DarwinDriver(self.library, release=15, kqueue=names)
        self.system = DarwinSystem(self.library)
        self.entry = self.folder / "launch.py"
        self.entry.write_text(
            ENTRY.format(
                main=str(Path(worker.launcher.__file__).parent / "__main__.py"),
                library=str(own),
                folder=os.fsencode(self.folder),
                tag=tag,
                reaper=reaper,
            )
        )

    def policy(self, cid: str, **changes: Any) -> SandboxPolicy:
        root = self.home.root / "containers" / cid
        (root / "rootfs").mkdir(parents=True, exist_ok=True)
        facts: dict[str, Any] = {
            "container": cid,
            "instance": f"I-{cid}",
            "rootfs": str(root / "rootfs"),
            "tmp": str(root / "tmp"),
            "state_dir": str(root / "state"),
            "paths": (PathRule(str(root / "rootfs"), "rwx", "rootfs"),),
            "marker": self.marker(cid),
        }
        return SandboxPolicy(**{**facts, **changes})

    def marker(self, cid: str) -> str:
        return f"{self.home.root}/marker-{cid}"

    def request(self, cid: str, *argv: str, limits: Limits | None = None, **fields: Any) -> StartRequest:
        plan = self.driver.plan(self.policy(cid, limits=limits or Limits()))
        return self.home.request(cid, *argv, instance=f"I-{cid}", plan=plan, **fields)

    def shell(self, cid: str, script: str, **fields: Any) -> StartRequest:
        return self.request(cid, "/bin/sh", "-c", script, **fields)

    def sandboxes(self) -> list[list[str]]:
        """What every sandbox was made of: the profile's text, then its parameters."""
        files = sorted(self.folder.glob("sandbox-*"), key=lambda file: int(file.name.partition("-")[2]))
        return [os.fsdecode(file.read_bytes()).split("\0")[:-1] for file in files]

    def sandbox_of(self, pid: int) -> int:
        return int(self.library.live_sandbox(pid))

    def calls(self, function: str) -> list[tuple[int, str]]:
        """(pid, arguments) of every call of a launcher and its children."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        found = [line.split(" ", 2) for line in lines]
        return [(int(pid), " ".join(rest)) for pid, name, *rest in found if name == function]

    def confined(self) -> list[int]:
        """Every living process in one of the sandboxes of this folder."""
        entries = LibProc(self.library).entries()
        return [one.pid for one in entries if one.alive and self.sandbox_of(one.pid) > 0]

    def alive(self, pid: int) -> bool:
        process = self.system.find(pid)
        return process is not None and process.alive

    def launchers(self) -> list[int]:
        """Every living process of the launcher's own: it, its nursery, its shims."""
        entries = LibProc(self.library).entries()
        return [one.pid for one in entries if one.alive and self.sandbox_of(one.pid) == 0]

    async def nothing_left(self) -> None:
        """Wait until no launcher, shim or program of this folder lives; says what does when that takes long."""
        try:
            await until(lambda: not self.confined() and not self.launchers())
        except TimeoutError:
            left = {"launchers": self.launchers(), "confined": self.confined()}
            raise AssertionError(f"{left} are left; the launcher said: {self.home.log()}") from None


def reaper_of_orphans() -> int:
    """The process that an orphan of ours goes to: pid 1, or a subreaper above us."""
    read, write = os.pipe()
    between = os.fork()
    if between == 0:
        parent = os.getpid()
        if os.fork() == 0:
            while os.getppid() == parent:
                time.sleep(0.001)
            os.write(write, b"%d" % os.getppid())
        os._exit(0)
    os.close(write)
    os.waitpid(between, 0)
    said = os.read(read, 20)
    os.close(read)
    return int(said)


@contextlib.asynccontextmanager
async def a_mac(library: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Mac]:
    """Whatever it started is killed in the end."""
    async with data_directory() as home:
        mac = Mac(home, library)
        for module in (supervisor, supervisor_wire):
            monkeypatch.setattr(module, "launcher_program", lambda: (sys.executable, str(mac.entry)))
        monkeypatch.setattr(supervisor, "is_alive", lambda pid, start: _same(mac, pid, start))
        try:
            yield mac
        finally:
            for pid in (*mac.launchers(), *mac.confined()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await until(lambda: not mac.launchers() and not mac.confined())


def _same(mac: Mac, pid: int, start: int) -> bool:
    process = mac.system.find(pid)
    return process is not None and process.alive and process.start == start
