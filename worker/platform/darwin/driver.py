"""The macOS driver: what Seatbelt can enforce, and the plan that enforces a policy."""

import ctypes
import functools
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from schemas.node import Capabilities
from worker.errors import Unavailable
from worker.platform.base import CloneChoice, CloneReport, FolderLimits, SandboxPolicy

from .clone import DarwinCloner
from .describe import OLDEST_RELEASE, SeatbeltRules
from .enforce import PLAN_VERSION
from .groups import EXECUTABLE
from .jetsam import available, limit_mib
from .kqueue import Names, ProcessWatch, system_names
from .libproc import LibProc
from .libsystem import load
from .proc import DarwinProcessTable, Markers
from .sbpl import canonical
from .seatbelt import Seatbelt
from .sweep import Sweeper
from .timebase import Timebase


class DarwinDriver(SeatbeltRules):
    """`library` stands for libSystem, `release` for the machine's macOS (12 … 26), `kqueue` for its names.

    All are found unless given.
    """

    def __init__(
        self,
        library: ctypes.CDLL | None = None,
        *,
        release: int | None = None,
        kqueue: Callable[[], Names] = system_names,
    ) -> None:
        super().__init__(_machine_release() if release is None else release)
        self._library = load() if library is None else library
        self._seatbelt = Seatbelt(self._library)
        self._cloner = DarwinCloner(self._library)
        self._proc = LibProc(self._library)
        self._timebase = Timebase(self._library)
        self._markers = Markers(self._seatbelt)
        self._sweeper = Sweeper(self._proc, self._seatbelt, lambda: ProcessWatch(kqueue()))

    @functools.cached_property
    def _confined(self) -> bool:
        """A process in a sandbox cannot give another one to its children."""
        return self._seatbelt.confined(os.getpid())

    def capabilities(self) -> Capabilities:
        found = super().capabilities()
        return msgspec.structs.replace(found, sandbox="none") if self._confined else found

    def plan(self, policy: SandboxPolicy) -> dict[str, Any]:
        """See `enforce`. Unavailable in a worker that is itself in a sandbox: nothing would be enforced."""
        if self._confined:
            raise Unavailable("this worker runs in a sandbox of its own and cannot give its containers one")
        profile = self.profile(policy)
        return {
            "version": PLAN_VERSION,
            "platform": self.name,
            "limits": _limits(policy),
            **({} if policy.user is None else {"user": [policy.user.uid, policy.user.gid]}),
            "profile": profile.text,
            "params": [text for pair in profile.params.items() for text in pair],
            "marker": canonical(policy.marker) if policy.marker else "",
            "memory_mib": self._memory_mib(policy),
        }

    def clone_tree(self, src: Path, dst: Path, choice: CloneChoice | None = None) -> CloneReport:
        return self._cloner.clone_tree(src, dst, choice)

    def measure_clone(self, source: Path, target: Path) -> CloneChoice:
        return self._cloner.measure(source, target)

    def find_folder_limits(self, place: Path) -> None:
        """APFS limits no folder."""

    @property
    def folder_limits(self) -> FolderLimits | None:
        return None

    def changes_user(self) -> bool:
        return os.geteuid() == 0

    def processes(self) -> DarwinProcessTable:
        return DarwinProcessTable(self._proc, self._timebase, self._markers)

    def end_leftovers(self, marker: str, timeout_s: float) -> bool:
        """A program outlives its launcher and its shim when both are killed at one stroke."""
        return self._sweeper.end(canonical(marker), timeout_s)

    def allocated_bytes(self) -> int | None:
        return None

    def default_path(self) -> str:
        return "/usr/bin:/bin:/usr/sbin:/sbin"

    def search_dirs(self, policy: SandboxPolicy | None = None) -> tuple[str, ...]:
        return EXECUTABLE

    def _memory_mib(self, policy: SandboxPolicy) -> int | None:
        """What one process may have by itself; the watchdog measures all of them together."""
        limit = policy.limits.memory_bytes
        return None if limit is None or not available(self._library) else limit_mib(limit)


def _machine_release() -> int:
    """Of macOS; where it cannot be read, the oldest that is supported, as it knows the fewest names."""
    major = platform.mac_ver()[0].partition(".")[0]
    return int(major) if major.isdecimal() else OLDEST_RELEASE


def _limits(policy: SandboxPolicy) -> list[list[Any]]:
    """[name, soft, hard, cap] for each; what the spec asks for by name is never quietly lowered."""
    limits = policy.limits
    wanted: dict[str, list[Any]] = {
        "core": ["core", 0, 0, False],
        "nofile": ["nofile", limits.max_files, limits.max_files, True],
    }
    if limits.cpu_time_limit_s is not None:
        # SIGXCPU at the limit, SIGKILL a second later for a program that ignores it.
        wanted["cpu"] = ["cpu", limits.cpu_time_limit_s, limits.cpu_time_limit_s + 1, False]
    for name, (soft, hard) in limits.ulimits.items():
        wanted[name] = [name, soft, hard, False]
    return list(wanted.values())
