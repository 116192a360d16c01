"""What the node's folders take up on the disk, counted without following a link or crossing a mount.

Containers write meanwhile: what goes while it is looked at does not count, and nothing is an error. Folders of many
files take a while (a million about ten seconds), so what was counted is kept for a while.
"""

import os
import stat
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from schemas.queries import DfReply, DiskUse, ImagesUse
from worker.images.keeping import Use
from worker.platform.descent import OPEN_DIRECTORY, Descent, Moved

KEPT_S = 30.0


class Measured(msgspec.Struct, frozen=True):
    """`at` is the wall clock, `monotonic_s` the one that nobody sets."""

    folder: Path
    bytes: int
    at: datetime
    monotonic_s: float


def tree_bytes(path: Path) -> int:
    """Blocks of everything in a tree; a file of several names counts once. 0 where there is none."""
    try:
        walk = Descent(os.open(path, OPEN_DIRECTORY))
    except OSError:
        return 0
    try:
        return _Count(walk).run()
    except Moved:
        return 0  # taken away meanwhile, and so no longer there
    finally:
        walk.close()


class _Count:
    def __init__(self, walk: Descent) -> None:
        self._walk = walk
        top = os.fstat(walk.fd)
        self._device = top.st_dev
        self._seen: set[tuple[int, int]] = set()
        self._bytes = top.st_blocks * 512

    def run(self) -> int:
        pending = [self._folder()]
        while pending:
            if pending[-1]:
                try:
                    self._walk.down(pending[-1].pop())
                except OSError:
                    continue  # gone, or none of ours to look into
                pending.append(self._folder())
            else:
                pending.pop()
                if pending:
                    self._walk.up()
        return self._bytes

    def _folder(self) -> list[str]:
        folders = []
        with os.scandir(self._walk.fd) as entries:
            for entry in entries:
                try:
                    found = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if stat.S_ISDIR(found.st_mode):
                    if found.st_dev == self._device:
                        folders.append(entry.name)
                elif found.st_nlink > 1:
                    if (found.st_dev, found.st_ino) in self._seen:
                        continue
                    self._seen.add((found.st_dev, found.st_ino))
                self._bytes += found.st_blocks * 512
        return folders


class DiskMeter:
    """Counts folders, and remembers for `KEPT_S` what it counted. For one thread at a time."""

    def __init__(self, root: Path, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._root = root
        self._monotonic = monotonic
        self._known: dict[Path, Measured] = {}

    def measure(self, images: Use, containers: Iterable[str], clone: str, *, refresh: bool) -> DfReply:
        """Blocking. `containers` are their names; `clone` is passed on."""
        if refresh:
            self._known.clear()
        names = sorted(containers)
        folders = [self._root / "containers" / name for name in names]
        own = [self._one(folder / part) for folder in folders for part in ("rootfs", "tmp", "volumes")]
        logs = [self._one(folder) for folder in (*(one / "state" for one in folders), self._root / "spool")]
        volumes = [self._one(folder) for folder in _folders(self._root / "volumes", self._root / "mirrors")]
        self._known = {one.folder: one for one in (*own, *logs, *volumes)}
        disk = os.statvfs(self._root)
        return DfReply(
            images=ImagesUse(count=images.images, bytes=images.bytes, reclaimable=images.reclaimable),
            containers=DiskUse(count=len(names), bytes=_sum(own)),
            volumes=DiskUse(count=len(volumes), bytes=_sum(volumes)),
            logs=DiskUse(count=len(logs), bytes=_sum(logs)),
            free=disk.f_bavail * disk.f_frsize,
            total=disk.f_blocks * disk.f_frsize,
            clone=clone,
            measured_at=min((one.at for one in (*own, *logs, *volumes)), default=datetime.now(UTC)),
        )

    def _one(self, folder: Path) -> Measured:
        known = self._known.get(folder)
        if known is None or self._monotonic() - known.monotonic_s > KEPT_S:
            known = Measured(folder, tree_bytes(folder), datetime.now(UTC), self._monotonic())
        return known


def _folders(*parents: Path) -> list[Path]:
    """The folders in them that are somebody's: not those whose name begins with a dot."""
    found = []
    for parent in parents:
        try:
            with os.scandir(parent) as entries:
                found += [
                    Path(entry.path)
                    for entry in entries
                    if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
                ]
        except FileNotFoundError:
            continue
    return sorted(found)


def _sum(measured: Iterable[Measured]) -> int:
    return sum(one.bytes for one in measured)
