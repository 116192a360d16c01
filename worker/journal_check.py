"""Looking for damage in a journal that was not closed: what the time before the start allows, then all of it.

A small file is looked at whole before anything is written to it. A large one must not delay the start: its structure is
looked at in part, and all of it afterwards, by a thread with a read-only connection of its own.
"""

import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from loguru import logger

from worker.errors import Configuration

# Measured on 116 MB of ledger and outbox in the page cache: 170 MB/s whole, with the indexes; 310 MB/s of structure
# alone, each on a busy machine.
CHECKED_BYTES_PER_S = 100e6
QUICKLY_CHECKED_BYTES_PER_S = 300e6
STOP_PATIENCE_S = 1.0

_SMALL_TABLES = (
    "journal",
    "boots",
    "meta",
    "positions",
    "acks",
    "applied",
    "rejections",
    "log_cursors",
    "containers",
)
_LARGE_TABLES = ("outbox", "commands")


def damaged(path: Path, detail: str) -> Configuration:
    return Configuration(
        f"the journal {path} is damaged ({detail}): put back a good copy,"
        " or move it away and start once with --takeover"
    )


def check_at_once(connection: sqlite3.Connection, path: Path, budget_s: float) -> bool:
    """Look for damage for about `budget_s`; whether all of the file was looked at. Raises Configuration.

    Neither check can be stopped within a table (SQLite 3.40), so the file's size says what is tried.
    """
    size = path.stat().st_size
    if size <= budget_s * CHECKED_BYTES_PER_S:
        _expect_ok(connection, path, "PRAGMA integrity_check(1)")
        return True
    tables: tuple[str, ...] = _SMALL_TABLES
    if size <= budget_s * QUICKLY_CHECKED_BYTES_PER_S:
        tables += _LARGE_TABLES
    deadline = time.monotonic() + budget_s
    for table in tables:
        if time.monotonic() > deadline:
            break
        _expect_ok(connection, path, f"PRAGMA quick_check({table})")
    return False


def check_whole(connection: sqlite3.Connection, path: Path) -> None:
    """Every page, row and index entry. Raises Configuration."""
    _expect_ok(connection, path, "PRAGMA integrity_check(1)")


def _expect_ok(connection: sqlite3.Connection, path: Path, pragma: str) -> None:
    found = connection.execute(pragma).fetchone()[0]
    if found != "ok":
        # SQLite puts a heading such as "*** in database main ***" on a line of its own.
        detail = " ".join(line for line in found.splitlines() if not line.startswith("***"))
        raise damaged(path, detail)


def connect_read_only(path: Path) -> sqlite3.Connection:
    """A connection that changes nothing of the journal, also beside the worker that owns it."""
    connection = sqlite3.connect(
        f"file:{quote(str(path))}?mode=ro", uri=True, isolation_level=None, timeout=5.0
    )
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA cell_size_check = ON")
    return connection


class LateCheck:
    """The whole check of an open journal, in a thread of its own.

    `on_damage` is called from that thread. The write-ahead log cannot begin anew while the check reads, and so grows.
    """

    def __init__(self, path: Path, on_damage: Callable[[Configuration], None]) -> None:
        self._path = path
        self._on_damage = on_damage
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="journal check", daemon=True)

    def start(self) -> None:
        logger.info(
            "the journal {} was not closed; it is large: all of it is checked while the worker begins",
            self._path,
        )
        self._thread.start()

    def stop(self) -> None:
        """Give it up, so that the journal can be closed."""
        with self._lock:
            self._stopped = True
            if self._connection is not None:
                self._connection.interrupt()
        self._thread.join(STOP_PATIENCE_S)

    def _run(self) -> None:
        began = time.monotonic()
        try:
            self._check()
        except Configuration as failure:
            self._on_damage(failure)
        except sqlite3.Error as failure:
            if self._stopped:
                return
            if getattr(failure, "sqlite_errorcode", 0) & 0xFF in (
                sqlite3.SQLITE_CORRUPT,
                sqlite3.SQLITE_NOTADB,
            ):
                self._on_damage(damaged(self._path, str(failure)))
            else:
                logger.warning("the journal {} could not be checked: {}", self._path, failure)
        else:
            if not self._stopped:
                took = time.monotonic() - began
                logger.info("the journal {} was checked, all of it is good ({:.1f} s)", self._path, took)

    def _check(self) -> None:
        connection = connect_read_only(self._path)
        try:
            with self._lock:
                if self._stopped:
                    return
                self._connection = connection
            check_whole(connection, self._path)
        finally:
            with self._lock:
                self._connection = None
            connection.close()
