"""The verb table of the contract, cell by cell, over NATS only."""

import asyncio
import json

import pytest

from tests.acceptance.harness import Fleet, P, alive, new_id, shell

pytestmark = pytest.mark.asyncio(loop_scope="module")

SLEEP = shell("exec sleep 600")
STUBBORN = shell("trap '' TERM; echo ready; while :; do sleep 1; done")
VERBS = ("create", "run", "start", "stop", "kill", "restart", "remove")


async def _pending(fleet: Fleet, cid: str) -> None:
    await fleet.client.ok(cid, "create", spec=SLEEP)


async def _running(fleet: Fleet, cid: str) -> None:
    await fleet.client.ok(cid, "run", spec=SLEEP)


async def _stopping(fleet: Fleet, cid: str) -> None:
    await fleet.client.ok(cid, "run", spec=STUBBORN)
    await fleet.client.log_seen(cid, b"ready\n")
    await fleet.client.send(cid, "stop", timeout_s=2.0)
    await fleet.client.state(cid, "stopping")


async def _exited(fleet: Fleet, cid: str) -> None:
    await fleet.client.ok(cid, "run", spec=shell("exit 3"))
    await fleet.client.state(cid, "exited", exit_code=3)


async def _failed(fleet: Fleet, cid: str) -> None:
    spec = {"image": {"name": "base"}, "command": {"entrypoint": ["/no/such/program"]}}
    done = await fleet.client.do(cid, "run", spec=spec)
    assert done["error"]["code"] == "start_failed", done
    await fleet.client.state(cid, "failed", reason="exec_failed")


async def _none(fleet: Fleet, cid: str) -> None:
    return None


ENTER = {
    "none": _none,
    "pending": _pending,
    "running": _running,
    "stopping": _stopping,
    "exited": _exited,
    "failed": _failed,
}

# (state, verb) -> (error code or None for ok, state afterwards)
TABLE: dict[tuple[str, str], tuple[str | None, str | None]] = {
    ("none", "create"): (None, "pending"),
    ("none", "run"): (None, "running"),
    ("none", "start"): ("not_found", None),
    ("none", "stop"): ("not_found", None),
    ("none", "kill"): ("not_found", None),
    ("none", "restart"): ("not_found", None),
    ("none", "remove"): (None, None),
    ("pending", "create"): ("conflict", "pending"),
    ("pending", "run"): ("conflict", "pending"),
    ("pending", "start"): (None, "running"),
    ("pending", "stop"): (None, "exited"),
    ("pending", "kill"): ("conflict", "pending"),
    ("pending", "restart"): (None, "running"),
    ("pending", "remove"): (None, None),
    ("running", "create"): ("conflict", "running"),
    ("running", "run"): ("conflict", "running"),
    ("running", "start"): (None, "running"),
    ("running", "stop"): (None, "exited"),
    ("running", "kill"): (None, "exited"),
    ("running", "restart"): (None, "running"),
    ("running", "remove"): (None, None),
    ("stopping", "start"): (None, "running"),
    ("stopping", "stop"): (None, "exited"),
    ("stopping", "kill"): (None, "exited"),
    ("stopping", "restart"): (None, "running"),
    ("stopping", "remove"): (None, None),
    ("exited", "create"): ("conflict", "exited"),
    ("exited", "run"): ("conflict", "exited"),
    ("exited", "start"): (None, "exited"),
    ("exited", "stop"): (None, "exited"),
    ("exited", "kill"): ("conflict", "exited"),
    ("exited", "restart"): (None, "exited"),
    ("exited", "remove"): (None, None),
    ("failed", "create"): ("conflict", "failed"),
    ("failed", "run"): ("conflict", "failed"),
    ("failed", "start"): ("start_failed", "failed"),
    ("failed", "stop"): (None, "failed"),
    ("failed", "kill"): ("conflict", "failed"),
    ("failed", "restart"): ("start_failed", "failed"),
    ("failed", "remove"): (None, None),
}


@pytest.mark.parametrize(("state", "verb"), TABLE)
async def test_cell(fleet: Fleet, cid: str, state: str, verb: str) -> None:
    await ENTER[state](fleet, cid)
    fields = {"spec": SLEEP} if verb in ("create", "run") else {}
    done = await fleet.client.do(cid, verb, **fields)
    expected, after = TABLE[state, verb]
    assert (done["error"] or {}).get("code") == expected, done
    assert done["ok"] is (expected is None)
    if after is None:
        reply = await fleet.client.query("state", container=cid)
        assert reply["error"]["code"] == "not_found", reply
        assert reply["code"] == 404
    else:
        await fleet.client.now(cid, after)
    await fleet.client.ok(cid, "remove")


@pytest.mark.parametrize("state", ["pending", "running", "stopping", "exited", "failed"])
@pytest.mark.parametrize("verb", ["create", "run"])
async def test_replace(fleet: Fleet, cid: str, state: str, verb: str) -> None:
    await ENTER[state](fleet, cid)
    old = await fleet.client.query("state", container=cid)
    done = await fleet.client.ok(cid, verb, spec=SLEEP, replace=True)
    assert done["result"]["instance"] != old["instance"]
    removed = await fleet.client.state(cid, "removed", instance=old["instance"])
    assert removed["pid"] is None
    await fleet.client.now(cid, "pending" if verb == "create" else "running")
    if old["pid"]:
        assert not alive(old["pid"])
    await fleet.client.ok(cid, "remove")


@pytest.mark.parametrize("state", ["running", "stopping"])
async def test_remove_without_force_conflicts_with_what_runs(fleet: Fleet, cid: str, state: str) -> None:
    await ENTER[state](fleet, cid)
    done = await fleet.client.do(cid, "remove", force=False)
    assert done["error"]["code"] == "conflict"
    await fleet.client.ok(cid, "remove")


@pytest.mark.parametrize("name", ["SIGKILL", "TERM", "SIGINT", "HUP", "USR1", "SIGUSR2"])
async def test_the_six_signals(fleet: Fleet, cid: str, name: str) -> None:
    await fleet.client.ok(cid, "run", spec=SLEEP)
    await fleet.client.ok(cid, "kill", signal=name)
    number = {"KILL": 9, "TERM": 15, "INT": 2, "HUP": 1, "USR1": 10, "USR2": 12}[name.removeprefix("SIG")]
    status = await fleet.client.state(cid, "exited", exit_code=-number)
    assert status["reason"] == "killed"
    await fleet.client.ok(cid, "remove")


async def test_a_signal_that_is_not_one_of_the_six(fleet: Fleet, cid: str) -> None:
    await fleet.client.ok(cid, "run", spec=SLEEP)
    done = await fleet.client.do(cid, "kill", signal="SIGSEGV")
    assert done["type"] == "command_rejected"
    assert done["error"]["code"] == "invalid_command"
    assert done["error"]["field"] == "signal"
    await fleet.client.ok(cid, "remove")


async def test_stop_kills_after_the_timeout_every_process(fleet: Fleet, cid: str) -> None:
    script = (
        "trap '' TERM; (trap '' TERM; setsid sleep 1000 & setsid sleep 1001 &) ; echo ready;"
        " while :; do sleep 0.1; done"
    )
    await fleet.client.ok(cid, "run", spec=shell(script))
    await fleet.client.log_seen(cid, b"ready\n")
    stats = await fleet.client.query("stats", container=cid)
    assert stats["processes"] >= 3
    done = await fleet.client.ok(cid, "stop", timeout_s=0.3)
    assert done["status"]["state"] == "exited"
    assert done["status"]["reason"] == "stopped"
    assert done["status"]["exit_code"] == -9
    await fleet.client.ok(cid, "remove")


async def test_stop_lets_a_program_end_by_itself(fleet: Fleet, cid: str) -> None:
    await fleet.client.ok(
        cid, "run", spec=shell("trap 'exit 7' TERM; echo ready; while :; do sleep 0.05; done")
    )
    await fleet.client.log_seen(cid, b"ready\n")
    done = await fleet.client.ok(cid, "stop")
    assert (done["status"]["exit_code"], done["status"]["reason"]) == (7, "stopped")
    await fleet.client.ok(cid, "remove")


async def test_runs_are_counted_and_the_instance_stays(fleet: Fleet, cid: str) -> None:
    await fleet.client.ok(cid, "run", spec=SLEEP)
    first = await fleet.client.query("state", container=cid)
    done = await fleet.client.ok(cid, "restart", timeout_s=1)
    second = done["status"]
    assert (first["run"], second["run"]) == (1, 2)
    assert first["instance"] == second["instance"]
    assert first["pid"] != second["pid"]
    assert first["port"] == second["port"]
    assert second["restarts"] == 0
    await fleet.client.ok(cid, "remove")


async def test_a_stop_overtakes_a_start_that_waits_behind_a_stop(fleet: Fleet, cid: str) -> None:
    await _stopping(fleet, cid)
    start = await fleet.client.send(cid, "start")
    stop = await fleet.client.send(cid, "stop", timeout_s=0)
    done = await fleet.client.completion(start)
    assert done["error"]["code"] == "conflict"
    assert "stop" in done["error"]["message"]
    assert (await fleet.client.completion(stop))["ok"]
    await fleet.client.now(cid, "exited")
    await fleet.client.ok(cid, "remove")


async def test_a_repeated_id_gives_the_first_result(fleet: Fleet, cid: str) -> None:
    body = json.dumps({"type": "create", "id": new_id(), "spec": SLEEP}).encode()
    subject = f"{P}.cmd.{fleet.client.node}.{cid}.create"
    await fleet.client.publish(subject, body)
    command_id = json.loads(body)["id"]
    first = await fleet.client.completion(command_id)
    assert first["ok"]
    await fleet.client.publish(subject, body)
    again = await fleet.client.completion(command_id, duplicate=True)
    assert again["ok"]
    assert again["result"] == first["result"]
    assert again["status"] is None
    accepted = [
        e for e in fleet.client.events if e["type"] == "command_accepted" and e["command_id"] == command_id
    ]
    assert len(accepted) == 1
    other = json.dumps({"type": "create", "id": command_id, "spec": shell("true")}).encode()
    await fleet.client.publish(subject, other)
    rejected = await fleet.client.event(
        lambda e: e["type"] == "command_rejected" and e["command_id"] == command_id
    )
    assert rejected["error"]["code"] == "conflict"
    await fleet.client.ok(cid, "remove")


async def test_the_same_body_written_otherwise_is_the_same(fleet: Fleet, cid: str) -> None:
    command_id = new_id()
    subject = f"{P}.cmd.{fleet.client.node}.{cid}.remove"
    await fleet.client.publish(subject, json.dumps({"type": "remove", "id": command_id}).encode())
    await fleet.client.completion(command_id)
    await fleet.client.publish(
        subject, json.dumps({"force": True, "id": command_id, "type": "remove"}, indent=2).encode()
    )
    assert (await fleet.client.completion(command_id, duplicate=True))["ok"]


async def test_a_deadline_that_has_passed(fleet: Fleet, cid: str) -> None:
    done = await fleet.client.do(cid, "create", spec=SLEEP, deadline="2020-01-01T00:00:00Z")
    assert done["error"]["code"] == "deadline_exceeded"
    assert (await fleet.client.query("state", container=cid))["code"] == 404


async def test_if_instance(fleet: Fleet, cid: str) -> None:
    await _pending(fleet, cid)
    instance = (await fleet.client.query("state", container=cid))["instance"]
    wrong = await fleet.client.do(cid, "remove", if_instance="01ARZ3NDEKTSV4RRFFQ69G5FAV")
    assert wrong["error"]["code"] == "conflict"
    assert wrong["error"]["field"] == "if_instance"
    await fleet.client.ok(cid, "remove", if_instance=instance)


async def test_actor_and_traceparent_are_carried(fleet: Fleet, cid: str) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    command_id = await fleet.client.send(
        cid, "run", headers={"traceparent": trace}, spec=SLEEP, actor="ci/42"
    )
    await fleet.client.completion(command_id)
    told = [e for e in fleet.client.events if e["command_id"] == command_id]
    assert {e["type"] for e in told} == {"command_accepted", "state_changed", "command_completed"}
    assert all(e["_headers"].get("traceparent") == trace for e in told), [e["_headers"] for e in told]
    assert next(e for e in told if e["type"] == "command_accepted")["actor"] == "ci/42"
    await fleet.client.ok(cid, "remove")


async def test_delete_on_exit(fleet: Fleet, cid: str) -> None:
    await fleet.client.ok(cid, "run", spec=shell("echo bye", lifecycle={"delete_on_exit": True}))
    status = await fleet.client.state(cid, "removed")
    log = await fleet.client.log(cid, instance=status["instance"])
    assert bytes(log.data) == b"bye\n"


async def test_many_commands_of_one_container_stay_in_order(fleet: Fleet, cid: str) -> None:
    ids = [await fleet.client.send(cid, "create", spec=SLEEP)]
    for _ in range(5):
        ids.append(await fleet.client.send(cid, "start"))
        ids.append(
            await fleet.client.send(cid, "kill", signal="HUP", if_instance="01ARZ3NDEKTSV4RRFFQ69G5FAV")
        )
    ids.append(await fleet.client.send(cid, "remove"))
    done = await asyncio.gather(*(fleet.client.completion(i) for i in ids))
    assert done[0]["type"] == "command_completed"
    assert done[-1]["ok"]
    assert (await fleet.client.query("state", container=cid))["code"] == 404
