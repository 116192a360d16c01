"""The macOS table of `worker.launcher.processes`, through libproc and Seatbelt. Source: <sys/un.h>,
<sys/ucred.h>, ptrace(2), and those of `worker.platform.darwin.libproc`.

macOS has no subreaper, no parent-death signal and no process descriptor: orphans go to launchd. A tree is
what descends from the root, now or by the unique ids of its first parents, and whoever lives in its sandbox,
which the marker shows (`worker.platform.darwin.tree`). Processes are named by pid and unique id.
"""

import ctypes
import os
import resource
import socket
import struct
from collections.abc import Callable, Collection

from worker.launcher.processes import Process
from worker.platform.darwin.libproc import SSTOP, Entry, LibProc
from worker.platform.darwin.libsystem import declare, load
from worker.platform.darwin.seatbelt import Seatbelt
from worker.platform.darwin.tree import belonging

_SOL_LOCAL, _LOCAL_PEERCRED, _LOCAL_PEERPID = 0, 0x001, 0x002
_XUCRED = struct.Struct("=IIh2x16I")  # version, uid, number of groups, groups
_PT_DENY_ATTACH = 31
_OPEN_MAX = 10240


class DarwinSystem:
    """`library` stands for libSystem, which is found unless given."""

    exact = False
    rss_unit = 1

    def __init__(self, library: ctypes.CDLL | None = None) -> None:
        used = load() if library is None else library
        self._proc = LibProc(used)
        self._seatbelt = Seatbelt(used)
        c_int = ctypes.c_int
        self._ptrace = declare(used, "ptrace", c_int, c_int, c_int, ctypes.c_void_p, c_int)
        # What was once found below a root, while anything of it is left: it names its children for good.
        self._lineages: dict[tuple[int, str], set[int]] = {}

    def adopt_orphans(self) -> None:
        """Not possible here; `exact` is false."""

    def fence(self, outsider: int) -> Callable[[], None] | None:
        """Not possible here."""
        return None

    def heed_hidden_signals(self) -> None:
        """There are none."""

    def follow_parent(self, signum: int) -> None:
        """Not possible here; the end of the shim's socket tells it."""

    def offer_to_oom(self, pid: int = 0) -> None:
        """Memory pressure ends whoever has outgrown his jetsam limit; ours have none."""

    def hide_memory(self) -> None:
        self._ptrace(_PT_DENY_ATTACH, 0, None, 0)

    def name_process(self, role: str) -> None:
        """A process cannot change the name that others see."""

    def close_descriptors(self, keep: Collection[int]) -> None:
        first = 0
        for fd in sorted(keep):
            if fd > first:  # an empty range may be taken for one without end
                os.closerange(first, fd)
            first = fd + 1
        highest = max((int(name) for name in os.listdir("/dev/fd")), default=first)
        os.closerange(first, highest + 1)

    def find(self, pid: int) -> Process | None:
        entry = self._proc.entry(pid)
        return None if entry is None else _process(entry)

    def ended(self, pid: int) -> bool:
        process = self.find(pid)
        return process is not None and not process.alive

    def outgrew_limit(self, pid: int) -> bool:
        return self._proc.outgrew_limit(pid)

    def members(
        self, root: int, sessions: Collection[int], spare: Collection[int], marker: str = ""
    ) -> list[Process]:
        """With a marker, sessions do not count: their numbers are used again, unique ids are not."""

        def is_ours(entry: Entry) -> bool:
            if marker:
                return self._seatbelt.holds_marker(entry.pid, marker)
            return bool(sessions) and _session(entry.pid) in sessions

        lineage = self._lineages.pop((root, marker), set())
        found = belonging(
            self._proc.entries(),
            top=self._proc.entry(root) if root else None,
            is_ours=is_ours,
            lineage=lineage,
            spare=spare,
        )
        if found:
            self._lineages[root, marker] = lineage | {entry.unique for entry in found}
        return [_process(entry) for entry in found]

    def signal(self, process: Process, signum: int) -> bool:
        now = self._proc.entry(process.pid)
        if now is None or now.unique != process.start:
            return False
        try:
            os.kill(process.pid, signum)
        except ProcessLookupError:
            return False
        return True

    def peer(self, sock: socket.socket) -> tuple[int, int]:
        (pid,) = struct.unpack("=i", sock.getsockopt(_SOL_LOCAL, _LOCAL_PEERPID, 4))
        _, uid, *_ = _XUCRED.unpack(sock.getsockopt(_SOL_LOCAL, _LOCAL_PEERCRED, _XUCRED.size))
        return pid, uid

    def cpu_limit_s(self, pid: int) -> int | None:
        """Only a process itself can ask; the request names the limit."""
        return None

    def grow_pipe(self, fd: int, size: int) -> int:
        """The system sizes its pipes itself, up to 64 KiB."""
        return 65536

    def descriptor_limit(self) -> int:
        # OPEN_MAX bounds what setrlimit accepts, whatever the hard limit says.
        return min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], _OPEN_MAX)


def _process(entry: Entry) -> Process:
    return Process(
        pid=entry.pid,
        ppid=entry.ppid,
        session=_session(entry.pid),
        start=entry.unique,
        alive=entry.alive,
        stopped=entry.status == SSTOP,
    )


def _session(pid: int) -> int:
    """0 for one that is gone or another user's."""
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return 0
