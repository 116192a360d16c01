"""The command ledger at every point: the worker is killed between receipt and acknowledgement of a command.

Whatever the point, after the restart there is exactly one acceptance and one completion, the container is as the
completion says, and nothing was done twice. Where the crash left the outcome unknown, the completion says
`interrupted` and the status tells what is.
"""

import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_asyncio

from tests.acceptance.crash_entry import ADOPTING, POINTS, arm, disarm
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

    async def crash(self, point: str, cid: str, verb: str) -> dict[str, Any]:
        """The completion of a command in whose way the worker ended."""
        client, command_id = self.fleet.client, new_id()
        fields: dict[str, Any] = {"spec": self.spec()} if verb in ("create", "run") else {}
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
            assert not list((made.worker.data / "containers").iterdir())
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

    told = [e for e in client.events if e.get("command_id") == done["command_id"]]
    kinds = [e["type"] for e in told if e["type"].startswith("command_")]
    assert kinds == ["command_accepted", "command_completed"]
    if not done["ok"]:
        assert done["error"]["code"] == "interrupted", done["error"]
        assert point in UNKNOWN.get(verb, set()), done["error"]
    await check_state(crashing, cid, verb, done, before)
    await client.ok(cid, "remove")


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
