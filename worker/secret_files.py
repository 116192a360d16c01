"""The node's secrets: one file each in a folder of the worker's own, mode 0600."""

import errno
import os
import re
import stat
from pathlib import Path
from typing import Protocol

from worker.errors import StartFailed

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,127}")
MAX_BYTES = 64 * 1024

_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class SecretReader(Protocol):
    def read(self, name: str) -> str:
        """The secret's value; StartFailed, never with any of it, when there is none that can be given."""


class SecretFiles:
    """Reads at each use, so that a secret that was replaced is the new one at the next start."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, name: str) -> str:
        """The file's text without one newline at its end.

        Refuses what others could have read or put there.
        """
        if NAME.fullmatch(name) is None:
            raise StartFailed(f"{name[:80]!r} is no name of a secret")
        path = self._folder / name
        try:
            fd = os.open(path, _FLAGS)
        except OSError as failure:
            if failure.errno == errno.ENOENT:
                raise StartFailed(f"this node has no secret {name}: there is no {path}") from failure
            raise StartFailed(f"the secret {path} cannot be read: {failure.strerror}") from failure
        try:
            self._check(path, os.fstat(fd))
            # One byte more than a full secret and its newline: what is too long shows.
            content = os.read(fd, MAX_BYTES + 2).removesuffix(b"\n")
        except OSError as failure:
            raise StartFailed(f"the secret {path} cannot be read: {failure.strerror}") from failure
        finally:
            os.close(fd)
        return self._text(path, content)

    def _check(self, path: Path, found: os.stat_result) -> None:
        if not stat.S_ISREG(found.st_mode):
            raise StartFailed(f"the secret {path} is not a file")
        if found.st_uid not in (0, os.geteuid()):
            raise StartFailed(f"the secret {path} belongs to another user")
        if stat.S_IMODE(found.st_mode) & 0o077:
            mode = stat.S_IMODE(found.st_mode)
            raise StartFailed(f"the secret {path} has mode {mode:04o}; others could read it, make it 0600")

    def _text(self, path: Path, content: bytes) -> str:
        if len(content) > MAX_BYTES:
            raise StartFailed(f"the secret {path} is larger than {MAX_BYTES // 1024} KiB")
        if b"\0" in content:
            raise StartFailed(f"the secret {path} holds a NUL, which no variable can")
        return os.fsdecode(content)
