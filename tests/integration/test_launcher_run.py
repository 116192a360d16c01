"""Start, exit codes, failures, the program's surroundings, signals and stops, with real launchers."""

import asyncio
import json
import os
import resource
import signal
import sys

import pytest

from tests.integration.launcher_help import Hearing, Home, alive, look_into, until
from worker.errors import Conflict, NotFound, ResourceExhausted, Unsupported
from worker.supervisor import ExecRequest, ExitRecord, Launcher, LaunchFailed, read_exit_record

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")


# -- how it ends


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 7", 7), ("exit 255", 255), ("kill -SEGV $$", -signal.SIGSEGV)]
)
async def test_exit_codes(home: Home, launcher: Launcher, heard: Hearing, script: str, code: int) -> None:
    started = await launcher.start(home.shell("a-0", script))
    assert started.pid > 0
    assert started.shim_pid > 0
    assert started.shim_start_time > 0
    ended = await heard.exit_of("a-0")
    assert ended.exit_code == code
    assert not ended.lost
    assert ended.killed_by_us is None
    assert ended.started_at_us == started.started_at_us <= ended.finished_at_us
    assert ended.usage.max_rss > 0


async def test_record_is_on_disk_before_it_is_told(home: Home, launcher: Launcher, heard: Hearing) -> None:
    on_disk: list[ExitRecord | None] = []
    launcher.on_exit = lambda told: on_disk.append(read_exit_record(home.state(told.cid)))
    await launcher.start(home.shell("a-0", "exit 3"))
    await until(lambda: on_disk)
    [container] = await launcher.containers()
    assert on_disk == [container.exit]


async def test_no_record_without_a_run(home: Home) -> None:
    assert read_exit_record(home.root) is None
    (home.root / "exit.json").write_text("{")
    assert read_exit_record(home.root) is None


@pytest.mark.parametrize(("trap", "code"), [("", -signal.SIGXCPU), ("trap '' XCPU;", -signal.SIGKILL)])
async def test_cpu_limit_is_told(
    home: Home, launcher: Launcher, heard: Hearing, trap: str, code: int
) -> None:
    script = f"ulimit -S -t 1; ulimit -H -t 2; {trap} exec sh -c 'while :; do :; done'"
    await launcher.start(home.shell("a-0", script, cpu_time_limit_s=1))
    ended = await heard.exit_of("a-0")
    assert ended.exit_code == code
    assert ended.cpu_limit


async def test_usage_counts_the_whole_tree(home: Home, launcher: Launcher, heard: Hearing) -> None:
    burn = "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done"
    await launcher.start(home.shell("a-0", f"( {burn} ) & ( {burn} ) & wait"))
    assert (await heard.exit_of("a-0")).usage.cpu_usec > 20_000


# -- what cannot start


async def test_start_failures_name_the_step(home: Home, launcher: Launcher) -> None:
    (home.root / "plain").write_text("#!/bin/sh\n")
    script = home.root / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    cases = [
        (home.request("a-0", "/no/such/program"), "exec", 2, "/no/such/program"),
        (home.request("a-0", str(home.root / "plain")), "exec", 13, "plain"),
        (home.request("a-0", str(home.root)), "exec", 13, ""),
        (home.request("a-0", str(script)), "exec", 2, "interpreter"),
        (home.shell("a-0", "true", cwd="/no/such/folder"), "chdir", 2, "/no/such/folder"),
    ]
    for request, step, number, detail in cases:
        with pytest.raises(LaunchFailed) as failure:
            await launcher.start(request)
        assert (failure.value.step, failure.value.errno) == (step, number)
        assert detail in failure.value.detail
        assert step in failure.value.message
    assert await launcher.containers() == []
    assert list(home.state("a-0").iterdir()) == []


async def test_plan_of_another_platform_is_refused(home: Home, launcher: Launcher) -> None:
    for platform in ("darwin", "plan9", None):
        with pytest.raises(Unsupported):
            await launcher.start(home.shell("a-0", "true", plan={"platform": platform}))


async def test_without_the_test_flag_nothing_runs_unsandboxed(home: Home) -> None:
    launcher = await Launcher.attach(home)
    try:
        with pytest.raises(Unsupported, match="none"):
            await launcher.start(home.shell("a-0", "true"))
    finally:
        await launcher.close()


async def test_broken_plan_fails_in_the_sandbox_step(home: Home, launcher: Launcher) -> None:
    with pytest.raises(LaunchFailed):
        await launcher.start(home.shell("a-0", "true", plan={"platform": "linux", "version": 10**9}))
    assert await launcher.containers() == []


async def test_runs_follow_one_another(home: Home, launcher: Launcher, heard: Hearing) -> None:
    first = await launcher.start(home.shell("a-0", "echo one; sleep 100"))
    assert await launcher.start(home.shell("a-0", "echo other")) == first, "the same run again"
    with pytest.raises(Conflict):
        await launcher.start(home.shell("a-0", "true", run=2))
    await launcher.kill_tree("a-0", "I", 1)
    with pytest.raises(Conflict):
        await launcher.start(home.shell("a-0", "true"))
    await launcher.start(home.shell("a-0", "echo two", run=2))
    await heard.exit_of("a-0", 2)
    assert home.output("a-0") == b"one\ntwo\n"
    [found] = await launcher.containers()
    assert (found.run, found.exit is not None) == (2, True)
    await launcher.forget("a-0", "other")
    assert len(await launcher.containers()) == 1
    await launcher.forget("a-0", "I")
    await launcher.forget("a-0", "I")
    assert await launcher.containers() == []


# -- the program's surroundings


async def test_the_program_gets_a_clean_world(home: Home, launcher: Launcher, heard: Hearing) -> None:
    code = (
        "import os, json, signal, resource, sys\n"
        "m = os.umask(0)\n"
        "status = open('/proc/self/status').read()\n"
        "field = lambda name: status.split(name + ':')[1].split()[0]\n"
        "print(json.dumps(dict(fds=sorted(map(int, os.listdir('/proc/self/fd')))[:-1], env=dict(os.environ),\n"
        " cwd=os.getcwd(), umask=m, sid=os.getsid(0) == os.getpid(), stdin=os.readlink('/proc/self/fd/0'),\n"
        " blocked=int(field('SigBlk'), 16), ignored=int(field('SigIgn'), 16), caught=int(field('SigCgt'), 16),\n"
        " nofile=resource.getrlimit(resource.RLIMIT_NOFILE), argv=sys.orig_argv[-1])))\n"
    )
    env = {"ONLY": "this", "EMPTY": "", "LC_ALL": "C.UTF-8"}
    request = home.request("a-0", sys.executable, "-I", "-S", "-c", code, "ärg", cwd="/tmp", env=env)
    await launcher.start(request)
    assert (await heard.exit_of("a-0")).exit_code == 0
    seen = json.loads(home.output("a-0"))
    python_ignores = (1 << (signal.SIGPIPE - 1)) | (1 << (signal.SIGXFSZ - 1))
    assert seen["fds"] == [0, 1, 2]
    assert seen["env"] == env
    assert seen["cwd"] == "/tmp"
    assert seen["umask"] == 0o022
    assert seen["sid"]
    assert seen["stdin"] == "/dev/null"
    assert seen["blocked"] == 0
    assert seen["ignored"] & ~python_ignores == 0
    assert seen["argv"] == "ärg"
    assert tuple(seen["nofile"]) == resource.getrlimit(resource.RLIMIT_NOFILE), "as before the launcher"


async def test_shell_ignores_no_signal(home: Home, launcher: Launcher, heard: Hearing) -> None:
    await launcher.start(home.shell("a-0", "grep -E 'SigIgn|SigBlk' /proc/self/status"))
    await heard.exit_of("a-0")
    assert all(int(line.split()[1], 16) == 0 for line in home.output("a-0").splitlines())


async def test_launcher_is_apart_from_the_worker(home: Home, launcher: Launcher) -> None:
    assert os.getsid(launcher.pid) != os.getsid(0)
    assert os.getpgid(launcher.pid) != os.getpgid(0)
    facts = json.loads((home.root / "launcher.json").read_text())
    assert (facts["pid"], facts["start_time"]) == (launcher.pid, launcher.start_time)
    for name in ("launcher.json", "launcher.lock", "launcher.sock", "launcher.log"):
        assert (home.root / name).stat().st_mode & 0o077 == 0, name
    assert look_into(lambda: os.readlink(f"/proc/{launcher.pid}/cwd")) in ("/", None)


# -- signals, stops, kills


async def test_signal_reaches_the_program(home: Home, launcher: Launcher, heard: Hearing) -> None:
    script = "trap 'echo got; exit 9' USR1; echo ready; while :; do sleep 0.01; done"
    await launcher.start(home.shell("a-0", script))
    await until(lambda: home.output("a-0") == b"ready\n")
    await launcher.signal("a-0", "I", 1, signal.SIGUSR1)
    ended = await heard.exit_of("a-0")
    assert (ended.exit_code, ended.killed_by_us) == (9, None)
    with pytest.raises(NotFound):
        await launcher.signal("a-0", "I", 1, signal.SIGUSR1)
    with pytest.raises(NotFound):
        await launcher.signal("a-0", "I", 2, signal.SIGUSR1)


async def test_sigkill_is_told_as_ours(home: Home, launcher: Launcher, heard: Hearing) -> None:
    await launcher.start(home.shell("a-0", "sleep 100"))
    await launcher.signal("a-0", "I", 1, signal.SIGKILL)
    ended = await heard.exit_of("a-0")
    assert (ended.exit_code, ended.killed_by_us, ended.cpu_limit) == (-9, "signal", False)


async def test_stop_waits_for_a_willing_program(home: Home, launcher: Launcher, heard: Hearing) -> None:
    await launcher.start(home.shell("a-0", "trap 'exit 5' TERM; echo ready; while :; do sleep 0.01; done"))
    await until(lambda: home.output("a-0"))
    ended = await launcher.stop("a-0", "I", 1, signal.SIGTERM, 30)
    assert (ended.exit_code, ended.killed_by_us, ended.escalated) == (5, "stop", False)
    assert await launcher.stop("a-0", "I", 1, signal.SIGTERM, 30) == ended, "once ended, at once"
    assert await launcher.kill_tree("a-0", "I", 1) == ended


async def test_stop_kills_what_ignores_it(home: Home, launcher: Launcher, heard: Hearing) -> None:
    await launcher.start(home.shell("a-0", "trap '' TERM; echo $$; sleep 100 & wait; sleep 100"))
    await until(lambda: home.output("a-0"))
    ended = await launcher.stop("a-0", "I", 1, signal.SIGTERM, 0.2)
    assert (ended.exit_code, ended.killed_by_us, ended.escalated) == (-9, "stop", True)
    assert ended.finished_at_us - ended.started_at_us >= 200_000


async def test_stop_without_patience_sends_no_signal(home: Home, launcher: Launcher) -> None:
    await launcher.start(home.shell("a-0", "trap 'echo term' TERM; echo ready; while :; do sleep 0.01; done"))
    await until(lambda: home.output("a-0"))
    await launcher.stop("a-0", "I", 1, signal.SIGTERM, 0)
    assert home.output("a-0") == b"ready\n"


async def test_an_earlier_deadline_overtakes(home: Home, launcher: Launcher) -> None:
    await launcher.start(home.shell("a-0", "trap '' TERM; echo ready; while :; do sleep 0.01; done"))
    await until(lambda: home.output("a-0"))
    patient = asyncio.create_task(launcher.stop("a-0", "I", 1, signal.SIGTERM, 60))
    hasty = asyncio.create_task(launcher.stop("a-0", "I", 1, signal.SIGTERM, 0.05))
    async with asyncio.timeout(10):
        assert await patient == await hasty


async def test_kill_tree_overtakes_a_stop(home: Home, launcher: Launcher) -> None:
    await launcher.start(home.shell("a-0", "trap '' TERM; echo ready; while :; do sleep 0.01; done"))
    await until(lambda: home.output("a-0"))
    patient = asyncio.create_task(launcher.stop("a-0", "I", 1, signal.SIGTERM, 60))
    async with asyncio.timeout(10):
        killed = await launcher.kill_tree("a-0", "I", 1)
        assert killed is not None
        assert await patient == killed
    assert killed.killed_by_us == "kill_tree"


async def test_stop_wakes_a_stopped_program(home: Home, launcher: Launcher) -> None:
    started = await launcher.start(home.shell("a-0", "trap 'exit 4' TERM; while :; do sleep 0.01; done"))
    await launcher.signal("a-0", "I", 1, signal.SIGSTOP)
    await until(lambda: _state(started.pid) == "T")
    ended = await launcher.stop("a-0", "I", 1, signal.SIGTERM, 30)
    assert ended.exit_code == 4


async def test_unknown_runs_are_not_found(home: Home, launcher: Launcher) -> None:
    with pytest.raises(NotFound):
        await launcher.stop("a-0", "I", 1, signal.SIGTERM, 1)
    with pytest.raises(NotFound):
        await launcher.kill_tree("a-0", "I", 1)
    await launcher.start(home.shell("a-0", "sleep 100"))
    with pytest.raises(NotFound):
        await launcher.kill_tree("a-0", "other", 1)
    with pytest.raises(Conflict):
        await launcher.forget("a-0", "I")


async def test_fifty_at_once(home: Home, launcher: Launcher, heard: Hearing) -> None:
    requests = [home.shell(f"a-{n}", f"echo out {n}; echo err {n} >&2; exit {n}") for n in range(50)]
    async with asyncio.TaskGroup() as group:
        for request in requests:
            group.create_task(launcher.start(request))
    for number in range(50):
        assert (await heard.exit_of(f"a-{number}")).exit_code == number
        assert home.output(f"a-{number}") == f"out {number}\n".encode()
        assert home.output(f"a-{number}", "stderr") == f"err {number}\n".encode()
    assert len(heard.exits) == 50


async def test_no_exit_is_missed(home: Home, launcher: Launcher, heard: Hearing) -> None:
    """Programs that end at once, one after the other and without a spare to be had."""
    for number in range(120):
        await launcher.start(home.request(f"a-{number}", "/bin/true"))
        await launcher.start(home.request(f"b-{number}", "/bin/true"))
    await until(lambda: len(heard.exits) == 240)
    assert {e.exit_code for e in heard.exits} == {0}


async def test_used_up_descriptors_are_told(home: Home, launcher: Launcher, heard: Hearing) -> None:
    prlimit = vars(resource)["prlimit"]
    before = prlimit(launcher.pid, resource.RLIMIT_NOFILE)
    await launcher.start(home.shell("a-0", "sleep 600"))
    prlimit(launcher.pid, resource.RLIMIT_NOFILE, (170, before[1]))
    results = await asyncio.gather(
        *[launcher.start(home.shell(f"a-{n}", "echo x; sleep 600")) for n in range(1, 60)],
        return_exceptions=True,
    )
    refused = [result for result in results if isinstance(result, BaseException)]
    assert 40 < len(refused) < 59
    assert {type(failure) for failure in refused} == {ResourceExhausted}
    command = ExecRequest(program="/bin/true", argv=["true"], env={}, cwd="/", timeout_s=5)
    assert (await launcher.exec("a-0", command)).exit_code == 0, "there is room to act"
    running = await launcher.containers()
    assert len(running) == 60 - len(refused)
    for container in running:
        await launcher.kill_tree(container.cid, "I", 1)
    assert len(heard.exits) == len(running)
    prlimit(launcher.pid, resource.RLIMIT_NOFILE, before)
    await launcher.start(home.shell("b-0", "exit 3"))
    assert (await heard.exit_of("b-0")).exit_code == 3
    assert "bug" not in home.log()


async def test_shutdown(home: Home, launcher: Launcher, heard: Hearing) -> None:
    started = await launcher.start(home.shell("a-0", "sleep 100"))
    with pytest.raises(Conflict):
        await launcher.shutdown(kill=False)
    await launcher.shutdown(kill=True)
    await until(lambda: not alive(launcher.pid))
    assert not alive(started.pid)
    assert [e.killed_by_us for e in heard.exits] == ["shutdown"]
    assert heard.lost == 0
    found = read_exit_record(home.state("a-0"))
    assert found is not None
    assert found.killed_by_us == "shutdown"
    assert not (home.root / "launcher.sock").exists()
    assert not (home.root / "launcher.json").exists()


async def test_sigterm_is_a_shutdown(home: Home, launcher: Launcher, heard: Hearing) -> None:
    started = await launcher.start(home.shell("a-0", "sleep 100"))
    os.kill(launcher.pid, signal.SIGTERM)
    await until(lambda: not alive(launcher.pid))
    assert not alive(started.pid)
    assert read_exit_record(home.state("a-0")) is not None


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0]
