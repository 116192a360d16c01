"""What a Seatbelt profile decides, told without a Mac: a pure interpreter of its language.

The decision for an operation: among the rules on it that have filters the last one that matches; else its
last rule without a filter; else the same for its parent, up to `default`. Where public facts do not settle
an answer, the answer is `unknown`; where the real compiler would refuse the profile, `reject`.
"""

from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import Literal

import msgspec

from . import sbpl_operations as operations
from .sbpl_compile import Rule, rules
from .sbpl_reader import Rejected
from .sbpl_request import SETUID_PROGRAMS, Argument, Request, Unclear, request
from .sbpl_warnings import warnings

__all__ = ["Argument", "CompiledProfile", "Rejected", "Rule", "Verdict", "compile_profile", "evaluate"]

_CACHED_PROFILES = 256
_MAX_SHOWN = 200  # characters of a filter in a sentence

Decision = Literal["allow", "deny", "unknown", "reject"]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """`rule` is the form that decides, on one line, and `line` its first, from 1; `reason` one sentence."""

    decision: Decision
    rule: str | None
    line: int | None
    reason: str


class _OneOperation(msgspec.Struct, frozen=True):
    """The rules on one operation: those with filters, the last first, and the last without."""

    filtered: tuple[Rule, ...]
    plain: Rule | None


class CompiledProfile:
    """A profile that compiles, ready for questions. `warnings` say what in it cannot be meant."""

    def __init__(self, text: str, profile_rules: tuple[Rule, ...]) -> None:
        self.rules = profile_rules
        self._text = text
        grouped: dict[str, list[Rule]] = {}
        for rule in profile_rules:
            grouped.setdefault(rule.operation, []).append(rule)
        self._operations = {
            name: _OneOperation(
                tuple(rule for rule in reversed(group) if rule.filters),
                next((rule for rule in reversed(group) if not rule.filters), None),
            )
            for name, group in grouped.items()
        }

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        return warnings(self._text, self.rules)

    def decide(self, operation: str, argument: Argument = Argument()) -> Verdict:  # noqa: B008 - frozen
        """`allow`, `deny` or `unknown`; never `reject`."""
        try:
            asked = request(operation, argument)
        except Unclear as failure:
            return Verdict(decision="unknown", rule=None, line=None, reason=str(failure))
        candidates, passed = self._find(asked)
        found = _settled(candidates, [operation, *passed[1:]])
        if asked.operation == "process-exec*":
            return _setuid(asked, candidates, found)
        return self._bind(found) if asked.operation == "network-bind" and asked.address else found

    def _bind(self, found: Verdict) -> Verdict:
        """Reports on the port of a bind filter differ (NONO: not enforced); a denial may rest on nothing else."""
        groups = [self._operations.get(name) for name in ("network-bind", "network-inbound")]
        granted = [rule for group in groups if group for rule in group.filtered if rule.action == "allow"]
        ports = any(
            test.mode == "address" and test.values[2] != "*" for rule in granted for test in rule.filters
        )
        if found.decision != "deny" or not ports:
            return found
        doubt = "whether a release enforces the port of a bind that other rules allow is unconfirmed"
        return msgspec.structs.replace(found, reason=f"{found.reason}; {doubt}")

    def _find(self, asked: Request) -> tuple[list["_Candidate"], list[str]]:
        """The rules of which one decides, the last for certain; and the operations looked at on the way."""
        candidates: list[_Candidate] = []
        nodes = operations.chain(asked.operation)
        for number, node in enumerate(nodes, 1):
            group = self._operations.get(node)
            if group is None:
                continue
            below = nodes[: number - 1]
            for rule in group.filtered:
                matched, by = _match(rule, asked)
                if matched is not False:
                    candidates.append(_Candidate(rule, below, by))
                if matched:
                    return candidates, list(nodes[:number])
            if group.plain is not None:
                candidates.append(_Candidate(group.plain, below))
                return candidates, list(nodes[:number])
        raise AssertionError("a profile without a default does not compile")


class _Candidate(msgspec.Struct, frozen=True):
    """A rule that decides, or may. `below` are the operations between the request's and the rule's; `by` is
    the filter that matches, or may.
    """

    rule: Rule
    below: tuple[str, ...]
    by: str = ""

    @property
    def decision(self) -> Decision:
        """What it comes to: not every denial reaches what stands below it."""
        unreached = (operations.ALLOWED_BY_DEFAULT | operations.UNSETTLED_BY_DEFAULT).intersection(self.below)
        if self.rule.action == "allow" or not unreached:
            return self.rule.action
        confirmed = self.rule.operation == "default" and operations.ALLOWED_BY_DEFAULT & unreached
        return "allow" if confirmed else "unknown"


def _match(rule: Rule, asked: Request) -> tuple[bool | None, str]:
    """Whether a rule with filters matches, and the filter that says so."""
    unsure = ""
    for test in rule.filters:
        found = test.check(asked)
        if found:
            return True, _shown(test.text)
        if found is None:
            unsure = unsure or _shown(test.text)
    return (None, unsure) if unsure else (False, "")


def _shown(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 1] + "…"


def _settled(candidates: list[_Candidate], passed: list[str]) -> Verdict:
    """The decision of the last, unless one before it might match and come to another."""
    last = candidates[-1]
    other = next((one for one in candidates if one.decision != last.decision), None)
    if other is not None:
        return _verdict(
            "unknown",
            other.rule,
            f"whether {other.by} matches is unknown; if it does, the answer is {other.decision}, "
            f"else {last.decision}",
        )
    reason = _reason(last, passed)
    if last.decision == last.rule.action:
        caveat = next((operations.CAVEATS[node] for node in last.below if node in operations.CAVEATS), None)
        doubt = f"; {caveat}" if caveat and last.decision == "deny" else ""
        return _verdict(last.decision, last.rule, reason + doubt)
    if last.decision == "allow":
        uncovered = next(node for node in last.below if node in operations.ALLOWED_BY_DEFAULT)
        reason = f"no rule on {_or(passed[:-1])} matches, and (deny default) does not cover {uncovered}"
        return Verdict(decision="allow", rule=None, line=None, reason=reason)
    return _verdict(
        "unknown",
        last.rule,
        f"{reason}, but whether that reaches {passed[0]} is unconfirmed; deny {passed[0]} by its own name",
    )


def _verdict(decision: Decision, rule: Rule, reason: str) -> Verdict:
    return Verdict(decision=decision, rule=rule.text, line=rule.line, reason=reason)


def _reason(found: _Candidate, passed: list[str]) -> str:
    rule = found.rule
    if found.by:
        return f"{found.by} in the last rule on {rule.written} that matches"
    if rule.operation == "default":
        decides = f"({rule.action} default) decides"
        return f"no rule on {_or(passed[:-1])} matches; {decides}" if passed[:-1] else decides
    filtered = f"no rule with a filter on {_or([*passed[:-1], rule.written])} matches"
    return f"{filtered}; the last one on {rule.written} without a filter decides"


def _or(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _setuid(asked: Request, candidates: list[_Candidate], found: Verdict) -> Verdict:
    """The kernel runs no setuid program in a sandbox, unless a rule lets it leave that (CDX, BREW)."""
    setuid = asked.argument.setuid
    if setuid is None and asked.argument.mode is not None:
        setuid = bool(asked.argument.mode & 0o6000)
    if setuid is None:
        setuid = asked.path in SETUID_PROGRAMS
    leaves = any({"no-sandbox", "no-profile"}.intersection(one.rule.modifiers) for one in candidates)
    if not setuid or leaves or found.decision == "deny":
        return found
    reason = "macOS runs no setuid or setgid program in a custom sandbox, whatever its profile says"
    return Verdict(decision="deny", rule=None, line=None, reason=reason)


def compile_profile(text: str, params: Mapping[str, str], *, release: int | None = None) -> CompiledProfile:
    """Rejected where the compiler of macOS `release` would refuse; None stands for the newest."""
    found = rules(text, params, release=release)
    return CompiledProfile(text, found)


def evaluate(
    text: str,
    params: Mapping[str, str],
    operation: str,
    argument: Argument = Argument(),  # noqa: B008 - frozen
    *,
    release: int | None = None,
) -> Verdict:
    """The decision of a profile that is given whole; the last few are kept compiled."""
    profile = _compiled(text, tuple(sorted(params.items())), release)
    if isinstance(profile, Rejected):
        return Verdict(decision="reject", rule=None, line=profile.line, reason=str(profile))
    return profile.decide(operation, argument)


@lru_cache(maxsize=_CACHED_PROFILES)
def _compiled(
    text: str, params: tuple[tuple[str, str], ...], release: int | None
) -> CompiledProfile | Rejected:
    try:
        return compile_profile(text, dict(params), release=release)
    except Rejected as refused:
        # Kept as a value, so that asking again costs nothing; its traceback would keep frames alive.
        return refused.with_traceback(None)
