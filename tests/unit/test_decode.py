"""Command bodies from anybody: decoded, or answered with a code and a field. Nothing else may come out."""

import json
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.commands import (
    CONTAINER_VERBS,
    NODE_VERBS,
    RESERVED_VERBS,
    Create,
    Kill,
    PullImage,
    Remove,
    Run,
    Start,
    Stop,
)
from schemas.decode import (
    COMMANDS,
    MAX_COMMAND_BYTES,
    canonical,
    decode_command,
    decode_event,
    strict_decode,
    strict_json,
)
from schemas.errors import ContractError, Error, ErrorCode, InvalidCommand, InvalidSpec, Unsupported
from schemas.events import CommandRejected, StateChanged
from schemas.spec import ImageSpec, PullPolicy, ServiceSpec

MINIMAL: dict[str, dict[str, Any]] = {
    "create": {"spec": {"image": {"name": "base"}}},
    "run": {"spec": {"image": {"name": "base"}}},
    "pull_image": {"image": "base"},
    "register_image": {"image": "base", "source_dir": "/images/base"},
    "load_image": {"source_file": "/images/base.tar"},
    "push_image": {"image": "base", "target": "registry.lan/base:1"},
    "tag_image": {"source": "a", "target": "b"},
    "remove_image": {"image": "a"},
    "create_volume": {"name": "data"},
    "remove_volume": {"name": "data"},
}


def body(verb: str, **fields: Any) -> bytes:
    return json.dumps({"type": verb, "id": "1", **MINIMAL.get(verb, {}), **fields}).encode()


def refused(
    raw: bytes, kind: type[ContractError], field: str | None, verb: str = "create", **options: Any
) -> str:
    with pytest.raises(ContractError) as caught:
        decode_command(verb, raw, **options)
    assert type(caught.value) is kind, caught.value
    assert caught.value.field == field, caught.value.message
    return caught.value.message


@pytest.mark.parametrize("verb", [*CONTAINER_VERBS, *NODE_VERBS])
def test_every_verb(verb: str) -> None:
    command = decode_command(verb, body(verb, actor="me", if_instance="x", deadline="2026-11-24T03:31:39Z"))
    assert type(command) is COMMANDS[verb]
    assert command.deadline == datetime(2026, 11, 24, 3, 31, 39, tzinfo=UTC)
    assert decode_command(verb, msgspec.json.encode(command)) == command
    refused(body(verb, colour=1), InvalidCommand, "colour", verb)


def test_fields_and_their_defaults() -> None:
    assert decode_command("start", body("start")) == Start(id="1")
    assert decode_command("create", body("create")) == Create(
        id="1", spec=ServiceSpec(image=ImageSpec(name="base"))
    )
    assert decode_command("stop", body("stop", timeout_s=3)) == Stop(id="1", timeout_s=3.0)
    assert decode_command("remove", body("remove", force=False)) == Remove(id="1", force=False)
    assert decode_command("pull_image", body("pull_image", policy="always", auth="hub")) == PullImage(
        id="1", image="base", policy=PullPolicy.ALWAYS, auth="hub"
    )
    assert isinstance(decode_command("run", body("run", replace=True)), Run)


@pytest.mark.parametrize("signal", ["SIGKILL", "TERM", "SIGINT", "HUP", "USR1", "SIGUSR2"])
def test_signals_come_back_whole(signal: str) -> None:
    command = decode_command("kill", body("kill", signal=signal))
    assert isinstance(command, Kill)
    assert command.signal == f"SIG{signal.removeprefix('SIG')}"


NESTED = b'{"type":"create","id":"1","spec":{"image":{"name":"a"},"wasm":%s}}'


@pytest.mark.parametrize(
    ("raw", "kind", "field"),
    [
        (b"", InvalidCommand, None),
        (b"{", InvalidCommand, None),
        (b"[]", InvalidCommand, None),
        (b"null", InvalidCommand, None),
        (b'"create"', InvalidCommand, None),
        (b'\xef\xbb\xbf{"type":"create"}', InvalidCommand, None),
        ('{"type":"create","id":"1"}'.encode("utf-16"), InvalidCommand, None),
        (b'{"type":"create","id":"\xff"}', InvalidCommand, None),
        (b'{"type":"create","id":"\xed\xa0\x80"}', InvalidCommand, None),
        (b'{"type":"create","id":"a\nb"}', InvalidCommand, None),
        (b'{"type":"create","id":"1"} {}', InvalidCommand, None),
        (b"[" * 10_000 + b"]" * 10_000, InvalidCommand, None),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, InvalidCommand, None),
        (NESTED % (b'{"a":' * 900 + b"1" + b"}" * 900), InvalidCommand, None),
        (NESTED % (b'{"a":' * 70 + b"1" + b"}" * 70), InvalidCommand, None),
        (b'{"type":"create","id":' + b"9" * 5000 + b"}", InvalidCommand, None),
        (b"{}", InvalidCommand, "type"),
        (b'{"id":"1"}', InvalidCommand, "type"),
        (b'{"type":5,"id":"1"}', InvalidCommand, "type"),
        (b'{"type":"start","id":"1"}', InvalidCommand, "type"),
        (b'{"type":"create","id":"1"}', InvalidCommand, "spec"),
        (b'{"type":"create","spec":{"image":{"name":"a"}}}', InvalidCommand, "id"),
        (b'{"type":"create","id":"1","id":"2"}', InvalidCommand, "id"),
        (b'{"type":"create","id":"1","spec":5}', InvalidSpec, "spec"),
        (
            b'{"type":"create","id":"1","spec":{"image":{"name":"a","name":"b"}}}',
            InvalidSpec,
            "spec.image.name",
        ),
        (b'{"type":"create","id":"1","spec":{"env":{"A":"1","B":"2","A":"3"}}}', InvalidSpec, "spec.env.A"),
        (
            b'{"type":"create","id":"1","spec":{"endpoints":[{},{"name":"a","name":"b"}]}}',
            InvalidSpec,
            "spec.endpoints[1].name",
        ),
        (b'{"type":"create","id":"1","spec":{"resources":{"cpu":NaN}}}', InvalidSpec, "spec.resources.cpu"),
        (b'{"type":"create","id":"1","deadline":-Infinity}', InvalidCommand, "deadline"),
        (b'{"type":"create","id":"1","actor":"\\ud800"}', InvalidCommand, "actor"),
        (
            b'{"type":"create","id":"1","spec":{"image":{"name":"a"},"env":{"\\udfff":""}}}',
            InvalidSpec,
            "spec.env",
        ),
        (
            b'{"type":"create","id":"1","spec":{"image":{"name":"a"},"resources":{"cpu":1e999}}}',
            InvalidSpec,
            "spec.resources.cpu",
        ),
    ],
)
def test_malformed(raw: bytes, kind: type[ContractError], field: str | None) -> None:
    refused(raw, kind, field)


@pytest.mark.parametrize(
    ("verb", "field", "fields"),
    [
        ("start", "id", {"id": ""}),
        ("start", "id", {"id": "a b"}),
        ("start", "id", {"id": "a\n"}),
        ("start", "id", {"id": "x" * 65}),
        ("start", "id", {"id": 5}),
        ("start", "deadline", {"deadline": "2030-01-01T00:00:00"}),
        ("start", "deadline", {"deadline": "soon"}),
        ("start", "deadline", {"deadline": 5}),
        ("start", "deadline", {"deadline": "0001-01-01T00:00:00+23:00"}),
        ("start", "actor", {"actor": "x" * 129}),
        ("start", "actor", {"actor": "a\nb"}),
        ("start", "actor", {"actor": "a\0"}),
        ("start", "if_instance", {"if_instance": "x" * 65}),
        ("start", "if_instance", {"if_instance": ""}),
        ("stop", "timeout_s", {"timeout_s": -1}),
        ("stop", "timeout_s", {"timeout_s": "5s"}),
        ("stop", "timeout_s", {"timeout_s": 1e10}),
        ("restart", "timeout_s", {"timeout_s": -0.1}),
        ("drain", "timeout_s", {"timeout_s": 10**400}),
        ("kill", "signal", {"signal": "SIGSTOP"}),
        ("kill", "signal", {"signal": 9}),
        ("kill", "signal", {"signal": "kill"}),
        ("remove", "force", {"force": "yes"}),
        ("create", "replace", {"replace": 1}),
        ("pull_image", "image", {"image": "A"}),
        ("pull_image", "image", {"image": "a" * 600}),
        ("pull_image", "policy", {"policy": "sometimes"}),
        ("pull_image", "auth", {"auth": ""}),
        ("register_image", "source_dir", {"source_dir": "images/base"}),
        ("register_image", "source_dir", {"source_dir": "/images/../etc"}),
        ("register_image", "source_dir", {"source_dir": "/a\0"}),
        ("register_image", "image", {"image": ""}),
        ("tag_image", "source", {"source": "a b"}),
        ("tag_image", "target", {"target": "a:"}),
        ("remove_image", "image", {"image": "/"}),
        ("create_volume", "name", {"name": "../data"}),
        ("create_volume", "size", {"size": "1GB"}),
        ("create_volume", "size", {"size": 0}),
        ("remove_volume", "name", {"name": ""}),
        ("remove_volume", "force", {"force": "yes"}),
    ],
)
def test_rules_of_the_head_and_of_verbs(verb: str, field: str, fields: dict[str, Any]) -> None:
    refused(body(verb, **fields), InvalidCommand, field, verb)


def test_what_stands_under_spec_is_a_spec_s_fault() -> None:
    refused(body("create", spec={}), InvalidSpec, "spec.image")
    refused(body("run", spec={"image": {"name": "a"}, "x": 1}), InvalidSpec, "spec.x", "run")
    refused(body("create", spec={"image": {"name": "a"}, "tty": 1}), InvalidSpec, "spec.tty")
    refused(body("create", spec={"image": {"name": "a"}, "privileged": True}), Unsupported, "spec.privileged")
    refused(body("create", species=1), InvalidCommand, "species")
    made = decode_command("create", body("create", spec={"image": {"name": "a"}, "cap_add": []}))
    assert isinstance(made, Create)


@pytest.mark.parametrize("verb", RESERVED_VERBS)
def test_reserved_verbs(verb: str) -> None:
    refused(body(verb), Unsupported, "type", verb)


def test_verbs_that_a_node_has_not() -> None:
    refused(body("frobnicate"), InvalidCommand, "type", "frobnicate")
    refused(body("frobnicate"), InvalidCommand, "type", "frobnicate", known=frozenset({"start"}))
    refused(body("stop"), Unsupported, "type", "stop", known=frozenset({"start"}))
    assert decode_command("start", body("start"), known=frozenset({"start"})) == Start(id="1")


def test_size() -> None:
    padding = MAX_COMMAND_BYTES - len(body("create", spec={"image": {"name": "a"}, "env": {"A": ""}}))
    fits = body("create", spec={"image": {"name": "a"}, "env": {"A": "x" * padding}})
    assert len(fits) == MAX_COMMAND_BYTES
    assert isinstance(decode_command("create", fits), Create)
    refused(fits + b" ", InvalidCommand, None)
    refused(b"x" * 2**20, InvalidCommand, None)


def test_a_hostile_name_makes_no_large_or_dangerous_error() -> None:
    for name in ("x" * 200_000, "\n\x1b[31m`" * 1000, "é" * 20_000, "`", "a.b[0]"):
        with pytest.raises(InvalidSpec) as caught:
            decode_command("create", body("create", spec={"image": {"name": "a"}, name: 1}))
        field = caught.value.field
        assert field is not None
        assert field.startswith("spec.")
        assert len(field) <= 256
        assert field.isascii()
        assert field.isprintable()
        assert len(caught.value.message) < 4096


def test_a_hostile_value_is_quoted_in_part_only() -> None:
    for spec in (
        {"image": {"name": "a", "pull_policy": "\x1bé" * 20_000}},
        {"image": {"name": "a"}, "storage": [{"type": "\n" * 20_000}]},
        {"image": {"name": "a" * 100_000}},
        {"image": {"name": "a"}, "env": {"A": "$S:hunter2!"}},
    ):
        message = refused_message(body("create", spec=spec))
        assert len(message) < 1500
        assert message.isprintable()
        assert "hunter" not in message


def refused_message(raw: bytes) -> str:
    with pytest.raises(InvalidSpec) as caught:
        decode_command("create", raw)
    return caught.value.message


def test_many_env_names_are_searched_quickly() -> None:
    env: dict[str, Any] = {f"NAME_{n}": "x" for n in range(9000)} | {"LAST": 1, "REALLY": 2}
    refused(body("create", spec={"image": {"name": "a"}, "env": env}), InvalidSpec, "spec.env.LAST")


def test_canonical_is_equal_for_equal_commands_only() -> None:
    def same(verb: str, one: bytes, other: bytes) -> bool:
        return canonical(decode_command(verb, one)) == canonical(decode_command(verb, other))

    assert same("kill", body("kill"), body("kill", signal="KILL"))
    assert same("remove", body("remove"), b' {"force":true,\n"id":"1","type":"remove"}')
    assert same("stop", body("stop", timeout_s=5), body("stop", timeout_s=5.0))
    assert same(
        "start",
        body("start", deadline="2026-11-24T03:31:39Z"),
        body("start", deadline="2026-11-24T04:31:39.000+01:00"),
    )
    assert same(
        "create",
        body(
            "create", spec={"image": {"name": "a"}, "env": {"A": "1", "B": "2"}, "scale": {"mode": "manual"}}
        ),
        body(
            "create",
            spec={
                "scale": {"mode": "manual"},
                "env": {"B": "2", "A": "1"},
                "tty": False,
                "image": {"name": "a"},
            },
        ),
    )
    assert same(
        "create",
        body("create"),
        body("create", spec={"image": {"name": "base", "pull_policy": "if_not_present"}, "network": {}}),
    )
    assert not same("create", body("create"), body("create", replace=True))
    assert not same("create", body("create"), body("create", spec={"image": {"name": "other"}}))
    assert not same("start", body("start"), body("start", id="2"))
    assert not same("start", body("start"), body("start", actor=""))
    stop, restart = decode_command("stop", body("stop")), decode_command("restart", body("restart"))
    assert canonical(stop) != canonical(restart)
    assert json.loads(canonical(stop)) == {"type": "stop", "id": "1"}


def test_canonical_bytes_are_a_body() -> None:
    command = decode_command(
        "create", body("create", spec={"image": {"name": "a"}, "env": {"b": "", "a": ""}})
    )
    assert decode_command("create", canonical(command)) == command


def test_strict_decode() -> None:
    class Thing(msgspec.Struct, forbid_unknown_fields=True):
        a: int = 0
        spec: ServiceSpec | None = None

    assert strict_decode(b"", Thing) == Thing()
    assert strict_decode(b'{"a":5}', Thing).a == 5
    for raw, field in (
        (b'{"b":1}', "b"),
        (b'{"a":1,"a":2}', "a"),
        (b'{"spec":{"image":{"name":"a"},"resources":{"memory":"x"}}}', "spec.resources.memory"),
    ):
        with pytest.raises(ContractError) as caught:
            strict_decode(raw, Thing)
        assert caught.value.field == field
    with pytest.raises(InvalidSpec):
        strict_decode(b"[", Thing, error=InvalidSpec)
    with pytest.raises(InvalidCommand):
        strict_decode(b'{"a":5}', Thing, max_bytes=3)


def test_events_are_read_tolerantly() -> None:
    head = {"node": "n", "epoch": "e", "boot": "b", "seq": 1, "time": "2026-11-24T03:31:39Z", "colour": 1}
    error = {"code": "not_yet_known", "message": "m", "field": None, "more": []}
    told = decode_event(
        json.dumps(
            {**head, "type": "command_rejected", "error": error, "subject": "s", "size": 1, "sha256": ""}
        ).encode()
    )
    assert isinstance(told, CommandRejected)
    assert told.error == Error(code=ErrorCode("not_yet_known"), message="m", field=None)
    status = {"container": "a-0", "service": "a", "replica": 0, "instance": "i", "state": "frozen"}
    changed = decode_event(json.dumps({**head, "type": "state_changed", "status": status}).encode())
    assert isinstance(changed, StateChanged)
    assert changed.status.state == "frozen"
    assert decode_event(json.dumps({**head, "type": "moon_changed"}).encode()) is None
    for bad in (b"", b"[", b"\xff", b"[]", b"{}", b'{"type":"state_changed"}', b"[" * 10_000):
        with pytest.raises(InvalidCommand):
            decode_event(bad)


FIELDS = [
    "id",
    "deadline",
    "actor",
    "if_instance",
    "spec",
    "timeout_s",
    "signal",
    "image",
    "source_dir",
    "policy",
    "auth",
    "x",
]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


def decodes_or_is_refused(verb: str, raw: bytes) -> None:
    try:
        command = decode_command(verb, raw)
    except ContractError as failure:
        answer = msgspec.json.encode(failure.to_error())
        assert len(answer) < 30_000
        return
    assert decode_command(verb, canonical(command)) == command


@given(st.sampled_from([*CONTAINER_VERBS, *NODE_VERBS, *RESERVED_VERBS]), st.binary())
def test_no_bytes_crash_it(verb: str, raw: bytes) -> None:
    decodes_or_is_refused(verb, raw)


@given(
    st.sampled_from([*CONTAINER_VERBS, *NODE_VERBS]),
    st.sampled_from(FIELDS),
    json_values,
)
@settings(max_examples=300)
def test_no_value_crashes_it(verb: str, name: str, value: Any) -> None:
    decodes_or_is_refused(verb, body(verb, **{name: value}))


@given(st.data())
@settings(max_examples=200)
def test_no_damage_crashes_it(data: st.DataObject) -> None:
    raw = bytearray(body("create", spec={"image": {"name": "a"}, "env": {"A": "1"}, "endpoints": []}))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    decodes_or_is_refused("create", bytes(raw))


@given(json_values)
def test_strict_json_reads_what_json_is(value: Any) -> None:
    try:
        raw = json.dumps(value, allow_nan=False).encode()
    except ValueError:
        return
    try:
        assert strict_json(raw, 2**20) == value
    except ContractError as failure:
        assert "surrogate" in failure.message  # noqa: PT017
