"""Questions to the running system about sandboxes, through libSystem.

Sources: WebKit's SandboxSPI.h for the prototypes and filter numbers. `enforce` holds what confines a
process; this is the worker's side.
"""

import ctypes
import os

from .enforce import LIBSYSTEM

_FILTER_NONE = 0
_FILTER_PATH = 1


def load_libsystem(path: str = LIBSYSTEM) -> ctypes.CDLL:
    """OSError where there is none. The library is opened by name: since macOS 11 it is no file any more."""
    return ctypes.CDLL(path, use_errno=True)


class Seatbelt:
    def __init__(self, library: ctypes.CDLL) -> None:
        self._check = library.sandbox_check
        # The function is variadic, and on arm64 variadic arguments go elsewhere than named ones. ctypes
        # prepares such a call only when exactly the named ones are declared.
        self._check.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
        self._check.restype = ctypes.c_int
        # An exported constant, to be read and not assumed: keeps a mere question out of the log of denials.
        self._quiet = ctypes.c_int.in_dll(library, "SANDBOX_CHECK_NO_REPORT").value

    def confined(self, pid: int) -> bool:
        """Whether a process has any sandbox. OSError when there is no such process."""
        return self._asked(self._check(pid, None, _FILTER_NONE), pid)

    def may(self, pid: int, operation: str, path: str) -> bool:
        """Whether a process may do this with a path, which must be canonical. OSError as above."""
        given = ctypes.c_char_p(os.fsencode(path))
        return not self._asked(self._check(pid, operation.encode(), _FILTER_PATH | self._quiet, given), pid)

    def holds_marker(self, pid: int, marker: str) -> bool:
        """Whether a process lives in a sandbox, and in the one that this marker path belongs to."""
        return self.confined(pid) and self.may(pid, "file-read-data", marker)

    def _asked(self, answer: int, pid: int) -> bool:
        if answer < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), f"process {pid}")
        return answer != 0
