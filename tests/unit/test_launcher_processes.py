"""Finding and killing trees: real small ones on Linux, imagined ones for the rest."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from worker.launcher.linux import LinuxSystem
from worker.launcher.processes import Process, descends, system
from worker.launcher.reaper import Step, TreeKiller, belonging


def _until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture
def tree() -> Iterator[tuple[int, int]]:
    """A child and its child, both waiting to be killed."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        below = os.fork()
        if below:
            os.write(write, b"%d" % below)
        while True:
            time.sleep(100)
    below = int(os.read(read, 20))
    os.close(read)
    os.close(write)
    yield pid, below
    for doomed in (below, pid):
        try:
            os.kill(doomed, signal.SIGKILL)
        except ProcessLookupError:
            continue
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        return


linux = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")


@linux
@pytest.mark.parametrize("children_file", [True, False])
def test_members_on_linux(tree: tuple[int, int], children_file: bool) -> None:
    pid, below = tree
    table = LinuxSystem()
    if not children_file:
        table._lists_children = False
    found = {p.pid: p for p in table.members(os.getpid(), (), ())}
    assert {pid, below} <= set(found)
    assert (found[pid].ppid, found[below].ppid) == (os.getpid(), pid)
    assert found[below].session == pid
    assert found[below].alive
    assert os.getpid() not in found
    assert not {pid, below} & {p.pid for p in table.members(os.getpid(), (), (pid,))}
    assert [p.pid for p in table.members(pid, (), ())] == [below]


@linux
def test_find_stopped_and_ended(tree: tuple[int, int]) -> None:
    pid, below = tree
    table = LinuxSystem()
    os.kill(below, signal.SIGSTOP)
    _until(lambda: table.find(below).stopped)  # type: ignore[union-attr]
    assert not table.ended(pid)
    os.kill(pid, signal.SIGKILL)
    _until(lambda: table.ended(pid))
    process = table.find(pid)
    assert process is not None
    assert not process.alive
    assert table.find(1 << 22) is None


@linux
def test_names_with_brackets_do_not_confuse() -> None:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with open("/proc/self/comm", "w") as file:
            file.write(") Z 1 1")
        os.write(write, b"x")
        while True:
            time.sleep(100)
    os.read(read, 1)
    try:
        process = LinuxSystem().find(pid)
        assert process is not None
        assert (process.ppid, process.alive) == (os.getpid(), True)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)
        os.close(write)


@linux
@pytest.mark.parametrize("pidfd", [True, False])
def test_only_the_very_process_is_signalled(
    tree: tuple[int, int], pidfd: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid, _ = tree
    table = LinuxSystem()
    if not pidfd:
        from worker.launcher import linux as module

        def missing(pid: int) -> int:
            raise OSError(38, "not implemented")

        monkeypatch.setattr(module, "_pidfd_open", missing)
    process = table.find(pid)
    assert process is not None
    assert not table.signal(process._replace(start=process.start - 1), signal.SIGKILL)
    assert not table.ended(pid)
    assert table.signal(process, signal.SIGKILL)
    _until(lambda: table.ended(pid))
    os.waitpid(pid, 0)
    assert not table.signal(process, signal.SIGKILL)


@linux
def test_descent(tree: tuple[int, int]) -> None:
    pid, below = tree
    table = system()
    assert descends(table, below, os.getpid())
    assert descends(table, os.getpid(), os.getpid())
    assert not descends(table, os.getpid(), below)
    assert not descends(table, os.getppid(), os.getpid())
    assert descends(table, 1 << 22, os.getpid()), "unknown: not to be trusted"
    assert pid


@linux
def test_peers() -> None:
    one, other = socket.socketpair()
    assert LinuxSystem().peer(one) == (os.getpid(), os.geteuid())
    one.close()
    other.close()


@linux
@pytest.mark.parametrize("close_range", [True, False])
def test_closing_descriptors(close_range: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not close_range:
        from worker.launcher import linux as module

        def missing(*arguments: int) -> int:
            raise OSError(38, "not implemented")

        monkeypatch.setattr(module, "syscall", missing)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        LinuxSystem().close_descriptors({0, 1, 2, write})
        os.write(write, ",".join(sorted(os.listdir("/proc/self/fd"), key=int)).encode())
        os._exit(0)
    os.close(write)
    listed = [int(fd) for fd in os.read(read, 1000).decode().split(",")]
    assert [fd for fd in listed if fd not in (0, 1, 2, write)] in ([3], [4]), "the listing's own"
    os.waitpid(pid, 0)
    os.close(read)


# -- killing, imagined


class World:
    """Processes that fork whenever they are looked at, until they are stopped."""

    exact = True

    def __init__(self, size: int, births: int) -> None:
        self.processes = {pid: Process(pid, 1, pid, pid, True, False) for pid in range(100, 100 + size)}
        self.births = births
        self.log: list[tuple[int, int]] = []

    def scan(self) -> list[Process]:
        found = list(self.processes.values())
        for parent in found:
            if self.births and not parent.stopped:
                self.births -= 1
                pid = max(self.processes) + 1
                self.processes[pid] = Process(pid, parent.pid, parent.session, pid, True, False)
        return found

    def signal(self, process: Process, signum: int) -> bool:
        self.log.append((process.pid, signum))
        if signum == signal.SIGKILL:
            self.processes.pop(process.pid, None)
        else:
            self.processes[process.pid] = process._replace(stopped=True)
        return True


def test_everything_is_stopped_before_anything_is_killed() -> None:
    world = World(3, 20)
    killer = TreeKiller(world, world.scan, eager=False)  # type: ignore[arg-type]
    steps = []
    while (step := killer.step()) is not Step.NOTHING:
        steps.append(step)
    assert steps[-1] is Step.KILLED
    assert set(steps[:-1]) == {Step.STOPPED}
    assert world.processes == {}
    kinds = [signum for _, signum in world.log]
    assert kinds == sorted(kinds, key=lambda s: s == signal.SIGKILL)
    killed = [pid for pid, signum in world.log if signum == signal.SIGKILL]
    assert killed == sorted(killed, reverse=True), "the newest first"


def test_patience_ends() -> None:
    """Should something keep appearing, what is known is killed all the same."""
    world = World(1, 10**9)
    world.signal = lambda process, signum: True  # type: ignore[method-assign]
    killer = TreeKiller(world, world.scan, eager=False)  # type: ignore[arg-type]
    killer._patience = 5
    steps = [killer.step() for _ in range(6)]
    assert steps == [Step.STOPPED] * 5 + [Step.KILLED]


def test_what_may_not_be_signalled_stays_found() -> None:
    world = World(1, 0)

    def refuse(process: Process, signum: int) -> bool:
        raise PermissionError

    world.signal = refuse  # type: ignore[method-assign]
    killer = TreeKiller(world, world.scan, eager=False)  # type: ignore[arg-type]
    assert [killer.step() for _ in range(3)] == [Step.STOPPED, Step.KILLED, Step.KILLED]
    assert killer.found == 1


def test_belonging_to_a_session() -> None:
    members = [
        Process(10, 1, 10, 1, True, False),
        Process(11, 10, 10, 2, True, False),
        Process(12, 11, 12, 3, True, False),
        Process(20, 1, 20, 4, True, False),
        Process(21, 1, 10, 5, True, False),
        Process(22, 21, 22, 6, True, False),
    ]
    assert {p.pid for p in belonging(members, 10)} == {10, 11, 12, 21, 22}
