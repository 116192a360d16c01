"""Laws of the evaluator over generated profiles and texts.

`SANDFLEET_EVALUATE_EXAMPLES` sets how many random texts are tried; the default keeps the suite quick.
"""

import os
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from worker.platform.darwin import sbpl_operations as operations
from worker.platform.darwin.evaluate import Argument, Rejected, compile_profile, evaluate
from worker.platform.darwin.sbpl_paths import folded
from worker.platform.darwin.sbpl_reader import quoted, read, shown
from worker.platform.darwin.sbpl_regex import Regex

from .reference_profile import Machine, render
from .test_evaluate import ROWS

EXAMPLES = int(os.environ.get("SANDFLEET_EVALUATE_EXAMPLES", "2000"))
law = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
texts_law = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])

DECISIONS = ("allow", "deny", "unknown", "reject")

# -- generated rules, each of a family of operations that its filters apply to

paths = st.builds(
    lambda parts: "/" + "/".join(parts), st.lists(st.sampled_from(["a", "b", "tmp", "x.y"]), max_size=3)
)
path_filters = st.recursive(
    st.one_of(
        st.builds(
            lambda kind, path: f'({kind} "{path}")',
            st.sampled_from(["literal", "subpath", "prefix", "path-ancestors"]),
            paths,
        ),
        st.sampled_from(
            ["(vnode-type DIRECTORY)", '(regex #"^/a/[ab]$")', r'(regex #"\d")', '(extension "x")']
        ),
    ),
    lambda inner: st.one_of(
        st.builds(lambda one: f"(require-not {one})", inner),
        st.builds(
            lambda kind, several: f"({kind} {' '.join(several)})",
            st.sampled_from(["require-all", "require-any"]),
            st.lists(inner, min_size=1, max_size=3),
        ),
    ),
    max_leaves=4,
)
FAMILIES: dict[str, tuple[Sequence[str], Any]] = {
    "file": (
        ("file*", "file-read*", "file-read-data", "file-write*", "file-write-data", "file-link", "default"),
        path_filters,
    ),
    "process": (
        ("process*", "process-info*", "process-info-pidinfo", "process-info-codesignature", "default"),
        st.sampled_from(["(target self)", "(target same-sandbox)", "(require-not (target others))"]),
    ),
    "network": (
        ("network*", "network-outbound", "network-inbound", "network-bind", "default"),
        st.sampled_from(
            ["(remote ip)", '(remote tcp "localhost:*")', '(local ip "*:80")', '(local ip "localhost:80")',
             '(literal "/a/s")', '(remote unix-socket)']
        ),
    ),
}  # fmt: skip
ARGUMENTS: dict[str, Any] = {
    "file": st.builds(Argument, path=paths, vnode=st.sampled_from([None, "DIRECTORY", "REGULAR-FILE"])),
    "process": st.builds(
        Argument, target=st.sampled_from([None, "self", "children", "others", "other-container"])
    ),
    "network": st.one_of(
        st.builds(Argument, path=st.just("/a/s")),
        st.builds(
            Argument,
            address=st.sampled_from(
                ["127.0.0.1:80", "1.1.1.1:80", "*:80", "[::ffff:127.0.0.1]:80", "localhost:1"]
            ),
            protocol=st.sampled_from([None, "udp"]),
        ),
    ),
}


class Case(msgspec.Struct):
    rules: list[str]
    operation: str
    argument: Argument
    family: str

    def decision(self, rules: Sequence[str] | None = None) -> str:
        text = "(version 1)(deny default)\n" + "\n".join(self.rules if rules is None else rules)
        return evaluate(text, {}, self.operation, self.argument).decision


def rules_of(family: str, action: str | None = None) -> Any:
    named, filters = FAMILIES[family]

    def written(verb: str, operation: str, tests: list[str]) -> str:
        return f"({' '.join([verb, operation, *([] if operation == 'default' else tests)])})"

    verbs = st.sampled_from(["allow", "deny"]) if action is None else st.just(action)
    return st.builds(written, verbs, st.sampled_from(named), st.lists(filters, max_size=3))


@st.composite
def cases(draw: Callable[[Any], Any]) -> Case:
    family = draw(st.sampled_from(sorted(FAMILIES)))
    return Case(
        rules=draw(st.lists(rules_of(family), max_size=6)),
        operation=draw(st.sampled_from(FAMILIES[family][0][:-1])),
        argument=draw(ARGUMENTS[family]),
        family=family,
    )


@law
@given(case=cases(), data=st.data())
def test_an_added_allow_never_denies_more(case: Case, data: st.DataObject) -> None:
    """Wherever it stands, whatever its operation and filters: what was allowed stays allowed.

    This needs no condition. A rule only ever decides for itself, so a new one can take a decision from others,
    but it can only turn it into its own; that holds for a more specific operation as well.
    """
    added = data.draw(rules_of(case.family, "allow"))
    place = data.draw(st.integers(0, len(case.rules)))
    before = case.decision()
    after = case.decision([*case.rules[:place], added, *case.rules[place:]])
    if before == "allow":
        assert after == "allow", added
    if after == "deny":
        assert before == "deny", added


@law
@given(case=cases(), data=st.data())
def test_an_added_deny_never_allows_more(case: Case, data: st.DataObject) -> None:
    added = data.draw(rules_of(case.family, "deny"))
    place = data.draw(st.integers(0, len(case.rules)))
    before = case.decision()
    after = case.decision([*case.rules[:place], added, *case.rules[place:]])
    if before == "deny":
        assert after == "deny", added
    if after == "allow":
        assert before == "allow", added


@law
@given(case=cases(), seed=st.integers(0, 2**32))
def test_the_order_of_filters_makes_no_difference(case: Case, seed: int) -> None:
    """In a rule and in `require-all` and `require-any`; and a rule on two operations is two rules."""
    shuffled = [shown_shuffled(rule, random.Random(seed)) for rule in case.rules]
    assert case.decision(shuffled) == case.decision()
    doubled = [rule.replace(" ", f" {case.operation} ", 1) for rule in case.rules]
    apart = [
        text
        for rule in case.rules
        for text in (rule.replace(rule.split(" ")[1].rstrip(")"), case.operation, 1), rule)
    ]
    if all("default" not in rule for rule in case.rules):
        assert case.decision(doubled) == case.decision(apart)


def shown_shuffled(rule: str, randomly: random.Random) -> str:
    def shuffled(node: Any) -> str:
        items = getattr(node, "items", None)
        if items is None:
            return shown(node)
        texts = [shuffled(item) for item in items]
        fixed = 2 if node.head in ("allow", "deny") else 1 if node.head.startswith("require-") else len(texts)
        tail = texts[fixed:]
        randomly.shuffle(tail)
        return f"({' '.join(texts[:fixed] + tail)})"

    (form,) = read(rule)
    return shuffled(form)


@law
@given(case=cases())
def test_the_rule_that_is_named_decides(case: Case) -> None:
    """Its action is the answer, and without it the answer comes from elsewhere."""
    text = "(version 1)\n(deny default)\n" + "\n".join(case.rules)
    found = evaluate(text, {}, case.operation, case.argument)
    assert found.decision in ("allow", "deny", "unknown")
    if found.rule is None or found.line is None:
        assert found.decision == "allow"
        assert "does not cover" in found.reason
        return
    written = text.split("\n")[found.line - 1]
    assert found.rule == shown(read(written)[0])
    if found.decision != "unknown":
        assert found.rule.startswith(f"({found.decision} ")


hostile = st.one_of(
    st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=60),
    st.sampled_from(
        ['") (allow default) ("', '"))(allow default)((', "\\", '\\"', "; x\n(allow default)", "(param \"Q\")", "#t",
         '#"raw"', "/a\n(allow default)", "|#", "'", "\ud800"]
    ),
)  # fmt: skip


@law
@given(value=hostile, elsewhere=paths)
@example(value='/x") (allow default) (deny file-read* (subpath "', elsewhere="/a")
def test_a_parameters_value_is_never_read_as_code(value: str, elsewhere: str) -> None:
    text = (
        '(version 1)(deny default)(define p (param "P"))(allow file-read* (subpath p) (literal (param "P")))'
        '(allow mach-lookup (global-name (string-append "x" (param "P"))))(if (param "P") (allow sysctl-read))'
    )
    profile, plain = compile_profile(text, {"P": value}), compile_profile(text, {"P": "/plain"})
    assert [(rule.action, rule.operation, len(rule.filters), rule.line) for rule in profile.rules] == [
        (rule.action, rule.operation, len(rule.filters), rule.line) for rule in plain.rules
    ]
    assert profile.decide("file-write-data", Argument(path=elsewhere)).decision == "deny"
    assert profile.decide("mach-lookup", Argument(name="x" + value)).decision in ("allow", "unknown")
    if not folded(elsewhere).startswith(folded(value).rstrip("/") or "/"):
        assert profile.decide("file-read-data", Argument(path=elsewhere)).decision == "deny"


@law
@given(value=st.text(st.characters(exclude_characters="\0\n\r"), max_size=40))
def test_a_string_survives_being_written(value: str) -> None:
    text = f"(version 1)(deny default)(allow mach-lookup (global-name {quoted(value)}))"
    found = evaluate(text, {}, "mach-lookup", Argument(name=value))
    assert found.decision == "allow"


# -- texts that are none

SEEDS = [
    *(text for _, text, _ in ROWS),
    *(
        render(Machine(gpu=gpu, network=network))
        for gpu in ("none", "metal")
        for network in ("full", "localhost")
    ),
    '(version 1)(define a "/x")(deny default (with message (param "P")))(if (param "P") (allow file* (subpath a)))',
]
PIECES = ["(", ")", '"', "\\", "#", ";", "\n", " ", '#"', "*", "(require-not ", "(require-all ", "(define a ", "a",
          '(regex #"', "[", "(version 1)", "(deny default)", "(param \"P\")", "allow", "deny", "file-read*",
          "(string-append a a)", "(with ", "1", "#o7", "\0", "\ud800", "é", "(remote ip \"localhost:1\")", "'",
          "(if #f "]  # fmt: skip


@st.composite
def mutated(draw: Callable[[Any], Any]) -> str:
    text = str(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, len(text)))
        cut = draw(st.sampled_from([0, 0, 1, 2, 7, 40]))
        text = text[:at] + draw(st.one_of(st.sampled_from(PIECES), st.text(max_size=3))) + text[at + cut :]
    return text


anything = st.one_of(
    st.text(max_size=200),
    st.lists(st.sampled_from(PIECES), max_size=40).map("".join),
    mutated(),
    mutated(),
)
odd_text = st.one_of(
    st.none(), st.text(max_size=20), paths, st.sampled_from(["/tmp/../..", "127.0.0.1:80", "[::1]:1", "*:1"])
)
any_argument = st.builds(
    Argument, path=odd_text, real=odd_text, vnode=odd_text, target=odd_text, name=odd_text, kind=odd_text,
    class_=odd_text, address=odd_text, protocol=odd_text, number=st.none() | st.integers(),
    mode=st.none() | st.integers(), setuid=st.sampled_from([None, True, False]), domain=odd_text,
)  # fmt: skip
any_operation = st.one_of(st.sampled_from(sorted(operations.PARENTS)), st.text(max_size=12))


@texts_law
@given(
    text=anything, operation=any_operation, argument=any_argument, parameter=st.none() | st.text(max_size=20)
)
def test_no_text_crashes_or_hangs_it(
    text: str, operation: str, argument: Argument, parameter: str | None
) -> None:
    params = {} if parameter is None else {"P": parameter}
    found = evaluate(text, params, operation, argument)
    assert found.decision in DECISIONS
    assert found.reason
    if found.decision == "reject":
        assert found.line is None or 1 <= found.line <= text.count("\n") + 1
        with pytest.raises(Rejected):
            compile_profile(text, params)
    else:
        assert compile_profile(text, params).decide(operation, argument) == found


# -- expressions, against an engine that is known to be right where both speak

atoms = st.one_of(
    st.sampled_from(["a", "b", "/", r"\.", "[ab]", "[^/]", "[0-9]", ".", "^", "$", "-"]),
    st.sampled_from(["a", "b"]),
)
expressions = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.builds(lambda one, sign: f"({one}){sign}", inner, st.sampled_from(["", "*", "+", "?"])),
        st.builds(lambda one, other: f"({one}|{other})", inner, inner),
    ),
    max_leaves=12,
)


@law
@given(pattern=expressions, text=st.text(st.sampled_from("ab/.0-"), max_size=12))
def test_an_expression_finds_what_it_should(pattern: str, text: str) -> None:
    # The end before the beginning: only in an empty text, and in no profile.
    assume(text or "^" not in pattern.partition("$")[2])
    # A dollar sign is the end of the text, not the place before its last line break.
    expected = re.search(pattern.replace("$", r"\Z").encode(), text.encode(), re.DOTALL)
    assert Regex(pattern).search(text) is (expected is not None)


@law
@given(pattern=st.one_of(st.text(max_size=30), st.text(st.sampled_from("ab()[]|*+?^$\\.{}-"), max_size=30)),
       text=st.text(max_size=30))  # fmt: skip
def test_no_expression_crashes_it(pattern: str, text: str) -> None:
    try:
        found = Regex(pattern).search(text)
    except Rejected:
        return
    assert found in (True, False, None)
