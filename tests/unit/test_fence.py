"""The fence around a container's processes: believed in only where it was seen to hold.

What it kills by is never called here; that is done in a machine of its own, by `test_attacks`.
"""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from worker.launcher import linux
from worker.launcher.linux import LinuxSystem
from worker.platform.linux import landlock

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")
needs_scopes = pytest.mark.skipif(landlock.abi() < 6, reason="needs Landlock ABI 6")


@pytest.fixture
def outsider() -> Iterator[int]:
    pid = os.fork()
    if pid == 0:
        while True:
            signal.pause()
    yield pid
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def in_a_child(look: Callable[[], Any]) -> Any:
    """What `look` gives in a process that ends afterwards."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writing, json.dumps(look()).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        said = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0
    return json.loads(said)


def may_signal(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return False
    return True


def test_a_kernel_that_has_none(monkeypatch: pytest.MonkeyPatch, outsider: int) -> None:
    monkeypatch.setattr(landlock, "abi", lambda: 5)
    assert LinuxSystem().fence(outsider) is None


def test_a_fence_that_does_not_hold_is_none(monkeypatch: pytest.MonkeyPatch, outsider: int) -> None:
    """Whatever the kernel says of its version: to kill everybody without it would end the host."""
    monkeypatch.setattr(landlock, "keep_signals_inside", lambda: True)
    assert LinuxSystem().fence(outsider) is None


@pytest.mark.parametrize("answers", [[False, False], [True, None], [None, None], [True, True]])
def test_only_a_change_is_a_proof(monkeypatch: pytest.MonkeyPatch, answers: list[bool | None]) -> None:
    """One that could not be signalled before is of another user, and one that ends meanwhile proves nothing."""
    left = list(answers)
    monkeypatch.setattr(landlock, "keep_signals_inside", lambda: True)
    monkeypatch.setattr(linux, "_may_signal", lambda pidfd: left.pop(0))
    assert LinuxSystem().fence(os.getpid()) is None


def test_an_outsider_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    entered: list[bool] = []
    monkeypatch.setattr(landlock, "keep_signals_inside", lambda: entered.append(True) or True)
    assert LinuxSystem().fence(pid) is None
    assert entered == []


@needs_scopes
def test_signals_stay_inside(outsider: int) -> None:
    def look() -> list[bool]:
        fenced = LinuxSystem().fence(outsider) is not None
        child = os.fork()
        if child == 0:
            while True:
                signal.pause()
        seen = [fenced, may_signal(outsider), may_signal(child)]
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return seen

    assert in_a_child(look) == [True, False, True]


@needs_scopes
def test_of_two_neither_reaches_the_other(outsider: int) -> None:
    """Each makes a domain of its own."""
    ready, told = os.pipe()
    other = os.fork()
    if other == 0:
        LinuxSystem().fence(outsider)
        os.write(told, b"x")
        while True:
            signal.pause()
    os.read(ready, 1)

    def look() -> list[bool]:
        before = may_signal(other)
        LinuxSystem().fence(outsider)
        return [before, may_signal(other)]

    try:
        assert in_a_child(look) == [True, False]
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
        os.close(ready)
        os.close(told)


@needs_scopes
def test_nothing_else_is_denied(tmp_path: Path, outsider: int) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "file").write_text("kept")

    def look() -> bool:
        fenced = LinuxSystem().fence(outsider) is not None
        os.rename(tmp_path / "a" / "file", tmp_path / "b" / "file")
        os.link(tmp_path / "b" / "file", tmp_path / "a" / "again")
        return fenced

    assert in_a_child(look) is True
    assert (tmp_path / "a" / "again").read_text() == "kept"
