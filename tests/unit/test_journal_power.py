"""Power loss: whatever of the last writes reached the disk, a prefix of the transactions is there, and no half one.

The write-ahead log is overwritten in place (`lengthen_log`), so behind what was written stand zeros, or frames of the
log's former use, and not the end of the file.
"""

import random
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.unit.journal_help import NODE, all_rows, decoded, entry, say
from worker.journal import Journal
from worker.journal_file import LOG_BYTES, lengthen_log

HEADER, FRAME, PAGE = 32, 24 + 4096, 4096
SECTOR = 512
COMMITS = 12
LAST = 2  # commits of the short log that is cut at every byte
READ_EVERY = 97  # bytes between two readings of the tables where nothing should have changed


class Powered(NamedTuple):
    """A journal as it stood: `before` and `after` are the log at the first and the last of `ends`.

    `ends` are the places at which a commit's last frame ends; a log cut there has that many transactions of `names`.
    """

    folder: Path
    before: bytes
    after: bytes
    ends: list[int]
    names: list[str]


async def written(folder: Path, *, used_before: bool, commits: int = COMMITS) -> Powered:
    """Some transactions, each of an event, a command and a container; the worker dies without closing anything."""
    live = folder / "live"
    live.mkdir()
    journal = await Journal.open(live / "worker.db", node=NODE)
    if used_before:
        # SQLite begins again at the front of the log after a checkpoint: old frames stand behind the new ones.
        # The second time only a little is dropped at its front.
        for count in (30, 1):
            for _ in range(count):
                await journal.transact(lambda tx: say(tx, "x" * 9000))
            await journal.read(lambda tx: tx._connection.execute("PRAGMA wal_checkpoint").fetchall())
            await journal.transact(lambda tx: tx.outbox_drop(tx.last_seq))
    log = live / "worker.db-wal"
    names: list[str] = []
    images = [log.read_bytes()]
    for number in range(commits):
        name = f"c{number}"

        def step(tx, name=name):  # type: ignore[no-untyped-def]
            tx.accept(entry(name, stream_seq=tx.last_seq + 1))
            tx.put_container("web-0", "I", name.encode())
            say(tx, name)

        await journal.transact(step)
        names.append(name)
        images.append(log.read_bytes())
    kept = folder / "kept"
    kept.mkdir()
    for file in ("worker.db", "worker.db-wal"):
        shutil.copyfile(live / file, kept / file)
    await journal.close()
    return Powered(kept, images[0], images[-1], [committed_end(image) for image in images], names)


def committed_end(log: bytes) -> int:
    """Where the last commit's last frame ends (https://www.sqlite.org/fileformat2.html#the_write_ahead_log)."""
    salts, at, end = log[16:24], HEADER, HEADER
    while at + FRAME <= len(log) and log[at + 8 : at + 16] == salts:
        if log[at + 4 : at + 8] != bytes(4):
            end = at + FRAME
        at += FRAME
    return end


def found_in(folder: Path) -> tuple[list[str], list[str], str | None]:
    """Events, commands and the container that a fresh reader finds. It changes nothing but the index of the log."""
    path = folder / "worker.db"
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)) as connection:
        events = connection.execute("SELECT payload FROM outbox ORDER BY seq").fetchall()
        commands = connection.execute("SELECT id FROM commands ORDER BY stream_seq").fetchall()
        container = connection.execute("SELECT record FROM containers").fetchone()
    texts = [raw.decode().split('"command":"')[1].split('"')[0] for (raw,) in events]
    return texts, [row[0] for row in commands], None if container is None else container[0].decode()


def frames_in(folder: Path) -> int:
    """How many frames of the log a fresh reader takes for committed: `mxFrame` of the index it makes
    (https://www.sqlite.org/walformat.html#the_wal_index_header). With the database file it says all of what is found.
    """
    path = folder / "worker.db"
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)) as connection:
        connection.execute("PRAGMA user_version").fetchone()
        with path.with_name("worker.db-shm").open("rb", buffering=0) as index:
            return int.from_bytes(index.read(20)[16:], sys.byteorder)


def expected(power: Powered, whole: int) -> tuple[list[str], list[str], str | None]:
    names = power.names[:whole]
    return names, names, names[-1] if names else None


def whole_up_to(power: Powered, position: int) -> int:
    """How many transactions are whole when everything before `position` reached the disk."""
    return sum(1 for end in power.ends[1:] if end <= position)


def positions(power: Powered, *, every: int) -> list[int]:
    """Falling: places in the pages of the last three frames, `every` so many bytes, each byte of their headers, and
    around every frame's beginning."""
    last = power.ends[-1]
    chosen = set(range(last - 3 * FRAME, last, every)) | {last}
    for at in range(HEADER, last + 1, FRAME):
        chosen |= set(range(at - 1, at + (26 if at >= last - 3 * FRAME else 2)))
    # What stood in the log when the counting began is not the subject.
    return sorted((place for place in chosen if power.ends[0] <= place <= last), reverse=True)


@pytest.fixture(params=[False, True], ids=["a fresh log", "a log in its second use"])
async def power(request: pytest.FixtureRequest, tmp_path: Path) -> Powered:
    return await written(tmp_path, used_before=request.param)


def test_the_log_is_as_the_test_believes(power: Powered) -> None:
    assert power.ends == sorted(set(power.ends))
    assert len(power.ends) == COMMITS + 1
    assert len(power.after) >= LOG_BYTES
    assert found_in(power.folder) == expected(power, COMMITS)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("behind", ["nothing", "zeros", "what stood there"])
async def test_every_byte_of_the_last_transactions(tmp_path: Path, behind: str) -> None:
    """Up to a byte the log is written, behind it is what the name says: for each byte, one by one."""
    power = await written(tmp_path, used_before=behind == "what stood there", commits=LAST)
    rest = (power.before if behind == "what stood there" else b"").ljust(len(power.after), b"\0")
    end, frames = power.ends[-1], -1
    same = end  # the first byte that is not as it was to be written
    with (power.folder / "worker.db-wal").open("r+b", buffering=0) as file:
        for position in range(end, power.ends[0] - 1, -1):
            if behind == "nothing":
                file.truncate(position)
                same = position
            elif position < end:
                if rest[position] == power.after[position]:
                    continue  # the log is what it was a byte ago
                file.seek(position)
                file.write(rest[position : position + 1])
                same = position
            whole = whole_up_to(power, same)
            found = frames_in(power.folder)
            assert found == (power.ends[whole] - HEADER) // FRAME, position
            if found != frames or position % READ_EVERY == 0:
                frames = found
                assert found_in(power.folder) == expected(power, whole), position
    assert frames == (power.ends[0] - HEADER) // FRAME


@pytest.mark.timeout(300)
def test_a_log_that_ends_at_any_byte(power: Powered) -> None:
    log = power.folder / "worker.db-wal"
    with log.open("r+b", buffering=0) as file:
        for position in positions(power, every=61):
            file.truncate(position)
            assert found_in(power.folder) == expected(power, whole_up_to(power, position)), position


def junk(power: Powered) -> bytes:
    return random.Random(5).randbytes(len(power.after))


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "behind",
    [lambda power: bytes(len(power.after)), lambda power: power.before, junk],
    ids=["zeros", "what stood there", "junk"],
)
def test_a_log_of_which_the_rest_was_not_written(power: Powered, behind: Callable[[Powered], bytes]) -> None:
    """Up to a byte it is new, from there on it is not."""
    log = power.folder / "worker.db-wal"
    rest = behind(power).ljust(len(power.after), b"\0")
    end = power.ends[-1]
    with log.open("r+b", buffering=0) as file:
        for position in positions(power, every=61):
            file.seek(position)
            file.write(rest[position:end])
            end = position
            # A byte that happens to be the same makes the transaction whole all the same.
            same = position
            while same < power.ends[-1] and rest[same] == power.after[same]:
                same += 1
            assert found_in(power.folder) == expected(power, whole_up_to(power, same)), position


@pytest.mark.timeout(300)
def test_sectors_that_arrive_in_any_order(power: Powered) -> None:
    """A disk writes sectors as it likes: everything up to the first that is missing counts, and nothing behind it."""
    log = power.folder / "worker.db-wal"
    dice = random.Random(11)
    old = power.before.ljust(len(power.after), b"\0")
    start, end = power.ends[-4], power.ends[-1]
    sectors = list(range(start - start % SECTOR, end, SECTOR))
    for _ in range(150):
        image = bytearray(power.after)
        missing = [at for at in sectors if dice.random() < 0.2]
        for at in missing:
            low, high = max(at, start), min(at + SECTOR, end)
            image[low:high] = old[low:high]
        log.write_bytes(image)
        first = next((i for i in range(start, end) if image[i] != power.after[i]), end)
        assert found_in(power.folder) == expected(power, whole_up_to(power, first)), missing


async def test_a_worker_goes_on_from_where_the_power_failed(power: Powered, tmp_path: Path) -> None:
    """The whole opening, check and migration included, and the numbers go on without a gap."""
    for number, position in enumerate(cuts(power)):
        folder = tmp_path / f"cut-{number}"
        folder.mkdir()
        shutil.copyfile(power.folder / "worker.db", folder / "worker.db")
        (folder / "worker.db-wal").write_bytes(power.after[:position])
        journal = await Journal.open(folder / "worker.db", node=NODE)
        rows = await all_rows(journal)
        names = power.names[: whole_up_to(power, position)]
        assert [decoded(row).command for row in rows] == names
        if rows:
            assert [row.seq for row in rows] == list(range(rows[0].seq, rows[0].seq + len(rows)))
            assert (await journal.transact(lambda tx: say(tx, "on"))).seq == rows[-1].seq + 1
        await journal.close()


def cuts(power: Powered) -> Iterator[int]:
    for end in power.ends[-3:]:
        yield from (end - FRAME - 1, end - FRAME + 30, end - 1, end, end + 1)


# -- the log laid out ahead


def test_laying_out_keeps_what_is_there(tmp_path: Path) -> None:
    log = tmp_path / "worker.db-wal"
    log.write_bytes(b"frames")
    lengthen_log(log)
    assert log.read_bytes() == b"frames" + bytes(LOG_BYTES - 6)
    lengthen_log(log)
    assert log.stat().st_size == LOG_BYTES


def test_a_longer_log_is_left_alone(tmp_path: Path) -> None:
    log = tmp_path / "worker.db-wal"
    log.write_bytes(b"x" * (LOG_BYTES + 5))
    lengthen_log(log)
    assert log.read_bytes() == b"x" * (LOG_BYTES + 5)


@pytest.mark.parametrize("number", [28, 122, 27], ids=["ENOSPC", "EDQUOT", "EFBIG"])
async def test_no_room_for_it_is_no_hindrance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A quota shows in no statvfs, and a disk may fill up in the middle of it."""
    path = tmp_path / "worker.db"
    journal = await Journal.open(path, node=NODE)
    await journal.transact(lambda tx: say(tx, "one"))
    await journal.close()
    real = journal_file_pwrite(monkeypatch, number)
    journal = await Journal.open(path, node=NODE)
    assert real.calls
    assert path.with_name("worker.db-wal").stat().st_size < LOG_BYTES
    assert (await journal.transact(lambda tx: say(tx, "two"))).seq == 2
    await journal.close()


class journal_file_pwrite:
    """`os.pwrite` writes a little, then refuses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        import os

        self.calls = 0
        real = os.pwrite

        def pwrite(descriptor: int, data: bytes, offset: int) -> int:
            self.calls += 1
            if self.calls > 1:
                raise OSError(number, os.strerror(number))
            return real(descriptor, data[:8192], offset)

        monkeypatch.setattr("worker.journal_file.os.pwrite", pwrite)


async def test_a_nearly_full_disk_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    real = os.fstatvfs

    class Full:
        def __init__(self, descriptor: int) -> None:
            self.f_frsize = real(descriptor).f_frsize
            self.f_bavail = (8 << 20) // self.f_frsize

    monkeypatch.setattr("worker.journal_file.os.fstatvfs", Full)
    path = tmp_path / "worker.db"
    journal = await Journal.open(path, node=NODE)
    assert path.with_name("worker.db-wal").stat().st_size < LOG_BYTES
    await journal.transact(lambda tx: say(tx, "one"))
    await journal.close()


@pytest.mark.parametrize("what", ["a link", "a folder", "a fifo"])
async def test_something_else_in_the_logs_place(tmp_path: Path, what: str) -> None:
    import os

    from worker.errors import Configuration

    path = tmp_path / "worker.db"
    journal = await Journal.open(path, node=NODE)
    await journal.close()
    log, victim = path.with_name("worker.db-wal"), tmp_path / "victim"
    victim.write_text("mine")
    if what == "a link":
        log.symlink_to(victim)
    elif what == "a folder":
        log.mkdir()
    else:
        os.mkfifo(log)
    with pytest.raises(Configuration, match=r"cannot be opened: .*worker\.db-wal"):
        await Journal.open(path, node=NODE)
    assert victim.read_text() == "mine"
