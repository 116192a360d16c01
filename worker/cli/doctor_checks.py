"""What `doctor` looks at. A check says what it found; of a lack, also what it costs and what to do."""

import os
import resource
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from worker.cli.human import size
from worker.errors import ContractError

# unknown: whoever asks may not know, which is no lack.
Level = Literal["ok", "warn", "fail", "unknown"]

LOW_DISK_BYTES = 2**30
NO_DISK_BYTES = 16 * 2**20
WANTED_FILES = 65536
LEAST_FILES = 1024

CGROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """`cost` and `do` are empty for what is well."""

    check: str
    level: Level
    found: str
    cost: str = ""
    do: str = ""


def ok(check: str, found: str) -> Finding:
    return Finding(check=check, level="ok", found=found)


def lack(level: Level, check: str, found: str, cost: str, do: str = "") -> Finding:
    return Finding(check=check, level=level, found=found, cost=cost, do=do)


# -- this machine


def machine_checks() -> Iterator[Finding]:
    """Sandbox, cgroups, descriptors."""
    yield from sandbox_checks()
    if (PROC / "sys" / "kernel").is_dir():  # Linux: other platforms have nothing of the kind
        yield cgroup_check()
    yield files_check()


def sandbox_checks() -> Iterator[Finding]:
    from worker.platform import driver

    try:
        capabilities = driver().capabilities()
    except ContractError as failure:
        yield lack("fail", "sandbox", failure.message, "no worker can run here")
        return
    yield ok("sandbox", f"{capabilities.sandbox}; network {', '.join(capabilities.network)}")
    if PROC.is_dir():
        yield from kernel_checks(capabilities.sandbox)
    for gap in capabilities.not_enforced:
        where = f" under {gap.isolation}" if gap.isolation else ""
        yield lack(
            "warn",
            "not enforced",
            f"{gap.feature}{where}",
            gap.reason,
            "sandbox.require in a spec names those without which it must not start",
        )


def kernel_checks(sandbox: str) -> Iterator[Finding]:
    """Landlock and seccomp, by what the kernel itself lists."""
    if "landlock" not in sandbox:
        yield lack(
            "fail",
            "landlock",
            "this kernel has none, or it is off",
            "containers can read and write whatever the worker's user can",
            "a kernel of 5.13 or newer, started with landlock among lsm= (see /sys/kernel/security/lsm)",
        )
    actions = _read(PROC / "sys/kernel/seccomp/actions_avail")
    if actions is None or "errno" not in actions:
        yield lack(
            "warn",
            "seccomp",
            "no filters in this kernel",
            "unix sockets, and sockets under network none, cannot be refused",
            "a kernel with CONFIG_SECCOMP_FILTER",
        )
    else:
        yield ok("seccomp", "filters")


def cgroup_check() -> Finding:
    cost = "memory is watched by sampling instead of bounded by the kernel; cpu and pids are not bounded"
    if not (CGROUPS / "cgroup.controllers").is_file():
        return lack(
            "warn", "cgroups", "no cgroup v2 at /sys/fs/cgroup", cost, "boot with the unified hierarchy"
        )
    own = _own_cgroup()
    if own is None or not os.access(own / "cgroup.procs", os.W_OK) or not os.access(own, os.W_OK):
        return lack(
            "warn",
            "cgroups",
            "v2, not delegated to this user",
            cost,
            "start the worker as a unit with Delegate=yes",
        )
    controllers = (_read(own / "cgroup.controllers") or "").split()
    missing = [name for name in ("memory", "cpu", "pids") if name not in controllers]
    if missing:
        return lack(
            "warn",
            "cgroups",
            f"v2, without {', '.join(missing)}",
            f"{' and '.join(missing)} limits cannot be left to the kernel",
            "Delegate=yes in the worker's unit",
        )
    return ok("cgroups", f"v2, delegated: {' '.join(controllers)}")


def _own_cgroup() -> Path | None:
    for line in (_read(PROC / "self/cgroup") or "").splitlines():
        if line.startswith("0::"):
            return CGROUPS / line[3:].lstrip("/")
    return None


def files_check() -> Finding:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard >= WANTED_FILES:
        shown = "unlimited" if hard == resource.RLIM_INFINITY else f"up to {hard}"
        return ok("descriptors", shown)
    level: Level = "fail" if hard < LEAST_FILES else "warn"
    return lack(
        level,
        "descriptors",
        f"at most {hard}",
        f"no more than about {max(0, hard - 100) // 6} containers at once",
        f"LimitNOFILE={WANTED_FILES} in the unit, or ulimit -Hn {WANTED_FILES}",
    )


# -- the data directory


def data_dir_checks(root: Path) -> Iterator[Finding]:
    """Owner, mode, room."""
    place = root
    while not place.exists() and place != place.parent:
        place = place.parent
    if place == root:
        yield _owner(root)
    elif os.access(place, os.W_OK | os.X_OK):
        yield ok("data directory", f"{root} (made at the first start)")
    else:
        yield lack(
            "fail",
            "data directory",
            f"{root} is not there and cannot be made in {place}",
            "the worker does not start",
            "name another with --data-dir",
        )
    yield _room(root, place)


def _owner(root: Path) -> Finding:
    name = "data directory"
    try:
        found = root.stat()
    except OSError as failure:
        return lack("fail", name, f"{root}: {failure.strerror}", "the worker does not start")
    if not stat.S_ISDIR(found.st_mode):
        return lack("fail", name, f"{root} is no directory", "the worker does not start", "move it away")
    if found.st_uid != os.geteuid():
        return lack(
            "fail",
            name,
            f"{root} belongs to user {found.st_uid}",
            "the worker does not start as this user",
            "run as its owner, or name another with --data-dir",
        )
    if stat.S_IMODE(found.st_mode) & 0o066:  # passing is for containers of other users
        mode = stat.S_IMODE(found.st_mode)
        return lack(
            "warn", name, f"{root} has mode {mode:04o}", "others can look into it", f"chmod 700 {root}"
        )
    return ok(name, str(root))


def _room(root: Path, place: Path) -> Finding:
    usage = shutil.disk_usage(place)
    found = f"{size(usage.free)} free of {size(usage.total)}"
    if usage.free < NO_DISK_BYTES:
        return lack("fail", "disk", found, "the worker does not start", f"make room on the disk of {root}")
    if usage.free < LOW_DISK_BYTES:
        cost = "images and logs soon find no room; output that cannot be written is lost, and told as lost"
        return lack("warn", "disk", found, cost, f"make room on the disk of {root}, or sandfleet prune")
    return ok("disk", found)


def _read(path: Path) -> str | None:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return None
