"""Logging in to a registry and out again: Docker's config file and its helpers are what is changed.

So whoever has logged in with docker, podman (with DOCKER_CONFIG) or skopeo need not do so again here, and the other
way round. Formats: docker/cli, cli/config; docker-credential-helpers, "store" and "erase".
"""

import base64
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from worker.errors import ContractError, InvalidCommand, PullFailed, ResourceExhausted

from .auth import Authorizer
from .credentials import HELPER_TIMEOUT_S, MAX_CONFIG_BYTES, Credentials, keys_of, run_helper
from .failures import TransportError
from .reference import DOCKER_HUB, registry_image
from .transport import MAX_ERROR_BYTES, Http, failed

_LOGINS = 3
_IDENTITY = "<token>"


def config_path(env: Mapping[str, str]) -> Path:
    """Where docker has its config file: DOCKER_CONFIG names its folder."""
    folder = env.get("DOCKER_CONFIG")
    return Path(folder or os.path.join(env.get("HOME", "~"), ".docker")).expanduser() / "config.json"


def registry_host(name: str) -> str:
    """The host that a person means: `ghcr.io`, `https://ghcr.io/`, `localhost:5000`; nothing is Docker Hub.

    InvalidCommand for what no image's name could begin with.
    """
    bare = name.removeprefix("https://").removeprefix("http://").partition("/")[0]
    if not bare or bare == DOCKER_HUB:
        return DOCKER_HUB
    if bare != "localhost" and not any(char in bare for char in ".:"):
        raise InvalidCommand(
            f"{bare[:100]} would be a part of Docker Hub in an image's name: write a port behind it",
            field="registry",
        )
    return registry_image(f"{bare}/x", field="registry").host


class _Login(Authorizer):
    """Asks a token server for no repository in particular."""

    def __init__(self, http: Http, host: str, credentials: Credentials) -> None:
        super().__init__(http, host, "", credentials)
        self._scope = ""


def check_login(http: Http, host: str, base: str, credentials: Credentials) -> bool:
    """Whether the registry asked for the credentials at all; PullFailed when it refuses them.

    Blocking; one try.
    """
    auth = _Login(http, host, credentials)
    asked = False
    try:
        for _ in range(_LOGINS):
            sent = auth.header()
            given = {"Authorization": sent} if sent else {}
            answer = http.send("GET", f"{base}/v2/", given)
            if answer.status == 200:
                answer.read_start(MAX_ERROR_BYTES)
                return asked
            if answer.status != 401:
                raise failed(answer, "logging in")
            asked = True
            answer.read_start(MAX_ERROR_BYTES)
            if not auth.refused(answer, sent):
                break
    except TransportError as failure:
        raise PullFailed(failure.reason, field="registry") from failure
    except ContractError as failure:
        failure.field = "registry"
        raise
    raise PullFailed(f"{host}: the credentials were refused", field="registry")


def store(path: Path, host: str, credentials: Credentials) -> str:
    """Keep them as docker would: with the helper that the file names, else in the file. Tells where.

    Blocking. PullFailed, ResourceExhausted.
    """
    document = _read(path)
    key = keys_of(host)[0]
    helper = _helper(document, host)
    if helper is not None:
        secret = credentials.identity_token or credentials.password
        username = _IDENTITY if credentials.identity_token else credentials.username
        _ask(helper, "store", json.dumps({"ServerURL": key, "Username": username, "Secret": secret}))
        return f"docker-credential-{helper}"
    pair = f"{credentials.username}:{credentials.password}".encode()
    entry = {"auth": base64.b64encode(pair).decode("ascii")}
    if credentials.identity_token:
        entry["identitytoken"] = credentials.identity_token
    document["auths"] = {**_auths(document), key: entry}
    _write(path, document)
    return str(path)


def erase(path: Path, host: str) -> bool:
    """Forget them, in the helper and in the file; False when neither had any. Blocking; raises as `store`."""
    document = _read(path)
    helper = _helper(document, host)
    known = False
    if helper is not None:
        known = _ask(helper, "erase", keys_of(host)[0], missing_ok=True)
    auths = _auths(document)
    kept = {
        key: entry
        for key, entry in auths.items()
        if _bare(key) not in keys_of(host) and key not in keys_of(host)
    }
    if len(kept) != len(auths):
        document["auths"] = kept
        _write(path, document)
        known = True
    return known


def _bare(key: str) -> str:
    return key.removeprefix("https://").removeprefix("http://").partition("/")[0].lower()


def _helper(document: dict[str, Any], host: str) -> str | None:
    helpers = document.get("credHelpers")
    if isinstance(helpers, dict):
        for key in keys_of(host):
            if isinstance(helpers.get(key), str) and helpers[key]:
                return str(helpers[key])
    named = document.get("credsStore")
    return named if isinstance(named, str) and named else None


def _ask(helper: str, verb: str, given: str, *, missing_ok: bool = False) -> bool:
    """The secret goes through the helper's standard input, where no other user sees it."""
    program = f"docker-credential-{helper}"
    if "/" in helper or not helper.isprintable():
        raise PullFailed(f"{program[:100]!r} is no name of a credential helper", field="registry")
    code, _ = run_helper([program, verb], given.encode(), HELPER_TIMEOUT_S)
    if code != 0 and not missing_ok:
        raise PullFailed(f"{program} {verb} failed with exit code {code}", field="registry")
    return code == 0


def _auths(document: dict[str, Any]) -> dict[str, Any]:
    auths = document.get("auths")
    return auths if isinstance(auths, dict) else {}


def _read(path: Path) -> dict[str, Any]:
    """What stands there, all of which is kept; nothing when there is no file."""
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_uid not in (0, os.geteuid()):
                raise PullFailed(f"{path} is no file of this user", field="registry")
            content = file.read(MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        return {}
    except OSError as failure:
        raise PullFailed(f"{path} cannot be read: {failure.strerror}", field="registry") from failure
    try:
        return msgspec.json.decode(content, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        # Nothing of the reason: it may quote what stands there.
        raise PullFailed(f"{path} is no JSON object, so it is left as it is", field="registry") from None


def _write(path: Path, document: dict[str, Any]) -> None:
    """The whole file or the old one, for its owner alone. A link is followed, as people keep such files elsewhere."""
    target = Path(os.path.realpath(path))
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(fresh, flags, 0o600), "wb") as out:
            out.write(json.dumps(document, indent="\t").encode() + b"\n")
            out.flush()
            os.fsync(out.fileno())
        fresh.replace(target)
    except OSError as failure:
        fresh.unlink(missing_ok=True)
        raise ResourceExhausted(f"{target} cannot be written: {failure.strerror}") from failure
