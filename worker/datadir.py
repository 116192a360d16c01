"""The data directory: who owns it, what stands where, and that there is one worker to it.

    {root}/  worker.db  worker.lock  node.json  launcher.key  launcher.sock
             images/  volumes/  mirrors/  containers/{cid}/{rootfs,tmp,state,api}/  spool/  secrets/

Directories are 0700, files 0600, all of them the worker's own user's. Whatever is not as it should be is
either put right or refused by a Configuration error of one line that says what to do.
"""

import errno
import fcntl
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
from loguru import logger

from schemas.subjects import parse_cid
from schemas.values import NODE
from worker.errors import Configuration, ContractError, CreateFailed, ResourceExhausted, is_out_of_space
from worker.machine import default_data_dir, default_node_name, machine_boot_id, machine_id
from worker.node_file import TEMPORARY, NodeFile, bind_node, replace_file, write_new_file, write_node_file
from worker.short_sockets import fits, short_directory

__all__ = [
    "ContainerDirs",
    "DataDir",
    "default_data_dir",
    "default_node_name",
    "machine_boot_id",
    "machine_id",
]

MIN_FREE_BYTES = 16 << 20
LOCK_PATIENCE_S = 0.3
LOCK_PAUSE_S = 0.01

_DIRECTORIES = ("images", "volumes", "mirrors", "containers", "spool", "secrets")
_PASSED = ("volumes", "mirrors", "containers")
_SECRET_FILES = ("launcher.key",)
_LAUNCHER_FILES = ("launcher.sock", "launcher.lock", "launcher.json", "launcher.log", "launcher.trees")
_FILES = ("worker.lock", "node.json", "worker.db", "worker.db-wal", "worker.db-shm")
_KNOWN = frozenset((*_DIRECTORIES, *_SECRET_FILES, *_FILES, *_LAUNCHER_FILES, "lost+found", ".DS_Store"))
_KEY = re.compile(r"[0-9a-f]{64}\n?")


class ContainerDirs:
    """The places of one container. It can reach `rootfs` and `tmp` and read `api`, but never `state`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.rootfs = root / "rootfs"
        self.tmp = root / "tmp"
        self.state = root / "state"
        self.api = root / "api"  # its token for the host API; made when there is one

    def marker(self, instance: str) -> str:
        """A path that nothing has and that names the instance: its sandbox, and no other, may read it."""
        return str(self.root / f"marker-{instance}")

    def make(self) -> None:
        """Make all but the rootfs, which is cloned. CreateFailed when something stands in their place."""
        try:
            for directory in (self.root, self.tmp, self.state):
                directory.mkdir(mode=0o700)
        except OSError as failure:
            kind = ResourceExhausted if is_out_of_space(failure.errno) else CreateFailed
            raise kind(f"{failure.filename} cannot be made: {failure.strerror}") from failure


class DataDir:
    """An open data directory, locked against a second worker until `close`."""

    def __init__(self, root: Path, lock: int, node_file: NodeFile, env: Mapping[str, str]) -> None:
        self.root = root
        self.key_path = root / "launcher.key"
        self.journal_path = root / "worker.db"
        self.images = root / "images"
        self.volumes = root / "volumes"
        self.mirrors = root / "mirrors"
        self.containers = root / "containers"
        self.spool = root / "spool"
        self.secrets = root / "secrets"
        self._lock: int | None = lock
        self._file = node_file
        self._env = env

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        node: str | None,
        takeover: bool = False,
        machine: Callable[[], str | None] = machine_id,
        hostname: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> "DataDir":
        """Make the directory or check it, and take its lock. Configuration for whatever is in the way.

        A directory bound to another name or machine is refused unless `takeover`. `node` None takes the name
        it is bound to, else the host's.
        """
        if node is not None and not NODE.fullmatch(node):
            raise Configuration(
                f"{node[:80]!r} is no node name: must match {NODE.pattern}", field="node.name"
            )
        # Links above and at the root are the operator's; below it none is followed.
        root = Path(os.path.realpath(path))
        lock = None
        try:
            _make_root(root)
            lock = _take_lock(root)
            _check_space(root)
            for name in _DIRECTORIES:
                _private_directory(root / name)
            for name in (*_FILES, *_SECRET_FILES):
                _private_file(root / name)
            bound = bind_node(root, node, machine(), hostname or socket.gethostname(), takeover)
            _make_key(root / "launcher.key")
            return cls(root, lock, bound, os.environ if env is None else env)
        except BaseException as failure:
            if lock is not None:
                os.close(lock)
            if isinstance(failure, OSError):
                raise _refusal(failure, root) from failure
            raise

    @property
    def node(self) -> str:
        return self._file.name

    @property
    def machine_id(self) -> str:
        return self._file.machine_id

    @property
    def epoch(self) -> str | None:
        """What node.json remembers: for `Journal.open(expected_epoch=…)`."""
        return self._file.epoch

    def bind_epoch(self, epoch: str) -> None:
        """Remember the journal's epoch: once the journal is open, and after each takeover."""
        if epoch != self._file.epoch:
            self._rewrite(epoch=epoch)

    def container(self, cid: str) -> ContainerDirs:
        """InvalidCommand when `cid` is no container name: it becomes part of a path."""
        parse_cid(cid)
        return ContainerDirs(self.containers / cid)

    @property
    def launcher_socket(self) -> Path:
        return self.socket("launcher.sock")

    def socket(self, name: str) -> Path:
        """Where a socket of that name belongs: in the root, or where its path is short enough to be bound."""
        if fits(self.root / name):
            return self.root / name
        directory = short_directory(self.root, self._env, self._file.socket_dir)
        if str(directory) != self._file.socket_dir:
            self._rewrite(socket_dir=str(directory))
        return directory / name

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is None:
            return
        if self._file.socket_dir is not None:
            try:
                os.rmdir(self._file.socket_dir)
            except OSError as failure:
                # The launcher that lives on still has its socket there.
                if failure.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                    logger.warning("{} stays behind: {}", self._file.socket_dir, failure.strerror)
        os.close(self._lock)
        self._lock = None

    def __enter__(self) -> "DataDir":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rewrite(self, **changes: str) -> None:
        changed = msgspec.structs.replace(self._file, **changes)
        try:
            write_node_file(self.root, changed)
        except OSError as failure:
            raise _refusal(failure, self.root) from failure
        self._file = changed


# -- the root and what stands in it


def _make_root(root: Path) -> None:
    try:
        found = root.lstat()
    except FileNotFoundError:
        root.parent.mkdir(parents=True, exist_ok=True)
        root.mkdir(mode=0o700, exist_ok=True)
        found = root.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise Configuration(f"{root} is no directory: use another --data-dir")
    _check_owner(root, found)
    names = {entry.name for entry in os.scandir(root)}
    # Only what is known to be ours is ever tightened: a home or /tmp given by mistake stays as it is.
    strange = sorted(name for name in names if name not in _KNOWN and not name.endswith(TEMPORARY))
    if strange and "node.json" not in names:
        raise Configuration(
            f"{root} is no data directory of a worker (it holds {strange[0]!r} and no node.json):"
            " use another --data-dir, or an empty one"
        )
    _tighten(root, found, 0o700, passed=os.geteuid() == 0)


def _private_directory(path: Path) -> None:
    try:
        path.mkdir(mode=0o700)
        return
    except FileExistsError:
        found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        what = "a link: mount the other disk there instead" if stat.S_ISLNK(found.st_mode) else "no directory"
        raise Configuration(f"{path} is {what}")
    _check_owner(path, found)
    _tighten(path, found, 0o700, passed=os.geteuid() == 0 and path.name in _PASSED)


def _private_file(path: Path) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISREG(found.st_mode):
        raise Configuration(f"{path} is no regular file: move it away")
    _check_owner(path, found)
    if path.name in _SECRET_FILES and stat.S_IMODE(found.st_mode) & 0o077:
        # Landlock cannot forbid chmod, so a container can loosen what its user owns; it must not thereby keep the
        # worker from starting. The launcher reads the file at each connect: a new secret takes effect at once.
        logger.warning(
            "{} was open to others (mode {:04o}): making a new one", path, stat.S_IMODE(found.st_mode)
        )
        path.unlink()
        return
    _tighten(path, found, 0o600)


def _check_owner(path: Path, found: os.stat_result) -> None:
    me = os.geteuid()
    if found.st_uid != me:
        raise Configuration(
            f"{path} belongs to uid {found.st_uid}, the worker runs as uid {me}: run it as that user,"
            " or use another --data-dir"
        )


def _tighten(path: Path, found: os.stat_result, mode: int, *, passed: bool = False) -> None:
    """`passed`: containers of other users get at their files through it (see `owners`), which opens nothing."""
    if stat.S_IMODE(found.st_mode) & (0o066 if passed else 0o077):
        logger.warning(
            "{} was open to others (mode {:04o}), now {:04o}", path, stat.S_IMODE(found.st_mode), mode
        )
        path.chmod(mode)


def _check_space(root: Path) -> None:
    disk = os.statvfs(root)
    free = disk.f_bavail * disk.f_frsize
    if free < MIN_FREE_BYTES:
        raise Configuration(
            f"{root} has {free >> 20} MiB free, a worker needs {MIN_FREE_BYTES >> 20}: make space,"
            " or use another --data-dir"
        )
    probe = root / f"probe{TEMPORARY}"
    write_new_file(probe, bytes(4096))
    probe.unlink()


def _refusal(failure: OSError, root: Path) -> ContractError:
    where = failure.filename or root
    reason = {
        errno.ENOSPC: f"the disk of {root} is full: make space",
        errno.EDQUOT: f"the disk quota at {root} is used up: make space",
        errno.EROFS: f"{where} is on a read-only disk: make it writable",
        errno.EACCES: f"uid {os.geteuid()} may not write {where}: grant it",
        errno.EPERM: f"uid {os.geteuid()} may not write {where}: grant it",
    }.get(failure.errno or 0, f"{where} cannot be used ({failure.strerror or failure})")
    return Configuration(f"{reason}, or use another --data-dir", field="node.data_dir")


# -- lock and key


def _take_lock(root: Path) -> int:
    path = root / "worker.lock"
    # A worker that was just killed, or a child of it on its way to exec, has the lock for a moment longer.
    deadline = time.monotonic() + LOCK_PATIENCE_S
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Someone may have deleted the file between our opening and locking it.
            if os.path.lexists(path) and os.path.samestat(os.fstat(lock), path.lstat()):
                os.ftruncate(lock, 0)
                os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
                return lock
            os.close(lock)
        except BlockingIOError:
            holder = os.pread(lock, 32, 0).decode("ascii", "replace").strip()
            os.close(lock)
            if time.monotonic() > deadline:
                who = f"pid {holder}" if holder.isdigit() else "its pid is not known yet"
                raise Configuration(
                    f"another worker ({who}) uses {root}: stop it first, or use another --data-dir"
                ) from None
            time.sleep(LOCK_PAUSE_S)
        except BaseException:
            os.close(lock)
            raise


def _make_key(path: Path) -> None:
    """The secret that the launcher asks its peer for: 32 random bytes in hexadecimal."""
    try:
        found = path.read_text("ascii", "replace")
    except FileNotFoundError:
        replace_file(path, secrets.token_hex(32).encode())
        return
    if not _KEY.fullmatch(found):
        raise Configuration(f"{path} holds no key: stop the launcher, delete the file and start again")
