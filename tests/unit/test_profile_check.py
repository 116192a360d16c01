"""What `profile check` answers, and what it says would allow a thing."""

from typing import Any

import pytest

from schemas.errors import InvalidCommand
from schemas.queries import Decision
from schemas.spec import decode_spec
from worker.answers import together
from worker.errors import Internal, PolicyDenied
from worker.platform.base import Profile
from worker.profile_check import Attempts, check, offline
from worker.profiles import Place, canonical_on, make, rules_of
from worker.questions import Answer

from .profile_help import checked, made, question, sandbox, spec

WEB: dict[str, Any] = {"endpoints": [{"name": "h", "protocol": "http", "port": 8080}]}


@pytest.mark.parametrize(
    ("operation", "argument", "fields", "decision"),
    [
        ("read", "/bin/sh", {}, "allow"),
        ("exec", "/bin/sh", {}, "allow"),
        ("read", "/Users/me/.ssh/id_rsa", {}, "deny"),
        ("read", "/opt/data/x", {"sandbox": {"read": ["/opt/data"]}}, "allow"),
        ("write", "/opt/data/x", {"sandbox": {"read": ["/opt/data"]}}, "deny"),
        ("write", "/opt/data/x", {"sandbox": {"write": ["/opt/data"]}}, "allow"),
        ("connect", "localhost:8080", WEB, "allow"),
        ("connect", "10.0.0.1:8080", WEB, "deny"),
        ("connect", "10.0.0.1:8080", {}, "allow"),
        ("connect", "example.com:443", {"network": {"access": "outbound"}}, "allow"),
        ("connect", "localhost:9000", {"network": {"access": "outbound"}}, "deny"),
        ("bind", "8080", WEB, "allow"),
        ("bind", "8081", WEB, "deny"),
        ("gpu", None, {"resources": {"gpu": {"count": 1, "vendor": "apple"}}}, "allow"),
        ("gpu", None, {}, "deny"),
        ("lookup", "com.example.x", {"sandbox": {"mach_lookup": ["com.example.x"]}}, "allow"),
        ("lookup", "com.example.y", {"sandbox": {"mach_lookup": ["com.example.x"]}}, "deny"),
        ("connect", "/run/x.sock", {"sandbox": {"unix_sockets": ["/run/x.sock"]}}, "allow"),
        ("connect", "/run/y.sock", {"sandbox": {"unix_sockets": ["/run/x.sock"]}}, "deny"),
        ("process-fork", None, {}, "allow"),
        ("file-write-data", "/private/etc/hosts", {}, "deny"),
    ],
)
def test_seatbelt(operation: str, argument: str | None, fields: dict[str, Any], decision: str) -> None:
    reply = checked("darwin", operation, argument, **fields)
    assert reply.decision == decision, reply
    assert reply.reason
    assert (reply.would_allow is None) == (decision != "deny")


def test_the_rule_stands_at_its_line() -> None:
    profile = made("darwin", sandbox={"read": ["/opt/data"]}).profile
    reply = checked("darwin", "read", "/opt/data/x", sandbox={"read": ["/opt/data"]})
    assert reply.line is not None
    assert reply.rule is not None
    assert profile.text.split("\n")[reply.line - 1].split()[0] == reply.rule.split()[0]


@pytest.mark.parametrize(
    ("platform", "operation", "argument", "fields", "remedy"),
    [
        ("darwin", "read", "/opt/data", {}, "sandbox.read: [/opt/data]"),
        ("linux", "read", "/opt/data", {}, "sandbox.read: [/opt/data]"),
        ("darwin", "write", "/opt/data", {}, "sandbox.write: [/opt/data]"),
        ("linux", "exec", "/opt/tool", {}, "sandbox.read: [/opt/tool]"),
        ("darwin", "exec", "/opt/homebrew/bin/jq", {}, "add `homebrew` to sandbox.groups"),
        ("darwin", "connect", "localhost:5432", WEB, "network.connect_ports: [5432]"),
        ("linux", "connect", "localhost:5432", WEB, "network.connect_ports: [5432]"),
        ("darwin", "connect", "localhost:5432", {"network": {"access": "none"}},
         "network.access: localhost and network.connect_ports: [5432]"),
        ("darwin", "connect", "localhost:443", {"network": {"access": "none"}}, "network.access: localhost"),
        ("darwin", "connect", "10.0.0.1:443", WEB, "network.access: outbound"),
        ("darwin", "connect", "example.com:443", {"network": {"access": "none"}}, "network.access: outbound"),
        ("linux", "connect", "example.com:443", WEB, "network.access: outbound"),
        ("darwin", "bind", "9000", WEB, "endpoints: [{name: NAME, protocol: tcp, port: 9000}]"),
        ("linux", "bind", "9000/udp", WEB, "endpoints: [{name: NAME, protocol: udp, port: 9000}]"),
        ("darwin", "lookup", "com.example.x", {}, "sandbox.mach_lookup: [com.example.x]"),
        ("darwin", "connect", "/private/var/run/mDNSResponder", WEB, "add `dns` to sandbox.groups"),
        ("darwin", "connect", "/run/x.sock", WEB, "sandbox.unix_sockets: [/run/x.sock]"),
        ("linux", "connect", "/run/x.sock", WEB, "sandbox.unix_sockets: [/run/x.sock]"),
        ("darwin", "gpu", None, {}, "resources.gpu: {count: 1, vendor: apple, mode: mps}"),
        ("linux", "write", "/dev/shm/x", {}, "add `shm` to sandbox.groups"),
        ("linux", "read", "/proc/1/stat", {}, "add `proc` to sandbox.groups"),
        ("linux", "ioctl_dev", "/dev/thing", {}, "devices: [{path: /dev/thing, write: false}]"),
        ("darwin", "file-read-data", "/opt/x", {}, "sandbox.read: [/opt/x]"),
        ("darwin", "file-write-create", "/opt/x", {}, "sandbox.write: [/opt/x]"),
        ("darwin", "network-outbound", "127.0.0.1:5432", WEB, "network.connect_ports: [5432]"),
        ("darwin", "iokit-open-user-client", "AGXDeviceUserClient", {},
         "resources.gpu: {count: 1, vendor: apple, mode: mps}"),
        ("linux", "connect_tcp", "5432", WEB, "network.connect_ports: [5432]"),
        ("linux", "syscall", "shmget", {}, "add `ipc` to sandbox.groups"),
        ("linux", "socket", "inet/stream", {"network": {"access": "none"}}, "network.access: localhost"),
    ],
)  # fmt: skip
def test_what_would_allow_it(
    platform: str, operation: str, argument: str | None, fields: dict[str, Any], remedy: str
) -> None:
    reply = checked(platform, operation, argument, **fields)
    assert reply.decision == Decision.DENY
    assert remedy in (reply.would_allow or ()), reply


@pytest.mark.parametrize(
    ("platform", "operation", "argument", "fields"),
    [
        ("darwin", "read", "/var/lib/sandfleet/worker.db", {}),
        ("linux", "read", "/var/lib/sandfleet/containers/app-0/state/config.json", {}),
        ("darwin", "connect", "localhost:4222", WEB),
        # At a wider level Linux could not refuse it; that is no advice.
        ("linux", "connect", "localhost:4222", WEB),
        ("darwin", "sysctl-read", "kern.procargs2", {}),
        ("linux", "syscall", "ptrace", {}),
        ("linux", "lookup", "com.apple.trustd", {}),
        ("linux", "gpu", None, {}),
    ],
)
def test_what_nothing_would_allow(
    platform: str, operation: str, argument: str | None, fields: dict[str, Any]
) -> None:
    reply = checked(platform, operation, argument, **fields)
    assert (reply.decision, reply.would_allow) == (Decision.DENY, [])


def test_every_remedy_was_tried() -> None:
    """Each change of the spec that is told allows it; the told text is the change that was made."""
    reply = checked("darwin", "lookup", "com.apple.trustd", network={"access": "none"})
    assert "add `tls` to sandbox.groups" in (reply.would_allow or ())
    for remedy in reply.would_allow or ():
        name = remedy.removeprefix("add `").partition("`")[0]
        grant = {"groups": [name]} if remedy.startswith("add") else {"mach_lookup": ["com.apple.trustd"]}
        again = checked("darwin", "lookup", "com.apple.trustd", network={"access": "none"}, sandbox=grant)
        assert again.decision == Decision.ALLOW, remedy


def test_a_node_that_does_not_grant_it_says_what_its_operator_must_do() -> None:
    place = Place(platform="darwin")
    open_ = offline(place).open

    def strict(asked: Any) -> Profile:
        if asked.sandbox.read:
            raise PolicyDenied('add "/opt" to read in node.toml', field="spec.sandbox.read[0]")
        return make(asked, place).profile

    attempts = Attempts(strict, open_, generous=lambda asked: make(asked, place).profile)
    reply = check(
        spec(), attempts, "read", "/opt/x", canonical=canonical_on("darwin"), groups=rules_of(place).groups()
    )
    assert reply.would_allow == ['sandbox.read: [/opt/x]; add "/opt" to read in node.toml']
    alone = check(
        spec(),
        Attempts(strict, open_),
        "read",
        "/opt/x",
        canonical=canonical_on("darwin"),
        groups=rules_of(place).groups(),
    )
    assert alone.would_allow == []


def test_a_profile_that_no_mac_takes_is_a_bug_of_ours() -> None:
    place = Place(platform="darwin")
    profile = make(decode_spec({"image": {"name": "a"}}), place).profile
    broken = Profile(
        language="sbpl",
        text=profile.text + "(allow nonsense)\n",
        params=profile.params,
        policy=profile.policy,
        not_enforced=[],
    )
    attempts = Attempts(lambda _: broken, offline(place).open)
    with pytest.raises(Internal, match="line"):
        check(spec(), attempts, "gpu", None, canonical=canonical_on("darwin"), groups={})


def test_an_unknown_operation_names_its_field() -> None:
    with pytest.raises(InvalidCommand) as caught:
        checked("darwin", "frobnicate", "/x")
    assert caught.value.field == "operation"


def test_one_need_that_is_denied_denies_the_whole() -> None:
    def answer(decision: str) -> Answer:
        return Answer(decision, decision, None, "")

    assert together([answer("allow"), answer("unknown"), answer("deny")]).decision == "deny"
    assert together([answer("allow"), answer("unknown")]).decision == "unknown"
    assert together([Answer("allow", "first", 1, ""), answer("allow")]).rule == "first"


def test_a_volume_is_found_where_the_rootfs_has_it() -> None:
    storage = [{"type": "named", "name": "data", "target": "/data", "readonly": True}]
    box = sandbox("darwin", storage=storage)
    inside = "/var/lib/sandfleet/containers/app-0/rootfs/data/x"
    assert box.ask(question("darwin", "read", inside)).decision == "allow"
    assert box.ask(question("darwin", "write", inside)).decision == "deny"
