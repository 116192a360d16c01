"""`sandfleet journal backup` beside a running worker, and what becomes of a node that goes on from such a copy."""

import asyncio
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.acceptance.harness import Fleet, alive, shell, until
from tests.acceptance.test_fencing import fleet_of_one, refused
from tests.acceptance.test_survival import check_sequence

IMAGES_OF = ("worker.db", "worker.db-wal", "worker.db-shm")


async def back_up(fleet: Fleet, target: Path) -> dict[str, Any]:
    argv = [sys.executable, "-m", "worker", "journal", "backup", "--json", str(target)]
    env = {
        **os.environ,
        "SANDFLEET_DATA_DIR": str(fleet.worker.data),
        "XDG_RUNTIME_DIR": str(fleet.folder / "run"),
    }
    made = await asyncio.to_thread(
        subprocess.run, argv, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert made.returncode == 0, made.stderr
    told: dict[str, Any] = json.loads(made.stdout)
    return told


def put_back(fleet: Fleet, backup: Path) -> None:
    """As docs/operations.md says: all three files go, the copy takes their place."""
    for name in IMAGES_OF:
        (fleet.worker.data / name).unlink(missing_ok=True)
    shutil.copyfile(backup, fleet.worker.data / "worker.db")
    (fleet.worker.data / "worker.db").chmod(0o600)


async def test_a_backup_with_which_nothing_is_missing_is_gone_on_from() -> None:
    """The disk failed right after the backup: what the node told since is nothing."""
    async with fleet_of_one() as fleet:
        client, worker = fleet.client, fleet.worker
        await client.ok("web-0", "run", spec=shell("sleep 600"))
        pid = (await client.query("state", container="web-0"))["pid"]
        backup = fleet.folder / "backup.db"
        told = await back_up(fleet, backup)
        assert told["last_seq"] == client.events[-1]["seq"]
        assert (told["node"], told["epoch"]) == (client.node, client.events[-1]["epoch"])
        worker.kill()
        put_back(fleet, backup)
        worker.start()
        await fleet.ready(boots=2)
        assert (await client.query("state", container="web-0"))["pid"] == pid
        assert (await client.ok("web-0", "stop", timeout_s=0))["status"]["state"] == "exited"
        assert len({event["epoch"] for event in client.events}) == 1
        check_sequence(client.events)


async def test_a_backup_that_the_node_has_outlived_is_fenced_until_it_takes_over() -> None:
    async with fleet_of_one() as fleet:
        client, worker = fleet.client, fleet.worker
        await client.ok("old-0", "run", spec=shell("sleep 600"))
        backup = fleet.folder / "backup.db"
        await back_up(fleet, backup)
        await client.ok("new-0", "run", spec=shell("sleep 600"))
        pids = {cid: (await client.query("state", container=cid))["pid"] for cid in ("old-0", "new-0")}
        epoch = client.events[-1]["epoch"]
        worker.kill()
        put_back(fleet, backup)
        line = await refused(worker)
        assert "another worker" in line or "copy of this journal" in line
        assert "--takeover" in line
        assert all(alive(pid) for pid in pids.values())
        worker.start("--takeover")
        await fleet.ready(boots=2)
        first = await client.event(lambda e: e["epoch"] != epoch)
        assert first["epoch"] > epoch
        assert first["seq"] == 1
        listed = await client.query("list")
        assert [(c["container"], c["pid"]) for c in listed["containers"]] == [("old-0", pids["old-0"])]
        await until(lambda: not alive(pids["new-0"]), what="the end of what the journal does not know")


async def test_a_damaged_journal_ends_the_worker_with_one_line_and_no_container() -> None:
    async with fleet_of_one() as fleet:
        client, worker = fleet.client, fleet.worker
        await client.ok("web-0", "run", spec=shell("sleep 600"))
        pid = (await client.query("state", container="web-0"))["pid"]
        worker.kill()
        path = worker.data / "worker.db"
        with sqlite3.connect(path) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            root = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'sqlite_autoindex_commands_1'")
            page = root.fetchone()[0]
        db.close()
        with path.open("r+b") as file:  # an index that has none of its rows
            file.seek((page - 1) * 4096)
            file.write(b"\x0a" + bytes(4) + (4096).to_bytes(2, "big") + bytes(4089))
        line = await refused(worker)
        assert f"the journal {path} is damaged" in line
        assert alive(pid)
