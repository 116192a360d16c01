"""A worker is replaced, upgraded, or started after a reboot: what it finds is told as it was."""

import asyncio
import os
import shutil
import signal
import sqlite3
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.harness import Fleet, alive, shell, until
from tests.acceptance.test_fencing import fleet_of_one, refused
from tests.acceptance.test_survival import check_sequence

REPOSITORY = Path(__file__).resolve().parents[2]
LINES = 3000
COUNTER = (
    f"i=0; while [ $i -lt {LINES} ]; do echo line $i; i=$((i+1)); [ $((i % 50)) = 0 ] && sleep 0.1; done"
)
START_NEWER = "import sys; sys.path.insert(0, {code!r}); from worker.__main__ import main; main()"


def new_code(fleet: Fleet, edit: dict[str, tuple[str, str]]) -> Path:
    """A copy of the worker in which the named files are changed: another version of it."""
    code = fleet.folder / "newer"
    for package in ("worker", "schemas"):
        shutil.copytree(REPOSITORY / package, code / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, (before, after) in edit.items():
        file = code / name
        text = file.read_text()
        assert before in text
        file.write_text(text.replace(before, after, 1))
    return code


def run_newer(fleet: Fleet, code: Path) -> None:
    """From now on the worker process is of that code."""
    argv = fleet.worker.argv

    def newer(*extra: str) -> list[str]:
        return [sys.executable, "-c", START_NEWER.format(code=str(code)), *argv(*extra)[1:]]

    fleet.worker.argv = newer  # type: ignore[method-assign]


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def record_file(fleet: Fleet, cid: str) -> Path:
    return fleet.worker.data / "containers" / cid / "state" / "exit.json"


# -- exits that happened meanwhile


async def test_exits_meanwhile_carry_their_code_and_time() -> None:
    async with fleet_of_one() as fleet:
        client, worker = fleet.client, fleet.worker
        scripts = {
            "code-0": "trap 'exit 7' USR1; echo up; while :; do sleep 0.02; done",
            "kill-0": "echo up; exec sleep 600",
            "gone-0": "trap 'exit 0' USR1; echo up; while :; do sleep 0.02; done",
        }
        pids = {}
        for cid, script in scripts.items():
            fields: dict[str, Any] = {"lifecycle": {"delete_on_exit": True}} if cid == "gone-0" else {}
            await client.ok(cid, "run", spec=shell(script, **fields))
            await client.log_seen(cid, b"up\n")
            pids[cid] = (await client.query("state", container=cid))["pid"]
        worker.kill()
        before = time.time()
        os.kill(pids["code-0"], signal.SIGUSR1)
        os.kill(pids["gone-0"], signal.SIGUSR1)
        os.kill(pids["kill-0"], signal.SIGKILL)
        await until(lambda: all(record_file(fleet, cid).exists() for cid in scripts), what="their ends")
        after = time.time()
        worker.start()
        await fleet.ready(boots=2)
        for cid, code in (("code-0", 7), ("kill-0", -9), ("gone-0", 0)):
            status = await client.state(cid, "exited")
            assert status["exit_code"] == code
            assert before <= datetime.fromisoformat(status["finished_at"]).timestamp() <= after
            assert datetime.fromisoformat(status["started_at"]).timestamp() <= before
        await client.state("gone-0", "removed")
        check_sequence(client.events)


# -- the launcher is replaced


async def test_an_upgrade_replaces_the_launcher_under_load() -> None:
    """Output flows and commands come all the while; nothing is lost, and no container notices."""
    async with fleet_of_one() as fleet:
        client, worker = fleet.client, fleet.worker
        for n in range(4):
            await client.ok(f"count-{n}", "run", spec=shell(COUNTER))
        await client.ok("idle-0", "run", spec=shell("trap 'exit 6' USR1; while :; do sleep 0.02; done"))
        before = {c["container"]: (c["pid"], c["port"]) for c in (await client.query("list"))["containers"]}
        launcher = worker.launcher_pid()
        assert launcher is not None
        code = new_code(fleet, {"worker/launcher/protocol.py": ("import json", "import json  # newer")})
        run_newer(fleet, code)
        worker.terminate()
        worker.start()
        ids: list[str] = []
        going = True

        async def keep_commanding() -> None:
            n = 0
            while going:
                ids.append(await client.send(f"brief-{n % 3}", "run", spec=shell("exit 0"), replace=True))
                n += 1
                await asyncio.sleep(0.05)

        commanding = asyncio.create_task(keep_commanding())
        try:
            await until(lambda: str(code) in command_line(launcher), 40, what="the launcher's new code")
        finally:
            going = False
            await commanding
        assert "--resume" in command_line(launcher)
        assert worker.launcher_pid() == launcher, "the same process"
        await until(lambda: "the launcher was replaced by newer code" in worker.log_text(), what="the word")
        for command_id in ids:
            done = await client.completion(command_id)
            code_of = (done["error"] or {}).get("code")
            assert code_of in (None, "conflict"), done
        after = {c["container"]: (c["pid"], c["port"]) for c in (await client.query("list"))["containers"]}
        assert after["idle-0"] == before["idle-0"]
        for n in range(4):
            log = await client.log(f"count-{n}")
            assert bytes(log.data) == b"".join(b"line %d\n" % i for i in range(LINES))
            assert log.lost == 0
            assert (await client.state(f"count-{n}", "exited"))["exit_code"] == 0
        await client.ok("idle-0", "kill", signal="SIGUSR1")
        assert (await client.state("idle-0", "exited"))["exit_code"] == 6
        # Once more with the same code: there is nothing to do.
        line = command_line(launcher)
        worker.terminate()
        worker.start()
        await fleet.ready(boots=3)
        await client.ok("idle-0", "start")
        assert command_line(launcher) == line
        assert worker.log_text().count("the launcher was replaced") == 1
        check_sequence(client.events)


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("worker/launcher/main.py", "import os\n", "import os\nimport nothing_of_that_name\n"),
        ("worker/launcher/run.py", "    state_dir: str\n", "    state_dir: str\n    wanted: str\n"),
    ],
    ids=["it does not run", "it cannot read the tables"],
)
async def test_new_code_that_does_not_work_leaves_the_old_launcher(
    file: str, before: str, after: str
) -> None:
    async with fleet_of_one() as fleet:
        client, worker = fleet.client, fleet.worker
        await client.ok("idle-0", "run", spec=shell("sleep 600"))
        pid = (await client.query("state", container="idle-0"))["pid"]
        launcher = worker.launcher_pid()
        assert launcher is not None
        line = command_line(launcher)
        run_newer(fleet, new_code(fleet, {file: (before, after)}))
        worker.kill()
        worker.start()
        await fleet.ready(boots=2)
        await until(
            lambda: "the launcher goes on with its older code" in worker.log_text(), 40, what="the word"
        )
        assert command_line(launcher) == line
        assert (await client.query("state", container="idle-0"))["pid"] == pid
        await client.ok("more-0", "run", spec=shell("exit 3"))
        assert (await client.state("more-0", "exited"))["exit_code"] == 3


# -- a newer journal, another boot


async def test_a_newer_journal_is_refused_by_an_older_worker() -> None:
    async with fleet_of_one() as fleet:
        await fleet.client.ok("idle-0", "run", spec=shell("sleep 600"))
        pid = (await fleet.client.query("state", container="idle-0"))["pid"]
        fleet.worker.terminate()
        with sqlite3.connect(fleet.worker.data / "worker.db") as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            db.execute("PRAGMA user_version = 99")
        db.close()
        for extra in ((), ("--takeover",)):
            line = await refused(fleet.worker, *extra)
            assert "was written by a newer worker (schema 99" in line
        assert alive(pid)
        with sqlite3.connect(fleet.worker.data / "worker.db") as db:
            db.execute(f"PRAGMA user_version = {version}")
        db.close()
        fleet.worker.start()
        await fleet.ready(boots=2)
        assert (await fleet.client.query("state", container="idle-0"))["pid"] == pid


async def test_a_reboot_of_the_machine_is_told() -> None:
    """As after one: neither worker nor launcher is there, and the journal's runs are of another boot."""
    async with fleet_of_one() as fleet:
        client, worker = fleet.client, fleet.worker
        await client.ok("run-0", "run", spec=shell("sleep 600"))
        await client.ok("done-0", "run", spec=shell("exit 4"))
        await client.state("done-0", "exited")
        pid = (await client.query("state", container="run-0"))["pid"]
        launcher = worker.launcher_pid()
        assert launcher is not None
        worker.kill()
        os.kill(launcher, signal.SIGKILL)
        await until(lambda: not alive(pid), what="the container's end")
        own = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        with sqlite3.connect(worker.data / "worker.db") as db:
            changed = db.execute(
                "UPDATE containers SET record = CAST(replace(CAST(record AS TEXT), ?, ?) AS BLOB)",
                (own, "0" * 8 + own[8:]),
            )
            assert changed.rowcount == 2
        db.close()
        worker.start()
        await fleet.ready(boots=2)
        status = await client.state("run-0", "failed")
        assert status["reason"] == "node_rebooted"
        assert (await client.now("done-0", "exited"))["exit_code"] == 4
        done = await client.ok("run-0", "start")
        assert (done["status"]["run"], done["status"]["port"]) == (2, status["port"])
        log = await client.log("run-0", run=1)
        assert log.headers[-1]["Sandfleet-Incomplete"] == "supervisor_lost"
        check_sequence(client.events)
