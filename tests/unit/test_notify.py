"""Answers to calls that wait, when a signal comes between: nothing gets lost, and no program hears of it."""

import errno
import fcntl
from collections.abc import Callable

import pytest

from worker.platform.linux.notify import Listener


class Kernel:
    """Interrupts the first tries of every request, then answers with `error`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tries = 0
        self.error = 0
        monkeypatch.setattr(fcntl, "ioctl", self._ioctl)

    def _ioctl(self, fd: int, request: int, argument: bytes) -> int:
        self.tries += 1
        if self.tries < 3:
            raise InterruptedError(errno.EINTR, "Interrupted system call")
        if self.error:
            raise OSError(self.error, "")
        return 0


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


ASKED: list[Callable[[Listener], object]] = [
    lambda one: one.waits(7),
    lambda one: one.answer(7, errno.EACCES),
    lambda one: one.go_on(7),
    lambda one: one.give(7, 3, cloexec=True),
    lambda one: one.replace(7, 3, 4, cloexec=False),
]


@pytest.mark.parametrize("ask", ASKED)
def test_a_signal_between_is_no_answer(kernel: Kernel, ask: Callable[[Listener], object]) -> None:
    assert ask(Listener(-1)) in (True, None)
    assert kernel.tries == 3


@pytest.mark.parametrize("ask", ASKED[:3])
def test_a_caller_that_is_gone_is_told(kernel: Kernel, ask: Callable[[Listener], object]) -> None:
    kernel.error = errno.ENOENT
    assert ask(Listener(-1)) is False


def test_a_call_that_is_interrupted_while_it_is_heard_stays_there(kernel: Kernel) -> None:
    assert Listener(-1).receive() is None
    assert kernel.tries == 1
