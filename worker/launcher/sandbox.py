"""Finding the platform's enforcement, and calling it in the child."""

import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

from worker.launcher.protocol import START_FAILED, UNSUPPORTED, Refused

NO_SANDBOX = "none"

_SYSTEMS = {"Linux": "linux", "Darwin": "darwin"}


# Kinds of plans, for whose programs a child can be made ready: one byte each.
PLAIN = b"+"
_ROOTS = {
    b"r": {"user": False, "net": False},
    b"R": {"user": False, "net": True},
    b"u": {"user": True, "net": False},
    b"U": {"user": True, "net": True},
}


def kind_of(plan: dict[str, Any]) -> bytes:
    """The kind of a plan."""
    root = plan.get("root")
    if root is None:
        return PLAIN
    wanted = {"user": bool(root["user"]), "net": bool(root["net"])}
    return next(kind for kind, known in _ROOTS.items() if known == wanted)


class SandboxFailed(Exception):
    """A step of the enforcement failed; the program must not run."""

    def __init__(self, step: str, number: int, detail: str) -> None:
        super().__init__(detail)
        self.step = step
        self.errno = number
        self.detail = detail


class Sandboxes:
    """Carries out plans. `allow_none` is for tests: plans of platform `none` run without a sandbox.

    `enforcement` is a platform's name and what carries out its plans; this system's is found unless given.
    """

    def __init__(self, *, allow_none: bool = False, enforcement: tuple[str, Any] | None = None) -> None:
        self._allow_none = allow_none
        self._platform, module = enforcement or (_SYSTEMS.get(os.uname().sysname, ""), None)
        self._module: Any = module

    def load(self) -> None:
        """Import the enforcement and let it settle, so that every later fork shares it. ImportError."""
        if self._module is None:
            module = importlib.import_module(f"worker.platform.{self._platform}.enforce")
            if hasattr(module, "settle"):
                module.settle()
            self._module = module

    def ahead(self, kind: bytes, tell: Callable[[int, int, list[int]], None]) -> bool:
        """Do what is the same for every plan of a kind, in a child that waits for its order.

        True when this is another process afterwards, of which `tell` told as in `enter`.
        """
        prepare_ahead = getattr(self._module, "ahead", None)
        if prepare_ahead is None:
            return False
        root = _ROOTS.get(kind)
        if root is None:
            prepare_ahead()
            return False
        user = [os.getuid(), os.getgid()] if root["user"] else None
        prepare_ahead({"user": user, "net": root["net"]}, tell)
        return True

    def check(self, plan: dict[str, Any]) -> None:
        """Refused when nothing here can carry out `plan`."""
        platform = plan.get("platform")
        if platform == NO_SANDBOX and self._allow_none:
            return
        if platform != self._platform:
            raise Refused(UNSUPPORTED, f"a plan for the platform {platform!r}; this is {self._platform!r}")
        try:
            self.load()
        except ImportError as failure:
            message = f"sandbox: the enforcement cannot be loaded: {failure}"
            raise Refused(START_FAILED, message, step="sandbox", errno=0, detail=str(failure)) from failure

    def hold(self, pid: int) -> int | None:
        """A descriptor to keep while a program lives; to be asked for between its fork and its exec."""
        hold_process = getattr(self._module, "hold_process", None)
        if hold_process is None:
            return None
        try:
            fd: int = hold_process(pid)
        except OSError:
            return None  # it has ended already
        return fd

    def enter(
        self, plan: dict[str, Any], namespaces: Sequence[int], tell: Callable[[int, int, list[int]], None]
    ) -> bool:
        """Go into the container's own root, if the plan has one; True when this is another process afterwards.

        It is a new one, or that of `namespaces`. `tell` is called with the numbers of the processes that take
        this one's place, the one that holds a new container together (else 0) and the program's, and with the
        descriptors of a new container's namespaces. SandboxFailed.
        """
        if "root" not in plan:
            return False
        self.check(plan)
        try:
            self._module.enter(plan, namespaces, tell)
        except Exception as failure:
            raise _named(failure) from failure
        return True

    def apply(self, plan: dict[str, Any]) -> int | None:
        """Confine this process, between fork and exec. Raises SandboxFailed, or Refused as `check` does.

        Gives the listener of a sandbox that asks, which `gate` answers in the shim.
        """
        self.check(plan)
        if plan["platform"] == NO_SANDBOX:
            return None
        try:
            if hasattr(self._module, "prepare"):
                listener = self._module.apply(plan, self._module.prepare(plan))
            else:
                listener = self._module.apply(plan)
        except Exception as failure:
            raise _named(failure) from failure
        return listener if isinstance(listener, int) else None

    def groups(self, name: str) -> Any:
        """What makes control groups below a folder of that name; None where this user may make none. OSError."""
        open_groups = getattr(self._module, "open_groups", None)
        return None if open_groups is None else open_groups(name)

    def questions(self, plan: dict[str, Any], *, joined: bool) -> tuple[list[int], bytes]:
        """What `gate` needs beside the listener that `apply` will give, in this process. OSError."""
        questions = getattr(self._module, "questions", None)
        if questions is None or plan["platform"] == NO_SANDBOX:
            return [], b""
        found: tuple[list[int], bytes] = questions(plan, joined)
        return found

    def gate(self, descriptors: Sequence[int], words: bytes, first: Any) -> Any:
        """What answers a listener: `serve()` when its `fileno()` is readable, `close()` when nobody can ask any more
        (it has `ended`, or the descriptor says so). `first` is the container's first, None for that one.

        `retry()` now and then; it gives after how many milliseconds, None when only `serve` has to be called.
        """
        return self._module.open_gate(descriptors, words, first)

    def become(self, plan: dict[str, Any], program: str, argv: list[str], env: dict[str, str]) -> None:
        """Be the program, in the child that `apply` has confined. OSError."""
        become_program = getattr(self._module, "become", None)
        if become_program is None or plan["platform"] == NO_SANDBOX:
            os.execve(program, argv, env)
        become_program(plan, program, argv, env)


def _named(failure: Exception) -> SandboxFailed:
    """Enforcement errors carry `step`, `errno` and `detail`; anything else is a bug, told the same way."""
    step = getattr(failure, "step", None) or "sandbox"
    number = getattr(failure, "errno", None) or 0
    detail = getattr(failure, "detail", None) or f"{type(failure).__name__}: {failure}"
    return SandboxFailed(str(step), int(number), str(detail))
