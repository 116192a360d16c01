"""What containers use, measured through libproc: sums over whole process trees.

Memory is the physical footprint: what Activity Monitor shows and jetsam meters, with compressed pages and
without what others share. CPU time comes in ticks of the machine's time base.
"""

from collections.abc import Callable

from worker.platform.base import TreeSample

from .libproc import Entry, LibProc
from .sbpl import canonical
from .seatbelt import Seatbelt
from .timebase import Timebase
from .tree import belonging

_LAUNCHD = 1


class Markers:
    """Who holds which marker, remembered: a process never changes its sandbox while it is an orphan."""

    def __init__(self, seatbelt: Seatbelt) -> None:
        self._seatbelt = seatbelt
        self._known: dict[tuple[int, str], bool] = {}

    def holds(self, entry: Entry, marker: str) -> bool:
        key = entry.unique, marker
        if key not in self._known:
            self._known[key] = self._seatbelt.holds_marker(entry.pid, marker)
        return self._known[key]

    def forget_all_but(self, uniques: set[int]) -> None:
        self._known = {key: held for key, held in self._known.items() if key[0] in uniques}


class DarwinProcessTable:
    """One look at the machine's processes, taken when it is first needed.

    Start times are unique ids. `marker` finds, beyond descent, what lost its parent.
    """

    def __init__(self, proc: LibProc, timebase: Timebase, markers: Markers) -> None:
        self._proc = proc
        self._timebase = timebase
        self._markers = markers
        self._entries: list[Entry] | None = None

    def tree(self, root_pid: int, marker: str = "") -> TreeSample | None:
        if not self._lives(root_pid):
            return None
        cpu = memory = processes = threads = files = read = written = 0
        for pid in self.members(root_pid, marker):
            usage = self._proc.rusage(pid)
            if usage is None:
                continue
            task = self._proc.task_info(pid)
            processes += 1
            cpu += self._timebase.microseconds(usage.ri_user_time + usage.ri_system_time)
            memory += usage.ri_phys_footprint
            read += usage.ri_diskio_bytesread
            written += usage.ri_diskio_byteswritten
            threads += task.pti_threadnum if task is not None else 1
            files += self._proc.open_files(pid) or 0
        return TreeSample(
            cpu_usec=cpu,
            memory_bytes=memory,
            processes=processes,
            threads=threads,
            open_files=files,
            read_bytes=read,
            write_bytes=written,
        )

    def memory(self, root_pid: int, limit: int | None = None, marker: str = "") -> int | None:
        if not self._lives(root_pid):
            return None
        usages = (self._proc.rusage(pid) for pid in self.members(root_pid, marker))
        return sum(usage.ri_phys_footprint for usage in usages if usage is not None)

    def members(self, root_pid: int, marker: str = "") -> tuple[int, ...]:
        found = belonging(self._all(), top=self._proc.entry(root_pid), is_ours=self._is_ours(marker))
        return tuple(entry.pid for entry in found if entry.alive)

    def alive(self, pid: int, start_time: int) -> bool:
        entry = self._proc.entry(pid)
        return entry is not None and entry.alive and entry.unique == start_time

    def _is_ours(self, marker: str) -> Callable[[Entry], bool]:
        if not marker:
            return lambda entry: False
        named = canonical(marker)
        # Only an orphan can have left the tree of its parents.
        return lambda entry: entry.ppid == _LAUNCHD and self._markers.holds(entry, named)

    def _all(self) -> list[Entry]:
        if self._entries is None:
            self._entries = self._proc.entries()
            self._markers.forget_all_but({entry.unique for entry in self._entries})
        return self._entries

    def _lives(self, pid: int) -> bool:
        entry = self._proc.entry(pid)
        return entry is not None and entry.alive
