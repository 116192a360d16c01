"""The profile of a spec on a node that is only thought of."""

import os
from typing import Any

import pytest

from schemas.errors import InvalidCommand
from schemas.status import Gpu, Network
from worker.answers import sandbox_of
from worker.errors import ContractError
from worker.platform.base import Profile
from worker.policy_words import in_words
from worker.profiles import Place, links_of, make

from .profile_help import PLATFORMS, asked, made, question, spec

ROOT = {"darwin": "/private/var/lib/sandfleet", "linux": "/var/lib/sandfleet"}
ULID = "01JD8Z6M0000000000000000AB"


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_profile_is_whole(platform: str) -> None:
    profile = made(platform, place={"service": "web", "replica": 3}).profile
    assert profile.language == {"darwin": "sbpl", "linux": "landlock+seccomp"}[platform]
    assert profile.text
    assert profile.policy["container"] == "web-3"
    assert profile.policy["rootfs"] == f"{ROOT[platform]}/containers/web-3/rootfs"
    assert profile.not_enforced


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_same_again_is_the_same_text(platform: str) -> None:
    fields: dict[str, Any] = {"sandbox": {"read": ["/b", "/a"]}, "network": {"connect_ports": [2, 1]}}
    assert made(platform, **fields).profile == made(platform, **fields).profile


@pytest.mark.parametrize("platform", PLATFORMS)
def test_nothing_is_looked_up(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No path needs to exist: a file system that fails at every look changes nothing."""
    fields: dict[str, Any] = {
        "sandbox": {"read": ["/no/such/place"], "unix_sockets": ["/no/such/socket"]},
        "storage": [{"type": "bind", "source": "/no/such/folder", "target": "/x"}],
    }
    before = made(platform, **fields)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("looked at the file system")

    for name in ("stat", "lstat", "scandir", "listdir", "readlink", "open"):
        monkeypatch.setattr(os, name, refuse)
    assert made(platform, **fields) == before


def test_known_aliases_are_written_out() -> None:
    policy = made(
        "darwin", sandbox={"read": ["/tmp/x"], "write": ["/var/y"]}, place={"data_dir": "/tmp/d/"}
    ).policy
    paths = {rule.origin: rule.path for rule in policy.paths}
    assert paths["sandbox.read"] == "/private/tmp/x"
    assert paths["sandbox.write"] == "/private/var/y"
    assert policy.rootfs == "/private/tmp/d/containers/app-0/rootfs"
    assert made("linux", sandbox={"read": ["/var/run/x"]}).policy.paths[-1].path == "/run/x"


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_place_counts(platform: str) -> None:
    place = {
        "data_dir": "/data",
        "rootfs_dir": "/images/app",
        "instance": ULID,
        "port": 30123,
        "nats_ports": (4222, 7222),
        "api_socket": "/run/api.sock",
    }
    endpoints = [{"name": "h", "protocol": "tcp", "port": 8080}]
    policy = made(platform, place=place, endpoints=endpoints).policy
    assert policy.rootfs == "/images/app"
    assert policy.paths[0].path == "/images/app"
    assert policy.instance == ULID
    assert ULID in policy.marker
    assert policy.network.bind_ports == (8080, 30123)
    assert policy.network.denied_ports == (4222, 7222)
    assert policy.network.unix_sockets == ("/run/api.sock",)
    assert policy.network.api_socket == "/run/api.sock"
    assert "/data/launcher.sock" in policy.deny


def test_the_marker_is_readable_and_the_servers_are_denied_last() -> None:
    one = made("darwin", network={"access": "full"}, place={"nats_ports": (4222, 7222), "instance": ULID})
    box = sandbox_of(one.profile)
    assert box.ask(question("darwin", "read", one.policy.marker)).decision == "allow"
    for port in (4222, 7222):
        assert box.ask(question("darwin", "connect", f"localhost:{port}")).decision == "deny"
        assert box.ask(question("darwin", "connect", f"10.0.0.1:{port}")).decision == "deny"
        assert box.ask(question("darwin", "bind", str(port))).decision == "deny"
    assert box.ask(question("darwin", "connect", "localhost:7223")).decision == "allow"
    socket = f"{ROOT['darwin']}/launcher.sock"
    assert box.ask(question("darwin", "connect", socket)).decision == "deny"
    denials = [at for at, line in enumerate(one.profile.text.split("\n")) if line.startswith("(deny network")]
    allows = [at for at, line in enumerate(one.profile.text.split("\n")) if line.startswith("(allow network")]
    assert max(denials) > max(allows)


@pytest.mark.parametrize("release", range(12, 27))
def test_every_release_compiles(release: int) -> None:
    gpu = {"gpu": {"count": 1, "vendor": "apple"}}
    one = made("darwin", place={"macos": release}, resources=gpu)
    answer = sandbox_of(one.profile, release=release).ask(question("darwin", "gpu"))
    assert answer.decision == "allow", answer


def test_without_a_gpu() -> None:
    gpu = {"gpu": {"count": 1, "vendor": "apple"}}
    assert made("darwin", resources=gpu).policy.gpu is Gpu.METAL_COMPUTE
    assert made("darwin", resources=gpu, place={"gpu_enabled": False}).policy.gpu is Gpu.NONE
    assert made("linux", resources=gpu, place={"gpu_enabled": False}).policy.gpu is Gpu.NONE


def test_auto_is_full_without_endpoints() -> None:
    assert made("darwin").policy.network.level is Network.FULL
    endpoints = [{"name": "h", "protocol": "tcp", "port": 8080}]
    assert made("darwin", endpoints=endpoints).policy.network.level is Network.LOCALHOST


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(
    ("fields", "code", "field"),
    [
        ({"sandbox": {"read": ["/"]}}, "policy_denied", "spec.sandbox.read[0]"),
        ({"sandbox": {"write": ["/var/lib/sandfleet/x"]}}, "policy_denied", "spec.sandbox.write[0]"),
        ({"sandbox": {"groups": ["nope"]}}, "unsupported", "spec.sandbox.groups[0]"),
        ({"sandbox": {"require": ["memory"]}}, "unsupported", "spec.sandbox.require[0]"),
        ({"network": {"access": "none", "connect_ports": [0]}}, "invalid_spec", "spec.network.connect_ports[0]"),
        ({"storage": [{"type": "s3", "bucket": "b", "target": "/x"}]}, "invalid_spec", "spec.storage[0].bucket"),
    ],
)  # fmt: skip
def test_what_no_node_takes(platform: str, fields: dict[str, Any], code: str, field: str) -> None:
    with pytest.raises(ContractError) as caught:
        made(platform, **fields)
    assert (str(caught.value.code), caught.value.field) == (code, field)


@pytest.mark.parametrize(
    ("place", "field"),
    [
        ({"data_dir": "relative"}, "data_dir"),
        ({"data_dir": "/"}, "data_dir"),
        ({"data_dir": "/a\nb"}, "data_dir"),
        ({"rootfs_dir": "/a/../b"}, "rootfs_dir"),
        ({"api_socket": ""}, "api_socket"),
        ({"instance": "x"}, "instance"),
        ({"service": "UP"}, "service"),
    ],
)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_what_is_no_place(platform: str, place: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidCommand) as caught:
        make(spec(), Place(platform=platform, **place))  # type: ignore[arg-type]
    assert caught.value.field == field


def test_an_api_socket_can_be_reached() -> None:
    place = {"api_socket": "/tmp/api.sock"}
    for platform in PLATFORMS:
        box = sandbox_of(made(platform, place=place, network={"access": "none"}).profile)
        assert box.ask(question(platform, "connect", "/tmp/api.sock")).decision == "allow", platform


def test_links_of_a_spec_lead_to_what_was_granted() -> None:
    one = made("darwin", sandbox={"read": ["/opt/a", "/tmp/b/"]})
    assert links_of(spec(sandbox={"read": ["/opt/a", "/tmp/b/"]}), one.policy) == {"/tmp/b": "/private/tmp/b"}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_policy_in_words_names_everything(platform: str) -> None:
    fields: dict[str, Any] = {
        "sandbox": {"read": ["/opt/data"], "unix_sockets": ["/run/a.sock"]},
        "network": {"access": "localhost", "connect_ports": [5432]},
        "storage": [{"type": "named", "name": "n", "target": "/n", "readonly": True}],
        "resources": {"memory": "1Gi", "cpu_time_limit": "5s", "max_files": 99},
        "ulimits": {"stack": {"soft": 1, "hard": 2}},
        "devices": [{"path": "/dev/thing", "write": False}],
    }
    sections = dict(
        in_words(made(platform, place={"port": 30000, "api_socket": "/run/api"}, **fields).policy)
    )
    text = repr(sections)
    for word in ("/opt/data", "/run/a.sock", "5432", "/n", "1073741824", "5 s", "99", "stack", "/dev/thing: read",
                 "read-only", "30000", "4222", "host API", "launcher.key", "localhost"):  # fmt: skip
        assert word in text, word


def test_a_stored_profile_answers_like_the_policy_it_was_made_of() -> None:
    one = made("linux", sandbox={"read": ["/opt/data"]})
    stored = Profile(
        language=one.profile.language,
        text=one.profile.text,
        params=one.profile.params,
        policy=one.profile.policy,
        not_enforced=[],
    )
    answer = sandbox_of(stored).ask(question("linux", "read", "/opt/data/x"))
    assert answer == asked("linux", "read", "/opt/data/x", sandbox={"read": ["/opt/data"]})
