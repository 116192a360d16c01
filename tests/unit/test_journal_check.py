"""Damage of a journal that was not closed: found before the start, by the check behind it, or by use."""

import asyncio
import random
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from loguru import logger

from tests.unit.journal_help import NODE, all_rows, entry, say, saying
from worker.errors import Configuration
from worker.journal import Journal
from worker.journal_check import LateCheck, check_at_once

PAGE = 4096


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "worker.db"


@pytest.fixture
def told() -> list[str]:
    """What is logged from now on."""
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(message.record["message"]), level="INFO")
    yield lines  # type: ignore[misc]
    logger.remove(sink)


async def made(path: Path, events: int = 300) -> None:
    """A journal with events and as many commands, left as by a worker that was killed."""
    journal = await Journal.open(path, node=NODE)

    def write(tx):  # type: ignore[no-untyped-def]
        for number in range(events):
            say(tx, f"e{number}")
            tx.accept(entry(f"c{number}", stream_seq=number + 1))
            tx.put_container(f"web-{number}", "I", b"{}")

    await journal.transact(write)
    await journal.close()
    alter(path, "UPDATE journal SET clean = 0")


def alter(path: Path, *statements: str) -> list[object]:
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        return [connection.execute(statement).fetchall() for statement in statements]
    finally:
        connection.close()


# -- damage of different kinds, all of it invisible to a plain opening


def overwrite_rows(path: Path) -> None:
    """A page of rows is somebody else's bytes."""
    page = leaf_of(path, "outbox")
    with path.open("r+b") as file:
        file.seek(page * PAGE + 100)
        file.write(random.Random(3).randbytes(PAGE - 200))


def drop_index_entries(path: Path) -> None:
    """Rows that the index of their ids does not have: nothing of the structure is wrong."""
    rewrite_schema(path, "sqlite_autoindex_commands_1")


def drop_partial_index_entries(path: Path) -> None:
    rewrite_schema(path, "commands_open")


def zero_a_page(path: Path) -> None:
    """What a disk gives for a block that it never wrote."""
    page = leaf_of(path, "commands")
    with path.open("r+b") as file:
        file.seek(page * PAGE)
        file.write(bytes(PAGE))


def leaf_of(path: Path, table: str) -> int:
    """The number, from 0, of some leaf page of a table that has several."""
    raw = path.read_bytes()
    root = alter(path, f"SELECT rootpage FROM sqlite_schema WHERE name = '{table}'")[0][0][0]  # type: ignore[index]
    at = (root - 1) * PAGE
    assert raw[at] == 5, "the root has pages below it"
    cell = int.from_bytes(raw[at + 12 : at + 14], "big")
    return int.from_bytes(raw[at + cell : at + cell + 4], "big") - 1


def rewrite_schema(path: Path, index: str) -> None:
    """Make the root of an index a page that is empty, and valid."""
    root = alter(path, f"SELECT rootpage FROM sqlite_schema WHERE name = '{index}'")[0][0][0]  # type: ignore[index]
    with path.open("r+b") as file:
        file.seek((root - 1) * PAGE)
        empty = b"\x0a" + bytes(4) + (PAGE & 0xFFFF).to_bytes(2, "big") + bytes(1)
        file.write(empty + bytes(PAGE - len(empty)))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "rows": overwrite_rows,
    "an index of ids": drop_index_entries,
    "an index of open commands": drop_partial_index_entries,
    "a page of zeros": zero_a_page,
}
damage = pytest.mark.parametrize("spoil", DAMAGE.values(), ids=DAMAGE)


@damage
async def test_damage_in_a_small_journal_is_refused_before_anything_is_written(
    path: Path, spoil: Callable[[Path], None]
) -> None:
    await made(path)
    spoil(path)
    before = path.read_bytes()
    with pytest.raises(Configuration, match="is damaged") as caught:
        await Journal.open(path, node=NODE)
    assert "\n" not in caught.value.message
    assert path.read_bytes() == before


@damage
async def test_damage_in_a_large_journal_is_found_behind_the_start(
    path: Path, spoil: Callable[[Path], None], told: list[str]
) -> None:
    await made(path)
    spoil(path)
    # Without any time before the start only the first small table is looked at.
    journal = await Journal.open(path, node=NODE, check_budget_s=0.0)
    with pytest.raises(Configuration, match="is damaged") as caught:
        await asyncio.wait_for(journal.sound(), 20)
    assert "\n" not in caught.value.message
    assert [line for line in told if "all of it is checked while the worker begins" in line]
    with pytest.raises(Configuration, match="is damaged"):
        await journal.transact(saying("not any more"))
    await journal.close()
    assert alter(path, "SELECT clean FROM journal")[0] == [(0,)], "the next start looks again"
    with pytest.raises(Configuration, match="is damaged"):
        await Journal.open(path, node=NODE)


async def test_a_good_large_journal_is_said_to_be_good(path: Path, told: list[str]) -> None:
    await made(path)
    journal = await Journal.open(path, node=NODE, check_budget_s=0.0)
    sound = asyncio.ensure_future(journal.sound())
    async with asyncio.timeout(20):
        while not any("all of it is good" in line for line in told):
            await asyncio.sleep(0.01)
    assert len(await all_rows(journal)) == 300
    assert await journal.transact(saying("on it goes")) == 301
    assert not sound.done()
    await journal.close()
    await sound
    assert alter(path, "SELECT clean FROM journal")[0] == [(1,)]


async def test_a_check_in_progress_does_not_keep_the_journal_open(
    path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    await made(path)

    def endless(connection: sqlite3.Connection, file: Path) -> None:
        connection.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
        )

    monkeypatch.setattr("worker.journal_check.check_whole", endless)
    journal = await Journal.open(path, node=NODE, check_budget_s=0.0)
    await asyncio.wait_for(journal.close(), 20)
    assert alter(path, "SELECT clean FROM journal")[0] == [(1,)]
    assert not [line for line in told if "good" in line or "damaged" in line]


async def test_damage_that_is_met_in_use_ends_it(path: Path) -> None:
    await made(path)
    alter(path, "UPDATE journal SET clean = 1")
    overwrite_rows(path)
    journal = await Journal.open(path, node=NODE)
    sound = asyncio.ensure_future(journal.sound())
    with pytest.raises(Configuration, match="is damaged"):
        await all_rows(journal)
    with pytest.raises(Configuration, match="is damaged"):
        await sound
    with pytest.raises(Configuration, match="is damaged"):
        await journal.transact(saying("not any more"))
    await journal.close()
    assert alter(path, "SELECT clean FROM journal")[0] == [(0,)]


async def test_how_much_is_looked_at_goes_by_size_and_budget(path: Path) -> None:
    await made(path)
    connection = sqlite3.connect(path)
    try:
        assert check_at_once(connection, path, 1.0)
        assert not check_at_once(connection, path, 0.002), "the structure of all"
        assert not check_at_once(connection, path, 0.0)
    finally:
        connection.close()


def test_a_check_that_cannot_be_made_is_told_and_ends_nothing(path: Path, told: list[str]) -> None:
    found: list[Configuration] = []
    check = LateCheck(path, found.append)
    check.start()
    check._thread.join(20)
    assert not found
    assert "could not be checked" in told[-1]
