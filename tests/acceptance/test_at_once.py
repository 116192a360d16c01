"""Commands that arrive in one moment: what one does must not leave another's work half done."""

import os
import signal
from typing import Any

import pytest

from tests.acceptance.harness import Client, Fleet, shell

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def at_once(
    fleet: Fleet, commands: list[tuple[str | None, str, dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Publish while the worker stands still, so that it finds all of them together; gives the completions."""
    process = fleet.worker.process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    try:
        ids = [await fleet.client.send(cid, verb, **fields) for cid, verb, fields in commands]
    finally:
        os.kill(process.pid, signal.SIGCONT)
    return [await fleet.client.completion(command_id) for command_id in ids]


def states(client: Client, cid: str) -> list[tuple[str, str | None]]:
    return [
        (e["status"]["state"], e["status"]["message"])
        for e in client.events
        if e["type"] == "state_changed" and e["container"] == cid
    ]


@pytest.mark.parametrize("verb", ["kill", "stop", "remove"])
async def test_a_start_that_fails_by_itself_while_it_is_overtaken_leaves_nobody_waiting(
    fleet: Fleet, cid: str, verb: str
) -> None:
    spec = {"image": {"name": "base"}, "command": {"entrypoint": ["/no/such/program"]}}
    await fleet.client.ok(cid, "create", spec=spec)
    start, last = await at_once(fleet, [(cid, "start", {}), (cid, verb, {})])
    assert not start["ok"]
    assert last["ok"], last["error"]
    if verb != "remove":
        assert (await fleet.client.query("state", container=cid))["state"] in ("exited", "failed")
    await fleet.client.ok(cid, "remove")


async def test_a_drain_in_the_same_moment_leaves_no_half_made_container(fleet: Fleet, cid: str) -> None:
    done, _ = await at_once(
        fleet, [(cid, "run", {"spec": shell("sleep 600")}), (None, "drain", {"timeout_s": 0})]
    )
    listed = {c["container"]: c for c in (await fleet.client.query("list"))["containers"]}
    if done["ok"]:
        assert listed[cid]["state"] == "running"
    else:
        assert done["error"]["code"] == "unavailable"
        told = states(fleet.client, cid)
        # Either there is nothing of it, or all that a create makes.
        assert not told or told[-1] in (("pending", "ready"), ("removed", told[-1][1])), told
    await fleet.client.ok(None, "resume")
    await fleet.client.ok(cid, "remove")
