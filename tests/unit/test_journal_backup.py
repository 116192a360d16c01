"""`sandfleet journal backup`: whole or not there, of a running or a stopped worker's journal."""

import asyncio
import json
import os
import sqlite3
import stat
from pathlib import Path

import pytest

from tests.unit.journal_help import NODE, all_rows, decoded, say, saying
from tests.unit.test_journal_check import DAMAGE, made
from worker import journal_backup
from worker.cli.app import run
from worker.errors import Configuration, Conflict, NotFound, ResourceExhausted
from worker.journal import Journal
from worker.journal_backup import Backup, back_up


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir(mode=0o700)
    return tmp_path / "data" / "worker.db"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "backups").mkdir()
    return tmp_path / "backups" / "copy.db"


def left_in(target: Path) -> list[str]:
    return sorted(entry.name for entry in target.parent.iterdir())


async def events_of(path: Path) -> list[str]:
    journal = await Journal.open(path, node=NODE)
    rows = await all_rows(journal)
    await journal.close()
    assert [row.seq for row in rows] == list(range(1, len(rows) + 1))
    return [decoded(row).command for row in rows]


async def test_of_a_stopped_worker(path: Path, target: Path) -> None:
    await made(path, events=3)
    before = path.read_bytes()
    backup = back_up(path, target)
    assert (backup.node, backup.last_seq, backup.bytes) == (NODE, 3, target.stat().st_size)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert left_in(target) == ["copy.db"], "one file, no log beside it"
    assert path.read_bytes() == before
    assert await events_of(target) == ["e0", "e1", "e2"]


async def test_of_a_killed_worker_has_what_its_log_has(path: Path, target: Path, tmp_path: Path) -> None:
    journal = await Journal.open(path, node=NODE)
    for number in range(5):
        await journal.transact(saying(f"e{number}"))
    killed = tmp_path / "killed"
    killed.mkdir()
    for name in ("worker.db", "worker.db-wal"):
        (killed / name).write_bytes((path.parent / name).read_bytes())
    await journal.close()
    log = (killed / "worker.db-wal").read_bytes()
    back_up(killed / "worker.db", target)
    assert await events_of(target) == [f"e{number}" for number in range(5)]
    assert (killed / "worker.db-wal").read_bytes() == log, "the log of the dead stays for the next worker"


async def test_beside_a_running_worker_it_is_one_moments_state(path: Path, target: Path) -> None:
    journal = await Journal.open(path, node=NODE)
    going = True

    async def write() -> None:
        number = 0
        while going:
            number += 1
            name = f"e{number}"

            def step(tx, name=name):  # type: ignore[no-untyped-def]
                tx.put_container("web-0", "I", name.encode())
                say(tx, name + "x" * 2000)

            await journal.transact(step)

    writing = asyncio.create_task(write())
    try:
        async with asyncio.timeout(30):
            while not await _some(journal):
                await asyncio.sleep(0)
        backups = []
        for number in range(5):
            file = target.with_name(f"copy-{number}.db")
            backups.append((await asyncio.to_thread(back_up, path, file), file))
    finally:
        going = False
        await writing
        await journal.close()
    for backup, file in backups:
        copy = await Journal.open(file, node=NODE)
        rows = await all_rows(copy)
        assert len(rows) == backup.last_seq
        records = await copy.read(lambda tx: tx.containers())
        assert records == [("web-0", decoded(rows[-1]).command.rstrip("x").encode())]
        await copy.close()


async def _some(journal: Journal) -> bool:
    return (await journal.read(lambda tx: tx.last_seq)) >= 50


async def test_nothing_is_overwritten_unasked(path: Path, target: Path) -> None:
    await made(path, events=3)
    target.write_text("mine")
    with pytest.raises(Conflict, match="is there already"):
        back_up(path, target)
    assert target.read_text() == "mine"
    assert left_in(target) == ["copy.db"]
    back_up(path, target, overwrite=True)
    assert len(await events_of(target)) == 3


async def test_a_file_that_appears_meanwhile_is_not_overwritten(
    path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await made(path, events=3)
    copy = journal_backup._copy

    def late(journal: Path, fresh: Path, to: Path) -> Backup:
        found = copy(journal, fresh, to)
        target.write_text("mine")
        return found

    monkeypatch.setattr(journal_backup, "_copy", late)
    with pytest.raises(Conflict, match="is there already"):
        back_up(path, target)
    assert target.read_text() == "mine"
    assert left_in(target) == ["copy.db"]


@pytest.mark.parametrize("there", [False, True])
async def test_a_file_system_without_links(
    path: Path, target: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    await made(path, events=3)

    def no_links(*_: object, **__: object) -> None:
        if there:
            target.write_text("mine")
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    if there:
        with pytest.raises(Conflict, match="is there already"):
            back_up(path, target)
        assert target.read_text() == "mine"
    else:
        back_up(path, target)
        assert len(await events_of(target)) == 3
    assert left_in(target) == ["copy.db"]


@pytest.mark.parametrize("spoil", DAMAGE.values(), ids=DAMAGE)
async def test_a_damaged_journal_is_not_kept_as_a_backup(path: Path, target: Path, spoil) -> None:  # type: ignore[no-untyped-def]
    await made(path)
    spoil(path)
    with pytest.raises(Configuration, match=f"{path} is damaged"):
        back_up(path, target)
    assert left_in(target) == []


async def test_places_that_are_refused(path: Path, target: Path, tmp_path: Path) -> None:
    await made(path, events=3)
    before = path.read_bytes()
    for name in ("copy.db", "worker.db", "node.json"):
        with pytest.raises(Conflict, match="beside the journal itself"):
            back_up(path, path.with_name(name), overwrite=True)
    link = tmp_path / "link"
    link.symlink_to(path.parent)
    with pytest.raises(Conflict, match="beside the journal itself"):
        back_up(path, link / "worker.db", overwrite=True)
    with pytest.raises(Conflict, match="is no file"):
        back_up(path, target.parent, overwrite=True)
    target.symlink_to(path)
    with pytest.raises(Conflict, match="is no file"):
        back_up(path, target, overwrite=True)
    with pytest.raises(ResourceExhausted, match="No such file"):
        back_up(path, tmp_path / "nowhere" / "copy.db")
    assert path.read_bytes() == before


async def test_what_is_no_journal(path: Path, target: Path) -> None:
    with pytest.raises(NotFound, match="there is no journal"):
        back_up(path, target)
    path.write_text("[nats]\n")
    with pytest.raises(Configuration, match="is no journal"):
        back_up(path, target)
    path.unlink()
    await made(path, events=1)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(Configuration, match="newer worker"):
        back_up(path, target)
    assert left_in(target) == []


async def test_the_verb(path: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    await made(path, events=3)
    argv = ["journal", "backup", "--data-dir", str(path.parent), str(target)]
    assert await asyncio.to_thread(run, argv) == 0
    assert f"{target}  " in capsys.readouterr().out
    assert await asyncio.to_thread(run, argv) == 4
    assert "is there already (--overwrite replaces it)" in capsys.readouterr().err
    assert await asyncio.to_thread(run, [*argv, "--json", "--overwrite"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["file"] == str(target)
    assert told["last_seq"] == 3
    assert await asyncio.to_thread(run, [*argv[:3], str(path.parent / "none"), str(target) + "2"]) == 3
