"""Killing a whole tree until nothing of it is left, whatever it does meanwhile.

Each round stops everything that it finds until a scan finds nothing new, and only then kills, the newest
first. A process with a pending signal cannot complete a fork (the kernel restarts it), so what is stopped
cannot multiply, and what it holds of the process limit stays taken: a fork bomb runs out of processes, not
out of our sight. Every process is named by pid and start time.
"""

import os
import signal
from collections.abc import Callable, Collection

from worker.launcher.processes import Process, System

# A scan that finds this many wants more of the processor than its share among them.
_CROWD = 16
_MAX_SCANS = 200


class TreeKiller:
    """Kills what `scan` shows, which must be processes below this one only.

    `eager` lets this process take the processor from a crowd, for good.
    """

    def __init__(self, table: System, scan: Callable[[], list[Process]], *, eager: bool) -> None:
        self._table = table
        self._scan = scan
        self._eager = eager
        self.refused: set[int] = set()

    def round(self, leaders: Collection[int] = ()) -> int:
        """Stop, then kill, all that a scan shows; gives the number of processes found alive.

        `leaders` are children of this process that began a session and are not reaped: their process groups
        can be signalled whole, because no other process can have or get these numbers.
        """
        for leader in leaders:
            _signal_group(leader, signal.SIGSTOP)
        found = self._freeze()
        self.kill_groups(leaders)
        for process in sorted(found, key=lambda p: (p.start, p.pid), reverse=True):
            self._signal(process, signal.SIGKILL)
        return len(found)

    def kill_groups(self, leaders: Collection[int]) -> None:
        """Kill the process groups of these leaders, each at one stroke."""
        for leader in leaders:
            _signal_group(leader, signal.SIGKILL)

    def _freeze(self) -> list[Process]:
        asked: set[tuple[int, int]] = set()
        found: list[Process] = []
        for _ in range(_MAX_SCANS):
            found = [p for p in self._scan() if p.alive]
            fresh = [p for p in found if (p.pid, p.start) not in asked]
            if not fresh:
                break
            if self._eager and len(fresh) > _CROWD:
                self._raise_priority()
            for process in fresh:
                asked.add((process.pid, process.start))
                if not process.stopped:
                    self._signal(process, signal.SIGSTOP)
        return found

    def _signal(self, process: Process, signum: int) -> None:
        try:
            self._table.signal(process, signum)
        except PermissionError:
            # It changed its user by a privileged program; told to whoever waits for the tree to end.
            self.refused.add(process.pid)

    def _raise_priority(self) -> None:
        self._eager = False
        try:
            os.setpriority(os.PRIO_PROCESS, 0, -20)
        except PermissionError:
            return  # only root may; the scans converge without it, later


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
