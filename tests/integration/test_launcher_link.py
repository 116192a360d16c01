"""The socket: who is let in, what malformed peers can do (nothing), losing and finding the launcher again."""

import asyncio
import os
import random
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.launcher_help import (
    Hearing,
    Home,
    Raw,
    alive,
    launcher_pid,
    look_into,
    read_stream,
    until,
)
from worker import supervisor, supervisor_wire
from worker.errors import Unavailable
from worker.launcher.protocol import MAX_FRAME, encode_frame
from worker.supervisor import Launcher

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")


# -- finding it


async def test_one_launcher_to_a_directory(home: Home) -> None:
    attached = await asyncio.gather(*[Launcher.attach(home, unsandboxed=True) for _ in range(4)])
    try:
        assert len({launcher.pid for launcher in attached}) == 1
        assert attached[0].pid == launcher_pid(home)
    finally:
        for launcher in attached:
            await launcher.close()


async def test_without_spawn_nothing_is_started(home: Home) -> None:
    with pytest.raises(Unavailable, match="no launcher"):
        await Launcher.attach(home, spawn=False)
    assert launcher_pid(home) is None


async def test_what_keeps_it_from_starting_is_told(home: Home) -> None:
    (home.root / "launcher.lock").mkdir()
    with pytest.raises(Unavailable, match="cannot use"):
        await Launcher.attach(home)


@pytest.mark.parametrize("at", ["before it listens", "before it answers"])
async def test_one_that_is_killed_while_it_starts_is_started_again(
    home: Home, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    spawn = supervisor_wire.spawn_launcher
    killed: list[int] = []

    async def killing(*args: Any, **options: Any) -> bool:
        if killed:
            return await spawn(*args, **options)
        if at == "before it answers":
            started = await spawn(*args, **options)
            pid = launcher_pid(home)
            assert pid is not None
            killed.append(pid)
            os.kill(pid, signal.SIGKILL)
            await until(lambda: not alive(pid))
            return started
        killed.append(0)
        deadly = home.root / "deadly.py"
        deadly.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
        with monkeypatch.context() as patched:
            patched.setattr(supervisor_wire, "launcher_program", lambda: (sys.executable, str(deadly)))
            return await spawn(*args, **options)

    monkeypatch.setattr(supervisor, "spawn_launcher", killing)
    launcher = await Launcher.attach(home, unsandboxed=True)
    assert killed
    assert await launcher.containers() == []
    await launcher.close()


async def test_a_stale_socket_is_replaced(home: Home) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(home.launcher_socket))
    stale.close()
    launcher = await Launcher.attach(home, unsandboxed=True)
    assert await launcher.containers() == []
    await launcher.close()


async def test_it_survives_the_terminal_and_the_worker(home: Home) -> None:
    """A worker process in a session of its own starts it, then the whole session is killed."""
    code = (
        "import asyncio, sys, os\n"
        "from pathlib import Path\n"
        "from worker.supervisor import Launcher, StartRequest\n"
        "class Home:\n"
        "    root = Path(sys.argv[1]); key_path = root / 'launcher.key'; launcher_socket = root / 'launcher.sock'\n"
        "async def main():\n"
        "    launcher = await Launcher.attach(Home(), unsandboxed=True)\n"
        "    state = Home.root / 'containers/a-0/state'\n"
        "    state.mkdir(parents=True)\n"
        "    await launcher.start(StartRequest(cid='a-0', instance='I', run=1, program='/bin/sh',\n"
        "        argv=['sh', '-c', 'echo alive; sleep 600'], env={}, cwd='/', plan={'platform': 'none'},\n"
        "        state_dir=str(state)))\n"
        "    print('ready', flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    worker = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        code,
        str(home.root),
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
        env={"PYTHONPATH": root, "SECRET": "not for the launcher"},
    )
    assert worker.stdout is not None
    assert await worker.stdout.readline() == b"ready\n"
    pid = launcher_pid(home)
    assert pid is not None
    environment = look_into(Path(f"/proc/{pid}/environ").read_bytes)
    assert b"SECRET" not in (environment or b"")  # type: ignore[operator]
    os.killpg(worker.pid, signal.SIGINT)
    os.killpg(worker.pid, signal.SIGKILL)
    await worker.wait()
    launcher = await Launcher.attach(home, spawn=False)
    try:
        assert launcher.pid == pid
        [found] = await launcher.containers()
        assert found.pid is not None
        assert alive(found.pid)
        assert (found.cid, found.instance, found.run, found.exit) == ("a-0", "I", 1, None)
    finally:
        await launcher.close()


async def test_a_new_worker_finds_what_ended_meanwhile(home: Home, launcher: Launcher) -> None:
    await launcher.start(home.shell("a-0", "echo late; exit 4"))
    await launcher.start(home.shell("b-0", "sleep 600"))
    await launcher.close()
    await until(lambda: (home.state("a-0") / "exit.json").exists())
    second = await Launcher.attach(home, spawn=False)
    try:
        found = {c.cid: c for c in await second.containers()}
        assert found["a-0"].exit is not None
        assert found["a-0"].exit.exit_code == 4
        assert found["b-0"].exit is None
        assert found["a-0"].ends == {"stdout": 5, "stderr": 0}
        heard = Hearing(second)
        await second.kill_tree("b-0", "I", 1)
        await heard.exit_of("b-0")
        assert [e.cid for e in heard.exits] == ["b-0"], "what was known at the connect is not told again"
    finally:
        await second.close()


async def test_the_newest_connection_gets_the_events(home: Home, launcher: Launcher, heard: Hearing) -> None:
    second = await Launcher.attach(home, spawn=False)
    later = Hearing(second)
    try:
        await launcher.start(home.shell("a-0", "echo hello"))
        await later.exit_of("a-0")
        assert ("a-0", "stdout", 6) in later.notices
        assert heard.exits == []
        assert len(await launcher.containers()) == 1, "the older one may still ask"
    finally:
        await second.close()


async def test_news_before_anyone_listens_is_kept(home: Home, launcher: Launcher) -> None:
    await launcher.start(home.shell("a-0", "echo early; exit 2"))
    await until(lambda: (home.state("a-0") / "exit.json").exists())
    await launcher.containers()
    heard = Hearing(launcher)
    assert (await heard.exit_of("a-0")).exit_code == 2
    await until(lambda: ("a-0", "stdout", 6) in heard.notices)


async def test_a_broken_connection_is_made_again(home: Home, launcher: Launcher, heard: Hearing) -> None:
    await launcher.start(home.shell("a-0", "echo one; read line; exit 3"))
    await launcher.start(home.shell("b-0", "sleep 600"))
    pid = launcher.pid
    wire = launcher._wire
    assert wire is not None
    wire.abandon()
    await wire.ended.wait()
    assert {c.cid for c in await launcher.containers()} == {"a-0", "b-0"}
    assert launcher.pid == pid
    assert heard.lost == 0
    assert (await heard.exit_of("a-0")).exit_code == 3
    await until(lambda: ("a-0", "stdout", 4) in heard.notices)
    await launcher.kill_tree("b-0", "I", 1)
    await heard.exit_of("b-0")


async def test_a_dead_launcher_is_told_once(home: Home, launcher: Launcher, heard: Hearing) -> None:
    await launcher.start(home.shell("a-0", "trap '' TERM; while :; do sleep 0.05; done"))
    waiting = asyncio.create_task(launcher.stop("a-0", "I", 1, signal.SIGTERM, 60))
    await until(lambda: len(launcher._waiting) == 1)
    os.kill(launcher.pid, signal.SIGKILL)
    with pytest.raises(Unavailable):
        await waiting
    await until(lambda: heard.lost)
    for _ in range(2):
        with pytest.raises(Unavailable):
            await launcher.containers()
    launcher.ack_output("a-0", "stdout", 0)
    assert heard.lost == 1


async def test_closing_is_no_loss(home: Home, launcher: Launcher, heard: Hearing) -> None:
    await launcher.close()
    with pytest.raises(Unavailable):
        await launcher.containers()
    assert heard.lost == 0
    assert alive(launcher.pid)


# -- who is let in


async def test_a_wrong_key_is_refused(home: Home, launcher: Launcher) -> None:
    for key in (
        "",
        "0" * 64,
        None,
        7,
        ["x"],
        home.key_path.read_text()[:-1],
        home.key_path.read_text() + "0",
    ):
        raw = Raw(home)
        answer = raw.hello(key=key)
        assert answer is not None
        assert "key" in answer["error"]["message"]
        assert raw.receive() is None
        raw.close()
    assert await launcher.containers() == []


async def test_an_empty_key_file_lets_nobody_in(home: Home, launcher: Launcher) -> None:
    home.key_path.write_text("")
    raw = Raw(home)
    answer = raw.hello(key="")
    assert answer is not None
    assert "error" in answer
    raw.close()


async def test_a_foreign_version_is_refused(home: Home, launcher: Launcher) -> None:
    for versions in ([2, 9], [0, 0], "1", [1], [1, "1"], None):
        raw = Raw(home)
        answer = raw.hello(protocol=versions)
        assert answer is not None
        assert "error" in answer
        raw.close()
    raw = Raw(home)
    answer = raw.hello(protocol=[1, 99])
    assert answer is not None
    assert answer["ok"]["protocol"] == 1
    raw.close()


async def test_nothing_is_done_before_hello(home: Home, launcher: Launcher) -> None:
    raw = Raw(home)
    raw.send(id=1, op="shutdown", kill=True)
    answer = raw.receive()
    assert answer is not None
    assert "hello" in answer["error"]["message"]
    assert raw.receive() is None
    raw.close()
    assert await launcher.containers() == []


async def _alone(home: Home) -> int:
    """A launcher that no worker is connected to, who would start another when it ends."""
    launcher = await Launcher.attach(home, unsandboxed=True)
    await launcher.close()
    return launcher.pid


async def test_whoever_writes_to_an_ending_launcher_loses_nothing(home: Home) -> None:
    """An error of writing would make the worker drop what it has not read: the very answer it waits for."""
    pid = await _alone(home)
    raw = Raw(home)
    raw.hello()
    raw.send(id=2, op="shutdown", kill=True)
    assert raw.receive() == {"id": 2, "ok": {}}
    assert raw.receive() is None
    for _ in range(100):
        raw.send(op="ack_output", cid="a-0", stream="stdout", offset=0)
    raw.close()
    await until(lambda: not alive(pid))


async def test_what_waits_to_be_read_goes_before_the_end(home: Home) -> None:
    pid = await _alone(home)
    raw = Raw(home)
    raw.hello()
    for number in range(3000):
        raw.send(id=number, op="containers")
    raw.send(id="end", op="shutdown", kill=True)
    await until(lambda: not (home.root / "launcher.json").exists())
    answers = []
    while (answer := raw.receive()) is not None:
        answers.append(answer["id"])
    assert answers == [*range(3000), "end"]
    raw.close()
    await until(lambda: not alive(pid))


async def test_a_guest_that_stays_keeps_neither_it_nor_the_next(home: Home) -> None:
    pid = await _alone(home)
    raw = Raw(home)
    raw.hello()
    raw.send(id=2, op="shutdown", kill=True)
    assert raw.receive() == {"id": 2, "ok": {}}
    assert raw.receive() is None
    second = await Launcher.attach(home, unsandboxed=True)
    assert second.pid != pid
    assert await second.containers() == []
    await until(lambda: not alive(pid))
    await second.close()
    raw.close()


async def test_a_container_is_not_let_in(home: Home, launcher: Launcher, heard: Hearing) -> None:
    """Even with the key: the peer must be no process below the launcher, whoever its parent is now."""
    code = (
        "import socket, os, sys, time\n"
        "if os.fork():\n    os._exit(0)\n"
        "os.setsid()\n"
        "s = socket.socket(socket.AF_UNIX); s.settimeout(5); s.connect(sys.argv[1])\n"
        "key = open(sys.argv[2]).read()\n"
        'body = (\'{"id":1,"op":"hello","protocol":[1,1],"key":"%s"}\' % key).encode()\n'
        "try:\n"
        "    s.sendall(len(body).to_bytes(4, 'big') + body); answer = s.recv(100)\n"
        "except OSError:\n"
        "    answer = b''\n"
        "open(sys.argv[3] + '.new', 'wb').write(answer); os.rename(sys.argv[3] + '.new', sys.argv[3])\n"
        "time.sleep(600)\n"
    )
    answer = home.root / "answer"
    code_file = home.root / "intruder.py"
    code_file.write_text(code)
    script = f"{sys.executable} -I -S {code_file} {home.launcher_socket} {home.key_path} {answer}; sleep 600"
    await launcher.start(home.shell("a-0", script))
    await until(answer.exists)
    assert answer.read_bytes() == b""
    assert "refused" in home.log()


# -- what a peer without manners can do


async def test_frames_that_are_none_end_the_connection(home: Home, launcher: Launcher) -> None:
    frames = [
        b"\xff\xff\xff\xff",
        (MAX_FRAME + 1).to_bytes(4, "big"),
        b"\0\0\0\0",
        b"\0\0\0\x02{}",
        b"\0\0\0\x01[",
        b"\0\0\0\x03\xff\xfe\xfd",
        (4000).to_bytes(4, "big") + b"[" * 4000,
        b"GET / HTTP/1.1\r\n\r\n",
    ]
    for frame in frames:
        raw = Raw(home)
        raw.sock.sendall(frame)
        if b"{}" not in frame:
            assert raw.receive() is None, frame
        raw.close()
    trusted = Raw(home)
    assert "ok" in (trusted.hello() or {})
    trusted.sock.sendall((MAX_FRAME + 1).to_bytes(4, "big"))
    assert trusted.receive() is None
    trusted.close()
    assert await launcher.containers() == []


async def test_random_bytes_and_requests(home: Home, launcher: Launcher) -> None:
    seed = random.Random(4)
    names = [
        "start",
        "stop",
        "signal",
        "kill_tree",
        "exec",
        "ack_output",
        "forget",
        "reserve_port",
        "",
        "x",
        7,
    ]
    values = [None, 0, -1, 1.5, "", "a-0", "\0", [], {}, True, "9" * 100, {"platform": "none"}, [1], 1 << 70]
    fields = [
        "cid",
        "instance",
        "run",
        "signum",
        "timeout_s",
        "program",
        "argv",
        "env",
        "cwd",
        "plan",
        "port",
    ]
    fields += ["state_dir", "limits", "stdin", "offset", "stream", "max_output", "tty"]
    raw = Raw(home)
    assert "ok" in (raw.hello(events=False) or {})
    for number in range(600):
        chosen = {name: seed.choice(values) for name in fields if seed.random() < 0.7}
        raw.send(**{"id": number, "op": seed.choice(names), **chosen})
    raw.send(id="end", op="containers")
    errors = 0
    while (answer := raw.receive()) is not None and answer.get("id") != "end":
        errors += "error" in answer
        assert answer.get("error", {}).get("code") != "internal", answer
    assert answer is not None
    assert errors > 300
    raw.close()
    for _ in range(50):
        noise = Raw(home)
        try:
            noise.sock.sendall(seed.randbytes(seed.randrange(1, 5000)))
        except (BrokenPipeError, ConnectionResetError):
            continue  # it was dropped while it still spoke
        finally:
            noise.close()
    assert isinstance(await launcher.containers(), list)
    assert "bug" not in home.log()


async def test_strangers_cannot_use_the_places_up(home: Home, launcher: Launcher) -> None:
    idle = [Raw(home) for _ in range(60)]
    second = await Launcher.attach(home, spawn=False)
    assert await second.containers() == []
    await second.close()
    for raw in idle:
        raw.close()


async def test_one_byte_at_a_time(home: Home, launcher: Launcher) -> None:
    raw = Raw(home)
    for byte in encode_frame({"id": 1, "op": "hello", "protocol": [1, 1], "key": home.key_path.read_text()}):
        raw.sock.sendall(bytes([byte]))
    answer = raw.receive()
    assert answer is not None
    assert "ok" in answer
    raw.close()


async def test_a_peer_that_does_not_read_is_dropped(home: Home, launcher: Launcher) -> None:
    for number in range(30):
        await launcher.start(home.shell(f"a-{number}", "sleep 600"))
    raw = Raw(home)
    assert "ok" in (raw.hello(events=False) or {})
    raw.sock.settimeout(0.5)
    dropped = False
    for _ in range(10_000):
        try:
            raw.send(id=1, op="containers")
        except (BrokenPipeError, ConnectionResetError):
            dropped = True
            break
        except TimeoutError:
            continue
    assert dropped
    raw.close()
    async with asyncio.timeout(10):
        assert len(await launcher.containers()) == 30
    with open(f"/proc/{launcher.pid}/status") as file:
        rss_kb = int(file.read().split("VmRSS:")[1].split()[0])
    assert rss_kb < 150_000


async def test_output_is_kept_without_a_worker(home: Home, launcher: Launcher) -> None:
    await launcher.start(home.shell("a-0", "sleep 0.1; echo one; echo two >&2; exit 1"))
    await launcher.close()
    await until(lambda: (home.state("a-0") / "exit.json").exists())
    stdout, stderr = (read_stream(home.state("a-0"), name) for name in ("stdout", "stderr"))
    assert (stdout.data, stderr.data) == (b"one\n", b"two\n")
    assert [end.run for end in stdout.ends + stderr.ends] == [1, 1]
