"""A whole worker under a service manager that the test plays: ready, status, reload, stop, and the watchdog."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.acceptance.conftest import CONFIG
from tests.acceptance.harness import DEADLINE_S, Fleet, Worker, shell, until

# A worker whose journal hangs from SIGUSR1 to SIGUSR2, so that a test can see what becomes of the pings.
HANGING = """
import asyncio, signal, sys, threading
from pathlib import Path
from worker.journal import Journal

opened, go_on = Journal.open.__func__, threading.Event()

def hang(tx):
    Path(sys.argv[-1]).touch()
    go_on.wait(60)

async def open(cls, *args, **options):
    journal = await opened(cls, *args, **options)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, lambda: asyncio.ensure_future(journal.read(hang)))
    loop.add_signal_handler(signal.SIGUSR2, go_on.set)
    return journal

Journal.open = classmethod(open)
from worker.cli.app import run
sys.exit(run(sys.argv[1:-1]))
"""


class Manager:
    """The receiving end of sd_notify."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.all: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + name[1:] if name[0] == "@" else name)
        self._socket.setblocking(False)

    def read(self) -> list[str]:
        """Every line that came since the last time."""
        lines: list[str] = []
        while True:
            try:
                lines += self._socket.recv(65536).decode().split("\n")
            except BlockingIOError:
                self.all += lines
                return lines

    async def until(self, wanted: Callable[[str], bool] | str) -> str:
        """The first line from now on that is wanted."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            for line in self.read():
                if line == wanted or (callable(wanted) and wanted(line)):
                    return line
            assert time.monotonic() < deadline, f"never told {wanted}: {self.all[-20:]}"
            await asyncio.sleep(0.01)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Manager]:
    name = str(tmp_path / "notify") if request.param == "path" else f"@sandfleet-acceptance-{os.getpid()}"
    made = Manager(name)
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    monkeypatch.setenv("WATCHDOG_USEC", "400000")
    yield made
    made.close()


def environment_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


async def test_the_life_of_a_worker(manager: Manager) -> None:
    async with Fleet(CONFIG) as fleet:
        client, worker = fleet.client, fleet.worker
        await until(lambda: "STATUS=n1 is ready" in (manager.read(), manager.all)[1], what="the status")
        said = manager.all
        assert (
            said.index("STATUS=adopting containers")
            < said.index("READY=1")
            < said.index("STATUS=n1 is ready")
        )
        for _ in range(3):
            await manager.until("WATCHDOG=1")

        # None of it is for those whom the worker starts.
        await fleet.register("base")
        printing = "env; echo count $(env | grep -c -e NOTIFY -e WATCHDOG); exec sleep 1000"
        status = (await client.ok("web-0", "run", spec=shell(printing)))["status"]
        await client.log_seen("web-0", b"count 0\n")
        launcher = worker.launcher_pid()
        assert launcher is not None
        for pid in (launcher, status["pid"]):
            assert b"NOTIFY_SOCKET" not in environment_of(pid)
            assert b"WATCHDOG_" not in environment_of(pid)

        # A reload: begun, with its time, and over.
        manager.read()
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        assert worker.process is not None
        worker.process.send_signal(signal.SIGHUP)
        await manager.until("READY=1")
        reload = manager.all[manager.all.index("RELOADING=1") :]
        name, _, usec = reload[1].partition("=")
        assert name == "MONOTONIC_USEC"
        assert before <= int(usec) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000

        # Without a server it is told, and still alive.
        fleet.server.kill()
        await manager.until(lambda line: line.startswith("STATUS=") and "connection to NATS broke" in line)
        await manager.until("WATCHDOG=1")
        fleet.server.start()
        await manager.until("STATUS=n1 is ready")
        await client.back()

        assert worker.terminate() == 0
        manager.read()
        assert manager.all.count("STOPPING=1") == 1
        assert manager.all.count("READY=1") == 2


async def test_it_is_ready_without_a_server(manager: Manager, tmp_path: Path) -> None:
    async with Fleet(CONFIG) as fleet:
        fleet.worker.kill()
        fleet.server.stop()
        manager.read()
        fleet.worker.start()
        await manager.until("READY=1")
        await manager.until("WATCHDOG=1")
        assert fleet.worker.terminate() == 0
        await manager.until("STOPPING=1")
        fleet.server.start()
        await fleet.client.back()


class HangingWorker(Worker):
    """`hung` is there once the journal's thread hangs."""

    @property
    def hung(self) -> Path:
        return self.folder / "hung"

    def start(self, *extra: str) -> None:
        argv = [sys.executable, "-c", HANGING, *self.argv(*extra)[1:], str(self.hung)]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )


async def test_a_hung_journal_ends_the_pings(manager: Manager) -> None:
    fleet = Fleet(CONFIG)
    fleet.worker = HangingWorker(fleet.worker.folder, fleet.server, "n1", fleet.worker.config.read_text())
    async with fleet:
        process, hung = fleet.worker.process, fleet.worker.hung
        assert process is not None
        for _ in range(3):
            await manager.until("WATCHDOG=1")
        process.send_signal(signal.SIGUSR1)
        await until(hung.exists, what="the hang")
        # The loop itself is alive: it answers what needs no journal, and tells that it does not know the rest.
        await fleet.client.query("list")
        manager.read()
        for _ in range(3):  # each waits for a second for the journal: ten times a ping's turn in all
            info = await fleet.client.query("info")
            assert info["delivery"]["outbox_events"] is None
        assert manager.read().count("WATCHDOG=1") <= 1
        process.send_signal(signal.SIGUSR2)
        for _ in range(3):
            await manager.until("WATCHDOG=1")
        assert (await fleet.client.query("info"))["delivery"]["outbox_events"] == 0


async def test_a_loop_that_stands_still_ends_the_pings(manager: Manager) -> None:
    """A stopped process stands for it: after its going on the next ping comes by itself."""
    async with Fleet(CONFIG) as fleet:
        process = fleet.worker.process
        assert process is not None
        await manager.until("WATCHDOG=1")
        process.send_signal(signal.SIGSTOP)
        try:
            await until(lambda: _state(process.pid) == "T", what="the stop")
        finally:
            process.send_signal(signal.SIGCONT)
        manager.read()
        await manager.until("WATCHDOG=1")


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
