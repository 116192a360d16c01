"""Batches: one answer for each line, in order, whatever the line holds."""

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.answers import sandbox_of
from worker.cli.profile_options import arriving
from worker.platform.darwin.sbpl import canonical
from worker.profile_batch import MAX_LINE_BYTES, answer_check, answer_show
from worker.profiles import Place, canonical_on

from .profile_help import made

KEYS = ("spec", "service", "port", "image", "name", "sandbox", "text", "operation", "argument", "path")
SPEC = {"image": {"name": "web:1"}}
PROFILE = made("darwin", sandbox={"read": ["/opt/data"]}).profile
CHECK = {"text": PROFILE.text, "params": PROFILE.params}


def show(line: Any, **place: Any) -> dict[str, Any]:
    raw = line if isinstance(line, bytes) else json.dumps(line).encode()
    answer: dict[str, Any] = json.loads(answer_show(raw, Place(**place)))
    return answer


def check(line: Any) -> dict[str, Any]:
    raw = line if isinstance(line, bytes) else json.dumps(line).encode()
    answer: dict[str, Any] = json.loads(answer_check(raw, None, canonical))
    return answer


# -- show


def test_a_line_of_show_is_the_reply_of_show() -> None:
    reply = show({"spec": SPEC})
    assert list(reply) == ["language", "text", "params", "policy", "not_enforced"]
    assert reply["language"] == "sbpl"
    assert show({"spec": SPEC}, platform="linux")["language"] == "landlock+seccomp"
    assert show({"spec": SPEC, "platform": "darwin"}, platform="linux")["language"] == "sbpl"


def test_every_field_of_a_line_counts() -> None:
    line = {
        "spec": {**SPEC, "resources": {"gpu": {"count": 1, "vendor": "apple"}}},
        "service": "api",
        "replica": 4,
        "data_dir": "/data",
        "port": 30001,
        "macos": 13,
        "gpu_enabled": False,
        "api_socket": "/run/api.sock",
        "rootfs_dir": "/images/x",
        "instance": "01JD8Z6M0000000000000000AB",
        "nats_ports": [4333],
    }
    policy = show(line)["policy"]
    assert policy["container"] == "api-4"
    assert policy["tmp"] == "/data/containers/api-4/tmp"
    assert policy["rootfs"] == "/images/x"
    assert policy["gpu"] == "none"
    assert policy["instance"] == line["instance"]
    assert policy["network"]["denied_ports"] == [4333]
    assert policy["network"]["bind_ports"] == [30001]
    assert policy["network"]["unix_sockets"] == ["/run/api.sock"]
    everything_null = {name: None for name in line if name != "spec"}
    assert show({**everything_null, "spec": SPEC}) == show({"spec": SPEC})


def test_the_options_of_the_command_are_the_defaults_of_its_lines() -> None:
    assert show({"spec": SPEC}, service="api", port=7)["policy"]["container"] == "api-0"
    assert show({"spec": SPEC, "service": "x"}, service="api")["policy"]["container"] == "x-0"


def test_a_whole_deployment() -> None:
    document = {"version": "v1", "deployment": "shop", "services": {"web": SPEC, "work": SPEC}}
    assert show({"spec": document, "service": "work"})["policy"]["container"] == "work-0"
    assert show({"spec": document})["error"]["field"] == "service"
    assert show({"spec": document, "service": "nope"})["error"]["code"] == "not_found"
    alone = {**document, "services": {"web": SPEC}}
    assert show({"spec": alone})["policy"]["container"] == "web-0"
    bad = {**document, "services": {"web": {"image": {"name": "UP"}}}}
    assert show({"spec": bad})["error"]["field"] == "spec.services.web.image.name"


@pytest.mark.parametrize(
    ("line", "code", "field"),
    [
        (b"", "invalid_command", None),
        (b"   ", "invalid_command", None),
        (b"{", "invalid_command", None),
        (b"[]", "invalid_command", None),
        (b"null", "invalid_command", None),
        (b"\xff\xfe", "invalid_command", None),
        (b'{"spec": "\x00"}', "invalid_command", None),
        (b'{"spec": {"image": {"name": "a\\u0000"}}}', "invalid_spec", "spec.image.name"),
        (b'{"spec": {"image": {"name": "\\ud800"}}}', "invalid_command", "spec.image.name"),
        (b'{"spec": {"image": {"name": "a"}}, "spec": 1}', "invalid_command", "spec"),
        (b'{"spec": {"image": {"name": "a"}}, "port": NaN}', "invalid_command", "port"),
        (b"[" * 100_000, "invalid_command", None),
        (b'{"spec":' * 5_000 + b"1" + b"}" * 5_000, "invalid_command", None),
        (b'{"spec": {"image": {"name": "' + b"a" * MAX_LINE_BYTES + b'"}}}', "invalid_command", None),
        ({"spec": SPEC, "x": 1}, "invalid_command", "x"),
        ({}, "invalid_command", "spec"),
        ({"spec": None}, "invalid_command", "spec"),
        ({"spec": SPEC, "port": 0}, "invalid_command", "port"),
        ({"spec": SPEC, "port": "80"}, "invalid_command", "port"),
        ({"spec": SPEC, "port": True}, "invalid_command", "port"),
        ({"spec": SPEC, "macos": 11}, "invalid_command", "macos"),
        ({"spec": SPEC, "macos": 27}, "invalid_command", "macos"),
        ({"spec": SPEC, "replica": -1}, "invalid_command", "replica"),
        ({"spec": SPEC, "nats_ports": [0]}, "invalid_command", "nats_ports[0]"),
        ({"spec": SPEC, "data_dir": "x"}, "invalid_command", "data_dir"),
        ({"spec": SPEC, "instance": "x"}, "invalid_command", "instance"),
        ({"spec": SPEC, "platform": "beos"}, "invalid_command", "platform"),
        ({"spec": {**SPEC, "nope": 1}}, "invalid_spec", "spec.nope"),
        ({"spec": {**SPEC, "sandbox": {"groups": ["nope"]}}}, "unsupported", "spec.sandbox.groups[0]"),
        ({"spec": {**SPEC, "sandbox": {"read": ["/"]}}}, "policy_denied", "spec.sandbox.read[0]"),
    ],
)  # fmt: skip
def test_a_bad_line_is_answered(line: Any, code: str, field: str | None) -> None:
    error = show(line)["error"]
    assert error["code"] == code, error
    assert error["message"]
    assert error["field"] == field, error


@given(st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(KEYS),
        inner, max_size=4),
    max_leaves=12,
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_any_line_has_one_answer(line: bytes) -> None:
    for answer in (answer_show(line, Place()), answer_check(line, None, canonical)):
        assert b"\n" not in answer
        decoded = json.loads(answer)
        assert decoded.get("error", {}).get("code") != "internal", decoded


# -- check


@pytest.mark.parametrize(
    ("operation", "argument", "decision"),
    [
        ("file-read-data", {"path": "/opt/data/x"}, "allow"),
        ("file-read-data", "/opt/data/x", "allow"),
        ("read", "/opt/data/x", "allow"),
        ("write", "/opt/data/x", "deny"),
        ("file-write-data", {"path": "/opt/data/x", "vnode": "REGULAR-FILE"}, "deny"),
        ("mach-lookup", {"name": "com.apple.windowserver.active", "kind": "global"}, "deny"),
        ("network-outbound", {"address": "10.0.0.1:443"}, "allow"),
        ("network-outbound", {"address": "[::1]:4222", "protocol": "tcp"}, "deny"),
        ("iokit-open", {"class": "AGXDeviceUserClient"}, "deny"),
        ("signal", {"target": "self"}, "allow"),
        ("process-fork", None, "allow"),
        ("gpu", None, "deny"),
        ("no-such-operation", {"path": "/x"}, "unknown"),
        ("file-read-data", {}, "unknown"),
    ],
)
def test_a_line_of_check(operation: str, argument: Any, decision: str) -> None:
    reply = check({**CHECK, "operation": operation, "argument": argument})
    assert list(reply) == ["decision", "rule", "line", "reason"], reply
    assert reply["decision"] == decision, reply
    assert reply["reason"]


def test_a_text_that_no_mac_takes_is_rejected() -> None:
    reply = check({"text": "(version 1)\n(deny default)\n(allow nonsense)", "operation": "process-fork"})
    assert (reply["decision"], reply["line"]) == ("reject", 3)
    old = {**CHECK, "text": PROFILE.text + "(allow iokit-open-service)\n", "operation": "process-fork"}
    assert check({**old, "macos": 12})["decision"] == "reject"
    assert check({**old, "macos": 26})["decision"] == "allow"


def test_parameters_are_values() -> None:
    text = '(version 1)(deny default)(allow file-read* (subpath (param "A")))'
    line = {"text": text, "operation": "read", "argument": "/b"}
    assert check({**line, "params": {"A": '/x") (allow default) ("'}})["decision"] == "deny"
    assert check({**line, "params": {"A": "/b"}})["decision"] == "allow"
    assert check({**line, "params": {}})["decision"] == "reject"


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ({"operation": "read", "argument": "/x"}, "text"),
        ({**CHECK, "argument": "/x"}, "operation"),
        ({**CHECK, "operation": ""}, "operation"),
        ({**CHECK, "operation": "x" * 65}, "operation"),
        ({**CHECK, "operation": "read"}, "argument"),
        ({**CHECK, "operation": "read", "argument": "x"}, "argument"),
        ({**CHECK, "operation": "connect", "argument": "80"}, "argument"),
        ({**CHECK, "operation": "file-read-data", "argument": {"paht": "/x"}}, "argument.paht"),
        ({**CHECK, "operation": "file-read-data", "argument": {"path": 1}}, "argument.path"),
        ({**CHECK, "operation": "file-read-data", "argument": [1]}, "argument"),
        ({**CHECK, "operation": "gpu", "argument": {}}, "argument"),
        ({**CHECK, "operation": "read", "argument": {"path": "/x"}}, "argument"),
        ({**CHECK, "operation": "file-read-data", "argument": "{bad"}, "argument"),
        ({**CHECK, "operation": "file-read-data", "argument": '{"path": 1}'}, "argument.path"),
        ({**CHECK, "operation": "gpu", "more": 1}, "more"),
        ({"text": 1, "operation": "gpu"}, "text"),
        ({"text": "", "params": {"A": 1}, "operation": "gpu"}, "params.A"),
    ],
)
def test_a_bad_line_of_check_is_answered(line: Any, field: str) -> None:
    assert check(line)["error"]["field"] == field


def test_lines_without_a_text_ask_the_spec_of_the_command() -> None:
    for platform in ("darwin", "linux"):
        profile = made(platform, sandbox={"read": ["/opt/data"]}).profile
        box, path = sandbox_of(profile), canonical_on(platform)  # type: ignore[arg-type]

        def ask(line: dict[str, Any], box: Any = box, path: Any = path) -> dict[str, Any]:
            answer: dict[str, Any] = json.loads(answer_check(json.dumps(line).encode(), box, path))
            return answer

        assert ask({"operation": "read", "argument": "/opt/data/x"})["decision"] == "allow"
        assert ask({"operation": "write", "argument": "/opt/data/x"})["decision"] == "deny"
        assert ask({"operation": "read", "argument": "/x", "params": {}})["error"]["field"] == "params"
        assert ask({**CHECK, "operation": "read", "argument": "/opt/data/x"})["decision"] == "allow"
    assert ask({"operation": "read", "argument": {"path": "/x"}})["error"]["field"] == "argument"


# -- the stream


class Drops(io.BytesIO):
    """Gives a few bytes at a time, as a pipe does."""

    def read1(self, size: int | None = -1, /) -> bytes:
        return self.read(3)


@given(st.lists(st.binary(max_size=20).map(lambda raw: raw.replace(b"\n", b"")), max_size=8), st.booleans())
def test_lines_arrive_whole(lines: list[bytes], ended: bool) -> None:
    text = b"\n".join(lines) + (b"\n" if lines and ended else b"")
    wanted = text.split(b"\n")
    if wanted[-1] == b"":
        wanted.pop()
    found = [line for some in arriving(Drops(text), 12) for line in some]
    assert found == [line if len(line) <= 12 else None for line in wanted]


def test_an_endless_line_is_not_kept() -> None:
    read = 0

    class Endless(io.BytesIO):
        def read1(self, size: int | None = -1, /) -> bytes:
            nonlocal read
            read += 1
            return b"x" * 1000 if read < 5000 else (b"\nshort\n" if read == 5000 else b"")

    assert [line for some in arriving(Endless(), 4096) for line in some] == [None, b"short"]
