"""What a registry asks for, and where the node's answers come from."""

import base64
import json
import stat
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import PullFailed
from worker.images.registry.challenge import Challenge, parse_challenges
from worker.images.registry.credentials import (
    MAX_HELPER_BYTES,
    Credentials,
    ask_helper,
    from_docker_config,
    from_secret,
)
from worker.images.registry.patience import MAX_RETRY_AFTER_S, Patience, parse_retry_after

NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)


# -- challenges


@pytest.mark.parametrize(
    ("header", "found"),
    [
        (
            'Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull"',
            [
                Challenge(
                    "bearer",
                    {
                        "realm": "https://auth.docker.io/token",
                        "service": "registry.docker.io",
                        "scope": "repository:a/b:pull",
                    },
                )
            ],
        ),
        ("Basic realm=registry", [Challenge("basic", {"realm": "registry"})]),
        (
            r'Basic realm="a \"quoted\", one", BEARER Realm="b"',
            [Challenge("basic", {"realm": 'a "quoted", one'}), Challenge("bearer", {"realm": "b"})],
        ),
        ("Negotiate, Basic realm=x", [Challenge("negotiate", {}), Challenge("basic", {"realm": "x"})]),
        ('Bearer scope="repository:a:pull,push"', [Challenge("bearer", {"scope": "repository:a:pull,push"})]),
        ("", []),
        ('"', []),
    ],
)
def test_challenges(header: str, found: list[Challenge]) -> None:
    assert parse_challenges(header) == found


@given(st.text(max_size=300))
def test_any_header_has_an_answer(header: str) -> None:
    for challenge in parse_challenges(header):
        assert challenge.scheme == challenge.scheme.lower()


# -- Retry-After and pauses


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("0", 0.0),
        (" 30 ", 30.0),
        ("soon", None),
        ("-1", None),
        ("٣", None),
        ("9" * 400, float("inf")),
        (format_datetime(NOW + timedelta(seconds=90), usegmt=True), 90.0),
        (format_datetime(NOW - timedelta(days=1), usegmt=True), 0.0),
        ("Tue, 24 Nov 2026 25:61:00 GMT", None),
    ],
)
def test_retry_after(value: str | None, seconds: float | None) -> None:
    assert parse_retry_after(value, NOW) == seconds


@given(st.integers(1, 60), st.none() | st.floats(0, 1e12))
def test_pauses_are_bounded(failures: int, after_s: float | None) -> None:
    patience = Patience()
    pause = patience.pause_s(failures, after_s)
    assert 0 < pause <= max(MAX_RETRY_AFTER_S, patience.max_backoff_s)
    if after_s is not None:
        assert pause >= min(after_s, MAX_RETRY_AFTER_S)


# -- secrets


def auth(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("ann:pass:word", Credentials("ann", "pass:word")),
        ("ann:x\n", Credentials("ann", "x")),
        ('{"username": "ann", "password": "x"}', Credentials("ann", "x")),
        (json.dumps({"auth": auth("ann:x")}), Credentials("ann", "x")),
        ('{"identitytoken": "t"}', Credentials(identity_token="t")),
        ('{"registrytoken": "t"}', Credentials(registry_token="t")),
        (json.dumps({"auths": {"a.test": {"auth": auth("ann:x")}}}), Credentials("ann", "x")),
        (
            json.dumps({"auths": {"HTTPS://": {}, "https://A.test/v2/": {"auth": auth("b:y")}}}),
            Credentials("b", "y"),
        ),
    ],
)
def test_secrets(text: str, found: Credentials) -> None:
    assert from_secret(text, "a.test", "s") == found


@pytest.mark.parametrize(
    "text",
    ["", "hunter2", ":hunter2", "{hunter2", '{"auths": {"b.test": {"auth": "hunter2"}}}', '{"auth": "hunter2"}',
     '{"username": "hunter2"}', "{}", '["hunter2"]', "{" * 100_000],
)  # fmt: skip
def test_secrets_that_are_none_are_not_shown(text: str) -> None:
    with pytest.raises(PullFailed) as caught:
        from_secret(text, "a.test", "s")
    assert caught.value.field == "auth"
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_credentials_are_not_shown() -> None:
    one = Credentials("ann", "hunter2", "idtoken", "regtoken")
    assert repr(one) == str(one) == "Credentials(…)"
    assert one.secrets == ("hunter2", "idtoken", "regtoken")
    assert Credentials("ann", "x").basic == "Basic " + auth("ann:x")
    assert Credentials(identity_token="t").basic is None


# -- docker's configuration


def config(folder: Path, document: Any) -> Path:
    path = folder / "config.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    path.chmod(0o600)
    return path


def helper(folder: Path, name: str, script: str) -> None:
    path = folder / f"docker-credential-{name}"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def helpers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path


def test_the_hub_has_a_key_of_its_own(tmp_path: Path) -> None:
    path = config(tmp_path, {"auths": {"https://index.docker.io/v1/": {"auth": auth("ann:x")}}})
    assert from_docker_config(path, "docker.io") == Credentials("ann", "x")
    assert from_docker_config(path, "ghcr.io") is None


@pytest.mark.parametrize(
    "document",
    [
        "",
        "[]",
        "{",
        '{"auths": []}',
        '{"auths": {"a.test": {"auth": "%%"}}}',
        '{"auths": {"a.test": {"email": "x"}}}',
    ],
)
def test_a_config_that_is_none(tmp_path: Path, document: str) -> None:
    path = config(tmp_path, document)
    if document == '{"auths": []}':
        assert from_docker_config(path, "a.test") is None
        return
    with pytest.raises(PullFailed, match=r"config\.json"):
        from_docker_config(path, "a.test")


def test_a_config_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PullFailed, match="cannot be read"):
        from_docker_config(tmp_path / "config.json", "a.test")


def test_the_registrys_helper_comes_before_the_store(helpers: Path) -> None:
    helper(helpers, "own", """echo '{"Username": "own", "Secret": "1"}'""")
    helper(helpers, "all", """echo '{"Username": "all", "Secret": "2"}'""")
    path = config(helpers, {"credHelpers": {"a.test": "own"}, "credsStore": "all", "auths": {}})
    assert from_docker_config(path, "a.test") == Credentials("own", "1")
    assert from_docker_config(path, "b.test") == Credentials("all", "2")


def test_a_helper_without_an_entry(helpers: Path) -> None:
    helper(helpers, "all", "echo 'credentials not found in native keychain'; exit 1")
    path = config(helpers, {"credsStore": "all", "auths": {"a.test": {"auth": auth("ann:x")}}})
    assert from_docker_config(path, "a.test") == Credentials("ann", "x")
    assert from_docker_config(path, "b.test") is None


def test_a_helper_with_an_identity_token(helpers: Path) -> None:
    helper(
        helpers,
        "all",
        """read server; echo "{\\"Username\\": \\"<token>\\", \\"Secret\\": \\"for $server\\"}" """,
    )
    assert ask_helper("all", "a.test") == Credentials(identity_token="for a.test")


@pytest.mark.parametrize(
    ("name", "script", "message"),
    [
        ("fails", "echo hunter2; exit 7", "exit code 7"),
        ("empty", "true", "no JSON"),
        ("odd", """echo '{"Username": 5, "Secret": "hunter2"}'""", "gave no credentials"),
        ("large", f"head -c {MAX_HELPER_BYTES * 3} /dev/zero", "more than 64 KiB|exit code"),
        ("../evil", "", "no name of a credential helper"),
        ("missing", None, "cannot be run"),
    ],
)
def test_a_helper_that_fails(helpers: Path, name: str, script: str | None, message: str) -> None:
    if script:
        helper(helpers, name, script)
    with pytest.raises(PullFailed, match=message) as caught:
        ask_helper(name, "a.test")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("script", ["sleep 600", "exec >&-; sleep 600", "sleep 600 & exit 0"])
def test_a_helper_that_hangs_is_ended(helpers: Path, script: str) -> None:
    helper(helpers, "slow", f"echo $$ > {helpers}/pid; {script}")
    with pytest.raises(PullFailed, match=r"did not answer in 0\.3 s|no JSON"):
        ask_helper("slow", "a.test", timeout_s=0.3)
