"""The parts of a ServiceSpec about where it may run and how often: for schedulers."""

# ruff: noqa: RUF012 (msgspec copies an empty default)

from enum import StrEnum
from typing import Annotated

import msgspec

from .spec_life import InitFailure
from .spec_parts import U32, CommandSpec, Duration, ImageSpec, Part, Percent, ResourcesSpec


class ScaleTargets(Part, frozen=True, kw_only=True):
    cpu: Percent | None = None
    memory: Percent | None = None
    rps: U32 | None = None


class FixedScale(Part, frozen=True, kw_only=True, tag_field="mode", tag="fixed"):
    replicas: U32


class AdaptiveScale(Part, frozen=True, kw_only=True, tag_field="mode", tag="adaptive"):
    min: U32
    max: U32
    cooldown: Duration | None = None
    targets: ScaleTargets = ScaleTargets()


class ManualScale(Part, frozen=True, kw_only=True, tag_field="mode", tag="manual"):
    pass


ScaleSpec = FixedScale | AdaptiveScale | ManualScale
DEFAULT_SCALE = AdaptiveScale(min=1, max=10, cooldown="30s")


class DependsCondition(StrEnum):
    STARTED = "started"
    HEALTHY = "healthy"
    READY = "ready"


class DependsSpec(Part, frozen=True, kw_only=True):
    service: str
    condition: DependsCondition = DependsCondition.HEALTHY
    timeout: Duration | None = "300s"
    on_timeout: InitFailure = InitFailure.FAIL


class NodeSelector(Part, frozen=True, kw_only=True):
    labels: dict[str, str] = {}
    prefer_labels: dict[str, str] = {}


class PinAffinity(Part, frozen=True, kw_only=True):
    pin: str


class ReplicaGroup(Part, frozen=True, kw_only=True):
    role: str
    count: Annotated[int, msgspec.Meta(ge=1, le=2**32 - 1)]
    image: ImageSpec | None = None
    env: dict[str, str] = {}
    command: CommandSpec | None = None
    resources: ResourcesSpec | None = None
    affinity: str | PinAffinity = "spread"


class Os(StrEnum):
    LINUX = "linux"
    WINDOWS = "windows"
    MACOS = "macos"


class Arch(StrEnum):
    AMD64 = "amd64"
    ARM64 = "arm64"


class TargetPlatform(Part, frozen=True, kw_only=True):
    os: Os
    arch: Arch
    os_version: str | None = msgspec.field(default=None, name="osVersion")


class NodeMode(StrEnum):
    SHARED = "shared"
    DEDICATED = "dedicated"
    EXCLUSIVE = "exclusive"


class WindowsIsolation(StrEnum):
    AUTO = "auto"
    PROCESS = "process"
    HYPERV = "hyperv"


class RType(StrEnum):
    SERVICE = "service"
    JOB = "job"
    CRON = "cron"


class ServiceType(StrEnum):
    STANDARD = "standard"
    JOB = "job"
    WASM_HTTP = "wasm_http"
    WASM_PLUGIN = "wasm_plugin"
    WASM_TRANSFORMER = "wasm_transformer"
    WASM_AUTHENTICATOR = "wasm_authenticator"
    WASM_RATE_LIMITER = "wasm_rate_limiter"
    WASM_MIDDLEWARE = "wasm_middleware"
    WASM_ROUTER = "wasm_router"
