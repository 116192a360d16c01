"""The parts of a ServiceSpec: image, command, resources, storage, logs, sandbox.

Field names and defaults are those of the reference system, so that its files load.
Fields keep what was written (`"512Mi"`, `"1m30s"`); properties give numbers. Ranges stand here as `Meta`;
rules that need more than one field, and what is not supported, stand in `spec_rules`.
"""

from enum import StrEnum
from typing import Annotated

import msgspec

from .values import parse_duration, parse_memory

Duration = Annotated[
    str | int | float,
    msgspec.Meta(
        description="A duration, or a number of seconds.", examples=["250ms", "5s", "1m30s", "2h", 10]
    ),
]
Size = Annotated[
    str | int,
    msgspec.Meta(description="A size, or a number of bytes.", examples=["64Ki", "512Mi", "2Gi", "1Ti", 4096]),
]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
PortOrAuto = Annotated[int, msgspec.Meta(ge=0, le=65535)]
U8 = Annotated[int, msgspec.Meta(ge=0, le=255)]
U16 = Annotated[int, msgspec.Meta(ge=0, le=65535)]
U32 = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
I32 = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)]
I64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
U63 = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Percent = Annotated[int, msgspec.Meta(ge=0, le=100)]
Cores = Annotated[float, msgspec.Meta(gt=0, le=65536)]

DEFAULT_STOP_GRACE_S = 10.0
DEFAULT_LOG_BYTES = 64 * 2**20
DEFAULT_SYNC_INTERVAL_S = 60.0


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What all parts of a spec share: an unknown field is an error."""


def seconds_or(value: Duration | None, default: float, field: str) -> float:
    return default if value is None else parse_duration(value, field=field)


class PullPolicy(StrEnum):
    ALWAYS = "always"
    NEWER = "newer"
    IF_NOT_PRESENT = "if_not_present"
    NEVER = "never"


class SourcePolicy(StrEnum):
    LOCAL_FIRST = "local_first"
    S3_FIRST = "s3_first"
    REMOTE_ONLY = "remote_only"
    LOCAL_ONLY = "local_only"


class ImageSpec(Part, frozen=True, kw_only=True):
    name: str
    pull_policy: PullPolicy = PullPolicy.IF_NOT_PRESENT
    source_policy: SourcePolicy | None = None


class CommandSpec(Part, frozen=True, kw_only=True):
    """What replaces the image's ENTRYPOINT, CMD and WORKDIR."""

    entrypoint: list[str] | None = None
    args: list[str] | None = None
    workdir: str | None = None


class GpuScheduling(StrEnum):
    BEST_EFFORT = "best-effort"
    GANG = "gang"
    SPREAD = "spread"


class GpuSharing(StrEnum):
    EXCLUSIVE = "exclusive"
    MPS = "mps"
    TIME_SLICE = "time-slice"


class GpuDistributed(Part, frozen=True, kw_only=True):
    backend: str = "nccl"
    master_port: U16 = 29500


class GpuSpec(Part, frozen=True, kw_only=True):
    """`mode` "mps" is Metal Performance Shaders only, any other is Metal compute."""

    count: U32 = 1
    vendor: str = "nvidia"
    mode: str | None = None
    model: str | None = None
    scheduling: GpuScheduling | None = None
    distributed: GpuDistributed | None = None
    sharing: GpuSharing | None = None
    mps_pipe_dir: str | None = None
    mps_log_dir: str | None = None
    time_slicing_config_path: str | None = None
    time_slice_index: U32 | None = None


class ResourcesSpec(Part, frozen=True, kw_only=True):
    """Upper bounds, not reservations. `cpu` is cores; `pids_limit` 0 or -1 is no limit."""

    cpu: Cores | None = None
    memory: Size | None = None
    cpu_time_limit: Duration | None = None
    max_files: Annotated[int, msgspec.Meta(ge=1, le=2**30)] = 4096
    pids_limit: Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)] | None = None
    gpu: GpuSpec | None = None
    cpuset: str | None = None
    memory_swap: str | None = None
    memory_reservation: str | None = None
    cpu_shares: U32 | None = None
    memory_swappiness: U8 | None = None
    oom_score_adj: I32 | None = None
    oom_kill_disable: bool | None = None
    blkio_weight: U16 | None = None

    @property
    def memory_bytes(self) -> int | None:
        return None if self.memory is None else parse_memory(self.memory, field="resources.memory")

    @property
    def cpu_time_limit_s(self) -> float | None:
        if self.cpu_time_limit is None:
            return None
        return parse_duration(self.cpu_time_limit, field="resources.cpu_time_limit")

    @property
    def pids(self) -> int | None:
        return self.pids_limit if self.pids_limit is not None and self.pids_limit > 0 else None


class UlimitSpec(Part, frozen=True, kw_only=True):
    """-1 is unlimited. A missing one takes the other's value; both missing: 0."""

    soft: Annotated[int, msgspec.Meta(ge=-1, le=2**63 - 1)] | None = None
    hard: Annotated[int, msgspec.Meta(ge=-1, le=2**63 - 1)] | None = None

    @property
    def pair(self) -> tuple[int, int]:
        """(soft, hard)."""
        soft = self.soft if self.soft is not None else self.hard
        hard = self.hard if self.hard is not None else self.soft
        return soft or 0, hard or 0


class DeviceSpec(Part, frozen=True, kw_only=True):
    path: str
    read: bool = True
    write: bool = True
    mknod: bool = False


class StorageTier(StrEnum):
    LOCAL = "local"
    CACHED = "cached"
    NETWORK = "network"


class BindStorage(Part, frozen=True, kw_only=True, tag_field="type", tag="bind"):
    source: str
    target: str
    readonly: bool = False


class NamedStorage(Part, frozen=True, kw_only=True, tag_field="type", tag="named"):
    name: str
    target: str
    readonly: bool = False
    tier: StorageTier = StorageTier.LOCAL
    size: Size | None = None

    @property
    def size_bytes(self) -> int | None:
        return None if self.size is None else parse_memory(self.size, field="storage.size")


class AnonymousStorage(Part, frozen=True, kw_only=True, tag_field="type", tag="anonymous"):
    target: str
    tier: StorageTier = StorageTier.LOCAL


class TmpfsStorage(Part, frozen=True, kw_only=True, tag_field="type", tag="tmpfs"):
    """`mode` is a number: 493 or `0o755`."""

    target: str
    size: Size | None = None
    mode: Annotated[int, msgspec.Meta(ge=0, le=0o7777)] | None = None

    @property
    def size_bytes(self) -> int | None:
        return None if self.size is None else parse_memory(self.size, field="storage.size")


class S3Storage(Part, frozen=True, kw_only=True, tag_field="type", tag="s3"):
    """`credentials` names a secret of the node. `path_style` null: with an endpoint."""

    bucket: str
    prefix: str | None = None
    target: str
    readonly: bool = False
    endpoint: str | None = None
    region: str | None = None
    path_style: bool | None = None
    credentials: str | None = None
    sync_interval: Duration | None = None

    @property
    def sync_interval_s(self) -> float:
        return seconds_or(self.sync_interval, DEFAULT_SYNC_INTERVAL_S, "storage.sync_interval")


StorageSpec = BindStorage | NamedStorage | AnonymousStorage | TmpfsStorage | S3Storage


class LogsSpec(Part, frozen=True, kw_only=True):
    """`max_rate` is bytes a second."""

    destination: str = "disk"
    max_size_bytes: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)] | None = None
    retention_secs: U63 = 604800
    max_rate: Size | None = None

    @property
    def kept_bytes(self) -> int:
        return self.max_size_bytes or DEFAULT_LOG_BYTES

    @property
    def max_rate_bytes(self) -> int | None:
        return None if self.max_rate is None else parse_memory(self.max_rate, field="logs.max_rate")


class SandboxIsolation(StrEnum):
    AUTO = "auto"
    PROCESS = "process"
    ROOTFS = "rootfs"


class SandboxSpec(Part, frozen=True, kw_only=True):
    """Grants beyond the default, bounded by the node's policy. `require` takes names of `node.Feature`."""

    isolation: SandboxIsolation = SandboxIsolation.AUTO
    groups: list[str] = []
    read: list[str] = []
    write: list[str] = []
    mach_lookup: list[str] = []
    unix_sockets: list[str] = []
    require: list[str] = []
