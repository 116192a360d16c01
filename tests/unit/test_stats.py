"""Samples, the memory watchdog, and the process trees of /proc with real processes."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import NamedTuple

import pytest

from schemas.status import Stats
from worker.errors import Unavailable
from worker.platform.base import ProcessTable, TreeSample
from worker.platform.linux import proc
from worker.platform.linux.proc import LinuxProcessTable, allocated_bytes
from worker.stats import MAX_TICK_S, TICK_S, Sampler, Target

MIB = 1 << 20
NOW = datetime(2026, 11, 24, 3, 31, 39, tzinfo=UTC)


class Machine:
    """A fake of everything that the sampler asks: trees by shim, and the counter of memory handed out."""

    def __init__(self) -> None:
        self.trees: dict[int, TreeSample] = {}
        self.allocated: int | None = 0
        self.measured: list[int] = []
        self.published: list[Stats] = []
        self.over: list[tuple[str, int]] = []
        self.targets: list[Target] = []
        self.unavailable = False

    def use(self, shim: int, *, memory: int = 0, cpu_usec: int = 0) -> None:
        self.trees[shim] = TreeSample(
            cpu_usec=cpu_usec,
            memory_bytes=memory,
            processes=1,
            threads=2,
            open_files=3,
            read_bytes=None,
            write_bytes=5,
        )

    # -- as a process table

    def tree(self, root_pid: int, marker: str = "") -> TreeSample | None:
        return self.trees.get(root_pid)

    def memory(self, root_pid: int, limit: int | None = None, marker: str = "") -> int | None:
        self.measured.append(root_pid)
        sample = self.trees.get(root_pid)
        return None if sample is None else sample.memory_bytes

    def members(self, root_pid: int, marker: str = "") -> tuple[int, ...]:
        return ()

    def alive(self, pid: int, start_time: int) -> bool:
        return pid in self.trees and start_time == 1

    async def publish(self, stats: Stats) -> None:
        if self.unavailable:
            raise Unavailable("no server")
        self.published.append(stats)

    def target(self, shim: int, limit: int | None = None, **changes: int) -> Target:
        made = Target(f"web-{shim}", "0" * 26, 1, shim, 1, limit)._replace(**changes)
        self.targets.append(made)
        return made


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def sampler(machine: Machine) -> Iterator[Sampler]:
    made = Sampler(
        node="n1",
        interval_s=0.05,
        targets=lambda: machine.targets,
        processes=lambda: machine,
        allocated_bytes=lambda: machine.allocated,
        publish=lambda stats: machine.publish(stats),
        on_memory_limit=lambda cid, used: machine.over.append((cid, used)),
        clock=lambda: NOW,
    )
    yield made
    made.close()


async def test_a_sample_of_every_container(machine: Machine, sampler: Sampler) -> None:
    machine.use(10, memory=7, cpu_usec=1000)
    machine.target(10, limit=100)
    machine.target(11)  # has just ended
    await sampler.sample_all()
    assert machine.published == [
        Stats(
            node="n1",
            container="web-10",
            instance="0" * 26,
            time=NOW,
            cpu_usec=1000,
            cpu_percent=None,
            memory_bytes=7,
            memory_limit=100,
            processes=1,
            threads=2,
            open_files=3,
            read_bytes=None,
            write_bytes=5,
        )
    ]


async def test_cpu_never_falls_within_a_run(machine: Machine, sampler: Sampler) -> None:
    machine.use(10, cpu_usec=5000)
    first = machine.target(10)
    await sampler.sample_all()
    machine.use(10, cpu_usec=3000)
    await sampler.sample_all()
    measured = await sampler.measure(first)
    assert measured is not None
    assert [s.cpu_usec for s in machine.published] == [5000, 5000]
    assert measured.cpu_usec == 5000
    # The next run starts anew.
    machine.targets = [first._replace(run=2)]
    await sampler.sample_all()
    assert machine.published[-1].cpu_usec == 3000


async def test_cpu_percent_is_of_the_time_between(
    machine: Machine, sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("worker.stats.time.monotonic", lambda: now)
    machine.use(10, cpu_usec=0)
    target = machine.target(10)
    await sampler.sample_all()
    now = 110.0
    machine.use(10, cpu_usec=15_000_000)
    await sampler.sample_all()
    assert machine.published[-1].cpu_percent == 150.0
    now = 110.01
    measured = await sampler.measure(target)
    assert measured is not None
    assert measured.cpu_percent is None


async def test_measuring_what_is_gone_gives_nothing(machine: Machine, sampler: Sampler) -> None:
    assert await sampler.measure(machine.target(10)) is None
    machine.use(10)
    assert await sampler.measure(machine.target(10, shim_start=2)) is None


async def test_a_server_that_is_away_costs_a_sample(machine: Machine, sampler: Sampler) -> None:
    machine.use(10)
    machine.target(10)
    machine.unavailable = True
    await sampler.sample_all()
    machine.unavailable = False
    await sampler.sample_all()
    assert len(machine.published) == 1


async def test_the_watchdog_measures_only_what_can_have_grown_enough(
    machine: Machine, sampler: Sampler
) -> None:
    machine.use(10, memory=20)
    machine.target(10, limit=100)
    machine.use(11, memory=0)
    machine.target(11)  # without a limit
    await sampler.watch()
    assert machine.measured == [10]
    machine.allocated = 80
    await sampler.watch()
    assert machine.measured == [10]
    machine.allocated = 81
    await sampler.watch()
    assert machine.measured == [10, 10]
    assert machine.over == []


async def test_over_the_limit_is_told_and_told_again_only_later(
    machine: Machine, sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("worker.stats.time.monotonic", lambda: now)
    machine.use(10, memory=101)
    machine.target(10, limit=100)
    for _ in range(3):
        machine.allocated = (machine.allocated or 0) + 1
        await sampler.watch()
    assert machine.over == [("web-10", 101)]
    now = 102.0
    machine.allocated = (machine.allocated or 0) + 1
    await sampler.watch()
    assert machine.over == [("web-10", 101)] * 2


async def test_exactly_the_limit_is_allowed(machine: Machine, sampler: Sampler) -> None:
    machine.use(10, memory=100)
    machine.target(10, limit=100)
    await sampler.watch()
    await sampler.sample_all()
    assert machine.over == []


async def test_a_machine_that_does_not_count_is_measured_each_time(
    machine: Machine, sampler: Sampler
) -> None:
    machine.allocated = None
    machine.use(10)
    machine.target(10, limit=100)
    for _ in range(3):
        assert TICK_S <= await sampler.watch() <= MAX_TICK_S
    assert machine.measured == [10, 10, 10]


async def test_the_regular_sample_sees_the_limit_too(machine: Machine, sampler: Sampler) -> None:
    machine.use(10, memory=101)
    machine.target(10, limit=100)
    await sampler.sample_all()
    assert machine.over == [("web-10", 101)]


async def test_without_limits_there_is_nothing_to_watch(machine: Machine, sampler: Sampler) -> None:
    machine.use(10)
    machine.target(10)
    assert await sampler.watch() == MAX_TICK_S
    assert machine.measured == []


async def test_it_runs_until_cancelled(machine: Machine, sampler: Sampler) -> None:
    machine.use(10, memory=200)
    machine.target(10, limit=100)
    enough = asyncio.Event()
    publish = machine.publish

    async def publish_and_look(stats: Stats) -> None:
        await publish(stats)
        if len(machine.published) == 2:
            enough.set()

    machine.publish = publish_and_look  # type: ignore[method-assign]
    task = asyncio.create_task(sampler.run())
    try:
        await asyncio.wait_for(enough.wait(), 10)
    finally:
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert machine.over


# -- /proc


linux = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")


def wait_for(condition: Callable[[], bool], timeout_s: float = 15) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass in time"
        time.sleep(0.005)


class Shim(NamedTuple):
    """A process that stands for a shim: it runs `program` as its only child and reaps for it."""

    process: "subprocess.Popen[bytes]"

    @property
    def pid(self) -> int:
        return self.process.pid

    def ready(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()


SHIM = """
import ctypes, os, signal, subprocess, sys
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # the subreaper of what it starts
child = subprocess.Popen([sys.executable, "-I", "-S", "-c", sys.argv[1]])
child.wait()
while True:
    try: os.wait()
    except ChildProcessError: break
"""
READY = "print('ready', flush=True); sys.stdin.readline()\n"


@pytest.fixture
def shim() -> Iterator[Callable[[str], Shim]]:
    started: list[subprocess.Popen[bytes]] = []

    def start(program: str) -> Shim:
        code = f"import os, sys\n{program}"
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", SHIM, code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        started.append(process)
        return Shim(process)

    yield start
    for process in started:
        with process:
            if process.poll() is None:
                # The shim last: until it ends, what it started cannot have been reaped by anyone else.
                for pid in LinuxProcessTable().members(process.pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.kill()


def sample(shim: Shim) -> TreeSample:
    found = LinuxProcessTable().tree(shim.pid)
    assert found is not None
    return found


@linux
def test_the_shim_itself_is_left_out(shim: Callable[[str], Shim]) -> None:
    one = shim(READY)
    one.ready()
    found = sample(one)
    assert (found.processes, found.threads) == (1, 1)
    assert found.open_files == 3
    assert found.read_bytes is not None
    assert 2 * MIB < found.memory_bytes < 60 * MIB
    assert len(LinuxProcessTable().members(one.pid)) == 1


@linux
def test_orphans_and_new_sessions_are_counted(shim: Callable[[str], Shim]) -> None:
    program = (
        "for _ in range(3):\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        if os.fork() == 0:\n"
        "            import signal; signal.pause()\n"
        "        os._exit(0)\n"
        "    os.wait()\n" + READY
    )
    one = shim(program)
    one.ready()
    assert sample(one).processes == 4


@linux
@pytest.mark.parametrize("scan", [False, True])
def test_a_walk_and_a_scan_find_the_same(
    shim: Callable[[str], Shim], scan: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proc, "_MAX_WALKS", -1 if scan else 1000)
    one = shim("import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
               "if os.fork() == 0: time.sleep(60)\n" + READY)  # fmt: skip
    one.ready()
    found = sample(one)
    assert (found.processes, found.threads) == (2, 3)


@linux
def test_memory_that_is_shared_after_a_fork_counts_once(shim: Callable[[str], Shim]) -> None:
    program = (
        f"import signal\nblock = bytearray(b'x') * {64 * MIB}\n"
        "for _ in range(3):\n"
        "    if os.fork() == 0: signal.pause()\n" + READY
    )
    one = shim(program)
    one.ready()
    found = sample(one)
    assert found.processes == 4
    assert 64 * MIB < found.memory_bytes < 128 * MIB
    table = LinuxProcessTable()
    # The bound is four times as much, and is enough of an answer only below the limit.
    bound = table.memory(one.pid, 1 << 40)
    assert bound is not None
    assert bound > 256 * MIB
    exact = table.memory(one.pid, 200 * MIB)
    assert exact is not None
    assert 64 * MIB < exact < 128 * MIB


@linux
def test_shared_memory_counts(shim: Callable[[str], Shim]) -> None:
    program = f"import mmap\nblock = mmap.mmap(-1, {32 * MIB}); block.write(b'x' * {32 * MIB})\n" + READY
    one = shim(program)
    one.ready()
    assert sample(one).memory_bytes > 32 * MIB


@linux
def test_cpu_time_of_ended_children_is_kept(shim: Callable[[str], Shim]) -> None:
    burn = "import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass\n"
    one = shim(f"if os.fork() == 0:\n    exec({burn!r}); os._exit(0)\nos.wait()\n" + READY)
    one.ready()
    assert sample(one).cpu_usec >= 280_000
    before = sample(one).cpu_usec
    one.go_on()
    # The program itself ends too; then the shim has no one left and ends.
    wait_for(lambda: (found := LinuxProcessTable().tree(one.pid)) is None or found.cpu_usec >= before)


@linux
def test_who_is_alive(shim: Callable[[str], Shim]) -> None:
    one = shim(READY)
    one.ready()
    stat = proc._read_stat(one.pid)
    assert stat is not None
    assert LinuxProcessTable().alive(one.pid, stat.start)
    assert not LinuxProcessTable().alive(one.pid, stat.start + 1)
    one.go_on()
    one.process.wait(10)
    table = LinuxProcessTable()
    assert not table.alive(one.pid, stat.start)
    assert table.tree(one.pid) is None
    assert table.memory(one.pid) is None
    assert table.members(one.pid) == ()


@linux
def test_a_name_with_brackets_and_blanks_does_no_harm(shim: Callable[[str], Shim]) -> None:
    one = shim("open('/proc/self/comm', 'w').write(') R 1 (x')\n" + READY)
    one.ready()
    [pid] = LinuxProcessTable().members(one.pid)
    stat = proc._read_stat(pid)
    assert stat is not None
    assert (stat.parent, stat.threads) == (one.pid, 1)


@linux
def test_the_counter_of_memory_rises_with_what_is_used() -> None:
    before = allocated_bytes()
    if before is None:
        pytest.skip("this kernel does not count")
    block = bytearray(64 * MIB)
    block[::4096] = b"x" * len(block[::4096])
    after = allocated_bytes()
    assert after is not None
    assert after - before >= 64 * MIB


def test_a_fake_is_a_process_table(machine: Machine) -> None:
    table: ProcessTable = machine
    assert table.members(1) == ()
