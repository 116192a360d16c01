"""From the `[nats]` settings to what a connection needs: server addresses without secrets, credentials, TLS.

Credentials, first found wins: `creds` (a .creds file), `nkey` (a seed file), `token_file`, then user and
password or a token in the URL. A client certificate (`tls.cert`, `tls.key`) counts as credentials and may
accompany any of them. Files are read again at each connect, so that they can be renewed in place; no secret
is ever part of a message.
"""

import ipaddress
import ssl
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import SplitResult, unquote, urlsplit

from nats.aio.client import RawCredentials

from worker.errors import Configuration

DEFAULT_PORT = 4222
SCHEMES = ("nats", "tls")

_JWT_MARK = "BEGIN NATS USER JWT"
_SEED_MARK = "BEGIN USER NKEY SEED"


class TlsSettings(Protocol):
    """`[nats.tls]`: files, each optional."""

    @property
    def ca(self) -> str | Path | None: ...
    @property
    def cert(self) -> str | Path | None: ...
    @property
    def key(self) -> str | Path | None: ...


class NatsSettings(Protocol):
    """What the bus reads of `worker.config.NatsConfig`."""

    @property
    def url(self) -> str: ...
    @property
    def creds(self) -> str | Path | None: ...
    @property
    def nkey(self) -> str | Path | None: ...
    @property
    def token_file(self) -> str | Path | None: ...
    @property
    def tls(self) -> TlsSettings | None: ...
    @property
    def insecure(self) -> bool: ...
    @property
    def domain(self) -> str | None: ...
    @property
    def replicas(self) -> int: ...
    @property
    def stream_prefix(self) -> str: ...


class Server:
    """One address of the fleet's servers. `name` is what its certificate must say."""

    __slots__ = ("host", "name", "port", "scheme", "secret")

    def __init__(self, scheme: str, host: str, port: int, *, secret: dict[str, str], name: str) -> None:
        self.scheme = scheme
        self.host = host
        self.port = port
        self.secret = secret
        self.name = name

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"

    def __repr__(self) -> str:
        return f"Server({self.url})"


def parse_servers(url: str) -> list[Server]:
    """The servers of a comma-separated `url`. Configuration when one is no NATS address."""
    servers = [_parse_server(part.strip()) for part in url.split(",") if part.strip()]
    if not servers:
        raise Configuration("no NATS server is configured", field="nats.url")
    return servers


def _parse_server(text: str) -> Server:
    if "://" not in text:
        text = f"nats://{text}"
    try:
        parts = urlsplit(text)
        port = parts.port or DEFAULT_PORT
    except ValueError:
        raise Configuration(f"{_without_secret(text)} is no NATS address", field="nats.url") from None
    if parts.scheme not in SCHEMES:
        raise Configuration(
            f"{_without_secret(text)}: a NATS address begins with nats:// or tls://", field="nats.url"
        )
    if not parts.hostname or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise Configuration(
            f"{_without_secret(text)} is no NATS address: expected nats://HOST:PORT", field="nats.url"
        )
    return Server(parts.scheme, parts.hostname, port, secret=_url_secret(parts), name=parts.hostname)


def learned_servers(known: list[Server], current: Server, urls: list[str]) -> list[Server]:
    """Those of `urls` (`host:port`, as a server tells of its cluster) that are not known yet."""
    found: list[Server] = []
    addresses = {(server.host, server.port) for server in known}
    for url in urls:
        host, _, port = str(url).rpartition(":")
        host = host.strip("[]")
        if not host or not _is_port(port) or (host, int(port)) in addresses:
            continue
        addresses.add((host, int(port)))
        # No certificate is issued for an address: it must say the name that was configured.
        name = current.name if _is_address(host) else host
        found.append(Server(current.scheme, host, int(port), secret=current.secret, name=name))
    return found


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 5 and 0 < int(text) < 65536


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _url_secret(parts: SplitResult) -> dict[str, str]:
    if parts.username is None:
        return {}
    if parts.password is None:
        return {"token": unquote(parts.username)}
    return {"user": unquote(parts.username), "password": unquote(parts.password)}


def _without_secret(text: str) -> str:
    scheme, separator, rest = text.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def check_credentials(cfg: NatsSettings) -> None:
    """Configuration for a worker without any credentials that was not told that this is meant."""
    if not has_credentials(cfg) and not cfg.insecure:
        raise Configuration(
            "no NATS credentials: set nats.creds, nkey, token_file, tls.cert or a user in url, "
            "or allow it with --insecure",
            field="nats",
        )


def has_credentials(cfg: NatsSettings) -> bool:
    """Whether anything here could authenticate this client."""
    if cfg.creds or cfg.nkey or cfg.token_file:
        return True
    if cfg.tls is not None and cfg.tls.cert:
        return True
    return any(server.secret for server in parse_servers(cfg.url))


def wants_tls(cfg: NatsSettings) -> bool:
    if cfg.tls is not None and (cfg.tls.ca or cfg.tls.cert):
        return True
    return any(server.scheme == "tls" for server in parse_servers(cfg.url))


def tls_context(cfg: NatsSettings) -> ssl.SSLContext | None:
    """None when plain text is what the settings ask for. Configuration when a file cannot be used."""
    if not wants_tls(cfg):
        return None
    tls = cfg.tls
    ca = _file(tls.ca, "nats.tls.ca") if tls is not None else None
    try:
        context = ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise Configuration(f"{ca}: no usable CA certificate: {error}", field="nats.tls.ca") from error
    if tls is not None and tls.cert:
        cert, key = _file(tls.cert, "nats.tls.cert"), _file(tls.key, "nats.tls.key")
        assert cert is not None
        try:
            context.load_cert_chain(cert, key)
        except (OSError, ssl.SSLError) as error:
            raise Configuration(
                f"{cert}: no usable client certificate: {error}", field="nats.tls.cert"
            ) from error
    return context


def connect_options(cfg: NatsSettings, server: Server) -> dict[str, Any]:
    """The credentials for `server` as arguments of nats-py's connect. Configuration when a file cannot be
    used.
    """
    if cfg.creds:
        path = _file(cfg.creds, "nats.creds")
        text = "\n".join(_read(path, "nats.creds").splitlines()) + "\n"
        # nats-py reads for ever when the first mark is missing.
        if _JWT_MARK not in text or _SEED_MARK not in text:
            raise Configuration(f"{path} is no NATS credentials file", field="nats.creds")
        _seed_in(text, path, "nats.creds")
        return {"user_credentials": RawCredentials(text)}
    if cfg.nkey:
        path = _file(cfg.nkey, "nats.nkey")
        return {"nkeys_seed_str": _seed_in(_read(path, "nats.nkey"), path, "nats.nkey")}
    if cfg.token_file:
        path = _file(cfg.token_file, "nats.token_file")
        token = _read(path, "nats.token_file").strip()
        if not token:
            raise Configuration(f"{path} is empty", field="nats.token_file")
        return {"token": token}
    return dict(server.secret)


def _file(path: str | Path | None, field: str) -> str | None:
    if not path:
        return None
    full = Path(path).expanduser()
    if not full.is_file():
        raise Configuration(f"{full} is not there or no file", field=field)
    return str(full)


def _read(path: str | None, field: str) -> str:
    assert path is not None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise Configuration(f"{path} cannot be read: {reason}", field=field) from None


def _seed_in(text: str, path: str | None, field: str) -> str:
    """The user seed in `text`, bare or between its BEGIN and END lines."""
    import nkeys  # and with it libsodium: only for those who have keys

    for line in text.splitlines():
        seed = line.strip()
        if not seed.startswith("SU"):
            continue
        try:
            nkeys.from_seed(bytearray(seed.encode())).wipe()
        except (nkeys.NkeysError, ValueError):
            break
        return seed
    raise Configuration(f"{path} holds no NATS user seed", field=field)
