"""The questions that a pull asks of a registry (OCI distribution-spec 1.1, "Pulling")."""

import hashlib

import msgspec

from worker.errors import PullFailed

from .addresses import is_loopback_name
from .auth import Authorizer
from .failures import TransportError, persist
from .manifests import ACCEPT, MAX_MANIFEST_BYTES
from .patience import Patience
from .reference import RegistryImage
from .stopping import StopSignal
from .transport import MAX_ERROR_BYTES, Answer, Http, failed, said_by

_LOGINS = 3


class Document(msgspec.Struct, frozen=True, kw_only=True):
    """A manifest or index, its bytes as they came."""

    content: bytes
    content_type: str | None
    digest: str


class RegistryClient:
    """One image's repository. Blocking; safe to use from several threads."""

    def __init__(
        self,
        http: Http,
        image: RegistryImage,
        auth: Authorizer,
        patience: Patience,
        stop: StopSignal,
        *,
        plain: bool,
    ) -> None:
        self._http = http
        self._image = image
        self._auth = auth
        self._patience = patience
        self._stop = stop
        self._base: str | None = None
        self._plain = plain

    def document(self, reference: str, *, accept: str = ACCEPT) -> Document:
        """The manifest or index under a tag or digest; a digest, given or told, is checked."""
        return persist(lambda: self._document(reference, accept), self._patience, self._stop)

    def _document(self, reference: str, accept: str) -> Document:
        answer = self._ask(f"manifests/{reference}", {"Accept": accept})
        if answer.status != 200:
            raise self._refusal(answer, f"asking for {reference}")
        told = answer.headers.get("Docker-Content-Digest", "").strip()
        content_type = answer.headers.get("Content-Type")
        content = answer.read(MAX_MANIFEST_BYTES)
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        wanted = reference if ":" in reference else told if told.startswith("sha256:") else digest
        if digest != wanted:
            raise PullFailed(
                f"{self._image.host} sent another manifest of {self._image} than it should: {digest}, not {wanted}",
                field="image",
            )
        return Document(content=content, content_type=content_type, digest=digest)

    def current_digest(self, tag: str) -> str | None:
        """What a tag stands for now, or None when the registry does not say without sending it."""

        def ask() -> str | None:
            answer = self._ask(f"manifests/{tag}", {"Accept": ACCEPT}, method="HEAD")
            answer.close()
            return answer.headers.get("Docker-Content-Digest") if answer.status == 200 else None

        return persist(ask, self._patience, self._stop)

    def blob(self, digest: str, offset: int = 0) -> Answer:
        """Begin to receive a blob, from `offset` on where the registry can (status 206, else 200).

        One try: TransportError. Status 416 is given back.
        """
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        answer = self._ask(f"blobs/{digest}", headers)
        if answer.status in (200, 206, 416):
            return answer
        raise self._refusal(answer, f"asking for the layer {digest}")

    def _ask(self, path: str, headers: dict[str, str], *, method: str = "GET") -> Answer:
        base = self._base = self._base or self._find_base()
        url = f"{base}/v2/{self._image.repository}/{path}"
        for _ in range(_LOGINS):
            sent = self._auth.header()
            answer = self._http.get(url, headers, authorization=sent, method=method)
            if answer.status != 401 or answer.origin != self._http.origin(url):
                return answer
            answer.read_start(MAX_ERROR_BYTES)
            if not self._auth.refused(answer, sent):
                break
        raise self._denied(answer, "")

    def _find_base(self) -> str:
        endpoint = self._image.endpoint
        if not self._plain:
            return f"https://{endpoint}"
        if not is_loopback_name(self._image.hostname):
            return f"http://{endpoint}"
        # Either may be spoken there. A server for TLS answers 400 to plain http, or hangs up.
        try:
            answer = self._http.send("GET", f"http://{endpoint}/v2/", {})
            answer.read_start(MAX_ERROR_BYTES)
        except TransportError:
            return f"https://{endpoint}"
        return f"https://{endpoint}" if answer.status == 400 else f"http://{endpoint}"

    def _refusal(self, answer: Answer, what: str) -> Exception:
        """What a status that is no success means."""
        own = answer.origin == self._http.origin(self._base or "")
        if answer.status in (401, 403) and own:
            return self._denied(answer, said_by(answer.read_start(MAX_ERROR_BYTES)))
        if answer.status == 404 and own:
            said = said_by(answer.read_start(MAX_ERROR_BYTES))
            return PullFailed(
                f"{self._image.host} has no {self._image}" + (f" ({said})" if said else ""), field="image"
            )
        failure = failed(answer, what)
        # Where the registry sent us to, its permission may have run out on the way.
        again = failure.again or answer.status in (401, 403)
        return TransportError(failure.reason, again=again, after_s=failure.after_s)

    def _denied(self, answer: Answer, said: str) -> PullFailed:
        answer.close()
        hint = f" ({said})" if said else ""
        return PullFailed(
            f"{self._image.host} denies access to {self._image.repository}{hint}: it is private, or not there",
            field="image",
        )
