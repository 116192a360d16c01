"""The journal's file: made, refused, checked, migrated; what a killed process or a full disk leaves of it."""

import contextlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.journal_help import NODE, all_rows, decoded, say, saying
from worker import journal_file, journal_schema
from worker.errors import Configuration, ResourceExhausted
from worker.ids import new_ulid
from worker.journal import Journal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "worker.db"


async def make(path: Path, events: int = 3) -> Journal:
    """A journal with some events, closed."""
    journal = await Journal.open(path, node=NODE)
    for number in range(1, events + 1):
        await journal.transact(saying(f"e{number}"))
    await journal.close()
    return journal


async def refused(path: Path, **options: object) -> str:
    """The one line of the refusal; the file is as it was."""
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(Configuration) as caught:
        await Journal.open(path, **({"node": NODE} | options))  # type: ignore[arg-type]
    assert (path.read_bytes() if path.is_file() else None) == before
    assert "\n" not in caught.value.message
    assert str(path) in caught.value.message
    return caught.value.message


def alter(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        for statement in statements:
            connection.execute(statement)
    finally:
        connection.close()


# -- making


async def test_a_new_journal(path: Path) -> None:
    journal = await Journal.open(path, node=NODE)
    assert (path.stat().st_mode & 0o777, path.with_name("worker.db-wal").stat().st_mode & 0o777) == (
        0o600,
        0o600,
    )
    await journal.close()
    assert [found.name for found in path.parent.iterdir()] == ["worker.db"]
    connection = sqlite3.connect(path)
    try:
        assert connection.execute("PRAGMA application_id").fetchone() == (journal_schema.APPLICATION_ID,)
        assert connection.execute("PRAGMA user_version").fetchone() == (len(journal_schema.MIGRATIONS),)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    finally:
        connection.close()


async def test_a_given_epoch(path: Path) -> None:
    epoch = new_ulid()
    journal = await Journal.open(path, node=NODE, epoch=epoch)
    await journal.close()
    assert journal.epoch == epoch


async def test_a_half_made_file_is_made_again(path: Path) -> None:
    half = path.with_name("worker.db.new")
    half.write_bytes(b"half")
    path.with_name("worker.db.new-wal").write_bytes(b"half")
    await make(path)
    assert [found.name for found in path.parent.iterdir()] == ["worker.db"]


# -- refusing


@pytest.mark.parametrize(
    ("content", "what"), [(b"", "is an empty file"), (b"[nats]\nurl = 1\n", "is no journal")]
)
async def test_a_file_that_is_no_database(path: Path, content: bytes, what: str) -> None:
    path.write_bytes(content)
    assert what in await refused(path)
    assert what in await refused(path, takeover=True)


async def test_a_database_of_another_program(path: Path) -> None:
    alter(path, "CREATE TABLE users (name TEXT)")
    assert "a database of another program" in await refused(path)


async def test_a_folder_or_a_link_in_its_place(path: Path, tmp_path: Path) -> None:
    path.mkdir()
    assert "is no regular file" in await refused(path)
    path.rmdir()
    path.symlink_to(tmp_path / "elsewhere")
    assert "is no regular file" in await refused(path)
    assert not (tmp_path / "elsewhere").exists()


async def test_a_newer_journal(path: Path) -> None:
    await make(path)
    alter(path, "PRAGMA user_version = 99")
    assert f"schema 99, this one knows {len(journal_schema.MIGRATIONS)}" in await refused(path)


async def test_a_damaged_journal(path: Path) -> None:
    await make(path, events=200)
    alter(path, "UPDATE journal SET clean = 0")
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4096 * 2)
        file.write(random.Random(7).randbytes(size - 4096 * 3))
    message = await refused(path)
    assert "is damaged" in message
    assert "--takeover" in message


async def test_a_truncated_journal(path: Path) -> None:
    await make(path, events=200)
    alter(path, "UPDATE journal SET clean = 0")
    os.truncate(path, path.stat().st_size // 2)
    assert "is damaged" in await refused(path)


async def test_a_ledger_that_does_not_add_up(path: Path) -> None:
    await make(path)
    alter(path, "UPDATE boots SET last_seq = 1")
    assert "event 3 is kept but the last one made is 1" in await refused(path)


async def test_another_nodes_journal(path: Path) -> None:
    await make(path)
    message = await refused(path, node="other")
    assert "belongs to node 'node-1', not to 'other'" in message


async def test_the_name_can_be_changed_by_takeover(path: Path) -> None:
    former = await make(path)
    journal = await Journal.open(path, node="other", takeover=True)
    assert journal.epoch > former.epoch
    assert await all_rows(journal) == []
    event = await journal.transact(say)
    assert (event.node, event.seq) == ("other", 1)
    await journal.close()


async def test_a_lost_journal_is_not_forgotten(path: Path) -> None:
    epoch = new_ulid()
    message = await refused(path, expected_epoch=epoch)
    assert "is gone" in message
    assert epoch in message
    journal = await Journal.open(path, node=NODE, expected_epoch=epoch, takeover=True)
    assert journal.epoch > epoch
    await journal.close()


async def test_a_journal_of_another_history(path: Path) -> None:
    former = await make(path)
    foreign = new_ulid()
    assert f"epoch {former.epoch}, node.json says {foreign}" in await refused(path, expected_epoch=foreign)
    journal = await Journal.open(path, node=NODE, expected_epoch=foreign, takeover=True)
    assert journal.epoch > max(foreign, former.epoch)
    assert (await journal.transact(say)).seq == 1
    await journal.close()


async def test_a_log_without_its_journal(path: Path) -> None:
    path.with_name("worker.db-wal").write_bytes(b"what was committed last")
    assert "put it back" in await refused(path)
    assert path.with_name("worker.db-wal").read_bytes() == b"what was committed last"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
async def test_a_folder_that_may_not_be_written(path: Path) -> None:
    await make(path)
    path.parent.chmod(0o500)
    try:
        assert "cannot be" in await refused(path)
    finally:
        path.parent.chmod(0o700)


async def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "No such file or directory" in await refused(tmp_path / "none" / "worker.db")


async def test_another_process_holds_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await make(path)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    try:
        assert "another process holds it" in await refused(path)
    finally:
        holder.close()


# -- checking, migrating


async def test_a_closed_journal_is_not_checked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Path] = []

    def check(connection: sqlite3.Connection, file: Path, budget_s: float) -> bool:
        checked.append(file)
        return True

    monkeypatch.setattr(journal_file, "check_at_once", check)
    await make(path)
    await make(path)
    assert checked == []
    alter(path, "UPDATE journal SET clean = 0")
    await make(path)
    assert checked == [path]


async def test_an_older_journal_is_migrated(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await make(path)
    newer = (
        *journal_schema.MIGRATIONS,
        "ALTER TABLE containers ADD COLUMN note TEXT; CREATE TABLE extra (a ANY) STRICT",
    )
    monkeypatch.setattr(journal_file, "MIGRATIONS", newer)
    journal = await Journal.open(path, node=NODE)
    assert len(await all_rows(journal)) == 3
    columns = await journal.read(
        lambda tx: tx._connection.execute("PRAGMA table_info(containers)").fetchall()
    )
    assert columns[-1][1] == "note"
    await journal.close()
    monkeypatch.undo()
    assert "newer worker (schema 2" in await refused(path)


async def test_a_migration_that_fails_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await make(path)
    broken = (*journal_schema.MIGRATIONS, "CREATE TABLE extra (a ANY) STRICT; INSERT INTO nowhere VALUES (1)")
    monkeypatch.setattr(journal_file, "MIGRATIONS", broken)
    with pytest.raises(Configuration, match="no such table: nowhere"):
        await Journal.open(path, node=NODE)
    monkeypatch.undo()
    assert len((await make(path, events=0)).epoch) == 26


async def test_boots_without_events_are_forgotten(path: Path) -> None:
    await make(path)
    for _ in range(5):
        await make(path, events=0)
    journal = await Journal.open(path, node=NODE)
    boots = await journal.read(lambda tx: tx.boots())
    assert [(boot.first_seq, boot.last_seq) for boot in boots] == [(1, 3), (4, 3)]
    await journal.close()


async def test_only_so_many_boots_are_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_file, "KEPT_BOOTS", 3)
    for _ in range(6):
        await make(path, events=1)
    journal = await Journal.open(path, node=NODE)
    boots = await journal.read(lambda tx: tx.boots())
    assert [boot.last_seq for boot in boots] == [4, 5, 6, 6]
    assert await journal.transact(saying("next")) == 7
    await journal.close()


# -- crashes and full disks


def child(mode: str, path: Path, **options: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "tests.unit.journal_child", mode, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        **options,  # type: ignore[call-overload]
    )


def read_until(process: "subprocess.Popen[str]", enough: Callable[[list[str]], bool]) -> list[str]:
    assert process.stdout is not None
    lines: list[str] = []
    while not enough(lines):
        line = process.stdout.readline()
        assert line, f"the child ended early, code {process.wait()}"
        lines.append(line)
    return lines


@pytest.mark.timeout(90)
async def test_what_was_answered_survives_kill_9(path: Path) -> None:
    answered: dict[str, int] = {}
    dice = random.Random()
    for _ in range(3):
        process = child("burst", path)
        try:
            wanted = dice.randrange(50, 600)
            lines = read_until(process, lambda lines, wanted=wanted: len(lines) >= wanted)  # type: ignore[misc]
            process.send_signal(signal.SIGKILL)
            assert process.stdout is not None
            lines += process.stdout.readlines()
        finally:
            process.kill()
            process.communicate()
        for line in lines:
            if line.endswith("\n"):
                seq, name = line.split()
                answered[name] = int(seq)
    journal = await Journal.open(path, node=NODE, check_budget_s=10)
    rows = await all_rows(journal)
    assert [row.seq for row in rows] == list(range(1, len(rows) + 1))
    kept = {decoded(row).command: row.seq for row in rows}
    assert answered.items() <= kept.items()
    ledger = await journal.read(lambda tx: tx.accepted_commands())
    assert {found.id: found.stream_seq for found in ledger} == kept
    newest = {name.rsplit("-", 2)[1]: name for name in kept}
    containers = await journal.read(lambda tx: tx.containers())
    assert {cid: record.decode() for cid, record in containers} == {
        f"lane-{n}": name for n, name in newest.items()
    }
    for row in rows:
        assert await journal.read(lambda tx, row=row: tx.owns(tx.epoch, decoded(row).boot, row.seq))  # type: ignore[misc]
    await journal.close()


async def test_a_file_that_may_not_grow(path: Path) -> None:
    process = child("full", path)
    try:
        lines = read_until(process, lambda lines: len(lines) == 2)
        assert lines[0].startswith("full ")
        assert "cannot be written" in lines[0]
        assert lines[1] == "still full\n"
        written = int(lines[0].split()[1])
        out, _ = process.communicate("go on\n", timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert out == f"after {written + 1}\n"
    journal = await Journal.open(path, node=NODE)
    assert [row.seq for row in await all_rows(journal)] == list(range(1, written + 2))
    await journal.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB, where the tests may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root")
    if mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)) != 0:
        pytest.skip("may not mount here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def mount(*arguments: str) -> int:
    return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass


@pytest.mark.root
async def test_a_full_disk(small_disk: Path) -> None:
    path = small_disk / "worker.db"
    filler = small_disk / "filler"
    journal = await Journal.open(path, node=NODE)
    filler.write_bytes(b"x" * (1 << 20))
    written, message = 0, ""
    while written < 500 and not message:
        try:
            await journal.transact(lambda tx: say(tx, "x" * 20_000))
            written += 1
        except ResourceExhausted as failure:
            message = failure.message
    assert message == f"the journal {path} cannot be written: the disk is full"
    filler.unlink()
    assert (await journal.transact(say)).seq == written + 1
    await journal.close()
    path.unlink()
    fill(filler)
    with pytest.raises(Configuration, match=r"the disk is full|No space left"):
        await Journal.open(path, node=NODE)


@pytest.mark.root
async def test_a_read_only_disk(small_disk: Path) -> None:
    path = small_disk / "worker.db"
    await make(path)
    assert mount("-o", "remount,ro", str(small_disk)) == 0
    message = await refused(path)
    assert "read-only" in message or "cannot be opened" in message
    assert "Read-only file system" in await refused(small_disk / "other.db")
