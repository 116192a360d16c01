"""Becoming a program whose memory the kernel limits. Standard library only.

Sources: posix_spawn(2), <spawn.h>, xnu's bsd/sys/spawn.h and spawn_internal.h for the numbers, its
libsyscall/wrappers/spawn/spawn_private.h for `posix_spawnattr_setjetsam_ext`, which is in no public header.
taskpolicy(8) `-m` does the same. The limit holds for one process, is metered on the physical footprint
and answered by SIGKILL. exec takes it away and children do not inherit it: so it has to come with the very
last step of a start.
"""

import ctypes
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .libsystem import declare, failure, has

MIB = 1024 * 1024

_SETEXEC = 0x0040
_FATAL = 0x04 | 0x08  # ..._MEMLIMIT_ACTIVE_FATAL, ..._MEMLIMIT_INACTIVE_FATAL
_UNCHANGED_PRIORITY = -1  # JETSAM_PRIORITY_DEFAULT


def available(library: ctypes.CDLL) -> bool:
    return has(library, "posix_spawnattr_setjetsam_ext")


def limit_mib(limit_bytes: int) -> int:
    """The kernel counts in MiB: the next that is not below the limit."""
    return max(1, -(-limit_bytes // MIB))


class Spawner(NamedTuple):
    """The functions, declared before the fork. posix_spawnattr_t is a pointer that init sets."""

    init: Any
    set_flags: Any
    set_jetsam: Any
    spawn: Any
    destroy: Any


def prepare(library: ctypes.CDLL) -> Spawner:
    """OSError where the library lacks one of them."""
    c_int, c_short = ctypes.c_int, ctypes.c_short
    attributes = ctypes.POINTER(ctypes.c_void_p)
    strings = ctypes.POINTER(ctypes.c_char_p)
    return Spawner(
        init=declare(library, "posix_spawnattr_init", c_int, attributes),
        set_flags=declare(library, "posix_spawnattr_setflags", c_int, attributes, c_short),
        set_jetsam=declare(
            library, "posix_spawnattr_setjetsam_ext", c_int, attributes, c_short, c_int, c_int, c_int
        ),
        spawn=declare(
            library,
            "posix_spawn",
            c_int,
            ctypes.POINTER(c_int),
            ctypes.c_char_p,
            ctypes.c_void_p,
            attributes,
            strings,
            strings,
        ),
        destroy=declare(library, "posix_spawnattr_destroy", c_int, attributes),
    )


def become(
    spawner: Spawner, program: str, argv: Sequence[str], env: Mapping[str, str], mebibytes: int
) -> None:
    """Replace this process by the program, as exec does; comes back only with an OSError.

    The functions give an error number and leave errno alone.
    """
    attributes = ctypes.c_void_p()
    _done("posix_spawnattr_init", spawner.init(ctypes.byref(attributes)))
    try:
        _done("posix_spawnattr_setflags", spawner.set_flags(ctypes.byref(attributes), _SETEXEC))
        _done(
            "posix_spawnattr_setjetsam_ext",
            spawner.set_jetsam(ctypes.byref(attributes), _FATAL, _UNCHANGED_PRIORITY, mebibytes, mebibytes),
        )
        variables = [os.fsencode(f"{name}={value}") for name, value in env.items()]
        number = spawner.spawn(
            None,
            os.fsencode(program),
            None,
            ctypes.byref(attributes),
            _array([os.fsencode(word) for word in argv]),
            _array(variables),
        )
    finally:
        spawner.destroy(ctypes.byref(attributes))
    raise failure(program, number)


def _array(strings: Sequence[bytes]) -> Any:
    return (ctypes.c_char_p * (len(strings) + 1))(*strings, None)


def _done(what: str, number: int) -> None:
    if number:
        raise failure(what, number)
