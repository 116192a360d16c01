"""What goes wrong between here and a registry, before it is told to anybody."""

from collections.abc import Callable
from typing import TypeVar

from worker.errors import PullFailed

from .patience import Patience
from .stopping import StopSignal

T = TypeVar("T")


class TransportError(Exception):
    """One exchange failed. `again`: a new try may help, not before `after_s`. `absent`: nobody is there."""

    def __init__(
        self, reason: str, *, again: bool, after_s: float | None = None, absent: bool = False
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.again = again
        self.after_s = after_s
        self.absent = absent


def persist(call: Callable[[], T], patience: Patience, stop: StopSignal) -> T:
    """Call until it succeeds; PullFailed with the last reason when that is hopeless."""
    failures = 0
    while True:
        try:
            return call()
        except TransportError as failure:
            failures += 1
            most = patience.absent_attempts if failure.absent else patience.attempts
            if not failure.again or failures >= most:
                raise given_up(failure, failures) from failure
            stop.wait(patience.pause_s(failures, failure.after_s))


def given_up(failure: TransportError, failures: int) -> PullFailed:
    tried = f" (tried {failures} times)" if failures > 1 else ""
    return PullFailed(f"{failure.reason}{tried}", field="image")
