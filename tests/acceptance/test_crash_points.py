"""The command ledger at every point: the worker is killed between receipt and acknowledgement of a command.

Whatever the point, after the restart there is exactly one acceptance and one completion, the container is as the
completion says, and nothing was done twice. Where the crash left the outcome unknown, the completion says
`interrupted` and the status tells what is.
"""

import subprocess
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_asyncio

from tests.acceptance.crash_entry import ADOPTING, FULL, LAUNCHING, POINTS, STANDING, arm, disarm
from tests.acceptance.forked import Forker
from tests.acceptance.harness import Fleet, Server, Worker, alive, new_id, shell, until
from tests.acceptance.test_survival import check_sequence

pytestmark = pytest.mark.asyncio(loop_scope="module")

CONFIG = """
[policy]
register_roots = ["{images}"]
write = ["{images}"]
"""
# Each program writes a line per start and per SIGUSR1 into a file of its container's own.
SCRIPT = """
f=$0/$SANDFLEET_CONTAINER
trap 'echo >> $f.signals' USR1
echo >> $f.starts
while :; do sleep 1000 & wait $!; done
"""
VERBS = ("create", "run", "start", "stop", "kill", "restart", "remove")
UNKNOWN = {  # after a crash at these points nobody can know what became of it
    "kill": {"accepted", "acknowledging", "acknowledged", "begun", "asked", "answered", "completing"},
    "start": {"accepted", "acknowledging", "acknowledged", "begun", "asked"},
    "run": {"asked"},
    "restart": {"asked"},
}


class CrashingWorker(Worker):
    """A worker that ends itself where `at` says, by a fork that begins at once."""

    def __init__(self, folder: Path, server: Server, node: str, config: str) -> None:
        super().__init__(folder, server, node, config)
        self.at = folder / "crash-at"
        self.forker = Forker("tests.acceptance.crash_entry")

    def start(self, *extra: str) -> None:
        forked = self.forker.start(self.argv(*extra), {"CRASH_AT": str(self.at)}, self.log_path)
        self.process = cast("subprocess.Popen[bytes]", forked)


class Crashing:
    """One fleet whose worker can be told where to end, and how often it has begun."""

    def __init__(self) -> None:
        self.fleet = Fleet(CONFIG)
        given = self.fleet.worker
        self.worker = CrashingWorker(given.folder, given.server, given.node, given.config.read_text())
        self.fleet.worker = self.worker
        self.marks = self.fleet.images

    def spec(self) -> dict[str, Any]:
        command = {"entrypoint": ["/bin/sh", "-c", SCRIPT, str(self.marks)]}
        return {
            "image": {"name": "base"},
            "command": command,
            "sandbox": {"write": [str(self.marks)]},
            "stop_grace_period": "100ms",
        }

    def count(self, cid: str, what: str) -> int:
        file = self.marks / f"{cid}.{what}"
        return len(file.read_text().splitlines()) if file.exists() else 0

    async def prepare(self, cid: str, verb: str) -> None:
        """The container in the state in which the verb has most to do."""
        if verb == "start":
            await self.fleet.client.ok(cid, "create", spec=self.spec())
        elif verb not in ("create", "run"):
            await self.fleet.client.ok(cid, "run", spec=self.spec())
            await until(lambda: self.count(cid, "starts") == 1, what="the program's beginning")

    async def crash(
        self, point: str, cid: str, verb: str, spec: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The completion of a command in whose way the worker ended."""
        client, command_id = self.fleet.client, new_id()
        fields: dict[str, Any] = {"spec": spec or self.spec()} if verb in ("create", "run") else {}
        if verb == "kill":
            fields["signal"] = "SIGUSR1"
        arm(self.worker.at, point, command_id, verb)
        await client.send(cid, verb, id=command_id, **fields)
        process = self.worker.process
        assert process is not None
        await until(lambda: process.poll() is not None, what=f"the crash of {verb} at {point!r}")
        assert process.returncode == -9, self.worker.log_text()[-3000:]
        disarm(self.worker.at)
        self.worker.start()
        return await client.completion(command_id)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def crashing() -> AsyncIterator[Crashing]:
    made = Crashing()
    try:
        async with made.fleet:
            await made.fleet.register("base")
            yield made
            check_sequence(made.fleet.client.events)
            listed = await made.fleet.client.query("list")
            assert listed["containers"] == []
            # A worker that has just begun may still try out how trees are copied best.
            containers = made.worker.data / "containers"
            await until(lambda: not list(containers.iterdir()), what="an empty folder of containers")
    finally:
        made.worker.forker.close()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("point", POINTS)
async def test_a_crash_leaves_one_answer_and_the_state_it_tells_of(
    crashing: Crashing, point: str, verb: str
) -> None:
    client, cid = crashing.fleet.client, f"{verb}-{POINTS.index(point)}"
    await crashing.prepare(cid, verb)
    before = None if verb in ("create", "run") else await client.query("state", container=cid)
    done = await crashing.crash(point, cid, verb)

    assert answers_to(crashing, done) == ["command_accepted", "command_completed"]
    if not done["ok"]:
        assert done["error"]["code"] == "interrupted", done["error"]
        assert point in UNKNOWN.get(verb, set()), done["error"]
    await check_state(crashing, cid, verb, done, before)
    starts, signals = crashing.count(cid, "starts"), crashing.count(cid, "signals")
    await client.ok(cid, "remove")
    # Nothing came later either: the remove was the next in the container's queue.
    assert answers_to(crashing, done) == ["command_accepted", "command_completed"]
    assert (crashing.count(cid, "starts"), crashing.count(cid, "signals")) == (starts, signals)


def answers_to(crashing: Crashing, done: dict[str, Any]) -> list[str]:
    told = [e for e in crashing.fleet.client.events if e.get("command_id") == done["command_id"]]
    return [e["type"] for e in told if e["type"].startswith("command_")]


async def check_state(
    crashing: Crashing, cid: str, verb: str, done: dict[str, Any], before: dict[str, Any] | None
) -> None:
    """The node is in the state of the completion, and the program was run as often as that says."""
    now = await crashing.fleet.client.query("state", container=cid)
    if verb == "remove":
        assert now["code"] == 404
        assert not (crashing.worker.data / "containers" / cid).exists()
        assert before is not None
        assert not alive(before["pid"])
        return
    assert now == done["status"], "the status of the completion is the newest"
    starts = {"create": 0, "start": 1, "run": 1, "stop": 1, "kill": 1, "restart": 2}[verb]
    if done["ok"]:
        wanted = {"create": "pending", "stop": "exited"}.get(verb, "running")
        assert now["state"] == wanted
        await until(lambda: crashing.count(cid, "starts") == starts, what=f"{starts} starts")
    else:
        assert now["state"] in ("running", "failed")
        assert crashing.count(cid, "starts") <= starts
    assert crashing.count(cid, "signals") <= (verb == "kill")
    if verb == "kill" and done["ok"]:
        await until(lambda: crashing.count(cid, "signals") == 1, what="the signal")
    if before is not None and verb in ("stop", "restart"):
        assert not alive(before["pid"])
    assert (now["pid"] is not None and alive(now["pid"])) == (now["state"] == "running")


@pytest.mark.parametrize("verb", ["create", "run"])
@pytest.mark.parametrize("point", ["accepted", "begun", "completing", "completed"])
async def test_a_crash_while_a_create_fails_lets_it_fail_once(
    crashing: Crashing, point: str, verb: str
) -> None:
    client, cid = crashing.fleet.client, f"failing-{verb}-{POINTS.index(point)}"
    missing = {**crashing.spec(), "image": {"name": "nobody-has-this", "pull_policy": "never"}}
    done = await crashing.crash(point, cid, verb, missing)
    assert done["error"]["code"] == "pull_failed"
    assert states_of(crashing, cid) == ["pending", "removed"]
    assert (await client.query("state", container=cid))["code"] == 404


@pytest.mark.parametrize("point", ["accepted", "begun", "asked", "answered", "completing", "completed"])
async def test_a_crash_while_a_start_fails_tells_what_is_known(crashing: Crashing, point: str) -> None:
    client, cid = crashing.fleet.client, f"failing-start-{POINTS.index(point)}"
    # The program is there and cannot be run.
    (crashing.marks / "no-program").write_bytes(b"\x7fELF")
    (crashing.marks / "no-program").chmod(0o755)
    broken = {**crashing.spec(), "command": {"entrypoint": [str(crashing.marks / "no-program")]}}
    broken["sandbox"] = {"read": [str(crashing.marks)]}
    await client.ok(cid, "create", spec=broken)
    done = await crashing.crash(point, cid, "start")
    reason, code = done["status"]["reason"], done["error"]["code"]
    assert (reason, code) in {("exec_failed", "start_failed"), ("supervisor_lost", "interrupted")}
    assert states_of(crashing, cid) == ["pending", "pending", "initializing", "failed"]
    await client.ok(cid, "remove")


def states_of(crashing: Crashing, cid: str) -> list[str]:
    told = crashing.fleet.client.events
    return [e["status"]["state"] for e in told if e["type"] == "state_changed" and e["container"] == cid]


@pytest.mark.parametrize("point", ["asked", "answered", "completing"])
async def test_a_run_that_ends_and_leaves_while_nobody_looks_is_not_done_again(
    crashing: Crashing, point: str
) -> None:
    """Its container is gone when the command is taken up again, which is no reason to make another."""
    client, cid = crashing.fleet.client, f"leaving-{POINTS.index(point)}"
    spec = {**crashing.spec(), "lifecycle": {"delete_on_exit": True}}
    spec["command"] = {
        "entrypoint": ["/bin/sh", "-c", "echo >> $0/$SANDFLEET_CONTAINER.starts", str(crashing.marks)]
    }
    done = await crashing.crash(point, cid, "run", spec)
    assert done["ok"] or done["error"]["code"] == "interrupted"
    await until(lambda: states_of(crashing, cid)[-1] == "removed", what="its leaving")
    assert states_of(crashing, cid).count("initializing") == 1
    assert crashing.count(cid, "starts") <= 1
    assert crashing.count(cid, "starts") == 1 or not done["ok"]
    await client.ok(cid, "remove")


@pytest.mark.parametrize("verb", ["stop", "kill", "remove"])
@pytest.mark.parametrize("point", ["completing", "completed", FULL])
async def test_a_start_that_was_overtaken_while_it_waited_is_not_done_after_a_crash(
    crashing: Crashing, point: str, verb: str
) -> None:
    """It waits behind a stop, and a later command drops it. Of what came after it some may be answered before it."""
    client, worker, cid = crashing.fleet.client, crashing.worker, f"dropped-{point}-{verb}-0"
    spec = crashing.spec()
    spec["command"]["entrypoint"][2] = "trap '' TERM" + SCRIPT
    await client.ok(cid, "run", spec=spec)
    await until(lambda: crashing.count(cid, "starts") == 1, what="the program's beginning")
    stopping = await client.send(cid, "stop", timeout_s=600)
    await client.state(cid, "stopping")
    dropped = new_id()
    arm(worker.at, point, dropped, "start")
    await client.send(cid, "start", id=dropped)
    fields: dict[str, Any] = {"timeout_s": 0} if verb == "stop" else {}
    later = await client.send(cid, verb, **fields)
    process = worker.process
    assert process is not None
    if point == FULL:
        for command_id in (stopping, later):
            assert (await client.completion(command_id))["ok"]
        worker.kill()
    await until(lambda: process.poll() is not None, what=f"the crash at {point!r}")
    disarm(worker.at)
    worker.start()

    done = await client.completion(dropped)
    assert (done["error"] or {}).get("code") == "conflict", done
    assert (await client.completion(stopping))["ok"]
    answer = await client.completion(later)
    assert answer["ok"] or (verb == "kill" and answer["error"]["code"] == "interrupted"), answer
    for told in (done, answer):
        assert answers_to(crashing, told) == ["command_accepted", "command_completed"]
    assert crashing.count(cid, "starts") == 1
    now = await client.query("state", container=cid)
    assert now["code"] == 404 if verb == "remove" else now["state"] == "exited"
    await client.ok(cid, "remove")
    assert crashing.count(cid, "starts") == 1


async def test_a_launcher_that_dies_while_it_is_asked_what_it_runs(crashing: Crashing) -> None:
    client, worker = crashing.fleet.client, crashing.worker
    await client.ok("adopted-0", "run", spec=shell("sleep 600"))
    worker.kill()
    arm(worker.at, ADOPTING)
    worker.start()
    status = await client.state("adopted-0", "failed")
    assert status["reason"] == "supervisor_lost"
    await client.ok("adopted-0", "start")
    process = worker.process
    assert process is not None
    assert process.poll() is None
    await client.ok("adopted-0", "remove")


@pytest.mark.parametrize("verb", ["run", "start", "restart"])
async def test_a_launcher_that_dies_while_it_starts_a_program(crashing: Crashing, verb: str) -> None:
    """Whether that ran is not known: told as such, and so is the end of what it may have printed."""
    client, worker, cid = crashing.fleet.client, crashing.worker, f"launched-{VERBS.index(verb)}"
    await crashing.prepare(cid, verb)
    command_id = new_id()
    arm(worker.at, LAUNCHING, command_id, verb)
    fields = {"spec": crashing.spec()} if verb == "run" else {}
    await client.send(cid, verb, id=command_id, **fields)
    done = await client.completion(command_id)
    assert done["error"]["code"] == "interrupted"
    status = done["status"]
    assert (status["state"], status["reason"]) == ("failed", "supervisor_lost")
    last = {**await client.query("state", container=cid)}
    assert last == status
    assert worker.process is not None
    assert worker.process.poll() is None
    await client.ok(cid, "start")
    await client.ok(cid, "remove")


async def test_a_launcher_that_comes_late_to_a_start_leaves_nothing_running(crashing: Crashing) -> None:
    client, worker, cid = crashing.fleet.client, crashing.worker, "late-0"
    command_id = new_id()
    arm(worker.at, STANDING, command_id, "run")
    await client.send(cid, "run", id=command_id, spec=crashing.spec())
    done = await client.completion(command_id)
    assert (done["error"]["code"], done["status"]["state"]) == ("unavailable", "failed")
    assert _programs(cid) == []
    before = crashing.count(cid, "starts")
    await client.ok(cid, "start")
    await until(lambda: crashing.count(cid, "starts") == before + 1, what="the program's beginning")
    await client.ok(cid, "remove")
    assert _programs(cid) == []


def _programs(cid: str) -> list[str]:
    """Processes of a container, by what stands in their environment."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"SANDFLEET_CONTAINER={cid}\0".encode() in environ.read_bytes():
                found.append(environ.parent.name)
    return found
