"""Ending what a dead launcher and a dead shim left of a container: whoever holds its marker.

Linux does this in the kernel. Here a program outlives both when both are killed at one stroke, and the worker
ends it: it stops all that it finds, kills it, and looks again, until a look finds nothing.
"""

import os
import signal
import time
from collections.abc import Callable

from loguru import logger

from .kqueue import ProcessWatch
from .libproc import Entry, LibProc
from .seatbelt import Seatbelt
from .tree import belonging

_WAIT_S = 0.2


class Sweeper:
    """`watch` makes a ProcessWatch for each sweep."""

    def __init__(self, proc: LibProc, seatbelt: Seatbelt, watch: Callable[[], ProcessWatch]) -> None:
        self._proc = proc
        self._seatbelt = seatbelt
        self._watch = watch

    def end(self, marker: str, timeout_s: float) -> bool:
        """True when nothing that holds the marker is left, False when the time was over before. Blocks."""
        deadline = time.monotonic() + timeout_s
        lineage: set[int] = set()
        while found := self._found(marker, lineage):
            if time.monotonic() > deadline:
                return False
            logger.warning("ending {} processes that outlived their launcher", len(found))
            watch = self._watch()
            try:
                for signum in (signal.SIGSTOP, signal.SIGKILL):
                    for entry in found:
                        self._signal(entry, signum)
                waiting = {entry.pid for entry in found if watch.add(entry.pid)}
                while waiting and time.monotonic() < deadline and (ended := watch.wait(_WAIT_S)):
                    waiting -= ended
            finally:
                watch.close()
        return True

    def _found(self, marker: str, lineage: set[int]) -> list[Entry]:
        found = belonging(
            self._proc.entries(),
            top=None,
            lineage=lineage,
            is_ours=lambda entry: self._seatbelt.holds_marker(entry.pid, marker),
        )
        lineage.update(entry.unique for entry in found)
        return [entry for entry in found if entry.alive]

    def _signal(self, entry: Entry, signum: int) -> None:
        """To this very process only: its number may have been given away meanwhile."""
        now = self._proc.entry(entry.pid)
        if now is None or now.unique != entry.unique:
            return
        try:
            os.kill(entry.pid, signum)
        except (ProcessLookupError, PermissionError):
            return  # it has ended, or changed its user: the next look tells
