"""One launcher to a data directory: its locks, its file, its socket.

launcher.lock    held while the launcher lives
launcher.trees   held by it and by every shim: free once no process of an earlier launcher can be alive
launcher.json    pid, start time and socket, for people and for whoever cannot connect
launcher.sock    the socket, unless the command line names another place
launcher.log     what it has to say; begun anew when it is large
"""

import fcntl
import json
import os
import socket
import time
from typing import Any

EXIT_ALREADY_RUNNING = 75

_LOG_BYTES = 1024 * 1024
TREES_S = 30.0
_BACKLOG = 64


class AlreadyRunning(Exception):
    """Another launcher holds this data directory."""


class Place:
    """The data directory as the launcher uses it; every path is absolute."""

    def __init__(self, data_dir: str, sock: str | None) -> None:
        self.data_dir = os.path.abspath(data_dir)
        self.socket = os.path.abspath(sock or self.path("sock"))
        self.lock = -1
        self.trees = -1

    def path(self, kind: str) -> str:
        return os.path.join(self.data_dir, f"launcher.{kind}")

    def claim(self) -> None:
        """Take the lock. Raises AlreadyRunning, or OSError when the directory cannot be used."""
        self.lock = os.open(self.path("lock"), _RW, 0o600)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as failure:
            os.close(self.lock)
            raise AlreadyRunning(self.data_dir) from failure

    def await_old_trees(self) -> bool:
        """Wait until the shims of an earlier launcher have ended their trees; False when they take too long.

        Then share the lock with our own shims.
        """
        self.trees = os.open(self.path("trees"), _RW, 0o600)
        deadline = time.monotonic() + TREES_S
        free = False
        while not free and time.monotonic() < deadline:
            try:
                fcntl.flock(self.trees, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free = True
            except BlockingIOError:
                time.sleep(0.002)
        fcntl.flock(self.trees, fcntl.LOCK_SH)
        return free

    def listen(self) -> socket.socket:
        """A socket at `self.socket`, however long that path is; the lock says that an old one there is
        dead.
        """
        folder, name = os.path.split(self.socket)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        old = os.umask(0o177)
        try:
            os.chdir(folder)
            _unlink(name)
            sock.bind(name)
            sock.listen(_BACKLOG)
        except OSError:
            sock.close()
            raise
        finally:
            os.umask(old)
            os.chdir("/")
        return sock

    def unnamed_file(self) -> int:
        """A file in the data directory that has no name any more."""
        path = self.path("state")
        _unlink(path)
        fd = os.open(path, _RW | os.O_EXCL, 0o600)
        os.unlink(path)
        return fd

    def describe(self, facts: dict[str, Any]) -> None:
        """Write launcher.json, whole or not at all."""
        new = self.path("json.new")
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w") as file:
            json.dump(facts, file)
        os.rename(new, self.path("json"))

    def abandoned(self) -> bool:
        """True when our lock file is not the one at its path any more."""
        try:
            there = os.stat(self.path("lock"), follow_symlinks=False)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        ours = os.fstat(self.lock)
        return (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino)

    def leave(self) -> None:
        """Take the socket and the file away, unless the directory is another one's by now; then another launcher may
        have it.
        """
        if not self.abandoned():
            _unlink(self.socket)
            _unlink(self.path("json"))
        for lock in (self.lock, self.trees):
            os.close(lock)

    def open_log(self) -> int:
        return os.open(self.path("log"), _RW | os.O_APPEND, 0o600)


_RW = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


class Log:
    """Lines on descriptor 2. With `bounded` that is launcher.log, which begins anew when it is large."""

    def __init__(self, *, bounded: bool) -> None:
        self._bounded = bounded

    def __call__(self, text: str) -> None:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        try:
            if self._bounded and os.fstat(2).st_size > _LOG_BYTES:
                os.ftruncate(2, 0)
            os.write(2, f"{stamp} launcher[{os.getpid()}] {text}\n".encode(errors="replace"))
        except OSError:
            return  # a full disk must not matter
