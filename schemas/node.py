"""What a node says of itself."""

from datetime import datetime

import msgspec

from .errors import OpenEnum

API_VERSION = 1


class NodeState(OpenEnum):
    READY = "ready"
    DRAINING = "draining"
    DRAINED = "drained"
    STOPPED = "stopped"


class Feature(OpenEnum):
    """Names used in `not_enforced` and in a spec's `sandbox.require`."""

    NETWORK_NONE = "network.none"
    NETWORK_LOCALHOST = "network.localhost"
    NETWORK_OUTBOUND = "network.outbound"
    NETWORK_UDP = "network.udp"
    UNIX_SOCKETS = "unix_sockets"
    ABSTRACT_SOCKETS = "abstract_sockets"
    FILES = "files"
    FILE_METADATA = "file_metadata"
    IPC = "ipc"
    SIGNALS = "signals"
    MEMORY = "memory"
    CPU = "cpu"
    PIDS = "pids"
    GPU = "gpu"
    VOLUME_SIZE = "volume_size"
    PROCESSES = "processes"


class NotEnforced(msgspec.Struct, frozen=True, kw_only=True):
    """A feature that this node cannot enforce under an isolation (null: under any), and why."""

    feature: Feature
    isolation: str | None
    reason: str


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    sandbox: str
    network: list[str]
    gpu: list[str]
    isolation: list[str]
    clone: str
    limits: list[str]
    not_enforced: list[NotEnforced]


class ApiInfo(msgspec.Struct, frozen=True, kw_only=True):
    version: int
    features: list[str]


class LogBacklog(msgspec.Struct, frozen=True, kw_only=True):
    """Of both streams of an instance: `lag_bytes` were captured and are not known to be in the log stream yet;
    `lost_bytes` were discarded and told as lost since this worker started."""

    container: str
    instance: str
    lag_bytes: int
    lost_bytes: int


class DeliveryInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What is on its way from this node to the streams.

    `outbox_events` have not been acknowledged by the event stream, the oldest of them for `oldest_event_age_s`;
    null when no event waits, both null when the journal did not answer in time. `logs` has those instances that
    have any lag or loss, the greatest lag first; `logs_omitted` more would have been too many. Losses,
    redeliveries and reconnects are counted since the worker started.
    """

    outbox_events: int | None
    oldest_event_age_s: float | None
    log_lag_bytes: int
    log_lost_bytes: int
    logs: list[LogBacklog]
    logs_omitted: int
    commands_redelivered: int
    reconnects: int


class NodeInfo(msgspec.Struct, frozen=True, kw_only=True):
    """`delivery` is measured for the query `info`, and null in events and from nodes that do not tell it."""

    node: str
    epoch: str
    boot: str
    version: str
    api: ApiInfo
    hostname: str
    os: str
    os_version: str
    arch: str
    cpus: int
    memory_bytes: int
    gpus: list[str]
    labels: dict[str, str]
    pools: list[str]
    slots: int
    slots_used: int
    state: NodeState
    insecure: bool
    capabilities: Capabilities
    started_at: datetime
    delivery: DeliveryInfo | None = None


class Presence(msgspec.Struct, frozen=True, kw_only=True):
    """The value under a node's name in the KV bucket, renewed every 5 s."""

    node: str
    boot: str
    epoch: str
    state: NodeState
    slots: int
    slots_used: int
