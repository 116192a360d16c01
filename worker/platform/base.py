"""What a platform must do for a node, and the policy it is given to enforce.

One `SandboxPolicy` describes a sandbox for every platform; a `Driver` turns it into words (`describe`),
into what it cannot promise (`not_enforced`) and into a `plan`: JSON that the launcher hands to
`worker.platform.<plan["platform"]>.enforce`, whose `prepare(plan)` runs before the fork and whose
`apply(plan, prepared)` runs between fork and exec.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec

from schemas.node import Capabilities, NotEnforced
from schemas.status import Gpu, Network

Access = Literal["r", "rx", "rw", "rwx"]

# The isolation in which a container has a root of its own, and where its tmp and its token are in there.
ROOTED = "rootfs"
ROOTED_TMP = "/tmp"
ROOTED_API = "/run/sandfleet"


class PathRule(msgspec.Struct, frozen=True):
    """A canonical absolute host path and what may be done there: read, write, execute (and map).

    A directory stands for everything below it. `origin` says what asked for it: `rootfs`, `tmp`, `volume`,
    `sandbox.read`, `sandbox.write`, `device`, `host_api`, `system`.
    """

    path: str
    access: Access
    origin: str


class NetworkPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """The level in force and its ports.

    `bind_ports` are the assigned and the endpoints' target ports, `udp_ports` those of them whose endpoint's
    protocol is udp; `connect_ports` is complete for `localhost` (with 53, 80 and 443) and, for `outbound`,
    what loopback may be asked for. `denied_ports` (the NATS server's) are in no list and beat all. `udp` is
    set where UDP sockets are part of the level: `outbound`, `full`, and `localhost` for an endpoint whose
    protocol is udp. `unix_sockets` are socket paths granted; `api_socket` is that of the node's host API,
    one of them.
    """

    level: Network = Network.NONE
    bind_ports: tuple[int, ...] = ()
    udp_ports: tuple[int, ...] = ()
    connect_ports: tuple[int, ...] = ()
    denied_ports: tuple[int, ...] = ()
    unix_sockets: tuple[str, ...] = ()
    api_socket: str | None = None
    udp: bool = False


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """`ulimits` maps a setrlimit name without its prefix (`nofile`, `stack`) to (soft, hard), -1 for
    infinity.
    """

    max_files: int = 4096
    cpu_time_limit_s: int | None = None
    memory_bytes: int | None = None
    pids: int | None = None
    cpu: float | None = None
    ulimits: dict[str, tuple[int, int]] = {}


class VolumeMount(msgspec.Struct, frozen=True, kw_only=True):
    """A host folder that appears at `target` inside the container.

    `target` is a path inside the rootfs, absolute, normalised, without links resolved. Under isolation
    `process` it becomes a link in the rootfs to `source`. `kind` is the storage type; the sources of
    `named`, `anonymous` and `tmpfs` are ours to make (with `mode`, when given), and a `tmpfs` is emptied
    at each start. That of `s3` is a mirror, made when it is fetched. `name` is that of a `named` volume.
    """

    kind: Literal["bind", "named", "anonymous", "tmpfs", "s3"]
    source: str
    target: str
    readonly: bool = False
    size_bytes: int | None = None
    mode: int | None = None
    name: str | None = None


class Device(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    read: bool = True
    write: bool = True


class RunAs(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of a user and of its one group."""

    uid: int
    gid: int


class SandboxPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that an enforcer must know about one container; nothing in it depends on the platform's
    means.

    Paths are canonical. `paths` holds every grant (rootfs, tmp, volumes, `sandbox.read` …) beyond what all
    programs of the platform need, which the driver adds. `deny` are paths that must never be reachable,
    whatever is granted above them. `marker` is a path that names the instance and that only this sandbox
    may read (macOS finds a container's processes by it). `run` counts the starts, 0 before the first: where
    the system logs denials, they bear it. `user` None: the worker's own.
    """

    container: str
    instance: str
    run: int = 0
    isolation: str = "process"
    user: RunAs | None = None
    rootfs: str
    tmp: str
    state_dir: str
    paths: tuple[PathRule, ...] = ()
    volumes: tuple[VolumeMount, ...] = ()
    devices: tuple[Device, ...] = ()
    network: NetworkPolicy = NetworkPolicy()
    gpu: Gpu = Gpu.NONE
    groups: tuple[str, ...] = ()
    mach_lookup: tuple[str, ...] = ()
    limits: Limits = Limits()
    marker: str = ""
    require: tuple[str, ...] = ()
    tty: bool = False
    deny: tuple[str, ...] = ()


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """The reply to the query `profile`: the policy as data and in the platform's own language."""

    language: str
    text: str
    params: dict[str, str]
    policy: dict[str, Any]
    not_enforced: list[NotEnforced]


class RuleGroup(msgspec.Struct, frozen=True, kw_only=True):
    """A named set of rules for `sandbox.groups`. A harmless one needs no grant in the node's policy."""

    name: str
    harmless: bool
    text: str


class CloneReport(msgspec.Struct, frozen=True, kw_only=True):
    """How a tree was copied: `method` is `clonefile`, `reflink`, `copy`, or the mix that was needed.

    Files of `shared_from` bytes and more share their blocks with the source; None when none does.
    """

    method: str
    files: int
    directories: int
    bytes: int
    shared_from: int | None = None


class CloneChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The way of copying that was found best here: `clonefile`, `reflink` for files of `shared_from` bytes and more,
    or `copy`. `usec` are the times that it was chosen by, of one file each.
    """

    method: Literal["clonefile", "reflink", "copy"]
    shared_from: int | None = None
    usec: dict[str, float] = {}


class TreeSample(msgspec.Struct, frozen=True, kw_only=True):
    """Sums over a process tree at one moment. None where the platform does not say."""

    cpu_usec: int
    memory_bytes: int
    processes: int
    threads: int
    open_files: int | None
    read_bytes: int | None
    write_bytes: int | None


class ProcessTable(Protocol):
    """One snapshot of the machine's processes."""

    def tree(self, root_pid: int, marker: str = "") -> TreeSample | None:
        """The processes descended from `root_pid` (a container's shim), itself left out; None when it is
        gone.

        Where orphans do not stay below it, whoever holds the container's `marker` is found by that.
        """

    def memory(self, root_pid: int, limit: int | None = None, marker: str = "") -> int | None:
        """Only the memory of `tree`; None when `root_pid` is gone.

        With `limit`, an upper bound will do, as cheap as can be had, unless it lies above the limit.
        """

    def members(self, root_pid: int, marker: str = "") -> tuple[int, ...]:
        """The pids of that tree."""

    def alive(self, pid: int, start_time: int) -> bool:
        """True while the process with this pid is the one that started at `start_time` (the platform's
        unit).
        """


class Rules(Protocol):
    """What a platform's sandbox can do and how it says a policy: also of a platform that is not this one."""

    name: str

    def capabilities(self) -> Capabilities:
        """What the machine can enforce. Probed once."""

    def groups(self) -> Mapping[str, RuleGroup]:
        """The rule groups that this platform knows."""

    def not_enforced(self, policy: SandboxPolicy) -> list[NotEnforced]:
        """What of this very policy the machine cannot enforce."""

    def describe(self, policy: SandboxPolicy) -> Profile: ...


class FolderLimits(Protocol):
    """A way to have folders that the kernel holds to a size."""

    def make(self, folder: Path, size_bytes: int, mode: int) -> None:
        """Make the folder, with that mode. OSError, FileExistsError where something stands."""


class Driver(Rules, Protocol):
    """One per platform, chosen by `worker.platform.driver()`."""

    def plan(self, policy: SandboxPolicy) -> dict[str, Any]:
        """JSON for the launcher's child; has at least `platform`."""

    def clone_tree(self, src: Path, dst: Path, choice: CloneChoice | None = None) -> CloneReport:
        """Without a `choice`, whatever works, the quickest by hearsay first."""

    def measure_clone(self, source: Path, target: Path) -> CloneChoice:
        """What is best from one folder to the other, by doing it. Blocking. OSError."""

    def find_folder_limits(self, place: Path) -> None:
        """See, by doing it at `place`, whether folders can be held to a size: `capabilities` and `not_enforced` tell
        of it from then on. Blocking. OSError.
        """

    @property
    def folder_limits(self) -> FolderLimits | None:
        """None where folders cannot be held to a size, and before it was tried."""

    def changes_user(self) -> bool:
        """Whether this worker may run containers as other users than its own."""

    def processes(self) -> ProcessTable: ...

    def end_leftovers(self, marker: str, timeout_s: float) -> bool:
        """End what outlived both its launcher and its shim, where the system does not; blocks.

        True when nothing that holds the marker is left.
        """

    def allocated_bytes(self) -> int | None:
        """A counter of all memory that the machine ever handed out, never falling; None where there is
        none.

        No tree can have grown by more than this counter did, so the watchdog need not measure while it
        stands still.
        """

    def default_path(self) -> str:
        """The value of PATH for a container whose spec does not set it."""

    def search_dirs(self, policy: SandboxPolicy | None = None) -> tuple[str, ...]:
        """Canonical host folders from which every sandbox of this platform may execute programs, or this one."""
