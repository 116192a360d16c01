"""The launcher's small parts: rate, pacing, notices, timers, waiting, ports, requests, records, arguments."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.launcher import requests
from worker.launcher.capture import Capture, RateLimit, _half_full_in
from worker.launcher.channel import Channel
from worker.launcher.linux import LinuxSystem
from worker.launcher.loop import Loop
from worker.launcher.main import parse
from worker.launcher.mux import EpollMux, Mux, PollMux
from worker.launcher.ports import Ports
from worker.launcher.program import Failure, read_report
from worker.launcher.protocol import Refused, encode_frame
from worker.launcher.reaper import exit_code
from worker.launcher.records import is_cpu_limit, write_record
from worker.launcher.sandbox import Sandboxes
from worker.launcher.segments import OpenFiles
from worker.launcher.timers import Timers

SECOND = 1_000_000_000


# -- rate


def test_a_bucket_shuts_until_half_full() -> None:
    limit = RateLimit(10_000, 0)
    assert limit.take(8_000, 0) == 8_000
    assert limit.take(8_000, 0) == 2_000
    assert limit.take(1, SECOND // 10) == 0, "shut, though there are tokens"
    assert limit.take(1, SECOND * 6 // 10) == 1
    assert limit.take(20_000, SECOND * 10) == 10_000


@given(
    st.integers(1, 1_000_000),
    st.lists(st.tuples(st.integers(0, SECOND), st.integers(0, 100_000)), max_size=40),
)
def test_a_bucket_never_gives_more_than_its_rate(rate: int, takes: list[tuple[int, int]]) -> None:
    limit = RateLimit(rate, 0)
    now = given_out = 0
    for wait, length in takes:
        now += wait
        allowed = limit.take(length, now)
        assert 0 <= allowed <= length
        given_out += allowed
    assert given_out <= max(rate, 4096) + now * rate / SECOND + 1


def test_pacing_follows_the_fastest() -> None:
    assert _half_full_in(65536, 32768, 1000) == 0
    assert _half_full_in(65536, 1024, 1_000_000) == 32_000_000
    assert _half_full_in(65536, 1, 0) == 0


# -- capture


class Captured:
    def __init__(self, mux: Mux, folder: Path, *, rate: int | None = None) -> None:
        self.capture = Capture(mux, LinuxSystem(), OpenFiles(8), pytest.fail)
        read, self.write = os.pipe()
        writer = self.capture.writer(str(folder), "stdout", None)
        self.stream = self.capture.open("a-0", "stdout", read, writer, rate)
        self.log = folder / f"stdout.{0:020d}.log"

    def say(self, data: bytes) -> None:
        os.write(self.write, data)
        self.capture.read_ready()

    def close(self) -> None:
        os.close(self.write)
        self.capture.dispose(self.stream)


@pytest.fixture(params=["epoll", "poll"])
def mux(request: pytest.FixtureRequest) -> Any:
    mux = EpollMux() if request.param == "epoll" else PollMux()
    yield mux
    mux.close()


def test_notices_are_one_at_a_time(mux: Mux, tmp_path: Path) -> None:
    made = Captured(mux, tmp_path)
    capture, stream = made.capture, made.stream
    made.say(b"one")
    assert capture.take_notices() == [["a-0", "stdout", 3]]
    made.say(b"two")
    assert capture.take_notices() == []
    capture.acknowledge(stream, 3)
    assert capture.take_notices() == [["a-0", "stdout", 6]]
    capture.acknowledge(stream, 6)
    assert capture.take_notices() == []
    made.say(b"three")
    capture.rearm(stream)
    made.say(b"!")
    assert capture.take_notices() == [["a-0", "stdout", 12]]
    capture.acknowledge(stream, 12)
    capture.announce(stream)
    assert capture.take_notices() == [["a-0", "stdout", 12]]
    made.close()
    assert made.log.read_bytes() == b"onetwothree!"


def test_a_short_read_mutes_a_full_one_does_not(
    mux: Mux, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Captured(mux, tmp_path)
    now = time.monotonic_ns()
    monkeypatch.setattr(
        "worker.launcher.capture.time.monotonic_ns", lambda: now
    )  # a busy machine outlasts the mute
    assert made.capture.muted_for() == 0
    made.say(b"x")
    assert 0 < made.capture.muted_for() <= 0.005
    made.say(b"x" * 60_000)
    assert made.capture.muted_for() == 0
    made.close()


def test_a_drain_is_bounded_by_the_pipe(mux: Mux, tmp_path: Path) -> None:
    made = Captured(mux, tmp_path)
    os.write(made.write, b"y" * 65536)
    made.capture.drain(made.stream)
    assert made.stream.fd == -1
    with pytest.raises(BrokenPipeError):
        os.write(made.write, b"an escaped process goes on")
    made.close()
    assert made.log.read_bytes() == b"y" * 65536


def test_a_pipe_that_is_full_twice_grows(mux: Mux, tmp_path: Path) -> None:
    made = Captured(mux, tmp_path)
    for _ in range(3):
        made.say(b"z" * 65536)
    assert made.stream.capacity == 256 * 1024
    made.close()


def test_a_rate_limit_keeps_whole_lines(mux: Mux, tmp_path: Path) -> None:
    made = Captured(mux, tmp_path, rate=10_000)
    made.say(b"line of 16 byte\n" * 1000)
    made.close()
    kept = made.log.read_bytes()
    assert 9_000 < len(kept) <= 10_000
    assert kept.endswith(b"\n")


# -- waiting and timers


def test_output_can_be_left_out_of_a_wait(mux: Mux) -> None:
    control_read, control_write = os.pipe()
    pipes = [os.pipe() for _ in range(5)]
    mux.watch(control_read)
    for read, write in pipes:
        mux.watch_output(read)
        os.write(write, b"x")
    assert mux.wait(0, output=False) == ([], False)
    assert mux.wait(0, output=True) == ([], True)
    found = [fd for _ in range(3) for fd in mux.ready_output(2)]
    assert set(found) == {read for read, _ in pipes}, "each in its turn"
    os.write(control_write, b"x")
    events, output = mux.wait(1, output=True)
    assert ([fd for fd, _ in events], output) == ([control_read], True)
    mux.watch(control_read, write=True)
    mux.watch(control_read)
    mux.unwatch(control_read)
    mux.unwatch(control_read)
    assert mux.wait(0, output=False) == ([], False)
    for read, write in pipes:
        mux.unwatch_output(read)
        os.close(read)
        os.close(write)
    assert mux.wait(0, output=True) == ([], False)
    os.close(control_read)
    os.close(control_write)


def test_timers_run_in_order_and_can_be_cancelled() -> None:
    timers = Timers()
    said: list[str] = []
    timers.after(0, lambda: said.append("a"))
    cancelled = timers.after(0, lambda: said.append("never"))
    timers.after(0, lambda: said.append("b"))
    late = timers.after(60, lambda: said.append("late"))
    cancelled.cancel()
    timers.run_due()
    assert said == ["a", "b"]
    due = timers.next_due()
    assert due is not None
    assert 50 < due - time.monotonic() <= 60
    late.cancel()
    assert timers.next_due() is None


def _loop(mux: Mux, bugs: list[Exception]) -> Loop:
    capture = Capture(mux, LinuxSystem(), OpenFiles(8), pytest.fail)
    return Loop(mux, capture, lambda bug, fd: bugs.append(bug))


def test_a_bug_costs_one_event_not_the_loop(mux: Mux) -> None:
    bugs: list[Exception] = []
    loop = _loop(mux, bugs)
    read, write = os.pipe()

    def broken(mask: int) -> None:
        os.read(read, 1)
        raise RuntimeError("a bug")

    loop.add(read, broken)
    os.write(write, b"x")
    loop.run_once()

    def also_broken() -> None:
        raise ZeroDivisionError

    loop.timers.after(0, also_broken)
    loop.run_once()
    assert [type(bug) for bug in bugs] == [RuntimeError, ZeroDivisionError]
    loop.remove(read)
    os.close(read)
    os.close(write)


def test_a_channel_reads_last_words_after_a_failed_send(mux: Mux) -> None:
    loop = _loop(mux, [])
    ours, theirs = socket.socketpair()
    heard: list[Any] = []
    channel = Channel(loop, ours, heard.append, heard.append)
    theirs.sendall(encode_frame({"last": "words"}))
    theirs.close()
    channel.send({"to": "nobody"})
    channel.send({"to": "nobody"})
    loop.run_once()
    loop.timers.after(0.05, lambda: None)
    loop.run_once()
    assert heard[0] == {"last": "words"}
    assert len(heard) == 2
    assert channel.closed


def test_a_channel_drops_a_reader_that_does_not_read(mux: Mux) -> None:
    loop = _loop(mux, [])
    ours, theirs = socket.socketpair()
    closed: list[str] = []
    channel = Channel(loop, ours, lambda message: None, closed.append)
    for _ in range(10):
        channel.send({"x": "y" * 4_000_000})
    assert closed == ["it does not read what it is sent"]
    theirs.close()


def test_a_channel_passes_descriptors_and_closes_them(mux: Mux) -> None:
    loop = _loop(mux, [])
    ours, theirs = socket.socketpair()
    channel = Channel(loop, ours, lambda message: None, lambda reason: None)
    read, write = os.pipe()
    channel.send({"n": 1}, (write,))
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(write)
    data, fds, _, _ = socket.recv_fds(theirs, 1000, 4)
    assert data == encode_frame({"n": 1})
    os.write(fds[0], b"through")
    assert os.read(read, 10) == b"through"
    channel.send_last({"bye": True})
    assert channel.closed
    for fd in (read, *fds):
        os.close(fd)
    theirs.close()


# -- ports


def test_a_guard_is_retaken_when_the_port_is_free_again() -> None:
    timers = Timers()
    ports = Ports(timers)
    port = ports.reserve("a-0", None)
    ports.lend("a-0")
    squatter = socket.socket()
    squatter.bind(("127.0.0.1", port))
    ports.retake("a-0")
    assert timers.next_due() is not None, "tried again later"
    assert ports.get("a-0") == port
    squatter.close()
    ports.retake("a-0")
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    assert ports.reserve("a-0", None) == port
    changed = ports.reserve("a-0", ports.reserve("b-0", None) and None)
    assert changed == port
    assert ports.release("a-0")
    assert not ports.release("a-0")
    ports.lend("a-0")
    ports.retake("a-0")
    assert ports.get("a-0") is None
    ports.release("b-0")


def test_a_lent_port_is_given_to_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = Ports(Timers())
    port = ports.reserve("a-0", None)
    ports.lend("a-0")
    from worker.launcher import ports as module

    real, first = module._bind, [port]
    monkeypatch.setattr(module, "_bind", lambda wanted: real(wanted or (first.pop() if first else 0)))
    assert ports.reserve("b-0", None) != port
    ports.release("a-0")
    ports.release("b-0")


# -- requests


START = {
    "cid": "a-0",
    "instance": "I",
    "run": 1,
    "state_dir": "/s",
    "program": "/p",
    "argv": ["p"],
    "env": {"A": "b"},
    "cwd": "/",
}


def test_a_start_is_read_whole() -> None:
    identity = requests.identity({**START, "limits": {"max_rate": 5, "cpu_time_limit_s": 1.5}})
    assert (identity.cid, identity.run, identity.max_rate, identity.cpu_limit_s) == ("a-0", 1, 5, 1.5)
    assert requests.command(START).argv == ["p"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cid", ""),
        ("cid", 1),
        ("cid", "a\0"),
        ("instance", None),
        ("run", 0),
        ("run", True),
        ("run", "1"),
        ("state_dir", []),
        ("limits", 3),
        ("limits", {"max_rate": -1}),
        ("limits", {"cpu_time_limit_s": "x"}),
        ("tty", True),
        ("program", ""),
        ("argv", []),
        ("argv", [1]),
        ("argv", ["a\0"]),
        ("argv", "sh"),
        ("env", {"A=": "b"}),
        ("env", {"": "b"}),
        ("env", {"A": 1}),
        ("env", []),
        ("cwd", None),
    ],
)
def test_wrong_fields_are_refused_by_name(field: str, value: object) -> None:
    message = {**START, field: value}
    named = field if not isinstance(value, dict) or field == "env" else next(iter(value))
    read = requests.command if field in ("program", "argv", "env", "cwd") else requests.identity
    with pytest.raises(Refused, match=named):
        read(message)


@pytest.mark.parametrize("value", [None, True, "1", -1, float("nan"), float("inf"), 1e10])
def test_seconds(value: object) -> None:
    with pytest.raises(Refused):
        requests.seconds({"timeout_s": value}, "timeout_s")


# -- ends


def test_exit_codes() -> None:
    assert exit_code(3 << 8) == 3
    assert exit_code(9) == -9
    assert exit_code(signal.SIGSEGV | 0x80) == -signal.SIGSEGV


def test_cpu_limit() -> None:
    assert is_cpu_limit(-signal.SIGXCPU, 0, None, by_us=True)
    assert is_cpu_limit(-9, 2_000_000, 2, by_us=False)
    assert is_cpu_limit(-9, 1_850_000, 2, by_us=False), "ticks"
    assert not is_cpu_limit(-9, 1_000_000, 2, by_us=False)
    assert not is_cpu_limit(-9, 2_000_000, 2, by_us=True)
    assert not is_cpu_limit(-9, 2_000_000, None, by_us=False)
    assert not is_cpu_limit(1, 9_000_000, 2, by_us=False)


def test_a_record_replaces_the_old_one_whole(tmp_path: Path) -> None:
    write_record(str(tmp_path), {"run": 1})
    write_record(str(tmp_path), {"run": 2})
    assert (tmp_path / "exit.json").read_text() == '{"run":2}'
    assert os.listdir(tmp_path) == ["exit.json"]
    assert (tmp_path / "exit.json").stat().st_mode & 0o777 == 0o600
    with pytest.raises(OSError, match="No such file"):
        write_record(str(tmp_path / "missing"), {})


def test_reports_of_a_child() -> None:
    assert read_report(b"+") is None
    assert read_report(b'{"step":"chdir","errno":2,"detail":"x"}') == Failure("chdir", 2, "x")
    assert read_report(b'+{"step":"exec","errno":13,"detail":"x"}') == Failure("exec", 13, "x")
    for raw in (b"", b"{", b"+{}", b"+[]", b"+7"):
        failure = read_report(raw)
        assert failure is not None
        assert failure.step == "child"


def test_plans_need_a_known_platform() -> None:
    with pytest.raises(Refused, match="none"):
        Sandboxes().check({"platform": "none"})
    Sandboxes(allow_none=True).check({"platform": "none"})
    with pytest.raises(Refused, match="beos"):
        Sandboxes(allow_none=True).check({"platform": "beos"})


# -- the process


def test_arguments() -> None:
    options = parse(["--data-dir", "/d", "--key-file", "/k", "--socket", "/s", "--foreground"])
    assert (options.data_dir, options.key_file, options.socket) == ("/d", "/k", "/s")
    assert (options.foreground, options.unsandboxed) == (True, False)
    for wrong in ([], ["--data-dir"], ["--data-dir", "/d"], ["--data-dir", "/d", "--key-file", ""], ["x"]):
        with pytest.raises(ValueError, match=r"--|unknown"):
            parse(wrong)


def test_it_imports_nothing_but_itself_and_the_standard_library(tmp_path: Path) -> None:
    """Whatever lies in the working directory or the environment."""
    for name in ("json", "socket", "worker"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('picked up')")
    main = Path(__file__).parents[2] / "worker" / "launcher" / "__main__.py"
    code = (
        "import runpy, sys\n"
        f"names = runpy.run_path({str(main)!r}, run_name='not main')\n"
        "names['make_packages']()\n"
        "import worker.launcher.main\n"
        "print(*sorted(name for name in sys.modules if '.' not in name or name.startswith('worker')))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PYTHONSTARTUP": "json.py"},
        capture_output=True,
        text=True,
        check=True,
    )
    names = set(ran.stdout.split())
    assert {name for name in names if name.startswith("worker.") and "launcher" not in name} <= {
        "worker.platform",
        "worker.platform.linux",
        "worker.platform.linux.libc",
        "worker.platform.darwin",
    }
    unwanted = {
        "msgspec",
        "loguru",
        "asyncio",
        "dataclasses",
        "inspect",
        "logging",
        "subprocess",
        "threading",
    }
    assert not names & unwanted
    assert all(name in sys.stdlib_module_names or name.startswith("worker") for name in names - {"__main__"})


def test_usage_errors_have_a_code(tmp_path: Path) -> None:
    main = Path(__file__).parents[2] / "worker" / "launcher" / "__main__.py"
    ran = subprocess.run([sys.executable, "-I", "-S", str(main), "--what"], capture_output=True, text=True)
    assert ran.returncode == 2
    assert "usage" in ran.stderr
    arguments = ["--data-dir", str(tmp_path / "missing"), "--key-file", "/k"]
    ran = subprocess.run([sys.executable, "-I", "-S", str(main), *arguments], capture_output=True, text=True)
    assert ran.returncode == 1
    assert str(tmp_path / "missing") in ran.stderr
