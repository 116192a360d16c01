"""From addresses and credentials to one open connection. Knows which server to try; `Bus` knows when."""

import asyncio
import ssl
from collections.abc import Callable
from typing import Any

from nats import errors as nats_errors

from worker.bus.credentials import (
    NatsSettings,
    connect_options,
    has_credentials,
    learned_servers,
    parse_servers,
    tls_context,
)
from worker.bus.probe import CONNECT_TIMEOUT_S, Refused, ServerInfo, probe
from worker.bus.wire import ConnectFailed, WireClient
from worker.errors import Configuration

MIN_PAYLOAD_BYTES = 288 * 1024  # a log chunk of 256 KiB with its headers


class Dialer:
    """The first of `servers` is the one in use or to be tried next. Configuration: the settings are no
    good.
    """

    def __init__(self, cfg: NatsSettings, *, name: str, inbox_prefix: str, needs_payload: bool) -> None:
        self.insecure = not has_credentials(cfg)
        self.servers = parse_servers(cfg.url)
        self._cfg = cfg
        self._name = name
        self._inbox_prefix = inbox_prefix
        self._needs_payload = needs_payload
        self._tls: ssl.SSLContext | None = tls_context(cfg)
        self._has_certificate = cfg.tls is not None and bool(cfg.tls.cert)
        self._handshake_first = False

    async def find(self) -> None:
        """Put the first server that answers in front. Refused when none does, Configuration when what answers
        will not do.
        """
        refused: Refused | None = None
        for number, server in enumerate(self.servers):
            try:
                info = await probe(server, tls=self._tls, authenticated=not self.insecure)
            except Refused as failure:
                refused = refused or failure
                continue
            self._judge(info, server.url)
            self._handshake_first = info.handshake_first
            self.servers.insert(0, self.servers.pop(number))
            return
        assert refused is not None
        raise refused

    async def dial(
        self, *, on_down: Callable[[WireClient], None], on_error: Callable[[Exception], None]
    ) -> WireClient:
        """A connection to the first server. Configuration, or Refused, which may pass."""
        server = self.servers[0]
        options = connect_options(self._cfg, server)
        if self._tls is not None:
            options |= {
                "tls": self._tls,
                "tls_hostname": server.name,
                "tls_handshake_first": self._handshake_first,
            }

        def learn(info: dict[str, Any]) -> None:
            self.servers += learned_servers(self.servers, server, info.get("connect_urls") or [])

        secure = self._tls is not None
        client = WireClient(secure=secure, on_down=on_down, on_error=on_error, on_info=learn)
        try:
            await client.open(
                server.url,
                name=self._name,
                inbox_prefix=self._inbox_prefix,
                connect_timeout_s=CONNECT_TIMEOUT_S,
                **options,
            )
        except ConnectFailed as failure:
            raise self._failed(failure, client) from None
        learn(client.info)
        return client

    def try_next(self) -> None:
        self.servers.append(self.servers.pop(0))

    def _judge(self, info: ServerInfo, url: str) -> None:
        if not info.headers:
            raise Configuration(f"the NATS server at {url} does not support headers")
        if self._needs_payload and info.max_payload < MIN_PAYLOAD_BYTES:
            raise Configuration(
                f"the NATS server at {url} takes messages of {info.max_payload} bytes: "
                f"max_payload must be at least {MIN_PAYLOAD_BYTES}"
            )

    def _failed(self, failure: ConnectFailed, client: WireClient) -> Configuration | Refused:
        url, why = self.servers[0].url, str(failure)
        if self._tls is not None and client.info.get("tls_verify") and not self._has_certificate:
            # With TLS 1.3 the refusal comes after the handshake, and may look like any broken connection.
            return Configuration(
                f"the NATS server at {url} wants a client certificate (TLS)", field="nats.tls"
            )
        if "authorization" in why.lower() or "authentication" in why.lower():
            return Configuration(f"the NATS server at {url} refuses the credentials", field="nats")
        if isinstance(failure.__cause__, ssl.SSLError | nats_errors.SecureConnWantedError):
            return Configuration(f"no TLS connection to {url}: {why}", field="nats.tls")
        return Refused(f"{url}: {why}")


def cancellations() -> int:
    """How often this task was asked to end. asyncio.wait_for of Python 3.11, which nats-py uses, gives the
    exception of what it waits for instead of a cancellation that comes at the same time.
    """
    task = asyncio.current_task()
    return task.cancelling() if task is not None else 0
