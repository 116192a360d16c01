"""What would allow a refused thing: worked out by changing the spec and asking the evaluator again."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.queries import DenialsReply
from schemas.spec import ServiceSpec, decode_spec
from worker import refusals
from worker.answers import Sandbox, sandbox_of
from worker.errors import PolicyDenied
from worker.platform.darwin.denials import Denial
from worker.platform.darwin.unified_log import LogOutput
from worker.profiles import Place, make, rules_of
from worker.questions import ELSEWHERE, LookupQuestion, PortQuestion, RawQuestion, raw_argument
from worker.refusals import MAX_DENIALS, Explainer, Whose, questions, report

INSTANCE = "01JDDAAAAAAAAAAAAAAAAAAAAA"
PLACE = Place(platform="darwin", macos=26, instance=INSTANCE)
GROUPS = rules_of(PLACE).groups()
AT = datetime(2026, 11, 24, 3, 31, 39, tzinfo=UTC)


def spec(**fields: Any) -> ServiceSpec:
    return decode_spec(json.dumps({"image": {"name": "base"}, **fields}).encode())


def build(changed: ServiceSpec) -> tuple[Sandbox, str | None]:
    return sandbox_of(make(changed, PLACE).profile, release=PLACE.macos), None


def denial(operation: str, argument: str | None, **changes: Any) -> Denial:
    given = {"time_first": AT, "time_last": AT, "count": 1, "process": "sh", "pid": 7}
    return Denial(**{**given, "operation": operation, "argument": argument, **changes})


def remedy(operation: str, argument: str | None, *, access: str = "localhost") -> str | None:
    return Explainer(spec(network={"access": access}), GROUPS, build).allow(denial(operation, argument))


# -- what a record means


@pytest.mark.parametrize(
    ("operation", "argument", "fields"),
    [
        ("file-read-data", "/a {b}", {"path": "/a {b}"}),
        ("process-exec*", "/bin/ls", {"path": "/bin/ls"}),
        ("file-ioctl", 'path:/dev/tty ioctl-command:(_IO "t" 22)', {"path": "/dev/tty"}),
        ("network-outbound", "/private/var/run/syslog", {"path": "/private/var/run/syslog"}),
        ("signal", "others [Safari(5085)] signum:15", {"target": "others"}),
        ("process-info-pidinfo", "others [SpringBoard(12115)]", {"target": "others"}),
        ("iokit-open-user-client", "AppleSMCClient", {"class_": "AppleSMCClient"}),
        ("sysctl-read", '{"path": "/x"}', {"name": '{"path": "/x"}'}),
        ("user-preference-read", "com.apple.HIToolbox", {"name": "com.apple.HIToolbox"}),
        ("system-socket", "domain:32 type:2 protocol:2", {"domain": "AF_SYSTEM", "type": "SOCK_DGRAM", "number": 2}),
        ("system-socket", "domain:99 type:9 protocol:1", {"number": 1}),
        ("process-fork", None, {}),
        ("network-outbound", "remote:*:99999", {"path": "remote:*:99999"}),
    ],
)  # fmt: skip
def test_the_argument_of_a_record(operation: str, argument: str | None, fields: dict[str, Any]) -> None:
    [[question]] = questions(operation, argument)
    assert isinstance(question, RawQuestion)
    made = raw_argument(operation, question.argument)
    assert {name: value for name, value in msgspec.structs.asdict(made).items() if value} == fields


def test_a_connection_may_have_been_to_anywhere() -> None:
    tcp, udp = questions("network-outbound", "remote:*:443")
    assert tcp == tuple(PortQuestion("connect", host, 443) for host in ("localhost", ELSEWHERE))
    assert udp == tuple(PortQuestion("connect", host, 443, udp=True) for host in ("localhost", ELSEWHERE))
    assert questions("network-bind", "local:*:80")[0] == (PortQuestion("bind", "*", 80),)


def test_a_name_may_have_been_of_any_kind() -> None:
    assert questions("mach-lookup", "com.x") == (
        (LookupQuestion("com.x", "global"),),
        (LookupQuestion("com.x", "local"),),
    )
    assert questions("mach-lookup", "com.x (xpc)") == ((LookupQuestion("com.x", "xpc"),),)


# -- what would allow it


@pytest.mark.parametrize(
    ("operation", "argument", "told"),
    [
        ("mach-lookup", "com.apple.dnssd.service", "add `dns` to sandbox.groups"),
        ("network-outbound", "/private/var/run/mDNSResponder", "add `dns` to sandbox.groups"),
        ("system-socket", "domain:32 type:2 protocol:2", "add `dns` to sandbox.groups"),
        ("mach-lookup", "com.apple.trustd", "add `tls` to sandbox.groups"),
        ("file-read-data", "/opt/homebrew/bin/jq", "add `homebrew` to sandbox.groups"),
        ("mach-lookup", "com.acme.service", "sandbox.mach_lookup: [com.acme.service]"),
        ("file-read-data", "/Users/me/data.csv", "sandbox.read: [/Users/me/data.csv]"),
        ("file-write-create", "/Users/me/a b", "sandbox.write: [/Users/me/a b]"),
        ("network-outbound", "/Users/me/app.sock", "sandbox.unix_sockets: [/Users/me/app.sock]"),
        ("network-outbound", "remote:*:5432", "network.connect_ports: [5432] or network.access: outbound"),
        ("network-outbound", "remote:*:443", "network.access: outbound"),
        ("network-bind", "local:*:8080", "endpoints: [{name: NAME, protocol: tcp, port: 8080}]"),
        ("iokit-open-user-client", "AGXDeviceUserClient", "resources.gpu: {count: 1, vendor: apple, mode: mps}"),
        # Nothing in a spec opens these.
        ("network-outbound", "remote:*:4222", None),
        ("file-read-data", "/var/lib/sandfleet/worker.db", None),
        ("file-read-data", "/Users/me/\n(allow default)", None),
        ("file-read-data", "<private>", None),
        ("iokit-open-user-client", "AppleSMCClient", None),
        ("signal", "others [Safari(5085)] signum:15", None),
        ("forbidden-exec-sugid", None, None),
        ("no-such-operation", "x", None),
    ],
)  # fmt: skip
def test_a_remedy(operation: str, argument: str | None, told: str | None) -> None:
    assert remedy(operation, argument) == told


def test_where_nothing_is_open_the_level_is_told_too() -> None:
    told = remedy("network-outbound", "remote:*:5432", access="none")
    assert told == "network.access: localhost and network.connect_ports: [5432] or network.access: outbound"


@pytest.mark.parametrize("release", [12, 14, 26])
def test_a_remedy_is_one(release: int) -> None:
    """Every group that is told really opens what was refused, on that release of macOS."""
    place = msgspec.structs.replace(PLACE, macos=release)
    base = spec(network={"access": "localhost"})

    def ask(changed: ServiceSpec) -> tuple[Sandbox, str | None]:
        return sandbox_of(make(changed, place).profile, release=release), None

    for operation, argument in (
        ("mach-lookup", "com.apple.SystemConfiguration.configd"),
        ("sysctl-write", "kern.grade_cputype"),
        ("sysctl-read", "net.routetable.0.0.1.0"),
        ("user-preference-read", "com.apple.HIToolbox"),
        ("ipc-posix-sem-create", "/sem"),
    ):
        told = Explainer(base, rules_of(place).groups(), ask).allow(denial(operation, argument))
        assert told is not None, operation
        name = told.split("`")[1]
        sandbox = msgspec.structs.replace(base.sandbox, groups=[name])
        changed, _ = ask(msgspec.structs.replace(base, sandbox=sandbox))
        [[question]] = questions(operation, argument)[:1]
        assert changed.ask(question).decision == "allow"


def test_what_the_operator_must_grant_is_told_with_it() -> None:
    def strict(changed: ServiceSpec) -> tuple[Sandbox, str | None]:
        return build(changed)[0], "the node must grant it" if changed.sandbox.groups else None

    explainer = Explainer(spec(network={"access": "localhost"}), GROUPS, strict)
    told = explainer.allow(denial("mach-lookup", "com.apple.dnssd.service"))
    assert told == "add `dns` to sandbox.groups; the node must grant it"


def test_a_node_that_does_not_take_the_spec_any_more() -> None:
    def refuse(changed: ServiceSpec) -> tuple[Sandbox, str | None]:
        raise PolicyDenied("no")

    explainer = Explainer(spec(), GROUPS, refuse)
    assert explainer.allow(denial("mach-lookup", "com.apple.trustd")) is None
    assert explainer.allowed == 0


def test_half_an_argument_has_no_remedy() -> None:
    explainer = Explainer(spec(), GROUPS, build)
    assert explainer.allow(denial("file-read-data", "/Users/me/aaa…", whole=False)) is None


def test_a_refusal_that_the_sandbox_allows_is_counted() -> None:
    explainer = Explainer(spec(), GROUPS, build)
    assert explainer.allow(denial("file-read-data", "/usr/lib/libz.dylib")) is None
    assert explainer.allowed == 1


def test_a_sandbox_is_made_once() -> None:
    made: list[ServiceSpec] = []

    def counted(changed: ServiceSpec) -> tuple[Sandbox, str | None]:
        made.append(changed)
        return build(changed)

    explainer = Explainer(spec(network={"access": "localhost"}), GROUPS, counted)
    for _ in range(3):
        explainer.allow(denial("mach-lookup", "com.apple.dnssd.service"))
    keys = [msgspec.json.encode(one) for one in made]
    assert len(keys) == len(set(keys))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["file-read-data", "mach-lookup", "network-outbound", "signal", "sysctl-read", "x"]),
    st.text(),
)
def test_no_argument_crashes_it(operation: str, argument: str) -> None:
    for readings in questions(operation, argument):
        for question in readings:
            assert not isinstance(question, RawQuestion) or question.operation == operation
    Explainer(spec(), {}, build).allow(denial(operation, argument))


# -- the reply


def record(message: str, *, seconds: float = 0) -> bytes:
    time = (AT + timedelta(seconds=seconds)).strftime("%Y-%m-%d %H:%M:%S.%f+0000")
    plain = {"eventMessage": f"{message}\nsandfleet:{INSTANCE}/1", "timestamp": time, "processID": 0}
    return json.dumps(plain).encode() + b"\n"


def reply(*records: bytes, cut: bool = False) -> DenialsReply:
    output = LogOutput(b"".join(records), cut)
    return report(output, Whose(INSTANCE), spec(network={"access": "localhost"}), GROUPS, build)


def test_a_reply() -> None:
    told = reply(record("Sandbox: curl(9) deny(1) mach-lookup com.apple.dnssd.service"))
    [entry] = told.denials
    assert msgspec.to_builtins(entry, builtin_types=(datetime,)) == {
        "time_first": AT,
        "time_last": AT,
        "count": 1,
        "process": "curl",
        "pid": 9,
        "operation": "mach-lookup",
        "argument": "com.apple.dnssd.service",
        "allow": "add `dns` to sandbox.groups",
    }
    assert told.complete
    assert told.note == refusals.LOWER_BOUND
    assert reply() == DenialsReply(denials=[], complete=True, note=refusals.LOWER_BOUND)


@pytest.mark.parametrize(
    ("records", "cut", "words"),
    [
        ([record("3 duplicate reports for Sandbox: a(9) deny(1) process-fork")], False, "merged 3 reports"),
        ([record("Sandbox: a deny(1) x")], False, "1 reports could not be read"),
        ([b'{"eventType": "lossEvent"}\n'], False, "dropped messages"),
        ([], True, "only its newest part"),
    ],
)
def test_what_is_missing_is_told(records: list[bytes], cut: bool, words: str) -> None:
    told = reply(*records, cut=cut)
    assert not told.complete
    assert words in told.note
    assert told.note.endswith(refusals.LOWER_BOUND)


def test_a_contradiction_is_told() -> None:
    told = reply(record("Sandbox: a(9) deny(1) file-read-data /usr/lib/libz.dylib"))
    assert told.complete
    assert told.note.startswith("1 of these the sandbox of now allows")


def test_the_newest_are_told_when_there_are_too_many() -> None:
    many = [record(f"Sandbox: a(9) deny(1) no-operation {n}", seconds=n) for n in range(MAX_DENIALS + 5)]
    told = reply(*many)
    assert len(told.denials) == MAX_DENIALS
    assert [entry.argument for entry in told.denials[:2]] == ["204", "203"]
    assert not told.complete
    assert "5 older ones are left out" in told.note
    assert "worked out for the newest" in told.note


def test_a_reply_fits_into_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of controls takes six bytes for each."""
    monkeypatch.setattr(refusals, "MAX_REPLY_BYTES", 20_000)
    long = [record(f"Sandbox: a(9) deny(1) no-operation {n}{chr(1) * 900}", seconds=n) for n in range(20)]
    told = reply(*long)
    assert 0 < len(told.denials) < 20
    assert len(msgspec.json.encode(told)) < 22_000
    assert f"{20 - len(told.denials)} older ones are left out" in told.note
