"""ServiceSpec, what a user writes about one service, and the document that holds several of them."""

# ruff: noqa: RUF012 (msgspec copies an empty default)

from typing import Annotated, Any

import msgspec

from .spec_life import ErrorsSpec, HealthSpec, InitSpec, LifecycleSpec, RestartPolicy
from .spec_network import (
    EndpointSpec,
    Expose,
    NetworkModeMap,
    NetworkSpec,
    OverlayPlacement,
    PortMapping,
    Reachability,
)
from .spec_parts import (
    DEFAULT_STOP_GRACE_S,
    U16,
    CommandSpec,
    DeviceSpec,
    Duration,
    ImageSpec,
    LogsSpec,
    Part,
    ResourcesSpec,
    SandboxSpec,
    StorageSpec,
    UlimitSpec,
    seconds_or,
)
from .spec_place import (
    DEFAULT_SCALE,
    DependsSpec,
    NodeMode,
    NodeSelector,
    PinAffinity,
    ReplicaGroup,
    RType,
    ScaleSpec,
    ServiceType,
    TargetPlatform,
    WindowsIsolation,
)

Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]


class ServiceSpec(Part, frozen=True, kw_only=True):
    """One service. `health` null means that it was not written."""

    image: ImageSpec
    rtype: RType = RType.SERVICE
    schedule: str | None = None
    command: CommandSpec = CommandSpec()
    env: dict[str, str] = {}
    resources: ResourcesSpec = ResourcesSpec()
    endpoints: list[EndpointSpec] = []
    network: NetworkSpec = NetworkSpec()
    storage: list[StorageSpec] = []
    health: HealthSpec | None = None
    init: InitSpec = InitSpec()
    restart_policy: RestartPolicy | None = None
    errors: ErrorsSpec = ErrorsSpec()
    lifecycle: LifecycleSpec = LifecycleSpec()
    sandbox: SandboxSpec = SandboxSpec()
    stop_signal: str | None = None
    stop_grace_period: Duration | None = None
    labels: dict[str, str] = {}
    platform: TargetPlatform | None = None
    ulimits: dict[str, UlimitSpec] = {}
    devices: list[DeviceSpec] = []
    logs: LogsSpec | None = None
    user: str | None = None
    tty: bool = False
    ttl_after_finished_s: Seconds | None = None

    # Carried for schedulers: validated, stored, echoed.
    scale: ScaleSpec = DEFAULT_SCALE
    depends: list[DependsSpec] = []
    node_selector: NodeSelector | None = None

    # Of the reference system: accepted at their default, see `spec_rules`.
    replica_groups: list[ReplicaGroup] | None = None
    isolation: WindowsIsolation | None = None
    port_mappings: list[PortMapping] = []
    capabilities: list[str] = []
    cap_drop: list[str] = []
    privileged: bool = False
    node_mode: NodeMode = NodeMode.SHARED
    affinity: str | PinAffinity | None = None
    service_type: ServiceType = ServiceType.STANDARD
    wasm: dict[str, Any] | None = None
    host_network: bool | None = None
    hostname: str | None = None
    dns: list[str] = []
    extra_hosts: list[str] = []
    sysctls: dict[str, str] = {}
    security_opt: list[str] = []
    extra_groups: list[str] = []
    pid_mode: str | None = None
    ipc_mode: str | None = None
    userns_mode: str | None = None
    cgroup_parent: str | None = None
    network_mode: str | NetworkModeMap = "default"
    init_container: bool | None = None
    stdin_open: bool = False
    read_only_root_fs: bool = False
    expose: list[str] = []
    overlay: OverlayPlacement | None = None
    localhost_reachability: Reachability = Reachability.AUTO

    @property
    def stop_grace_s(self) -> float:
        return seconds_or(self.stop_grace_period, DEFAULT_STOP_GRACE_S, "stop_grace_period")


class ExternalSpec(Part, frozen=True, kw_only=True):
    backends: Annotated[list[str], msgspec.Meta(min_length=1)]
    endpoints: list[EndpointSpec] = []
    health: HealthSpec | None = None


class TunnelSpec(Part, frozen=True, kw_only=True):
    from_: str = msgspec.field(name="from")
    to: str
    local_port: U16
    remote_port: U16
    protocol: str = "tcp"
    expose: Expose = Expose.INTERNAL


class ApiSpec(Part, frozen=True, kw_only=True):
    enabled: bool = True
    bind: str = "0.0.0.0:3669"
    jwt_secret: str | None = None
    swagger: bool = True


class DeploymentSpec(Part, frozen=True, kw_only=True):
    """A whole file. A service has no name of its own: the key is it."""

    version: str
    deployment: str
    services: dict[str, ServiceSpec] = {}
    externals: dict[str, ExternalSpec] = {}
    tunnels: dict[str, TunnelSpec] = {}
    api: ApiSpec = ApiSpec()
