"""The background class of macOS: efficiency cores, throttled disk and network. Standard library only.

Source: setpriority(2), <sys/resource.h>. It is inherited by children, and is all that macOS has in place of
a share of the processors.
"""

import ctypes

from .libsystem import declare, failure

_PRIO_DARWIN_PROCESS = 4
_PRIO_DARWIN_BG = 0x1000


def set_background(library: ctypes.CDLL, pid: int, on: bool) -> None:
    """Put a process (0: this one) into the background class, or take it out. OSError.

    0 is the only value that takes it out again; the class is apart from nice values.
    """
    call = declare(library, "setpriority", ctypes.c_int, ctypes.c_int, ctypes.c_uint32, ctypes.c_int)
    if call(_PRIO_DARWIN_PROCESS, pid, _PRIO_DARWIN_BG if on else 0) != 0:
        raise failure(f"background priority of process {pid}")
