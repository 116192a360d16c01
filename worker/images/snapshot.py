"""Proof that a source did not change while it was copied.

A snapshot sums up, directory by directory, the identity, type, mode, size and times of every entry. The
change time of a file cannot be set by a user, so two equal snapshots around a copy mean that the copy is
the source as it was at any moment between them.
"""

import hashlib
import os
import stat
import time
from collections.abc import Callable

import msgspec

from worker.platform.descent import Descent
from worker.platform.treecopy import TreeError, kind_refused, naming, visit

# File times are as coarse as the kernel's tick (4 to 10 ms): what changed within one of them before the first
# snapshot could change again unseen.
_TICK_NS = 20_000_000
_CALMING_TRIES = 50


class Snapshot(msgspec.Struct, frozen=True):
    """`bytes` and `entries` are what a copy will need, at most."""

    directories: dict[str, bytes]
    bytes: int
    entries: int
    newest_ns: int

    def check_unchanged(self, later: "Snapshot") -> None:
        """Raises TreeError naming the first directory in which something differs."""
        if self.directories == later.directories:
            return
        for path in sorted({*self.directories, *later.directories}):
            if self.directories.get(path) != later.directories.get(path):
                raise TreeError(path, "changed while it was being copied")


def calm_snapshot(top: int, sleep: Callable[[float], None] = time.sleep) -> Snapshot:
    """A snapshot of an open directory whose newest change is old enough to tell any later one from it."""
    for _ in range(_CALMING_TRIES):
        taken = take_snapshot(top)
        age_ns = time.time_ns() - taken.newest_ns
        if age_ns >= _TICK_NS or age_ns < -_TICK_NS:
            # A change time in the future comes from another clock, of which nothing can be said.
            return taken
        sleep(_TICK_NS / 1e9)
    raise TreeError("", "keeps changing")


def take_snapshot(top: int) -> Snapshot:
    walk = Descent(os.dup(top))
    try:
        return _take(walk)
    finally:
        walk.close()


def _take(walk: Descent) -> Snapshot:
    directories: dict[str, bytes] = {}
    total = entries = newest = 0

    def scan() -> list[str]:
        nonlocal total, entries, newest
        found = []
        with naming(walk):
            own = os.fstat(walk.fd)
            with os.scandir(walk.fd) as listed:
                for entry in listed:
                    with naming(walk, entry.name):
                        found.append((entry.name, entry.stat(follow_symlinks=False)))
        found.sort(key=lambda item: item[0])
        running = hashlib.blake2b(_fingerprint("", own), digest_size=16)
        newest = max(newest, own.st_ctime_ns)
        subdirectories = []
        for name, info in found:
            refused = kind_refused(info.st_mode)
            if refused:
                raise TreeError(walk.path(name), refused)
            running.update(_fingerprint(name, info))
            newest = max(newest, info.st_ctime_ns)
            entries += 1
            if stat.S_ISDIR(info.st_mode):
                subdirectories.append(name)
            elif stat.S_ISREG(info.st_mode):
                total += info.st_size
        directories[walk.path()] = running.digest()
        return subdirectories

    visit(walk, scan)
    return Snapshot(directories, total, entries, newest)


def _fingerprint(name: str, info: os.stat_result) -> bytes:
    facts = (
        info.st_dev,
        info.st_ino,
        info.st_mode,
        info.st_nlink,
        info.st_size,
        info.st_mtime_ns,
        info.st_ctime_ns,
    )
    return os.fsencode(name) + b"\0" + repr(facts).encode("ascii") + b"\n"
