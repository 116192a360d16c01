"""Giving up what a process may do beyond its user: capabilities and keyrings. Standard library only."""

import ctypes
import errno
import os
import stat
import struct

from .libc import function, last_error, prctl, syscall
from .seccomp import AUDIT_ARCH
from .syscall_table import NUMBERS

_PR_CAPBSET_DROP = 24
_PR_SET_SECUREBITS = 28
# NOROOT, NO_SETUID_FIXUP, KEEP_CAPS (locked off), NO_CAP_AMBIENT_RAISE, each with its lock.
_SECUREBITS = 0xEF
_CAP_CHOWN, _CAP_SETGID, _CAP_SETUID, _CAP_SETPCAP = 0, 6, 7, 8
_VERSION_3 = 0x20080522
_KEYCTL_JOIN_SESSION_KEYRING = 1

# Looked up and made here, once: a child would pay a third of a millisecond for it.
_libc_capget, _libc_capset = function("capget"), function("capset")
_header = ctypes.create_string_buffer(struct.pack("=Ii", _VERSION_3, 0), 8)  # this process
_data = ctypes.create_string_buffer(24)


def empty_bounding_set(*, keep_over_exec: bool = False) -> None:
    """So that no later exec, of whatever file, gives a capability.

    A process without CAP_SETPCAP cannot, and need not: no_new_privs keeps it from drawing on the set.
    With `keep_over_exec` this process's own capabilities are made inheritable, so that uid 0 keeps them
    when it executes its own new code.
    """
    effective, permitted, _ = _capget()
    if not effective & (1 << _CAP_SETPCAP):
        return
    if keep_over_exec:
        _capset(effective, permitted, permitted)
    for capability in range(64):
        try:
            prctl(_PR_CAPBSET_DROP, capability)
        except OSError as error:
            if error.errno == errno.EINVAL:  # one past the kernel's last
                return
            raise


def become(uid: int, gid: int, lock_bits: bool) -> None:
    """Be this user, with this group and no other, for good: with the capability, setuid(2) leaves no id behind.

    The capabilities go later, with `drop_capabilities`: it needs them itself, so that they outlast the change.
    """
    if lock_bits:
        prctl(_PR_SET_SECUREBITS, _SECUREBITS)
    os.setgid(gid)
    os.setuid(uid)


def own_output(uid: int, gid: int) -> None:
    """A pipe that is this process's output can be opened again, as /dev/stdout, by its owner only."""
    for fd in (1, 2):
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            os.fchown(fd, uid, gid)


def may_change_user() -> bool:
    """Whether this process has the capabilities for `become` and `own_output`."""
    wanted = 1 << _CAP_CHOWN | 1 << _CAP_SETGID | 1 << _CAP_SETUID
    return _capget()[0] & wanted == wanted


def may_lock_bits() -> bool:
    """Whether `drop_capabilities` can also make uid 0 an ordinary user for good."""
    return bool(_capget()[0] & (1 << _CAP_SETPCAP))


def drop_capabilities(lock_bits: bool) -> None:
    """Empty the permitted, effective, inheritable and ambient sets; uid 0 gains none by exec."""
    if lock_bits:
        prctl(_PR_SET_SECUREBITS, _SECUREBITS)
    _capset(0, 0, 0)


def may_set_groups() -> bool:
    """Whether this is root, and not that of a user namespace in which groups are fixed."""
    if os.geteuid() != 0:
        return False
    try:
        with open("/proc/self/setgroups", encoding="ascii") as file:
            return file.read().strip() != "deny"
    except FileNotFoundError:
        return True


def new_session_keyring(machine: str) -> None:
    """An empty session keyring in place of the one that came from whoever started this process.

    The quota of an ordinary user is 200 keyrings; past it, or where keyctl is refused, the old one stays.
    """
    number = NUMBERS["keyctl"][list(AUDIT_ARCH).index(machine)]
    try:
        syscall(number or 0, _KEYCTL_JOIN_SESSION_KEYRING, None)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EDQUOT, errno.EPERM):
            raise


def _capget() -> tuple[int, int, int]:
    """(effective, permitted, inheritable)."""
    if _libc_capget(_header, _data) < 0:
        raise last_error()
    words = struct.unpack("=6I", _data.raw)
    effective, permitted, inheritable = (words[i] | words[i + 3] << 32 for i in range(3))
    return effective, permitted, inheritable


def _capset(*sets: int) -> None:
    """(effective, permitted, inheritable)."""
    _data.raw = struct.pack("=6I", *(one & 0xFFFFFFFF for one in sets), *(one >> 32 for one in sets))
    if _libc_capset(_header, _data) < 0:
        raise last_error()
