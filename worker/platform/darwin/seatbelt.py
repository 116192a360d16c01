"""Seatbelt's own functions: enter a sandbox, and ask what a process may do. Standard library only.

Sources: sandbox_init(3); WebKit's SandboxSPI.h for the prototypes and the filter numbers, of which those past
`LOCAL_NAME` stand in headers in circulation only; Chromium's seatbelt.cc and Nix's darwin-derivation-builder
for `sandbox_init_with_parameters`, which is in no public header.
"""

import ctypes
import os
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

from .libsystem import declare, failure

# The text itself is given, not the name of a profile of Apple's (SANDBOX_NAMED is 1).
_TEXT = 0
_BESIDE = ".none"


class Filter(IntEnum):
    """What kind of thing the last argument of `sandbox_check` names."""

    NONE = 0
    PATH = 1
    GLOBAL_NAME = 2
    LOCAL_NAME = 3
    APPLEEVENT = 4
    RIGHT_NAME = 5
    PREFERENCE_DOMAIN = 6
    KEXT = 7
    INFO_TYPE = 8
    NOTIFICATION = 9
    XPC_SERVICE_NAME = 12


class SandboxRefused(Exception):
    """The profile did not compile, or this process has a sandbox already (EPERM: there is only one).

    `message` is what the compiler said, or a general one.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.errno = number
        self.message = message


def parameters(pairs: Sequence[str]) -> Any:
    """KEY, VALUE, KEY, VALUE, … and the NULL that ends them, as C wants it. ValueError for what cannot be."""
    strings = [os.fsencode(text) for text in pairs]
    if len(strings) % 2 or any(b"\0" in text for text in strings):
        raise ValueError("parameters are no pairs, or a text holds a NUL")
    return (ctypes.c_char_p * (len(strings) + 1))(*strings, None)


class SandboxEntry:
    """`sandbox_init_with_parameters`, `sandbox_free_error`. OSError where the library lacks them."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._init = declare(
            library,
            "sandbox_init_with_parameters",
            ctypes.c_int,
            ctypes.c_char_p,
            ctypes.c_uint64,
            ctypes.POINTER(ctypes.c_char_p),
            # Not c_char_p: the very pointer has to be given back to be freed.
            ctypes.POINTER(ctypes.c_void_p),
        )
        self._free = declare(library, "sandbox_free_error", None, ctypes.c_void_p)

    def enter(self, profile: bytes, params: Any) -> None:
        """Confine this process for good, and all that it will start. SandboxRefused."""
        message = ctypes.c_void_p()
        ctypes.set_errno(0)
        result = self._init(profile, _TEXT, params, ctypes.byref(message))
        number = ctypes.get_errno()
        said = None
        if message.value:
            said = os.fsdecode(ctypes.string_at(message.value))
            self._free(message)
        if result != 0:
            raise SandboxRefused(number, said or "the profile was refused")


class Seatbelt:
    """`sandbox_check`. OSError where the library lacks it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        # Variadic: see `declare`.
        self._check = declare(
            library, "sandbox_check", ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int
        )
        # An exported constant, to be read and not assumed: keeps a mere question out of the log of denials.
        self._quiet = ctypes.c_int.in_dll(library, "SANDBOX_CHECK_NO_REPORT").value

    def confined(self, pid: int) -> bool:
        """Whether a process has any sandbox. OSError when there is no such process."""
        return self._denied(pid, self._check(pid, None, Filter.NONE))

    def may(self, pid: int, operation: str, value: str | None = None, kind: Filter = Filter.PATH) -> bool:
        """Whether a process may do this, with `value`: a canonical path, or what `kind` says.

        OSError as above. Ports, classes and vnode types cannot be asked for.
        """
        name = operation.encode()
        if value is None:
            return not self._denied(pid, self._check(pid, name, Filter.NONE | self._quiet))
        given = ctypes.c_char_p(os.fsencode(value))
        return not self._denied(pid, self._check(pid, name, kind | self._quiet, given))

    def holds_marker(self, pid: int, marker: str) -> bool:
        """Whether a process lives in the sandbox that this marker path belongs to; False for one that is gone.

        Every profile of ours allows reading its own marker and nothing beside it, and a sandbox is inherited
        and never left: no process can shed or forge this. Sandboxes of others may allow reading everything
        (a build tool's, say): they are told apart by a second path that no profile of ours allows.
        """
        try:
            return (
                self.confined(pid)
                and self.may(pid, "file-read-data", marker)
                and not self.may(pid, "file-read-data", marker + _BESIDE)
            )
        except ProcessLookupError:
            return False

    @staticmethod
    def _denied(pid: int, answer: int) -> bool:
        if answer < 0:
            raise failure(f"process {pid}")
        return answer != 0
