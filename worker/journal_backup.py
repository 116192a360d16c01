"""A copy of the journal in one file, made beside a running worker or of a stopped one's.

SQLite's online backup reads one commit's state whole, so the copy is the journal as it was at one moment. It is looked
at before it gets its name: what stands there is never half a copy, nor a copy of a damaged journal.
"""

import errno
import os
import sqlite3
import stat
from contextlib import closing
from pathlib import Path

import msgspec

from worker.errors import Conflict, NotFound, ResourceExhausted
from worker.journal_check import check_whole, connect_read_only, damaged
from worker.journal_file import check_version, look_at_file, storage_failure

TEMPORARY = ".new"
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class Backup(msgspec.Struct, frozen=True, kw_only=True):
    """What was copied: `last_seq` is the newest event of `epoch` that it knows."""

    file: str
    bytes: int
    node: str
    epoch: str
    last_seq: int


def back_up(journal: Path, target: Path, *, overwrite: bool = False) -> Backup:
    """Copy `journal` to `target`, 0600 and synced. Blocking.

    NotFound without a journal; Conflict when `target` is there and is not to be overwritten, or is a place for no
    backup; Configuration when the journal is no journal, is damaged or newer; ResourceExhausted when it cannot be
    written.
    """
    target = target.parent.resolve() / target.name
    _check_place(journal, target, overwrite)
    fresh = target.with_name(f".{target.name}.{os.getpid()}{TEMPORARY}")
    try:
        if not journal.exists():
            raise NotFound(f"there is no journal {journal}: name the worker's --data-dir")
        look_at_file(journal)
        os.close(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        try:
            made = _copy(journal, fresh, target)
            _name(fresh, target, overwrite)
        finally:
            for suffix in ("", "-journal", "-wal", "-shm"):
                fresh.with_name(fresh.name + suffix).unlink(missing_ok=True)
    except OSError as failure:
        raise ResourceExhausted(f"{failure.filename or target}: {failure.strerror}") from failure
    return made


def _check_place(journal: Path, target: Path, overwrite: bool) -> None:
    if target.parent == journal.parent.resolve():
        raise Conflict(
            f"{target} would stand beside the journal itself and be lost with it: choose another place"
        )
    try:
        found = target.lstat()
    except FileNotFoundError:
        return
    except OSError as failure:
        raise ResourceExhausted(f"{target}: {failure.strerror}") from failure
    if not stat.S_ISREG(found.st_mode):
        raise Conflict(f"{target} is there and is no file")
    if not overwrite:
        raise Conflict(f"{target} is there already (--overwrite replaces it)")


def _copy(journal: Path, fresh: Path, target: Path) -> Backup:
    try:
        with closing(connect_read_only(journal)) as source, closing(sqlite3.connect(fresh)) as copy:
            check_version(source, journal)
            # All pages in one step: a worker that writes meanwhile would make a slower copy begin again and again.
            source.backup(copy, pages=-1)
            # The copy carries the mode of its source; as a file by itself it must need no log beside it.
            copy.execute("PRAGMA journal_mode = DELETE")
            check_whole(copy, journal)
            row = copy.execute("SELECT node, epoch FROM journal").fetchone()
            if row is None:
                raise damaged(journal, "its first row is missing")
            last = copy.execute("SELECT max(last_seq) FROM boots WHERE epoch = ?", (row[1],)).fetchone()[0]
    except sqlite3.Error as failure:
        known = storage_failure(failure, journal)
        raise known or ResourceExhausted(f"{target} cannot be made: {failure}") from failure
    descriptor = os.open(fresh, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
        size = os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)
    return Backup(file=str(target), bytes=size, node=row[0], epoch=row[1], last_seq=last or 0)


def _name(fresh: Path, target: Path, overwrite: bool) -> None:
    """Give the finished copy its name, in one step that replaces nothing unless it may."""
    if overwrite:
        os.replace(fresh, target)
    else:
        try:
            os.link(fresh, target, follow_symlinks=False)
        except FileExistsError:
            raise Conflict(f"{target} is there already (--overwrite replaces it)") from None
        except OSError as failure:
            if failure.errno not in _NO_LINKS:
                raise
            if os.path.lexists(target):
                raise Conflict(f"{target} is there already (--overwrite replaces it)") from None
            os.rename(fresh, target)  # a file system without links: the check before has to do
    descriptor = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
