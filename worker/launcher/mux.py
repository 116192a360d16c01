"""Waiting for descriptors, in two tiers: control (sockets, signals) and output (the programs' pipes).

Output can be left out of a wait as a whole, which is what keeps 1,000 chatting containers from costing a
wake-up a line: the pipes fill meanwhile, and one pass reads them all. With epoll that is one nested
descriptor taken out and put back; elsewhere it is a choice between two poll objects.
"""

import select
from typing import Any, Protocol

# The values of epoll(7) and poll(2) agree for these.
READ, WRITE = 0x1, 0x4


class Mux(Protocol):
    def watch(self, fd: int, *, write: bool = False) -> None:
        """Wait for `fd` to be readable (and writable); may be called again to change that."""

    def unwatch(self, fd: int) -> None: ...

    def watch_output(self, fd: int) -> None: ...

    def unwatch_output(self, fd: int) -> None: ...

    def wait(self, timeout_s: float | None, *, output: bool) -> tuple[list[tuple[int, int]], bool]:
        """Control events, and whether some output is readable (False unless asked for)."""

    def ready_output(self, limit: int) -> list[int]:
        """Output descriptors that are readable now, each in its turn."""

    def close(self) -> None: ...


def make_mux() -> Mux:
    return EpollMux() if hasattr(select, "epoll") else PollMux()


class EpollMux:
    def __init__(self) -> None:
        epoll: Any = vars(select)["epoll"]
        self._control = epoll()
        self._output = epoll()
        self._watched: dict[int, int] = {}
        self._with_output = False

    def watch(self, fd: int, *, write: bool = False) -> None:
        mask = READ | WRITE if write else READ
        known = self._watched.get(fd)
        if known is None:
            self._control.register(fd, mask)
        elif known != mask:
            self._control.modify(fd, mask)
        self._watched[fd] = mask

    def unwatch(self, fd: int) -> None:
        if self._watched.pop(fd, None) is not None:
            self._control.unregister(fd)

    def watch_output(self, fd: int) -> None:
        self._output.register(fd, READ)

    def unwatch_output(self, fd: int) -> None:
        self._output.unregister(fd)

    def wait(self, timeout_s: float | None, *, output: bool) -> tuple[list[tuple[int, int]], bool]:
        nested = self._output.fileno()
        if output != self._with_output:
            if output:
                self._control.register(nested, READ)
            else:
                self._control.unregister(nested)
            self._with_output = output
        events = self._control.poll(-1 if timeout_s is None else timeout_s, 256)
        if not output:
            return events, False
        control = [event for event in events if event[0] != nested]
        return control, len(control) != len(events)

    def ready_output(self, limit: int) -> list[int]:
        return [fd for fd, _ in self._output.poll(0, limit)]

    def close(self) -> None:
        self._control.close()
        self._output.close()


class PollMux:
    """For systems without epoll. Costs a look at every descriptor a wait."""

    def __init__(self) -> None:
        self._control = select.poll()
        self._output = select.poll()
        self._both = select.poll()
        self._pipes: set[int] = set()
        self._turn: list[int] = []

    def watch(self, fd: int, *, write: bool = False) -> None:
        mask = READ | WRITE if write else READ
        self._control.register(fd, mask)
        self._both.register(fd, mask)

    def unwatch(self, fd: int) -> None:
        for poll in (self._control, self._both):
            try:
                poll.unregister(fd)
            except KeyError:
                return

    def watch_output(self, fd: int) -> None:
        self._pipes.add(fd)
        self._output.register(fd, READ)
        self._both.register(fd, READ)

    def unwatch_output(self, fd: int) -> None:
        self._pipes.remove(fd)
        self._output.unregister(fd)
        self._both.unregister(fd)
        self._turn = [other for other in self._turn if other != fd]

    def wait(self, timeout_s: float | None, *, output: bool) -> tuple[list[tuple[int, int]], bool]:
        timeout_ms = None if timeout_s is None else -(-timeout_s * 1000 // 1)
        events = (self._both if output else self._control).poll(timeout_ms)
        control = [event for event in events if event[0] not in self._pipes]
        return control, len(control) != len(events)

    def ready_output(self, limit: int) -> list[int]:
        if not self._turn:
            self._turn = [fd for fd, _ in self._output.poll(0)]
        now, self._turn = self._turn[:limit], self._turn[limit:]
        return now

    def close(self) -> None:
        self._turn.clear()
