"""Who a container runs as: `user[:group]`, by number or by a name of the image's own /etc/passwd and /etc/group.

The host's accounts are never asked: a name means what the image says. The image's files are somebody else's: a
line that is none is passed over, nothing but a regular file of at most 1 MiB inside the root is read.
"""

import errno
import os
import re
import stat
from pathlib import Path

from worker.platform.base import RunAs
from worker.rootpath import resolve_in_root

# As in `spec.user`.
USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,63})?")
# Above it are numbers that mean "nobody in particular" to one call or another.
MAX_ID = 2**31 - 1
MAX_FILE_BYTES = 1 << 20

_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


def read_accounts(root: Path) -> tuple[bytes, bytes]:
    """/etc/passwd and /etc/group of an image; empty where it has none. ValueError for what is no such file."""
    return _read(root, "/etc/passwd"), _read(root, "/etc/group")


def _read(root: Path, name: str) -> bytes:
    try:
        fd = os.open(resolve_in_root(root, name), _OPEN)
    except OSError as failure:
        if failure.errno in _GONE:
            return b""
        raise ValueError(f"the image's {name} cannot be read: {failure.strerror}") from failure
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError(f"the image's {name} is no file")
        with open(fd, "rb", closefd=False) as file:
            content = file.read(MAX_FILE_BYTES + 1)
    finally:
        os.close(fd)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"the image's {name} is larger than {MAX_FILE_BYTES >> 20} MiB")
    return content


def run_as(user: str, passwd: bytes, group: bytes) -> RunAs:
    """The numbers behind `user[:group]`.

    Without a group it is the one that /etc/passwd gives to the user, else the group of the user's own number.
    ValueError says what is wrong.
    """
    if USER.fullmatch(user) is None:
        raise ValueError(f"{user[:80]!r} is no user: must be user or user:group, by name or number")
    name, _, group_name = user.partition(":")
    uid, own_gid = _user(name, passwd)
    if group_name:
        return RunAs(uid=uid, gid=_group(group_name, group))
    return RunAs(uid=uid, gid=uid if own_gid is None else own_gid)


def _user(name: str, passwd: bytes) -> tuple[int, int | None]:
    wanted = _number(name.encode())
    if name.isdigit() and wanted is None:
        raise ValueError(f"{name} is no user: numbers go up to {MAX_ID}")
    for line in passwd.split(b"\n"):
        fields = line.split(b":")
        if len(fields) != 7:
            continue
        uid, gid = _number(fields[2]), _number(fields[3])
        if uid is None or gid is None:
            continue
        if uid == wanted if wanted is not None else fields[0] == name.encode():
            return uid, gid
    if wanted is None:
        raise ValueError(f"the image has no user {name} in its /etc/passwd")
    return wanted, None


def _group(name: str, group: bytes) -> int:
    wanted = _number(name.encode())
    if wanted is not None:
        return wanted
    if name.isdigit():
        raise ValueError(f"{name} is no group: numbers go up to {MAX_ID}")
    for line in group.split(b"\n"):
        fields = line.split(b":")
        gid = _number(fields[2]) if len(fields) == 4 else None
        if gid is not None and fields[0] == name.encode():
            return gid
    raise ValueError(f"the image has no group {name} in its /etc/group")


def _number(text: bytes) -> int | None:
    if not text.isdigit() or len(text) > 10:
        return None
    number = int(text)
    return number if number <= MAX_ID else None
