"""What the service manager is told, on a socket of the test's own; and that a hung journal ends the pings."""

import asyncio
import os
import socket
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from worker.journal import Journal
from worker.sd_notify import MAX_STATUS, Notifier, watch


class Manager:
    """The receiving end."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + name[1:] if name[0] == "@" else name)
        self._socket.setblocking(False)

    def told(self) -> list[str]:
        found = []
        while True:
            try:
                found.append(self._socket.recv(4096).decode())
            except BlockingIOError:
                return found

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest) -> Iterator[Manager]:
    with tempfile.TemporaryDirectory() as folder:  # a socket's path must be short
        name = f"{folder}/notify" if request.param == "path" else f"@sandfleet-test-{os.getpid()}"
        made = Manager(name)
        yield made
        made.close()


def test_all_that_is_told(manager: Manager) -> None:
    notifier = Notifier.take({"NOTIFY_SOCKET": manager.name})
    assert notifier.watchdog_s is None
    notifier.status("adopting\ncontainers")
    notifier.status("adopting containers")
    notifier.ready()
    notifier.ping()
    notifier.status("x" * 1000)
    notifier.stopping()
    assert manager.told() == [
        "STATUS=adopting containers",
        "READY=1",
        "WATCHDOG=1",
        "STATUS=" + "x" * MAX_STATUS,
        "STOPPING=1",
    ]


def test_a_reload_bears_the_time_of_its_beginning(manager: Manager) -> None:
    notifier = Notifier.take({"NOTIFY_SOCKET": manager.name})
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notifier.reloading()
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    (message,) = manager.told()
    first, second = message.splitlines()
    name, _, value = second.partition("=")
    assert (first, name) == ("RELOADING=1", "MONOTONIC_USEC")
    assert before <= int(value) <= after


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"WATCHDOG_USEC": "3000000"}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_is_taken_when_it_is_meant_for_us(said: dict[str, str], expected: float | None) -> None:
    environment = {"NOTIFY_SOCKET": "/run/notify", "HOME": "/", **said}
    assert Notifier.take(environment).watchdog_s == expected
    assert environment == {"HOME": "/"}


@pytest.mark.parametrize("name", ["", "vsock:2:1234", "@", "/", "notify"])
def test_another_address_is_told_nothing(name: str) -> None:
    environment = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "1000"}
    notifier = Notifier.take(environment)
    notifier.ready()
    assert notifier.watchdog_s is None
    assert environment == {}


def test_a_manager_that_is_gone_ends_nobody(tmp_path: Path) -> None:
    Notifier(str(tmp_path / "none")).ready()


@pytest_asyncio.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    made = await Journal.open(tmp_path / "worker.db", node="n1")
    yield made
    await made.close()


async def until_pinged(manager: Manager, times: int) -> None:
    seen = 0
    async with asyncio.timeout(20):
        while seen < times:
            seen += manager.told().count("WATCHDOG=1")
            await asyncio.sleep(0.01)


async def test_a_hung_journal_ends_the_pings(manager: Manager, journal: Journal) -> None:
    """Another watch with the same time goes on meanwhile: it is what tells how long the silence was."""
    notifier = Notifier.take({"NOTIFY_SOCKET": manager.name, "WATCHDOG_USEC": "20000"})
    hangs, go_on = threading.Event(), threading.Event()
    beats = 0

    async def beat() -> None:
        nonlocal beats
        beats += 1

    async def probe() -> None:
        await journal.read(lambda tx: None)

    def hang(_: object) -> None:
        hangs.set()
        go_on.wait(30)

    watches = [
        asyncio.create_task(watch(notifier, probe)),
        asyncio.create_task(watch(Notifier(None, 0.02), beat)),
    ]
    try:
        await until_pinged(manager, 3)
        hanging = asyncio.create_task(journal.read(hang))
        while not hangs.is_set():
            await asyncio.sleep(0.001)
        await asyncio.sleep(0)  # an answer that was given before may still be on its way
        manager.told()
        beats = 0
        async with asyncio.timeout(20):
            while beats < 20:
                await asyncio.sleep(0.001)
        assert manager.told().count("WATCHDOG=1") <= 1
        go_on.set()
        await hanging
        await until_pinged(manager, 3)
    finally:
        go_on.set()
        for task in watches:
            task.cancel()
        await asyncio.gather(*watches, return_exceptions=True)


async def test_without_a_watchdog_nobody_is_asked() -> None:
    async def never() -> None:
        raise AssertionError

    await watch(Notifier(), never)
