"""What `doctor` looks at. A check says what it found; of a lack, also what it costs and what to do."""

import os
import resource
import shutil
import stat
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec

from worker.bus.credentials import has_credentials
from worker.bus.failures import JetStreamError
from worker.bus.messages import parse_time
from worker.bus.streams import Finding as StreamFinding
from worker.bus.streams import check_streams, names_of
from worker.cli.human import size, span
from worker.client import FleetClient
from worker.config import NatsConfig
from worker.errors import Configuration, ContractError, Unavailable

Level = Literal["ok", "warn", "fail"]

LOW_DISK_BYTES = 2**30
NO_DISK_BYTES = 16 * 2**20
WANTED_FILES = 65536
LEAST_FILES = 1024
SKEW_WARN_S = 1.0
SKEW_FAIL_S = 30.0
WANTED_PAYLOAD = 2**20

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
    """Sandbox, namespaces, cgroups, descriptors."""
    yield from sandbox_checks()
    if (PROC / "sys" / "kernel").is_dir():  # Linux: other platforms have nothing of the kind
        yield namespaces_check()
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


def namespaces_check() -> Finding:
    most = _read(PROC / "sys/user/max_user_namespaces")
    if most is not None and most.strip() == "0":
        return lack(
            "warn",
            "namespaces",
            "user namespaces are off (user.max_user_namespaces = 0)",
            "isolation rootfs needs a worker that is root",
            "sysctl user.max_user_namespaces=15000",
        )
    restricted = _read(PROC / "sys/kernel/apparmor_restrict_unprivileged_userns")
    if restricted is not None and restricted.strip() == "1" and os.geteuid() != 0:
        return lack(
            "warn",
            "namespaces",
            "AppArmor keeps user namespaces from ordinary users",
            "isolation rootfs needs a worker that is root",
            "an AppArmor profile with `userns`, or kernel.apparmor_restrict_unprivileged_userns=0",
        )
    return ok("namespaces", "user namespaces are allowed")


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


# -- the server


async def server_checks(config: NatsConfig, where: str) -> list[Finding]:
    """Reachable, new enough, credentials, clock, streams, nodes."""
    findings = [credentials_check(config)]
    try:
        fleet = await FleetClient.connect(config, name="sandfleet doctor")
    except (Unavailable, Configuration) as failure:
        cost = "nothing can be commanded or seen; a worker waits for it"
        return [
            *findings,
            lack(
                "fail", "server", failure.message, cost, f"{where}; or start sandfleet dev to try things out"
            ),
        ]
    async with fleet:
        bus = fleet.bus
        findings.append(ok("server", f"{bus.url}, nats-server {bus.server_version}"))
        if bus.max_payload < WANTED_PAYLOAD:
            cost = "large commands, replies and log chunks are refused"
            findings.append(
                lack(
                    "fail",
                    "max payload",
                    size(bus.max_payload),
                    cost,
                    "max_payload: 1MB in the server's file",
                )
            )
        streams = await stream_checks(fleet)
        findings += streams
        if all(finding.level != "fail" for finding in streams):
            findings.append(await clock_check(fleet))
            nodes = [presence.node for presence in await fleet.nodes()]
            findings.append(
                ok("nodes", ", ".join(nodes))
                if nodes
                else lack(
                    "warn", "nodes", "none is there", "commands wait", "sandfleet worker, or sandfleet dev"
                )
            )
    return findings


def credentials_check(config: NatsConfig) -> Finding:
    try:
        if has_credentials(config):
            return ok("credentials", "configured")
    except Configuration as failure:
        return lack("fail", "credentials", failure.message, "no connection is made")
    return lack(
        "warn",
        "credentials",
        "none",
        "whoever reaches the server commands the fleet; a worker starts only with --insecure",
        "--creds FILE, or [nats] creds, nkey, token_file or tls.cert in the configuration",
    )


async def stream_checks(fleet: FleetClient) -> list[Finding]:
    try:
        found = await check_streams(fleet.bus, subjects=fleet.subjects)
    except ContractError as failure:
        return [lack("fail", "streams", failure.message, "no command can be received")]
    if not found:
        return [ok("streams", f"all there ({fleet.bus.cfg.stream_prefix}_…)")]
    return [_of_stream(finding) for finding in found]


def _of_stream(finding: StreamFinding) -> Finding:
    level: Level = "fail" if finding.fatal else "warn"
    if finding.problem == "is missing":
        return lack(
            level, finding.stream, "is missing", "a worker waits until it is there", "sandfleet setup"
        )
    return lack(level, finding.stream, finding.problem, finding.cost, "change it with nats stream edit")


async def clock_check(fleet: FleetClient) -> Finding:
    """The server stamps its answers; half of the round trip is the doubt."""
    before = time.time()
    try:
        answer = await fleet.bus.js.api(f"STREAM.INFO.{names_of(fleet.bus).events}")
        server = parse_time(str(answer["ts"]))
    except (JetStreamError, KeyError, ValueError):
        return lack("warn", "clock", "the server does not tell its time", "a wrong clock stays unseen")
    after = time.time()
    skew_s = (datetime.fromtimestamp((before + after) / 2, UTC) - server).total_seconds()
    doubt_s = (after - before) / 2
    return judge_clock(skew_s, doubt_s)


def judge_clock(skew_s: float, doubt_s: float) -> Finding:
    """Positive: this machine is ahead."""
    off = max(0.0, abs(skew_s) - doubt_s)
    if off < SKEW_WARN_S:
        return ok("clock", f"within {span(max(off, doubt_s, 0.001))} of the server's")
    found = f"{span(off)} {'ahead of' if skew_s > 0 else 'behind'} the server's"
    cost = "deadlines pass too early or too late, times of events and logs are wrong"
    return lack("fail" if off >= SKEW_FAIL_S else "warn", "clock", found, cost, "run an NTP client on both")


def _read(path: Path) -> str | None:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return None
