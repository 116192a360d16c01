"""The macOS table of `worker.launcher.processes`, through libproc. Source: <libproc.h>, <sys/proc_info.h>,
<sys/un.h>.

macOS has no subreaper, no parent-death signal and no process descriptor: orphans go to launchd, and a tree
is what descends from the root or lives in one of its sessions. What leaves both is found by the worker
(ARCHITECTURE.md, decision 10).
"""

import ctypes
import os
import resource
import socket
import struct
from collections.abc import Collection
from typing import Any

from worker.launcher.processes import Process

_PROC_ALL_PIDS, _PROC_UID_ONLY = 1, 4
_PROC_PIDTBSDINFO = 3
_SZOMB, _SSTOP = 5, 4  # pbi_status, <sys/proc.h>
_SOL_LOCAL, _LOCAL_PEERCRED, _LOCAL_PEERPID = 0, 0x001, 0x002
_PT_DENY_ATTACH = 31
_OPEN_MAX = 10240

# struct proc_bsdinfo: twelve u32, comm[16], name[32], five u32 and an i32, two u64.
_BSDINFO = struct.Struct("=12I16s32s5Ii2Q")


class DarwinSystem:
    exact = False
    rss_unit = 1

    def __init__(self, library: Any = None) -> None:
        if library is None:
            library = ctypes.CDLL("/usr/lib/libSystem.B.dylib", use_errno=True)
        self._proc_pidinfo = library.proc_pidinfo
        self._proc_pidinfo.argtypes = [
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_uint64,
            ctypes.c_void_p,
            ctypes.c_int,
        ]
        self._proc_listpids = library.proc_listpids
        self._proc_listpids.argtypes = [ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_int]
        self._ptrace = library.ptrace
        self._ptrace.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_int]

    def adopt_orphans(self) -> None:
        """Not possible here; `exact` is false."""

    def heed_hidden_signals(self) -> None:
        """There are none."""

    def follow_parent(self, signum: int) -> None:
        """Not possible here; the end of the shim's socket tells it."""

    def hide_memory(self) -> None:
        self._ptrace(_PT_DENY_ATTACH, 0, None, 0)

    def name_process(self, role: str) -> None:
        """A process cannot change the name that others see."""

    def close_descriptors(self, keep: Collection[int]) -> None:
        first = 0
        for fd in sorted(keep):
            os.closerange(first, fd)
            first = fd + 1
        highest = max((int(name) for name in os.listdir("/dev/fd")), default=first)
        os.closerange(first, highest + 1)

    def find(self, pid: int) -> Process | None:
        buffer = ctypes.create_string_buffer(_BSDINFO.size)
        size = self._proc_pidinfo(pid, _PROC_PIDTBSDINFO, 0, buffer, _BSDINFO.size)
        if size != _BSDINFO.size:
            return None
        fields = _BSDINFO.unpack(buffer.raw)
        try:
            session = os.getsid(pid)
        except (ProcessLookupError, PermissionError):
            session = 0
        return Process(
            pid=pid,
            ppid=fields[4],
            session=session,
            start=fields[20] * 1_000_000 + fields[21],
            alive=fields[1] != _SZOMB,
            stopped=fields[1] == _SSTOP,
        )

    def ended(self, pid: int) -> bool:
        process = self.find(pid)
        return process is not None and not process.alive

    def members(self, root: int, sessions: Collection[int], spare: Collection[int]) -> list[Process]:
        below: dict[int, list[Process]] = {}
        members: dict[int, Process] = {}
        for pid in self._pids_of_user():
            process = self.find(pid)
            if process is not None and pid != root and pid not in spare:
                below.setdefault(process.ppid, []).append(process)
                if process.session in sessions:
                    members[pid] = process
        waiting = [root, *members]
        seen = {*waiting}
        while waiting:
            for process in below.get(waiting.pop(), ()):
                if process.pid not in seen:
                    seen.add(process.pid)
                    members[process.pid] = process
                    waiting.append(process.pid)
        return list(members.values())

    def _pids_of_user(self) -> list[int]:
        # Root's containers may run as other users.
        which = (_PROC_UID_ONLY, os.getuid()) if os.getuid() else (_PROC_ALL_PIDS, 0)
        room = self._proc_listpids(*which, None, 0) // 4 + 64
        buffer = (ctypes.c_int * room)()
        size = self._proc_listpids(*which, buffer, ctypes.sizeof(buffer))
        return [pid for pid in buffer[: max(size, 0) // 4] if pid > 0]

    def signal(self, process: Process, signum: int) -> bool:
        now = self.find(process.pid)
        if now is None or now.start != process.start:
            return False
        try:
            os.kill(process.pid, signum)
        except ProcessLookupError:
            return False
        return True

    def peer(self, sock: socket.socket) -> tuple[int, int]:
        (pid,) = struct.unpack("=i", sock.getsockopt(_SOL_LOCAL, _LOCAL_PEERPID, 4))
        # struct xucred: u32 version, uid, i16 count, groups.
        credentials = sock.getsockopt(_SOL_LOCAL, _LOCAL_PEERCRED, 76)
        (_, uid) = struct.unpack_from("=II", credentials)
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
