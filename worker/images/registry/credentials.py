"""Who the node is to a registry: Docker's config file with its helpers, or one of the node's secrets.

What is read here was asked for by a command, so every failure is one of that command's and shows nothing of
the file's content. Formats: docker/cli, cli/config/types/authconfig.go and docker-credential-helpers.
"""

import base64
import binascii
import os
import re
import selectors
import signal
import stat
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from worker.errors import PullFailed

from .reference import DOCKER_HUB

MAX_CONFIG_BYTES = 1 << 20
MAX_HELPER_BYTES = 64 * 1024
HELPER_TIMEOUT_S = 15.0

# Under which keys a registry's entry may stand.
_HUB_KEYS = ("https://index.docker.io/v1/", "index.docker.io", "docker.io", "registry-1.docker.io")
_HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_IDENTITY = "<token>"
_NOT_FOUND = b"credentials not found"


@dataclass(frozen=True, slots=True, repr=False)
class Credentials:
    """One of the three. `identity_token` is exchanged for tokens, `registry_token` is one already."""

    username: str = ""
    password: str = ""
    identity_token: str = ""
    registry_token: str = ""

    def __repr__(self) -> str:
        return "Credentials(…)"

    @property
    def basic(self) -> str | None:
        """The value of an Authorization header."""
        if not self.username and not self.password:
            return None
        pair = f"{self.username}:{self.password}".encode()
        return "Basic " + base64.b64encode(pair).decode("ascii")

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must be in no log."""
        return tuple(text for text in (self.password, self.identity_token, self.registry_token) if text)


def from_secret(text: str, host: str, name: str) -> Credentials:
    """A secret's value: `user:password`, a JSON object with `username` and `password` (or `identitytoken`,
    `registrytoken`), or a whole Docker config file."""
    where = f"the secret {name}"
    if not text.lstrip().startswith("{"):
        username, colon, password = text.strip().partition(":")
        if not colon or not username:
            raise PullFailed(f"{where} is neither `user:password` nor JSON", field="auth")
        return Credentials(username, password)
    document = _object(text.encode("utf-8", "surrogateescape"), where, "auth")
    if "auths" not in document:
        return _entry(document, where, "auth")
    found = _from_auths(document, host, where, "auth")
    if found is None:
        raise PullFailed(f"{where} holds no credentials for {host}", field="auth")
    return found


def from_docker_config(path: Path, host: str) -> Credentials | None:
    """As `docker pull` looks: the registry's own helper, the store for all, the file itself.

    None when it knows none. Blocking; runs the helper.
    """
    document = _object(_read(path), str(path), "image")
    helpers = document.get("credHelpers")
    helper = None
    if isinstance(helpers, dict):
        helper = next((helpers[key] for key in keys_of(host) if isinstance(helpers.get(key), str)), None)
    helper = helper or document.get("credsStore")
    if isinstance(helper, str) and helper:
        found = ask_helper(helper, keys_of(host)[0])
        if found is not None:
            return found
    return _from_auths(document, host, str(path), "image")


def keys_of(host: str) -> tuple[str, ...]:
    return _HUB_KEYS if host == DOCKER_HUB else (host,)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_uid not in (0, os.geteuid()):
                raise PullFailed(f"{path} is no file of the worker's user", field="image")
            if found.st_mode & (stat.S_IWOTH | stat.S_IWGRP):
                raise PullFailed(f"{path} can be written by others, and may name a program", field="image")
            content = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as failure:
        raise PullFailed(f"{path} cannot be read: {failure.strerror}", field="image") from failure
    if len(content) > MAX_CONFIG_BYTES:
        raise PullFailed(f"{path} is larger than {MAX_CONFIG_BYTES >> 20} MiB", field="image")
    return content


def _object(content: bytes, where: str, field: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(content, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        # Nothing of the reason: it may quote what stands there.
        raise PullFailed(f"{where} is no JSON object", field=field) from None


def _from_auths(document: dict[str, Any], host: str, where: str, field: str) -> Credentials | None:
    auths = document.get("auths")
    if not isinstance(auths, dict):
        return None
    wanted = keys_of(host)
    for key, entry in auths.items():
        # Older files have whole addresses for keys: https://ghcr.io/v1/
        bare = re.sub(r"^https?://", "", key).partition("/")[0].lower()
        if (key in wanted or bare in wanted) and isinstance(entry, dict) and entry:
            return _entry(entry, where, field)
    return None


def _entry(entry: dict[str, Any], where: str, field: str) -> Credentials:
    texts = {key: value for key, value in entry.items() if isinstance(value, str)}
    username, password = texts.get("username", ""), texts.get("password", "")
    if texts.get("auth"):
        try:
            pair = base64.b64decode(texts["auth"], validate=True).decode("utf-8").rstrip("\0")
        except (binascii.Error, UnicodeDecodeError):
            raise PullFailed(f"{where}: an `auth` is no base64 text", field=field) from None
        username, _, password = pair.partition(":")
    found = Credentials(username, password, texts.get("identitytoken", ""), texts.get("registrytoken", ""))
    if not found.secrets:
        raise PullFailed(f"{where} has an entry without a password or token", field=field)
    return found


def ask_helper(helper: str, server: str, *, timeout_s: float = HELPER_TIMEOUT_S) -> Credentials | None:
    """Run `docker-credential-HELPER get`; None when it has nothing for the server."""
    program = f"docker-credential-{helper}"
    if _HELPER.fullmatch(helper) is None:
        raise PullFailed(f"{program[:100]!r} is no name of a credential helper", field="image")
    code, output = run_helper([program, "get"], server.encode(), timeout_s)
    if code != 0:
        if _NOT_FOUND in output.lower():
            return None
        raise PullFailed(f"{program} failed for {server} with exit code {code}", field="image")
    answer = _object(output, f"the answer of {program}", "image")
    username, secret = answer.get("Username"), answer.get("Secret")
    if not isinstance(username, str) or not isinstance(secret, str) or not secret:
        raise PullFailed(f"{program} gave no credentials for {server}", field="image")
    return Credentials(identity_token=secret) if username == _IDENTITY else Credentials(username, secret)


def run_helper(argv: list[str], given: bytes, timeout_s: float) -> tuple[int, bytes]:
    """Exit code and standard output of a helper and all it started, ended when they take too long."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SANDFLEET_")}
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
    except OSError as failure:
        raise PullFailed(f"{argv[0]} cannot be run: {failure.strerror}", field="image") from failure
    end = time.monotonic() + timeout_s
    try:
        output = _converse(process, given, end)
        process.wait(max(0.0, end - time.monotonic()))
    except (TimeoutError, subprocess.TimeoutExpired):
        raise PullFailed(f"{argv[0]} did not answer in {timeout_s:g} s", field="image") from None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)  # not reaped yet: the number is still its own
            process.wait()
    if len(output) > MAX_HELPER_BYTES:
        raise PullFailed(f"{argv[0]} answered more than {MAX_HELPER_BYTES >> 10} KiB", field="image")
    return process.returncode, output


def _converse(process: "subprocess.Popen[bytes]", given: bytes, end: float) -> bytes:
    """Its output up to the end or just past the limit; TimeoutError."""
    assert process.stdin is not None
    assert process.stdout is not None
    output = bytearray()
    with process.stdout as out, selectors.DefaultSelector() as selector:
        # A name of a server fits into any pipe; one that is not read breaks when it is closed.
        with suppress(BrokenPipeError), process.stdin as into:
            into.write(given)
        selector.register(out, selectors.EVENT_READ)
        while len(output) <= MAX_HELPER_BYTES:
            if not selector.select(max(0.0, end - time.monotonic())):
                raise TimeoutError
            chunk = os.read(out.fileno(), 8192)
            if not chunk:
                break
            output += chunk
    return bytes(output)
