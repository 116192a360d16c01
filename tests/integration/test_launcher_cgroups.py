"""Control groups as the real launcher uses them: on a folder that is laid out like theirs, where no kernel keeps a
limit, and, where this machine lets root make one, in a real group, which may have no controller.
"""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from schemas.status import Network
from tests.integration.cgroup_launcher import FILES, lay_out
from tests.integration.launcher_help import Hearing, Home, alive, data_directory, until
from tests.integration.sandbox_help import needs_sandbox
from worker.errors import StartFailed
from worker.platform.base import Limits, NetworkPolicy, PathRule, SandboxPolicy
from worker.platform.linux.driver import LinuxDriver
from worker.supervisor import ExecRequest, Launcher, StartRequest

pytestmark = needs_sandbox

SCRIPT = Path(__file__).with_name("cgroup_launcher.py")
STAY = "echo up; while :; do sleep 60; done"
ALL = Limits(memory_bytes=64 << 20, pids=32, cpu=0.5)


class Node:
    """A home with a launcher whose groups lie in `top`, a connection to it, and what it told."""

    def __init__(self, home: Home, top: Path, how: str) -> None:
        self.home = home
        self.top = top
        self._how = how

    async def begin(self) -> None:
        home = self.home
        arguments = [str(self.top), self._how, "--data-dir", str(home.root), "--key-file", str(home.key_path)]
        command = [sys.executable, "-I", "-S", str(SCRIPT), *arguments, "--socket", str(home.launcher_socket)]
        done = await asyncio.create_subprocess_exec(*command, stdin=subprocess.DEVNULL)
        assert await done.wait() == 0
        self.launcher = await Launcher.attach(home, spawn=False)
        self.heard = Hearing(self.launcher)

    def plan(self, cid: str, limits: Limits) -> dict[str, Any]:
        rootfs, tmp = (self.home.root / "containers" / cid / name for name in ("rootfs", "tmp"))
        for folder in (rootfs, tmp):
            folder.mkdir(parents=True, exist_ok=True)
        policy = SandboxPolicy(
            container=cid,
            instance="I",
            rootfs=str(rootfs),
            tmp=str(tmp),
            state_dir=str(self.home.state(cid)),
            paths=(PathRule(str(rootfs), "rwx", "rootfs"), PathRule(str(tmp), "rwx", "tmp")),
            network=NetworkPolicy(level=Network.NONE),
            limits=limits,
        )
        return LinuxDriver(controllers=("memory", "pids", "cpu")).plan(policy)

    def request(self, cid: str, script: str = STAY, limits: Limits = ALL) -> StartRequest:
        return self.home.shell(cid, script, plan=self.plan(cid, limits))

    async def start(self, cid: str, script: str = STAY, limits: Limits = ALL) -> int:
        started = await self.launcher.start(self.request(cid, script, limits))
        if script == STAY:
            await until(lambda: b"up" in self.home.output(cid))
        return started.pid

    @property
    def groups(self) -> list[Path]:
        """Of runs, in the one folder of the launcher's."""
        return sorted(path for path in self.top.glob("sandfleet-*/*") if path.is_dir())

    @property
    def group(self) -> Path:
        (one,) = self.groups
        return one

    def removed(self) -> dict[str, dict[str, str]]:
        """What the groups held that were taken away, by name; for a folder that is laid out."""
        path = Path(f"{self.top}.removed")
        lines = path.read_text().splitlines() if path.exists() else []
        return {line["group"]: line for line in map(json.loads, lines)}


@pytest.fixture
async def laid_out(tmp_path: Path) -> AsyncIterator[Node]:
    top = tmp_path / "cgroup"
    top.mkdir()
    lay_out(str(top))
    async with data_directory() as home:
        node = Node(home, top, "laid-out")
        await node.begin()
        yield node
        await node.launcher.close()


@pytest.fixture
def real_group() -> Iterator[Path]:
    """A group of version 2 below the one that this process is in, and gone afterwards with all below it."""
    mounts, own = Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text()
    mount = re.search(r"^\S+ \S+ \S+ / (\S+) .* - cgroup2 ", mounts, re.MULTILINE)
    place = re.search(r"^0::(/.*)$", own, re.MULTILINE)
    if os.geteuid() != 0 or mount is None or place is None:
        pytest.skip("needs root and control groups of version 2")
    top = Path(os.path.normpath(f"{mount[1]}{place[1]}/sandfleet-test-{os.getpid()}"))
    try:
        top.mkdir()
    except OSError as failure:
        pytest.skip(f"no control group can be made here: {failure}")
    yield top
    for folder in [*top.glob("*/*/"), *top.glob("*/"), top]:
        if folder.is_dir():
            folder.rmdir()


@pytest.fixture
async def real(real_group: Path) -> AsyncIterator[Node]:
    async with data_directory() as home:
        node = Node(home, real_group, "real")
        await node.begin()
        yield node
        for group in node.groups:
            (group / "cgroup.kill").write_text("1")
        await node.launcher.close()


async def test_a_run_gets_a_group_with_its_limits(laid_out: Node) -> None:
    await laid_out.start("a-0")
    group = laid_out.group
    assert group.name == "a-0.I.1"
    wanted = {
        "memory.max": "67108864",
        "memory.oom.group": "1",
        "memory.swap.max": "0",
        "pids.max": "32",
        "cpu.max": "50000 100000",
    }
    assert {name: (group / name).read_text() for name in wanted} == wanted


async def test_only_what_is_limited_is_written(laid_out: Node) -> None:
    await laid_out.start("a-0", limits=Limits(pids=7))
    assert (laid_out.group / "pids.max").read_text() == "7"
    assert (laid_out.group / "memory.max").read_text() == FILES["memory.max"]
    assert (laid_out.group / "cpu.max").read_text() == FILES["cpu.max"]
    await laid_out.start("b-0", limits=Limits())
    assert [group.name for group in laid_out.groups] == ["a-0.I.1"]


async def test_program_and_exec_join_it(laid_out: Node) -> None:
    await laid_out.start("a-0")
    procs = laid_out.group / "cgroup.procs"
    assert procs.read_text() == "0"
    procs.write_text("")
    asked = ExecRequest(program="/bin/echo", argv=["echo", "in"], env={}, cwd="/", timeout_s=20)
    assert (await laid_out.launcher.exec("a-0", asked)).stdout == b"in\n"
    assert procs.read_text() == "0"


@pytest.mark.parametrize(
    ("events", "by_us", "expected"),
    [
        ("low 0\noom 1\noom_kill 3\n", False, True),
        ("low 0\noom 1\noom_kill 0\n", False, False),
        ("low 0\noom 1\noom_kill 3\n", True, False),
    ],
    ids=["killed by the kernel", "by somebody else", "by us, while it was killed"],
)
async def test_the_reason_is_read_from_its_events(
    laid_out: Node, events: str, by_us: bool, expected: bool
) -> None:
    pid = await laid_out.start("a-0")
    (laid_out.group / "memory.events").write_text(events)
    if by_us:
        ended = await laid_out.launcher.kill_tree("a-0", "I", 1)
        assert ended is not None
    else:
        os.kill(pid, signal.SIGKILL)
        ended = await laid_out.heard.exit_of("a-0")
    assert (ended.exit_code, ended.memory_limit) == (-9, expected)


async def test_a_stop_kills_the_group_and_takes_it_away(laid_out: Node) -> None:
    await laid_out.start("a-0")
    await laid_out.launcher.stop("a-0", "I", 1, signal.SIGTERM, 0)
    await until(lambda: not laid_out.groups)
    assert laid_out.removed()["a-0.I.1"]["cgroup.kill"] == "1"


async def test_a_program_that_ends_leaves_no_group(laid_out: Node) -> None:
    await laid_out.start("a-0", "exit 3")
    assert (await laid_out.heard.exit_of("a-0")).exit_code == 3
    await until(lambda: not laid_out.groups)


async def test_a_group_that_is_still_populated_is_taken_away_later(laid_out: Node) -> None:
    await laid_out.start("a-0")
    events = laid_out.group / "cgroup.events"
    events.write_text("populated 1\nfrozen 0\n")
    await laid_out.launcher.kill_tree("a-0", "I", 1)
    await laid_out.launcher.forget("a-0", "I")
    assert laid_out.groups
    events.write_text("populated 0\nfrozen 0\n")
    await until(lambda: not laid_out.groups)


async def test_a_group_that_cannot_be_made_is_a_failed_start(laid_out: Node) -> None:
    await laid_out.start("b-0")
    (laid_out.group.parent / "a-0.I.1").mkdir()
    with pytest.raises(StartFailed, match="cgroup") as failed:
        await laid_out.launcher.start(laid_out.request("a-0"))
    assert "exists" in str(failed.value)
    await laid_out.launcher.kill_tree("b-0", "I", 1)


async def test_the_next_launcher_takes_old_groups_away(laid_out: Node) -> None:
    await laid_out.start("a-0")
    first = laid_out.launcher.pid
    await laid_out.launcher.close()
    os.kill(first, signal.SIGKILL)
    await until(lambda: not alive(first))
    assert laid_out.groups
    await laid_out.begin()
    await until(lambda: not laid_out.groups)
    assert laid_out.removed()["a-0.I.1"]["cgroup.kill"] == "1"


async def test_a_real_group_holds_all_that_was_started(real: Node) -> None:
    pid = await real.start("a-0", "setsid sh -c '(sleep 600 &) ; echo up; sleep 600' & wait")
    await until(lambda: b"up" in real.home.output("a-0"))
    await until(lambda: len((real.group / "cgroup.procs").read_text().split()) == 4)
    members = [int(word) for word in (real.group / "cgroup.procs").read_text().split()]
    assert pid in members
    await real.launcher.kill_tree("a-0", "I", 1)
    assert not any(map(alive, members))
    await until(lambda: not real.groups)


async def test_a_real_group_goes_when_its_launcher_was_killed(real: Node) -> None:
    await real.start("a-0")
    members = [int(word) for word in (real.group / "cgroup.procs").read_text().split()]
    first = real.launcher.pid
    await real.launcher.close()
    os.kill(first, signal.SIGKILL)
    await until(lambda: not any(map(alive, (first, *members))))
    await real.begin()
    await until(lambda: not real.groups)
