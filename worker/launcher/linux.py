"""The Linux table of `worker.launcher.processes`: /proc, prctl, pidfd. Sources: proc(5), prctl(2),
pidfd_open(2).
"""

import ctypes
import errno
import fcntl
import os
import resource
import signal
import socket
import struct
from collections.abc import Callable, Collection

from worker.launcher.processes import ROLES, Process
from worker.platform.linux import landlock
from worker.platform.linux.libc import prctl, syscall

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 1, 4, 15, 36
_CLOSE_RANGE = 436  # the same number on every architecture that came after it
_SO_PEERCRED = 17
_F_SETPIPE_SZ, _F_GETPIPE_SZ = 1031, 1032
_P_PID, _WEXITED, _WNOWAIT = 1, 0x4, 0x1000000
_MAX_FD = 0xFFFFFFFF
_RT_SIGACTION = {"x86_64": 13, "aarch64": 134}
_OOM_SCORE = b"300"
_HIDDEN_SIGNALS = (32, 33)  # the C library keeps them for its threads

# Names that only Linux has; looked up so that the file is checked for every platform.
_waitid: Callable[[int, int, int], object | None] = vars(os)["waitid"]
_pidfd_open: Callable[[int], int] = vars(os)["pidfd_open"]
_pidfd_send_signal: Callable[[int, int], None] = vars(signal)["pidfd_send_signal"]
_prlimit: Callable[[int, int], tuple[int, int]] = vars(resource)["prlimit"]


class LinuxSystem:
    exact = True
    rss_unit = 1024

    def __init__(self) -> None:
        # Made once, so that a shim need not.
        self._names = {role: ctypes.create_string_buffer(f"sandfleet-{role}".encode()[:15]) for role in ROLES}
        self._lists_children = os.path.exists(f"/proc/self/task/{os.getpid()}/children")

    def adopt_orphans(self) -> None:
        prctl(_PR_SET_CHILD_SUBREAPER, 1)

    def fence(self, outsider: int) -> Callable[[], None] | None:
        """By a Landlock domain: every descendant inherits it, whoever its parents are, and kill(2) of -1, which
        the kernel does in one pass that no fork escapes (`copy_process` fails when a fatal signal is pending),
        reaches only processes that may be signalled.
        """
        try:
            known = _pidfd_open(outsider)
        except OSError:
            return None  # it has ended, or this kernel is older than any with that domain
        try:
            if _may_signal(known) and landlock.keep_signals_inside() and _may_signal(known) is False:
                return _kill_all
        finally:
            os.close(known)
        return None

    def heed_hidden_signals(self) -> None:
        number = _RT_SIGACTION.get(os.uname().machine)
        if number is None:
            return
        # struct sigaction of the kernel, all zero: SIG_DFL (handler, flags, restorer where there is one, mask).
        default = ctypes.create_string_buffer(32)
        for signum in _HIDDEN_SIGNALS:
            syscall(number, signum, ctypes.addressof(default), 0, 8)

    def follow_parent(self, signum: int) -> None:
        prctl(_PR_SET_PDEATHSIG, signum)

    def offer_to_oom(self, pid: int = 0) -> None:
        try:
            fd = os.open(f"/proc/{pid or 'self'}/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        except (PermissionError, FileNotFoundError):
            return  # see the docstring; or it has ended
        try:
            os.write(fd, _OOM_SCORE)
        except (PermissionError, ProcessLookupError):
            return  # it is even easier to end already, or has ended
        finally:
            os.close(fd)

    def hide_memory(self) -> None:
        prctl(_PR_SET_DUMPABLE, 0)

    def name_process(self, role: str) -> None:
        prctl(_PR_SET_NAME, ctypes.addressof(self._names[role]))

    def close_descriptors(self, keep: Collection[int]) -> None:
        first = 0
        try:
            for fd in sorted(keep):
                if fd > first:
                    syscall(_CLOSE_RANGE, first, fd - 1, 0)
                first = fd + 1
            syscall(_CLOSE_RANGE, first, _MAX_FD, 0)
        except OSError as failure:
            if failure.errno not in (errno.ENOSYS, errno.EPERM):
                raise
            _close_listed(keep)

    def find(self, pid: int) -> Process | None:
        found = _stat(pid)
        return None if found is None else found[0]

    def ended(self, pid: int) -> bool:
        return _waitid(_P_PID, pid, _WEXITED | os.WNOHANG | _WNOWAIT) is not None

    def outgrew_limit(self, pid: int) -> bool:
        """The worker's watchdog sets the limits here, and tells."""
        return False

    def members(
        self, root: int, sessions: Collection[int], spare: Collection[int], marker: str = ""
    ) -> list[Process]:
        if not self._lists_children:
            return _members_by_scan(root, spare)
        members: list[Process] = []
        seen = {root, *spare}
        waiting = _children(root, _threads(root))
        while waiting:
            pid = waiting.pop()
            if pid in seen:
                continue
            seen.add(pid)
            found = _stat(pid)
            if found is None:
                continue
            process, threads = found
            members.append(process)
            if process.alive:
                waiting += _children(pid, [pid] if threads == 1 else _threads(pid))
        return members

    def signal(self, process: Process, signum: int) -> bool:
        try:
            pidfd = _pidfd_open(process.pid)
        except ProcessLookupError:
            return False
        except OSError as failure:
            if failure.errno != errno.ENOSYS:
                raise
            return self._signal_by_number(process, signum)
        try:
            now = self.find(process.pid)
            if now is None or now.start != process.start:
                return False
            _pidfd_send_signal(pidfd, signum)
        except ProcessLookupError:
            return False
        finally:
            os.close(pidfd)
        return True

    def _signal_by_number(self, process: Process, signum: int) -> bool:
        """For kernels before 5.3: the check and the signal are a few microseconds apart."""
        now = self.find(process.pid)
        if now is None or now.start != process.start:
            return False
        try:
            os.kill(process.pid, signum)
        except ProcessLookupError:
            return False
        return True

    def peer(self, sock: socket.socket) -> tuple[int, int]:
        pid, uid, _ = struct.unpack("=iII", sock.getsockopt(socket.SOL_SOCKET, _SO_PEERCRED, 12))
        return pid, uid

    def cpu_limit_s(self, pid: int) -> int | None:
        try:
            soft, _ = _prlimit(pid, resource.RLIMIT_CPU)
        except (ProcessLookupError, PermissionError):
            return None
        return None if soft == resource.RLIM_INFINITY else soft

    def grow_pipe(self, fd: int, size: int) -> int:
        try:
            return fcntl.fcntl(fd, _F_SETPIPE_SZ, size)
        except OSError:
            return fcntl.fcntl(fd, _F_GETPIPE_SZ)

    def descriptor_limit(self) -> int:
        return resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def _may_signal(pidfd: int) -> bool | None:
    """None when the process has ended."""
    try:
        _pidfd_send_signal(pidfd, 0)
    except PermissionError:
        return False
    except ProcessLookupError:
        return None
    return True


def _kill_all() -> None:
    """Only for a process behind a fence that was tried: elsewhere this ends everything of the user."""
    try:
        os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:
        return  # not even somebody out of reach is there


def _close_listed(keep: Collection[int]) -> None:
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd not in keep:
            try:
                os.close(fd)
            except OSError as failure:
                if failure.errno != errno.EBADF:  # the listing's own
                    raise


def _read(path: str) -> bytes | None:
    """A small /proc file; None when its process is gone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError):
        return None
    try:
        # A file made of records comes a page at a time, whatever size is asked for.
        data = b""
        while chunk := os.read(fd, 65536):
            data += chunk
        return data
    except ProcessLookupError:
        return None
    finally:
        os.close(fd)


def _stat(pid: int) -> tuple[Process, int] | None:
    """A process and its number of threads."""
    raw = _read(f"/proc/{pid}/stat")
    if not raw:
        return None
    # The name in brackets may hold anything; what follows the last one cannot.
    fields = raw[raw.rindex(b")") + 2 :].split()
    state, threads = fields[0], int(fields[17])
    process = Process(
        pid=pid,
        ppid=int(fields[1]),
        session=int(fields[3]),
        start=int(fields[19]),
        # A leader that has ended while other threads go on is shown as a zombie too.
        alive=state not in (b"Z", b"X") or threads > 1,
        stopped=state in (b"T", b"t"),
    )
    return process, threads


def _threads(pid: int) -> list[int]:
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _children(pid: int, threads: list[int]) -> list[int]:
    children: list[int] = []
    for thread in threads:
        raw = _read(f"/proc/{pid}/task/{thread}/children")
        if raw:
            children += [int(child) for child in raw.split()]
    return children


def _members_by_scan(root: int, spare: Collection[int]) -> list[Process]:
    """For kernels without CONFIG_PROC_CHILDREN: the whole table once, then down from the root."""
    below: dict[int, list[Process]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            found = _stat(int(name))
            if found is not None:
                below.setdefault(found[0].ppid, []).append(found[0])
    members: list[Process] = []
    waiting = [root]
    while waiting:
        for process in below.get(waiting.pop(), ()):
            if process.pid not in spare:
                members.append(process)
                waiting.append(process.pid)
    return members
