"""kqueue's part that watches processes, made of Linux's process descriptors."""

import os
import select
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from worker.platform.darwin.kqueue import Names

# <sys/event.h>
EVFILT_PROC, EV_ADD, EV_ONESHOT, NOTE_EXIT = -5, 0x0001, 0x0010, 0x80000000

_pidfd_open: Callable[[int], int] = vars(os).get("pidfd_open", lambda pid: -1)


class Kevent(NamedTuple):
    ident: int
    filter: int
    flags: int
    fflags: int


class FakeKqueue:
    """Tells each registered process's end once; one that is gone cannot be registered."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._watched: dict[int, Kevent] = {}
        self.closed = False

    def control(
        self, changelist: Iterable[Kevent] | None, max_events: int, timeout: float | None, /
    ) -> list[Kevent]:
        for event in changelist or ():
            assert event[1:] == (EVFILT_PROC, EV_ADD | EV_ONESHOT, NOTE_EXIT)
            fd = _pidfd_open(event.ident)
            self._poll.register(fd, select.POLLIN)
            self._watched[fd] = event
        if not max_events:
            return []
        ended = []
        for fd, _ in self._poll.poll(None if timeout is None else round(timeout * 1000)):
            ended.append(self._watched.pop(fd))
            self._poll.unregister(fd)
            os.close(fd)
        return ended

    def close(self) -> None:
        for fd in self._watched:
            os.close(fd)
        self._watched.clear()
        self.closed = True


def names(made: list[FakeKqueue] | None = None) -> Names:
    """What the module `select` would have on macOS; queues that are made are added to `made`."""

    def kqueue() -> FakeKqueue:
        queue = FakeKqueue()
        if made is not None:
            made.append(queue)
        return queue

    def kevent(ident: int, **fields: Any) -> Kevent:
        return Kevent(ident, **fields)

    return Names(kqueue, kevent, EVFILT_PROC, EV_ADD, EV_ONESHOT, NOTE_EXIT)
