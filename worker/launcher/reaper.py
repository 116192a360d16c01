"""Killing a whole tree until nothing of it is left, whatever it does meanwhile.

For where neither a fence (`System.fence`) nor a namespace lets the kernel do it at one stroke. First everything
that a scan finds is stopped, until a scan finds nothing new; only then all of it is killed, the newest first.
A process with a pending signal cannot complete a fork (the kernel restarts it), so what is stopped cannot
multiply, and what it holds of the process limit stays taken: a fork bomb runs out of processes, not out of our
sight. Every process is named by pid and start time.
"""

import os
import signal
from collections.abc import Callable, Collection
from enum import Enum

from worker.launcher.processes import Process, System

# So many scans may find something new before what was found is killed all the same.
_PATIENCE = 100


class Step(Enum):
    """What a step found: nothing alive; something new, now stopped; or all known, now killed."""

    NOTHING = 0
    STOPPED = 1
    KILLED = 2


class TreeKiller:
    """Kills what `scan` shows, which must be processes below this one only.

    `eager` lets this process take the processor from a crowd.
    """

    def __init__(self, table: System, scan: Callable[[], list[Process]], *, eager: bool) -> None:
        self._table = table
        self._scan = scan
        self._eager = eager
        self._asked: set[tuple[int, int]] = set()
        self._patience = _PATIENCE
        self.found = 0

    def step(self, leaders: Collection[int] = ()) -> Step:
        """One scan, and what follows from it; to be repeated at once after STOPPED, and soon after KILLED.

        `leaders` are children of this process that began a session and are not reaped: their process groups
        can be signalled whole, because no other process can have or get these numbers.
        """
        if self._eager:
            self._eager = False
            take_processor()
        if not self._asked:
            for leader in leaders:
                _signal_group(leader, signal.SIGSTOP)
        found = [p for p in self._scan() if p.alive]
        self.found = len(found)
        fresh = [p for p in found if (p.pid, p.start) not in self._asked]
        if fresh and self._patience:
            self._patience -= 1
            self._stop(fresh)
            return Step.STOPPED
        self._patience = _PATIENCE
        self.kill_groups(leaders)
        for process in sorted(found, key=lambda p: (p.start, p.pid), reverse=True):
            self._signal(process, signal.SIGKILL)
        return Step.KILLED if found else Step.NOTHING

    def kill_groups(self, leaders: Collection[int]) -> None:
        """Kill the process groups of these leaders, each at one stroke."""
        for leader in leaders:
            _signal_group(leader, signal.SIGKILL)

    def _stop(self, fresh: list[Process]) -> None:
        for process in fresh:
            self._asked.add((process.pid, process.start))
            if not process.stopped:
                self._signal(process, signal.SIGSTOP)

    def _signal(self, process: Process, signum: int) -> None:
        try:
            self._table.signal(process, signum)
        except PermissionError:
            return  # it has changed its user, by a privileged program; it stays found until it ends


def take_processor() -> None:
    """Go before a crowd, for good."""
    try:
        os.setpriority(os.PRIO_PROCESS, 0, -20)
    except PermissionError:
        return  # only root may; without it all comes to the same end, later


def _signal_group(leader: int, signum: int) -> None:
    try:
        os.killpg(leader, signum)
    except (ProcessLookupError, PermissionError):
        return  # it has not begun its session yet, or only a zombie is left of it


def exit_code(status: int) -> int:
    """The contract's exit code of a wait status: the program's own, or minus the number of the signal."""
    if os.WIFSIGNALED(status):
        return -os.WTERMSIG(status)
    return os.WEXITSTATUS(status)


def belonging(members: list[Process], session: int) -> list[Process]:
    """Those of a session and those below them; the list must not change its parents meanwhile."""
    below: dict[int, list[Process]] = {}
    for process in members:
        below.setdefault(process.ppid, []).append(process)
    chosen = {p.pid: p for p in members if p.session == session}
    waiting = list(chosen)
    while waiting:
        for process in below.get(waiting.pop(), ()):
            if process.pid not in chosen:
                chosen[process.pid] = process
                waiting.append(process.pid)
    return list(chosen.values())
