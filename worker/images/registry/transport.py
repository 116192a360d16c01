"""HTTP with one registry and the hosts it refers to: TLS, redirects, kept connections, bounded answers.

`http.client` reads the answers; what it lacks stands here and in `channel`. Credentials go to the origin they
were given for and to no other, whatever a redirect says.
"""

import http.client
import os
import re
import ssl
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote, urljoin, urlsplit

import msgspec

from worker.errors import Configuration

from .channel import Channel, Dialer, Origin
from .failures import TransportError
from .patience import parse_retry_after

MAX_REDIRECTS = 5
MAX_ERROR_BYTES = 16 * 1024
_MAX_URL = 8192
_MAX_IDLE = 8
_REDIRECTS = (301, 302, 303, 307, 308)
_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# macOS has its roots there too, for programs without a keychain (Python's own installer sets none up).
_SYSTEM_ROOTS = "/etc/ssl/cert.pem"


def tls_context(ca: Path | None) -> ssl.SSLContext:
    """The system's roots, and those of a file of the operator's. Configuration when it cannot be read."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ssl.get_default_verify_paths().cafile is None and os.path.exists(_SYSTEM_ROOTS):
        context.load_verify_locations(_SYSTEM_ROOTS)
    if ca is not None:
        try:
            context.load_verify_locations(ca)
        except OSError as failure:  # ssl.SSLError is one
            raise Configuration(f"images.ca: {ca} cannot be used: {failure}", field="images.ca") from failure
    return context


class Answer:
    """A response whose body has not been read. Close it, or read all of it."""

    def __init__(self, raw: http.client.HTTPResponse, channel: Channel, url: str, http: "Http") -> None:
        self.status = raw.status
        self.headers = raw.headers
        self.url = url
        self.origin = channel.origin
        self._raw = raw
        self._channel = channel
        self._http = http
        # None: the end is where the chunks or the connection end.
        self._left = raw.length
        self._open = True
        if self._left == 0:
            self._finish()

    @property
    def length(self) -> int | None:
        """How much is still to come, where that was said."""
        return self._left

    def read_into(self, view: memoryview) -> int:
        """What has arrived, at least one byte; 0 at the proper end.

        TransportError when it breaks off.
        """
        if not self._open:
            return 0
        try:
            count = self._read(view)
        except (http.client.HTTPException, ValueError) as failure:
            self.close()
            raise self._broken() from failure
        except BaseException:
            self.close()
            raise
        if self._left is not None:
            self._left -= count
            if self._left == 0:
                self._finish()
            elif count == 0:
                self.close()
                raise self._broken()
        elif count == 0:
            self._finish()
        return count

    def _read(self, view: memoryview) -> int:
        if self._left is None:
            data = self._raw.read1(len(view))
            view[: len(data)] = data
            return len(data)
        file = cast("Any", self._raw.fp)
        return int(file.readinto1(view[: self._left]))

    def read(self, limit: int) -> bytes:
        """The whole body; TransportError when it is larger than `limit`."""
        content = bytearray()
        buffer = memoryview(bytearray(min(limit + 1, 64 * 1024)))
        while count := self.read_into(buffer):
            content += buffer[:count]
            if len(content) > limit:
                self.close()
                raise TransportError(
                    f"{self.origin.netloc}: the answer is larger than {limit} bytes", again=False
                )
        return bytes(content)

    def read_start(self, limit: int) -> bytes:
        """The first bytes of a body that is only looked at, and closed."""
        buffer = memoryview(bytearray(limit))
        filled = 0
        try:
            while filled < limit and (count := self.read_into(buffer[filled:])):
                filled += count
        except TransportError:
            pass  # what has come is all there is to look at
        finally:
            self.close()
        return bytes(buffer[:filled])

    def __enter__(self) -> "Answer":
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def close(self) -> None:
        """The rest is not wanted: the connection goes with it."""
        if self._open:
            self._open = False
            self._raw.close()
            self._channel.close()

    def _finish(self) -> None:
        self._open = False
        reusable = not self._raw.will_close
        self._raw.close()
        if reusable:
            self._http.keep(self._channel)
        else:
            self._channel.close()

    def _broken(self) -> TransportError:
        return TransportError(f"{self.origin.netloc}: the answer broke off", again=True)


class Http:
    """Exchanges for one pull. Safe to use from several threads.

    `plain`: http:// is allowed besides https://, also where a redirect leads to.
    """

    def __init__(self, dialer: Dialer, *, plain: bool, agent: str) -> None:
        self._dialer = dialer
        self._plain = plain
        self._agent = agent
        self._idle: list[Channel] = []
        self._lock = threading.Lock()
        self._closed = False

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for channel in idle:
            channel.close()

    def keep(self, channel: Channel) -> None:
        """Take a connection back that may be used once more."""
        with self._lock:
            if not self._closed and len(self._idle) < _MAX_IDLE:
                self._idle.append(channel)
                return
        channel.close()

    def get(
        self, url: str, headers: Mapping[str, str], *, authorization: str | None = None, method: str = "GET"
    ) -> Answer:
        """Follow redirects to the answer. `authorization` is for the origin of `url` alone."""
        home = self.origin(url)
        for _ in range(MAX_REDIRECTS + 1):
            own = authorization is not None and self.origin(url) == home
            extra = {"Authorization": authorization} if own and authorization else {}
            answer = self.send(method, url, {**headers, **extra})
            location = answer.headers.get("Location")
            if answer.status not in _REDIRECTS or location is None:
                return answer
            answer.close()
            url = self._target(url, location)
        raise TransportError(f"{home.netloc}: more than {MAX_REDIRECTS} redirects", again=False)

    def _target(self, url: str, location: str) -> str:
        try:
            target = urljoin(url, location)
            parts = urlsplit(target)
            if parts.username is not None or parts.password is not None:
                raise ValueError("it holds credentials")
            if urlsplit(url).scheme == "https" and parts.scheme != "https":
                raise ValueError("it leads away from https")
            self.origin(target)
        except ValueError as failure:
            shown = self.origin(url).netloc
            raise TransportError(f"{shown}: a redirect is not followed: {failure}", again=False) from None
        return target

    def origin(self, url: str) -> Origin:
        """Raises ValueError for what may not be asked."""
        if len(url) > _MAX_URL or _CONTROL.search(url):
            raise ValueError("its address is too long or has control characters")
        parts = urlsplit(url)
        if parts.scheme not in ("https", "http") or not parts.hostname:
            raise ValueError("it is no address of a web server")
        if parts.scheme == "http" and not self._plain:
            raise ValueError("it is not encrypted (http)")
        return Origin(parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80))

    def send(self, method: str, url: str, headers: Mapping[str, str], body: bytes = b"") -> Answer:
        """One exchange, no redirect followed. A kept connection that has died meanwhile is replaced."""
        origin = self.origin(url)
        request = self._request(method, url, origin, headers, body)
        channel = self._kept(origin)
        if channel is not None:
            try:
                return self._exchange(channel, request, method, url)
            except TransportError:
                pass  # closed by the other side in its idle time, most likely: once more on a new one
        return self._exchange(self._dialer.dial(origin), request, method, url)

    def _kept(self, origin: Origin) -> Channel | None:
        with self._lock:
            for place, channel in enumerate(self._idle):
                if channel.origin == origin:
                    return self._idle.pop(place)
        return None

    def _exchange(self, channel: Channel, request: bytes, method: str, url: str) -> Answer:
        try:
            channel.sendall(request)
            raw = http.client.HTTPResponse(cast("Any", channel), method=method)
            try:
                raw.begin()
            except BaseException:
                raw.close()
                raise
            encoding = raw.headers.get("Transfer-Encoding", "chunked").strip().lower()
            if encoding != "chunked" or raw.headers.get("Content-Encoding", "identity") != "identity":
                raw.close()
                raise TransportError(f"{channel.origin.netloc}: answers in an encoding", again=False)
        except http.client.RemoteDisconnected as failure:
            channel.close()
            raise TransportError(f"{channel.origin.netloc}: hung up", again=True) from failure
        except (http.client.HTTPException, ValueError) as failure:
            channel.close()
            raise TransportError(f"{channel.origin.netloc}: does not speak HTTP", again=False) from failure
        except BaseException:
            channel.close()
            raise
        channel.body()
        return Answer(raw, channel, url, self)

    def _request(
        self, method: str, url: str, origin: Origin, headers: Mapping[str, str], body: bytes
    ) -> bytes:
        parts = urlsplit(url)
        # What is escaped already stays as it is: a signed address must not change.
        target = quote(parts.path or "/", safe="/%:=&~+!$,;'@()*[]-._")
        if parts.query:
            target += "?" + quote(parts.query, safe="/%:=&?~+!$,;'@()*[]-._")
        lines = [f"{method} {target} HTTP/1.1", f"Host: {origin.netloc}", f"User-Agent: {self._agent}"]
        lines += ["Accept-Encoding: identity"]
        if body:
            lines.append(f"Content-Length: {len(body)}")
        for name, value in headers.items():
            if _CONTROL.search(value):
                raise ValueError(f"the header {name} has control characters")
            lines.append(f"{name}: {value}")
        return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + body


def failed(answer: Answer, what: str) -> TransportError:
    """An answer that says no, with what it says. Reads the start of the body and closes it."""
    after_s = parse_retry_after(answer.headers.get("Retry-After"), datetime.now(UTC))
    said = said_by(answer.read_start(MAX_ERROR_BYTES))
    reason = http.client.responses.get(answer.status, "")
    text = f"{answer.origin.netloc}: {what}: {answer.status} {reason}".rstrip()
    return TransportError(
        f"{text} ({said})" if said else text, again=answer.status in _AGAIN, after_s=after_s
    )


def said_by(body: bytes) -> str:
    """The codes and messages of a registry's error document (distribution-spec, "Error Codes"), made fit to
    be shown."""
    try:
        document = msgspec.json.decode(body)
        errors = document["errors"][:3]
        texts = [f"{error.get('code', '')}: {error.get('message', '')}".strip(": ") for error in errors]
    except (msgspec.DecodeError, RecursionError, TypeError, KeyError, AttributeError):
        return ""
    return _CONTROL.sub(" ", "; ".join(text for text in texts if text))[:200]
