"""Run as `python -I -S attack_machine.py FOLDER SIGN USER -- PROGRAM …`: the program in a machine of its own.

Attacks, and above all the control that shows them to be alive, run nowhere else. The machine has namespaces of its
own for mounts, processes, IPC, host name, network and control groups (for an ordinary user also one of users). Its
root is an overlay, or several, whose upper layer lies in memory: whatever is written in there is gone with it, and
nothing is written below. Other file systems of the host appear read-only. `PLACE` in it is a file system in memory
for all that the tests have; the file `SIGN_FILE` there holds SIGN, without which no attack starts.

USER is the number of the user that PROGRAM runs as, with the group `GROUP` beside its own, or `-` for this one. Such
another user gets a set-user-ID copy of the file that is PROGRAM's second argument, `SET_USER_ID`, and a file that
only `GROUP` may read, in `OF_GROUP`. FOLDER, of the caller's, is where the root is put together. Ends with PROGRAM's
exit code, or `CANNOT`, having said on stderr why there can be no such machine. Standard library only.
"""

import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import signal
import socket
import struct
import sys
from collections.abc import Iterator

PLACE = "/sandfleet-attack"
SIGN_FILE = f"{PLACE}/sign"
SET_USER_ID = f"{PLACE}/attack-suid"
OF_GROUP = f"{PLACE}/of-group"
GROUP = 4242
CANNOT = 77
ADDRESS = "10.11.12.13"
# Numbers of processes here start above those that a container's own can have.
FIRST_PID = 20_000

_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
_RDONLY, _NOSUID, _NOEXEC, _BIND, _REC, _PRIVATE = 1, 2, 8, 4096, 0x4000, 1 << 18
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _ATTR_RDONLY = 442, -100, 0x8000, 1
_DETACH = 2
_PDEATHSIG = 1
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _SIOCSIFADDR, _UP = 0x8913, 0x8914, 0x8916, 1
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "tty0", "kmsg")
_UNREAL = (
    "proc",
    "sysfs",
    "devtmpfs",
    "devpts",
    "mqueue",
    "cgroup",
    "cgroup2",
    "debugfs",
    "tracefs",
    "autofs",
)

_libc = ctypes.CDLL(None, use_errno=True)


class No(Exception):
    """Why there can be no machine."""


def secret_of(sign: str) -> str:
    """What every secret in the machine holds."""
    return f"canary-{sign}"


def _check(result: int, what: str) -> None:
    if result < 0:
        raise No(f"{what}: {os.strerror(ctypes.get_errno())}")


def _mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    arguments = (source.encode(), target.encode(), kind.encode() or None, ctypes.c_ulong(flags))
    _check(_libc.mount(*arguments, options.encode() or None), f"mounting {kind or source} on {target}")


def main() -> int:
    folder, sign, user, _, *program = sys.argv[1:]
    group = _make_group()
    child = os.fork()
    if child == 0:
        os._exit(_outer(folder, sign, user, program, group))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if group is not None:
        for name in os.listdir(group):
            if os.path.isdir(f"{group}/{name}"):
                os.rmdir(f"{group}/{name}")
        os.rmdir(group)
    return code


def _make_group() -> str | None:
    """A control group of version 2, where root can make one, so that what is done to groups stays below it."""
    with open("/proc/self/mountinfo") as file:
        found = re.search(r"^\S+ \S+ \S+ / (\S+) .* - cgroup2 ", file.read(), re.MULTILINE)
    with open("/proc/self/cgroup") as file:
        own = re.search(r"^0::(/.*)$", file.read(), re.MULTILINE)
    if os.geteuid() != 0 or found is None or own is None:
        return None
    path = os.path.normpath(f"{found[1]}{own[1]}/sandfleet-attack-{os.getpid()}")
    with contextlib.suppress(OSError):
        os.mkdir(path)
        return path
    return None


def _outer(folder: str, sign: str, user: str, program: list[str], group: str | None) -> int:
    """In a process that leaves the host, beside the one that waits for it."""
    _libc.prctl(_PDEATHSIG, signal.SIGKILL)
    try:
        if group is not None:
            with open(f"{group}/cgroup.procs", "w") as file:
                file.write("0")
        _leave()
        child = os.fork()
        if child == 0:
            os._exit(_first(folder, sign, user, program))
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except (No, OSError) as reason:
        print(reason, file=sys.stderr)
        return CANNOT


def _leave() -> None:
    uid, gid = os.geteuid(), os.getegid()
    flags = _NEWNS | _NEWPID | _NEWIPC | _NEWUTS | _NEWNET | _NEWCGROUP | (_NEWUSER if uid else 0)
    _check(_libc.unshare(flags), "new namespaces")
    if uid:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def _first(folder: str, sign: str, user: str, program: list[str]) -> int:
    """The machine's number 1: builds it, starts the program, and reaps."""
    _libc.prctl(_PDEATHSIG, signal.SIGKILL)
    try:
        _build(folder)
    except No as reason:
        print(reason, file=sys.stderr)
        return CANNOT
    with open(SIGN_FILE, "w") as file:
        file.write(sign)
    with contextlib.suppress(OSError), open("/proc/sys/kernel/ns_last_pid", "w") as file:
        file.write(str(FIRST_PID))
    _libc.sethostname(b"machine", ctypes.c_size_t(7))
    _raise_loopback()
    _open_ways(program)
    os.mkdir(OF_GROUP)
    if user != "-":
        with open(f"{OF_GROUP}/file", "w") as file:
            file.write(secret_of(sign))
        os.chmod(f"{OF_GROUP}/file", 0o640)
        os.chown(f"{OF_GROUP}/file", 0, GROUP)
        shutil.copy(program[2], SET_USER_ID)
        os.chmod(SET_USER_ID, 0o4755)
    child = os.fork()
    if child == 0:
        if user != "-":
            os.setgroups([GROUP])
            os.setresgid(int(user), int(user), int(user))
            os.setresuid(int(user), int(user), int(user))
            _libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, which the change of user cleared
        os.chdir(PLACE)
        os.execv(program[0], program)
    while True:
        ended, status = os.wait()
        if ended == child:
            return os.waitstatus_to_exitcode(status)


def _build(folder: str) -> None:
    _mount("none", "/", flags=_REC | _PRIVATE)
    _mount("memory", folder, "tmpfs", options="mode=755")
    root = f"{folder}/root"
    for name in ("upper", "work", "root"):
        os.mkdir(f"{folder}/{name}", 0o755)
    try:
        _lay_over(folder, "")
        for place in _others():
            if os.path.isdir(root + place) and not f"{place}/".startswith(f"{folder}/"):
                _show(place, root)
    except No:
        if os.geteuid() == 0:
            raise
        # A user namespace lays no overlay over a tree with mounts of the host's in it: folder by folder, then.
        _mount("memory", root, "tmpfs", options="mode=755")
        for entry in os.scandir("/"):
            if entry.is_symlink():
                os.symlink(os.readlink(entry), root + entry.path)
            elif entry.is_dir():
                os.mkdir(root + entry.path, 0o755)
                if entry.name not in ("proc", "sys", "dev"):
                    try:
                        _lay_over(folder, entry.path)
                    except No:
                        _show(entry.path, root)
    _mount("proc", f"{root}/proc", "proc", _NOSUID | _NOEXEC)
    _show("/sys", root)
    if os.geteuid() == 0:
        with contextlib.suppress(No):
            _mount("cgroup2", f"{root}/sys/fs/cgroup", "cgroup2")
    _build_devices(root)
    os.makedirs(root + PLACE, exist_ok=True)
    # No more is taken than is written; JetStream wants to see that there is room.
    _mount("memory", root + PLACE, "tmpfs", options="mode=755,size=64g")
    os.chmod(root + PLACE, 0o777)
    os.mkdir(f"{root}{PLACE}/fixed")
    make_fixed(root)
    os.chdir(root)
    _check(_libc.syscall(_PIVOT_ROOT[os.uname().machine], b".\0", b".\0"), "the new root")
    _check(_libc.umount2(b".", _DETACH), "the old root")
    os.chdir("/")


def make_fixed(root: str = "") -> None:
    """Something that is mounted read-only, for attempts to change that."""
    _mount("memory", f"{root}{PLACE}/fixed", "tmpfs", _RDONLY)


def _lay_over(folder: str, place: str) -> None:
    upper, work = f"{folder}/upper{place}", f"{folder}/work{place}"
    for path in (upper, work):
        os.makedirs(path, 0o755, exist_ok=True)
    layers = f"lowerdir={place or '/'},upperdir={upper},workdir={work}"
    _mount(
        "overlay", f"{folder}/root{place}", "overlay", options=layers + (",userxattr" if os.geteuid() else "")
    )


def _show(place: str, root: str) -> None:
    """All that is mounted there, read-only."""
    _mount(place, root + place, flags=_BIND | _REC)
    attributes = struct.pack("=QQQQ", _ATTR_RDONLY, 0, 0, 0)
    arguments = (_AT_FDCWD, (root + place).encode() + b"\0", _AT_RECURSIVE, attributes, len(attributes))
    _check(_libc.syscall(_MOUNT_SETATTR, *arguments), f"making {place} read-only")


def _build_devices(root: str) -> None:
    _mount("memory", f"{root}/dev", "tmpfs", options="mode=755")
    for name in _DEVICES:
        if os.path.exists(f"/dev/{name}"):
            os.close(os.open(f"{root}/dev/{name}", os.O_CREAT | os.O_WRONLY))
            _mount(f"/dev/{name}", f"{root}/dev/{name}", flags=_BIND)
    for name in ("pts", "shm", "mqueue"):
        os.mkdir(f"{root}/dev/{name}")
    _mount("devpts", f"{root}/dev/pts", "devpts", _NOSUID | _NOEXEC, "newinstance,ptmxmode=0666,mode=620")
    _mount("memory", f"{root}/dev/shm", "tmpfs", options="mode=1777")
    _mount("mqueue", f"{root}/dev/mqueue", "mqueue")
    for name, text in (("ptmx", "pts/ptmx"), ("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0")):
        os.symlink(text, f"{root}/dev/{name}")
    os.symlink("/proc/self/fd/1", f"{root}/dev/stdout")
    os.symlink("/proc/self/fd/2", f"{root}/dev/stderr")


def _others() -> Iterator[str]:
    """Where other real file systems are mounted, of which the overlay knows nothing."""
    with open("/proc/self/mountinfo") as file:
        for line in file:
            left, _, right = line.partition(" - ")
            place = left.split()[4].encode().decode("unicode_escape")
            if (
                place != "/"
                and right.split()[0] not in _UNREAL
                and not re.match("/(proc|sys|dev)(/|$)", place)
            ):
                yield place


def _raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = bytearray(struct.pack("16sH22x", b"lo", 0))
        fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request)
        flags = struct.unpack_from("H", request, 16)[0]
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", flags | _UP))
        address = struct.pack("HH4s8x", socket.AF_INET, 0, socket.inet_aton(ADDRESS))
        fcntl.ioctl(any_socket, _SIOCSIFADDR, struct.pack("16s16s8x", b"lo:1", address))


def _open_ways(program: list[str]) -> None:
    """Another user shall find the program and its interpreter, wherever they are: in here that is no harm."""
    for path in (*(word for word in program if os.path.isabs(word)), os.path.realpath(program[0])):
        while path != "/":
            with contextlib.suppress(OSError):
                os.chmod(path, os.stat(path).st_mode | 0o555)
            path = os.path.dirname(path)


if __name__ == "__main__":
    sys.exit(main())
