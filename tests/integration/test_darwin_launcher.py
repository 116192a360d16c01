"""The whole macOS driver in real launchers, against the stand-in of libSystem: starts, refusals, exec, measuring,
and that no process outlives its container, whoever dies first.
"""

import errno
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from schemas.status import Stats
from tests.integration.darwin_help import FAMILY, Family, Mac, a_mac
from tests.integration.launcher_help import Hearing, until
from tests.unit.fake_libsystem import build
from worker.platform.base import Limits
from worker.platform.darwin.enforce import EnforceError, Enforcer
from worker.platform.darwin.jetsam import MIB
from worker.stats import Sampler, Target
from worker.supervisor import ExecRequest, Launcher, LaunchFailed

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="the stand-in reads /proc")


@pytest.fixture
async def mac(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Mac]:
    async with a_mac(build(tmp_path_factory.getbasetemp()), monkeypatch) as mac:
        yield mac


@pytest.fixture
async def launcher(mac: Mac) -> AsyncIterator[Launcher]:
    launcher = await Launcher.attach(mac.home)
    yield launcher
    await launcher.close()


@pytest.fixture
def heard(launcher: Launcher) -> Hearing:
    return Hearing(launcher)


async def start_family(mac: Mac, launcher: Launcher, cid: str, *, held: int = 0) -> Family:
    folder = mac.home.root / f"family-{cid}"
    folder.mkdir()
    program = [sys.executable, "-I", "-S", "-c", FAMILY, str(folder), str(held)]
    started = await launcher.start(mac.request(cid, *program))
    await until(lambda: (folder / "child").exists() and (folder / "orphan").exists())
    child, orphan = (int((folder / name).read_text()) for name in ("child", "orphan"))
    family = Family(started.pid, started.shim_pid, started.shim_start_time, child, orphan)
    await until(lambda: _parent(orphan) not in (started.pid, started.shim_pid))
    assert all(mac.sandbox_of(pid) == mac.sandbox_of(started.pid) > 0 for pid in family.pids)
    return family


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


# -- starting


async def test_a_program_runs_under_its_profile(mac: Mac, launcher: Launcher) -> None:
    request = mac.shell(
        "a-0", "echo $GREETING; exec sleep 600", env={"GREETING": "hello", "PATH": "/usr/bin:/bin"}
    )
    started = await launcher.start(request)
    await until(lambda: mac.home.output("a-0"))
    assert mac.sandboxes() == [[request.plan["profile"], *request.plan["params"]]]
    assert mac.sandbox_of(started.pid) == 1
    assert mac.sandbox_of(started.shim_pid) == 0
    process = mac.system.find(started.pid)
    assert process is not None
    assert started.start_time == process.start, "the unique id"
    await launcher.kill_tree("a-0", "I-a-0", 1)
    assert mac.home.output("a-0") == b"hello\n"


async def test_a_refused_profile_names_step_and_message(mac: Mac, launcher: Launcher) -> None:
    (mac.folder / "refuse").write_text("line 3: unbound variable: file-raed*")
    with pytest.raises(LaunchFailed) as caught:
        await launcher.start(mac.shell("a-0", "exit 0"))
    failure = caught.value
    assert (failure.step, failure.errno) == ("sandbox", errno.EINVAL)
    assert failure.detail == "line 3: unbound variable: file-raed*"
    assert failure.message == "sandbox: line 3: unbound variable: file-raed*"
    assert await launcher.containers() == []
    (mac.folder / "refuse").unlink()
    assert (await launcher.start(mac.shell("a-0", "exit 0"))).pid > 0


async def test_a_plan_of_another_version(mac: Mac, launcher: Launcher) -> None:
    request = mac.shell("a-0", "exit 0")
    request.plan["version"] = 99
    with pytest.raises(LaunchFailed, match="version 99") as caught:
        await launcher.start(request)
    assert caught.value.step == "plan"


async def test_a_limit_that_cannot_be(mac: Mac, launcher: Launcher) -> None:
    request = mac.shell("a-0", "exit 0")
    request.plan["limits"] = [["core", 5, 4, False]]
    with pytest.raises(LaunchFailed, match="core 5:4") as caught:
        await launcher.start(request)
    assert caught.value.step == "rlimits"
    assert mac.sandboxes() == []


async def test_exec_runs_under_the_same_profile(mac: Mac, launcher: Launcher) -> None:
    request = mac.shell("a-0", "exec sleep 600")
    started = await launcher.start(request)
    script = "echo $$; cat"
    command = ExecRequest(
        program="/bin/sh", argv=["sh", "-c", script], env={"PATH": "/usr/bin:/bin"}, cwd="/", stdin=b"given"
    )
    result = await launcher.exec("a-0", command)
    pid, _, rest = result.stdout.partition(b"\n")
    assert (result.exit_code, rest) == (0, b"given")
    assert mac.sandboxes() == [[request.plan["profile"], *request.plan["params"]]] * 2
    entered = [who for who, _ in mac.calls("sandbox_init_with_parameters")]
    assert entered == [started.pid, int(pid)]


def entering_twice(mac: Mac, plan: dict[str, Any]) -> int:
    """The errno of the second sandbox that a process asks for; 0 when it gets it."""
    pid = os.fork()
    if pid == 0:
        enforcer = Enforcer(str(mac.folder / "libfakesystem.so"))
        enforcer.apply({**plan, "limits": []})
        try:
            enforcer.apply({**plan, "limits": []})
        except EnforceError as failure:
            os._exit(failure.errno)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


async def test_a_process_in_a_sandbox_cannot_have_another(mac: Mac) -> None:
    """A worker in a sandbox would start nothing unconfined: the system refuses, and so does the start."""
    assert entering_twice(mac, mac.driver.plan(mac.policy("a-0"))) == errno.EPERM


# -- memory


async def test_the_last_step_sets_the_memory_limit(mac: Mac, launcher: Launcher, heard: Hearing) -> None:
    environment = {"A": "b c", "PATH": "/usr/bin:/bin"}
    request = mac.shell(
        "a-0", 'echo "$0 $A"; ulimit -n; exit 7', env=environment, limits=Limits(memory_bytes=200 * MIB + 1)
    )
    started = await launcher.start(request)
    ended = await heard.exit_of("a-0")
    assert (ended.exit_code, ended.memory_limit) == (7, False)
    assert mac.calls("posix_spawn") == [(started.pid, "0x40 0x800c -1 201 201")]
    assert mac.home.output("a-0") == b"/bin/sh b c\n4096\n"


async def test_a_program_that_is_not_there(mac: Mac, launcher: Launcher) -> None:
    """The fallback without a limit tells it as any exec does."""
    request = mac.request("a-0", "/nowhere", limits=Limits(memory_bytes=MIB))
    with pytest.raises(LaunchFailed) as caught:
        await launcher.start(request)
    assert (caught.value.step, caught.value.errno) == ("exec", errno.ENOENT)


@pytest.mark.parametrize("outgrew", [True, False])
async def test_who_ended_it(mac: Mac, launcher: Launcher, heard: Hearing, outgrew: bool) -> None:
    started = await launcher.start(mac.shell("a-0", "exec sleep 600", limits=Limits(memory_bytes=MIB)))
    if outgrew:
        (mac.folder / f"outgrew-{started.pid}").touch()
    os.kill(started.pid, signal.SIGKILL)
    ended = await heard.exit_of("a-0")
    assert ended.exit_code == -signal.SIGKILL
    assert ended.memory_limit is outgrew


def target(mac: Mac, family: Family, cid: str, limit: int | None = None) -> Target:
    return Target(cid, f"I-{cid}", 1, family.shim, family.shim_start, limit, mac.marker(cid))


def sampler(mac: Mac, targets: list[Target], over: list[tuple[str, int]]) -> Sampler:
    async def publish(stats: Stats) -> None:
        raise AssertionError("nothing is published here")

    return Sampler(
        node="n",
        interval_s=60,
        targets=lambda: targets,
        processes=mac.driver.processes,
        allocated_bytes=mac.driver.allocated_bytes,
        publish=publish,
        on_memory_limit=lambda cid, used: over.append((cid, used)),
    )


async def test_stats_are_of_the_whole_tree(mac: Mac, launcher: Launcher) -> None:
    family = await start_family(mac, launcher, "a-0", held=30 * MIB)
    other = await start_family(mac, launcher, "b-0")
    measuring = sampler(mac, [], [])
    try:
        stats = await measuring.measure(target(mac, family, "a-0"))
        without = await measuring.measure(target(mac, family, "a-0")._replace(marker=""))
        small = await measuring.measure(target(mac, other, "b-0"))
        gone = await measuring.measure(target(mac, family, "a-0")._replace(shim_start=1))
    finally:
        measuring.close()
    assert stats is not None
    assert stats.processes == 3
    assert stats.threads == 3
    assert stats.memory_bytes > 30 * MIB
    assert stats.open_files >= 9 if stats.open_files is not None else False
    assert without is not None
    assert without.processes == 2, "the orphan shows by its marker alone"
    assert small is not None
    assert small.memory_bytes < stats.memory_bytes
    assert gone is None


async def test_the_watchdog_sees_what_an_orphan_holds(mac: Mac, launcher: Launcher) -> None:
    family = await start_family(mac, launcher, "a-0", held=60 * MIB)
    other = await start_family(mac, launcher, "b-0")
    over: list[tuple[str, int]] = []
    watching = sampler(mac, [target(mac, family, "a-0", 60 * MIB), target(mac, other, "b-0", 60 * MIB)], over)
    try:
        await watching.watch()
    finally:
        watching.close()
    [(cid, used)] = over
    assert cid == "a-0"
    assert used > 60 * MIB


# -- ending


async def test_every_kind_of_end_takes_the_whole_tree(mac: Mac, launcher: Launcher, heard: Hearing) -> None:
    bystander = await start_family(mac, launcher, "b-0")
    for run, how in enumerate(("kill_tree", "stop", "its own end", "exit"), start=1):
        cid = f"a-{run}"
        family = await start_family(mac, launcher, cid)
        if how == "kill_tree":
            await launcher.kill_tree(cid, f"I-{cid}", 1)
        elif how == "stop":
            await launcher.stop(cid, f"I-{cid}", 1, signal.SIGTERM, 5)
        else:
            os.kill(family.main, signal.SIGKILL)
            await heard.exit_of(cid)
        assert [pid for pid in family.pids if mac.alive(pid)] == [], how
    assert all(mac.alive(pid) for pid in bystander.pids)


async def test_a_shim_that_is_killed(mac: Mac, launcher: Launcher, heard: Hearing) -> None:
    """Nothing comes to the launcher as an orphan; it finds what holds the marker."""
    family = await start_family(mac, launcher, "a-0")
    bystander = await start_family(mac, launcher, "b-0")
    os.kill(family.shim, signal.SIGKILL)
    ended = await heard.exit_of("a-0")
    assert ended.lost
    assert [pid for pid in family.pids if mac.alive(pid)] == []
    assert all(mac.alive(pid) for pid in bystander.pids)


async def test_a_launcher_that_is_killed(mac: Mac, launcher: Launcher, heard: Hearing) -> None:
    families = [await start_family(mac, launcher, cid) for cid in ("a-0", "b-0")]
    os.kill(launcher.pid, signal.SIGKILL)
    await mac.nothing_left()
    assert [pid for family in families for pid in family.pids if mac.alive(pid)] == []
    await until(lambda: heard.lost == 1)


async def test_launcher_and_shims_killed_at_one_stroke(mac: Mac, launcher: Launcher) -> None:
    """The worker ends what is left, container by container."""
    family = await start_family(mac, launcher, "a-0")
    other = await start_family(mac, launcher, "b-0")
    supervisors = mac.launchers()
    for signum in (signal.SIGSTOP, signal.SIGKILL):
        for pid in supervisors:
            os.kill(pid, signum)
    await until(lambda: not mac.launchers())
    assert all(mac.alive(pid) for pid in (*family.pids, *other.pids))
    assert mac.driver.end_leftovers(mac.marker("a-0"), 20)
    assert [pid for pid in family.pids if mac.alive(pid)] == []
    assert all(mac.alive(pid) for pid in other.pids)
    assert mac.driver.end_leftovers(mac.marker("a-0"), 20), "nothing is left"
    assert mac.driver.end_leftovers(mac.marker("b-0"), 20)
    assert mac.confined() == []


async def test_a_launcher_that_takes_its_own_place(mac: Mac, launcher: Launcher, heard: Hearing) -> None:
    """The marker is among what the new one knows."""
    family = await start_family(mac, launcher, "a-0")
    await launcher.reexec()
    assert all(mac.alive(pid) for pid in family.pids)
    assert [c.pid for c in await launcher.containers()] == [family.main]
    os.kill(family.shim, signal.SIGKILL)
    await heard.exit_of("a-0")
    assert [pid for pid in family.pids if mac.alive(pid)] == []


async def test_a_new_worker_adopts(mac: Mac, launcher: Launcher) -> None:
    family = await start_family(mac, launcher, "a-0")
    await launcher.close()
    again = await Launcher.attach(mac.home, spawn=False)
    try:
        [known] = await again.containers()
        facts: dict[str, Any] = {"pid": known.pid, "shim": known.shim_pid, "start": known.shim_start_time}
        assert facts == {"pid": family.main, "shim": family.shim, "start": family.shim_start}
        table = mac.driver.processes()
        assert table.alive(known.shim_pid, known.shim_start_time)
        assert not table.alive(known.shim_pid, known.shim_start_time + 1)
        await again.kill_tree("a-0", "I-a-0", 1)
        assert [pid for pid in family.pids if mac.alive(pid)] == []
    finally:
        await again.close()
