"""Capture of real programs' output, exec's pipes, port guards."""

import asyncio
import errno
import os
import resource
import signal
import socket
import sys

import pytest

from tests.integration.launcher_help import (
    Hearing,
    Home,
    descendants,
    digest,
    read_stream,
    until,
)
from worker.errors import Conflict, ResourceExhausted, Unavailable
from worker.launcher.segments import MARK
from worker.supervisor import ExecRequest, Launcher, LaunchFailed

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")


def _python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code, *arguments]


# -- capture

LINES = """
import sys
for n in range(int(sys.argv[1])):
    sys.stdout.write(f'{n:07d} ' + 'x' * 91 + '\\n')
    if n % 1000 == 0:
        sys.stderr.write(f'{n}\\n'); sys.stderr.flush()
"""


def _lines(count: int) -> bytes:
    return b"".join(b"%07d " % n + b"x" * 91 + b"\n" for n in range(count))


async def test_every_byte_of_200_000_lines(home: Home, launcher: Launcher, heard: Hearing) -> None:
    await launcher.start(home.request("a-0", *_python(LINES, "200000")))
    assert (await heard.exit_of("a-0")).exit_code == 0
    stdout, stderr = (read_stream(home.state("a-0"), name) for name in ("stdout", "stderr"))
    assert digest(stdout.data) == digest(_lines(200_000))
    assert stderr.data == b"".join(b"%d\n" % n for n in range(0, 200_000, 1000))
    assert stdout.lost == stderr.lost == []
    assert [(e.run, e.incomplete) for e in stdout.ends + stderr.ends] == [(1, False), (1, False)]
    await until(lambda: ("a-0", "stdout", len(stdout.data)) in heard.notices)
    ends = [end for cid, name, end in heard.notices if name == "stdout"]
    assert ends == sorted(ends)


async def test_old_segments_make_room(home: Home, launcher: Launcher, heard: Hearing) -> None:
    most = 2 * 1024 * 1024
    await launcher.start(home.request("a-0", *_python(LINES, "100000"), max_log_bytes=most))
    await heard.exit_of("a-0")
    files = [f for f in home.state("a-0").iterdir() if f.name.startswith("stdout")]
    assert most // 2 < sum(f.stat().st_size for f in files) <= most
    content = read_stream(home.state("a-0"), "stdout")
    [(offset, length, reason)] = content.lost
    assert (offset, reason) == (0, "size")
    assert content.end == 10_000_000 - 100_000 + 100_000 == len(_lines(100_000))
    assert content.data == _lines(100_000)[length:]


async def test_a_rate_limit_counts_what_it_drops(home: Home, launcher: Launcher, heard: Hearing) -> None:
    await launcher.start(home.request("a-0", *_python(LINES, "50000"), max_rate=100_000))
    await heard.exit_of("a-0")
    content = read_stream(home.state("a-0"), "stdout")
    assert content.lost
    assert {reason for _, _, reason in content.lost} == {"rate"}
    everything = _lines(50_000)
    assert content.end == len(everything)
    assert 0 < len(content.data) < len(everything) // 2
    lost = sum(length for _, length, _ in content.lost)
    assert len(content.data) + lost == len(everything)
    kept = bytearray(everything)
    for offset, length, _ in reversed(content.lost):
        del kept[offset : offset + length]
    assert bytes(kept) == content.data
    assert content.data.endswith(b"\n"), "lines are kept whole"


async def test_a_disk_error_never_blocks(home: Home, launcher: Launcher, heard: Hearing) -> None:
    """A file size limit on the launcher stands for a full disk: a write fails, or is cut short."""
    code = LINES + "\nsys.stdout.flush()\nsys.stdin.close()\nimport time\ntime.sleep(0.5)\nprint('after')\n"
    prlimit = vars(resource)["prlimit"]
    prlimit(launcher.pid, resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    await launcher.start(home.request("a-0", *_python(code, "20000")))
    await until(lambda: "bytes are lost" in home.log())
    prlimit(launcher.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    ended = await heard.exit_of("a-0")
    assert ended.exit_code == 0
    content = read_stream(home.state("a-0"), "stdout")
    everything = _lines(20_000) + b"after\n"
    assert content.end == len(everything)
    assert {reason for _, _, reason in content.lost} == {"disk"}
    kept = bytearray(everything)
    for offset, length, _ in reversed(content.lost):
        del kept[offset : offset + length]
    assert bytes(kept) == content.data
    assert content.ends[-1].run == 1


async def test_a_run_whose_end_the_disk_does_not_take_is_not_forgotten(
    home: Home, launcher: Launcher, heard: Hearing
) -> None:
    prlimit = vars(resource)["prlimit"]
    await launcher.start(home.shell("a-0", "while [ ! -e go ]; do sleep 0.01; done", cwd=str(home.root)))
    prlimit(launcher.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    (home.root / "go").touch()
    await heard.exit_of("a-0")
    with pytest.raises(ResourceExhausted, match="the end of the output of a-0"):
        await launcher.forget("a-0", "I")
    with pytest.raises(ResourceExhausted, match="the end of the output of a-0"):
        await launcher.start(home.shell("a-0", "true", run=2))
    prlimit(launcher.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    await until(lambda: [end.run for end in read_stream(home.state("a-0"), "stdout").ends] == [1])
    await launcher.start(home.shell("a-0", "echo next", run=2))
    await heard.exit_of("a-0", 2)
    await launcher.forget("a-0", "I")
    content = read_stream(home.state("a-0"), "stdout")
    assert (content.data, [end.run for end in content.ends]) == (b"next\n", [1, 2])


async def test_offsets_go_on_with_the_next_run(home: Home, launcher: Launcher, heard: Hearing) -> None:
    for run in (1, 2, 3):
        await launcher.start(home.shell("a-0", f"echo run {run}", run=run))
        await heard.exit_of("a-0", run)
        if run == 2:
            await launcher.forget("a-0", "I")
    content = read_stream(home.state("a-0"), "stdout")
    assert content.data == b"run 1\nrun 2\nrun 3\n"
    assert [end.run for end in content.ends] == [1, 2, 3]
    assert len(list(home.state("a-0").glob("stdout.*.log"))) == 1


async def test_offsets_go_on_after_a_lost_launcher(home: Home, launcher: Launcher, heard: Hearing) -> None:
    from worker.capture_files import write_incomplete_eof

    await launcher.start(home.shell("a-0", "echo before; sleep 600"))
    await until(lambda: home.output("a-0") == b"before\n")
    os.kill(launcher.pid, signal.SIGKILL)
    second = await Launcher.attach(home, unsandboxed=True)
    try:
        write_incomplete_eof(home.state("a-0"), 1)
        later = Hearing(second)
        await second.start(home.shell("a-0", "echo behind", run=2))
        await later.exit_of("a-0", 2)
        content = read_stream(home.state("a-0"), "stdout")
        assert content.data == b"before\nbehind\n"
        assert [(end.run, end.incomplete) for end in content.ends] == [(1, True), (2, False)]
    finally:
        await second.close()


async def test_notices_wait_for_their_acknowledgement(home: Home, launcher: Launcher) -> None:
    heard = Hearing(launcher, acknowledge=False)
    script = "echo 1; while [ ! -e go ]; do sleep 0.01; done; echo 2; echo 3; sleep 600"
    await launcher.start(home.shell("a-0", script, cwd=str(home.root)))
    await until(lambda: heard.notices)
    (home.root / "go").touch()
    await until(lambda: home.output("a-0") == b"1\n2\n3\n")
    await launcher.containers()
    assert heard.notices == [("a-0", "stdout", 2)]
    launcher.ack_output("a-0", "stdout", 2)
    await until(lambda: len(heard.notices) == 2)
    assert heard.notices[1] == ("a-0", "stdout", 6)
    launcher.ack_output("a-0", "stdout", 6)
    await launcher.containers()
    assert len(heard.notices) == 2


async def test_a_first_line_after_silence_comes_at_once(home: Home, launcher: Launcher) -> None:
    heard = Hearing(launcher)
    loop = asyncio.get_running_loop()
    came: list[float] = []

    def told(items: list[tuple[str, str, int]]) -> None:
        came.append(loop.time())
        heard._output(items)

    launcher.on_output = told
    os.mkfifo(home.root / "line")
    await launcher.start(home.shell("a-0", "while read line; do echo $line; done < line", cwd=str(home.root)))
    writer = await asyncio.to_thread(os.open, home.root / "line", os.O_WRONLY)
    delays = []
    for number in range(20):
        seen = len(came)
        at = loop.time()
        os.write(writer, b"%d\n" % number)
        await until(lambda seen=seen: len(came) > seen)  # type: ignore[misc]
        delays.append(came[-1] - at)
    os.close(writer)
    assert sorted(delays)[len(delays) // 4] < 0.02


async def test_a_closed_stream_is_no_end_of_the_run(home: Home, launcher: Launcher, heard: Hearing) -> None:
    await launcher.start(home.shell("a-0", "echo out; exec 1>&-; sleep 0.1; echo err >&2; exit 5"))
    assert (await heard.exit_of("a-0")).exit_code == 5
    assert home.output("a-0") == b"out\n"
    assert home.output("a-0", "stderr") == b"err\n"


async def test_marks_carry_the_time_of_capture(home: Home, launcher: Launcher, heard: Hearing) -> None:
    await launcher.start(home.shell("a-0", "echo a; sleep 0.1; echo b"))
    await heard.exit_of("a-0")
    raw = (home.state("a-0") / f"stdout.{0:020d}.marks").read_bytes()
    marks = list(MARK.iter_unpack(raw))
    assert [(offset, length, kind) for offset, _, length, kind in marks] == [(0, 2, 0), (2, 2, 0), (4, 1, 3)]
    assert 80_000 < marks[1][1] - marks[0][1] < 10_000_000
    assert (home.state("a-0") / f"stdout.{0:020d}.log").stat().st_mode & 0o777 == 0o600


async def test_a_link_in_the_state_folder_is_not_followed(
    home: Home, launcher: Launcher, heard: Hearing
) -> None:
    request = home.shell("a-0", "echo secret")
    victim = home.root / "victim"
    victim.write_text("untouched")
    (home.state("a-0") / f"stdout.{0:020d}.log").symlink_to(victim)
    await launcher.start(request)
    await heard.exit_of("a-0")
    assert victim.read_text() == "untouched"


# -- exec


def _exec(script: str, **fields: object) -> ExecRequest:
    given: dict[str, object] = {
        "program": "/bin/sh",
        "argv": ["sh", "-c", script],
        "env": {"PATH": "/usr/bin:/bin", "WORD": "w"},
        "cwd": "/tmp",
    }
    return ExecRequest(**{**given, **fields})  # type: ignore[arg-type]


async def test_exec_gives_code_and_both_outputs(home: Home, launcher: Launcher) -> None:
    await launcher.start(home.shell("a-0", "sleep 600"))
    result = await launcher.exec("a-0", _exec("cat; pwd; echo $WORD >&2; exit 3", stdin=b"\0in\xff\n"))
    assert (result.exit_code, result.stdout, result.stderr) == (3, b"\0in\xff\n/tmp\n", b"w\n")
    assert (result.truncated, result.timed_out) == (False, False)
    assert (await launcher.exec("a-0", _exec("kill -9 $$"))).exit_code == -9


async def test_exec_output_is_cut(home: Home, launcher: Launcher) -> None:
    await launcher.start(home.shell("a-0", "sleep 600"))
    result = await launcher.exec("a-0", _exec("yes | head -c 3000000; echo x >&2", max_bytes=1000))
    assert (len(result.stdout), result.stderr, result.truncated) == (1000, b"x\n", True)
    result = await launcher.exec("a-0", _exec("head -c 300000 /dev/zero"))
    assert (len(result.stdout), result.truncated) == (256 * 1024, True)


async def test_exec_feeds_large_input(home: Home, launcher: Launcher) -> None:
    await launcher.start(home.shell("a-0", "sleep 600"))
    data = os.urandom(1_000_000)
    result = await launcher.exec("a-0", _exec("sha256sum", stdin=data))
    assert result.stdout.split()[0].decode() == digest(data)
    assert (await launcher.exec("a-0", _exec("exec 0<&-; exit 4", stdin=data))).exit_code == 4


async def test_exec_failures(home: Home, launcher: Launcher) -> None:
    with pytest.raises(Conflict):
        await launcher.exec("a-0", _exec("true"))
    await launcher.start(home.shell("a-0", "sleep 600"))
    with pytest.raises(LaunchFailed) as failure:
        await launcher.exec("a-0", _exec("true", program="/no/such"))
    assert (failure.value.step, failure.value.errno) == ("exec", errno.ENOENT)
    with pytest.raises(LaunchFailed) as failure:
        await launcher.exec("a-0", _exec("true", cwd="/no/such"))
    assert failure.value.step == "chdir"
    pending = asyncio.create_task(launcher.exec("a-0", _exec("sleep 600", timeout_s=100)))
    await until(lambda: not pending.done())
    await launcher.exec("a-0", _exec("true"))
    await launcher.kill_tree("a-0", "I", 1)
    assert (await pending).exit_code == -9


async def test_exec_does_not_wait_for_what_it_left(home: Home, launcher: Launcher) -> None:
    await launcher.start(home.shell("a-0", "sleep 600"))
    async with asyncio.timeout(10):
        result = await launcher.exec("a-0", _exec("sleep 600 & echo done"))
    assert (result.exit_code, result.stdout) == (0, b"done\n")


async def test_many_execs_at_once(home: Home, launcher: Launcher) -> None:
    await launcher.start(home.shell("a-0", "sleep 600"))
    results = await asyncio.gather(*[launcher.exec("a-0", _exec(f"echo {n}; exit {n}")) for n in range(20)])
    assert [(r.exit_code, r.stdout) for r in results] == [(n, b"%d\n" % n) for n in range(20)]


# -- ports


def _can_bind(port: int, *, reuse: bool) -> bool:
    with socket.socket() as sock:
        if reuse:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


SERVER = """
import socket, sys
s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(('127.0.0.1', int(sys.argv[1]))); s.listen(); print('ready', flush=True)
while True:
    c, _ = s.accept(); c.sendall(b'hello'); c.close()
"""


async def test_a_port_is_held_until_the_program_starts(
    home: Home, launcher: Launcher, heard: Hearing
) -> None:
    port = await launcher.reserve_port("a-0")
    assert await launcher.reserve_port("a-0") == port
    assert not _can_bind(port, reuse=False)
    assert not _can_bind(port, reuse=True)
    with socket.socket() as sock:
        assert sock.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED, "held, but nobody listens"
    await launcher.start(home.request("a-0", *_python(SERVER, str(port))))
    await until(lambda: home.output("a-0") == b"ready\n")
    [found] = await launcher.containers()
    assert found.port == port
    for _ in range(3):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await reader.read() == b"hello"
        writer.close()
        await writer.wait_closed()
    with pytest.raises(Unavailable):
        await launcher.reserve_port("b-0", port=port)
    assert await launcher.reserve_port("a-0", port=port) == port
    await launcher.kill_tree("a-0", "I", 1)
    # Connections that linger in TIME_WAIT must not leave it open to others.
    assert not _can_bind(port, reuse=False)
    assert not _can_bind(port, reuse=True)
    await launcher.start(home.request("a-0", *_python(SERVER, str(port)), run=2))
    await until(lambda: home.output("a-0") == b"ready\nready\n")
    await launcher.kill_tree("a-0", "I", 2)
    await launcher.release_port("a-0")
    await launcher.release_port("a-0")
    assert _can_bind(port, reuse=True)


async def test_ports_are_unique(home: Home, launcher: Launcher) -> None:
    ports = await asyncio.gather(*[launcher.reserve_port(f"a-{n}") for n in range(100)])
    assert len(set(ports)) == 100
    assert await launcher.ports() == {f"a-{n}": ports[n] for n in range(100)}


async def test_a_taken_port_is_refused(home: Home, launcher: Launcher) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        with pytest.raises(Unavailable, match=str(port)):
            await launcher.reserve_port("a-0", port=port)
    assert await launcher.reserve_port("a-0", port=port) == port


async def test_a_failed_start_gives_the_guard_back(home: Home, launcher: Launcher) -> None:
    port = await launcher.reserve_port("a-0")
    with pytest.raises(LaunchFailed):
        await launcher.start(home.request("a-0", "/no/such/program"))
    assert not _can_bind(port, reuse=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="looks into a process that hides itself")
async def test_descriptors_do_not_leak(home: Home, launcher: Launcher, heard: Hearing) -> None:
    def held() -> int:
        return len(os.listdir(f"/proc/{launcher.pid}/fd"))

    async def use(number: int) -> None:
        cid = f"a-{number}"
        await launcher.reserve_port(cid)
        await launcher.start(home.shell(cid, "echo x; sleep 600"))
        await launcher.exec(cid, _exec("true"))
        await launcher.kill_tree(cid, "I", 1)
        await heard.exit_of(cid)
        await launcher.forget(cid, "I")
        await launcher.release_port(cid)
        with pytest.raises(LaunchFailed):
            await launcher.start(home.request(cid, "/no/such"))

    def settled() -> bool:
        """Nothing runs but two spares: four processes below the nursery."""
        return len(descendants(launcher.pid)) == 5

    seen: list[int] = []

    def rested() -> bool:
        """The same number each time it was looked at, for a while: a spare is made in several steps."""
        seen.append(held() if settled() else -len(seen))
        return len(seen) >= 40 and len(set(seen[-40:])) == 1

    await use(0)
    await until(rested)
    before = held()
    for number in range(1, 9):
        await use(number)
    await until(settled)
    await until(lambda: held() <= before)
