"""Whether isolation `rootfs` works for this worker, found out by doing it once in a process of its own.

And whether its programs' descriptors can be had, which a container with a network of its own needs (see `netgate`).
"""

import os
import subprocess
import sys
from pathlib import Path

# Bare packages, as in the launcher: with the worker's own, third-party code would be loaded.
_PROGRAM = """
import os, sys, tempfile
for name in ("worker", "worker.platform", "worker.platform.linux"):
    sys.modules[name] = package = type(sys)(name)
    package.__path__ = [sys.argv[1] + "/" + name.replace(".", "/")]
from worker.platform.linux import callers, rooted
looking = callers.try_out()
# A folder of this process's own: the worker may be killed meanwhile, and would leave it.
with tempfile.TemporaryDirectory() as place:
    sys.stdout.write(rooted.try_out(sys.argv[2] == "user", os.path.realpath(place)) + "\\n" + looking)
"""
_PATIENCE_S = 10.0


class Able:
    """Found out when it is first asked for, unless it is given."""

    def __init__(self, *, user: bool = False, reason: str | None = None, blind: str = "") -> None:
        self._found = None if reason is None else (user, reason, blind)

    @property
    def user(self) -> bool:
        """Whether a container needs a user namespace, because the worker is not root."""
        return self._find()[0]

    @property
    def reason(self) -> str:
        """Why isolation `rootfs` is not to be had; empty when it is."""
        return self._find()[1]

    @property
    def blind(self) -> str:
        """Why descriptors of programs cannot be had; empty when they can."""
        return self._find()[2]

    def _find(self) -> tuple[bool, str, str]:
        if self._found is None:
            self._found = _find()
        return self._found


def _find() -> tuple[bool, str, str]:
    reason = ""
    for user in (False, True) if os.geteuid() == 0 else (True,):
        reason, _, blind = _try_out("user" if user else "root").partition("\n")
        if not reason:
            return user, "", blind
    return True, reason, reason


def _try_out(kind: str) -> str:
    """The two reasons, a line each; empty where it works."""
    folder = str(Path(__file__).resolve().parents[3])
    try:
        tried = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PROGRAM, folder, kind],
            capture_output=True,
            timeout=_PATIENCE_S,
            check=False,
            text=True,
        )
    except (OSError, subprocess.TimeoutExpired) as failure:
        return f"it could not be tried: {failure}"
    if tried.returncode != 0:
        return f"it could not be tried: {tried.stderr.strip().splitlines()[-1:]}"
    return tried.stdout
