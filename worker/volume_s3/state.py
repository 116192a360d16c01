"""What a mirror knows: which version of each object both sides had last, and what was being sent.

One SQLite file beside the mirror's folder, out of the container's reach, so that a worker that is killed at any
moment goes on where it was. What both sides have now is gathered anew by each pass in a second, throw-away file,
so that a bucket of a million objects needs no memory.
"""

import sqlite3
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
from loguru import logger

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS base (
    fold TEXT PRIMARY KEY, path TEXT NOT NULL, etag TEXT NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
    ctime_ns INTEGER NOT NULL, inode INTEGER NOT NULL, md5 TEXT NOT NULL, racy INTEGER NOT NULL, kept TEXT NOT NULL,
    token TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS intents (
    target TEXT PRIMARY KEY, fold TEXT NOT NULL, path TEXT NOT NULL, token TEXT NOT NULL, size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL, ctime_ns INTEGER NOT NULL, inode INTEGER NOT NULL, md5 TEXT NOT NULL,
    racy INTEGER NOT NULL, upload_id TEXT
) STRICT, WITHOUT ROWID;
"""
_SCRATCH = """
CREATE TABLE scratch.here (
    fold TEXT PRIMARY KEY, path TEXT NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
    ctime_ns INTEGER NOT NULL, inode INTEGER NOT NULL, special INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE scratch.there (
    path TEXT PRIMARY KEY, fold TEXT NOT NULL, etag TEXT NOT NULL, size INTEGER NOT NULL, usable INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX scratch.there_fold ON there (fold);
CREATE TABLE scratch.folders (fold TEXT PRIMARY KEY) STRICT, WITHOUT ROWID;
CREATE TABLE scratch.names (fold TEXT PRIMARY KEY, action TEXT) STRICT, WITHOUT ROWID;
"""
_NAMES = """
INSERT OR IGNORE INTO scratch.names (fold)
SELECT fold FROM base UNION SELECT fold FROM scratch.here UNION SELECT fold FROM scratch.there WHERE usable
"""
_SIDES = """
SELECT names.fold,
       base.path, base.etag, base.size, base.mtime_ns, base.ctime_ns, base.inode, base.md5, base.racy,
       base.kept, base.token,
       here.path, here.size, here.mtime_ns, here.ctime_ns, here.inode, here.special,
       there.path, there.etag, there.size
FROM scratch.names AS names
LEFT JOIN base ON base.fold = names.fold
LEFT JOIN scratch.here AS here ON here.fold = names.fold
LEFT JOIN scratch.there AS there ON there.fold = names.fold AND there.usable
WHERE names.fold > ? AND names.action IS ? ORDER BY names.fold LIMIT ?
"""
_PAGE = 1000


class Stamp(msgspec.Struct, frozen=True):
    """What tells one version of a file from another without reading it."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


class Base(msgspec.Struct, frozen=True, kw_only=True):
    """The last version that both sides had. `etag` is empty when the bucket never had ours. `racy`: the stamp is too
    young to be trusted. `kept` is the MD5 of a version of ours that stands beside somebody else's: then only the folder
    has it. `token` is that of our upload."""

    path: str
    etag: str
    stamp: Stamp
    md5: str
    racy: bool = False
    kept: str = ""
    token: str = ""


class Intent(msgspec.Struct, frozen=True, kw_only=True):
    """An upload that has begun. `target` is what it writes, which is not `path` for a version kept beside."""

    target: str
    path: str
    fold: str
    token: str
    stamp: Stamp
    md5: str
    racy: bool
    upload_id: str | None = None


class Here(msgspec.Struct, frozen=True):
    path: str
    stamp: Stamp
    special: bool


class There(msgspec.Struct, frozen=True):
    path: str
    etag: str
    size: int


class Sides(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known of one name."""

    fold: str
    base: Base | None
    here: Here | None
    there: There | None


class MirrorState:
    """Threads may share it."""

    def __init__(self, folder: Path) -> None:
        """Open or make what stands in `folder`. A damaged file is set aside: what it knew must be compared again."""
        self._scratch = folder / "scratch.db"
        path = folder / "state.db"
        self._lock = threading.Lock()
        try:
            self._db = _open(path)
        except sqlite3.DatabaseError as failure:
            logger.warning("{} is damaged ({}) and set aside", path, failure)
            path.replace(folder / "state.db.damaged")
            for name in ("state.db-wal", "state.db-shm"):
                (folder / name).unlink(missing_ok=True)
            self._db = _open(path)

    def close(self) -> None:
        with self._lock:
            self._db.close()
        self._scratch.unlink(missing_ok=True)

    def _run(self, sql: str, *values: Any) -> list[Any]:
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    # -- facts about the mirror

    def get(self, name: str) -> str | None:
        found = self._run("SELECT value FROM meta WHERE name = ?", name)
        return None if not found else str(found[0][0])

    def put(self, name: str, value: str) -> None:
        self._run("INSERT OR REPLACE INTO meta VALUES (?, ?)", name, value)

    # -- versions that both had

    def know(self, fold: str, base: Base) -> None:
        s = base.stamp
        row = (base.path, base.etag, s.size, s.mtime_ns, s.ctime_ns, s.inode, base.md5, base.racy)
        self._run(
            "INSERT OR REPLACE INTO base VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            fold,
            *row,
            base.kept,
            base.token,
        )

    def forget(self, fold: str) -> None:
        self._run("DELETE FROM base WHERE fold = ?", fold)

    def forget_all(self) -> None:
        self._run("DELETE FROM base")

    def base(self, fold: str) -> Base | None:
        found = self._run(f"SELECT {_BASE} FROM base WHERE fold = ?", fold)
        return _base(found[0]) if found else None

    # -- uploads

    def intend(self, intent: Intent) -> None:
        s = intent.stamp
        self._run(
            "INSERT OR REPLACE INTO intents VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            *(intent.target, intent.fold, intent.path, intent.token, s.size, s.mtime_ns, s.ctime_ns, s.inode),
            *(intent.md5, intent.racy, intent.upload_id),
        )

    def intents(self) -> list[Intent]:
        rows = self._run(
            "SELECT target, path, fold, token, size, mtime_ns, ctime_ns, inode, md5, racy, upload_id FROM intents"
        )
        return [
            Intent(
                target=r[0],
                path=r[1],
                fold=r[2],
                token=r[3],
                stamp=Stamp(*r[4:8]),
                md5=r[8],
                racy=bool(r[9]),
                upload_id=r[10],
            )
            for r in rows
        ]

    def done(self, target: str) -> None:
        self._run("DELETE FROM intents WHERE target = ?", target)

    # -- what a pass finds

    def begin_pass(self) -> None:
        """Both sides are to be looked at anew."""
        with self._lock:
            if any(row[1] == "scratch" for row in self._db.execute("PRAGMA database_list")):
                self._db.execute("DETACH scratch")
            self._scratch.unlink(missing_ok=True)
            self._db.execute("ATTACH ? AS scratch", (str(self._scratch),))
            self._db.execute("PRAGMA scratch.journal_mode = OFF")
            self._db.execute("PRAGMA scratch.synchronous = OFF")
            self._db.executescript(_SCRATCH)

    def found_here(self, rows: Iterable[tuple[str, Here]]) -> None:
        """(fold, what is in the folder) each."""
        values = (
            (fold, h.path, h.stamp.size, h.stamp.mtime_ns, h.stamp.ctime_ns, h.stamp.inode, h.special)
            for fold, h in rows
        )
        self._many("INSERT OR REPLACE INTO scratch.here VALUES (?, ?, ?, ?, ?, ?, ?)", values)

    def found_there(self, rows: Iterable[tuple[str, There]]) -> None:
        values = ((t.path, fold, t.etag, t.size) for fold, t in rows)
        self._many("INSERT OR REPLACE INTO scratch.there VALUES (?, ?, ?, ?, 1)", values)

    def found_folders(self, folds: Iterable[str]) -> None:
        self._many("INSERT OR IGNORE INTO scratch.folders VALUES (?)", ((fold,) for fold in folds))

    def _many(self, sql: str, rows: Iterable[tuple[Any, ...]]) -> None:
        with self._lock:
            self._db.execute("BEGIN")
            try:
                self._db.executemany(sql, rows)
            finally:
                self._db.execute("COMMIT")

    def rule_out(self) -> list[tuple[str, str]]:
        """(path, why) of objects that cannot stand beside others in one folder, which are then left alone."""
        folders = self._run(
            "UPDATE scratch.there SET usable = 0 WHERE fold IN (SELECT fold FROM scratch.folders) RETURNING path"
        )
        twins = self._run(
            "UPDATE scratch.there SET usable = 0 WHERE usable AND path > (SELECT min(path) FROM scratch.there AS other"
            " WHERE other.fold = there.fold AND other.usable) RETURNING path"
        )
        return [
            *((row[0], "there is a folder of that name") for row in folders),
            *((row[0], "this file system takes its name for another's") for row in twins),
        ]

    def gather(self) -> None:
        """Both sides were looked at: bring their names together."""
        self._run(_NAMES)

    def plan(self, decided: Iterable[tuple[str, str]]) -> None:
        """(fold, what to do with it) each."""
        self._many(
            "UPDATE scratch.names SET action = ? WHERE fold = ?", ((action, fold) for fold, action in decided)
        )

    def sides(self, action: str | None = None) -> Iterator[Sides]:
        """Every name that this was planned for, in order; None: for which nothing was planned yet."""
        after = ""
        while rows := self._run(_SIDES, after, action, _PAGE):
            for row in rows:
                yield _sides(row)
            after = rows[-1][0]


_BASE = "path, etag, size, mtime_ns, ctime_ns, inode, md5, racy, kept, token"


def _base(row: Any) -> Base:
    return Base(
        path=row[0],
        etag=row[1],
        stamp=Stamp(*row[2:6]),
        md5=row[6],
        racy=bool(row[7]),
        kept=row[8],
        token=row[9],
    )


def _sides(row: Any) -> Sides:
    return Sides(
        fold=row[0],
        base=None if row[1] is None else _base(row[1:11]),
        here=None if row[11] is None else Here(row[11], Stamp(*row[12:16]), bool(row[16])),
        there=None if row[17] is None else There(*row[17:20]),
    )


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        path.chmod(0o600)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.executescript(_SCHEMA)
        db.execute("SELECT count(*) FROM base").fetchone()
    except BaseException:
        db.close()
        raise
    return db
