"""A way to call off blocking work from another thread."""

import threading


class CalledOff(Exception):
    """Whoever wanted the work has gone."""


class StopSignal:
    """Set once. Blocking work asks `check` often, and sleeps with `wait`."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    @property
    def is_set(self) -> bool:
        return self._event.is_set()

    def check(self) -> None:
        """Raises CalledOff once the signal is set."""
        if self._event.is_set():
            raise CalledOff

    def wait(self, seconds: float) -> None:
        """Sleep, but not past the signal, which raises CalledOff."""
        if self._event.wait(seconds):
            raise CalledOff
