"""The launcher replaces itself while its containers go on."""

import asyncio
import os
import signal
import sys

import pytest

from tests.integration.launcher_help import (
    Hearing,
    Home,
    Raw,
    alive,
    descendants,
    digest,
    look_into,
    read_stream,
    until,
)
from worker.errors import Conflict, Unsupported
from worker.launcher.linux import LinuxSystem
from worker.supervisor import ExecRequest, Launcher, read_exit_record
from worker.supervisor_wire import launcher_program

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")


def _command_line(pid: int) -> list[bytes]:
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read().split(b"\0")


SLOW_LINES = """
import sys, time
for n in range(60_000):
    sys.stdout.write(f'{n:07d} ' + 'x' * 91 + '\\n')
    if n % 3000 == 0:
        sys.stdout.flush(); time.sleep(0.02)
"""


async def test_nothing_is_lost(home: Home, launcher: Launcher, heard: Hearing) -> None:
    pid, port = launcher.pid, await launcher.reserve_port("b-0")
    writing = await launcher.start(home.request("a-0", sys.executable, "-I", "-S", "-c", SLOW_LINES))
    waiting = await launcher.start(home.shell("b-0", "trap 'exit 6' USR1; while :; do sleep 0.01; done"))
    await launcher.start(home.shell("c-0", "exit 9"))
    await heard.exit_of("c-0")
    for _ in range(3):
        await launcher.reexec()
        assert "--resume" in [part.decode() for part in _command_line(pid)]
    assert launcher.pid == pid
    assert alive(waiting.pid)
    assert heard.lost == 0
    found = {c.cid: c for c in await launcher.containers()}
    assert found["b-0"].pid == waiting.pid
    assert (found["b-0"].shim_pid, found["b-0"].start_time) == (waiting.shim_pid, waiting.start_time)
    assert found["b-0"].port == port
    assert found["c-0"].exit is not None
    assert found["c-0"].exit.exit_code == 9
    assert (await heard.exit_of("a-0")).exit_code == 0
    content = read_stream(home.state("a-0"), "stdout")
    assert content.lost == []
    everything = b"".join(b"%07d " % n + b"x" * 91 + b"\n" for n in range(60_000))
    assert digest(content.data) == digest(everything)
    assert writing.pid
    await launcher.signal("b-0", "I", 1, signal.SIGUSR1)
    assert (await heard.exit_of("b-0")).exit_code == 6
    assert await launcher.reserve_port("b-0") == port
    await launcher.start(home.shell("d-0", "echo new; exit 1"))
    assert (await heard.exit_of("d-0")).exit_code == 1
    assert [e.cid for e in heard.exits].count("c-0") == 1
    names = look_into(lambda: [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")])
    assert "launcher.state" not in str(names)


async def test_a_stop_keeps_its_deadline(home: Home, launcher: Launcher, heard: Hearing) -> None:
    await launcher.start(home.shell("a-0", "trap 'echo term' TERM; echo up; while :; do sleep 0.01; done"))
    await until(lambda: home.output("a-0"))
    stopping = asyncio.create_task(launcher.stop("a-0", "I", 1, signal.SIGTERM, 1.5))
    await until(lambda: home.output("a-0") == b"up\nterm\n")
    await launcher.reexec()
    with pytest.raises(Exception, match="ended the connection"):
        await stopping
    async with asyncio.timeout(10):
        ended = await launcher.stop("a-0", "I", 1, signal.SIGTERM, 60)
    assert (ended.exit_code, ended.killed_by_us, ended.escalated) == (-9, "stop", True)
    assert home.output("a-0") == b"up\nterm\n", "the signal was sent once"


async def test_trees_stay_exact(home: Home, launcher: Launcher, heard: Hearing) -> None:
    started = await launcher.start(home.shell("a-0", "sleep 600 & wait"))
    other = await launcher.start(home.shell("b-0", "sleep 600 & wait"))
    await launcher.reexec()
    await until(lambda: LinuxSystem().find(started.shim_pid).ppid == launcher.pid)  # type: ignore[union-attr]
    result = await launcher.exec(
        "a-0", ExecRequest(program="/bin/sh", argv=["sh", "-c", "echo $PPID"], env={}, cwd="/")
    )
    assert int(result.stdout) == started.shim_pid
    os.kill(started.shim_pid, signal.SIGKILL)
    assert (await heard.exit_of("a-0")).lost
    assert alive(other.pid), "the other shim is no orphan"
    below = descendants(launcher.pid)
    os.kill(launcher.pid, signal.SIGKILL)
    await until(lambda: not any(map(alive, below)), timeout_s=2)
    await until(lambda: heard.lost == 1)


async def test_what_ends_meanwhile_is_told(home: Home, launcher: Launcher, heard: Hearing) -> None:
    await launcher.start(home.shell("a-0", f"while [ ! -e {home.root}/go ]; do :; done; exit 5"))
    (home.root / "go").touch()
    await launcher.reexec()
    assert (await heard.exit_of("a-0")).exit_code == 5
    assert read_exit_record(home.state("a-0")) is not None
    assert len([e for e in heard.exits if e.cid == "a-0"]) == 1


async def test_not_while_something_is_under_way(home: Home, launcher: Launcher) -> None:
    await launcher.start(home.shell("a-0", "sleep 600"))
    running = asyncio.create_task(
        launcher.exec("a-0", ExecRequest(program="/bin/sleep", argv=["sleep", "600"], env={}, cwd="/"))
    )
    await until(lambda: len(launcher._waiting) == 1)
    with pytest.raises(Conflict, match="executes"):
        await launcher.reexec()
    running.cancel()
    await asyncio.wait([running])


async def test_code_that_does_not_run_is_not_taken(home: Home, launcher: Launcher, heard: Hearing) -> None:
    started = await launcher.start(home.shell("a-0", "sleep 600"))
    python, program = launcher_program()
    broken = home.root / "broken.py"
    broken.write_text("import nothing_of_that_name\n")
    old = home.root / "old.py"
    old.write_text("import sys\nsys.exit(1)\n")
    raw = Raw(home)
    assert "ok" in (raw.hello(events=False) or {})
    for interpreter, code in ((python, broken), (python, old), ("/no/such/python", program), (python, "/no")):
        raw.send(id=1, op="reexec", python=interpreter, program=str(code))
        answer = await asyncio.to_thread(raw.receive)
        assert answer is not None
        assert answer["error"]["code"] == "unsupported", answer
    raw.close()
    assert alive(started.pid)
    assert "--resume" not in [part.decode() for part in _command_line(launcher.pid)]
    await launcher.start(home.shell("b-0", "exit 0"))
    assert (await heard.exit_of("b-0")).exit_code == 0


async def test_unsupported_is_its_error(
    home: Home, launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.supervisor.launcher_program", lambda: ("/bin/false", "x"))
    with pytest.raises(Unsupported, match="self-test"):
        await launcher.reexec()
    assert await launcher.containers() == []


async def test_sigterm_during_the_change_is_obeyed(home: Home, launcher: Launcher, heard: Hearing) -> None:
    started = await launcher.start(home.shell("a-0", "sleep 600"))
    changing = asyncio.create_task(launcher.reexec())
    await until(lambda: "--resume" in [part.decode() for part in _command_line(launcher.pid)])
    os.kill(launcher.pid, signal.SIGTERM)
    await until(lambda: not alive(launcher.pid))
    assert not alive(started.pid)
    assert read_exit_record(home.state("a-0")) is not None
    await asyncio.wait([changing])
