"""Two workers for one node name never both act: whatever became of the journal, and whoever is cut off."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.harness import Fleet, Worker, alive, shell, until
from tests.chaos.link import Link

CONFIG = '[policy]\nregister_roots = ["{images}"]\n'
MARK = "echo $SANDFLEET_INSTANCE >> {file}"


@asynccontextmanager
async def fleet_of_one() -> AsyncIterator[Fleet]:
    async with Fleet(CONFIG) as fleet:
        await fleet.register("base")
        yield fleet


async def refused(worker: Worker, *extra: str) -> str:
    """Start a worker that must not come up; its one line."""
    ended = await asyncio.to_thread(
        subprocess.run, worker.argv(*extra), capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 4, ended
    lines = [line for line in ended.stderr.splitlines() if not line.startswith("{")]
    assert len(lines) == 1, ended.stderr
    return lines[0]


def rival(fleet: Fleet, name: str = "rival", node: str | None = None) -> Worker:
    """Another worker process on a directory of its own, for the same name."""
    other = Worker(fleet.folder / name, fleet.server, node or fleet.worker.node)
    other.config.write_text(fleet.worker.config.read_text())
    return other


async def end(worker: Worker) -> None:
    """A worker and its launcher, when they are there."""
    if worker.process is not None:
        worker.process.kill()
        await asyncio.to_thread(worker.process.wait, 10)
    launcher = worker.launcher_pid()
    if launcher is not None:
        os.kill(launcher, signal.SIGTERM)
        await until(lambda: not alive(launcher), what="the launcher's end")


def copied(source: Path, target: Path) -> None:
    """What an operator's `cp -a` makes of a data directory."""
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "-a", str(source), str(target)], check=True)


# -- a journal of its own, a copy, an old one


async def test_a_new_journal_is_fenced_and_begins_nothing() -> None:
    async with fleet_of_one() as fleet:
        await fleet.client.ok("web-0", "run", spec=shell("sleep 600"))
        before = await fleet.client.query("state", container="web-0")
        other = rival(fleet)
        line = await refused(other)
        assert "another worker has published under this name" in line
        assert "--takeover" in line
        assert other.launcher_pid() is None, "nothing is left behind"
        assert await fleet.client.query("state", container="web-0") == before
        assert (await fleet.client.ok("web-0", "stop", timeout_s=0))["status"]["state"] == "exited"
        boots = {event["boot"] for event in fleet.client.events}
        assert len(boots) == 1, "the other one published nothing"


@pytest.mark.parametrize("whole", [True, False], ids=["the whole directory", "its journal and node.json"])
async def test_a_copy_beside_a_living_original_is_refused(whole: bool) -> None:
    """It must neither report the original's containers lost nor end them."""
    async with fleet_of_one() as fleet:
        await fleet.client.ok("web-0", "run", spec=shell("sleep 600"))
        pid = (await fleet.client.query("state", container="web-0"))["pid"]
        fleet.worker.terminate()
        other = rival(fleet)
        if whole:
            copied(fleet.worker.data, other.data)
        else:
            other.data.mkdir(mode=0o700)
            for name in ("worker.db", "node.json"):
                shutil.copy2(fleet.worker.data / name, other.data / name)
        for extra in ((), ("--takeover",)):
            line = await refused(other, *extra)
            assert f"{other.data} is a copy" in line
        assert alive(pid)
        fleet.worker.start()
        await fleet.ready(boots=2)
        assert (await fleet.client.query("state", container="web-0"))["pid"] == pid
        assert (await refused(other)) != ""
        assert alive(pid)


async def test_a_copy_whose_original_went_on_is_fenced() -> None:
    """On another machine, say: no launcher of the original is there."""
    async with fleet_of_one() as fleet:
        await fleet.client.ok("web-0", "create", spec=shell("sleep 600"))
        fleet.worker.terminate()
        launcher = fleet.worker.launcher_pid()
        assert launcher is not None
        other = rival(fleet)
        copied(fleet.worker.data, other.data)
        fleet.worker.start()
        await fleet.ready(boots=2)
        _as_if_elsewhere(other.data)
        line = await refused(other)
        assert "a worker with a copy of this journal has published" in line
        assert (await fleet.client.ok("web-0", "start"))["status"]["state"] == "running"


def _as_if_elsewhere(data: Path) -> None:
    """The launcher that the journal remembers is none of this machine's."""
    import sqlite3

    with sqlite3.connect(data / "worker.db") as db:
        db.execute("DELETE FROM meta WHERE key = 'launcher'")
    db.close()


async def test_a_journal_put_back_from_a_backup_ends_nothing_before_it_is_told_to() -> None:
    async with fleet_of_one() as fleet:
        client, worker = fleet.client, fleet.worker
        await client.ok("old-0", "run", spec=shell("sleep 600"))
        worker.terminate()
        backup = fleet.folder / "backup.db"
        shutil.copy2(worker.data / "worker.db", backup)
        worker.start()
        await fleet.ready(boots=2)
        await client.ok("new-0", "run", spec=shell("sleep 600"))
        pids = {cid: (await client.query("state", container=cid))["pid"] for cid in ("old-0", "new-0")}
        epoch = client.events[-1]["epoch"]
        worker.terminate()
        shutil.copy2(backup, worker.data / "worker.db")
        line = await refused(worker)
        assert "copy of this journal" in line
        assert "--takeover" in line
        assert all(alive(pid) for pid in pids.values()), "what it does not know is not its own to end yet"
        assert (worker.data / "containers" / "new-0").is_dir()
        worker.start("--takeover")
        await fleet.ready(boots=3)
        taken = await client.event(lambda e: e["epoch"] != epoch and e["type"] == "node_changed")
        assert taken["epoch"] > epoch
        assert taken["seq"] == 1
        listed = await client.query("list")
        assert [(c["container"], c["pid"]) for c in listed["containers"]] == [("old-0", pids["old-0"])]
        await until(lambda: not alive(pids["new-0"]), what="the end of what the journal does not know")
        await until(
            lambda: not (worker.data / "containers" / "new-0").exists(), what="the end of its directory"
        )
        # The directory is bound to the new epoch: a start without the flag goes on in it.
        worker.terminate()
        worker.start()
        await fleet.ready(boots=4)
        await client.ok("old-0", "remove")


# -- both alive


async def test_a_takeover_ends_the_other_worker() -> None:
    async with fleet_of_one() as fleet:
        client, first = fleet.client, fleet.worker
        await client.ok("a-0", "run", spec=shell("sleep 600"))
        pid = (await client.query("state", container="a-0"))["pid"]
        old_epoch = client.events[-1]["epoch"]
        second = rival(fleet)
        second.start("--takeover")
        try:
            await fleet.ready(boots=2)
            assert first.process is not None
            assert await asyncio.to_thread(first.process.wait, 20) == 4
            said = [line for line in first.log_text().splitlines() if not line.startswith("{")]
            assert len(said) == 1, said
            assert "another worker has published under this name" in said[0]
            assert alive(pid), "its containers go on; nobody told them to end"
            await client.ok(None, "register_image", image="base", source_dir=str(fleet.images / "base"))
            await client.ok("b-0", "run", spec=shell("sleep 600"))
            epochs = [event["epoch"] for event in client.events]
            assert epochs == sorted(epochs)
            assert set(epochs) == {old_epoch, epochs[-1]}
            # It may not come back either, and says so.
            assert "--takeover" in await refused(first)
            assert alive(pid)
            await client.ok("b-0", "remove")
        finally:
            await end(second)


async def test_one_behind_a_cut_connection_acts_on_nothing_when_it_is_back(tmp_path: Path) -> None:
    """The first worker is cut off without being told; a second takes over. What is commanded meanwhile is done once,
    by the second. Back again, the first ends with one line, and has neither run nor answered anything.
    """
    done = tmp_path / "done"
    async with (
        Fleet(CONFIG.replace("[policy]", f'[policy]\nwrite = ["{tmp_path}"]')) as fleet,
        Link(fleet.server.port) as link,
    ):
        client, first = fleet.client, fleet.worker
        await fleet.register("base")
        first.terminate()
        direct = fleet.server.url
        first.argv = lambda *extra: [
            link.url if word == direct else word for word in Worker.argv(first, *extra)
        ]  # type: ignore[method-assign]
        first.start()
        await fleet.ready(boots=2)
        second = rival(fleet)
        spec = shell(MARK.format(file=done), sandbox={"write": [str(tmp_path)]})
        try:
            async with link.away():
                second.start("--takeover")
                await fleet.ready(boots=3)
                await client.ok(None, "register_image", image="base", source_dir=str(fleet.images / "base"))
                completed = [await client.ok(f"job-{n}", "run", spec=spec) for n in range(5)]
                for n in range(5):
                    await client.state(f"job-{n}", "exited")
            late = [await client.ok(f"late-{n}", "run", spec=spec) for n in range(5)]
            for n in range(5):
                await client.state(f"late-{n}", "exited")
            assert first.process is not None
            assert await asyncio.to_thread(first.process.wait, 60) == 4
            said = [line for line in first.log_text().splitlines() if not line.startswith("{")]
            assert len(said) == 1, said
            ran = done.read_text().split()
            assert sorted(ran) == sorted(one["result"]["instance"] for one in (*completed, *late))
            assert not list((first.data / "containers").iterdir()), "the first made none of them"
            epochs = [event["epoch"] for event in client.events]
            assert epochs == sorted(epochs)
            presence = await client.js.key_value("SANDFLEET_NODES")
            entry = await presence.get(client.node)
            assert json.loads(entry.value)["epoch"] == epochs[-1]
        finally:
            await end(second)


# -- directories that are somebody else's


@pytest.mark.parametrize("what", ["another name", "another machine", "no node.json"])
async def test_a_directory_that_is_bound_otherwise_is_refused(what: str) -> None:
    async with fleet_of_one() as fleet:
        fleet.worker.terminate()
        bound = fleet.worker.data / "node.json"
        content: dict[str, Any] = json.loads(bound.read_text())
        worker = fleet.worker
        if what == "another name":
            worker = Worker(fleet.worker.folder, fleet.server, "somebody-else")
            expected = "belongs to node 'n1', not to 'somebody-else'"
        elif what == "another machine":
            bound.write_text(json.dumps({**content, "machine_id": "0" * 32}))
            expected = "was made on another machine"
        else:
            bound.unlink()
            expected = "holds a journal but no node.json"
        line = await refused(worker)
        assert expected in line
        assert "--takeover" in line
        bound.write_text(json.dumps(content))
        fleet.worker.start()
        await fleet.ready(boots=2)


async def test_a_journal_of_another_node_is_refused() -> None:
    """worker.db alone was copied into the directory of another name."""
    async with fleet_of_one() as fleet:
        fleet.worker.terminate()
        other = rival(fleet, "other", node="n2")
        other.data.mkdir(mode=0o700)
        machine = json.loads((fleet.worker.data / "node.json").read_text())["machine_id"]
        (other.data / "node.json").write_text(json.dumps({"version": 1, "name": "n2", "machine_id": machine}))
        shutil.copy2(fleet.worker.data / "worker.db", other.data / "worker.db")
        line = await refused(other)
        assert "belongs to node 'n1', not to 'n2'" in line
        fleet.worker.start()
        await fleet.ready(boots=2)
