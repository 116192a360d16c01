"""The requests of a push (OCI distribution-spec 1.1, "Push"), one try each. `push_blob` knows what to do with them."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import urlencode, urljoin, urlsplit
from weakref import WeakSet

import msgspec

from worker.errors import Internal, PullFailed

from .channel import Channel, Dialer
from .client import RegistryClient
from .failures import TransportError
from .manifests import ACCEPT
from .transport import MAX_ERROR_BYTES, Answer, Http, failed, said_by

_READ = 256 * 1024
_LOGINS = 3
_RANGE = re.compile(r"(?:bytes=)?0-(\d{1,18})")
_MIN_PIECE = "OCI-Chunk-Min-Length"
_MAX_MIN_PIECE = 64 << 20

Report = Callable[[int], None]


class Outgoing(msgspec.Struct, frozen=True, kw_only=True):
    """A blob to be sent: its bytes, or the file that holds them."""

    digest: str
    size: int
    content: bytes | Path

    def pieces(self, start: int, end: int, report: Report = lambda done: None) -> Iterator[bytes]:
        """These bytes, a piece at a time; `report` hears how far those that are asked for reach."""
        if isinstance(self.content, bytes):
            yield self.content[start:end]
            return
        fd = os.open(self.content, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            while start < end:
                data = os.pread(fd, min(_READ, end - start), start)
                if not data:
                    raise Internal(f"the blob {self.digest} is damaged: it is shorter than it should be")
                yield data
                start += len(data)
                report(start)
        finally:
            os.close(fd)

    def check(self) -> None:
        """Internal when the bytes are not those that the digest says."""
        found = hashlib.sha256()
        for piece in self.pieces(0, self.size):
            found.update(piece)
        if f"sha256:{found.hexdigest()}" != self.digest:
            raise Internal(f"the blob {self.digest} is damaged: it has another digest than its name")


class UploadHttp(Http):
    """Exchanges whose requests may have a body of any length."""

    def __init__(self, dialer: Dialer, *, plain: bool, agent: str) -> None:
        super().__init__(dialer, plain=plain, agent=agent)
        self._spoilt: WeakSet[Channel] = WeakSet()

    def send_pieces(
        self, method: str, url: str, headers: Mapping[str, str], size: int, pieces: Iterator[bytes]
    ) -> Answer:
        """One exchange on a connection of its own; the pieces are read as they are sent."""
        origin = self.origin(url)
        head = self._request(method, url, origin, {**headers, "Content-Length": str(size)}, b"")
        channel = self._dialer.dial(origin)
        try:
            channel.sendall(head)
            for piece in pieces:
                channel.sendall(piece)
        except TransportError as failure:
            # The registry may have said no before it had everything: that answer is worth more.
            self._spoilt.add(channel)
            try:
                return self._exchange(channel, b"", method, url)
            except TransportError:
                raise failure from None
        except BaseException:
            channel.close()
            raise
        return self._exchange(channel, b"", method, url)

    def keep(self, channel: Channel) -> None:
        """Half a request has gone through a spoilt one."""
        if channel in self._spoilt:
            channel.close()
        else:
            super().keep(channel)


class UploadClient(RegistryClient):
    """One repository that is pushed to. Blocking; safe to use from several threads."""

    _http: UploadHttp

    def stored(self, tag: str) -> str | None:
        """The digest that a tag stands for; None when there is none or the registry does not say."""
        answer = self._send("HEAD", self._url(f"manifests/{tag}"), {"Accept": ACCEPT})
        answer.close()
        if answer.status not in (200, 404):
            raise self._no(answer, f"asking for {tag}")
        return answer.headers.get("Docker-Content-Digest") if answer.status == 200 else None

    def has_blob(self, digest: str) -> bool:
        answer = self._send("HEAD", self._url(f"blobs/{digest}"))
        answer.close()
        if answer.status == 200:
            return True
        if answer.status == 404:
            return False
        raise self._no(answer, f"asking for {digest}")

    def begin(self, mount: tuple[str, str] | None) -> tuple[str, int] | None:
        """Begin an upload; gives its address and the least size of a numbered piece.

        `mount` is (digest, repository of this registry that may have it); None when the registry took it from
        there.
        """
        query = "" if mount is None else "?" + urlencode({"mount": mount[0], "from": mount[1]})
        answer = self._send("POST", self._url(f"blobs/uploads/{query}"))
        if mount is not None and answer.status == 201:
            answer.read_start(MAX_ERROR_BYTES)
            return None
        if answer.status != 202:
            raise self._no(answer, "beginning an upload")
        least = answer.headers.get(_MIN_PIECE, "")
        answer.read_start(MAX_ERROR_BYTES)
        size = int(least) if least.isascii() and least.isdigit() and len(least) < 12 else 0
        return self._location(answer), min(size, _MAX_MIN_PIECE)

    def received(self, location: str) -> tuple[str, int]:
        """How far an upload came. One try: TransportError, also when the registry knows nothing of it."""
        answer = self._send("GET", location)
        if answer.status not in (200, 204):
            raise self._no(answer, "asking how far an upload came")
        answer.read_start(MAX_ERROR_BYTES)
        return self._location(answer, location), _received(answer)

    def append(
        self, location: str, blob: Outgoing, start: int, end: int, *, numbered: bool, report: Report
    ) -> str:
        """Send these bytes of a blob; gives where to go on."""
        headers = {"Content-Type": "application/octet-stream"}
        if numbered:
            headers["Content-Range"] = f"{start}-{end - 1}"
        answer = self._send("PATCH", location, headers, end - start, lambda: blob.pieces(start, end, report))
        if answer.status not in (201, 202, 204):
            raise self._no(answer, f"sending {blob.digest}")
        answer.read_start(MAX_ERROR_BYTES)
        return self._location(answer, location)

    def finish(self, location: str, blob: Outgoing, *, whole: bool = False) -> None:
        """End an upload; with `whole` it consists of this request alone."""
        joint = "&" if urlsplit(location).query else "?"
        url = f"{location}{joint}{urlencode({'digest': blob.digest})}"
        headers = {"Content-Type": "application/octet-stream"}
        size = blob.size if whole else 0
        answer = self._send("PUT", url, headers, size, lambda: blob.pieces(0, size))
        if answer.status != 201:
            raise self._no(answer, f"ending the upload of {blob.digest}")
        self._check_digest(answer, blob.digest)

    def put_manifest(self, reference: str, media_type: str, blob: Outgoing) -> None:
        """Store a manifest under a tag or its digest: the last step of a push."""
        headers = {"Content-Type": media_type}
        url = self._url(f"manifests/{reference}")
        answer = self._send("PUT", url, headers, blob.size, lambda: blob.pieces(0, blob.size))
        if answer.status not in (200, 201, 202):
            raise self._no(answer, f"storing the manifest as {reference}")
        self._check_digest(answer, blob.digest)

    # -- below

    def _url(self, path: str) -> str:
        base = self._base = self._base or self._find_base()
        return f"{base}/v2/{self._image.repository}/{path}"

    def _send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None = None,
        size: int | None = None,
        pieces: Callable[[], Iterator[bytes]] = lambda: iter(()),
    ) -> Answer:
        """One request, with a login where it is asked for. Credentials go to the registry itself only."""
        home = self._http.origin(self._url(""))
        for _ in range(_LOGINS):
            sent = self._auth.header() if self._http.origin(url) == home else None
            given = {**(headers or {}), **({"Authorization": sent} if sent else {})}
            if size is None:
                answer = self._http.send(
                    method, url, {"Content-Length": "0", **given} if method == "POST" else given
                )
            else:
                answer = self._http.send_pieces(method, url, given, size, pieces())
            if answer.status != 401 or answer.origin != home:
                return answer
            answer.read_start(MAX_ERROR_BYTES)
            if not self._auth.refused(answer, sent):
                break
        raise self._denied(answer, "")

    def _location(self, answer: Answer, known: str | None = None) -> str:
        """Where the upload goes on: on the registry itself or where it says, but never less encrypted."""
        told = answer.headers.get("Location")
        if told is None:
            if known is not None:
                return known
            raise PullFailed(f"{answer.origin.netloc} does not say where an upload goes", field="target")
        try:
            url = urljoin(answer.url, told)
            origin = self._http.origin(url)
            if answer.origin.scheme == "https" and origin.scheme != "https":
                raise ValueError("it leads away from https")
        except ValueError as failure:
            raise PullFailed(
                f"{answer.origin.netloc} sends an upload where it cannot go: {failure}", field="target"
            ) from None
        return url

    def _check_digest(self, answer: Answer, digest: str) -> None:
        told = answer.headers.get("Docker-Content-Digest", digest).strip()
        answer.read_start(MAX_ERROR_BYTES)
        if told != digest and told.startswith("sha256:"):
            raise PullFailed(f"{answer.origin.netloc} stored {told} where {digest} was sent", field="target")

    def _no(self, answer: Answer, what: str) -> Exception:
        if answer.status in (401, 403):
            said = said_by(answer.read_start(MAX_ERROR_BYTES))
            hint = f" ({said})" if said else ""
            return PullFailed(
                f"{self._image.host} does not let this be pushed to {self._image.repository}{hint}",
                field="target",
            )
        return Refused(answer.status, failed(answer, what))

    def _denied(self, answer: Answer, said: str) -> PullFailed:
        answer.close()
        return PullFailed(
            f"{self._image.host} does not let this be pushed to {self._image.repository}: log in, or use another name",
            field="target",
        )


class Refused(TransportError):
    """An answer that says no, with its status."""

    def __init__(self, status: int, failure: TransportError) -> None:
        super().__init__(failure.reason, again=failure.again, after_s=failure.after_s)
        self.status = status


def _received(answer: Answer) -> int:
    """`Range: 0-LAST`, and 0 for nothing told. `0-0` may mean no byte or one: none, as one more is no harm."""
    match = _RANGE.fullmatch(answer.headers.get("Range", "").strip())
    return int(match[1]) + 1 if match and match[1] != "0" else 0
