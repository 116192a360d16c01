"""What the host API adds to a sandbox, on each platform."""

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from schemas.node import Feature
from schemas.spec import decode_spec
from schemas.status import Network
from tests.unit.test_host_api import Node
from tests.unit.test_policy import FakeDriver
from worker.config import Config, PolicyConfig
from worker.datadir import ContainerDirs
from worker.errors import PolicyDenied
from worker.platform.base import NetworkPolicy, PathRule, SandboxPolicy
from worker.platform.darwin.evaluate import Argument, evaluate
from worker.platform.darwin.sbpl import build_profile
from worker.platform.linux.driver import LinuxDriver
from worker.policy import HostFacts, make_policy


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def sandbox(
    node: Node, spec: dict[str, Any] | None = None, grants: PolicyConfig | None = None, **facts: Any
) -> SandboxPolicy:
    node.dirs()
    return make_policy(
        decode_spec({"image": {"name": "app"}, **(spec or {})}),
        config=Config(policy=grants or PolicyConfig()),
        dirs=node.dirs(),
        cid="web-0",
        instance="0" * 26,
        port=30000,
        host=HostFacts(data_root=str(node.root), protected=(str(node.secret),), nats_ports=(4222,), **facts),
        driver=FakeDriver(),
    )


@pytest.mark.parametrize("access", ["none", "localhost", "outbound", "full"])
def test_every_level_has_the_socket_and_the_token_to_read(node: Node, access: str) -> None:
    policy = sandbox(node, {"network": {"access": access}}, api_socket=str(node.socket), api_tokens=True)
    assert policy.network.unix_sockets == (str(node.socket),)
    assert policy.network.api_socket == str(node.socket)
    assert PathRule(str(node.dirs().api), "r", "host_api") in policy.paths
    assert str(node.secret) in policy.deny
    assert str(node.socket) not in policy.deny


def test_without_a_host_api_nothing_is_granted(node: Node) -> None:
    policy = sandbox(node)
    assert policy.network == NetworkPolicy(
        level=Network.FULL, bind_ports=(30000,), denied_ports=(4222,), udp=True
    )
    assert all(rule.origin != "host_api" for rule in policy.paths)


@pytest.mark.parametrize(
    ("kind", "path"),
    [("write", "run"), ("read", "run"), ("read", "run/api.sock"), ("unix_sockets", "run/api.sock")],
)
def test_no_grant_reaches_around_it(node: Node, kind: str, path: str) -> None:
    """The same grant without a host API shows that it would hold."""
    run = node.top / "run"
    run.mkdir()
    (run / "api.sock").write_text("")
    asked = {"sandbox": {kind: [str(node.top / path)]}}
    grants = msgspec.convert({kind: [str(run)]}, PolicyConfig)
    sandbox(node, asked, grants)
    with pytest.raises(PolicyDenied, match="overlaps files of the node itself"):
        sandbox(node, asked, grants, api_socket=str(run / "api.sock"))


@pytest.mark.parametrize("access", ["none", "localhost", "outbound", "full"])
@pytest.mark.parametrize("release", [12, 15, 26])
def test_a_macs_profile_grants_both(access: str, release: int) -> None:
    dirs = ContainerDirs(Path("/Users/fleet/data/containers/web-0"))
    facts = HostFacts(data_root="/Users/fleet/data", api_socket="/var/run/api.sock", api_tokens=True)
    policy = make_policy(
        decode_spec({"image": {"name": "app"}, "network": {"access": access}}),
        config=Config(),
        dirs=dirs,
        cid="web-0",
        instance="0" * 26,
        port=30000,
        host=facts,
        driver=FakeDriver(),
    )
    profile = build_profile(policy, release=release)
    name = next(k for k, v in profile.params.items() if v == "/private/var/run/api.sock")
    rules = re.findall(r"^\((?:allow|deny) [^;]*?(?=^[(;]|\Z)", profile.text, re.MULTILINE)
    assert [
        rule
        for rule in rules
        if rule.startswith("(allow network-outbound") and f'(literal (param "{name}"))' in rule
    ], profile.text

    def decision(operation: str, path: str) -> str:
        argument = Argument(path=path)
        return evaluate(profile.text, profile.params, operation, argument, release=release).decision

    assert decision("network-outbound", "/private/var/run/api.sock") == "allow"
    assert decision("file-read-metadata", "/private/var/run/api.sock") == "allow"
    assert decision("network-outbound", "/private/var/run/other.sock") == "deny"
    assert decision("file-read-data", f"{dirs.api}/token") == "allow"
    assert decision("file-write-data", f"{dirs.api}/token") == "deny"
    assert decision("file-write-unlink", f"{dirs.api}/token") == "deny"
    assert decision("file-read-data", f"{dirs.state}/config.json") == "deny"


def linux_plan(driver: LinuxDriver, *sockets: str, api: str | None, level: str = "none") -> dict[str, Any]:
    return driver.plan(linux_policy(*sockets, api=api, level=level))


def linux_policy(*sockets: str, api: str | None, level: str = "none") -> SandboxPolicy:
    granted = (*sockets, *([api] if api else []))
    return SandboxPolicy(
        container="web-0",
        instance="0" * 26,
        rootfs="/r",
        tmp="/t",
        state_dir="/s",
        paths=(PathRule("/r", "rwx", "rootfs"), PathRule("/a", "r", "host_api")),
        network=NetworkPolicy(level=Network(level), unix_sockets=granted, api_socket=api),
    )


@pytest.mark.parametrize("level", ["none", "localhost", "outbound", "full"])
def test_on_linux_the_shim_keeps_the_gate(level: str) -> None:
    driver = LinuxDriver(abi=7, filter=True, root=False, gate=True)
    plan = linux_plan(driver, api="/run/api.sock", level=level)
    steps = dict(plan["steps"])
    assert plan["gate"] == "/run/api.sock"
    assert steps["seccomp"]["gate"] is True
    assert steps["seccomp"]["unix"] is False
    assert steps["landlock"]["paths"] == [["/r", "rwx"], ["/a", "r"]]  # no sockets of its own
    policy = linux_policy(api="/run/api.sock", level=level)
    assert Feature.UNIX_SOCKETS not in {gap.feature for gap in driver.not_enforced(policy)}
    text = driver.describe(policy).text
    assert "unix     /run/api.sock" in text
    assert "\nask " in text


@pytest.mark.parametrize(
    ("gate", "sockets"), [(False, ()), (True, ("/run/other.sock",)), (False, ("/run/other.sock",))]
)
def test_where_sockets_cannot_be_told_apart_it_is_said(gate: bool, sockets: tuple[str, ...]) -> None:
    driver = LinuxDriver(abi=7, filter=True, root=False, gate=gate)
    plan = linux_plan(driver, *sockets, api="/run/api.sock")
    assert "gate" not in plan
    assert "gate" not in dict(plan["steps"])["seccomp"]
    assert dict(plan["steps"])["seccomp"]["unix"] is True
    gaps = driver.not_enforced(linux_policy(*sockets, api="/run/api.sock"))
    assert Feature.UNIX_SOCKETS in {gap.feature for gap in gaps}


def test_without_a_host_api_the_plan_is_as_it_was() -> None:
    driver = LinuxDriver(abi=7, filter=True, root=False, gate=True)
    plan = linux_plan(driver, api=None)
    assert "gate" not in plan
    assert "gate" not in dict(plan["steps"])["seccomp"]
    assert dict(plan["steps"])["seccomp"]["unix"] is False


def test_a_kernel_without_filters_has_no_gate() -> None:
    driver = LinuxDriver(abi=7, filter=False, root=False, gate=True)
    plan = linux_plan(driver, api="/run/api.sock")
    assert "gate" not in plan
    assert "seccomp" not in dict(plan["steps"])
