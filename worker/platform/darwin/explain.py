"""A live process asked by the system itself, and its answer held against the evaluator's.

`sandbox_check` knows paths, Mach names, preference domains and operations without an argument; ports, classes,
targets and the rest it cannot be asked for. Where both answer and differ the evaluator is wrong, and the
worker's log says so.

Sources: WebKit's SandboxSPI.h for what can be asked for.
"""

from collections.abc import Callable
from typing import Literal

import msgspec
from loguru import logger

from worker.errors import Unavailable

from .evaluate import Argument, CompiledProfile, Verdict
from .sbpl_request import Unclear, request
from .seatbelt import Filter

# `Seatbelt.may`: whether the process may; OSError when there is none or it cannot be asked.
May = Callable[[int, str, str | None, Filter], bool]

_KINDS = {
    "global": Filter.GLOBAL_NAME,
    "local": Filter.LOCAL_NAME,
    "xpc": Filter.XPC_SERVICE_NAME,
}


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """`decision` is the system's where it can be asked, else the evaluator's.

    `asked` says which; `agrees` is None where only one of them has an answer.
    """

    decision: Literal["allow", "deny", "unknown"]
    asked: bool
    agrees: bool | None
    predicted: Verdict


def explain(
    pid: int, operation: str, argument: Argument, *, profile: CompiledProfile, may: May
) -> Explanation:
    """Whether a live process may do this, by the system and by `profile`, which must be the one it runs under.

    A path should exist: the system looks at the real file. Unavailable when the process cannot be asked.
    """
    predicted = profile.decide(operation, argument)
    foretold = predicted.decision if predicted.decision != "reject" else "unknown"
    form = _as_asked(operation, argument)
    if form is None or _depends_on_vnode(profile, operation, argument, predicted):
        return Explanation(decision=foretold, asked=False, agrees=None, predicted=predicted)
    value, kind = form
    try:
        decision: Literal["allow", "deny"] = "allow" if may(pid, operation, value, kind) else "deny"
    except OSError as failure:
        raise Unavailable(f"process {pid} cannot be asked: {failure.strerror}") from failure
    agrees = None if foretold == "unknown" else decision == foretold
    if agrees is False:
        logger.warning(
            "the evaluator is wrong: it says {} to {} {!r} (rule {!r}), macOS says {} for process {}",
            foretold,
            operation,
            value,
            predicted.rule,
            decision,
            pid,
        )
    return Explanation(decision=decision, asked=True, agrees=agrees, predicted=predicted)


def _as_asked(operation: str, argument: Argument) -> tuple[str | None, Filter] | None:
    """The argument as `sandbox_check` takes it; None for what it cannot be asked for."""
    given = {
        field.name
        for field in msgspec.structs.fields(Argument)
        if getattr(argument, field.name) not in (None, ())
    }
    if not given:
        return None, Filter.NONE
    if "path" in given and given <= {"path", "real", "vnode"} and not operation.startswith("network"):
        try:
            return request(operation, argument).path, Filter.PATH
        except Unclear:
            return None
    if given <= {"name", "kind"} and argument.name is not None and "\0" not in argument.name:
        if operation in ("mach-lookup", "mach-register"):
            return argument.name, _KINDS[argument.kind or "global"]
        if operation.startswith("user-preference"):
            return argument.name, Filter.PREFERENCE_DOMAIN
    return None


def _depends_on_vnode(
    profile: CompiledProfile, operation: str, argument: Argument, predicted: Verdict
) -> bool:
    """Whether the kind of file, which the system finds out by itself, makes the difference."""
    if argument.vnode is None:
        return False
    other = profile.decide(operation, msgspec.structs.replace(argument, vnode=None))
    return other.decision != predicted.decision
