"""What the launcher tells on its own, kept until somebody listens."""

import asyncio
from collections.abc import Callable

from worker.supervisor_types import ExitRecord

OnExit = Callable[[ExitRecord], None]
OnOutput = Callable[[list[tuple[str, str, int]]], None]
OnLost = Callable[[], None]


class News:
    """`on_exit`, `on_output` and `on_lost` are called in the event loop, in the order of what happened.

    What happens before one of them is set is told when it is. An exit is told once, however often it is
    heard.
    """

    def __init__(self) -> None:
        self._on_exit: OnExit | None = None
        self._on_output: OnOutput | None = None
        self._on_lost: OnLost | None = None
        self._exits: list[ExitRecord] = []
        self._output: dict[tuple[str, str], int] = {}
        self._is_lost = False
        self._told: set[tuple[str, str, int]] = set()

    @property
    def on_exit(self) -> OnExit | None:
        return self._on_exit

    @on_exit.setter
    def on_exit(self, call: OnExit) -> None:
        self._on_exit = call
        early, self._exits = self._exits, []
        for record in early:
            _soon(call, record)

    @property
    def on_output(self) -> OnOutput | None:
        """Hears [(cid, stream, end offset)]; of each stream once, until `ack_output`."""
        return self._on_output

    @on_output.setter
    def on_output(self, call: OnOutput) -> None:
        self._on_output = call
        early, self._output = self._output, {}
        if early:
            _soon(call, [(cid, stream, end) for (cid, stream), end in early.items()])

    @property
    def on_lost(self) -> OnLost | None:
        """The launcher is gone, and its containers with it."""
        return self._on_lost

    @on_lost.setter
    def on_lost(self, call: OnLost) -> None:
        self._on_lost = call
        if self._is_lost:
            _soon(call)

    def _tell_exit(self, record: ExitRecord) -> None:
        key = (record.cid, record.instance, record.run)
        if key in self._told:
            return
        self._told.add(key)
        if self._on_exit is None:
            self._exits.append(record)
        else:
            _soon(self._on_exit, record)

    def _tell_output(self, items: list[tuple[str, str, int]]) -> None:
        if self._on_output is None:
            self._output.update({(cid, stream): end for cid, stream, end in items})
        else:
            _soon(self._on_output, items)

    def _tell_lost(self) -> None:
        if not self._is_lost:
            self._is_lost = True
            if self._on_lost is not None:
                _soon(self._on_lost)

    def _forget_told(self, cid: str, instance: str) -> None:
        self._told = {key for key in self._told if key[:2] != (cid, instance)}


def _soon(call: Callable[..., None], *arguments: object) -> None:
    # Not at once: an exception of a callback must not end the connection.
    asyncio.get_running_loop().call_soon(call, *arguments)
