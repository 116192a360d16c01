"""The gates of one container in its shim's loop: one for each program that its sandbox lets ask (see `report`)."""

import select
from typing import Any

from worker.launcher.report import MORE
from worker.launcher.sandbox import Sandboxes


class Gates:
    """Registers listeners with the loop's `poll` and answers them."""

    def __init__(self, poll: "select.poll", sandboxes: Sandboxes) -> None:
        self._poll = poll
        self._sandboxes = sandboxes
        self._open: dict[int, Any] = {}
        self._first: Any = None
        self._handed: list[int] = []

    def add(self, descriptors: list[int], words: bytes) -> None:
        """Take over what a child has handed over (see `report`), as the messages come."""
        self._handed += descriptors
        if words == MORE:
            return
        handed, self._handed = self._handed, []
        gate = self._sandboxes.gate(handed, words, self._first)
        self._first = self._first or gate
        self._open[gate.fileno()] = gate
        self._poll.register(gate.fileno(), select.POLLIN)

    def pause(self) -> int | None:
        """Try again what waits. How long the loop may sleep, in milliseconds; None: until something happens."""
        pauses = [gate.retry() for gate in self._open.values()]
        return min((pause for pause in pauses if pause is not None), default=None)

    def serve(self, fd: int, event: int) -> None:
        """Answer, if `fd` is a gate's."""
        gate = self._open.get(fd)
        if gate is None:
            return
        if event & select.POLLIN:
            gate.serve()
        if gate.ended or not event & select.POLLIN:  # the last program under its filter has ended
            self._poll.unregister(fd)
            del self._open[fd]
            gate.close()
