"""Promise 5: whatever arrives is answered, and the next command works."""

import json
from typing import Any

import pytest

from tests.acceptance.harness import Fleet, P, new_id, shell

pytestmark = pytest.mark.asyncio(loop_scope="module")


def body(verb: str, **fields: Any) -> bytes:
    return json.dumps({"type": verb, "id": new_id(), **fields}).encode()


def create(**spec: Any) -> bytes:
    return body("create", spec={"image": {"name": "base"}, **spec})


BAD_BODIES: dict[str, tuple[bytes, str, str | None]] = {
    "not json": (b"{", "invalid_command", None),
    "not utf-8": (b'{"type": "start", "id": "\xff"}', "invalid_command", None),
    "an array": (b"[]", "invalid_command", None),
    "empty": (b"", "invalid_command", None),
    "nested": (b"[" * 10000 + b"]" * 10000, "invalid_command", None),
    "1 MiB": (b'{"type": "create", "x": "' + b"a" * 1_000_000 + b'"}', "invalid_command", None),
    "duplicate key": (b'{"type": "create", "id": "a", "id": "b"}', "invalid_command", "id"),
    "no id": (b'{"type": "create", "spec": {"image": {"name": "base"}}}', "invalid_command", "id"),
    "bad id": (b'{"type": "create", "id": "a b", "spec": {"image": {"name": "base"}}}', "invalid_command", "id"),
    "other verb": (body("start"), "invalid_command", "type"),
    "unknown field": (body("create", spec={"image": {"name": "base"}}, colour="red"), "invalid_command", "colour"),
    "no spec": (body("create"), "invalid_command", "spec"),
    "unknown spec field": (create(colour="red"), "invalid_spec", "spec.colour"),
    "wrong type": (create(resources={"max_files": "many"}), "invalid_spec", "spec.resources.max_files"),
    "memory": (create(resources={"memory": "512MB"}), "invalid_spec", "spec.resources.memory"),
    "port out of range": (
        create(endpoints=[{"name": "a", "protocol": "tcp", "port": 70000}]), "invalid_spec", "spec.endpoints[0].port"
    ),
    "dot dot": (
        create(storage=[{"type": "bind", "source": "/tmp", "target": "/a/../../etc"}]),
        "invalid_spec", "spec.storage[0].target",
    ),
    "NUL": (create(command={"entrypoint": ["/bin/sh\0"]}), "invalid_spec", "spec.command.entrypoint[0]"),
    "control character": (create(command={"workdir": "/a\nb"}), "invalid_spec", "spec.command.workdir"),
    "env name": (create(env={"A=B": "1"}), "invalid_spec", "spec.env"),
    "naive deadline": (body("create", spec={"image": {"name": "base"}}, deadline="2030-01-01T00:00:00"),
                       "invalid_command", "deadline"),
    "long actor": (body("create", spec={"image": {"name": "base"}}, actor="x" * 129), "invalid_command", "actor"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_BODIES)
async def test_bad_body(fleet: Fleet, cid: str, what: str) -> None:
    raw, code, field = BAD_BODIES[what]
    before = len(fleet.client.events)
    await fleet.client.publish(f"{P}.cmd.{fleet.client.node}.{cid}.create", raw)
    told = await fleet.client.event(
        lambda e: e["type"] == "command_rejected" and e["container"] == cid and e["size"] == len(raw)
    )
    assert told["error"]["code"] == code, told
    if field is not None:
        assert told["error"]["field"] is not None
        assert told["error"]["field"].startswith(field), told
    assert not any("aaaaaaaa" in json.dumps(e) for e in fleet.client.events[before:])
    await fleet.client.ok(cid, "create", spec=shell("true"))
    await fleet.client.ok(cid, "remove")


BAD_SUBJECTS = {
    "no replica": "web.start",
    "replica not canonical": "web-01.start",
    "replica too large": "web-4294967296.start",
    "upper case": "Web-0.start",
    "too long": "a" * 64 + "-0.start",
    "unknown verb": "web-0.frobnicate",
    "node verb": "web-0.drain",
    "container verb": "_.start",
    "too many parts": "web-0.start.now",
    "too few parts": "web-0",
    "reserved": "web-0.pause",
}


@pytest.mark.parametrize("what", BAD_SUBJECTS)
async def test_bad_subject(fleet: Fleet, what: str) -> None:
    tail = BAD_SUBJECTS[what]
    subject = f"{P}.cmd.{fleet.client.node}.{tail}"
    verb = tail.split(".")[1] if "." in tail else "start"
    await fleet.client.publish(subject, body(verb))
    told = await fleet.client.event(lambda e: e["type"] == "command_rejected" and e["subject"] == subject)
    expected = "unsupported" if what == "reserved" else "invalid_command"
    assert told["error"]["code"] == expected, told
    if what in ("no replica", "upper case", "too long", "too many parts", "too few parts"):
        assert told["_subject"] == f"{P}.evt.{fleet.client.node}._.command"
    await fleet.client.ok("after-0", "remove")


UNSUPPORTED: dict[str, dict[str, Any]] = {
    "health": {"check": {"type": "command", "command": "true"}},
    "restart_policy": {"kind": "always"},
    "init": {"steps": [{"id": "a", "uses": "init.run", "with": {"command": "true"}}]},
    "tty": True,  # type: ignore[dict-item]
    "privileged": True,  # type: ignore[dict-item]
    "platform": {"os": "windows", "arch": "amd64"},
}


@pytest.mark.parametrize("name", UNSUPPORTED)
async def test_a_capability_that_is_not_there_is_named(fleet: Fleet, cid: str, name: str) -> None:
    done = await fleet.client.do(cid, "create", spec=shell("true", **{name: UNSUPPORTED[name]}))
    assert done["error"]["code"] == "unsupported", done
    assert done["error"]["field"].startswith(f"spec.{name}"), done
    assert (await fleet.client.query("state", container=cid))["code"] == 404


async def test_require_what_is_not_enforced(fleet: Fleet, cid: str) -> None:
    lacking = (await fleet.client.query("info"))["capabilities"]["not_enforced"]
    assert lacking
    spec = shell("true", sandbox={"require": [lacking[0]["feature"]]})
    done = await fleet.client.do(cid, "create", spec=spec)
    assert not done["ok"]
    assert done["error"]["field"] == "spec.sandbox.require[0]"


@pytest.mark.parametrize(
    ("verb", "fields"),
    [
        ("state", {}),
        ("state", {"container": "../etc"}),
        ("state", {"container": 5}),
        ("list", {"labels": []}),
        ("logs", {"container": "x-0", "stream": "both", "tail": -1}),
        ("wait", {"container": "x-0", "until": "never", "timeout_s": 1}),
        ("wait", {"container": "x-0", "until": "exit", "timeout_s": 601}),
        ("exec", {"container": "x-0"}),
        ("command", {"id": "a b"}),
        ("profile", {"service": "UP", "replica": 0, "spec": {}}),
    ],
)
async def test_bad_queries(fleet: Fleet, verb: str, fields: dict[str, Any]) -> None:
    reply = await fleet.client.query(verb, **fields)
    assert reply["error"]["code"] in ("invalid_command", "invalid_spec"), reply
    assert reply["code"] == 422
