"""Logging in and out: Docker's file and helpers are changed, and nothing else of them is."""

import base64
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from tests.integration.pull_help import QUICK
from tests.registry_server import Registry, running
from worker.errors import InvalidCommand, PullFailed, ResourceExhausted
from worker.images.registry.channel import Dialer
from worker.images.registry.credentials import Credentials, from_docker_config
from worker.images.registry.login import check_login, config_path, erase, registry_host, store
from worker.images.registry.stopping import StopSignal
from worker.images.registry.transport import Http, tls_context

ANN = Credentials("ann", "s3cret:with colon")
HUB = "https://index.docker.io/v1/"


def check(registry: Registry, credentials: Credentials) -> bool:
    dialer = Dialer(tls_context(None), QUICK, StopSignal(), private=True)
    http = Http(dialer, plain=True, agent="test")
    try:
        return check_login(http, registry.host, registry.url, credentials)
    finally:
        http.close()


@pytest.mark.parametrize("auth", ["basic", "bearer"])
def test_the_registry_is_asked(auth: str) -> None:
    with running(auth=auth, users={"ann": ANN.password}) as registry:
        assert check(registry, ANN)
        with pytest.raises(PullFailed, match="refused") as failed:
            check(registry, Credentials("ann", "wrong-one"))
        assert failed.value.field == "registry"
        assert "wrong-one" not in failed.value.message
        assert not any("scope" in seen.path for seen in registry.seen)


def test_a_registry_that_asks_for_nothing() -> None:
    with running() as registry:
        assert not check(registry, ANN)


@pytest.mark.parametrize("kind", ["hang_up", "garbage", "status"])
def test_a_registry_that_does_not_answer(kind: str) -> None:
    with running() as registry:
        registry.fault(kind, times=-1)
        with pytest.raises(PullFailed):
            check(registry, ANN)


@pytest.mark.parametrize(
    ("name", "host"),
    [
        ("", "docker.io"),
        ("docker.io", "docker.io"),
        ("https://index.docker.io/v1/", "docker.io"),
        ("ghcr.io", "ghcr.io"),
        ("https://GHCR.io/", "ghcr.io"),
        ("localhost:5000", "localhost:5000"),
        ("localhost", "localhost"),
        ("registry:5000", "registry:5000"),
    ],
)
def test_hosts(name: str, host: str) -> None:
    assert registry_host(name) == host


@pytest.mark.parametrize("name", ["registry", "a b.c", "x:99999", "-.-", "user@host.x"])
def test_what_is_no_host(name: str) -> None:
    with pytest.raises(InvalidCommand):
        registry_host(name)


def test_where_the_file_is() -> None:
    assert config_path({"HOME": "/h"}) == Path("/h/.docker/config.json")
    assert config_path({"HOME": "/h", "DOCKER_CONFIG": "/c"}) == Path("/c/config.json")


# -- the file


def test_kept_and_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "docker" / "config.json"
    before = os.umask(0)
    try:
        assert store(path, "ghcr.io", ANN) == str(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert from_docker_config(path, "ghcr.io") == ANN
    assert from_docker_config(path, "other.io") is None
    store(path, "docker.io", Credentials("bob", "x"))
    assert set(json.loads(path.read_text())["auths"]) == {"ghcr.io", HUB}
    assert from_docker_config(path, "docker.io") == Credentials("bob", "x")
    assert erase(path, "ghcr.io")
    assert not erase(path, "ghcr.io")
    assert from_docker_config(path, "ghcr.io") is None
    assert from_docker_config(path, "docker.io") is not None
    assert os.listdir(path.parent) == ["config.json"]


def test_the_rest_of_the_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    document = {
        "auths": {"other.io": {"auth": "eDp5"}, "https://ghcr.io/v1/": {"auth": "eDp5"}},
        "HttpHeaders": {"X": "y"},
        "aliases": {"b": ["c"]},
    }
    path.write_text(json.dumps(document))
    store(path, "ghcr.io", ANN)
    changed = json.loads(path.read_text())
    assert {key: changed[key] for key in ("HttpHeaders", "aliases")} == {
        "HttpHeaders": {"X": "y"},
        "aliases": {"b": ["c"]},
    }
    assert erase(path, "ghcr.io")
    assert list(json.loads(path.read_text())["auths"]) == ["other.io"]


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/config.json").write_text("{}")
    (tmp_path / "config.json").symlink_to("elsewhere/config.json")
    store(tmp_path / "config.json", "ghcr.io", ANN)
    assert (tmp_path / "config.json").is_symlink()
    assert "ghcr.io" in (tmp_path / "elsewhere/config.json").read_text()


@pytest.mark.parametrize("content", ["", "[]", "hello s3cret", '{"auths": {', "[" * 10_000])
def test_a_file_that_is_none_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(PullFailed, match="no JSON object") as failed:
        store(path, "ghcr.io", ANN)
    assert "s3cret" not in failed.value.message
    assert path.read_text() == content


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((ResourceExhausted, PullFailed)):
        store(tmp_path / "file" / "config.json", "ghcr.io", ANN)


# -- helpers


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`docker-credential-test`, which writes down what it is asked; `bad` makes it fail."""
    tools = tmp_path / "tools"
    tools.mkdir()
    asked = tmp_path / "asked"
    script = f'#!/bin/sh\n(echo "$1"; cat; echo) >> {asked}\n[ ! -e {tmp_path}/bad ]\n'
    (tools / "docker-credential-test").write_text(script)
    (tools / "docker-credential-test").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return tmp_path


@pytest.mark.parametrize(
    "named", [{"credsStore": "test"}, {"credHelpers": {"ghcr.io": "test"}, "credsStore": "none"}]
)
def test_a_helper_keeps_it(helper: Path, named: dict[str, Any]) -> None:
    path = helper / "config.json"
    path.write_text(json.dumps(named))
    assert store(path, "ghcr.io", ANN) == "docker-credential-test"
    verb, given, _ = (helper / "asked").read_text().split("\n", 2)
    assert verb == "store"
    assert json.loads(given) == {"ServerURL": "ghcr.io", "Username": "ann", "Secret": ANN.password}
    assert json.loads(path.read_text()) == named
    store(path, "ghcr.io", Credentials(identity_token="tok"))
    assert '"Username": "<token>", "Secret": "tok"' in (helper / "asked").read_text()
    assert erase(path, "ghcr.io")
    assert (helper / "asked").read_text().endswith("erase\nghcr.io\n")


def test_a_helper_that_fails(helper: Path) -> None:
    path = helper / "config.json"
    path.write_text('{"credsStore": "test"}')
    (helper / "bad").write_text("")
    with pytest.raises(PullFailed, match="failed with exit code 1"):
        store(path, "ghcr.io", ANN)
    assert not erase(path, "ghcr.io")


@pytest.mark.parametrize("name", ["../../bin/sh", "missing", "a\nb"])
def test_a_helper_that_is_none(helper: Path, name: str) -> None:
    path = helper / "config.json"
    path.write_text(json.dumps({"credsStore": name}))
    with pytest.raises(PullFailed):
        store(path, "ghcr.io", ANN)
    assert base64.b64encode(b"ann:") not in path.read_bytes()
