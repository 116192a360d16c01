"""Ticks of the machine's clock, in which libproc counts CPU time. Standard library only.

Sources: <mach/mach_time.h>, sysctlbyname(3). A tick is 1 ns on Intel and 125/3 ns on Apple Silicon. A program
that Rosetta translates is told 1/1 while the kernel goes on counting in its own ticks; what these are then
stands in `hw.tbfrequency` (giampaolo/psutil#2728, htop-dev/htop#765).
"""

import ctypes
from typing import Any

from .libsystem import declare, failure

_KERN_SUCCESS = 0
_NANOS = 1_000_000_000


class TimebaseInfo(ctypes.Structure):
    """mach_timebase_info_data_t"""

    numer: int
    denom: int
    _fields_ = (("numer", ctypes.c_uint32), ("denom", ctypes.c_uint32))


class Timebase:
    """Read once. OSError when the machine does not tell it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.translated = _number(library, "sysctl.proc_translated") == 1
        frequency = _number(library, "hw.tbfrequency") if self.translated else None
        if frequency:
            self.numer, self.denom = _NANOS, frequency
            return
        info = TimebaseInfo()
        ask = declare(library, "mach_timebase_info", ctypes.c_int, ctypes.POINTER(TimebaseInfo))
        if ask(ctypes.byref(info)) != _KERN_SUCCESS or not info.numer or not info.denom:
            raise OSError("the machine does not tell its time base")
        self.numer, self.denom = info.numer, info.denom

    def microseconds(self, ticks: int) -> int:
        return ticks * self.numer // (self.denom * 1000)


def _number(library: ctypes.CDLL, name: str) -> int | None:
    """An integer of sysctl, of 4 or 8 bytes; None where it is not known (Intel has no `proc_translated`)."""
    ask: Any = declare(
        library,
        "sysctlbyname",
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_size_t),
        ctypes.c_void_p,
        ctypes.c_size_t,
    )
    value = (ctypes.c_uint8 * 8)()
    size = ctypes.c_size_t(ctypes.sizeof(value))
    if ask(name.encode(), value, ctypes.byref(size), None, 0) != 0:
        error = failure(name)
        if isinstance(error, FileNotFoundError):
            return None
        raise error
    return int.from_bytes(bytes(value)[: size.value], "little")
