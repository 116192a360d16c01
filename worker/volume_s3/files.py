"""The folder of a mirror, which a container may have written: no link in it is followed, no path trusted twice."""

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from worker.images.trees import make_accessible
from worker.platform.descent import OPEN_DIRECTORY, Descent, Moved, open_directory

from .failures import S3Failure, Unsettled
from .keys import unusable
from .state import Here, Stamp

OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
_IN_THE_WAY = (errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.ENOTEMPTY, errno.EEXIST)

Note = Callable[[str, str], None]


class InTheWay(S3Failure):
    """Something of the container's, or the file system's rules, keeps an object from having its place."""


class MirrorTree:
    """`files` is the mirror's folder, `incoming` where files grow until they are whole, on the same file system."""

    def __init__(self, files: Path, incoming: Path, owner: tuple[int, int] | None = None) -> None:
        """`owner` (uid, gid) gets what is made here; None: the worker keeps it."""
        self._owner = owner
        self._files = open_directory(files)
        try:
            self._incoming = open_directory(incoming)
            if owner is not None:
                os.fchown(self._files, *owner)
        except BaseException:
            os.close(self._files)
            raise

    def close(self) -> None:
        os.close(self._files)
        os.close(self._incoming)

    @property
    def identity(self) -> str:
        """Another one after the folder was deleted and made again: then nothing in it was deleted by a container."""
        found = os.fstat(self._files)
        return f"{found.st_dev}:{found.st_ino}"

    def free_bytes(self) -> int:
        disk = os.fstatvfs(self._files)
        return disk.f_bavail * disk.f_frsize

    def folds(self) -> bool:
        """Whether two names that differ in case are one here."""
        name = "probe-case"
        os.close(os.open(name, _NEW_FILE, 0o600, dir_fd=self._incoming))
        try:
            os.stat(name.upper(), dir_fd=self._incoming)
        except FileNotFoundError:
            return False
        else:
            return True
        finally:
            os.unlink(name, dir_fd=self._incoming)

    # -- looking

    def scan(self, note: Note, *, owned: bool) -> Iterator[Here]:
        """Every file. `owned`: nothing runs in there, so folders without permissions are opened by force.

        What is no file comes as `special`. Raises S3Failure for a folder that cannot be read: a file in it must not
        be taken for deleted.
        """
        walk = Descent(os.dup(self._files))
        try:
            yield from _scan(walk, note, owned)
        except Moved:
            raise Unsettled("folders are being moved") from None
        finally:
            walk.close()

    def exists(self, path: str) -> bool:
        folder, _, name = path.rpartition("/")
        try:
            with self._folder(folder, make=False) as parent:
                os.stat(name, dir_fd=parent, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as failure:
            if failure.errno == errno.ELOOP:
                return False
            raise
        return True

    def open(self, path: str, *, owned: bool) -> int:
        """A descriptor of a file for reading. Unsettled when it is there no more, S3Failure when it may not be."""
        folder, _, name = path.rpartition("/")
        try:
            with self._folder(folder, make=False) as parent:
                if not stat.S_ISREG(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
                    raise Unsettled("it was replaced meanwhile")
                try:
                    fd = os.open(name, OPEN_FILE, dir_fd=parent)
                except PermissionError:
                    if not owned:
                        raise
                    fd = _open_by_force(parent, name)
        except OSError as failure:
            if failure.errno in (errno.ENOENT, *_IN_THE_WAY):
                raise Unsettled("it is gone meanwhile") from failure
            raise S3Failure(f"it cannot be read: {failure.strerror}", again=True) from failure
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise Unsettled("it was replaced meanwhile")
        return fd

    # -- changing

    def new_file(self, name: str) -> int:
        """A new file among those that are not whole yet."""
        fd = os.open(name, _NEW_FILE, 0o600, dir_fd=self._incoming)
        if self._owner is not None:
            os.fchown(fd, *self._owner)
        return fd

    def drop(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._incoming)

    def clear_incoming(self) -> None:
        """What a dead worker had not finished."""
        for name in os.listdir(self._incoming):
            self.drop(name)

    def place(self, name: str, path: str) -> None:
        """Give a whole file its place, at one stroke. InTheWay."""
        folder, _, base = path.rpartition("/")
        try:
            with self._folder(folder, make=True) as parent:
                os.rename(name, base, src_dir_fd=self._incoming, dst_dir_fd=parent)
        except OSError as failure:
            if failure.errno in (*_IN_THE_WAY, errno.EILSEQ, errno.EINVAL, errno.ENAMETOOLONG):
                raise InTheWay(f"it has no place: {failure.strerror}") from failure
            raise

    def make_folder(self, path: str) -> None:
        """InTheWay."""
        try:
            with self._folder(path, make=True):
                pass
        except OSError as failure:
            if failure.errno in (*_IN_THE_WAY, errno.EILSEQ, errno.EINVAL, errno.ENAMETOOLONG):
                raise InTheWay(f"it has no place: {failure.strerror}") from failure
            raise

    def remove(self, path: str) -> None:
        """Delete a file, and the folders that are empty without it."""
        parts = path.split("/")
        try:
            with self._folder("/".join(parts[:-1]), make=False) as parent:
                os.unlink(parts[-1], dir_fd=parent)
            for depth in range(len(parts) - 1, 0, -1):
                with self._folder("/".join(parts[: depth - 1]), make=False) as parent:
                    os.rmdir(parts[depth - 1], dir_fd=parent)
        except OSError as failure:
            if failure.errno not in (errno.ENOENT, *_IN_THE_WAY):
                raise

    @contextlib.contextmanager
    def _folder(self, path: str, *, make: bool) -> Iterator[int]:
        """A descriptor of a folder below the top; every step is one name, and no link."""
        fd = os.dup(self._files)
        try:
            for part in path.split("/") if path else ():
                made = make and _made(part, fd)
                deeper = os.open(part, OPEN_DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = deeper
                if made and self._owner is not None:
                    os.fchown(fd, *self._owner)
            yield fd
        finally:
            os.close(fd)


def _made(name: str, parent: int) -> bool:
    try:
        os.mkdir(name, 0o755, dir_fd=parent)
    except FileExistsError:
        return False
    return True


def stamp_of(found: os.stat_result) -> Stamp:
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def _scan(walk: Descent, note: Note, owned: bool) -> Iterator[Here]:
    device = os.fstat(walk.fd).st_dev
    pending: list[list[str]] = []

    def look() -> tuple[list[str], list[Here]]:
        folders, files = [], []
        with os.scandir(walk.fd) as entries:
            for entry in entries:
                path = walk.path(entry.name)
                try:
                    found = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                reason = unusable(path)
                if reason is None and stat.S_ISDIR(found.st_mode):
                    if found.st_dev == device:
                        folders.append(entry.name)
                        continue
                    raise S3Failure(f"another file system is mounted at {path}")
                if reason is None and not stat.S_ISREG(found.st_mode):
                    note(path, f"it is {_kind(found.st_mode)}")
                    files.append(Here(path, stamp_of(found), True))
                elif reason is None:
                    files.append(Here(path, stamp_of(found), False))
                else:
                    note(path, reason)
        return folders, files

    folders, files = look()
    yield from files
    pending.append(folders)
    while pending:
        if not pending[-1]:
            pending.pop()
            if pending:
                walk.up()
            continue
        name = pending[-1].pop()
        if _down(walk, name, owned):
            folders, files = look()
            yield from files
            pending.append(folders)


def _down(walk: Descent, name: str, owned: bool) -> bool:
    """Enter a folder; False when it is one no more."""
    try:
        try:
            walk.down(name)
        except PermissionError:
            if not owned:
                raise
            make_accessible(walk.fd, name)
            walk.down(name)
    except OSError as failure:
        if failure.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False
        raise S3Failure(f"{walk.path(name)} cannot be read: {failure.strerror}", again=True) from failure
    return True


def _open_by_force(parent: int, name: str) -> int:
    """A file that was given no permissions, by the descriptor that makes sure that no link is meant."""
    path_only = getattr(os, "O_PATH", 0)
    if not path_only:
        os.chmod(name, 0o600, dir_fd=parent, follow_symlinks=False)
        return os.open(name, OPEN_FILE, dir_fd=parent)
    fd = os.open(name, path_only | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise Unsettled("it was replaced meanwhile")
        os.chmod(f"/proc/self/fd/{fd}", 0o600)
    finally:
        os.close(fd)
    return os.open(name, OPEN_FILE, dir_fd=parent)


def _kind(mode: int) -> str:
    kinds = {stat.S_IFLNK: "a link", stat.S_IFIFO: "a fifo", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")
