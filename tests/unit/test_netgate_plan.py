"""What a plan, a profile and the node say of a container with a network of its own."""

import json
from typing import Any

import pytest

from schemas.status import Network
from tests.unit.test_linux_driver import made, policy, steps
from worker.platform.base import NetworkPolicy, SandboxPolicy
from worker.platform.linux import enforce, seccomp, system
from worker.platform.linux.decide import Confinement
from worker.platform.linux.netgate import NetGate
from worker.platform.linux.netrules import Ports

NODE = made(abi=7, filter=True, root=False, gate=True, rooted=True)
GRANTS: dict[str, Any] = {
    "bind_ports": (8080, 9999),
    "udp_ports": (9999,),
    "connect_ports": (53, 80, 443, 4222, 5432, 8080, 9999),
    "denied_ports": (4222,),
    "udp": True,
}


def rooted(level: Network = Network.LOCALHOST, **changes: Any) -> SandboxPolicy:
    return policy(isolation="rootfs", network=NetworkPolicy(level=level, **{**GRANTS, **changes}))


def gaps(node: Any, some: SandboxPolicy) -> set[str]:
    return {gap.feature.value for gap in node.not_enforced(some)} & {
        "network.localhost",
        "network.outbound",
        "network.udp",
        "abstract_sockets",
    }


def test_the_plan() -> None:
    plan = NODE.plan(rooted())
    assert json.loads(json.dumps(plan)) == plan
    assert plan["ports"] == {
        "bind": [8080, 9999],
        "connect": [53, 80, 443, 5432, 8080, 9999],
        "udp_bind": [9999],
        "udp_connect": [53, 80, 443, 5432],
    }
    assert plan["root"]["net"] is True
    # What makes every race harmless: the program itself may bind and connect no TCP at all.
    assert (steps(plan)["landlock"]["net"], steps(plan)["landlock"]["ports"]) == ("bc", [])
    assert steps(plan)["seccomp"]["ports"] is True
    assert steps(plan)["seccomp"]["inet"] == "udp"
    assert steps(plan)["seccomp"]["fastopen"] is False
    assert seccomp.Options(**steps(plan)["seccomp"]).asks


@pytest.mark.parametrize("level", [Network.NONE, Network.OUTBOUND, Network.FULL])
def test_other_levels_have_none(level: Network) -> None:
    plan = NODE.plan(rooted(level))
    assert "ports" not in plan
    assert "ports" not in steps(plan)["seccomp"]
    assert plan["root"]["net"] is (level is Network.NONE)


@pytest.mark.parametrize(
    "node",
    [
        made(abi=3, filter=True, gate=True, rooted=True),
        made(abi=7, filter=True, gate=False, rooted=True),
        made(abi=7, filter=False, gate=True, rooted=True),
        made(abi=7, filter=True, gate=True, rooted=True, ports=False),
    ],
    ids=["an older Landlock", "no calls are handed over", "no filter", "no descriptors can be had"],
)
def test_a_node_that_cannot_shares_the_hosts_network_and_says_so(node: Any) -> None:
    plan = node.plan(rooted())
    assert "ports" not in plan
    assert plan["root"]["net"] is False
    assert {"network.localhost", "network.udp"} <= gaps(node, rooted())
    told = {(gap.feature.value, gap.isolation) for gap in node.capabilities().not_enforced}
    assert ("network.localhost", "rootfs") in told


def test_isolation_process_is_as_before() -> None:
    plain = policy(network=NetworkPolicy(level=Network.LOCALHOST, **GRANTS))
    plan = NODE.plan(plain)
    assert "ports" not in plan
    assert "ports" not in steps(plan)["seccomp"]
    assert steps(plan)["landlock"]["ports"][0] == [53, "c"]
    assert gaps(NODE, plain) == {"network.localhost", "network.udp"}


def test_gaps() -> None:
    assert gaps(NODE, rooted()) == set()
    assert gaps(NODE, rooted(unix_sockets=("/run/s",))) == set()
    assert gaps(made(abi=4, filter=True, gate=True, rooted=True), rooted(unix_sockets=("/run/s",))) == set()
    assert gaps(NODE, rooted(Network.OUTBOUND)) == {"network.outbound", "network.udp"}
    told = {
        gap.feature.value: gap.reason for gap in NODE.capabilities().not_enforced if gap.isolation == "rootfs"
    }
    assert "network.localhost" not in told
    assert told["network.udp"].startswith("at the level outbound only")


def test_what_is_handed_over_with_the_listener() -> None:
    plan = {**NODE.plan(rooted()), "gate": "/run/api.sock"}
    descriptors, words = enforce.questions(plan, joined=True)
    assert descriptors == []
    path, _, packed = words.partition(b"\0")
    assert path == b"/run/api.sock"
    assert Ports.unpack(packed) == Ports.of_plan(plan["ports"])
    assert enforce.questions({"gate": "/run/api.sock"}, joined=False) == ([], b"/run/api.sock")


def test_the_gate_looks_at_every_call_that_the_filter_asks_about() -> None:
    """Else a call would wait for ever."""
    asked = {
        call
        for rule in seccomp.rules(seccomp.Options(inet="udp", ports=True))
        if rule.verdict == seccomp.ASK
        for call in rule.calls.split()
    }
    assert asked == {"bind", "connect", "listen", "epoll_create", "epoll_create1"} == set(NetGate.CALLS)


def confinement() -> Confinement:
    some = rooted()
    return Confinement(NODE.describe(some), NODE.plan(some), some, system.listed(), {})


@pytest.mark.parametrize(
    ("word", "port", "more", "decision", "line"),
    [
        ("connect", 5432, {}, "allow", "connect  tcp"),
        ("connect", 5432, {"local": False}, "deny", "else"),
        ("connect", 5433, {}, "deny", "else"),
        ("connect", 4222, {}, "deny", "else"),
        ("connect", 53, {"udp": True}, "allow", "connect  udp"),
        ("connect", 9999, {"udp": True}, "deny", "else"),
        ("bind", 8080, {}, "allow", "bind     tcp"),
        ("bind", 8081, {}, "allow", "else"),
        ("bind", 9999, {"udp": True}, "allow", "bind     udp"),
        ("bind", 8080, {"udp": True}, "allow", "else"),
    ],
)
def test_questions(word: str, port: int, more: dict[str, bool], decision: str, line: str) -> None:
    asked = confinement()
    ruling = getattr(asked, word)(port, **more)
    assert ruling.decision == decision
    assert ruling.rule.startswith(line)
    assert asked.line(ruling.rule) is not None
    assert ("does not see it" in ruling.reason) is (word == "bind" and line == "else")


def test_the_profile_in_words() -> None:
    lines = NODE.describe(rooted()).text.splitlines()
    assert "bind     tcp 8080 9999" in lines
    assert "bind     udp 9999" in lines
    assert "connect  tcp 53 80 443 5432 8080 9999" in lines
    assert "connect  udp 53 80 443 5432" in lines
    assert any(line.startswith("else     its own loopback") for line in lines)
    assert not any(line.startswith("never") for line in lines)
    assert any(line.startswith("ask         connect bind listen") for line in lines)
    assert next(line for line in lines if line.startswith("mount ")).endswith(" net")
