"""Control groups of version 2, where this user may make any: limits that the kernel itself keeps.

Each run that has such limits gets a group below one folder of the launcher's, `sandfleet-<its data directory>`.
That folder lies as high as this user may write, and outside of the group that the worker runs in: a group with
processes of its own can limit none below it, and nobody's processes are moved for that (systemd's
`DelegateSubgroup=` puts a worker's where they are not in the way). Standard library only.

Source: Documentation/admin-guide/cgroup-v2.rst.
"""

import contextlib
import errno
import os
from typing import Any, NamedTuple

CONTROLLERS = ("memory", "pids", "cpu")
_PERIOD_USEC = 100_000
_LEAST_QUOTA_USEC = 1_000


class Limits(NamedTuple):
    """Bytes, processes and threads, and processors; None leaves one open."""

    memory: int | None = None
    pids: int | None = None
    cpu: float | None = None


class Group:
    """The group of one run."""

    def __init__(self, path: str) -> None:
        self.path = path

    @property
    def procs(self) -> str:
        """The file to which a process writes `0` to join."""
        return f"{self.path}/cgroup.procs"

    @property
    def ran_out(self) -> bool:
        """Whether the kernel killed something in here because the memory was used up."""
        try:
            return _events(_read(f"{self.path}/memory.events")).get("oom_kill", 0) > 0
        except OSError:
            return False  # no memory controller, or the group is gone

    @property
    def populated(self) -> bool:
        try:
            return _events(_read(f"{self.path}/cgroup.events")).get("populated", 0) > 0
        except FileNotFoundError:
            return False

    def kill(self) -> None:
        """Kill every process in here and below, at one stroke (Linux 5.14); what the shim does is enough without."""
        with contextlib.suppress(FileNotFoundError):
            _write(f"{self.path}/cgroup.kill", "1")

    def remove(self) -> bool:
        """Take it away with all that a program has made below; False while a process is still ending in it."""
        try:
            for folder in _below(self.path):
                os.rmdir(folder)
        except FileNotFoundError:
            return True
        except OSError as failure:
            if failure.errno in (errno.EBUSY, errno.ENOTEMPTY):
                return False
            raise
        return True


class Cgroups:
    """The launcher's folder of groups. `controllers` are those that limit something in it."""

    def __init__(self, path: str, controllers: tuple[str, ...]) -> None:
        self.path = path
        self.controllers = controllers

    @classmethod
    def open(cls, base: str, name: str) -> "Cgroups":
        """Make the folder `name` in `base`, with its controllers. OSError."""
        controllers = _enable(base)
        path = f"{base}/{name}"
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o755)
        return cls(path, tuple(c for c in controllers if c in _enable(path)))

    def make(self, name: str, limits: dict[str, Any]) -> Group:
        """A new group with the limits of a plan. OSError, and then nothing is left."""
        group = Group(f"{self.path}/{name}")
        os.mkdir(group.path, 0o755)
        try:
            self._limit(group, Limits(**limits))
        except OSError:
            os.rmdir(group.path)
            raise
        return group

    def _limit(self, group: Group, limits: Limits) -> None:
        if limits.memory is not None and "memory" in self.controllers:
            _write(f"{group.path}/memory.max", str(limits.memory))
            # All of them, or a program goes on with half of its processes.
            _write(f"{group.path}/memory.oom.group", "1")
            with contextlib.suppress(FileNotFoundError):  # a kernel without swap accounting
                _write(f"{group.path}/memory.swap.max", "0")
        if limits.pids is not None and "pids" in self.controllers:
            _write(f"{group.path}/pids.max", str(limits.pids))
        if limits.cpu is not None and "cpu" in self.controllers:
            quota = max(_LEAST_QUOTA_USEC, round(limits.cpu * _PERIOD_USEC))
            _write(f"{group.path}/cpu.max", f"{quota} {_PERIOD_USEC}")

    def find(self, name: str) -> Group | None:
        path = f"{self.path}/{name}"
        return Group(path) if os.path.isdir(path) else None

    def names(self) -> list[str]:
        """Of the groups that are there, those of an earlier launcher too."""
        return sorted(entry.name for entry in os.scandir(self.path) if entry.is_dir(follow_symlinks=False))


class Delegated(NamedTuple):
    """Where groups may be made, and the controllers to be had there."""

    base: str
    controllers: tuple[str, ...]


def delegated(mountinfo: str, cgroup: str, root: str = "") -> Delegated | None:
    """What this process may use; None where there is no such place. Nothing is changed.

    The texts are those of /proc/self/mountinfo and /proc/self/cgroup; `root` stands before every path, for tests.
    """
    mount = next((where for where, kind in _mounts(mountinfo) if kind == "cgroup2"), None)
    line = next((line for line in cgroup.splitlines() if line.startswith("0::/")), None)
    if mount is None or line is None:
        return None
    top = root + mount
    own = os.path.normpath(f"{top}/{line[4:]}")
    base, at = None, own
    while at == top or at.startswith(top + "/"):
        if not _is_ours(at):
            break
        base, at = at, os.path.dirname(at)
    if base is None or (base == own and not _is_top(own)):
        return None
    try:
        offered = _read(f"{base}/cgroup.controllers").split()
    except OSError:
        return None
    return Delegated(base, tuple(name for name in CONTROLLERS if name in offered))


def delegated_here() -> Delegated | None:
    """`delegated` for this process."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
            mountinfo = file.read()
        with open("/proc/self/cgroup", encoding="utf-8", errors="replace") as file:
            return delegated(mountinfo, file.read())
    except FileNotFoundError:
        return None  # a kernel without control groups


def _is_ours(folder: str) -> bool:
    """Whether we may make groups in here and move processes between them."""
    wanted = (folder, f"{folder}/cgroup.procs", f"{folder}/cgroup.subtree_control")
    return all(os.access(path, os.W_OK) for path in wanted)


def _mounts(mountinfo: str) -> list[tuple[str, str]]:
    """(mount point, kind) of each line, see proc_pid_mountinfo(5)."""
    found = []
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        if right:
            found.append((left.split()[4].replace("\\040", " "), right.split()[0]))
    return found


def _is_top(folder: str) -> bool:
    """Whether it is the root of the whole hierarchy, which alone has no type and may have processes of its own."""
    return not os.path.exists(f"{folder}/cgroup.type")


def _enable(folder: str) -> tuple[str, ...]:
    """Let what is below be limited by as many of CONTROLLERS as there are; gives those."""
    offered = _read(f"{folder}/cgroup.controllers").split()
    enabled = _read(f"{folder}/cgroup.subtree_control").split()
    for name in CONTROLLERS:
        if name in offered and name not in enabled:
            _write(f"{folder}/cgroup.subtree_control", f"+{name}")
    return tuple(name for name in CONTROLLERS if name in offered)


def _below(path: str) -> list[str]:
    """The folder and all below it, the deepest first."""
    found: list[str] = []
    for entry in os.scandir(path):
        if entry.is_dir(follow_symlinks=False):
            found += _below(entry.path)
    return [*found, path]


def _events(text: str) -> dict[str, int]:
    return {name: int(value) for name, value in (line.split() for line in text.splitlines())}


def _read(path: str) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        return os.read(fd, 65536).decode()
    finally:
        os.close(fd)


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
