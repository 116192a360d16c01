"""Questions in plain words, and what they are in the operations of Seatbelt."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import ContractError, InvalidCommand
from worker.platform.darwin.evaluate import Argument
from worker.platform.darwin.sbpl_operations import known
from worker.profiles import canonical_on
from worker.questions import (
    ELSEWHERE,
    PLAIN,
    FileQuestion,
    GpuQuestion,
    LookupQuestion,
    PortQuestion,
    RawQuestion,
    SocketQuestion,
    parse_question,
    raw_argument,
    requests,
    spoken,
)

DARWIN = canonical_on("darwin")
LINUX = canonical_on("linux")


@pytest.mark.parametrize(
    ("operation", "argument", "wanted"),
    [
        ("read", "/etc/hosts", FileQuestion("read", "/private/etc/hosts")),
        ("write", "/opt//data/./x/", FileQuestion("write", "/opt/data/x")),
        ("exec", "/bin/sh", FileQuestion("exec", "/bin/sh")),
        ("connect", "localhost:5432", PortQuestion("connect", "localhost", 5432)),
        ("connect", "LocalHost:80", PortQuestion("connect", "localhost", 80)),
        ("connect", "10.0.0.1:443", PortQuestion("connect", "10.0.0.1", 443)),
        ("connect", "[::1]:80", PortQuestion("connect", "::1", 80)),
        ("connect", "example.com:443/udp", PortQuestion("connect", "example.com", 443, True)),
        ("connect", "/tmp/x.sock", SocketQuestion("connect", "/private/tmp/x.sock")),
        ("connect", "unix:/run/x.sock", SocketQuestion("connect", "/run/x.sock")),
        ("bind", "8080", PortQuestion("bind", "*", 8080)),
        ("bind", "127.0.0.1:8080", PortQuestion("bind", "127.0.0.1", 8080)),
        ("bind", "53/udp", PortQuestion("bind", "*", 53, True)),
        ("bind", "0", PortQuestion("bind", "*", 0)),
        ("lookup", "com.apple.trustd", LookupQuestion("com.apple.trustd")),
        ("lookup", "xpc:com.apple.x", LookupQuestion("com.apple.x", "xpc")),
        ("gpu", None, GpuQuestion()),
        ("file-read-data", "/etc/hosts", RawQuestion("file-read-data", "/etc/hosts")),
        ("process-fork", None, RawQuestion("process-fork")),
    ],
)
def test_a_question_is_read(operation: str, argument: str | None, wanted: object) -> None:
    assert parse_question(operation, argument, DARWIN) == wanted


@pytest.mark.parametrize(
    ("operation", "argument", "field"),
    [
        ("read", None, "argument"),
        ("read", "etc/hosts", "argument"),
        ("read", "/a/../b", "argument"),
        ("read", "/a\nb", "argument"),
        ("read", "/" + "x" * 5000, "argument"),
        ("connect", "5432", "argument"),
        ("connect", "localhost:0", "argument"),
        ("connect", "localhost:65536", "argument"),
        ("connect", "localhost:http", "argument"),
        ("connect", "localhost:٣", "argument"),
        ("connect", "*:80", "argument"),
        ("connect", "a b:80", "argument"),
        ("connect", "[localhost]:80", "argument"),
        ("connect", "localhost:80/sctp", "argument"),
        ("bind", "example.com:80", "argument"),
        ("bind", "x", "argument"),
        ("gpu", "now", "argument"),
    ],
)
def test_what_is_no_question_names_its_field(operation: str, argument: str | None, field: str) -> None:
    with pytest.raises(InvalidCommand) as caught:
        parse_question(operation, argument, LINUX)
    assert caught.value.field == field


def test_each_platform_has_its_own_form_of_a_path() -> None:
    assert parse_question("read", "/var/run/x", DARWIN) == FileQuestion("read", "/private/var/run/x")
    assert parse_question("read", "/var/run/x", LINUX) == FileQuestion("read", "/run/x")
    assert parse_question("read", "/variety", DARWIN) == FileQuestion("read", "/variety")


# -- in the operations of Seatbelt


@pytest.mark.parametrize(
    ("operation", "argument", "wanted"),
    [
        ("read", "/opt/x", [("file-read-data", {"path": "/opt/x", "vnode": "REGULAR-FILE"})]),
        ("write", "/dev/null", [("file-write-data", {"path": "/dev/null", "vnode": "CHARACTER-DEVICE"})]),
        (
            "connect",
            "localhost:80",
            [
                ("network-outbound", {"address": "127.0.0.1:80", "protocol": "tcp"}),
                ("network-outbound", {"address": "[::1]:80", "protocol": "tcp"}),
            ],
        ),
        ("connect", "/a.sock", [("network-outbound", {"path": "/a.sock", "vnode": "SOCKET"})]),
        (
            "bind",
            "8080",
            [
                ("network-bind", {"address": "*:8080", "protocol": "tcp"}),
                ("network-inbound", {"address": "*:8080", "protocol": "tcp"}),
            ],
        ),
        ("bind", "53/udp", [("network-bind", {"address": "*:53", "protocol": "udp"})]),
        ("lookup", "x", [("mach-lookup", {"name": "x", "kind": "global"})]),
        ("signal", "others", [("signal", {"target": "others"})]),
        ("iokit-open", "AGXDeviceUserClient", [("iokit-open", {"class_": "AGXDeviceUserClient"})]),
        ("network-outbound", "10.0.0.1:80/udp", [("network-outbound", {"address": "10.0.0.1:80", "protocol": "udp"})]),
        ("network-outbound", "/a.sock", [("network-outbound", {"path": "/a.sock"})]),
        ("sysctl-read", "hw.ncpu", [("sysctl-read", {"name": "hw.ncpu"})]),
        ("system-socket", "AF_ROUTE", [("system-socket", {"domain": "AF_ROUTE"})]),
        ("syscall-unix", "67", [("syscall-unix", {"number": 67})]),
        ("mach-lookup", "xpc:a.b", [("mach-lookup", {"name": "a.b", "kind": "xpc"})]),
        ("process-exec", "/bin/sh", [("process-exec", {"path": "/bin/sh"})]),
        ("file-read-data", '{"path": "/a", "vnode": "FIFO"}', [("file-read-data", {"path": "/a", "vnode": "FIFO"})]),
    ],
)  # fmt: skip
def test_what_macos_is_asked(
    operation: str, argument: str, wanted: list[tuple[str, dict[str, object]]]
) -> None:
    asked = requests(parse_question(operation, argument, DARWIN))
    assert asked == tuple((name, Argument(**fields)) for name, fields in wanted)


def test_a_program_is_executed_mapped_and_read() -> None:
    asked = [operation for operation, _ in requests(FileQuestion("exec", "/bin/sh"))]
    assert asked == ["process-exec", "file-map-executable", "file-read-data"]


def test_a_name_has_to_be_looked_up() -> None:
    asked = requests(PortQuestion("connect", "example.com", 443))
    assert [argument.address or argument.path for _, argument in asked] == [
        f"{ELSEWHERE}:443",
        "/private/var/run/mDNSResponder",
    ]


@pytest.mark.parametrize("text", ['{"path"', '{"zz": 1}', '{"path": 1}', '{"path": "/a", "path": "/b"}'])
def test_an_object_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidCommand) as caught:
        raw_argument("file-read-data", text)
    assert caught.value.field is not None or "JSON" in caught.value.message


@pytest.mark.parametrize(
    ("operation", "argument"),
    [("read", "/a"), ("connect", "[::1]:80/udp"), ("bind", "80"), ("bind", "127.0.0.1:80"), ("lookup", "xpc:a"),
     ("gpu", None), ("connect", "/a"), ("signal", "others")],
)  # fmt: skip
def test_a_question_said_is_the_same_question(operation: str, argument: str | None) -> None:
    question = parse_question(operation, argument, LINUX)
    again, _, rest = spoken(question).partition(" ")
    assert parse_question(again, rest or None, LINUX) == question


@given(st.sampled_from([*PLAIN, "file-read-data", "mach-lookup", "x"]), st.none() | st.text(max_size=60))
def test_no_text_does_harm(operation: str, argument: str | None) -> None:
    """Either a question, whose every operation Seatbelt has, or an error that names a field."""
    try:
        question = parse_question(operation, argument, DARWIN)
        asked = requests(question)
    except ContractError as failure:
        asked = ()
        field = failure.field or "argument"
    else:
        field = "argument"
        assert asked
    assert field.startswith("argument")
    if operation in PLAIN:
        assert all(known(name) for name, _ in asked)
