"""The parts of a ServiceSpec that say what talks to what."""

# ruff: noqa: RUF012 (msgspec copies an empty default)

from enum import StrEnum

import msgspec

from .spec_parts import U16, Duration, Part, Port


class NetworkAccess(StrEnum):
    AUTO = "auto"
    NONE = "none"
    LOCALHOST = "localhost"
    OUTBOUND = "outbound"
    FULL = "full"


class OverlayPart(Part, frozen=True, kw_only=True):
    enabled: bool = True
    encrypted: bool = True
    isolated: bool = False


_NO_OVERLAY = OverlayPart(enabled=False, encrypted=False, isolated=False)


class OverlaysSpec(Part, frozen=True, kw_only=True):
    """The reference's trap: with `overlays` written, a part that is left out is all false."""

    service: OverlayPart = _NO_OVERLAY
    global_: OverlayPart = msgspec.field(default=_NO_OVERLAY, name="global")


DEFAULT_OVERLAYS = OverlaysSpec(service=OverlayPart(isolated=True), global_=OverlayPart())


class JoinMode(StrEnum):
    OPEN = "open"
    TOKEN = "token"
    CLOSED = "closed"


class JoinScope(StrEnum):
    SERVICE = "service"
    GLOBAL = "global"


class JoinSpec(Part, frozen=True, kw_only=True):
    mode: JoinMode = JoinMode.TOKEN
    scope: JoinScope = JoinScope.SERVICE


class NetworkSpec(Part, frozen=True, kw_only=True):
    access: NetworkAccess = NetworkAccess.AUTO
    connect_ports: list[Port] = []
    overlays: OverlaysSpec = DEFAULT_OVERLAYS
    join: JoinSpec = JoinSpec()


class Protocol(StrEnum):
    HTTP = "http"
    HTTPS = "https"
    TCP = "tcp"
    UDP = "udp"
    WEBSOCKET = "websocket"


class Expose(StrEnum):
    PUBLIC = "public"
    INTERNAL = "internal"


class TcpConnectCheck(Part, frozen=True, kw_only=True, tag_field="type", tag="tcp_connect"):
    pass


class UdpProbeCheck(Part, frozen=True, kw_only=True, tag_field="type", tag="udp_probe"):
    request: str
    expect: str | None = None


class StreamProxySpec(Part, frozen=True, kw_only=True):
    tls: bool = False
    proxy_protocol: bool = False
    session_timeout: Duration | None = None
    health_check: TcpConnectCheck | UdpProbeCheck | None = None


class TunnelAccess(Part, frozen=True, kw_only=True):
    enabled: bool = False
    max_ttl: Duration | None = None
    audit: bool = False


class EndpointTunnel(Part, frozen=True, kw_only=True):
    enabled: bool = False
    from_: str | None = msgspec.field(default=None, name="from")
    to: str | None = None
    remote_port: U16 = 0
    expose: Expose | None = None
    access: TunnelAccess | None = None


class EndpointSpec(Part, frozen=True, kw_only=True):
    name: str
    protocol: Protocol
    port: Port
    target_port: Port | None = None
    path: str | None = None
    host: str | None = None
    expose: Expose = Expose.INTERNAL
    stream: StreamProxySpec | None = None
    target_role: str | None = None
    tunnel: EndpointTunnel | None = None

    @property
    def listen_port(self) -> int:
        """What the program listens on."""
        return self.target_port or self.port


class PortMapping(Part, frozen=True, kw_only=True):
    host_port: U16 | None = None
    container_port: Port
    protocol: str = "tcp"
    host_ip: str = "0.0.0.0"


class BridgeNetwork(Part, frozen=True, kw_only=True):
    name: str | None = None


class ContainerNetwork(Part, frozen=True, kw_only=True):
    id: str


class NetworkModeMap(Part, frozen=True, kw_only=True):
    """The map form of `network_mode`: one key."""

    bridge: BridgeNetwork | None = None
    container: ContainerNetwork | None = None


class OverlayMode(StrEnum):
    AUTO = "auto"
    SHARED = "shared"
    DEDICATED = "dedicated"


class OverlayPlacement(Part, frozen=True, kw_only=True):
    mode: OverlayMode = OverlayMode.AUTO
    parent: str | None = None


class Reachability(StrEnum):
    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"
