"""Container states, the status that every state event carries whole, and a stats sample."""

from datetime import datetime

import msgspec

from .errors import OpenEnum


class State(OpenEnum):
    PENDING = "pending"
    INITIALIZING = "initializing"
    RUNNING = "running"
    STOPPING = "stopping"
    EXITED = "exited"
    FAILED = "failed"
    REMOVED = "removed"


class Reason(OpenEnum):
    STOPPED = "stopped"
    KILLED = "killed"
    MEMORY_LIMIT = "memory_limit"
    CPU_LIMIT = "cpu_limit"
    EXEC_FAILED = "exec_failed"
    INIT_FAILED = "init_failed"
    CREATE_FAILED = "create_failed"
    UNHEALTHY = "unhealthy"
    SUPERVISOR_LOST = "supervisor_lost"
    NODE_REBOOTED = "node_rebooted"


class Health(OpenEnum):
    NONE = "none"
    STARTING = "starting"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"


class Network(OpenEnum):
    NONE = "none"
    LOCALHOST = "localhost"
    OUTBOUND = "outbound"
    FULL = "full"


class Gpu(OpenEnum):
    NONE = "none"
    METAL_COMPUTE = "metal_compute"
    MPS_ONLY = "mps_only"


class ContainerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The whole truth about a container at one moment.

    `exit_code` is the exit status, or minus the signal's number. `pid` is the program's own as the host sees
    it. `restarts` counts those made by the restart policy. `memory_limit` is bytes.
    """

    container: str
    service: str
    replica: int
    instance: str
    run: int = 0
    state: State
    exit_code: int | None = None
    reason: Reason | None = None
    message: str | None = None
    pid: int | None = None
    port: int | None = None
    ip: str | None = None
    network: Network | None = None
    image: str | None = None
    image_digest: str | None = None
    health: Health = Health.NONE
    gpu: Gpu = Gpu.NONE
    memory_limit: int | None = None
    labels: dict[str, str] = {}
    restarts: int = 0
    created_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    next_start_at: datetime | None = None


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """Sums over a container's whole process tree. `cpu_usec` never falls within a run."""

    node: str
    container: str
    instance: str
    time: datetime
    cpu_usec: int
    cpu_percent: float | None
    memory_bytes: int
    memory_limit: int | None
    processes: int
    threads: int
    open_files: int | None
    read_bytes: int | None
    write_bytes: int | None
