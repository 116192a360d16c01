"""The journal's file: how it is made, opened, checked and closed.

A file that is foreign, damaged, newer or another node's is a Configuration error in one line; nothing here
ever replaces or repairs one. Only the journal's owner thread calls these functions.
"""

import errno
import os
import sqlite3
import stat
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from loguru import logger

from worker.clock import Clock, to_us
from worker.errors import Configuration, ContractError, ResourceExhausted
from worker.ids import UlidMaker, is_ulid
from worker.journal_check import check_at_once, damaged
from worker.journal_schema import APPLICATION_ID, MIGRATIONS, MINIMUM_SQLITE

KEPT_BOOTS = 10_000

# Overwriting a file's bytes and syncing them costs a quarter of appending them, which the file system's own log has to
# hear of (measured on ext4: 0.2 ms beside 0.4 to 0.9). SQLite begins again at the front of its log after a checkpoint,
# which comes after 1,000 pages; so this is as long as it gets in ordinary use.
LOG_BYTES = 32 + 1000 * (24 + 4096)
SPARE_BYTES = 16 * LOG_BYTES


class Opened(NamedTuple):
    """`checked`: it had been closed, or was looked at whole."""

    connection: sqlite3.Connection
    epoch: str
    boot: str
    last_seq: int
    checked: bool


def open_database(
    path: Path,
    *,
    node: str,
    epoch: str | None,
    expected_epoch: str | None,
    takeover: bool,
    clock: Clock,
    check_budget_s: float,
) -> Opened:
    """Open the journal, made first where there is none, checked if it was not closed, and begin a boot."""
    if sqlite3.sqlite_version_info < MINIMUM_SQLITE:
        wanted = ".".join(map(str, MINIMUM_SQLITE))
        raise Configuration(
            f"SQLite {sqlite3.sqlite_version} is too old for the journal: {wanted} is the least"
        )
    ulids = UlidMaker(clock)
    try:
        if not os.path.lexists(path):
            _create(path, node, epoch, expected_epoch, takeover, ulids, clock)
        look_at_file(path)
        lengthen_log(path.with_name(path.name + "-wal"))
        connection = _connect(path)
    except (OSError, sqlite3.Error) as failure:
        raise _cannot_open(path, failure) from failure
    try:
        check_version(connection, path)
        _migrate(connection, path)
        return _begin_boot(connection, path, node, expected_epoch, takeover, ulids, clock, check_budget_s)
    except sqlite3.Error as failure:
        connection.close()
        raise _cannot_open(path, failure) from failure
    except BaseException:
        connection.close()
        raise


def close_database(connection: sqlite3.Connection, *, clean: bool) -> None:
    """Close; `clean` spares the next opening its check."""
    try:
        if clean:
            connection.execute("UPDATE journal SET clean = 1")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except sqlite3.Error as failure:
        logger.warning("the journal could not be marked as closed, the next start checks it: {}", failure)
    finally:
        connection.close()


def storage_failure(failure: BaseException, path: Path) -> ContractError | None:
    """The contract's error when the disk or the file is at fault, None for any other failure."""
    code = getattr(failure, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return damaged(path, str(failure))
    reason = {
        sqlite3.SQLITE_FULL: "the disk is full",
        sqlite3.SQLITE_READONLY: "the disk or the file is read-only",
        sqlite3.SQLITE_IOERR: "disk error",
        sqlite3.SQLITE_CANTOPEN: "it or its -wal file cannot be opened",
        sqlite3.SQLITE_NOMEM: "no memory",
        sqlite3.SQLITE_BUSY: "another process holds it",
        sqlite3.SQLITE_LOCKED: "another process holds it",
    }.get(code)
    if reason is None:
        return None
    if code == sqlite3.SQLITE_IOERR:
        reason = "the disk is full" if _disk_is_full(path) else f"disk error, {failure.sqlite_errorname}"  # type: ignore[attr-defined]
    return ResourceExhausted(f"the journal {path} cannot be written: {reason}")


def _disk_is_full(path: Path) -> bool:
    try:
        disk = os.statvfs(path.parent)
    except OSError:
        return False
    return disk.f_bavail * disk.f_frsize < 1 << 20


def _cannot_open(path: Path, failure: OSError | sqlite3.Error) -> Configuration:
    if isinstance(failure, OSError):
        where = failure.filename if failure.filename not in (None, str(path)) else None
        reason = f"{where}: {failure.strerror}" if where else failure.strerror or failure
        return Configuration(f"the journal {path} cannot be opened: {reason}")
    known = storage_failure(failure, path)
    if isinstance(known, Configuration):
        return known
    return Configuration(known.message if known else f"the journal {path} cannot be opened: {failure}")


# -- making a file


def _create(
    path: Path,
    node: str,
    epoch: str | None,
    expected_epoch: str | None,
    takeover: bool,
    ulids: UlidMaker,
    clock: Clock,
) -> None:
    """Make the file under another name and rename it: a half-made one is never found under its own."""
    wal = path.with_name(path.name + "-wal")
    if wal.exists():
        raise Configuration(
            f"{wal} is there, the journal {path} is not: put it back, or move {wal.name} away"
        )
    if expected_epoch is not None and not takeover:
        raise Configuration(
            f"the journal {path} is gone, though this node had one (epoch {expected_epoch}): put it back,"
            " or start once with --takeover to go on with a new one"
        )
    if epoch is None:
        epoch = ulids.new() if expected_epoch is None else _above(ulids, expected_epoch)
    fresh = path.with_name(path.name + ".new")
    for suffix in ("", "-wal", "-shm", "-journal"):
        fresh.with_name(fresh.name + suffix).unlink(missing_ok=True)
    os.close(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    connection = _connect(fresh)
    try:
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        _migrate(connection, fresh)
        connection.execute("INSERT INTO journal VALUES (1, ?, ?, ?, 1)", (node, epoch, to_us(clock())))
    finally:
        connection.close()
    _sync(fresh)
    fresh.rename(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"file:{quote(str(path))}?mode=rw", uri=True, isolation_level=None, timeout=2.0, cached_statements=256
    )
    try:
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("PRAGMA cell_size_check = ON")
        connection.execute("PRAGMA temp_store = MEMORY")
        connection.execute("PRAGMA cache_size = -8192")
        connection.execute("PRAGMA synchronous = FULL")
        # On macOS fsync alone may leave a checkpoint reordered on the disk; elsewhere this does nothing.
        connection.execute("PRAGMA checkpoint_fullfsync = ON")
        connection.execute("PRAGMA journal_size_limit = 67108864")
        mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":
            raise Configuration(f"the journal {path} cannot use write-ahead logging on this file system")
    except BaseException:
        connection.close()
        raise
    return connection


# -- opening one


def look_at_file(path: Path) -> None:
    """Refuse what SQLite should not even touch."""
    info = path.lstat()
    if not stat.S_ISREG(info.st_mode):
        raise Configuration(f"{path} is no regular file: the journal must be one")
    with path.open("rb") as file:
        header = file.read(100)  # https://www.sqlite.org/fileformat2.html#the_database_header
    if len(header) < 100 or not header.startswith(b"SQLite format 3\0"):
        what = "no journal of a worker" if header else "an empty file"
        raise Configuration(f"{path} is {what}: it is left as it is; move it away, or use another --data-dir")
    found = int.from_bytes(header[68:72], "big")
    if found != APPLICATION_ID:
        raise Configuration(
            f"{path} is a database of another program (application id {found:#x}): it is left as it is;"
            " use another --data-dir"
        )


def lengthen_log(log: Path) -> None:
    """Have zeros behind what stands in the write-ahead log: SQLite reads up to the first frame whose checksum is wrong,
    and takes a log that begins with zeros for an empty one (https://www.sqlite.org/fileformat2.html#the_write_ahead_log).

    Where there is no room for that (the disk, a quota, a limit of the process) the log grows as it is used. OSError
    when it cannot be written at all, or is a link.
    """
    descriptor = os.open(log, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "no regular file", str(log))
        disk = os.fstatvfs(descriptor)
        if found.st_size < LOG_BYTES and disk.f_bavail * disk.f_frsize > SPARE_BYTES:
            _append_zeros(descriptor, found.st_size)
    finally:
        os.close(descriptor)


def _append_zeros(descriptor: int, length: int) -> None:
    """What was there stays the last of it when they do not fit: half a log laid out is as good, but room is short."""
    try:
        at = length
        while at < LOG_BYTES:
            at += os.pwrite(descriptor, bytes(LOG_BYTES - at), at)
        os.fsync(descriptor)
    except OSError as failure:
        if failure.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        os.ftruncate(descriptor, length)


def check_version(connection: sqlite3.Connection, path: Path) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise Configuration(
            f"the journal {path} was written by a newer worker (schema {version}, this one knows"
            f" {len(MIGRATIONS)}): run that version again"
        )
    if version < 1:
        raise damaged(path, f"schema version {version}")


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
        try:
            connection.executescript(f"BEGIN IMMEDIATE; {script}; PRAGMA user_version = {number}; COMMIT")
        except sqlite3.Error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        if version:
            logger.info("the journal {} was brought to schema {}", path, number)


def _begin_boot(
    connection: sqlite3.Connection,
    path: Path,
    node: str,
    expected_epoch: str | None,
    takeover: bool,
    ulids: UlidMaker,
    clock: Clock,
    check_budget_s: float,
) -> Opened:
    row = connection.execute("SELECT node, epoch, clean FROM journal").fetchone()
    if row is None or not is_ulid(row[1]):
        raise damaged(path, "its first row is missing or unreadable")
    owner, epoch, clean = row
    checked = bool(clean) or check_at_once(connection, path, check_budget_s)
    boots = connection.execute("SELECT epoch, boot, last_seq FROM boots ORDER BY epoch, boot").fetchall()
    last_seq = max((seq for of_epoch, _, seq in boots if of_epoch == epoch), default=0)
    newest = connection.execute("SELECT max(seq) FROM outbox").fetchone()[0]
    if newest is not None and newest > last_seq:
        raise damaged(path, f"event {newest} is kept but the last one made is {last_seq}")
    epochs = {epoch, *(of_epoch for of_epoch, _, _ in boots)}
    if expected_epoch is not None and expected_epoch not in epochs and not takeover:
        raise Configuration(
            f"the journal {path} has epoch {epoch}, node.json says {expected_epoch}: it is another node's or"
            " an old copy; put the right one back, or start once with --takeover"
        )
    if owner != node and not takeover:
        raise Configuration(
            f"the journal {path} belongs to node {owner!r}, not to {node!r}: use another --data-dir,"
            " or start once with --takeover"
        )
    connection.execute("BEGIN IMMEDIATE")
    if owner != node or (expected_epoch is not None and expected_epoch not in epochs):
        # What was numbered for another name, or beside another history, cannot be continued.
        epoch = _above(ulids, max(epochs | {expected_epoch or epoch}))
        last_seq = 0
        connection.execute("UPDATE journal SET node = ?, epoch = ?", (node, epoch))
        for table in ("outbox", "acks", "positions"):
            connection.execute(f"DELETE FROM {table}")
    boot = _above(ulids, max(boot for _, boot, _ in boots)) if boots else ulids.new()
    connection.execute("DELETE FROM boots WHERE epoch = ? AND last_seq < first_seq", (epoch,))
    connection.execute(
        "DELETE FROM boots WHERE boot <= (SELECT boot FROM boots ORDER BY boot DESC LIMIT 1 OFFSET ?)",
        (KEPT_BOOTS,),
    )
    connection.execute(
        "INSERT INTO boots VALUES (?, ?, ?, ?, ?)", (epoch, boot, last_seq + 1, last_seq, to_us(clock()))
    )
    connection.execute("UPDATE journal SET clean = 0")
    connection.execute("COMMIT")
    return Opened(connection, epoch, boot, last_seq, checked)


def _above(ulids: UlidMaker, other: str) -> str:
    try:
        return ulids.above(other)
    except ValueError as failure:
        raise Configuration(f"no new epoch or boot can be made: {failure}") from failure
