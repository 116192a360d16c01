"""System calls through the C library. Standard library only."""

import ctypes
import errno
import os
from typing import Any

libc = ctypes.CDLL(None, use_errno=True)


def function(name: str) -> Any:
    """A function of the C library, looked up now. Where there is none (this package is also read on a Mac, to show
    profiles of Linux) one that fails with ENOSYS.
    """
    return getattr(libc, name, _absent)


def _absent(*_: object) -> int:
    ctypes.set_errno(errno.ENOSYS)
    return -1


_syscall = function("syscall")
_syscall.argtypes = [ctypes.c_long]
_syscall.restype = ctypes.c_long
_prctl = function("prctl")
_prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
_prctl.restype = ctypes.c_int

O_PATH = 0o10000000  # asm-generic/fcntl.h; the same on x86-64 and aarch64


def syscall(number: int, *args: Any) -> int:
    """The raw call; OSError with the kernel's errno. Integers go as C longs."""
    result: int = _syscall(number, *[ctypes.c_long(a) if isinstance(a, int) else a for a in args])
    if result < 0:
        raise last_error()
    return result


def prctl(option: int, arg2: int = 0, arg3: int = 0, arg4: int = 0, arg5: int = 0) -> int:
    """prctl(2); OSError with the kernel's errno."""
    result: int = _prctl(option, arg2, arg3, arg4, arg5)
    if result < 0:
        raise last_error()
    return result


def last_error() -> OSError:
    """What errno says after a call that failed."""
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
