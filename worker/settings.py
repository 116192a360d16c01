"""Every setting of a node as data: its key in the file, its variable, its flag, and what it does.

The settings stand in a TOML file; a variable of the environment goes above it, a flag above both. The
variable of `[section] key` is SANDFLEET_SECTION_KEY, but for the two short ones SANDFLEET_NODE and
SANDFLEET_DATA_DIR. In a variable a list is written `a,b`, a map `k=v,k2=v2`, and either may be JSON; a map of
lists is always JSON. An empty variable counts as not set.
"""

import json
from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Any

import msgspec


class Kind(StrEnum):
    """How a setting is written."""

    TEXT = "text"
    PATH = "path"  # in the file relative to it, else to the working directory
    FLAG = "true or false"
    COUNT = "number"
    SECONDS = "duration"
    SIZE = "size"
    LIST = "list"
    PATHS = "list of absolute paths"
    MAP = "map"
    GRANTS = "map of lists"


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """`default` is for the reader; the struct in `worker.config` has the real one. `grantee` is what the
    lists of a map of lists name."""

    key: str
    kind: Kind
    doc: str
    default: str = ""
    flag: str | None = None
    variable: str | None = None
    grantee: str = "service"

    @property
    def env(self) -> str:
        return self.variable or "SANDFLEET_" + self.key.upper().replace(".", "_")

    @property
    def section(self) -> str:
        return self.key.rpartition(".")[0]

    @property
    def name(self) -> str:
        return self.key.rpartition(".")[2]


CONFIG_VARIABLE = "SANDFLEET_CONFIG"

SETTINGS: tuple[Setting, ...] = (
    Setting(
        key="nats.url",
        kind=Kind.TEXT,
        flag="--nats",
        default="nats://127.0.0.1:4222",
        doc="the server, or several separated by commas; tls:// for an encrypted connection",
    ),
    Setting(key="nats.creds", kind=Kind.PATH, flag="--creds", doc="file with the node's JWT and seed"),
    Setting(key="nats.nkey", kind=Kind.PATH, doc="file with the node's nkey seed"),
    Setting(key="nats.token_file", kind=Kind.PATH, doc="file with a token"),
    Setting(key="nats.tls.ca", kind=Kind.PATH, doc="certificates that the server's is checked against"),
    Setting(key="nats.tls.cert", kind=Kind.PATH, doc="the client's certificate; goes with nats.tls.key"),
    Setting(key="nats.tls.key", kind=Kind.PATH, doc="the client's private key"),
    Setting(
        key="nats.insecure",
        kind=Kind.FLAG,
        flag="--insecure",
        default="false",
        doc="start without any credentials: whoever reaches the server commands the node",
    ),
    Setting(key="nats.domain", kind=Kind.TEXT, doc="JetStream domain of the streams (a leaf node's site)"),
    Setting(
        key="nats.replicas", kind=Kind.COUNT, default="1", doc="replicas of the streams that --setup makes"
    ),
    Setting(
        key="nats.stream_prefix", kind=Kind.TEXT, default="SANDFLEET", doc="begins the names of the streams"
    ),
    Setting(
        key="node.name",
        kind=Kind.TEXT,
        flag="--node",
        variable="SANDFLEET_NODE",
        default="the host's name",
        doc="the node's name in every subject; kept once it was used",
    ),
    Setting(
        key="node.data_dir",
        kind=Kind.PATH,
        flag="--data-dir",
        variable="SANDFLEET_DATA_DIR",
        default="by platform and user",
        doc="where the node keeps its journal, images, volumes and containers",
    ),
    Setting(key="node.labels", kind=Kind.MAP, doc="labels for schedulers, told in NodeInfo"),
    Setting(key="node.pools", kind=Kind.LIST, doc="pools whose jobs this node takes"),
    Setting(
        key="node.slots",
        kind=Kind.COUNT,
        default="the CPUs",
        doc="how many containers run at a time; when not set, told to schedulers but not enforced",
    ),
    Setting(
        key="node.isolation",
        kind=Kind.TEXT,
        default="process",
        doc="what `auto` means in a spec: process or rootfs",
    ),
    Setting(
        key="node.stats_interval_s",
        kind=Kind.SECONDS,
        default="10",
        doc="time between two samples of a container",
    ),
    Setting(
        key="node.on_shutdown",
        kind=Kind.TEXT,
        default="keep",
        doc="whether containers go on (keep) or are stopped (stop) when the worker is told to end",
    ),
    Setting(
        key="secrets.dir",
        kind=Kind.PATH,
        default="{data_dir}/secrets",
        doc="folder of the secrets, a file of mode 0600 for each",
    ),
    Setting(key="host_api.url", kind=Kind.TEXT, doc="address of the host API that containers are told"),
    Setting(
        key="host_api.socket", kind=Kind.PATH, doc="its unix socket, which every container may connect to"
    ),
    Setting(
        key="host_api.secret_file",
        kind=Kind.PATH,
        doc="file with the key that signs the containers' tokens: mode 0600, 32 bytes or more",
    ),
    Setting(
        key="host_api.ttl_s",
        kind=Kind.SECONDS,
        default="3600",
        doc="how long such a token is good; its file is renewed at half of that",
    ),
    Setting(
        key="images.plain_http",
        kind=Kind.LIST,
        doc="registries (host or host:port) that are spoken to without TLS",
    ),
    Setting(
        key="images.ca", kind=Kind.PATH, doc="certificates that registries may have besides the system's"
    ),
    Setting(
        key="images.docker_config",
        kind=Kind.PATH,
        doc="a config.json of Docker's with credentials for registries, or their helpers",
    ),
    Setting(key="images.max_parallel", kind=Kind.COUNT, default="3", doc="layers that are fetched at a time"),
    Setting(
        key="images.max_bytes",
        kind=Kind.SIZE,
        doc='the most that the image store keeps, such as "50Gi"; the longest unused go first',
    ),
    Setting(
        key="volumes.s3_ca",
        kind=Kind.PATH,
        doc="certificates that s3 volumes trust in the place of the system's",
    ),
    Setting(key="policy.register_roots", kind=Kind.PATHS, doc="folders below which register_image may read"),
    Setting(key="policy.bind_sources", kind=Kind.PATHS, doc="folders below which bind mounts may begin"),
    Setting(key="policy.read", kind=Kind.PATHS, doc="folders that sandbox.read may open"),
    Setting(key="policy.write", kind=Kind.PATHS, doc="folders that sandbox.write may open"),
    Setting(key="policy.secrets", kind=Kind.GRANTS, doc="which services (patterns) may have which secret"),
    Setting(
        key="policy.registry_secrets",
        kind=Kind.GRANTS,
        grantee="registry",
        doc="to which registries (patterns) a pull may send which secret",
    ),
    Setting(key="policy.env", kind=Kind.LIST, doc="variables of the worker that `$E:` may read"),
    Setting(key="policy.groups", kind=Kind.LIST, doc="sandbox groups beyond the harmless ones"),
    Setting(key="policy.mach_lookup", kind=Kind.LIST, doc="Mach services (patterns) that may be looked up"),
    Setting(key="policy.unix_sockets", kind=Kind.PATHS, doc="sockets that may be connected to"),
    Setting(
        key="policy.network",
        kind=Kind.LIST,
        default="none, localhost, outbound, full",
        doc="network levels that a spec may ask for",
    ),
    Setting(
        key="policy.isolation",
        kind=Kind.LIST,
        default="process, rootfs",
        doc="isolations that a spec may ask for",
    ),
    Setting(
        key="policy.gpu", kind=Kind.FLAG, default="true on a Mac", doc="whether a container may have the GPU"
    ),
    Setting(
        key="policy.s3_endpoints",
        kind=Kind.LIST,
        default="https://*",
        doc="where s3 volumes may be: patterns of scheme://host:port, the port written out",
    ),
    Setting(
        key="policy.images",
        kind=Kind.LIST,
        default="*",
        doc="names (patterns) of the images that may be used",
    ),
    Setting(
        key="policy.push",
        kind=Kind.LIST,
        doc="names (patterns) that images of this node may be pushed as",
    ),
    Setting(key="policy.max_memory", kind=Kind.SIZE, doc='the most memory of one container, such as "2Gi"'),
    Setting(key="policy.max_containers", kind=Kind.COUNT, doc="the most containers that exist at a time"),
)

BY_KEY: Mapping[str, Setting] = MappingProxyType({setting.key: setting for setting in SETTINGS})
SECTIONS: frozenset[str] = frozenset(setting.section for setting in SETTINGS)

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")


def parse_text(setting: Setting, text: str) -> Any:
    """The value of a variable, as the file would have given it. ValueError says what was expected."""
    match setting.kind:
        case Kind.FLAG:
            if text.lower() not in (*_TRUE, *_FALSE):
                raise ValueError("expected true or false")
            return text.lower() in _TRUE
        case Kind.COUNT:
            return _number(text, int, "a whole number")
        case Kind.SECONDS:
            try:
                return float(text)
            except ValueError:
                return text
        case Kind.LIST | Kind.PATHS:
            if text.startswith("["):
                return _json(text)
            return [part.strip() for part in text.split(",") if part.strip()]
        case Kind.MAP if not text.startswith("{"):
            pairs = [part.partition("=") for part in text.split(",") if part.strip()]
            if not all(equals and name.strip() for name, equals, _ in pairs):
                raise ValueError("expected name=value,name=value")
            return {name.strip(): value.strip() for name, _, value in pairs}
        case Kind.MAP | Kind.GRANTS:
            return _json(text)
    return text


def _number(text: str, kind: type[int], what: str) -> int:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"expected {what}") from None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("expected JSON") from None
