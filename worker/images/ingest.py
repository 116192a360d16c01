"""Blobs on their way in: what has come so far.

images/ingest/<hex>.part    what has come of sha256:<hex>, whoever asked for it
"""

import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PART = ".part"
KEPT_S = 24 * 3600.0


class Ingest:
    """The folder of partial blobs. One writer for each blob at a time; its callers see to that."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._claimed: set[str] = set()

    @classmethod
    def open(cls, folder: Path, *, now: float | None = None) -> "Ingest":
        """Makes it, and deletes what nobody has gone on with for a day. Raises OSError."""
        folder.mkdir(mode=0o700, exist_ok=True)
        self = cls(folder)
        self.sweep((time.time() if now is None else now) - KEPT_S)
        return self

    def path(self, digest: str) -> Path:
        return self.folder / f"{digest.removeprefix('sha256:')}{_PART}"

    def present(self, digest: str) -> int:
        """How many bytes are here."""
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError:
            return 0

    @contextmanager
    def claimed(self, digest: str) -> Iterator[Path]:
        """A blob's file, left alone by `sweep` until the block ends."""
        path = self.path(digest)
        with self._lock:
            self._claimed.add(path.name)
        try:
            yield path
        finally:
            with self._lock:
                self._claimed.discard(path.name)

    def sweep(self, before: float = math.inf) -> int:
        """Delete what was last written before that time (seconds of the epoch); gives its size."""
        freed = 0
        with self._lock, os.scandir(self.folder) as entries:
            for entry in entries:
                found = entry.stat(follow_symlinks=False)
                if entry.name not in self._claimed and found.st_mtime < before:
                    os.unlink(entry.path)
                    freed += found.st_size
        return freed
