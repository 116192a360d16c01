"""The launcher on a real Mac: starts, refusals, exec, measuring, re-adoption, and that nothing outlives it."""

import os
import plistlib
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.darwin_help import FAMILY, Family
from tests.integration.launcher_help import Hearing, Home, launcher_pid, until
from worker.launcher.darwin import DarwinSystem
from worker.platform.base import Limits
from worker.platform.darwin.jetsam import MIB
from worker.supervisor import ExecRequest, Launcher, LaunchFailed, StartRequest

from .mac_help import Box, a_folder, driver, seatbelt

pytestmark = pytest.mark.darwin

CHECKOUT = Path(__file__).parents[2]


class Place:
    """A data directory with a launcher, whose boxes all end with the test."""

    def __init__(self, root: Path) -> None:
        self.home = Home(root)
        self.boxes: dict[str, Box] = {}
        self.system = DarwinSystem()

    def request(self, cid: str, *argv: str, **fields: Any) -> StartRequest:
        box = self.boxes.get(cid) or self.boxes.setdefault(cid, Box(self.home.root / "containers", cid))
        limits = fields.pop("limits", Limits())
        plan = driver().plan(box.policy(limits=limits))
        given = {"instance": "A", "plan": plan, "cwd": str(box.rootfs), "state_dir": str(box.state), **fields}
        return self.home.request(cid, *argv, **given)

    def alive(self, pid: int) -> bool:
        process = self.system.find(pid)
        return process is not None and process.alive

    async def family(self, launcher: Launcher, cid: str, held: int = 0) -> Family:
        program = [os.path.realpath(sys.executable), "-I", "-S", "-c", FAMILY]
        request = self.request(cid, *program)
        tmp = self.boxes[cid].tmp
        started = await launcher.start(_with(request, str(tmp), str(held)))
        await until(lambda: (tmp / "child").exists() and (tmp / "orphan").exists())
        child, orphan = (int((tmp / name).read_text()) for name in ("child", "orphan"))
        await until(lambda: (found := self.system.find(orphan)) is not None and found.ppid == 1)
        return Family(started.pid, started.shim_pid, started.shim_start_time, child, orphan)

    def end(self) -> None:
        pid = launcher_pid(self.home)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
        for box in self.boxes.values():
            assert driver().end_leftovers(box.marker, 20)


def _with(request: StartRequest, *more: str) -> StartRequest:
    request.argv.extend(more)
    return request


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    with a_folder() as folder:
        place = Place(folder)
        try:
            yield place
        finally:
            place.end()


@pytest.fixture
async def launcher(place: Place) -> AsyncIterator[Launcher]:
    launcher = await Launcher.attach(place.home)
    yield launcher
    await launcher.close()


async def test_a_program_runs_confined(place: Place, launcher: Launcher) -> None:
    heard = Hearing(launcher)
    secret = place.home.root / "secret"
    secret.write_text("not for containers")
    request = place.request("a-0", "/bin/sh", "-c", f"pwd; cat {secret}; exit 7")
    await launcher.start(request)
    ended = await heard.exit_of("a-0")
    assert ended.exit_code == 7
    assert place.home.output("a-0").decode().strip() == str(place.boxes["a-0"].rootfs)


async def test_a_refused_profile(place: Place, launcher: Launcher) -> None:
    request = place.request("a-0", "/bin/sh", "-c", "exit 0")
    request.plan["profile"] = "(version 1)(deny default)(allow file-raed*)"
    with pytest.raises(LaunchFailed) as caught:
        await launcher.start(request)
    assert caught.value.step == "sandbox"
    assert "file-raed" in caught.value.detail


async def test_exec_is_in_the_same_sandbox(place: Place, launcher: Launcher) -> None:
    await launcher.start(place.request("a-0", "/bin/sh", "-c", "exec sleep 600"))
    script = f"cat {place.home.key_path} && exit 1; echo $$; read line"
    command = ExecRequest(
        program="/bin/sh", argv=["sh", "-c", script], env={"PATH": "/bin"}, cwd="/", stdin=b"\n"
    )
    result = await launcher.exec("a-0", command)
    assert (result.exit_code, result.stdout.strip().isdigit()) == (0, True)


async def test_a_program_that_outgrows_its_limit(place: Place, launcher: Launcher) -> None:
    heard = Hearing(launcher)
    code = "held = []\nwhile True: held.append(bytearray(b'x' * (1 << 20)))"
    program = [os.path.realpath(sys.executable), "-I", "-S", "-c", code]
    await launcher.start(place.request("a-0", *program, limits=Limits(memory_bytes=200 * MIB)))
    ended = await heard.exit_of("a-0")
    assert (ended.exit_code, ended.memory_limit) == (-signal.SIGKILL, True)


async def test_stats_are_of_the_whole_tree(place: Place, launcher: Launcher) -> None:
    family = await place.family(launcher, "a-0", 64 * MIB)
    sample = driver().processes().tree(family.shim, place.boxes["a-0"].marker)
    assert sample is not None
    assert sample.processes == 3
    assert sample.memory_bytes > 64 * MIB


@pytest.mark.parametrize("how", ["kill_tree", "its own end", "shim", "launcher", "both"])
async def test_nothing_outlives_its_container(place: Place, launcher: Launcher, how: str) -> None:
    heard = Hearing(launcher)
    family = await place.family(launcher, "a-0")
    other = await place.family(launcher, "b-0")
    if how == "kill_tree":
        await launcher.kill_tree("a-0", "A", 1)
    elif how == "its own end":
        os.kill(family.main, signal.SIGKILL)
        await heard.exit_of("a-0")
    elif how == "shim":
        os.kill(family.shim, signal.SIGKILL)
        await heard.exit_of("a-0")
    elif how == "launcher":
        os.kill(launcher.pid, signal.SIGKILL)
    else:
        for signum in (signal.SIGSTOP, signal.SIGKILL):
            for pid in (launcher.pid, family.shim):
                os.kill(pid, signum)
        assert driver().end_leftovers(place.boxes["a-0"].marker, 20)
    await until(lambda: not any(place.alive(pid) for pid in family.pids))
    if how in ("kill_tree", "its own end", "shim"):
        assert all(place.alive(pid) for pid in other.pids)


async def test_a_new_worker_adopts(place: Place, launcher: Launcher) -> None:
    family = await place.family(launcher, "a-0")
    await launcher.close()
    again = await Launcher.attach(place.home, spawn=False)
    try:
        [known] = await again.containers()
        assert (known.pid, known.shim_pid, known.shim_start_time) == (
            family.main,
            family.shim,
            family.shim_start,
        )
        await again.reexec()
        assert all(place.alive(pid) for pid in family.pids)
        assert seatbelt().holds_marker(family.orphan, place.boxes["a-0"].marker)
    finally:
        await again.close()


# -- launchd

AGENT = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from types import SimpleNamespace
from worker.supervisor import Launcher
async def main():
    root = Path(sys.argv[2])
    home = SimpleNamespace(
        root=root, key_path=root / "launcher.key", launcher_socket=root / "launcher.sock"
    )
    launcher = await Launcher.attach(home)
    (root / "attached").touch()
    await asyncio.sleep(600)
asyncio.run(main())
"""


async def test_launchd_ends_the_worker_and_leaves_its_containers(place: Place) -> None:
    """`AbandonProcessGroup`, as in deploy/launchd: a worker is replaced, its containers go on."""
    root, label = place.home.root, f"dev.sandfleet.verify.{secrets.token_hex(4)}"
    job = {
        "Label": label,
        "ProgramArguments": [sys.executable, "-c", AGENT, str(CHECKOUT), str(root)],
        "AbandonProcessGroup": True,
        "RunAtLoad": True,
        "StandardErrorPath": str(root / "agent.log"),
    }
    path = root / f"{label}.plist"
    path.write_bytes(plistlib.dumps(job))
    domain = f"gui/{os.getuid()}"
    loaded = subprocess.run(
        ["/bin/launchctl", "bootstrap", domain, str(path)], capture_output=True, text=True, check=False
    )
    if loaded.returncode != 0:
        pytest.skip(f"no session of launchd to load an agent into: {loaded.stderr.strip()}")
    try:
        await until(lambda: (root / "attached").exists(), 60)
        ours = await Launcher.attach(place.home, spawn=False)
        try:
            family = await place.family(ours, "a-0")
        finally:
            await ours.close()
    finally:
        subprocess.run(["/bin/launchctl", "bootout", f"{domain}/{label}"], check=False)
    assert all(place.alive(pid) for pid in family.pids)
    again = await Launcher.attach(place.home, spawn=False)
    try:
        assert [known.pid for known in await again.containers()] == [family.main]
        await again.kill_tree("a-0", "A", 1)
        assert not any(place.alive(pid) for pid in family.pids)
    finally:
        await again.close()
