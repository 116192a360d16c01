"""Trying again: what may work a moment later does not fail a pass."""

import random
import threading
from collections.abc import Callable
from typing import TypeVar

from .failures import Changed, S3Failure, Stopped, Unsettled

T = TypeVar("T")

ATTEMPTS = 5
FIRST_S = 0.2
LONGEST_S = 5.0


class Patience:
    def __init__(
        self, stopped: threading.Event, *, attempts: int = ATTEMPTS, first_s: float = FIRST_S
    ) -> None:
        self.stopped = stopped
        self._attempts = attempts
        self._first_s = first_s

    def check(self) -> None:
        if self.stopped.is_set():
            raise Stopped

    def call(self, attempt: Callable[[], T]) -> T:
        """What `attempt` gives, tried a few times. The last S3Failure, or the first that waiting cannot mend."""
        for count in range(self._attempts):
            self.check()
            try:
                return attempt()
            except (Changed, Unsettled):
                raise
            except S3Failure as failure:
                if not failure.again or count == self._attempts - 1:
                    raise
            pause_s = min(self._first_s * 2**count, LONGEST_S) * random.uniform(0.5, 1.0)
            if self.stopped.wait(pause_s):
                raise Stopped
        raise AssertionError("not reached")
