"""The shape of the worker's configuration, with its defaults, and how to say what would allow something."""

import json
import os
import re
from fnmatch import fnmatchcase
from pathlib import Path

import msgspec

from schemas.status import Network
from schemas.values import parse_memory
from worker.machine import default_data_dir
from worker.settings import BY_KEY, Kind, Setting

LEVELS = (Network.NONE, Network.LOCALHOST, Network.OUTBOUND, Network.FULL)
ISOLATIONS = ("process", "rootfs")
KEEP, STOP = "keep", "stop"  # what the worker's own end means for its containers


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class TlsConfig(Section, frozen=True, kw_only=True):
    ca: str | None = None
    cert: str | None = None
    key: str | None = None


class NatsConfig(Section, frozen=True, kw_only=True):
    url: str = "nats://127.0.0.1:4222"
    creds: str | None = None
    nkey: str | None = None
    token_file: str | None = None
    tls: TlsConfig | None = None
    insecure: bool = False
    domain: str | None = None
    replicas: int = 1
    stream_prefix: str = "SANDFLEET"


class NodeConfig(Section, frozen=True, kw_only=True):
    """`slots` None: as many as there are CPUs."""

    name: str | None = None
    data_dir: str | None = None
    labels: dict[str, str] = {}
    pools: tuple[str, ...] = ()
    slots: int | None = None
    isolation: str = "process"
    stats_interval_s: float = 10.0
    on_shutdown: str = KEEP


class SecretsConfig(Section, frozen=True, kw_only=True):
    dir: str | None = None


class HostApiConfig(Section, frozen=True, kw_only=True):
    url: str | None = None
    socket: str | None = None
    secret_file: str | None = None
    ttl_s: float = 3600.0


class ImagesConfig(Section, frozen=True, kw_only=True):
    """How registries are reached, and how much of what they gave is kept. `plain_http` are hosts, with the port
    where they have one."""

    plain_http: tuple[str, ...] = ()
    ca: str | None = None
    docker_config: str | None = None
    max_parallel: int = 3
    max_bytes: str | int | None = None

    @property
    def limit_bytes(self) -> int | None:
        return None if self.max_bytes is None else parse_memory(self.max_bytes, field="images.max_bytes")


class VolumesConfig(Section, frozen=True, kw_only=True):
    """`s3_ca` is trusted by s3 volumes in the place of the system's roots."""

    s3_ca: str | None = None


class PolicyConfig(Section, frozen=True, kw_only=True):
    """What the node's operator grants. `secrets` maps a secret's name to patterns of services,
    `registry_secrets` to patterns of the registries that it may be sent to."""

    register_roots: tuple[str, ...] = ()
    bind_sources: tuple[str, ...] = ()
    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    secrets: dict[str, tuple[str, ...]] = {}
    registry_secrets: dict[str, tuple[str, ...]] = {}
    env: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    mach_lookup: tuple[str, ...] = ()
    unix_sockets: tuple[str, ...] = ()
    network: tuple[Network, ...] = LEVELS
    isolation: tuple[str, ...] = ISOLATIONS
    gpu: bool = False
    s3_endpoints: tuple[str, ...] = ("https://*",)
    images: tuple[str, ...] = ("*",)
    push: tuple[str, ...] = ()
    max_memory: str | int | None = None
    max_containers: int | None = None

    @property
    def max_memory_bytes(self) -> int | None:
        return None if self.max_memory is None else parse_memory(self.max_memory, field="policy.max_memory")

    def may_have_secret(self, secret: str, service: str) -> bool:
        return any(fnmatchcase(service, pattern) for pattern in self.secrets.get(secret, ()))

    def may_use_s3(self, origin: str) -> bool:
        """`origin` is `scheme://host:port`."""
        return any(fnmatchcase(origin, pattern) for pattern in self.s3_endpoints)

    def names_s3(self, origin: str) -> bool:
        """Whether a pattern says this very host, not just "any": then its address need not be public."""
        for pattern in self.s3_endpoints:
            host = pattern.partition("://")[2].rpartition(":")[0] or pattern.partition("://")[2]
            if fnmatchcase(origin, pattern) and any(char.isalnum() for char in host):
                return True
        return False

    def may_use_image(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.images)

    def may_push(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.push)


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """`source` is the file's name, "" when there is none; `origins` says where each given key was set."""

    nats: NatsConfig = NatsConfig()
    node: NodeConfig = NodeConfig()
    secrets: SecretsConfig = SecretsConfig()
    host_api: HostApiConfig = HostApiConfig()
    images: ImagesConfig = ImagesConfig()
    volumes: VolumesConfig = VolumesConfig()
    policy: PolicyConfig = PolicyConfig()
    source: str = ""
    origins: dict[str, str] = {}

    @property
    def data_dir(self) -> Path:
        """The configured one, else the default of platform and user (Configuration when there is no HOME)."""
        if self.node.data_dir is not None:
            return Path(self.node.data_dir)
        return default_data_dir(os.uname().sysname, os.environ, os.geteuid())

    @property
    def secrets_dir(self) -> Path:
        return Path(self.secrets.dir) if self.secrets.dir is not None else self.data_dir / "secrets"

    def how_to_allow(self, key: str, value: str = "") -> str:
        """What to write where so that `value` is allowed; `key` is one of `[policy]`, or a dotted one."""
        setting = BY_KEY[key if "." in key else f"policy.{key}"]
        section = f"[{setting.key if setting.kind is Kind.GRANTS else setting.section}]"
        quoted = json.dumps(value, ensure_ascii=False)
        origin = self.origins.get(setting.key, "")
        if origin == setting.env:
            return f"{_addition(setting, quoted)} in the worker's variable {origin}"
        if self.source:
            return f"{_addition(setting, quoted)} in the {section} section of {self.source}"
        return f"start the worker with --config FILE where the {section} section has {_line(setting, quoted)}"


def _addition(setting: Setting, quoted: str) -> str:
    """What to do to the setting, ending where the place is named."""
    match setting.kind:
        case Kind.GRANTS:
            return f"add the {setting.grantee} to {_key(quoted)}"
        case Kind.LIST | Kind.PATHS:
            return f"add {quoted} to {setting.name}"
        case Kind.SIZE | Kind.COUNT:
            return f"set {setting.name} to {quoted.strip(chr(34))} or more"
    return f"set {setting.name} = {_bare(setting, quoted)}"


def _line(setting: Setting, quoted: str) -> str:
    """The line of the file, as TOML."""
    match setting.kind:
        case Kind.GRANTS:
            return f'{_key(quoted)} = ["NAME OF THE {setting.grantee.upper()}"]'
        case Kind.LIST | Kind.PATHS:
            return f"{setting.name} = [{quoted}]"
    return f"{setting.name} = {_bare(setting, quoted)}"


def _key(quoted: str) -> str:
    """A key of TOML needs its quotes only when it has unusual characters."""
    return quoted[1:-1] if re.fullmatch(r'"[A-Za-z0-9_-]+"', quoted) else quoted


def _bare(setting: Setting, quoted: str) -> str:
    return quoted.strip('"') if setting.kind in (Kind.FLAG, Kind.COUNT) else quoted
