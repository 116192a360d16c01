"""The gates of one container in its shim's loop: one for each program that its sandbox lets ask (see `report`)."""

import select
from typing import Any

from worker.launcher.sandbox import Sandboxes


class Gates:
    """Registers listeners with the loop's `poll` and answers them."""

    def __init__(self, poll: "select.poll", sandboxes: Sandboxes) -> None:
        self._poll = poll
        self._sandboxes = sandboxes
        self._open: dict[int, Any] = {}

    def add(self, listener: int, path: bytes) -> None:
        self._open[listener] = self._sandboxes.gate(listener, path)
        self._poll.register(listener, select.POLLIN)

    def pause(self) -> int | None:
        """Try again what waits. How long the loop may sleep, in milliseconds; None: until something happens."""
        pauses = [gate.retry() for gate in self._open.values()]
        return min((pause for pause in pauses if pause is not None), default=None)

    def serve(self, fd: int, event: int) -> None:
        """Answer, if `fd` is a listener."""
        gate = self._open.get(fd)
        if gate is None:
            return
        if event & select.POLLIN:
            gate.serve()
        else:  # the last program under its filter has ended
            self._poll.unregister(fd)
            del self._open[fd]
            gate.close()
