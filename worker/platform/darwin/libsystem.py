"""libSystem, opened once and asked through declared functions. Standard library only.

Since macOS 11 the library is no file any more: it stands in the system's shared cache, and only dlopen(3)
finds it by this name.
"""

import ctypes
import errno
import os
from typing import Any

LIBSYSTEM = "/usr/lib/libSystem.B.dylib"


def load(path: str = LIBSYSTEM) -> ctypes.CDLL:
    """OSError where there is none. Each call through it leaves its errno in `ctypes.get_errno()`."""
    return ctypes.CDLL(path, use_errno=True)


def declare(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
    """A function with its types; without them a pointer would be cut to an int.

    For a variadic function name only the fixed arguments: on arm64 the others go elsewhere, and ctypes
    prepares such a call only for arguments beyond the declared ones. OSError (ENOSYS) where it is missing.
    """
    try:
        function = getattr(library, name)
    except AttributeError as missing:
        raise OSError(errno.ENOSYS, f"this system has no {name}") from missing
    function.argtypes = arguments
    function.restype = result
    return function


def has(library: ctypes.CDLL, name: str) -> bool:
    return hasattr(library, name)


def failure(what: str, number: int | None = None) -> OSError:
    """The OSError (its subclass by errno) of a call that has just failed, or of an error number."""
    code = ctypes.get_errno() if number is None else number
    return OSError(code, f"{what}: {os.strerror(code)}")
