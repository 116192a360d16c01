"""Processes as libproc tells of them. Standard library only: the launcher uses it too.

Sources: <libproc.h>; xnu's bsd/sys/proc_info.h, proc_info_private.h (unique ids, exit reasons), reason.h and
resource.h for layouts and numbers; its bsd/kern/proc_info.c for what is not written down: which questions see
zombies, and which are for processes of the same user only.

`proc_pidinfo` and `proc_listpids` give a number of bytes, 0 after an error; `proc_pid_rusage` 0 or -1.
"""

import ctypes
import os
from typing import Any, NamedTuple

from .libsystem import declare

PROC_ALL_PIDS, PROC_UID_ONLY = 1, 4
SSTOP, SZOMB = 4, 5  # pbi_status, <sys/proc.h>

_PIDLISTFDS, _PIDTASKINFO, _PIDBSDINFO_UNIQUE, _PIDEXITREASON = 1, 4, 18, 25
# Without it proc_pidinfo sees no zombies.
_ZOMBIES_TOO = 1
_RUSAGE_INFO_V4 = 4
FD_BYTES = 8  # struct proc_fdinfo
_REASON_JETSAM, _PER_PROCESS_LIMIT = 1, 7  # OS_REASON_JETSAM, JETSAM_REASON_MEMORY_PERPROCESSLIMIT
_MORE = 16


def _members(kind: Any, names: str) -> tuple[tuple[str, Any], ...]:
    """Members of one type, in their order."""
    return tuple((name, kind) for name in names.split())


class Rusage(ctypes.Structure):
    """struct rusage_info_v4. Times are ticks of the time base, the footprint is what jetsam meters."""

    ri_user_time: int
    ri_system_time: int
    ri_phys_footprint: int
    ri_diskio_bytesread: int
    ri_diskio_byteswritten: int
    _fields_ = (
        ("ri_uuid", ctypes.c_uint8 * 16),
        *_members(
            ctypes.c_uint64,
            """
            ri_user_time ri_system_time ri_pkg_idle_wkups ri_interrupt_wkups ri_pageins ri_wired_size
            ri_resident_size ri_phys_footprint ri_proc_start_abstime ri_proc_exit_abstime
            ri_child_user_time ri_child_system_time ri_child_pkg_idle_wkups ri_child_interrupt_wkups
            ri_child_pageins ri_child_elapsed_abstime ri_diskio_bytesread ri_diskio_byteswritten
            ri_cpu_time_qos_default ri_cpu_time_qos_maintenance ri_cpu_time_qos_background
            ri_cpu_time_qos_utility ri_cpu_time_qos_legacy ri_cpu_time_qos_user_initiated
            ri_cpu_time_qos_user_interactive ri_billed_system_time ri_serviced_system_time
            ri_logical_writes ri_lifetime_max_phys_footprint ri_instructions ri_cycles ri_billed_energy
            ri_serviced_energy ri_interval_max_phys_footprint ri_runnable_time
            """,
        ),
    )


class BsdInfo(ctypes.Structure):
    """struct proc_bsdinfo"""

    pbi_status: int
    pbi_pid: int
    pbi_ppid: int
    pbi_start_tvsec: int
    pbi_start_tvusec: int
    _fields_ = (
        *_members(
            ctypes.c_uint32,
            """
            pbi_flags pbi_status pbi_xstatus pbi_pid pbi_ppid pbi_uid pbi_gid pbi_ruid pbi_rgid
            pbi_svuid pbi_svgid rfu_1
            """,
        ),
        ("pbi_comm", ctypes.c_char * 16),
        ("pbi_name", ctypes.c_char * 32),
        *_members(ctypes.c_uint32, "pbi_nfiles pbi_pgid pbi_pjobc e_tdev e_tpgid"),
        ("pbi_nice", ctypes.c_int32),
        *_members(ctypes.c_uint64, "pbi_start_tvsec pbi_start_tvusec"),
    )


class UniqueInfo(ctypes.Structure):
    """struct proc_uniqidentifierinfo. Ids count up from 1 at boot and are never used again."""

    p_uniqueid: int
    p_puniqueid: int
    _fields_ = (
        ("p_uuid", ctypes.c_uint8 * 16),
        *_members(ctypes.c_uint64, "p_uniqueid p_puniqueid"),
        *_members(ctypes.c_int32, "p_idversion p_orig_ppidversion"),
        *_members(ctypes.c_uint64, "p_reserve2 p_reserve3"),
    )


class BsdUniqueInfo(ctypes.Structure):
    """struct proc_bsdinfowithuniqid: both, of one and the same process."""

    pbsd: BsdInfo
    p_uniqidentifier: UniqueInfo
    _fields_ = (("pbsd", BsdInfo), ("p_uniqidentifier", UniqueInfo))


class TaskInfo(ctypes.Structure):
    """struct proc_taskinfo"""

    pti_threadnum: int
    _fields_ = (
        *_members(
            ctypes.c_uint64,
            """
            pti_virtual_size pti_resident_size pti_total_user pti_total_system pti_threads_user
            pti_threads_system
            """,
        ),
        *_members(
            ctypes.c_int32,
            """
            pti_policy pti_faults pti_pageins pti_cow_faults pti_messages_sent pti_messages_received
            pti_syscalls_mach pti_syscalls_unix pti_csw pti_threadnum pti_numrunning pti_priority
            """,
        ),
    )


class ExitReason(ctypes.Structure):
    """struct proc_exitreasonbasicinfo, which is packed."""

    beri_namespace: int
    beri_code: int
    _pack_ = 1
    _fields_ = (
        ("beri_namespace", ctypes.c_uint32),
        *_members(ctypes.c_uint64, "beri_code beri_flags"),
        ("beri_reason_buf_size", ctypes.c_uint32),
    )


class Entry(NamedTuple):
    """One process at one moment. `parent_unique` is its first parent's, whoever has adopted it since."""

    pid: int
    ppid: int
    unique: int
    parent_unique: int
    status: int
    start_us: int

    @property
    def alive(self) -> bool:
        return self.status != SZOMB


class LibProc:
    """The calls. None, or nothing, where a process is gone or belongs to another user.

    OSError where the library lacks one of them.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        c_int, c_void_p = ctypes.c_int, ctypes.c_void_p
        self._info = declare(library, "proc_pidinfo", c_int, c_int, c_int, ctypes.c_uint64, c_void_p, c_int)
        self._rusage = declare(library, "proc_pid_rusage", c_int, c_int, c_int, c_void_p)
        self._pids = declare(
            library, "proc_listpids", c_int, ctypes.c_uint32, ctypes.c_uint32, c_void_p, c_int
        )

    def entry(self, pid: int) -> Entry | None:
        """Zombies too."""
        info = BsdUniqueInfo()
        if not self._filled(pid, _PIDBSDINFO_UNIQUE, _ZOMBIES_TOO, info):
            return None
        bsd, unique = info.pbsd, info.p_uniqidentifier
        return Entry(
            pid=pid,
            ppid=bsd.pbi_ppid,
            unique=unique.p_uniqueid,
            parent_unique=unique.p_puniqueid,
            status=bsd.pbi_status,
            start_us=bsd.pbi_start_tvsec * 1_000_000 + bsd.pbi_start_tvusec,
        )

    def entries(self) -> list[Entry]:
        """Every process of this user; for root of every user, as containers may run as others."""
        which = (PROC_UID_ONLY, os.getuid()) if os.getuid() else (PROC_ALL_PIDS, 0)
        found = (self.entry(pid) for pid in self._listed(*which))
        return [entry for entry in found if entry is not None]

    def rusage(self, pid: int) -> Rusage | None:
        usage = Rusage()
        return usage if self._rusage(pid, _RUSAGE_INFO_V4, ctypes.byref(usage)) == 0 else None

    def task_info(self, pid: int) -> TaskInfo | None:
        info = TaskInfo()
        return info if self._filled(pid, _PIDTASKINFO, 0, info) else None

    def outgrew_limit(self, pid: int) -> bool:
        """Whether the kernel killed this process, which is not reaped yet, for its own memory limit."""
        reason = ExitReason()
        if not self._filled(pid, _PIDEXITREASON, 0, reason):
            return False
        return (reason.beri_namespace, reason.beri_code) == (_REASON_JETSAM, _PER_PROCESS_LIMIT)

    def open_files(self, pid: int) -> int | None:
        room = max(self._info(pid, _PIDLISTFDS, 0, None, 0), 0) + _MORE * FD_BYTES
        while True:
            buffer = ctypes.create_string_buffer(room)
            size = self._info(pid, _PIDLISTFDS, 0, buffer, room)
            if size <= 0:
                return None
            if size < room:
                return int(size) // FD_BYTES
            room *= 2

    def _listed(self, kind: int, which: int) -> list[int]:
        each = ctypes.sizeof(ctypes.c_int)
        room = max(self._pids(kind, which, None, 0), 0) // each + _MORE
        while True:
            buffer = (ctypes.c_int * room)()
            size = self._pids(kind, which, buffer, ctypes.sizeof(buffer))
            if size < ctypes.sizeof(buffer):
                return [pid for pid in buffer[: max(size, 0) // each] if pid > 0]
            room *= 2

    def _filled(self, pid: int, flavor: int, argument: int, into: ctypes.Structure) -> bool:
        size = ctypes.sizeof(into)
        return bool(self._info(pid, flavor, argument, ctypes.byref(into), size) == size)
