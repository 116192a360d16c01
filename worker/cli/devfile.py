"""The file by which the other verbs find a running `sandfleet dev`: where it listens and its token.

It is the user's own, mode 0600. Whoever runs `dev` holds a lock on the file beside it as long as it lives, so
that what a killed one left behind is told from a running one without trusting a process id.
"""

import errno
import fcntl
import os
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Self
from urllib.parse import quote

import msgspec

from worker.errors import Configuration

LOCK_TRIES = 20
LOCK_PAUSE_S = 0.05


class DevFile(msgspec.Struct, frozen=True, kw_only=True):
    """`url` has no token in it."""

    url: str
    token: str
    node: str
    pid: int
    started: datetime
    data_dir: str

    def url_with_token(self) -> str:
        """What a client connects to. Not to be shown."""
        return self.url.replace("://", f"://{quote(self.token, safe='')}@", 1) if self.token else self.url


def directory(env: Mapping[str, str]) -> Path:
    """Where the file stands: the user's runtime directory, else beside the development data."""
    runtime = env.get("XDG_RUNTIME_DIR", "")
    if runtime.startswith("/"):
        return Path(runtime) / "sandfleet"
    return dev_data_dir(env) / "run"


def dev_data_dir(env: Mapping[str, str]) -> Path:
    """The default home of `dev`'s data: beside the default data directory, not inside it."""
    from worker.machine import default_data_dir

    usual = default_data_dir(os.uname().sysname, env, os.geteuid())
    return usual.with_name(f"{usual.name}-dev")


def find(env: Mapping[str, str]) -> DevFile | None:
    """The running `dev` of this user, or None."""
    try:
        folder = directory(env)
        raw = (folder / "dev.json").read_bytes()
    except (OSError, Configuration):
        return None
    if not _is_held(folder / "dev.lock"):
        return None
    try:
        return msgspec.json.decode(raw, type=DevFile)
    except msgspec.DecodeError:
        return None  # being written, or by another version


def _is_held(path: Path) -> bool:
    try:
        lock = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


class DevLock:
    """Held by a running `dev`; `publish` lets the others find it, `close` takes that back."""

    def __init__(self, folder: Path, lock: int) -> None:
        self._folder = folder
        self._lock = lock

    @classmethod
    def take(cls, env: Mapping[str, str]) -> Self:
        """Configuration when another `dev` of this user runs."""
        folder = directory(env)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(folder / "dev.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as failure:
            raise Configuration(f"{folder} cannot be used: {failure.strerror}") from None
        # Another verb that looks whether `dev` runs holds the lock for a moment.
        for attempt in range(LOCK_TRIES):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return cls(folder, lock)
            except OSError as failure:
                if failure.errno not in (errno.EAGAIN, errno.EACCES):
                    os.close(lock)
                    raise Configuration(f"{folder} cannot be locked: {failure.strerror}") from None
            if attempt + 1 < LOCK_TRIES:
                time.sleep(LOCK_PAUSE_S)
        os.close(lock)
        found = find(env)
        who = f" (pid {found.pid}, since {found.started:%Y-%m-%d %H:%M} UTC)" if found else ""
        raise Configuration(f"sandfleet dev is already running{who}: end that one first, with Ctrl-C")

    def publish(self, file: DevFile) -> None:
        """Written beside and moved into place, so that nobody reads half of it."""
        fresh = self._folder / f"dev.json.{os.getpid()}"
        descriptor = os.open(
            fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
        with os.fdopen(descriptor, "wb") as out:
            out.write(msgspec.json.encode(file))
        fresh.replace(self._folder / "dev.json")

    def close(self) -> None:
        """The lock file stays: removing it would let two hold it."""
        (self._folder / "dev.json").unlink(missing_ok=True)
        os.close(self._lock)
