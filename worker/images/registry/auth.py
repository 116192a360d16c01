"""Getting let in: anonymous, basic, or a token of the server that the registry names.

The registry's answer to a request without credentials says which (distribution-spec; the token flow is
distribution/docs/spec/auth/token.md and oauth.md). Credentials are sent to the registry they are for and to the
token server which that registry names, over TLS unless the registry itself is spoken to without.
"""

import threading
import time
from typing import Any
from urllib.parse import urlencode, urlsplit, urlunsplit

import msgspec

from worker.errors import PullFailed

from .challenge import Challenge, parse_challenges
from .credentials import Credentials
from .failures import TransportError
from .transport import Answer, Http, failed

MAX_TOKEN_BYTES = 256 * 1024
CLIENT_ID = "sandfleet"
_LEAST_LIFE_S = 60.0
_MARGIN_S = 10.0


class Authorizer:
    """The Authorization of one registry and repository. Safe to use from several threads."""

    def __init__(
        self,
        http: Http,
        host: str,
        repository: str,
        credentials: Credentials | None,
        *,
        actions: str = "pull",
    ) -> None:
        self._http = http
        self._host = host
        self._scope = f"repository:{repository}:{actions}"
        self._credentials = credentials
        self._lock = threading.Lock()
        self._bearer: Challenge | None = None
        self._header: str | None = None
        self._until = 0.0
        if credentials is not None and credentials.registry_token:
            self._header = f"Bearer {credentials.registry_token}"

    def header(self) -> str | None:
        """What to send with the next request. A token that is about to end is replaced first."""
        with self._lock:
            if self._bearer is not None and time.monotonic() > self._until:
                self._fetch(self._bearer)
            return self._header

    def refused(self, answer: Answer, sent: str | None) -> bool:
        """An answer 401 to a request with the Authorization `sent`: True when another try has new hope.

        Raises PullFailed when the registry asks for what cannot be given.
        """
        challenges = parse_challenges(", ".join(answer.headers.get_all("WWW-Authenticate", [])))
        with self._lock:
            if self._header != sent:
                return True  # another thread was faster
            if self._credentials is not None and self._credentials.registry_token:
                return False
            bearer = next((one for one in challenges if one.scheme == "bearer"), None)
            if bearer is not None:
                # One fresh token for each request: a registry that refuses it means it.
                known = sent is not None and sent.startswith("Bearer ") and not self._expired()
                if known and self._bearer == bearer:
                    return False
                self._fetch(bearer)
                return True
            if any(one.scheme == "basic" for one in challenges):
                basic = None if self._credentials is None else self._credentials.basic
                if basic is None or sent == basic:
                    return False
                self._header = basic
                return True
        kinds = ", ".join(one.scheme for one in challenges)[:100] or "nothing"
        raise PullFailed(f"{self._host}: asks for credentials of an unknown kind: {kinds}", field="image")

    def _expired(self) -> bool:
        return time.monotonic() > self._until

    def _fetch(self, challenge: Challenge) -> None:
        document = self._ask(challenge)
        token = document.get("token") or document.get("access_token")
        if not isinstance(token, str) or not token or not token.isascii() or not token.isprintable():
            raise PullFailed(f"{self._host}: its token server gave no token", field="image")
        life = document.get("expires_in")
        life_s = float(life) if isinstance(life, int | float) and 0 < life < 1e9 else _LEAST_LIFE_S
        self._header = f"Bearer {token}"
        self._until = time.monotonic() + max(life_s, _LEAST_LIFE_S) - _MARGIN_S
        self._bearer = challenge

    def _ask(self, challenge: Challenge) -> dict[str, Any]:
        asked = {"service": challenge.parameters.get("service", "")}
        asked["scope"] = challenge.parameters.get("scope") or self._scope
        asked = {name: value for name, value in asked.items() if value}
        realm = self._realm(challenge)
        credentials = self._credentials
        if credentials is not None and credentials.identity_token:
            form = {"grant_type": "refresh_token", "client_id": CLIENT_ID, **asked}
            form["refresh_token"] = credentials.identity_token
            answer = self._http.send(
                "POST",
                realm,
                {"Content-Type": "application/x-www-form-urlencoded"},
                urlencode(form).encode("ascii"),
            )
        else:
            parts = urlsplit(realm)
            query = "&".join(filter(None, (parts.query, urlencode(asked))))
            headers = {"Accept": "application/json"}
            basic = None if credentials is None else credentials.basic
            if basic is not None:
                headers["Authorization"] = basic
            # Without following a redirect: a token server that moved would get nobody's password.
            answer = self._http.send("GET", urlunsplit(parts._replace(query=query, fragment="")), headers)
        if answer.status in (400, 401, 403):
            answer.close()
            how = "the credentials were refused" if credentials else "no access without credentials"
            raise PullFailed(
                f"{self._host}: {how} ({answer.status} from {answer.origin.netloc})", field="image"
            )
        if answer.status != 200:
            raise failed(answer, "asking for a token")
        try:
            return msgspec.json.decode(answer.read(MAX_TOKEN_BYTES), type=dict[str, Any])
        except (msgspec.DecodeError, RecursionError):
            raise PullFailed(
                f"{self._host}: its token server does not answer in JSON", field="image"
            ) from None

    def _realm(self, challenge: Challenge) -> str:
        realm = challenge.parameters.get("realm", "")
        try:
            self._http.origin(realm)
        except ValueError as failure:
            raise TransportError(
                f"{self._host}: its token server cannot be asked: {failure}", again=False
            ) from None
        return realm
