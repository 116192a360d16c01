"""Carries out a plan made by the macOS driver. Standard library only.

A plan is data: `{"version": 1, "platform": "darwin", "limits": [[name, soft, hard, cap], …], "profile":
text, "params": [key, value, …], "marker": path, "memory_mib": number or null}`, and where the program has a
user of its own `"user": [uid, gid]`. `prepare` converts it before the fork; `apply` sets the limits, becomes
the user and then enters the sandbox, in the child, for good; `become` replaces the
child by the program. The sandbox is inherited over fork and exec and cannot be left; the marker is for those
who look for the container's processes (`tree`); the memory limit is the program's own (`jetsam`).
"""

import contextlib
import os
import resource
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from . import jetsam
from .libsystem import LIBSYSTEM, load
from .seatbelt import SandboxEntry, SandboxRefused, parameters

PLAN_VERSION = 1

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
    """Everything that the child needs, converted: it allocates as little as it can."""

    entry: SandboxEntry
    profile: bytes
    params: Any

    def close(self) -> None:
        """Nothing to give back; the loaded library stays."""


class Enforcer:
    """The enforcement through one libSystem: what the launcher calls, by these names."""

    def __init__(self, library: str = LIBSYSTEM) -> None:
        self._path = library

    def prepare(self, plan: Mapping[str, Any]) -> Prepared:
        """Serves every process that is started under the plan."""
        if plan.get("version") != PLAN_VERSION:
            raise EnforceError(
                "plan", 0, f"version {plan.get('version')} is not one that this launcher knows"
            )
        try:
            entry = SandboxEntry(load(self._path))
        except OSError as error:
            raise EnforceError(
                "sandbox", error.errno or 0, f"{self._path} cannot be used: {error}"
            ) from error
        profile = os.fsencode(plan["profile"])
        if b"\0" in profile:
            raise EnforceError("plan", 0, "the profile holds a NUL")
        try:
            params = parameters(plan["params"])
        except ValueError as error:
            raise EnforceError("plan", 0, str(error)) from error
        return Prepared(entry, profile, params)

    def apply(self, plan: Mapping[str, Any], prepared: Prepared | None = None) -> None:
        """Confine this process for good. To be called between fork and exec, by a process of one thread."""
        ready = self.prepare(plan) if prepared is None else prepared
        for name, soft, hard, cap in plan["limits"]:
            _set_limit(name, soft, hard, cap)
        if "user" in plan:
            _become_user(*plan["user"])
        try:
            ready.entry.enter(ready.profile, ready.params)
        except SandboxRefused as refusal:
            raise EnforceError("sandbox", refusal.errno, refusal.message) from refusal

    def become(
        self, plan: Mapping[str, Any], program: str, argv: Sequence[str], env: Mapping[str, str]
    ) -> None:
        """Be the program, with its memory limit; comes back only with an OSError.

        The limit is one more than what is promised (the watchdog measures the whole tree), so a system that
        does not grant it gets the program all the same.
        """
        mebibytes = plan.get("memory_mib")
        if mebibytes is not None:
            with contextlib.suppress(OSError):  # told by the exec that follows, or of no importance
                jetsam.become(jetsam.prepare(load(self._path)), program, argv, env, mebibytes)
        os.execve(program, list(argv), dict(env))


def _become_user(uid: int, gid: int) -> None:
    """With one group, and no others by the directory services: setgroups(2) opts out of them."""
    try:
        os.setgroups([gid])
        os.setgid(gid)
        os.setuid(uid)
    except OSError as error:
        raise EnforceError("user", error.errno or 0, f"{uid}:{gid}: {error.strerror}") from error


_system = Enforcer()
prepare, apply, become = _system.prepare, _system.apply, _system.become


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
