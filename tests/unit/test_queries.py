"""Requests are checked as strictly as commands, replies are read tolerantly; jobs and streams beside them."""

import json
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas import queries as q
from schemas.errors import ContractError, ErrorCode, InvalidCommand, InvalidSpec, Unsupported
from schemas.jobs import decode_job
from schemas.status import State
from schemas.streams import Discard, Retention, bucket_spec, stream_specs

CONTAINER = {"container": "web-0"}
SPEC = {"image": {"name": "base"}}
GOOD: list[tuple[str, dict[str, Any]]] = [
    ("info", {}),
    ("list", {}),
    ("list", {"state": "running", "labels": {"a": "b"}, "cursor": None}),
    ("state", CONTAINER),
    ("command", {"id": "01JDD"}),
    ("stats", CONTAINER),
    ("logs", CONTAINER),
    (
        "logs",
        {**CONTAINER, "stream": "stderr", "tail": 5, "since": "2026-11-24T04:31:39+01:00", "cursor": "x"},
    ),
    ("wait", {**CONTAINER, "until": "final", "timeout_s": 600}),
    ("exec", {**CONTAINER, "argv": ["sh", "-c", "a\nb"], "env": {"A": "1"}, "workdir": "/a", "stdin": "x"}),
    (
        "exec",
        {**CONTAINER, "argv": ["sh"], "stream": True, "session": "s", "tty": True, "rows": 24, "cols": 80},
    ),
    ("profile", CONTAINER),
    ("profile", {"service": "web", "replica": 3, "spec": SPEC}),
    ("profile", {"service": "web", "spec": {**SPEC, "cap_add": []}}),
    ("check", {**CONTAINER, "operation": "read", "argument": "/etc/passwd"}),
    ("check", {"service": "web", "spec": SPEC, "operation": "gpu"}),
    ("images", {}),
    ("image", {"image": "base:1"}),
    ("export", {**CONTAINER, "session": "s"}),
    ("export", {**CONTAINER, "session": "s", "offset": 262144, "acked": 0}),
    ("save", {"session": "s", "images": ["base:1", "app"]}),
    ("df", {}),
    ("df", {"refresh": True}),
    ("volumes", {}),
    ("volumes", {"name": "data"}),
    ("denials", {**CONTAINER, "since_s": 600}),
    ("cancel", {"job_id": "build-7"}),
]


@pytest.mark.parametrize(("verb", "fields"), GOOD)
def test_a_good_request(verb: str, fields: dict[str, Any]) -> None:
    request = q.decode_request(verb, json.dumps(fields).encode())
    assert type(request) is q.REQUESTS[verb]
    assert q.decode_request(verb, msgspec.json.encode(request)) == request


def test_every_query_has_a_request_a_reply_and_an_example() -> None:
    assert set(q.QUERY_VERBS) == set(q.REPLIES) == {verb for verb, _ in GOOD}
    assert set(q.ERROR_STATUS) == set(ErrorCode)


def test_no_bytes_are_an_empty_request() -> None:
    assert q.decode_request("info", b"") == q.InfoRequest()
    assert q.decode_request("list", b"") == q.ListRequest()


def test_defaults_of_the_contract() -> None:
    logs = q.decode_request("logs", json.dumps(CONTAINER).encode())
    assert logs == q.LogsRequest(container="web-0", stream=q.LogStream.BOTH, tail=0, since=None, cursor=None)
    run = q.decode_request("exec", json.dumps({**CONTAINER, "argv": ["a"]}).encode())
    assert isinstance(run, q.ExecRequest)
    assert (run.timeout_s, run.stream, run.tty) == (60.0, False, False)


def test_times_come_back_in_utc() -> None:
    request = q.decode_request(
        "logs", json.dumps({**CONTAINER, "since": "2026-11-24T04:31:39+01:00"}).encode()
    )
    assert isinstance(request, q.LogsRequest)
    assert request.since == datetime(2026, 11, 24, 3, 31, 39, tzinfo=UTC)


@pytest.mark.parametrize(
    ("verb", "field", "fields"),
    [
        ("info", "x", {"x": 1}),
        ("state", "container", {}),
        ("state", "container", {"container": "../etc"}),
        ("state", "container", {"container": 5}),
        ("list", "labels", {"labels": []}),
        ("list", "labels.a", {"labels": {"a": 1}}),
        ("list", "state", {"state": "frozen"}),
        ("command", "id", {"id": "a b"}),
        ("logs", "tail", {**CONTAINER, "tail": -1}),
        ("logs", "stream", {**CONTAINER, "stream": "stdin"}),
        ("logs", "since", {**CONTAINER, "since": "2026-11-24T04:31:39"}),
        ("wait", "until", {**CONTAINER, "until": "never"}),
        ("wait", "timeout_s", {**CONTAINER, "timeout_s": 601}),
        ("wait", "timeout_s", {**CONTAINER, "timeout_s": -1}),
        ("exec", "argv", CONTAINER),
        ("exec", "session", {**CONTAINER, "argv": ["a"], "stream": True}),
        ("exec", "session", {**CONTAINER, "argv": ["a"], "session": "a.b"}),
        ("exec", "encoding", {**CONTAINER, "argv": ["a"], "encoding": "hex"}),
        ("exec", "rows", {**CONTAINER, "argv": ["a"], "rows": 0}),
        ("exec", "timeout_s", {**CONTAINER, "argv": ["a"], "timeout_s": 1e6}),
        ("profile", "container", {}),
        ("profile", "spec", {"service": "web"}),
        ("profile", "service", {"spec": SPEC}),
        ("profile", "service", {"service": "UP", "spec": SPEC}),
        ("profile", "replica", {"service": "web", "replica": 2**32, "spec": SPEC}),
        ("profile", "container", {**CONTAINER, "service": "web"}),
        ("check", "operation", CONTAINER),
        ("check", "operation", {**CONTAINER, "operation": ""}),
        ("check", "argument", {**CONTAINER, "operation": "read", "argument": "a\0"}),
        ("denials", "container", {}),
        ("denials", "since_s", {**CONTAINER, "since_s": -1}),
        ("denials", "since_s", {**CONTAINER, "since_s": 1e9}),
        ("cancel", "job_id", {"job_id": "A"}),
    ],
)
def test_a_bad_request(verb: str, field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidCommand) as caught:
        q.decode_request(verb, json.dumps(fields).encode())
    assert caught.value.field == field, caught.value.message
    assert q.ERROR_STATUS[caught.value.code] == 422


@pytest.mark.parametrize(
    ("verb", "field", "fields"),
    [
        ("exec", "argv", {**CONTAINER, "argv": []}),
        ("exec", "argv[0]", {**CONTAINER, "argv": [""]}),
        ("exec", "argv[1]", {**CONTAINER, "argv": ["a", "\0"]}),
        ("exec", "env.A=B", {**CONTAINER, "argv": ["a"], "env": {"A=B": "1"}}),
        ("exec", "workdir", {**CONTAINER, "argv": ["a"], "workdir": "/a/.."}),
        ("list", "labels.a", {"labels": {"a": "\n"}}),
        ("profile", "spec.image", {"service": "web", "spec": {}}),
        ("profile", "spec.x", {"service": "web", "spec": {**SPEC, "x": 1}}),
        (
            "check",
            "spec.stop_signal",
            {"service": "a", "spec": {**SPEC, "stop_signal": "X"}, "operation": "gpu"},
        ),
    ],
)
def test_a_bad_spec_in_a_request(verb: str, field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidSpec) as caught:
        q.decode_request(verb, json.dumps(fields).encode())
    assert caught.value.field == field, caught.value.message


def test_queries_that_are_not_there() -> None:
    for verb, known in (("fly", None), ("", None), ("exec", frozenset({"info"}))):
        with pytest.raises(Unsupported) as caught:
            q.decode_request(verb, b"{}", known=known)
        assert q.ERROR_STATUS[caught.value.code] == 501


def test_status_by_code() -> None:
    assert q.ERROR_STATUS[ErrorCode.NOT_FOUND] == 404
    assert q.ERROR_STATUS[ErrorCode.CONFLICT] == 409
    assert q.ERROR_STATUS[ErrorCode.POLICY_DENIED] == 422
    for code in ("unavailable", "deadline_exceeded", "resource_exhausted", "interrupted"):
        assert q.ERROR_STATUS[ErrorCode(code)] == 503
    assert q.ERROR_STATUS[ErrorCode.START_FAILED] == 500


def test_replies_are_tolerant_and_whole() -> None:
    line = q.LogLine(time=datetime(2026, 11, 24, tzinfo=UTC), stream="stdout", text="x")
    assert json.loads(msgspec.json.encode(line)).keys() == {"time", "stream", "text"}
    reply = q.ExecReply(exit_code=0, stdout="", stderr="", truncated=False, encoding=q.BASE64)
    assert json.loads(msgspec.json.encode(reply))["encoding"] == "base64"
    assert json.loads(msgspec.json.encode(q.ListReply(containers=[])))["cursor"] is None
    listed = msgspec.json.decode(
        b'{"containers":[{"container":"a-0","service":"a","replica":0,"instance":"i","state":"new","x":1}],"y":2}',
        type=q.ListReply,
    )
    assert listed.containers[0].state == State("new")
    told = msgspec.json.decode(b'{"decision":"perhaps","rule":null}', type=q.CheckReply)
    assert told.decision == "perhaps"


@given(st.sampled_from(q.QUERY_VERBS), st.binary())
def test_no_bytes_crash_a_query(verb: str, raw: bytes) -> None:
    try:
        q.decode_request(verb, raw)
    except ContractError as failure:
        msgspec.json.encode(failure.to_error())


# -- jobs


def job(**fields: Any) -> bytes:
    return json.dumps({"type": "job", "job_id": "build-7", "spec": SPEC, **fields}).encode()


def test_a_job() -> None:
    made = decode_job(job(deadline="2030-01-01T00:00:00Z", timeout_s=5, max_attempts=3), job_id="build-7")
    assert (made.job_id, made.max_attempts, made.timeout_s) == ("build-7", 3, 5)
    assert decode_job(msgspec.json.encode(made)) == made


@pytest.mark.parametrize(
    ("kind", "field", "fields"),
    [
        (InvalidCommand, "job_id", {"job_id": "other"}),
        (InvalidCommand, "job_id", {"job_id": "A"}),
        (InvalidCommand, "max_attempts", {"max_attempts": 0}),
        (InvalidCommand, "deadline", {"deadline": "2030-01-01T00:00:00"}),
        (InvalidCommand, "timeout_s", {"timeout_s": -1}),
        (InvalidCommand, "actor", {"actor": "x" * 129}),
        (InvalidCommand, "type", {"type": "start"}),
        (InvalidCommand, "colour", {"colour": 1}),
        (InvalidSpec, "spec.image", {"spec": {}}),
        (Unsupported, "spec.privileged", {"spec": {**SPEC, "privileged": True}}),
    ],
)
def test_a_bad_job(kind: type[ContractError], field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(kind) as caught:
        decode_job(job(**fields), job_id="build-7")
    assert caught.value.field == field, caught.value.message


# -- streams


def test_the_stream_table() -> None:
    specs = {spec.name: spec for spec in stream_specs()}
    assert list(specs) == [f"SANDFLEET_{name}" for name in ("CMD", "JOB", "EVT", "LOG", "STAT")]
    commands, events, logs = (specs[f"SANDFLEET_{name}"] for name in ("CMD", "EVT", "LOG"))
    assert commands.retention is Retention.WORK_QUEUE
    assert (commands.max_msgs_per_subject, commands.discard) == (64, Discard.NEW)
    assert commands.discard_new_per_subject
    assert commands.allow_msg_ttl
    assert events.deny_delete
    assert events.allow_direct
    assert events.allow_atomic
    assert (logs.compression, logs.duplicate_window_s) == ("s2", 120.0)
    assert specs["SANDFLEET_STAT"].max_msgs_per_subject == 360
    assert bucket_spec().name == "SANDFLEET_NODES"


def test_prefixes_of_streams_and_subjects() -> None:
    names = {spec.name for spec in stream_specs("site.v1", "SITE")}
    assert names == {"SITE_CMD", "SITE_JOB", "SITE_EVT", "SITE_LOG", "SITE_STAT"}
    assert all(spec.subjects[0].startswith("site.v1.") for spec in stream_specs("site.v1", "SITE"))
    assert bucket_spec("SITE").name == "SITE_NODES"
