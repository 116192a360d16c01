"""The child between fork and exec: every step that turns a copy of the launcher into a container's program.

The main program's child is forked ahead of need: it does what is the same for every program, then waits for
its order (a frame with `program`, `argv`, `env`, `cwd` and `plan`). A step that fails is reported with its
name and errno through a close-on-exec pipe, and the child ends. One byte, sent just before exec, tells a
program that was reached from a child that died on the way.
"""

import json
import os
import resource
import signal
import socket
from functools import partial
from typing import Any, NamedTuple, NoReturn

from worker.launcher.processes import System
from worker.launcher.protocol import FrameBuffer, Refused, decode_body
from worker.launcher.report import give_place, hand_over
from worker.launcher.sandbox import PLAIN, Sandboxes, SandboxFailed

REACHED = b"+"
UMASK = 0o022


class Command(NamedTuple):
    """What to run. `program` is a path; `cwd` is absolute; the environment is complete."""

    program: str
    argv: list[str]
    env: dict[str, str]
    cwd: str


class Failure(NamedTuple):
    step: str
    errno: int
    detail: str


class Inherited(NamedTuple):
    """What the launcher changed for itself and a program must not see.

    `handled` are the signals whose disposition is not the default one; `files` is the limit on descriptors
    as the launcher found it.
    """

    handled: tuple[int, ...]
    files: tuple[int, int]


class Birth(NamedTuple):
    """What a child is born with, and of which kind its plan will be. `files` are to be its descriptors 0 to 2;
    `report` is its end of `report`.
    """

    files: tuple[int, int, int]
    report: int
    parent: int
    inherited: Inherited
    sandboxes: Sandboxes
    table: System
    kind: bytes = PLAIN


def run_ordered(birth: Birth, order: socket.socket) -> NoReturn:
    """Become the program that `order` will tell. Never returns."""
    try:
        if _settle(birth):
            # The shim's own end of things is not closed yet when it forks this child.
            birth.table.close_descriptors({0, 1, 2, birth.report, order.fileno()})
            if birth.sandboxes.ahead(birth.kind, lambda *told: give_place(birth.report, *told)):
                birth.table.follow_parent(signal.SIGKILL)
            message = _await(order)
            if message is not None:
                _become(birth, message)
    except BaseException as failure:
        # Nothing may unwind into the copy of the launcher that this process still is.
        _report(birth.report, Failure("child", 0, f"{type(failure).__name__}: {failure}"))
    os._exit(127)


def run_now(birth: Birth, order: dict[str, Any]) -> NoReturn:
    """Become the program of this order. Never returns."""
    try:
        if _settle(birth):
            _become(birth, order)
    except BaseException as failure:
        # As above.
        _report(birth.report, Failure("child", 0, f"{type(failure).__name__}: {failure}"))
    os._exit(127)


def _settle(birth: Birth) -> bool:
    """The steps that need no order; False when one failed, which is reported."""
    step = "parent"
    try:
        _follow(birth)
        step = "setsid"
        os.setsid()
        step = "signals"
        signal.set_wakeup_fd(-1)
        for number in birth.inherited.handled:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        step = "descriptors"
        for number, fd in enumerate(birth.files):
            os.dup2(fd, number)
        step = "setrlimit"
        resource.setrlimit(resource.RLIMIT_NOFILE, birth.inherited.files)
        birth.table.offer_to_oom()
        os.umask(UMASK)
    except OSError as failure:
        _report(birth.report, _explain(step, failure, None))
        return False
    return True


def _await(order: socket.socket) -> dict[str, Any] | None:
    """The order; None when there will be none."""
    frames = FrameBuffer()
    while (body := frames.next()) is None:
        data = order.recv(65536)
        if not data:
            return None
        frames.feed(data)
    return decode_body(body)


def _become(birth: Birth, order: dict[str, Any]) -> None:
    """From a settled child to the program; comes back only after a failure, which is reported."""
    command = Command(order["program"], order["argv"], order["env"], order["cwd"])
    user = os.geteuid(), os.getegid()
    follow = partial(_follow, birth)
    step = "cgroup"
    try:
        if "cgroup" in order:
            _join_group(order["cgroup"])
        step = "chdir"
        if not birth.table.exact:
            os.chdir(command.cwd)  # a Seatbelt profile may hide the way to it
        step = "sandbox"
        namespaces = order.get("namespaces", ())
        if birth.sandboxes.enter(order["plan"], namespaces, lambda *told: give_place(birth.report, *told)):
            # Its parent has no number where it is now, and notices by itself.
            follow = partial(birth.table.follow_parent, signal.SIGKILL)
            follow()
        step = "gate"
        descriptors, words = birth.sandboxes.questions(order["plan"], joined=bool(namespaces))
        step = "sandbox"
        listener = birth.sandboxes.apply(order["plan"])
        if listener is not None:
            step = "gate"
            hand_over(birth.report, [listener, *descriptors], words)
        step = "chdir"
        if birth.table.exact:
            os.chdir(command.cwd)  # as the user, and below the root, that the sandbox has chosen
        step = "parent"
        if (os.geteuid(), os.getegid()) != user:
            follow()  # the change of user has cleared it
        step = "exec"
        os.write(birth.report, REACHED)
        birth.sandboxes.become(order["plan"], command.program, command.argv, command.env)
    except SandboxFailed as failure:
        _report(birth.report, Failure(failure.step, failure.errno, failure.detail))
    except Refused as failure:
        _report(birth.report, Failure("sandbox", 0, failure.message))
    except (OSError, ValueError) as failure:
        _report(birth.report, _explain(step, failure, command))


def _join_group(procs: str) -> None:
    fd = os.open(procs, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, b"0")
    finally:
        os.close(fd)


def _follow(birth: Birth) -> None:
    """Die with the shim; one that died before this was said is noticed by the changed parent."""
    birth.table.follow_parent(signal.SIGKILL)
    if os.getppid() != birth.parent:
        os._exit(127)


def _explain(step: str, failure: OSError | ValueError, command: Command | None) -> Failure:
    number = failure.errno or 0 if isinstance(failure, OSError) else 0
    detail = failure.strerror or str(failure) if isinstance(failure, OSError) else str(failure)
    if command is not None and step == "chdir":
        detail = f"{detail}: {command.cwd}"
    elif command is not None and step == "exec":
        detail = f"{detail}: {command.program}"
        if isinstance(failure, FileNotFoundError) and os.path.exists(command.program):
            detail += " (its interpreter or loader is missing)"
    return Failure(step, number, detail)


def _report(report: int, failure: Failure) -> None:
    # Short enough for one write, however the text is escaped.
    os.write(report, json.dumps(failure._replace(detail=failure.detail[:600])._asdict()).encode())


def read_report(raw: bytes) -> Failure | None:
    """What the pipe said until it closed: None when the program was reached."""
    reached = raw.startswith(REACHED)
    raw = raw.removeprefix(REACHED)
    if not raw:
        return None if reached else Failure("child", 0, "it died before it reached the program")
    try:
        told = json.loads(raw)
        return Failure(str(told["step"]), int(told["errno"]), str(told["detail"]))
    except (ValueError, KeyError, TypeError):
        return Failure("child", 0, "its report was cut off")
