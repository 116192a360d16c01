"""The launcher's children: the nursery, and orphans that came to it because a shim died before its tree.

An orphan is killed whatever it is, unless it is itself a shim (of a nursery that died).
"""

import os
from collections.abc import Callable

from worker.launcher.processes import Process, System
from worker.launcher.reaper import Step, TreeKiller
from worker.launcher.timers import Timers

_SWEEP_S = 0.005

OnEnd = Callable[[int], None]


class Children:
    """`shims` are the pids of shims whose sockets are open."""

    def __init__(self, table: System, timers: Timers) -> None:
        self._table = table
        self._timers = timers
        self._known: dict[int, OnEnd] = {}
        self._strangers: dict[int, OnEnd] = {}
        self.shims: dict[int, None] = {}
        self._swept: list[Callable[[], None]] = []
        self._lost: dict[str, None] = {}
        self._killer = TreeKiller(table, self._orphans, eager=False)
        self._sweeping = False

    def add(self, pid: int, on_end: OnEnd) -> None:
        """`on_end` gets the wait status when this child is reaped."""
        self._known[pid] = on_end

    def expect(self, pid: int, on_end: OnEnd) -> None:
        """The same for a process that may come to us as an orphan."""
        self._strangers[pid] = on_end

    def reap(self) -> None:
        """Collect every child that has ended."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            on_end = self._known.pop(pid, None) or self._strangers.pop(pid, None)
            if on_end is not None:
                on_end(status)

    def forget(self, pid: int) -> None:
        self._strangers.pop(pid, None)

    def sweep(self, then: Callable[[], None], marker: str = "") -> None:
        """Kill orphans, and whoever holds `marker` where they do not come to us, until none is left; then call
        `then`.
        """
        self._swept.append(then)
        if marker and not self._table.exact:
            self._lost[marker] = None
        if not self._sweeping:
            self._sweeping = True
            self._killer = TreeKiller(self._table, self._orphans, eager=False)
            self._sweep()

    def _sweep(self) -> None:
        self.reap()
        step = self._killer.step()
        if step is not Step.NOTHING:
            self._timers.after(0 if step is Step.STOPPED else _SWEEP_S, self._sweep)
            return
        self.reap()
        self._sweeping = False
        self._lost.clear()
        swept, self._swept = self._swept, []
        for then in swept:
            then()

    def _orphans(self) -> list[Process]:
        orphans = self._table.members(os.getpid(), (), {*self._known, *self.shims})
        for marker in self._lost:
            orphans += self._table.members(0, (), (), marker)
        return orphans
