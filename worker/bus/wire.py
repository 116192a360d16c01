"""nats-py's client with what it lacks for a worker that must run for months. Each override names its reason.

It never reconnects by itself: a connection that broke is thrown away whole, with everything it had
buffered, and `Bus` makes a new one. So nothing that was given up is sent later, and the states from which
nats-py does not come back (it closes for good on most `-ERR`) do not matter.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from nats import errors as nats_errors
from nats.aio.client import Client

from worker.bus.probe import check_version
from worker.errors import Configuration

PING_INTERVAL_S = 10
PINGS_UNANSWERED = 2
# Never reached: back-pressure is the Bus's (nats-py's own swallows a cancellation that comes while it waits).
PENDING_LIMIT_BYTES = 1 << 30
_PING = b"PING\r\n"


class ConnectFailed(Exception):
    """Aborts nats-py's endless first connect at its first error, which is the cause."""


class WireClient(Client):
    """One connection. `on_error` gets what nats-py reports out of band, `on_down` the client itself as soon
    as it begins to close, `on_info` what the server tells of itself and its cluster while it is open: a server
    that was connected to before it had found the others names them only then.
    """

    def __init__(
        self,
        *,
        secure: bool,
        on_down: Callable[["WireClient"], None],
        on_error: Callable[[Exception], None],
        on_info: Callable[[dict[str, Any]], None],
    ) -> None:
        super().__init__()
        self._secure = secure
        self._down = on_down
        self._report = on_error
        self._tell = on_info
        self._opened = False
        self.info: dict[str, Any] = {}

    async def open(
        self,
        url: str,
        *,
        name: str,
        inbox_prefix: str,
        connect_timeout_s: int,
        **options: Any,
    ) -> None:
        """Connect once. Raises ConnectFailed; the client is closed then."""
        try:
            await self.connect(
                servers=[url],
                name=name,
                inbox_prefix=inbox_prefix,
                connect_timeout=connect_timeout_s,
                allow_reconnect=False,
                max_reconnect_attempts=0,
                ping_interval=PING_INTERVAL_S,
                max_outstanding_pings=PINGS_UNANSWERED,
                pending_size=PENDING_LIMIT_BYTES,
                error_cb=self._on_error,
                no_echo=False,
                **options,
            )
            self._opened = True
        except BaseException:
            self._opened = True  # errors while closing are only reported
            # nats-py waits for ever for the end of a stream whose upgrade to TLS failed.
            transport, self._transport = self._transport, None
            if transport is not None:
                transport.close()  # type: ignore[no-untyped-call]
            await self.close()
            raise

    async def _on_error(self, error: Exception) -> None:
        if not self._opened:
            raise ConnectFailed(describe(error)) from error
        self._report(error)

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        """Told at once: a TLS connection to a peer that vanished takes half a minute to close."""
        if not self.is_closed:
            self._down(self)
        await super()._close(status, do_cbs)

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        """Before CONNECT, so before any credential: no plain text where TLS is wanted, no server that is
        too old.

        nats-py itself upgrades only when the server requires TLS.
        """
        if initial_connection:
            if self._secure:
                if not (info.get("tls_required") or info.get("tls_available")):
                    raise nats_errors.SecureConnWantedError
                info["tls_required"] = True
            try:
                check_version(str(info.get("version", "")), "this address")
            except Configuration as old:
                raise nats_errors.Error(old.message) from old
        self.info = {**self.info, **info}
        await super()._process_info(info, initial_connection)
        if self._opened:
            self._tell(self.info)

    async def _send_ping(self, future: "asyncio.Future[Any] | None" = None) -> None:
        """In its place behind what is pending: nats-py writes it ahead, and a flush then proves nothing."""
        self._pongs.append(future if future is not None else asyncio.get_running_loop().create_future())
        await self._send_command(_PING)
        await self._flush_pending()

    async def _process_pong(self) -> None:
        """A waiter that was cancelled must not raise in the read loop, which would end it."""
        if self._pongs and self._pongs[0].done():
            self._pongs.pop(0)
            self._pongs_received += 1
            self._pings_outstanding = 0
            return
        await super()._process_pong()

    async def ping(self, future: "asyncio.Future[Any]") -> None:
        """`future` is resolved once the server has processed all that was sent before."""
        await self._send_ping(future)


def describe(error: BaseException) -> str:
    """One line about a connection's failure."""
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        return "no answer in time"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).removeprefix("nats: ") or type(error).__name__
