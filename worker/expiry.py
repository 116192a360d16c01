"""Finished containers whose spec has a `ttl_after_finished_s` are removed when that is over.

The moment follows from the record in the journal alone, so a new worker takes up where the last one stopped.
"""

import asyncio
from collections.abc import Callable
from datetime import datetime

from schemas.status import State
from worker.clock import Clock, utc_now
from worker.records import ContainerRecord

FINISHED = (State.EXITED, State.FAILED)
# The wall clock may be set while a timer runs: it is read again at least this often.
LONGEST_PAUSE_S = 3600.0
# How soon a container that is busy just then is looked at again.
RETRY_S = 1.0


def seconds_left(record: ContainerRecord, now: datetime) -> float | None:
    """Until the container is to go, at least 0; None while it is not to go."""
    ttl_s, status = record.spec.ttl_after_finished_s, record.status
    since = status.finished_at or status.created_at
    if ttl_s is None or status.state not in FINISHED or status.next_start_at is not None or since is None:
        return None
    return max(0.0, ttl_s - (now - since).total_seconds())


class Expiry:
    """Holds a timer for each finished container; `remove` is told that one is due, once it has begun.

    `remove(cid, instance)` gives False when the container is busy, and is asked again.
    """

    def __init__(self, remove: Callable[[str, str], bool], clock: Clock = utc_now) -> None:
        self._remove = remove
        self._clock = clock
        self._timers: dict[str, tuple[ContainerRecord, asyncio.TimerHandle]] = {}
        self._waiting: dict[str, ContainerRecord | None] | None = {}

    def watch(self, cid: str, record: ContainerRecord | None) -> None:
        """Of every change of a container; None when it is gone. One that was started is spared."""
        if self._waiting is not None:
            self._waiting[cid] = record
            return
        known = self._timers.pop(cid, None)
        if known is not None:
            known[1].cancel()
        left_s = None if record is None else seconds_left(record, self._clock())
        if record is not None and left_s is not None:
            self._set(cid, record, min(left_s, LONGEST_PAUSE_S))

    def begin(self) -> None:
        """From here on containers may be removed; not before the node is sure to be the owner of its name."""
        waiting, self._waiting = self._waiting or {}, None
        for cid, record in waiting.items():
            self.watch(cid, record)

    def close(self) -> None:
        for _, timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def _set(self, cid: str, record: ContainerRecord, pause_s: float) -> None:
        timer = asyncio.get_running_loop().call_later(pause_s, self._due, cid)
        self._timers[cid] = record, timer

    def _due(self, cid: str) -> None:
        record, _ = self._timers.pop(cid)
        left_s = seconds_left(record, self._clock())
        if left_s:
            self._set(cid, record, min(left_s, LONGEST_PAUSE_S))
        elif not self._remove(cid, record.status.instance):
            self._set(cid, record, RETRY_S)
