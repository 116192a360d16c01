"""Which fields of a spec a node can honour: those that no node can, and those that need a capability.

Fields of the reference system that have no meaning here are accepted at their default. A field that only some
nodes can honour has a `SpecFeature`; what a node has stands in `NodeInfo.api.features`.
"""

from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Any

import msgspec

from .errors import InvalidSpec, Unsupported
from .spec_life import IMPLICIT_HEALTH, ErrorsSpec, HealthSpec, PanicAction, RestartKind, TcpCheck
from .spec_model import ApiSpec, DeploymentSpec, ServiceSpec
from .spec_network import DEFAULT_OVERLAYS, JoinSpec, OverlayPlacement, Reachability
from .spec_parts import GpuSharing, SandboxIsolation, SourcePolicy, StorageTier
from .spec_place import NodeMode, ServiceType, WindowsIsolation
from .values import parse_duration, shorten

At = Callable[[str], str]

# What is accepted in a field that is otherwise unsupported. `[]` after a name: in every element. Some values
# beyond the default pass because they say what holds here anyway: the network is the host's, localhost is
# always reached, and nothing is ever granted that `cap_drop` could drop (so it is not listed).
ACCEPTED: dict[str, tuple[Any, ...]] = {
    "image.source_policy": (None, SourcePolicy.LOCAL_FIRST),
    "resources.cpuset": (None,),
    "resources.memory_swap": (None,),
    "resources.memory_reservation": (None,),
    "resources.cpu_shares": (None,),
    "resources.memory_swappiness": (None,),
    "resources.oom_score_adj": (None,),
    "resources.oom_kill_disable": (None, False),
    "resources.blkio_weight": (None,),
    "resources.gpu.vendor": ("apple",),
    "resources.gpu.model": (None,),
    "resources.gpu.scheduling": (None,),
    "resources.gpu.distributed": (None,),
    "resources.gpu.sharing": (None, GpuSharing.EXCLUSIVE),
    "resources.gpu.mps_pipe_dir": (None,),
    "resources.gpu.mps_log_dir": (None,),
    "resources.gpu.time_slicing_config_path": (None,),
    "resources.gpu.time_slice_index": (None,),
    "endpoints[].host": (None,),
    "endpoints[].stream": (None,),
    "endpoints[].target_role": (None,),
    "endpoints[].tunnel": (None,),
    "network.overlays": (DEFAULT_OVERLAYS,),
    "network.join": (JoinSpec(),),
    "storage[].tier": (StorageTier.LOCAL,),
    "devices[].mknod": (False,),
    "logs.destination": ("disk",),
    "logs.retention_secs": (604800,),
    "errors.on_panic.action": (PanicAction.RESTART, PanicAction.SHUTDOWN),
    "platform.osVersion": (None,),
    "replica_groups": (None, []),
    "isolation": (None, WindowsIsolation.AUTO),
    "port_mappings": ([],),
    "capabilities": ([],),
    "privileged": (False,),
    "node_mode": (NodeMode.SHARED,),
    "affinity": (None,),
    "service_type": (ServiceType.STANDARD,),
    "wasm": (None,),
    "hostname": (None,),
    "dns": ([],),
    "extra_hosts": ([],),
    "sysctls": ({},),
    "security_opt": ([],),
    "extra_groups": ([],),
    "pid_mode": (None,),
    "ipc_mode": (None,),
    "userns_mode": (None,),
    "cgroup_parent": (None,),
    "network_mode": ("default", "host"),
    "init_container": (None, False),
    "stdin_open": (False,),
    "read_only_root_fs": (False,),
    "expose": ([],),
    "overlay": (None, OverlayPlacement()),
    "localhost_reachability": (Reachability.AUTO, Reachability.ALWAYS),
}
_ATTRIBUTES = {"osVersion": "os_version"}
_PLAIN = [(path, accepted) for path, accepted in ACCEPTED.items() if "." not in path]
_DEEP = [(path.split("."), accepted) for path, accepted in ACCEPTED.items() if "." in path]
# By field of the spec, so that a part that was not written costs one comparison: (field, default, rules).
_NESTED: list[tuple[str, Any, list[tuple[list[str], tuple[Any, ...]]]]] = [
    (
        field.name,
        field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory(),
        [rule for rule in _DEEP if rule[0][0].removesuffix("[]") == field.name],
    )
    for field in msgspec.structs.fields(ServiceSpec)
    if any(steps[0].removesuffix("[]") == field.name for steps, _ in _DEEP)
]


class SpecFeature(StrEnum):
    """A capability that a spec may need. `resources.memory`, `cpu_time_limit` and `max_files` need none."""

    HEALTH = "health"
    RESTART = "restart"
    INIT = "init"
    INIT_S3 = "init.s3"
    SCHEDULE = "schedule"
    ERRORS = "errors"
    DEVICES = "devices"
    TTY = "tty"
    USER = "user"
    SECRETS = "secrets"
    VOLUMES_BIND = "volumes.bind"
    VOLUMES_NAMED = "volumes.named"
    VOLUMES_ANONYMOUS = "volumes.anonymous"
    VOLUMES_TMPFS = "volumes.tmpfs"
    VOLUMES_S3 = "volumes.s3"
    ISOLATION_ROOTFS = "isolation.rootfs"
    GPU = "gpu"
    ULIMITS = "ulimits"
    PLATFORM = "platform"
    TTL_AFTER_FINISHED = "ttl_after_finished"
    LOGS_MAX_RATE = "logs.max_rate"
    RESOURCES_CPU = "resources.cpu"
    RESOURCES_PIDS = "resources.pids_limit"


ALL_FEATURES = frozenset(feature.value for feature in SpecFeature)


def unsupported_fields(spec: ServiceSpec, features: frozenset[str]) -> list[str]:
    """Fields, dotted and relative to the spec, that are used and whose capability is not in `features`."""
    return [field for field, feature in _needs(spec) if feature not in features]


def _needs(spec: ServiceSpec) -> Iterator[tuple[str, SpecFeature]]:
    """Every use of a capability: (field, feature)."""
    resources = spec.resources
    needed: tuple[tuple[str, bool, SpecFeature], ...] = (
        ("health", not is_default_health(spec.health), SpecFeature.HEALTH),
        (
            "restart_policy",
            spec.restart_policy is not None and spec.restart_policy.kind is not RestartKind.NO,
            SpecFeature.RESTART,
        ),
        ("init", bool(spec.init.steps), SpecFeature.INIT),
        ("schedule", spec.schedule is not None, SpecFeature.SCHEDULE),
        ("errors", spec.errors != ErrorsSpec(), SpecFeature.ERRORS),
        ("devices", bool(spec.devices), SpecFeature.DEVICES),
        ("tty", spec.tty, SpecFeature.TTY),
        ("user", spec.user is not None, SpecFeature.USER),
        (
            "sandbox.isolation",
            spec.sandbox.isolation is SandboxIsolation.ROOTFS,
            SpecFeature.ISOLATION_ROOTFS,
        ),
        ("resources.gpu", resources.gpu is not None, SpecFeature.GPU),
        ("resources.cpu", resources.cpu is not None, SpecFeature.RESOURCES_CPU),
        ("resources.pids_limit", resources.pids is not None, SpecFeature.RESOURCES_PIDS),
        ("ulimits", bool(spec.ulimits), SpecFeature.ULIMITS),
        ("platform", spec.platform is not None, SpecFeature.PLATFORM),
        ("ttl_after_finished_s", spec.ttl_after_finished_s is not None, SpecFeature.TTL_AFTER_FINISHED),
        (
            "logs.max_rate",
            spec.logs is not None and spec.logs.max_rate is not None,
            SpecFeature.LOGS_MAX_RATE,
        ),
    )
    yield from ((field, feature) for field, used, feature in needed if used)
    for index, item in enumerate(spec.storage):
        yield f"storage[{index}]", SpecFeature(f"volumes.{item.__struct_config__.tag}")
    for index, step in enumerate(spec.init.steps):
        if step.uses.startswith("init.s3_"):
            yield f"init.steps[{index}].uses", SpecFeature.INIT_S3
    for name, value in spec.env.items():
        if value.startswith("$S:"):
            yield f"env.{name}", SpecFeature.SECRETS


def is_default_health(health: HealthSpec | None) -> bool:
    """Not written, or written exactly as it is implied."""
    if health is None:
        return True
    grace, implied = health.start_grace, IMPLICIT_HEALTH.start_grace
    return (
        isinstance(health.check, TcpCheck)
        and msgspec.structs.replace(health, start_grace=implied) == IMPLICIT_HEALTH
        and grace is not None
        and parse_duration(grace, field="health.start_grace") == IMPLICIT_HEALTH.start_grace_s
    )


def check_supported(spec: ServiceSpec, at: At) -> None:
    """Unsupported, naming the field, for what no node can honour."""
    _network_mode(spec, at)
    for name, accepted in _PLAIN:
        if getattr(spec, name) not in accepted:
            raise Unsupported(f"is not supported{_only(accepted)}", field=at(name))
    for root, default, rules in _NESTED:
        if getattr(spec, root) == default:
            continue
        for steps, accepted in rules:
            for where, value in _values(spec, steps):
                if value not in accepted:
                    raise Unsupported(f"is not supported{_only(accepted)}", field=at(where))
    gpu = spec.resources.gpu
    if gpu is not None and gpu.mode == "vm":
        raise Unsupported("there are no virtual machines here", field=at("resources.gpu.mode"))


def check_supported_deployment(deployment: DeploymentSpec) -> None:
    for name, used in (
        ("externals", bool(deployment.externals)),
        ("tunnels", bool(deployment.tunnels)),
        ("api", deployment.api != ApiSpec()),
    ):
        if used:
            raise Unsupported("is not supported", field=name)


def _network_mode(spec: ServiceSpec, at: At) -> None:
    mode = spec.network_mode
    if isinstance(mode, str):
        word, colon, name = mode.partition(":")
        known = word in ("default", "host", "none", "bridge") and (not colon or word == "bridge")
        if not known and not (word == "container" and name):
            raise InvalidSpec(
                f"{shorten(mode)} is none of default host none bridge bridge:NAME container:ID",
                field=at("network_mode"),
            )
    elif (mode.bridge is None) == (mode.container is None):
        raise InvalidSpec("must have exactly one of bridge and container", field=at("network_mode"))
    if isinstance(spec.affinity, str) and spec.affinity not in ("spread", "pack"):
        raise InvalidSpec("must be spread, pack or a map with pin", field=at("affinity"))


def _values(owner: Any, steps: list[str], where: str = "") -> Iterator[tuple[str, Any]]:
    """(field, value) of every place that `steps` lead to: none below a null or where it is lacking."""
    step, *rest = steps
    name = step.removesuffix("[]")
    held = getattr(owner, _ATTRIBUTES.get(name, name), msgspec.UNSET)
    if held is msgspec.UNSET or (rest and held is None):
        return
    where = f"{where}.{name}" if where else name
    if step.endswith("[]"):
        for index, item in enumerate(held):
            yield from _values(item, rest, f"{where}[{index}]")
    elif rest:
        yield from _values(held, rest, where)
    else:
        yield where, held


def _only(accepted: tuple[Any, ...]) -> str:
    words = [str(value) for value in accepted if isinstance(value, str)]
    return f": only {' or '.join(words)} is" if words else ""
