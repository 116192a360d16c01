"""Promises 1, 2 and 4 under kill -9: of the worker, the server, the launcher."""

import asyncio
import os
import signal
from typing import Any

from tests.acceptance.harness import Fleet, alive, shell, until

CONFIG = '[policy]\nregister_roots = ["{images}"]\n'
COUNTER = "i=0; while [ $i -lt 400 ]; do echo line $i; i=$((i+1)); sleep 0.01; done"


def check_sequence(events: list[dict[str, Any]]) -> None:
    """`seq` is 1, 2, 3 … within the one epoch, and each accepted command has one completion."""
    assert len({e["epoch"] for e in events}) == 1
    assert [e["seq"] for e in events] == list(range(1, len(events) + 1))
    accepted = [e["command_id"] for e in events if e["type"] == "command_accepted"]
    completed = [e["command_id"] for e in events if e["type"] == "command_completed" and not e["duplicate"]]
    assert len(accepted) == len(set(accepted))
    assert sorted(completed) == sorted(accepted)


async def test_containers_live_through_the_workers_death() -> None:
    async with Fleet(CONFIG) as fleet:
        client, worker = fleet.client, fleet.worker
        await fleet.register("base")
        await client.ok("long-0", "run", spec=shell("sleep 600"))
        await client.ok("count-0", "run", spec=shell(COUNTER))
        await client.ok("short-0", "run", spec=shell("sleep 1; exit 5"))
        before = await client.query("state", container="long-0")
        worker.kill()
        await asyncio.sleep(0)
        assert alive(before["pid"])
        late = await client.send("late-0", "run", spec=shell("sleep 600"))
        await until(lambda: not any_child_named(worker.launcher_pid(), "short"), what="short-0 ended")
        worker.start()
        await fleet.ready(boots=2)
        after = await client.now("long-0", "running")
        assert after["pid"] == before["pid"]
        assert after["run"] == before["run"]
        assert (await client.state("short-0", "exited"))["exit_code"] == 5
        assert (await client.completion(late))["ok"]
        log = await client.log("count-0")
        assert bytes(log.data) == b"".join(b"line %d\n" % i for i in range(400))
        assert log.lost == 0
        for cid in ("long-0", "count-0", "short-0", "late-0"):
            await client.ok(cid, "remove")
        check_sequence(client.events)


def any_child_named(launcher: int | None, name: str) -> bool:
    """The exit record of `name` is not there yet."""
    del launcher
    return not any(f for f in _exit_files(name))


def _exit_files(name: str) -> list[str]:
    import glob
    import tempfile

    return glob.glob(
        f"{tempfile.gettempdir()}/sandfleet-test-*/node/data/containers/{name}-0/state/exit.json"
    )


async def test_commands_survive_repeated_deaths_of_the_worker() -> None:
    async with Fleet(CONFIG) as fleet:
        client, worker = fleet.client, fleet.worker
        await fleet.register("base")
        ids = []
        for round_ in range(4):
            for n in range(6):
                cid = f"c{n}-0"
                verb = ("run", "restart", "stop", "remove")[(round_ + n) % 4]
                fields = {"spec": shell("sleep 600"), "replace": True} if verb == "run" else {}
                ids.append(await client.send(cid, verb, **fields))
            await asyncio.sleep(0.05 * round_)
            worker.kill()
            worker.start()
        await fleet.ready(boots=1)
        for command_id in ids:
            done = await client.completion(command_id)
            assert done["type"] == "command_completed"
            code = (done["error"] or {}).get("code")
            assert code in (None, "not_found", "conflict", "interrupted"), done
        for n in range(6):
            await client.ok(f"c{n}-0", "remove")
        listed = await client.query("list")
        assert listed["containers"] == []
        check_sequence(client.events)
        assert not list((worker.data / "containers").iterdir())


async def test_a_server_that_dies_and_comes_back() -> None:
    async with Fleet(CONFIG) as fleet:
        client, server = fleet.client, fleet.server
        await fleet.register("base")
        await client.ok("count-0", "run", spec=shell(COUNTER))
        await client.ok("short-0", "run", spec=shell("sleep 0.5; exit 4"))
        server.kill()
        await asyncio.sleep(1.0)
        server.start()
        assert (await client.state("short-0", "exited"))["exit_code"] == 4
        log = await client.log("count-0")
        assert bytes(log.data) == b"".join(b"line %d\n" % i for i in range(400))
        await client.ok("count-0", "remove")
        await client.ok("short-0", "remove")
        check_sequence(client.events)


async def test_the_launchers_death_is_told_and_leaves_no_orphan() -> None:
    async with Fleet(CONFIG) as fleet:
        client, worker = fleet.client, fleet.worker
        await fleet.register("base")
        script = "setsid sleep 777 & (setsid sleep 778 &); echo ready; sleep 779"
        await client.ok("tree-0", "run", spec=shell(script))
        await client.log_seen("tree-0", b"ready\n")
        await until(lambda: len(sleepers()) == 3, what="the tree")
        members = sleepers()
        launcher = worker.launcher_pid()
        assert launcher is not None
        os.kill(launcher, signal.SIGKILL)
        status = await client.state("tree-0", "failed")
        assert status["reason"] == "supervisor_lost"
        assert status["pid"] is None
        assert not [pid for pid in members if alive(pid)]
        log = await client.log("tree-0")
        assert bytes(log.data) == b"ready\n"
        assert log.headers[-1]["Sandfleet-Incomplete"] == "supervisor_lost"
        done = await client.ok("tree-0", "start")
        assert done["status"]["run"] == 2
        assert done["status"]["port"] == status["port"]
        await client.ok("tree-0", "remove")
        check_sequence(client.events)


def sleepers() -> list[int]:
    """Pids of `sleep 777`, `778` and `779`."""
    from pathlib import Path

    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                argv = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if argv[:1] == [b"sleep"] and argv[1] in (b"777", b"778", b"779"):
                found.append(int(entry.name))
    return found


async def test_worker_and_launcher_die_together() -> None:
    async with Fleet(CONFIG) as fleet:
        client, worker = fleet.client, fleet.worker
        await fleet.register("base")
        await client.ok("both-0", "run", spec=shell("sleep 600"))
        pid = (await client.query("state", container="both-0"))["pid"]
        launcher = worker.launcher_pid()
        worker.kill()
        assert launcher is not None
        os.kill(launcher, signal.SIGKILL)
        await until(lambda: not alive(pid), what="the container's end")
        worker.start()
        status = await client.state("both-0", "failed")
        assert status["reason"] == "supervisor_lost"
        await client.ok("both-0", "remove")
        check_sequence(client.events)


async def test_a_second_worker_on_one_data_directory_is_refused() -> None:
    async with Fleet(CONFIG) as fleet:
        import subprocess

        second = await asyncio.to_thread(
            subprocess.run, fleet.worker.argv(), capture_output=True, text=True, timeout=20, check=False
        )
        assert second.returncode == 4, second
        assert len(second.stderr.strip().splitlines()) == 1, second.stderr
        assert "another worker" in second.stderr or "already" in second.stderr


async def test_a_second_owner_of_the_name_is_fenced() -> None:
    async with Fleet(CONFIG) as fleet:
        import subprocess

        from tests.acceptance.harness import Worker

        await fleet.register("base")
        other = Worker(fleet.folder / "other", fleet.server, fleet.worker.node)
        second = await asyncio.to_thread(
            subprocess.run, other.argv(), capture_output=True, text=True, timeout=20, check=False
        )
        assert second.returncode == 4, second
        assert "takeover" in second.stderr, second.stderr
        await fleet.client.ok("still-0", "run", spec=shell("true"))
        pid = other.launcher_pid()
        if pid is not None:
            os.kill(pid, signal.SIGTERM)
