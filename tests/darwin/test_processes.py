"""What we believe of processes on a Mac: unique ids, markers, footprints, time, ends."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from worker.platform.darwin.jetsam import MIB, become, prepare
from worker.platform.darwin.kqueue import ProcessWatch, system_names
from worker.platform.darwin.libproc import LibProc
from worker.platform.darwin.libsystem import load
from worker.platform.darwin.priority import set_background
from worker.platform.darwin.timebase import Timebase

from .conftest import Note
from .mac_help import Box, a_folder, confined, driver, run, seatbelt

pytestmark = pytest.mark.darwin

DEADLINE_S = 20.0


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def lib() -> LibProc:
    return LibProc(load())


@pytest.fixture
def box() -> Iterator[Box]:
    with a_folder() as folder:
        yield Box(folder)


def children(pid: int) -> list[int]:
    return [entry.pid for entry in LibProc(load()).entries() if entry.ppid == pid]


@contextlib.contextmanager
def a_program(*argv: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        try:
            yield program
        finally:
            program.kill()


def test_an_entry_is_ours(lib: LibProc) -> None:
    own = lib.entry(os.getpid())
    assert own is not None
    assert (own.pid, own.ppid) == (os.getpid(), os.getppid())
    assert own.unique > 0
    assert abs(own.start_us / 1e6 - time.time()) < 86_400
    parent = lib.entry(os.getppid())
    assert parent is None or own.parent_unique == parent.unique
    assert any(entry.pid == os.getpid() for entry in lib.entries())


def test_a_unique_id_stays_over_exec_and_grows(lib: LibProc) -> None:
    with a_program("/bin/sh", "-c", "read line; exec cat") as program:
        before = lib.entry(program.pid)
        assert program.stdin is not None
        program.stdin.write(b"\n")
        program.stdin.flush()
        program.stdin.write(b"x\n")
        program.stdin.flush()
        assert program.stdout is not None
        program.stdout.read(1)  # cat answers: it was reached
        after = lib.entry(program.pid)
        with a_program("/bin/cat") as second:
            later = lib.entry(second.pid)
    own = lib.entry(os.getpid())
    assert before is not None
    assert after is not None
    assert later is not None
    assert own is not None
    assert before.unique == after.unique > own.unique
    assert later.unique > after.unique
    assert before.parent_unique == after.parent_unique == own.unique


def test_the_first_parent_stays_when_launchd_adopts(lib: LibProc) -> None:
    read, write = os.pipe()
    between = os.fork()
    if between == 0:
        orphan = os.fork()
        if orphan == 0:
            signal.pause()
        os.write(write, b"%d" % orphan)
        signal.pause()
    orphan = int(os.read(read, 20))
    try:
        parent = lib.entry(between)
        os.kill(between, signal.SIGKILL)
        os.waitpid(between, 0)
        until(lambda: (entry := lib.entry(orphan)) is not None and entry.ppid == 1)
        adopted = lib.entry(orphan)
        assert parent is not None
        assert adopted is not None
        assert adopted.parent_unique == parent.unique
    finally:
        os.kill(orphan, signal.SIGKILL)
        os.close(read)
        os.close(write)


def test_zombies_and_stopped_ones(lib: LibProc) -> None:
    pid = os.fork()
    if pid == 0:
        signal.pause()
    os.kill(pid, signal.SIGSTOP)
    until(lambda: (entry := lib.entry(pid)) is not None and entry.status == 4)
    os.kill(pid, signal.SIGKILL)
    until(lambda: (entry := lib.entry(pid)) is not None and not entry.alive)
    assert not lib.outgrew_limit(pid)
    os.waitpid(pid, 0)
    assert lib.entry(pid) is None


def test_cpu_time_in_microseconds(lib: LibProc, note: Note) -> None:
    """Against the system's own account, within a factor of two: a wrong time base is wrong by 41.7."""
    base = Timebase(load())
    note("time base", [base.numer, base.denom, base.translated])
    while sum(os.times()[:2]) < 0.5:
        sum(range(10_000))
    usage = lib.rusage(os.getpid())
    assert usage is not None
    told = base.microseconds(usage.ri_user_time + usage.ri_system_time) / 1e6
    real = sum(os.times()[:2])
    note("CPU seconds by libproc and by times(3)", [round(told, 3), round(real, 3)])
    assert real / 2 < told < real * 2


def test_the_footprint_counts_what_is_touched(lib: LibProc) -> None:
    before = lib.rusage(os.getpid())
    held = bytearray(64 * MIB)
    held[::4096] = b"x" * len(held[::4096])
    after = lib.rusage(os.getpid())
    assert before is not None
    assert after is not None
    assert after.ri_phys_footprint - before.ri_phys_footprint > 48 * MIB
    task = lib.task_info(os.getpid())
    assert task is not None
    assert task.pti_threadnum >= 1
    assert (lib.open_files(os.getpid()) or 0) >= 3
    assert len(held) == 64 * MIB


def test_kqueue_tells_the_end_of_a_process() -> None:
    watch = ProcessWatch(system_names())
    try:
        with a_program("/bin/cat") as program:
            assert watch.add(program.pid)
            assert watch.wait(0) == set()
            program.kill()
            assert watch.wait(DEADLINE_S) == {program.pid}
        until(lambda: not watch.add(program.pid))
    finally:
        watch.close()


def test_the_background_class() -> None:
    with a_program("/bin/cat") as program:
        set_background(load(), program.pid, True)
        set_background(load(), program.pid, False)
    with pytest.raises(ProcessLookupError):
        set_background(load(), program.pid, True)


# -- limits


EATER = """
import sys
held = []
for _ in range(int(sys.argv[1])):
    held.append(bytearray(b'x' * (1 << 20)))
print('alive')
"""


@pytest.mark.parametrize(("eaten", "killed"), [(400, True), (20, False)])
def test_a_memory_limit_is_the_kernels(lib: LibProc, note: Note, eaten: int, killed: bool) -> None:
    """By an ordinary user, for one process, told apart from other kills."""
    pid = os.fork()
    if pid == 0:
        try:
            argv = [sys.executable, "-I", "-c", EATER, str(eaten)]
            become(prepare(load()), sys.executable, argv, {"PATH": "/usr/bin:/bin"}, 200)
        finally:
            os._exit(99)
    until(lambda: (entry := lib.entry(pid)) is not None and not entry.alive)
    outgrew = lib.outgrew_limit(pid)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    note(f"limit 200 MiB, {eaten} MiB eaten", {"exit": code, "told as outgrown": outgrew})
    assert (code, outgrew) == ((-signal.SIGKILL, True) if killed else (0, False))


# -- the marker


@pytest.mark.parametrize("exists", [False, True])
def test_the_marker_holds_over_fork_exec_and_setsid(box: Box, exists: bool) -> None:
    if exists:
        open(box.marker, "w").close()
    script = "import os,time\nif os.fork():\n    time.sleep(600)\nos.setsid()\nos.execv('/bin/sleep',['sleep','600'])"
    asked = seatbelt()
    plan = driver().plan(box.policy())
    with confined(plan, (os.path.realpath(sys.executable), "-I", "-c", script)) as pid:
        until(lambda: children(pid))
        [child] = children(pid)
        try:
            for one in (pid, child):
                assert asked.holds_marker(one, box.marker)
                assert not asked.holds_marker(one, box.marker + "B")
            assert not asked.holds_marker(os.getpid(), box.marker)
        finally:
            os.kill(child, signal.SIGKILL)


def test_another_sandbox_does_not_hold_it(box: Box) -> None:
    """Neither another container's, nor one of somebody else's that allows everything."""
    other = Box(box.root, "u-0")
    everything = {**driver().plan(box.policy()), "profile": "(version 1)(allow default)", "params": []}
    for plan in (driver().plan(other.policy()), everything):
        with confined(plan) as pid:
            assert seatbelt().confined(pid)
            assert not seatbelt().holds_marker(pid, box.marker)


def test_there_is_only_one_sandbox(box: Box, note: Note) -> None:
    """A second one is refused, so a worker in a sandbox must not pretend to have containers."""
    plan = driver().plan(box.policy())
    script = (
        "import ctypes\nlib = ctypes.CDLL('/usr/lib/libSystem.B.dylib', use_errno=True)\n"
        "error = ctypes.c_char_p()\n"
        "print(lib.sandbox_init(b'(version 1)(allow default)', ctypes.c_uint64(0), ctypes.byref(error)),"
        " ctypes.get_errno())"
    )
    code, said = run(plan, (os.path.realpath(sys.executable), "-I", "-c", script))
    note("a second sandbox", {"exit": code, "said": said[-500:]})
    assert said.split()[:1] == ["-1"]


def test_sizes_are_the_kernels(lib: LibProc) -> None:
    """Every structure came back whole: a wrong size is no answer at all."""
    assert lib.entry(os.getpid()) is not None
    assert lib.task_info(os.getpid()) is not None
    assert lib.rusage(os.getpid()) is not None
    assert ctypes.sizeof(ctypes.c_void_p) == 8
