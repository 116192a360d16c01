"""The command ledger from outside: order in a burst, deadlines and instances, and what a crash left unknown."""

import asyncio
import itertools
import json
import os
import signal
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from tests.acceptance.harness import Fleet, P, alive, new_id, shell, until
from tests.acceptance.test_fencing import fleet_of_one
from tests.acceptance.test_survival import check_sequence


def soon(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


async def at_once(fleet: Fleet, commands: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Publish commands to containers as fast as the client can; gives their ids."""
    acks = []
    ids = []
    for cid, body in commands:
        command = {"id": new_id(), **body}
        ids.append(str(command["id"]))
        subject = f"{P}.cmd.{fleet.client.node}.{cid}.{body['type']}"
        acks.append(await fleet.client.js.publish_async(subject, json.dumps(command).encode()))
    await asyncio.gather(*acks)
    return ids


def answers(fleet: Fleet, cid: str) -> list[dict[str, Any]]:
    """The completions of a container's commands, in order."""
    return [e for e in fleet.client.events if e["type"] == "command_completed" and e["container"] == cid]


# -- order


async def test_a_burst_is_answered_in_order_per_container() -> None:
    """Of each container every command in turn, whether it is idle, busy, or was never there."""
    async with fleet_of_one() as fleet:
        client = fleet.client
        names = [f"c-{n}" for n in range(20)]
        created = await at_once(fleet, [(cid, {"type": "create", "spec": shell("true")}) for cid in names])
        for command_id in created:
            assert (await client.completion(command_id))["ok"]
        verbs = ["kill", "kill", "stop", "kill", "stop", "stop", "kill", "remove", "kill", "stop"]
        rounds = verbs * 3
        order: dict[str, list[str]] = defaultdict(list)
        commands = [(cid, {"type": verb}) for verb in rounds for cid in [*names, "never-0"]]
        ids = await at_once(fleet, commands)
        for (cid, _), command_id in zip(commands, ids, strict=True):
            order[cid].append(command_id)
        for command_id in ids:
            await client.completion(command_id)
        for cid, expected in order.items():
            told = [e for e in answers(fleet, cid) if e["command_id"] in set(expected)]
            assert [e["command_id"] for e in told] == expected
            codes = [(e["error"] or {}).get("code") for e in told]
            if cid == "never-0":
                assert codes == [None if verb == "remove" else "not_found" for verb in rounds]
            else:
                gone = rounds.index("remove")
                assert codes[:gone] == ["conflict" if verb == "kill" else None for verb in rounds[:gone]]
                after = rounds[gone:]
                assert codes[gone:] == [None if verb == "remove" else "not_found" for verb in after]
        check_sequence(client.events)


async def test_the_states_of_a_busy_container_follow_the_commands() -> None:
    """Starts and stops in turn, faster than they can be done: each `from` is where the one before led."""
    async with fleet_of_one() as fleet:
        client = fleet.client
        await client.ok("flip-0", "create", spec=shell("exec sleep 600"))
        verbs = ["start", "stop"] * 15
        ids = await at_once(fleet, [("flip-0", {"type": verb}) for verb in verbs])
        for command_id in ids:
            done = await client.completion(command_id)
            assert (done["error"] or {}).get("code") in (None, "conflict"), done
        await client.ok("flip-0", "remove")
        states = [e for e in client.events if e["type"] == "state_changed" and e["container"] == "flip-0"]
        for before, after in itertools.pairwise(states):
            assert after["from"] == before["status"]["state"], (before, after)
        check_sequence(client.events)


# -- deadlines


async def test_a_deadline_that_passes_while_it_waits() -> None:
    """The command was accepted in time, behind a stop that takes longer than it may wait."""
    async with fleet_of_one() as fleet:
        client = fleet.client
        await client.ok("slow-0", "run", spec=shell("trap '' TERM; echo up; while :; do sleep 0.02; done"))
        await client.log_seen("slow-0", b"up\n")
        stopping = await client.send("slow-0", "stop", timeout_s=1.5)
        await client.state("slow-0", "stopping")
        late = await client.send("slow-0", "start", deadline=soon(0.7))
        await client.event(lambda e: e["type"] == "command_accepted" and e["command_id"] == late)
        assert (await client.completion(stopping))["ok"]
        assert (await client.completion(late))["error"]["code"] == "deadline_exceeded"
        assert (await client.now("slow-0", "exited"))["run"] == 1
        await client.ok("slow-0", "start", deadline=soon(60))


async def test_what_a_dead_worker_had_not_begun_is_not_begun_late() -> None:
    """Accepted, and waiting behind a stop, when the worker is killed; back only after the deadline."""
    async with fleet_of_one() as fleet:
        client, worker = fleet.client, fleet.worker
        await client.ok("slow-0", "run", spec=shell("trap '' TERM; echo up; while :; do sleep 0.02; done"))
        await client.log_seen("slow-0", b"up\n")
        stopping = await client.send("slow-0", "stop", timeout_s=1.0)
        await client.state("slow-0", "stopping")
        deadline = soon(1.5)
        late = await client.send("slow-0", "start", deadline=deadline)
        in_time = await client.send("slow-0", "start", deadline=soon(600))
        for command_id in (late, in_time):
            await client.event(
                lambda e, i=command_id: e["type"] == "command_accepted" and e["command_id"] == i
            )
        worker.kill()
        passed = datetime.fromisoformat(deadline)
        await until(lambda: datetime.now(UTC) > passed, what="the deadline")
        worker.start()
        await fleet.ready(boots=2)
        assert (await client.completion(stopping))["ok"], "it was begun"
        assert (await client.completion(late))["error"]["code"] == "deadline_exceeded"
        done = await client.completion(in_time)
        assert done["ok"]
        assert (await client.now("slow-0", "running"))["run"] == 2
        check_sequence(client.events)


# -- instances


async def test_if_instance_guards_every_verb() -> None:
    async with fleet_of_one() as fleet:
        client = fleet.client
        first = (await client.ok("a-0", "run", spec=shell("exec sleep 600")))["result"]["instance"]
        second = (await client.ok("a-0", "run", spec=shell("exec sleep 600"), replace=True))["result"][
            "instance"
        ]
        assert first != second
        for verb, fields in (
            ("start", {}),
            ("stop", {}),
            ("kill", {}),
            ("restart", {}),
            ("remove", {}),
            ("run", {"spec": shell("true"), "replace": True}),
        ):
            done = await client.do("a-0", verb, if_instance=first, **fields)
            assert (done["error"]["code"], done["error"]["field"]) == ("conflict", "if_instance"), verb
        assert (await client.query("state", container="a-0"))["state"] == "running"
        await client.ok("a-0", "stop", if_instance=second, timeout_s=0)
        await client.ok("a-0", "remove", if_instance=second)
        gone = await client.do("a-0", "stop", if_instance=second)
        assert gone["error"]["code"] == "not_found"


# -- what a crash left unknown


@asynccontextmanager
async def frozen(pid: int) -> AsyncIterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_a_signal_of_which_nobody_knows_whether_it_was_sent_is_interrupted() -> None:
    """The launcher does not answer, and the worker that asked it is killed."""
    async with fleet_of_one() as fleet:
        client, worker = fleet.client, fleet.worker
        await client.ok(
            "a-0", "run", spec=shell("trap 'echo got' USR1; echo up; while :; do sleep 0.02; done")
        )
        await client.log_seen("a-0", b"up\n")
        launcher = worker.launcher_pid()
        assert launcher is not None
        async with frozen(launcher):
            unknown = await client.send("a-0", "kill", signal="SIGUSR1")
            await client.event(lambda e: e["type"] == "command_accepted" and e["command_id"] == unknown)
            worker.kill()
        worker.start()
        await fleet.ready(boots=2)
        done = await client.completion(unknown)
        assert done["error"]["code"] == "interrupted"
        assert done["status"]["state"] == "running", "the status tells what is"
        await client.ok("a-0", "kill", signal="SIGUSR1")
        await client.ok("a-0", "remove")
        check_sequence(client.events)


async def test_a_start_whose_answer_was_never_heard_is_reconciled() -> None:
    """The worker is killed about when it asks the launcher, which starts the program or was never asked."""
    async with fleet_of_one() as fleet:
        client, worker = fleet.client, fleet.worker
        await client.ok("a-0", "create", spec=shell("exec sleep 600"))
        launcher = worker.launcher_pid()
        assert launcher is not None
        async with frozen(launcher):
            starting = await client.send("a-0", "start")
            await client.state("a-0", "initializing")
            worker.kill()
        worker.start()
        await fleet.ready(boots=2)
        done = await client.completion(starting)
        if done["ok"]:
            status = await client.now("a-0", "running")
            assert status["run"] == 1
            assert alive(status["pid"])
        else:
            assert done["error"]["code"] == "interrupted"
            assert (await client.now("a-0", "failed"))["reason"] == "supervisor_lost"
        await client.ok("a-0", "remove")
        check_sequence(client.events)


# -- repetition


async def test_ids_repeated_in_a_burst_are_done_once() -> None:
    async with fleet_of_one() as fleet:
        client = fleet.client
        await client.ok("a-0", "create", spec=shell("true"))
        body = {"type": "start", "id": new_id()}
        commands = [("a-0", dict(body)) for _ in range(30)]
        await at_once(fleet, commands)
        await client.state("a-0", "exited", run=1)
        await client.ok("a-0", "stop")
        await client.do("a-0", "kill")  # behind all repetitions
        mine = [e for e in client.events if e.get("command_id") == body["id"]]
        first = [e for e in mine if e["type"] == "command_completed" and not e["duplicate"]]
        again = [e for e in mine if e["type"] == "command_completed" and e["duplicate"]]
        assert len(first) == 1
        assert len([e for e in mine if e["type"] == "command_accepted"]) == 1
        assert len(again) <= 29
        assert all(e["ok"] == first[0]["ok"] for e in again)
        assert (await client.query("state", container="a-0"))["run"] == 1
        check_sequence(client.events)
