"""Processes and what they use, through libproc.

Sources: <libproc.h>, <sys/proc_info.h>, <sys/resource.h>, <mach/mach_time.h> of the macOS SDK. Layouts and
sizes are the public ones. CPU times come in ticks of the machine's time base: nanoseconds on Intel, 125/3
ns on Apple Silicon.
"""

import ctypes
from typing import Any

from worker.platform.base import TreeSample

_PROC_PIDLISTFDS = 1
_PROC_PIDTBSDINFO = 3
_PROC_PIDTASKINFO = 4
_RUSAGE_INFO_V4 = 4
_SZOMB = 5  # pbi_status, <sys/proc.h>
_FD_BYTES = 8  # struct proc_fdinfo

_MORE = 16


def _fields(kind: Any, names: str) -> tuple[tuple[str, Any], ...]:
    """Members of one type, in their order."""
    return tuple((name, kind) for name in names.split())


class Timebase(ctypes.Structure):
    """mach_timebase_info_data_t"""

    numer: int
    denom: int
    _fields_ = (("numer", ctypes.c_uint32), ("denom", ctypes.c_uint32))


class Rusage(ctypes.Structure):
    """struct rusage_info_v4"""

    ri_user_time: int
    ri_system_time: int
    ri_phys_footprint: int
    ri_diskio_bytesread: int
    ri_diskio_byteswritten: int
    _fields_ = (
        ("ri_uuid", ctypes.c_uint8 * 16),
        *_fields(
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
    pbi_ppid: int
    pbi_start_tvsec: int
    pbi_start_tvusec: int
    _fields_ = (
        *_fields(
            ctypes.c_uint32,
            """
            pbi_flags pbi_status pbi_xstatus pbi_pid pbi_ppid pbi_uid pbi_gid pbi_ruid pbi_rgid
            pbi_svuid pbi_svgid rfu_1
            """,
        ),
        ("pbi_comm", ctypes.c_char * 16),
        ("pbi_name", ctypes.c_char * 32),
        *_fields(
            ctypes.c_uint32,
            """
            pbi_nfiles pbi_pgid pbi_pjobc e_tdev e_tpgid
            """,
        ),
        ("pbi_nice", ctypes.c_int32),
        ("pbi_start_tvsec", ctypes.c_uint64),
        ("pbi_start_tvusec", ctypes.c_uint64),
    )


class TaskInfo(ctypes.Structure):
    """struct proc_taskinfo"""

    pti_threadnum: int
    _fields_ = (
        *_fields(
            ctypes.c_uint64,
            """
            pti_virtual_size pti_resident_size pti_total_user pti_total_system pti_threads_user
            pti_threads_system
            """,
        ),
        *_fields(
            ctypes.c_int32,
            """
            pti_policy pti_faults pti_pageins pti_cow_faults pti_messages_sent pti_messages_received
            pti_syscalls_mach pti_syscalls_unix pti_csw pti_threadnum pti_numrunning pti_priority
            """,
        ),
    )


class LibProc:
    """The calls, each with its argument types; None where a process is gone or belongs to another user."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._rusage = library.proc_pid_rusage
        self._rusage.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
        self._rusage.restype = ctypes.c_int
        self._children = library.proc_listchildpids
        self._children.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
        self._children.restype = ctypes.c_int
        self._info = library.proc_pidinfo
        self._info.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_int]
        self._info.restype = ctypes.c_int
        base = Timebase()
        library.mach_timebase_info.argtypes = [ctypes.POINTER(Timebase)]
        library.mach_timebase_info.restype = ctypes.c_int
        if library.mach_timebase_info(ctypes.byref(base)) != 0 or not base.numer or not base.denom:
            raise OSError("the machine does not tell its time base")
        self._base = base

    def microseconds(self, ticks: int) -> int:
        return ticks * self._base.numer // (self._base.denom * 1000)

    def rusage(self, pid: int) -> Rusage | None:
        usage = Rusage()
        return usage if self._rusage(pid, _RUSAGE_INFO_V4, ctypes.byref(usage)) == 0 else None

    def bsd_info(self, pid: int) -> BsdInfo | None:
        info = BsdInfo()
        size = ctypes.sizeof(info)
        return info if self._info(pid, _PROC_PIDTBSDINFO, 0, ctypes.byref(info), size) == size else None

    def task_info(self, pid: int) -> TaskInfo | None:
        info = TaskInfo()
        size = ctypes.sizeof(info)
        return info if self._info(pid, _PROC_PIDTASKINFO, 0, ctypes.byref(info), size) == size else None

    def children(self, pid: int) -> list[int]:
        """Its direct children. The call counts pids, not bytes, and says only how many fitted: a full buffer
        may be short."""
        room = max(self._children(pid, None, 0), 0) + _MORE
        while True:
            buffer = (ctypes.c_int * room)()
            count = self._children(pid, buffer, ctypes.sizeof(buffer))
            if count < room:
                return [child for child in buffer[: max(count, 0)] if child > 0]
            room *= 2

    def open_files(self, pid: int) -> int | None:
        room = max(self._info(pid, _PROC_PIDLISTFDS, 0, None, 0), 0) + _MORE * _FD_BYTES
        while True:
            buffer = ctypes.create_string_buffer(room)
            size = self._info(pid, _PROC_PIDLISTFDS, 0, buffer, room)
            if size <= 0:
                return None
            if size < room:
                return int(size) // _FD_BYTES
            room *= 2


class DarwinProcessTable:
    """Reads as it is asked: macOS tells a process's children directly.

    Start times are microseconds since 1970. A process whose parent died belongs to launchd and is not found
    by descent.
    """

    def __init__(self, lib: LibProc) -> None:
        self._lib = lib

    def tree(self, root_pid: int) -> TreeSample | None:
        if not self._lives(root_pid):
            return None
        cpu = memory = processes = threads = files = read = written = 0
        for pid in self.members(root_pid):
            usage = self._lib.rusage(pid)
            if usage is None:
                continue
            task = self._lib.task_info(pid)
            processes += 1
            cpu += self._lib.microseconds(usage.ri_user_time + usage.ri_system_time)
            memory += usage.ri_phys_footprint
            read += usage.ri_diskio_bytesread
            written += usage.ri_diskio_byteswritten
            threads += task.pti_threadnum if task is not None else 1
            files += self._lib.open_files(pid) or 0
        return TreeSample(
            cpu_usec=cpu,
            memory_bytes=memory,
            processes=processes,
            threads=threads,
            open_files=files,
            read_bytes=read,
            write_bytes=written,
        )

    def memory(self, root_pid: int, limit: int | None = None) -> int | None:
        if not self._lives(root_pid):
            return None
        usages = (self._lib.rusage(pid) for pid in self.members(root_pid))
        return sum(usage.ri_phys_footprint for usage in usages if usage is not None)

    def members(self, root_pid: int) -> tuple[int, ...]:
        found: dict[int, None] = {}
        waiting = [root_pid]
        while waiting:
            for child in self._lib.children(waiting.pop()):
                if child not in found and child != root_pid:
                    found[child] = None
                    waiting.append(child)
        return tuple(found)

    def alive(self, pid: int, start_time: int) -> bool:
        info = self._lib.bsd_info(pid)
        if info is None or info.pbi_status == _SZOMB:
            return False
        return info.pbi_start_tvsec * 1_000_000 + info.pbi_start_tvusec == start_time

    def _lives(self, pid: int) -> bool:
        info = self._lib.bsd_info(pid)
        return info is not None and info.pbi_status != _SZOMB
