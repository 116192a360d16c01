"""Into namespaces and a root of its own: what isolation `rootfs` does between fork and exec.

The process that carries out a plan leaves for new namespaces, makes the container's file system there, and
forks two processes beside itself, which are its parent's children and not its own (CLONE_PARENT): `init`,
number 1 of the new process namespace, which does nothing but reap, and with whose end the kernel ends all;
and the program's. Then it ends. So the program is never number 1, its parent learns its end first-hand, and
its number is known as the host sees it.

    enter   the container's first program; `ahead` does a part of it before it is wanted
    join    one more, beside it

A root is data, `{user, net, hostname, path, mounts}`: `user` is [uid, gid] where a user namespace is needed,
`net` asks for a network of its own, `mounts` are those of `mounts`. Standard library only. Facts are those
of namespaces(7), pid_namespaces(7), user_namespaces(7), clone(2).
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import signal
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from . import mounts, privileges
from .libc import last_error, libc, prctl, syscall

_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
_CLONE_PARENT = 0x8000
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLOSE_RANGE = 436

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NAME = 1, 4, 15
_PR_SET_NO_NEW_PRIVS = 38
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1

# The kernel lets root, whatever its capabilities, write to these.
_FIXED = (
    "/proc/sys",
    "/proc/sysrq-trigger",
    "/proc/irq",
    "/proc/bus",
    "/proc/fs",
    "/proc/acpi",
    "/proc/scsi",
)
_MASKED = ("/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/latency_stats", "/proc/sched_debug")

# Holds the interpreter lock, which has no other thread to go to, over the fork.
_syscall_in_place = ctypes.PyDLL(None, use_errno=True).syscall
_syscall_in_place.restype = ctypes.c_long

# By which a later program joins; the process that makes them is not in the one of processes itself.
_NAMES = ("user", "mnt", "pid_for_children", "ipc", "uts", "cgroup", "net")

# init, program, descriptors of the namespaces
Tell = Callable[[int, int, list[int]], None]


class RootError(Exception):
    """A step that failed on the way into the root; `step`, `errno` and `detail` as those of EnforceError."""

    def __init__(self, step: str, number: int, detail: str) -> None:
        super().__init__(f"{step}: {detail}")
        self.step = step
        self.errno = number
        self.detail = detail


class Ready(NamedTuple):
    """What `ahead` has made: of which kind, and the mounts that nearly every root has."""

    user: bool
    net: bool
    mounts: mounts.Ready


_ready: Ready | RootError | None = None


def ahead(kind: dict[str, Any], tell: Tell) -> None:
    """Do what is the same for every root of this kind, its `user` and `net`, before one is wanted.

    Returns in the process that `enter` will make the program's; `tell` as there. What fails is told by `enter`.
    """
    global _ready
    try:
        _begin(kind, tell)
    except RootError as failure:
        _ready = failure


def enter(root: dict[str, Any], tell: Tell) -> None:
    """Become the first program's process of a new container. Returns in that process only.

    `tell(init, program, namespaces)` is called with their numbers, and descriptors for `join`, just before the
    calling process ends; not when it did in `ahead` already. RootError.
    """
    global _ready
    if _ready is None:
        _begin(root, tell)
    ready, _ready = _ready, None
    if not isinstance(ready, Ready):
        raise ready or RootError("namespaces", 0, "nothing was made ready")
    if (ready.user, ready.net) != (bool(root["user"]), root["net"]):
        raise RootError("namespaces", 0, "what was made ready is of another kind")
    place = _step("mounts", mounts.Root.mounted, root["path"], ready.mounts)
    _step("mounts", place.carry_out, root["mounts"])
    _step("root", place.enter)
    _step("hostname", _name_host, root["hostname"])


def _begin(kind: dict[str, Any], tell: Tell) -> None:
    """New namespaces with their number 1; goes on in the program's process, and makes mounts ready there."""
    global _ready
    _step("namespaces", _leave, kind)
    # Later nobody may: `init` hides its memory, and with it this.
    init, proc = _step("proc", _start_init)
    try:
        namespaces = _step("namespaces", _open_namespaces, kind)
        if kind["net"]:
            _step("network", _raise_loopback)
        program = _step("fork", _fork_beside)
    except BaseException:
        os.kill(init, signal.SIGKILL)
        raise
    if program:
        tell(init, program, namespaces)
        os._exit(0)
    for namespace in namespaces:
        os.close(namespace)
    _arrived(kind)
    _ready = Ready(bool(kind["user"]), kind["net"], _step("mounts", _make_ready, proc, bool(kind["user"])))


def _make_ready(proc: int, user: bool) -> mounts.Ready:
    if user:
        # Nothing there is this user's to write or, where it matters, to read.
        return mounts.make_ready(proc, masked=(), fixed=())
    return mounts.make_ready(proc, masked=_MASKED, fixed=_FIXED)


def join(root: dict[str, Any], namespaces: Sequence[int], tell: Tell) -> None:
    """Become the process of one more program in the container of these namespaces. As `enter`; `init` is 0."""
    _step("namespaces", _join, namespaces)
    program = _step("fork", _fork_beside)
    if program:
        tell(0, program, [])
        os._exit(0)
    _arrived(root)


def _open_namespaces(root: dict[str, Any]) -> list[int]:
    flags = os.O_RDONLY | os.O_CLOEXEC
    return [os.open(f"/proc/self/ns/{name}", flags) for name in _NAMES if root.get(name, True)]


def _namespaces(root: dict[str, Any]) -> int:
    wanted = _NEWNS | _NEWPID | _NEWIPC | _NEWUTS | _NEWCGROUP
    return wanted | (_NEWUSER if root["user"] else 0) | (_NEWNET if root["net"] else 0)


def _leave(root: dict[str, Any]) -> None:
    """For new namespaces, of which that of processes holds from the next fork on."""
    if libc.unshare(_namespaces(root)) < 0:
        raise last_error()
    if root["user"]:
        uid, gid = root["user"]
        # This process's own files in /proc are root's while nobody may look into its memory.
        prctl(_PR_SET_DUMPABLE, 1)
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{uid} {uid} 1")
        _write("/proc/self/gid_map", f"{gid} {gid} 1")
        prctl(_PR_SET_DUMPABLE, 0)
    mounts.make_private()


def _join(namespaces: Sequence[int]) -> None:
    for namespace in namespaces:
        if libc.setns(namespace, 0) < 0:
            raise last_error()
    os.chdir("/")


def _arrived(root: dict[str, Any]) -> None:
    """In the program's process: it is not its session's leader yet, and a new user namespace has given it
    every capability there.
    """
    os.setsid()
    if root["user"]:
        privileges.empty_bounding_set()


def _start_init() -> tuple[int, int]:
    """Fork number 1, which alone can make the mount of /proc; gives its number and the mount."""
    ours, theirs = socket.socketpair()
    init = _fork_beside()
    if init == 0:
        _be_init(theirs)
    theirs.close()
    with ours:
        said, descriptors, _, _ = socket.recv_fds(ours, 16, 1)
    if not descriptors:
        number = int(said or 0)
        raise OSError(number, os.strerror(number) if number else "number 1 of the container died")
    os.set_inheritable(descriptors[0], False)
    return init, descriptors[0]


def _be_init(tell: socket.socket) -> NoReturn:
    """The whole life of number 1. Without handlers of its own no signal from inside reaches it."""
    try:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        try:
            proc = mounts.new_file_system("proc", {}, mounts.NOSUID | mounts.NODEV | mounts.NOEXEC)
            privileges.empty_bounding_set()
            privileges.drop_capabilities(privileges.may_lock_bits())
            prctl(_PR_SET_NO_NEW_PRIVS, 1)
            prctl(_PR_SET_DUMPABLE, 0)
            signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGCHLD})
            prctl(_PR_SET_NAME, ctypes.addressof(_init_name))
            _hide_arguments()
        except OSError as failure:
            tell.send(str(failure.errno or errno.EIO).encode())
            os._exit(1)
        socket.send_fds(tell, [b"+"], [proc])
        syscall(_CLOSE_RANGE, 0, 0xFFFFFFFF, 0)
        while True:
            signal.sigwait({signal.SIGCHLD})
            _reap()
    except BaseException:
        # Nothing may unwind into the copy of the launcher that this process still is.
        os._exit(1)


def _hide_arguments() -> None:
    """The launcher's command line, which names the node's folders, is no business of the container's."""
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end, proc_pid_stat(5)
    if start:
        ctypes.memset(start, 0, end - start)
        ctypes.memmove(start, b"init", 4)


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


_init_name = ctypes.create_string_buffer(b"sandfleet-init")


def _fork_beside() -> int:
    """fork(2), but the child's parent is this process's own. For a process of one thread."""
    ctypes.set_errno(0)
    flags = ctypes.c_ulong(_CLONE_PARENT | signal.SIGCHLD)
    none = ctypes.c_ulong(0)
    pid: int = _syscall_in_place(ctypes.c_long(_CLONE[os.uname().machine]), flags, none, none, none, none)
    if pid < 0:
        raise last_error()
    return pid


def _name_host(name: str) -> None:
    socket.sethostname(name[:64])


def _raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = bytearray(struct.pack("16sH22x", b"lo", 0))
        fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request)
        flags = struct.unpack_from("H", request, 16)[0]
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", flags | _IFF_UP))


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _step(step: str, function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except OSError as failure:
        reason = failure.strerror or str(failure)
        detail = f"{failure.filename}: {reason}" if failure.filename else reason
        raise RootError(step, failure.errno or 0, detail) from failure


# -- whether it works here


def try_out(user: bool, folder: str) -> str:
    """Go all the way once, in an empty folder: "" when it works, else the step and why not.

    For a process of its own, which has no other children.
    """
    told, tell = os.pipe()
    if os.fork() == 0:
        namespace = [os.getuid(), os.getgid()] if user else None
        root = {"user": namespace, "net": True, "hostname": "try", "path": folder, "mounts": []}
        try:
            os.close(told)
            enter(root, lambda init, program, namespaces: _told(tell, init))
            os.write(tell, b"+")
        except RootError as failure:
            os.write(tell, str(failure).encode())
        os._exit(0)
    os.close(tell)
    with open(told, "rb") as answer:
        said = answer.read().decode(errors="replace")
    head, _, said = said.partition(" ") if said.startswith("@") else ("", "", said)
    if head:
        os.kill(int(head[1:]), signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    return "" if said == "+" else said or "it ended on the way"


def _told(tell: int, init: int) -> None:
    os.write(tell, b"@%d " % init)
