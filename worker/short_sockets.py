"""A short private directory for unix sockets whose own place has too long a path.

`sun_path` holds 104 bytes on macOS and 108 on Linux (unix(4), unix(7)).
"""

import hashlib
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from worker.errors import Configuration

MAX_SOCKET_PATH_BYTES = 100
_LONGEST_NAME_BYTES = 32  # an instance's ULID and a suffix


def fits(path: Path) -> bool:
    return len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES


def short_directory(root: Path, env: Mapping[str, str], recorded: str | None) -> Path:
    """A directory of ours, mode 0700, for the sockets of `root`: the recorded one while it is good, else new.

    Below $XDG_RUNTIME_DIR or /tmp. What someone else has put in its place is passed over. Configuration when
    there is no place at all.
    """
    if recorded is not None and _is_private(Path(recorded)):
        return Path(recorded)
    name = f"sandfleet-{hashlib.sha256(os.fsencode(root)).hexdigest()[:12]}"
    bases = [Path(base) for base in (env.get("XDG_RUNTIME_DIR", ""), "/tmp") if base.startswith("/")]
    for base in bases:
        # A name that mkdtemp may have to make is 8 bytes longer.
        if not _may_hold(base) or not fits(base / name / ("x" * (8 + _LONGEST_NAME_BYTES))):
            continue
        try:
            (base / name).mkdir(mode=0o700)
        except FileExistsError:
            if not _is_private(base / name):
                return Path(tempfile.mkdtemp(prefix="sandfleet-", dir=base))
        except OSError:
            continue
        return base / name
    raise Configuration(
        f"the path of {root} is too long for sockets, and neither XDG_RUNTIME_DIR nor /tmp can hold them:"
        " use a shorter --data-dir"
    )


def _is_private(path: Path) -> bool:
    """A directory that only this user can use; never a link to one."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return (
        stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) == 0o700
    )


def _may_hold(base: Path) -> bool:
    """Whether nobody else could swap a directory of ours in `base`."""
    try:
        found = base.stat()
    except OSError:
        return False
    if not stat.S_ISDIR(found.st_mode):
        return False
    if found.st_mode & 0o022:
        return bool(found.st_mode & stat.S_ISVTX) and found.st_uid in (0, os.geteuid())
    return found.st_uid in (0, os.geteuid()) and os.access(base, os.W_OK)
