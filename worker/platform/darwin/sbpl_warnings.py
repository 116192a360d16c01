"""What compiles in a Seatbelt profile and cannot be meant: dead, shadowed and treacherous rules."""

from collections.abc import Iterator

from . import sbpl_operations as operations
from .sbpl_compile import Rule
from .sbpl_paths import covers, never_matches, real_path
from .sbpl_reader import quoted
from .sbpl_values import Filter

# A quarter of the compiler's limit of a rule, and what profiles should stay below in all.
WARN_RULE_BYTES = 16 * 1024
WARN_PROFILE_BYTES = 64 * 1024

# Filters compared with one another, and sentences; a profile that has more is past reading anyway.
_MAX_COMPARED = 200_000
_MAX_WARNINGS = 200


def warnings(text: str, rules: tuple[Rule, ...]) -> tuple[str, ...]:
    """One sentence each, with the line, in the order of the text."""
    found = [*_each_form(rules), *_shadowed(rules), *_outflanked(rules)]
    distinct = sorted(dict.fromkeys(found))
    said = [f"line {line}: {sentence}" for line, sentence in distinct[:_MAX_WARNINGS]]
    if len(distinct) > _MAX_WARNINGS:
        said.append(f"{len(distinct) - _MAX_WARNINGS} warnings more")
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > WARN_PROFILE_BYTES:
        said.append(
            f"the profile has {size} bytes, more than {WARN_PROFILE_BYTES}; it may be slow to compile"
        )
    return tuple(said)


def _each_form(rules: tuple[Rule, ...]) -> Iterator[tuple[int, str]]:
    seen = -1
    for rule in rules:
        outgoing = rule.operation in ("network-outbound", "network*")
        if outgoing and rule.action == "allow" and _names(rule, "local"):
            yield rule.line, f"a local filter on {rule.written} opens every outgoing connection"
        if rule.form == seen:
            continue
        seen = rule.form
        size = sum(test.pattern_bytes + 16 * test.size for test in rule.filters)
        if size > WARN_RULE_BYTES:
            yield rule.line, f"the rule has {size} bytes of patterns, more than {WARN_RULE_BYTES}; split it"
        for test in rule.filters:
            for leaf in _leaves(test):
                yield from ((rule.line, sentence) for sentence in _leaf(rule, leaf))


def _leaf(rule: Rule, leaf: Filter) -> Iterator[str]:
    if leaf.doubt:
        yield f"whether a filter {leaf.name} matches is unknown: {leaf.doubt} is unconfirmed"
    incoming = rule.operation in ("network-inbound", "network-bind")
    if incoming and leaf.name == "remote" and leaf.mode == "address":
        yield f"a remote filter on {rule.written} has no known effect"
    if not _on_path(leaf):
        return
    for value in leaf.values:
        if leaf.mode in ("literal", "subpath", "prefix"):
            reason = never_matches(value, mode=leaf.mode)
            if reason:
                yield f"({leaf.name} {_short(value)}) never matches: {reason}"
        elif leaf.mode == "regex":
            for alias in ("/tmp/", "/var/", "/etc/"):
                if value.startswith("^" + alias):
                    seen = real_path(alias + "x", follow=True)[:-1]
                    yield f"({leaf.name} {_short(value)}) never matches: the kernel sees {seen}"


def _names(rule: Rule, name: str) -> bool:
    return any(leaf.name == name for test in rule.filters for leaf in _leaves(test))


def _leaves(test: Filter) -> Iterator[Filter]:
    """The filters that others are joined of, each once however often it is shared."""
    stack, seen = [test], set()
    while stack:
        one = stack.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if one.parts and one.mode != "unix":
            stack.extend(reversed(one.parts))
        else:
            yield one


def _on_path(leaf: Filter) -> bool:
    return leaf.name in (
        "literal",
        "path",
        "path-literal",
        "subpath",
        "prefix",
        "path-prefix",
        "regex",
        "path-regex",
    )


def _shadowed(rules: tuple[Rule, ...]) -> Iterator[tuple[int, str]]:
    """A form of which later rules on the same operations take every filter."""
    later: dict[str, dict[str, int]] = {}
    by_form: dict[int, list[Rule]] = {}
    for rule in rules:
        by_form.setdefault(rule.form, []).append(rule)
    for form in reversed(by_form.values()):
        lines = [_taken(rule, later.get(rule.operation, {})) for rule in form]
        if all(lines):
            first = min(line for line in lines if line)
            yield form[0].line, f"the rule is shadowed entirely by that of line {first}"
        for rule in form:
            known = later.setdefault(rule.operation, {})
            for text in [test.text for test in rule.filters] or [""]:
                known[text] = rule.line


def _taken(rule: Rule, later: dict[str, int]) -> int | None:
    """The line of a later rule that matches whenever this one does; None when there is none."""
    lines = [later.get(text) for text in ([test.text for test in rule.filters] or [""])]
    return max((line for line in lines if line), default=None) if all(lines) else None


def _outflanked(rules: tuple[Rule, ...]) -> Iterator[tuple[int, str]]:
    """A denial on a wildcard that an earlier grant on a more specific operation survives."""
    specific = [rule for rule in rules if rule.action == "allow" and rule.filters]
    denied: dict[str, list[tuple[int, frozenset[str]]]] = {}
    for rule in rules:
        if rule.action == "deny" and rule.filters:
            texts = frozenset(test.text for test in rule.filters)
            denied.setdefault(rule.operation, []).append((rule.form, texts))
    parents = {parent for rule in specific for parent in operations.chain(rule.operation)[1:]}
    compared = 0
    for deny in rules:
        if deny.action == "allow" or not deny.filters or deny.operation not in parents:
            continue
        wanted = frozenset(test.text for test in deny.filters)
        for allow in specific:
            if allow.form >= deny.form or allow.operation == deny.operation:
                continue
            if not operations.covers(deny.operation, allow.operation):
                continue
            by_its_name = denied.get(allow.operation, [])
            if any(form > allow.form and wanted <= texts for form, texts in by_its_name):
                continue
            compared += len(by_its_name) + len(deny.filters) * len(allow.filters)
            if compared > _MAX_COMPARED:
                return
            if _meet(deny, allow):
                yield (
                    deny.line,
                    f"the denial of {deny.written} does not undo the grant of {allow.written} in line "
                    f"{allow.line}: a rule on the more specific operation wins",
                )
                break


def _meet(one: Rule, other: Rule) -> bool:
    """Whether some filters of two rules take something in common, as far as their texts tell."""
    return any(_overlap(left, right) for left in one.filters for right in other.filters)


def _overlap(left: Filter, right: Filter) -> bool:
    if left.text == right.text:
        return True
    if not (_on_path(left) and _on_path(right)) or "regex" in (left.mode, right.mode):
        return False
    return any(_inside(left, one, right, two) for one in left.values for two in right.values)


def _inside(left: Filter, one: str, right: Filter, two: str) -> bool:
    """Whether one of two paths lies in what the other stands for."""
    return _takes(left.mode, one, two) or _takes(right.mode, two, one)


def _takes(mode: str, outer: str, inner: str) -> bool:
    if mode == "literal":
        return outer == inner
    return inner.startswith(outer) if mode == "prefix" else covers(outer, inner)


def _short(value: str) -> str:
    return quoted(value if len(value) <= 200 else value[:199] + "…")
