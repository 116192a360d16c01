"""Is there room for a tree before it is begun."""

import os
from pathlib import Path

from worker.errors import ResourceExhausted
from worker.platform.base import CloneReport

# What stays free for journal and logs, which must never fail for want of it.
RESERVE_BYTES = 64 << 20
_BLOCK = 4096
# Copies that share their blocks still need inodes and directory blocks.
_SHARED_ENTRY = 512


class Space:
    """Remembers how trees are copied here: shared blocks cost next to nothing.

    `shared_from` as in `CloneReport`.
    """

    def __init__(self, reserve_bytes: int = RESERVE_BYTES) -> None:
        self._reserve = reserve_bytes
        self._shared_from: int | None = None

    def learn(self, report: CloneReport) -> None:
        self._shared_from = report.shared_from

    def check(self, folder: Path, size: int, entries: int, what: str) -> None:
        """Raises ResourceExhausted when a tree of `size` bytes would not fit below `folder`."""
        free = os.statvfs(folder)
        available = free.f_bavail * free.f_frsize
        needed = size + entries * _BLOCK
        if self._shared_from is not None:
            needed = min(needed, entries * (_SHARED_ENTRY + self._shared_from))
        if available < needed + self._reserve:
            raise ResourceExhausted(
                f"{what} needs {_mib(needed)} and {_mib(self._reserve)} to spare, "
                f"but {folder} has {_mib(available)} left"
            )
        # File systems that make inodes as they need them report none at all.
        if free.f_files and free.f_favail < entries:
            raise ResourceExhausted(f"{what} needs {entries} inodes, but {folder} has {free.f_favail} left")


def _mib(size: int) -> str:
    return f"{-(-size >> 20) if size else 0} MiB"
