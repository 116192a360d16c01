"""Carries out a plan made by the macOS driver. Standard library only.

A plan is data: `{"version": 1, "platform": "darwin", "limits": [[name, soft, hard, cap], …], "profile":
text, "params": [key, value, …]}`. `prepare` converts it before the fork; `apply` sets the limits and then
enters the sandbox, in the child, for good. The sandbox is inherited over fork and exec and cannot be left.

Sources: sandbox_init(3); WebKit's SandboxSPI.h and Chromium's seatbelt.cc for `sandbox_init_with_parameters`.
"""

import ctypes
import os
import resource
from typing import Any, NamedTuple

PLAN_VERSION = 1
LIBSYSTEM = "/usr/lib/libSystem.B.dylib"

# setrlimit(2) of macOS refuses more descriptors than OPEN_MAX, infinity included.
_OPEN_MAX = 10240


class EnforceError(Exception):
    """A step that failed. `detail` names its object (a limit) or is what the profile's compiler said."""

    def __init__(self, step: str, number: int, detail: str) -> None:
        super().__init__(f"{step}: {detail}")
        self.step = step
        self.errno = number
        self.detail = detail


class Prepared(NamedTuple):
    """Everything that the child needs, converted.

    It allocates as little as it can. Holds what `params` points to.
    """

    library: ctypes.CDLL
    profile: bytes
    params: Any

    def close(self) -> None:
        """Nothing to give back; the loaded library stays."""


def prepare(plan: dict[str, Any], library: str = LIBSYSTEM) -> Prepared:
    """Serves every process that is started under the plan."""
    if plan.get("version") != PLAN_VERSION:
        raise EnforceError("plan", 0, f"version {plan.get('version')} is not one that this launcher knows")
    try:
        loaded = ctypes.CDLL(library, use_errno=True)
        declare(loaded)
    except (OSError, AttributeError) as error:
        raise EnforceError("sandbox", 0, f"{library} cannot be used: {error}") from error
    strings = [os.fsencode(text) for text in plan["params"]]
    profile = os.fsencode(plan["profile"])
    if len(strings) % 2 or any(b"\0" in text for text in (profile, *strings)):
        raise EnforceError("plan", 0, "parameters are no pairs, or a text holds a NUL")
    array = (ctypes.c_char_p * (len(strings) + 1))(*strings, None)
    return Prepared(loaded, profile, array)


def declare(library: ctypes.CDLL) -> None:
    """Say what the two functions take; without it a pointer would be cut to an int."""
    library.sandbox_init_with_parameters.argtypes = [
        ctypes.c_char_p,
        ctypes.c_uint64,
        ctypes.POINTER(ctypes.c_char_p),
        # Not c_char_p: the very pointer has to be given back to be freed.
        ctypes.POINTER(ctypes.c_void_p),
    ]
    library.sandbox_init_with_parameters.restype = ctypes.c_int
    library.sandbox_free_error.argtypes = [ctypes.c_void_p]
    library.sandbox_free_error.restype = None


def apply(plan: dict[str, Any], prepared: Prepared | None = None) -> None:
    """Confine this process for good. To be called between fork and exec, by a process of one thread."""
    ready = prepare(plan) if prepared is None else prepared
    for name, soft, hard, cap in plan["limits"]:
        _set_limit(name, soft, hard, cap)
    enter(ready)


def enter(ready: Prepared) -> None:
    """Apply the profile. Flags 0: the text itself, not the name of a profile of Apple's."""
    message = ctypes.c_void_p()
    ctypes.set_errno(0)
    result = ready.library.sandbox_init_with_parameters(ready.profile, 0, ready.params, ctypes.byref(message))
    if result == 0:
        return
    number = ctypes.get_errno()
    detail = "the profile was refused"
    if message.value:
        detail = os.fsdecode(ctypes.string_at(message.value))
        ready.library.sandbox_free_error(message)
    raise EnforceError("sandbox", number, detail)


def _set_limit(name: str, soft: int, hard: int, cap: bool) -> None:
    """-1 is infinity; with `cap`, no higher than this process may go."""
    number: int = getattr(resource, f"RLIMIT_{name.upper()}")
    if name == "nofile":
        soft, hard = (_OPEN_MAX if one < 0 else one for one in (soft, hard))
    try:
        resource.setrlimit(number, (soft, hard))
    except (ValueError, OSError) as error:  # EINVAL, or EPERM: only root may raise a hard limit
        _, ceiling = resource.getrlimit(number)
        if not cap or (ceiling != resource.RLIM_INFINITY and 0 <= hard <= ceiling):
            raise EnforceError("rlimits", 1, f"{name} {soft}:{hard}: {error}") from error
        ceiling = _OPEN_MAX if name == "nofile" and ceiling == resource.RLIM_INFINITY else ceiling
        resource.setrlimit(number, (min(soft, ceiling), ceiling))
