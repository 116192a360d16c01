"""Waiting for the end of processes that are not our children, through kqueue(2). Standard library only.

Source: kqueue(2), EVFILT_PROC with NOTE_EXIT. A process that is gone cannot be registered (ESRCH). Each end
is told once. Python has these names on macOS and the BSDs only; they are looked up, so that the file is
checked and tested everywhere.
"""

import select
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

_ANY = 64


class Kqueue(Protocol):
    """The part of select.kqueue that is used."""

    def control(
        self, changelist: Iterable[Any] | None, max_events: int, timeout: float | None, /
    ) -> Sequence[Any]: ...

    def close(self) -> None: ...


class Names(NamedTuple):
    """What the module `select` has of it."""

    kqueue: Callable[[], Kqueue]
    kevent: Callable[..., Any]
    filter_proc: int
    add: int
    oneshot: int
    note_exit: int


def system_names() -> Names:
    """This system's; KeyError where it has no kqueue."""
    found = vars(select)
    return Names(
        kqueue=found["kqueue"],
        kevent=found["kevent"],
        filter_proc=found["KQ_FILTER_PROC"],
        add=found["KQ_EV_ADD"],
        oneshot=found["KQ_EV_ONESHOT"],
        note_exit=found["KQ_NOTE_EXIT"],
    )


class ProcessWatch:
    """Owns a kqueue; to be closed."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self._queue = names.kqueue()
        self._watched: set[int] = set()

    def add(self, pid: int) -> bool:
        """False when there is no such process any more. OSError for other failures."""
        names = self._names
        event = names.kevent(
            pid, filter=names.filter_proc, flags=names.add | names.oneshot, fflags=names.note_exit
        )
        try:
            self._queue.control([event], 0, 0)
        except ProcessLookupError:
            return False
        self._watched.add(pid)
        return True

    def wait(self, timeout_s: float) -> set[int]:
        """Those that have ended, once there is one or the time is over; at once when none is watched."""
        if not self._watched:
            return set()
        ended = {int(event.ident) for event in self._queue.control(None, _ANY, timeout_s)}
        self._watched -= ended
        return ended

    def close(self) -> None:
        self._queue.close()
