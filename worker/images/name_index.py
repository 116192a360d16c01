"""Which names of an image were made by which layer, and which names a file system would take for one.

Kept in a private SQLite database that spills to an unlinked temporary file, so that an image of millions of
entries costs no memory. Used by one thread.
"""

import hashlib
import os
import sqlite3
import unicodedata
from collections.abc import Callable

# Code points that HFS+ leaves out when it compares names. APFS does not; a data directory can be on either.
_IGNORED = dict.fromkeys(
    [*range(0x200C, 0x2010), *range(0x202A, 0x202F), *range(0x206A, 0x2070), 0xFEFF], None
)
_CACHE_KIB = 2048


def fold(path: str) -> str:
    """Two paths that macOS may take for one fold to the same string; some that it tells apart do, too.

    APFS compares names without regard to case and normalisation (Apple File System Reference, "Directory
    Records"), after the full case folding of Unicode.
    """
    decomposed = unicodedata.normalize("NFD", path.translate(_IGNORED))
    return unicodedata.normalize("NFD", decomposed.casefold())


class NameIndex:
    """Paths are relative to the root, without links in them."""

    def __init__(self, key: Callable[[str], str] | None = None) -> None:
        self._key = key
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.execute("PRAGMA temp_store = FILE")
        self._db.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        self._db.execute(
            "CREATE TABLE names (key BLOB PRIMARY KEY, layer INTEGER NOT NULL, path BLOB NOT NULL) WITHOUT ROWID"
        )
        self._db.execute("BEGIN")

    def close(self) -> None:
        self._db.close()

    def record(self, path: str, layer: int) -> None:
        """This layer made what stands at `path`."""
        self._db.execute(
            "INSERT INTO names VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE SET layer = ?2, path = ?3",
            (self._digest(path), layer, os.fsencode(path)),
        )

    def made_by(self, path: str, layer: int) -> bool:
        row = self._find(path)
        return row is not None and row[0] == layer and row[1] == os.fsencode(path)

    def spelling(self, path: str) -> str | None:
        """How the last path of this key was spelt; None when there was none."""
        row = self._find(path)
        return None if row is None else os.fsdecode(row[1])

    def _find(self, path: str) -> tuple[int, bytes] | None:
        found: tuple[int, bytes] | None = self._db.execute(
            "SELECT layer, path FROM names WHERE key = ?", (self._digest(path),)
        ).fetchone()
        return found

    def _digest(self, path: str) -> bytes:
        key = path if self._key is None else self._key(path)
        return hashlib.blake2b(os.fsencode(key), digest_size=16).digest()
