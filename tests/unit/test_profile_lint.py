"""What `profile lint` finds fault with, and what not."""

from typing import Any

import pytest

from worker.profile_lint import Finding, lint
from worker.profile_lint_lists import is_broad, is_system, power_of_socket, secret_in, starts_programs
from worker.profiles import Place
from worker.specfile import load_specs

from .profile_help import PLATFORMS, spec
from .test_docs import EXAMPLES

QUIET: dict[str, Any] = {"network": {"access": "none"}}


def found(platform: str = "darwin", **fields: Any) -> set[tuple[str, str, str]]:
    """(severity, rule, field) of each finding; without network unless the spec says otherwise."""
    return {
        (one.severity, one.rule, one.field)
        for one in lint(spec(**{**QUIET, **fields}), Place(platform=platform))  # type: ignore[arg-type]
    }


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_careful_spec_is_let_pass(platform: str) -> None:
    fields = {
        "endpoints": [{"name": "h", "protocol": "http", "port": 8080}],
        "network": {"access": "localhost", "connect_ports": [5432]},
        "sandbox": {"read": ["/opt/data"], "write": ["/srv/out"]},
        "storage": [{"type": "bind", "source": "/srv/in", "target": "/in", "readonly": True}],
    }
    assert found(platform, **fields) == set()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_our_own_examples_hold_no_error(path: Any, platform: str) -> None:
    for one in load_specs(path)[1].values():
        errors = [f for f in lint(one, Place(platform=platform)) if f.severity == "error"]  # type: ignore[arg-type]
        assert errors == []


@pytest.mark.parametrize("platform", PLATFORMS)
def test_auto_without_endpoints(platform: str) -> None:
    assert found(platform, network={}) == {("warning", "auto-full", "network.access")}
    assert found(platform, network={"access": "full"}) == set()
    endpoints = [{"name": "h", "protocol": "http", "port": 8080}]
    assert found(platform, network={}, endpoints=endpoints) == set()


@pytest.mark.parametrize(
    ("platform", "fields", "finding"),
    [
        # too broad
        ("darwin", {"sandbox": {"read": ["/Users"]}}, ("warning", "too-broad", "sandbox.read[0]")),
        ("darwin", {"sandbox": {"read": ["/Users/me/"]}}, ("warning", "too-broad", "sandbox.read[0]")),
        ("darwin", {"sandbox": {"read": ["/etc"]}}, ("warning", "too-broad", "sandbox.read[0]")),
        ("linux", {"sandbox": {"read": ["/opt/x", "/home/me"]}}, ("warning", "too-broad", "sandbox.read[1]")),
        ("linux", {"sandbox": {"write": ["/etc/x"]}}, ("error", "writes-system", "sandbox.write[0]")),
        ("darwin", {"sandbox": {"write": ["/etc/x"]}}, ("error", "writes-system", "sandbox.write[0]")),
        ("linux", {"storage": [{"type": "bind", "source": "/usr/lib/x", "target": "/x"}]},
         ("error", "writes-system", "storage[0].source")),
        ("linux", {"devices": [{"path": "/dev/sda"}]}, ("error", "writes-system", "devices[0].path")),
        ("darwin", {"sandbox": {"read": ["/Users/me/.ssh"]}}, ("warning", "secrets", "sandbox.read[0]")),
        ("darwin", {"sandbox": {"write": ["/Users/me/Library/LaunchAgents"]}},
         ("error", "escape", "sandbox.write[0]")),
        ("linux", {"sandbox": {"unix_sockets": ["/run/docker.sock"]}},
         ("warning", "control-socket", "sandbox.unix_sockets[0]")),
        ("linux", {"sandbox": {"unix_sockets": ["/run/x.sock"]}},
         ("warning", "all-sockets", "sandbox.unix_sockets")),
        ("darwin", {"sandbox": {"mach_lookup": ["com.apple.coreservices.launchservicesd"]}},
         ("error", "dangerous-service", "sandbox.mach_lookup[0]")),
        ("darwin", {"sandbox": {"groups": ["dns"]}}, ("warning", "dns-leaks", "sandbox.groups")),
        ("linux", {"sandbox": {"groups": ["shm"]}}, ("note", "needs-grant", "sandbox.groups[0]")),
        ("linux", {"network": {"access": "localhost"}, "endpoints": [{"name": "h", "protocol": "tcp", "port": 80}]},
         ("warning", "low-port", "endpoints[0].port")),
        # dead
        ("darwin", {"sandbox": {"read": ["/usr/bin/x"]}}, ("warning", "dead", "sandbox.read[0]")),
        ("linux", {"sandbox": {"read": ["/usr/share/x"]}}, ("warning", "dead", "sandbox.read[0]")),
        ("darwin", {"sandbox": {"read": ["/opt/a", "/opt/a/b"]}}, ("warning", "dead", "sandbox.read[1]")),
        ("linux", {"sandbox": {"read": ["/opt/a", "/opt/a/b"]}}, ("warning", "dead", "sandbox.read[1]")),
        ("darwin", {"sandbox": {"write": ["/opt/a", "/opt/a/b"]}}, ("warning", "dead", "sandbox.write[1]")),
        ("darwin", {"sandbox": {"read": ["/opt/a", "/opt/a"]}}, ("warning", "duplicate", "sandbox.read[1]")),
        ("darwin", {"sandbox": {"mach_lookup": ["com.apple.logd"]}}, ("warning", "dead", "sandbox.mach_lookup[0]")),
        ("darwin", {"network": {"access": "outbound"}, "sandbox": {"groups": ["tls"]}},
         ("warning", "dead", "sandbox.groups[0]")),
        ("darwin", {"network": {"access": "localhost", "connect_ports": [443]}},
         ("warning", "dead", "network.connect_ports[0]")),
        ("darwin", {"network": {"access": "full", "connect_ports": [5432]}},
         ("warning", "dead", "network.connect_ports[0]")),
        # at odds
        ("darwin", {"endpoints": [{"name": "h", "protocol": "tcp", "port": 8080}]},
         ("error", "contradiction", "endpoints[0].port")),
        ("linux", {"network": {"access": "none", "connect_ports": [5432]}},
         ("error", "contradiction", "network.connect_ports[0]")),
        ("darwin", {"network": {"access": "full"}, "endpoints": [{"name": "h", "protocol": "tcp", "port": 4222}]},
         ("error", "contradiction", "endpoints[0].port")),
        ("linux", {"sandbox": {"write": ["/srv"]},
                   "storage": [{"type": "bind", "source": "/srv/ro", "target": "/x", "readonly": True}]},
         ("error", "writable", "storage[0].readonly")),
        ("linux", {"sandbox": {"write": ["/opt/a"], "read": ["/opt/a"]}}, ("warning", "writable", "sandbox.read[0]")),
        # what no node takes
        ("darwin", {"sandbox": {"read": ["/"]}}, ("error", "policy_denied", "sandbox.read[0]")),
        ("linux", {"sandbox": {"require": ["memory"]}}, ("error", "unsupported", "sandbox.require[0]")),
        ("linux", {"sandbox": {"mach_lookup": ["x"]}}, ("error", "unsupported", "sandbox.mach_lookup[0]")),
        ("linux", {"resources": {"gpu": {"count": 1, "vendor": "apple"}}}, ("error", "unsupported", "resources.gpu")),
    ],
)  # fmt: skip
def test_a_fault(platform: str, fields: dict[str, Any], finding: tuple[str, str, str]) -> None:
    assert finding in found(platform, **fields)


@pytest.mark.parametrize(
    ("platform", "fields", "rule"),
    [
        # A Mac keeps a read-only folder in a writable one: neither dead nor writable.
        ("darwin", {"sandbox": {"write": ["/opt/a"], "read": ["/opt/a/b"]}}, "dead"),
        ("darwin", {"sandbox": {"write": ["/opt/a"], "read": ["/opt/a/b"]}}, "writable"),
        ("darwin", {"sandbox": {"groups": ["homebrew"]}}, "dead"),
        ("darwin", {"sandbox": {"groups": ["dns"]}}, "dead"),
        ("linux", {"sandbox": {"groups": ["proc", "shm", "ipc", "pty", "cgroup"]}}, "dead"),
        ("darwin", {"sandbox": {"mach_lookup": ["com.example.x"]}}, "dead"),
        ("darwin", {"sandbox": {"unix_sockets": ["/run/x.sock"]}}, "dead"),
        ("darwin", {"sandbox": {"unix_sockets": ["/run/x.sock"]}}, "all-sockets"),
        ("linux", {"sandbox": {"write": ["/usr/local/share/x"]}}, "writes-system"),
        ("linux", {"sandbox": {"read": ["/opt/app"]}}, "too-broad"),
    ],
)
def test_no_fault(platform: str, fields: dict[str, Any], rule: str) -> None:
    assert rule not in {name for _, name, _ in found(platform, **fields)}


def test_the_worst_comes_first_and_nothing_twice() -> None:
    bad = spec(sandbox={"read": ["/Users", "/Users"], "write": ["/etc"], "groups": ["dns"]})
    findings = lint(bad, Place())
    severities = [one.severity for one in findings]
    assert severities == sorted(severities, key=["error", "warning", "note"].index)
    assert len(set(findings)) == len(findings)
    assert all(isinstance(one, Finding) and one.message for one in findings)


def test_lists() -> None:
    assert is_broad("/home/me")
    assert not is_broad("/home/me/work")
    assert is_system("/private/etc/hosts")
    assert is_system("/dev/rdisk2")
    assert not is_system("/dev/ttyUSB0")
    assert not is_system("/usr/local")
    assert secret_in("/home/me/.aws/credentials") == "cloud credentials"
    assert secret_in("/home/me/work") is None
    assert starts_programs("/home/me/.bashrc")
    assert power_of_socket("/var/run/docker.sock") is not None
    assert power_of_socket("/run/postgresql/.s.PGSQL.5432") is None
