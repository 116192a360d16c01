"""One connection to a host, on which no wait is unbounded: neither by silence nor by a drip of bytes.

Blocking, for a thread. The socket's own time-out is short, so that a signal to stop is seen at once.
"""

import io
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any

import msgspec

from worker.errors import PolicyDenied

from .addresses import NOT_PUBLIC, refused
from .failures import TransportError
from .patience import Patience
from .stopping import StopSignal

_TICK_S = 0.25
# Less than what a layer is read in, whose bytes then go past this buffer.
BUFFER_BYTES = 64 * 1024
MAX_HEAD_BYTES = 256 * 1024 + BUFFER_BYTES

Resolve = Callable[[str, int], list[str]]


class Origin(msgspec.Struct, frozen=True):
    """Scheme, host and port: what credentials belong to."""

    scheme: str
    host: str
    port: int

    @property
    def netloc(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        usual = 443 if self.scheme == "https" else 80
        return host if self.port == usual else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.netloc}"


def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host, in the system's order."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class Dialer:
    """Makes connections for one registry. `private`: it may be at an address that is not public."""

    def __init__(
        self,
        tls: ssl.SSLContext,
        patience: Patience,
        stop: StopSignal,
        *,
        private: bool,
        how_to_allow: str = "",
        resolve: Resolve = resolve,
    ) -> None:
        self._tls = tls
        self._patience = patience
        self._stop = stop
        self._private = private
        self._how_to_allow = how_to_allow
        self._resolve = resolve

    def dial(self, origin: Origin) -> "Channel":
        """Raises TransportError, or PolicyDenied when the host has no address that may be connected to."""
        sock = self._connect(origin)
        try:
            if origin.scheme == "https":
                sock = self._secured(sock, origin)
            sock.settimeout(_TICK_S)
        except BaseException:
            sock.close()
            raise
        return Channel(sock, origin, self._patience, self._stop)

    def _connect(self, origin: Origin) -> socket.socket:
        failure: TransportError | None = None
        for address in self._addresses(origin):
            self._stop.check()
            try:
                return self._try(address, origin)
            except TransportError as one:
                failure = failure or one
        raise failure or TransportError(f"{origin.netloc}: has no address", again=False)

    def _addresses(self, origin: Origin) -> list[str]:
        """Looked up once and connected to as they are: a name that changes meanwhile gains nothing."""
        try:
            found = self._resolve(origin.host, origin.port)
        except socket.gaierror as failure:
            again = failure.errno == socket.EAI_AGAIN
            raise TransportError(f"{origin.host}: {failure.strerror}", again=again, absent=True) from failure
        except (OSError, UnicodeError) as failure:
            raise TransportError(f"{origin.host}: {failure}", again=False) from failure
        reasons = {address: refused(address, private=self._private) for address in found}
        allowed = [address for address, reason in reasons.items() if reason is None]
        if found and not allowed:
            # The address is not told: whoever may publish commands learns no name of the node's network.
            reason = next(iter(reasons.values()))
            hint = self._how_to_allow if reason == NOT_PUBLIC else ""
            raise PolicyDenied(f"{origin.netloc} is at {reason}{hint}", field="image")
        return allowed

    def _try(self, address: str, origin: Origin) -> socket.socket:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.settimeout(self._patience.connect_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.connect((address, origin.port))
        except TimeoutError as failure:
            sock.close()
            raise TransportError(
                f"{origin.netloc}: no answer from {address}", again=True, absent=True
            ) from failure
        except OSError as failure:
            sock.close()
            raise TransportError(
                f"{origin.netloc}: {failure.strerror} ({address})", again=True, absent=True
            ) from failure
        return sock

    def _secured(self, sock: socket.socket, origin: Origin) -> ssl.SSLSocket:
        try:
            return self._tls.wrap_socket(sock, server_hostname=origin.host)
        except ssl.SSLCertVerificationError as failure:
            reason = f"{origin.netloc}: the certificate is not trusted: {failure.verify_message}"
            raise TransportError(reason, again=False) from failure
        except ssl.SSLError as failure:
            reason = f"{origin.netloc}: no TLS there: {failure.reason or failure}"
            raise TransportError(reason, again=False) from failure
        except (OSError, ValueError) as failure:
            raise TransportError(f"{origin.netloc}: TLS failed: {failure}", again=True) from failure


class Channel:
    """What `http.client` takes for a socket. Who closes a response does not close it."""

    def __init__(self, sock: socket.socket, origin: Origin, patience: Patience, stop: StopSignal) -> None:
        self.origin = origin
        self._sock = sock
        self._patience = patience
        self._stop = stop
        self._head = True
        self._begin(patience.headers_s)

    def close(self) -> None:
        self._sock.close()

    def makefile(self, mode: str, buffering: int = -1) -> io.BufferedReader:
        return io.BufferedReader(_Incoming(self), BUFFER_BYTES)

    def sendall(self, data: Any) -> None:
        """A request's head and its small body."""
        self._head = True
        self._begin(self._patience.headers_s)
        view = memoryview(data).cast("B")
        while view:
            try:
                view = view[self._sock.send(view) :]
            except TimeoutError:
                self._tick()
            except (ssl.SSLError, OSError) as failure:
                raise self._broken(failure) from failure

    def body(self) -> None:
        """The head has been read: from here on it is the flow that counts."""
        self._head = False
        self._begin(self._patience.slow_s)

    def _begin(self, period_s: float) -> None:
        now = time.monotonic()
        self._period_end = now + period_s
        self._last = now
        self._received = 0

    def receive(self, into: Any) -> int:
        """Some bytes, 0 at the end. TransportError when the other side went silent, slow or away."""
        while True:
            self._stop.check()
            try:
                count = self._sock.recv_into(into)
            except TimeoutError:
                self._tick()
                continue
            except (ssl.SSLError, OSError) as failure:
                raise self._broken(failure) from failure
            self._account(count)
            return count

    def _account(self, count: int) -> None:
        now = time.monotonic()
        self._last = now
        self._received += count
        if self._head and self._received > MAX_HEAD_BYTES:
            raise TransportError(f"{self.origin.netloc}: the head of the answer does not end", again=False)
        if now > self._period_end:
            self._period_over()

    def _tick(self) -> None:
        self._stop.check()
        now = time.monotonic()
        if now > self._last + self._patience.idle_s:
            raise TransportError(f"{self.origin.netloc}: silent for {self._patience.idle_s:g} s", again=True)
        if now > self._period_end:
            self._period_over()

    def _period_over(self) -> None:
        if self._head:
            raise TransportError(
                f"{self.origin.netloc}: no whole answer in {self._patience.headers_s:g} s", again=True
            )
        if self._received < self._patience.slow_bytes:
            raise TransportError(
                f"{self.origin.netloc}: only {self._received} bytes in {self._patience.slow_s:g} s",
                again=True,
            )
        self._begin(self._patience.slow_s)

    def _broken(self, failure: OSError) -> TransportError:
        return TransportError(
            f"{self.origin.netloc}: the connection broke: {failure.strerror or failure}", again=True
        )


class _Incoming(io.RawIOBase):
    """The bytes of a channel as a file, which outlives the reader that closes it."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        return self._channel.receive(into)
