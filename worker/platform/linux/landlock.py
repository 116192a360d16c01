"""Landlock: which files, TCP ports and processes a sandbox may touch. Standard library only.

Facts are those of linux/landlock.h and Documentation/userspace-api/landlock.rst. A kernel tells its ABI
version; each version adds rights, and an older one gets the same rules less the rights that it lacks:

1  files and directories: read, write, execute, create, remove
2  REFER: rename and link between directories (on 1 these are always refused)
3  TRUNCATE
4  TCP bind and connect, by port
5  IOCTL_DEV
6  scopes: abstract unix sockets and signals stay inside the domain

A rule holds for the inode that its path named when the ruleset was built. What Landlock never covers: stat,
chdir, chmod, chown, utime, extended attributes, inotify, connecting to a unix socket by its path, and every
protocol but TCP.
"""

import errno
import functools
import os
import stat
import struct
from collections.abc import Iterable

from .libc import O_PATH, prctl, syscall

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF, _OPENAT2 = 444, 445, 446, 437
_GET_VERSION = 1
_LOG_SAME_EXEC_OFF = 1
_PATH_BENEATH, _NET_PORT = 1, 2
_RESOLVE_NO_SYMLINKS = 0x04
_AT_FDCWD = -100
_PR_SET_NO_NEW_PRIVS = 38

# name of a right: (bit, first ABI that has it)
FS_RIGHTS = {
    "execute": (0, 1),
    "write_file": (1, 1),
    "read_file": (2, 1),
    "read_dir": (3, 1),
    "remove_dir": (4, 1),
    "remove_file": (5, 1),
    "make_char": (6, 1),
    "make_dir": (7, 1),
    "make_reg": (8, 1),
    "make_sock": (9, 1),
    "make_fifo": (10, 1),
    "make_block": (11, 1),
    "make_sym": (12, 1),
    "refer": (13, 2),
    "truncate": (14, 3),
    "ioctl_dev": (15, 5),
}
_FILE_RIGHTS = ("execute", "write_file", "read_file", "truncate", "ioctl_dev")
# One letter of an access string, and the rights that it stands for. Nothing grants make_char and
# make_block.
LETTERS = {
    "r": ("read_file", "read_dir"),
    "x": ("execute",),
    "w": (
        "write_file",
        "truncate",
        "make_dir",
        "make_reg",
        "make_fifo",
        "make_sym",
        "remove_dir",
        "remove_file",
        "refer",
    ),
    "s": ("make_sock",),
    "i": ("ioctl_dev",),
}
NET_RIGHTS = {"b": 1, "c": 2}  # bind, connect
_SCOPED_ABSTRACT_UNIX, _SCOPED_SIGNAL = 1, 2

# (path, letters of LETTERS) and (port, letters of NET_RIGHTS)
PathRules = Iterable[tuple[str, str]]
PortRules = Iterable[tuple[int, str]]


def abi() -> int:
    """The kernel's Landlock ABI version; 0 when it has none, or it is switched off."""
    try:
        return syscall(_CREATE_RULESET, None, 0, _GET_VERSION)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            return 0
        raise


def handled_fs(version: int) -> int:
    """Every file right of this ABI: what is handled is denied unless a rule allows it."""
    return sum(1 << bit for bit, since in FS_RIGHTS.values() if since <= version)


@functools.cache
def access_mask(letters: str, version: int, *, directory: bool) -> int:
    """The rights behind an access string, less those that the ABI lacks or that only directories have."""
    mask = 0
    for letter in letters:
        for right in LETTERS[letter]:
            bit, since = FS_RIGHTS[right]
            if since <= version and (directory or right in _FILE_RIGHTS):
                mask |= 1 << bit
    return mask


def file_rules(version: int) -> int:
    """A ruleset that denies every file, and from ABI 6 on signals and abstract sockets that leave the sandbox.

    Gives its descriptor, which is close-on-exec and stands for the same ruleset in every fork.
    """
    scoped = (0, _SCOPED_ABSTRACT_UNIX | _SCOPED_SIGNAL) if version >= 6 else ()
    return _create(handled_fs(version), *scoped)


def port_rules(net: str, ports: PortRules) -> int:
    """A ruleset of its own for TCP, from ABI 4 on: the letters of `net` are denied but for `ports`."""
    ruleset = _beside_files(sum(NET_RIGHTS[letter] for letter in net))
    try:
        for port, letters in ports:
            rights = sum(NET_RIGHTS[letter] for letter in letters)
            syscall(_ADD_RULE, ruleset, _NET_PORT, struct.pack("=QQ", rights, port), 0)
    except BaseException:
        os.close(ruleset)
        raise
    return ruleset


def keep_signals_inside() -> bool:
    """Let this process, and all it will ever start, signal nobody but one another; nothing else is denied.

    A domain anew at each call, so that of two processes that call it neither reaches the other. False before
    ABI 6, or with no layer left; cannot be undone. OSError.
    """
    version = abi()
    if version < 6:
        return False
    ruleset = _beside_files(0, _SCOPED_SIGNAL)
    try:
        # From ABI 7 on refusals go to the audit log, unless they are told to be no news.
        restrict(ruleset, _LOG_SAME_EXEC_OFF if version >= 7 else 0)
    except OSError as error:
        if error.errno == errno.E2BIG:
            return False
        raise
    finally:
        os.close(ruleset)
    return True


def _beside_files(*fields: int) -> int:
    """A ruleset that leaves files alone; `fields` follow those of files in struct landlock_ruleset_attr."""
    # A layer that says nothing of REFER denies it everywhere.
    refer = 1 << FS_RIGHTS["refer"][0]
    ruleset = _create(refer, *fields)
    try:
        root = os.open("/", O_PATH | os.O_CLOEXEC)
        try:
            allow_descriptor(ruleset, root, refer)
        finally:
            os.close(root)
    except BaseException:
        os.close(ruleset)
        raise
    return ruleset


def allow_paths(ruleset: int, paths: PathRules, version: int, *, missing_ok: bool = False) -> None:
    """Rules for what the paths name now. OSError, naming the path, for one that is missing or led by a link."""
    for path, access in paths:
        try:
            _allow_path(ruleset, path, access, version)
        except OSError as error:
            if missing_ok and isinstance(error, FileNotFoundError):
                continue
            error.filename = path
            raise


def _allow_path(ruleset: int, path: str, access: str, version: int) -> None:
    descriptor = open_plain(path)
    try:
        directory = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        mask = access_mask(access, version, directory=directory)
        if mask:
            allow_descriptor(ruleset, descriptor, mask)
    finally:
        os.close(descriptor)


def allow_descriptor(ruleset: int, descriptor: int, mask: int) -> None:
    """A rule for what an open descriptor names (and, for a directory, everything below)."""
    syscall(_ADD_RULE, ruleset, _PATH_BENEATH, struct.pack("=Qi", mask, descriptor), 0)


def restrict(ruleset: int, flags: int = 0) -> None:
    """Confine this process, and all it will ever start, to the ruleset as well. Cannot be undone."""
    prctl(_PR_SET_NO_NEW_PRIVS, 1)
    syscall(_RESTRICT_SELF, ruleset, flags)


def _create(*fields: int) -> int:
    """From the fields of struct landlock_ruleset_attr, as many as the ABI knows."""
    attr = struct.pack(f"={len(fields)}Q", *fields)
    return syscall(_CREATE_RULESET, attr, len(attr), 0)


def open_plain(path: str) -> int:
    """An O_PATH descriptor of a canonical path; OSError (ELOOP) when any component is a link.

    The path was resolved and approved earlier. Whoever may write to one of its folders could since have put
    a link there that leads elsewhere, and the rule would then be for elsewhere.
    """
    how = struct.pack("=QQQ", O_PATH | os.O_CLOEXEC, 0, _RESOLVE_NO_SYMLINKS)
    try:
        return syscall(_OPENAT2, _AT_FDCWD, os.fsencode(path) + b"\0", how, len(how))
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EPERM):
            return _walk(path)
        raise


def _walk(path: str) -> int:
    """`open_plain` for kernels before 5.6 and filters that refuse openat2."""
    flags = O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW
    current = os.open("/", flags)
    for name in path.split("/"):
        if name in ("", "."):
            continue
        if name == "..":
            os.close(current)
            raise OSError(errno.ELOOP, "a canonical path has no ..")
        try:
            below = os.open(name, flags, dir_fd=current)
        finally:
            os.close(current)
        current = below
        if stat.S_ISLNK(os.fstat(current).st_mode):
            os.close(current)
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return current
