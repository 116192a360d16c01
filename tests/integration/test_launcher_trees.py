"""No process that a container ever started outlives it, whoever dies first."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.integration.launcher_help import Hearing, Home, alive, descendants, until
from worker.launcher.linux import LinuxSystem
from worker.supervisor import ExecRequest, Launcher

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")

# Two forks, a session of its own, no parent, no environment: then it writes its pid and stays.
ORPHAN = """
import os, sys, time
def orphan(name):
    if os.fork():
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    os.environ.clear()
    with open(name + '.new', 'w') as file:
        file.write(str(os.getpid()))
    os.rename(name + '.new', name)
    time.sleep(600)
"""

# Every process forks for ever, some into sessions of their own, each noting its pid first. No more than `most` are
# made in all, so that a broken test does not hurt the machine.
BOMB = """
import os, sys, time
note, most = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT), int(sys.argv[2])
while True:
    os.write(note, b'x' * 8)
    if os.fstat(note).st_size > most * 8:
        while True:
            time.sleep(0.001)
    if os.fork() == 0:
        os.write(note, b'%8d' % os.getpid())
        if os.getpid() % 5 == 0:
            os.setsid()
"""


def _noted(path: Path) -> list[int]:
    """The pids that a bomb has noted."""
    raw = path.read_bytes() if path.exists() else b""
    words = [raw[at : at + 8] for at in range(0, len(raw), 8)]
    return [int(word) for word in words if word != b"x" * 8]


def _python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code, *arguments]


async def _pid_in(path: Path) -> int:
    await until(path.exists)
    return int(path.read_text())


async def test_orphans_die_with_the_program(home: Home, launcher: Launcher, heard: Hearing) -> None:
    code = (
        ORPHAN
        + "\nfor name in sys.argv[1:]:\n    orphan(name)\ninput_never = sys.stdin.read()\nos._exit(6)\n"
    )
    names = [str(home.root / f"orphan-{n}") for n in range(3)]
    await launcher.start(home.request("a-0", *_python(code, *names)))
    assert (await heard.exit_of("a-0")).exit_code == 6
    for name in names:
        # Those that had no time to say their pid had none to live either.
        if os.path.exists(name):
            assert not alive(int(Path(name).read_text()))


async def test_orphans_of_a_program_that_ends_at_once_die_with_it(
    home: Home, launcher: Launcher, heard: Hearing
) -> None:
    """Often, and several at a time: now and then the program is through before its shim runs again."""
    script = "(sleep 1000 & ); setsid sleep 1000 & (setsid sleep 1000 & ); exit 3"

    async def run_and_look(cid: str) -> None:
        await launcher.start(home.shell(cid, script))
        assert (await heard.exit_of(cid)).exit_code == 3

    for begin in range(0, 160, 4):
        await asyncio.gather(*(run_and_look(f"c-{begin + n}") for n in range(4)))
    await until(lambda: not sleeping(launcher), 5.0)


def sleeping(launcher: Launcher) -> list[int]:
    """Programs below the launcher that should be gone."""
    found = []
    for pid in descendants(launcher.pid):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if words.startswith(b"sleep\0"):
            found.append(pid)
    return found


async def test_orphans_die_in_a_kill(home: Home, launcher: Launcher, heard: Hearing) -> None:
    code = ORPHAN + "\norphan(sys.argv[1])\ntime.sleep(600)\n"
    name = home.root / "orphan"
    started = await launcher.start(home.request("a-0", *_python(code, str(name))))
    orphan = await _pid_in(name)
    await until(lambda: LinuxSystem().find(orphan).ppid == started.shim_pid)  # type: ignore[union-attr]
    await launcher.kill_tree("a-0", "I", 1)
    assert not alive(orphan)
    assert not alive(started.pid)
    await until(lambda: not alive(started.shim_pid))


async def test_stopped_processes_and_their_children_die(home: Home, launcher: Launcher) -> None:
    code = ORPHAN + "\norphan(sys.argv[1])\nimport signal\nos.kill(os.getpid(), signal.SIGSTOP)\n"
    name = home.root / "orphan"
    await launcher.start(home.request("a-0", *_python(code, str(name))))
    orphan = await _pid_in(name)
    os.kill(orphan, signal.SIGSTOP)
    ended = await launcher.kill_tree("a-0", "I", 1)
    assert ended is not None
    assert ended.exit_code == -9
    assert not alive(orphan)


async def test_a_fork_bomb_is_ended(home: Home, launcher: Launcher, heard: Hearing) -> None:
    note = home.root / "bomb"
    await launcher.start(home.request("a-0", *_python(BOMB, str(note), "400")))
    await until(lambda: len(_noted(note)) >= 60)
    async with asyncio.timeout(20):
        ended = await launcher.kill_tree("a-0", "I", 1)
    assert ended is not None
    assert not ended.lost
    assert not [pid for pid in _noted(note) if alive(pid)]


async def test_a_fork_bomb_whose_first_process_ends(home: Home, launcher: Launcher, heard: Hearing) -> None:
    note = home.root / "bomb"
    code = f"import os, time\nif os.fork() == 0:\n    exec({BOMB!r})\ntime.sleep(0.2)\nos._exit(3)\n"
    await launcher.start(home.request("a-0", *_python(code, str(note), "400")))
    ended = await heard.exit_of("a-0")
    assert (ended.exit_code, ended.lost) == (3, False)
    assert not [pid for pid in _noted(note) if alive(pid)]


async def test_only_the_own_tree_is_touched(home: Home, launcher: Launcher, heard: Hearing) -> None:
    code = ORPHAN + "\norphan(sys.argv[1])\ntime.sleep(600)\n"
    names = [home.root / f"orphan-{n}" for n in range(2)]
    for number, name in enumerate(names):
        await launcher.start(home.request(f"a-{number}", *_python(code, str(name))))
    first, second = [await _pid_in(name) for name in names]
    await launcher.kill_tree("a-0", "I", 1)
    assert not alive(first)
    assert alive(second)
    assert [e.cid for e in heard.exits] == ["a-0"]


async def test_the_launcher_takes_its_containers_along(
    home: Home, launcher: Launcher, heard: Hearing
) -> None:
    code = ORPHAN + "\norphan(sys.argv[1])\ntime.sleep(600)\n"
    names = [home.root / f"orphan-{n}" for n in range(3)]
    for number, name in enumerate(names):
        await launcher.start(home.request(f"a-{number}", *_python(code, str(name))))
    orphans = [await _pid_in(name) for name in names]
    below = descendants(launcher.pid)
    assert set(orphans) <= set(below)
    os.kill(launcher.pid, signal.SIGKILL)
    await until(lambda: not any(map(alive, below)), timeout_s=2)
    await until(lambda: heard.lost == 1)
    assert heard.exits == []


async def test_a_stopped_shim_is_no_hiding_place(home: Home, launcher: Launcher, heard: Hearing) -> None:
    started = await launcher.start(home.shell("a-0", "sleep 600 & wait"))
    below = descendants(launcher.pid)
    os.kill(started.shim_pid, signal.SIGSTOP)
    os.kill(launcher.pid, signal.SIGKILL)
    await until(lambda: not any(map(alive, below)), timeout_s=2)


async def test_a_stopped_shim_still_obeys(home: Home, launcher: Launcher) -> None:
    started = await launcher.start(home.shell("a-0", "sleep 600 & wait"))
    os.kill(started.shim_pid, signal.SIGSTOP)
    async with asyncio.timeout(5):
        ended = await launcher.kill_tree("a-0", "I", 1)
    assert ended is not None
    assert not ended.lost


async def test_a_killed_shim_is_a_lost_container(home: Home, launcher: Launcher, heard: Hearing) -> None:
    code = ORPHAN + "\norphan(sys.argv[1])\ntime.sleep(600)\n"
    name = home.root / "orphan"
    started = await launcher.start(home.request("a-0", *_python(code, str(name))))
    other = await launcher.start(home.shell("b-0", "sleep 600"))
    orphan = await _pid_in(name)
    os.kill(started.shim_pid, signal.SIGKILL)
    ended = await heard.exit_of("a-0")
    assert ended.lost
    assert ended.exit_code == -9
    assert not alive(orphan)
    assert not alive(started.pid)
    assert alive(other.pid)
    assert [e.cid for e in heard.exits] == ["a-0"]


async def test_a_killed_shim_while_a_stop_waits(home: Home, launcher: Launcher, heard: Hearing) -> None:
    started = await launcher.start(home.shell("a-0", "trap '' TERM; while :; do sleep 0.05; done"))
    waiting = asyncio.create_task(launcher.stop("a-0", "I", 1, signal.SIGTERM, 60))
    await until(lambda: not waiting.done())
    os.kill(started.shim_pid, signal.SIGKILL)
    async with asyncio.timeout(5):
        assert (await waiting).lost


async def test_a_container_may_signal_its_shim_in_vain(
    home: Home, launcher: Launcher, heard: Hearing
) -> None:
    names = "HUP INT QUIT TERM USR1 USR2 ALRM PIPE CHLD TSTP"
    script = f"for s in {names}; do kill -$s $PPID; done; echo done; sleep 0.2; exit 8"
    await launcher.start(home.shell("a-0", script))
    ended = await heard.exit_of("a-0")
    assert (ended.exit_code, ended.lost) == (8, False)
    assert home.output("a-0") == b"done\n"


async def test_containers_outlive_the_nursery(home: Home, launcher: Launcher, heard: Hearing) -> None:
    started = await launcher.start(home.shell("a-0", "read line; sleep 600"))
    nursery = LinuxSystem().find(started.shim_pid).ppid  # type: ignore[union-attr]
    assert nursery != launcher.pid
    os.kill(nursery, signal.SIGKILL)
    await until(lambda: LinuxSystem().find(started.shim_pid).ppid == launcher.pid)  # type: ignore[union-attr]
    others = [await launcher.start(home.shell(f"b-{n}", "sleep 600")) for n in range(4)]
    assert alive(started.pid)
    # A shim that dies now leaves orphans beside the live shims.
    os.kill(others[0].shim_pid, signal.SIGKILL)
    assert (await heard.exit_of("b-0")).lost
    assert alive(started.pid)
    ended = await launcher.kill_tree("a-0", "I", 1)
    assert ended is not None
    assert not ended.lost
    below = descendants(launcher.pid)
    os.kill(launcher.pid, signal.SIGKILL)
    await until(lambda: not any(map(alive, below)), timeout_s=2)


async def test_killed_spares_are_replaced(home: Home, launcher: Launcher, heard: Hearing) -> None:
    started = await launcher.start(home.shell("a-0", "sleep 600"))
    nursery = LinuxSystem().find(started.shim_pid).ppid  # type: ignore[union-attr]
    for _ in range(3):
        await until(lambda: len(_spares(nursery, started.shim_pid)) >= 2)
        spares = _spares(nursery, started.shim_pid)
        for spare in spares:
            os.kill(spare, signal.SIGKILL)
        await until(lambda spares=spares: not any(map(alive, spares)))  # type: ignore[misc]
        await launcher.start(home.shell("b-0", "exit 0"))
        await heard.exit_of("b-0")
        await launcher.forget("b-0", "I")
        heard.exits.clear()
    assert alive(started.pid)


def _spares(nursery: int, taken: int) -> list[int]:
    members = LinuxSystem().members(nursery, (), ())
    return [p.pid for p in members if p.alive and p.ppid == nursery and p.pid != taken]


async def test_a_new_launcher_waits_for_old_trees(home: Home, launcher: Launcher) -> None:
    code = ORPHAN + "\nfor n in range(40):\n    orphan(sys.argv[1] + str(n))\ntime.sleep(600)\n"
    await launcher.start(home.request("a-0", *_python(code, str(home.root / "orphan-"))))
    await until(lambda: len(list(home.root.glob("orphan-*"))) >= 30)
    below = descendants(launcher.pid)
    os.kill(launcher.pid, signal.SIGKILL)
    second = await Launcher.attach(home, unsandboxed=True)
    try:
        assert not any(map(alive, below))
        assert await second.containers() == []
    finally:
        await second.close()


# -- exec


def _exec(script: str, **fields: object) -> ExecRequest:
    given: dict[str, object] = {
        "program": "/bin/sh",
        "argv": ["sh", "-c", script],
        "env": {"PATH": "/usr/bin:/bin"},
        "cwd": "/tmp",
    }
    return ExecRequest(**{**given, **fields})  # type: ignore[arg-type]


async def test_exec_timeout_kills_what_it_started(home: Home, launcher: Launcher, heard: Hearing) -> None:
    started = await launcher.start(home.shell("a-0", "sleep 600 & wait"))
    script = f"sleep 600 & echo $! > {home.root}/one; (sleep 600 & echo $! > {home.root}/two); sleep 600"
    result = await launcher.exec("a-0", _exec(script, timeout_s=0.5))
    assert (result.exit_code, result.timed_out) == (-9, True)
    for name in ("one", "two"):
        pid = int((home.root / name).read_text())
        await until(lambda pid=pid: not alive(pid))  # type: ignore[misc]
    assert alive(started.pid), "the container goes on"
    assert heard.exits == []


async def test_what_exec_leaves_behind_ends_with_the_container(home: Home, launcher: Launcher) -> None:
    await launcher.start(home.shell("a-0", "sleep 600"))
    code = ORPHAN + "\norphan(sys.argv[1])\n"
    name = home.root / "orphan"
    request = ExecRequest(
        program=sys.executable, argv=_python(code, str(name)), env={}, cwd="/", timeout_s=20
    )
    assert (await launcher.exec("a-0", request)).exit_code == 0
    orphan = await _pid_in(name)
    assert alive(orphan)
    await launcher.kill_tree("a-0", "I", 1)
    assert not alive(orphan)
