"""Profiles that are mostly alike are read and compiled in pieces; nothing may come out differently for it."""

import random
from typing import Any

import pytest

from worker.platform.darwin import sbpl_compile
from worker.platform.darwin.evaluate import Argument, Rejected, compile_profile
from worker.platform.darwin.sbpl_pieces import pieces
from worker.platform.darwin.sbpl_reader import read, shown

from .profile_help import made
from .reference_profile import Machine, render
from .test_evaluate import ROWS

B = "(version 1)\n(deny default)\n"


def told(text: str, params: dict[str, str], release: int | None = None) -> Any:
    """All that a compilation comes to."""
    try:
        profile = compile_profile(text, params, release=release)
    except Rejected as refused:
        return str(refused), refused.line
    rules = [
        (rule.action, rule.operation, rule.written, rule.modifiers, rule.form, rule.line, rule.text)
        for rule in profile.rules
    ]
    return rules, [[test.text for test in rule.filters] for rule in profile.rules], profile.warnings


def whole(
    monkeypatch: pytest.MonkeyPatch, text: str, params: dict[str, str], release: int | None = None
) -> Any:
    """As `told`, but never in pieces."""

    def refuse(text: str) -> Any:
        raise Rejected("not in pieces")

    with monkeypatch.context() as patch:
        patch.setattr(sbpl_compile, "pieces", refuse)
        return told(text, params, release)


def profiles() -> list[tuple[str, dict[str, str]]]:
    of_specs = [
        made("darwin", sandbox={"read": ["/opt/data"], "groups": ["git", "python"]}).profile,
        made("darwin", network={"access": "outbound"}, sandbox={"write": ["/srv/x"]}).profile,
        made("darwin", network={"access": "none"}).profile,
    ]
    of_machines = [render(Machine(gpu=gpu, network="full")) for gpu in ("none", "metal")]
    return [(one.text, one.params) for one in of_specs] + [(text, {}) for text in of_machines]


@pytest.mark.parametrize("release", [None, 12])
def test_a_profile_is_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch, release: int | None) -> None:
    for text, params in profiles():
        assert len(pieces(text)) > 10
        for _ in ("at first", "when it is known"):
            assert told(text, params, release) == whole(monkeypatch, text, params, release)


@pytest.mark.parametrize("seed", range(20))
def test_lines_of_many_profiles_thrown_together(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Forms known from one text stand on other lines of the next, after other constants; some are cut in two."""
    randomly = random.Random(seed)
    parts = [part for text, _ in profiles() for part in text.split("\n(")]
    parts += [text.removeprefix("(") for _, text, _ in ROWS]
    odd = ['define a "/x")', "allow file-read* (subpath a))", "allow file-read* (subpath", '"/x"))', '; "', "if #f",
           "when (param \"P\") (allow signal))", "define file-read* 1)", ")", '"', "deny default)"]  # fmt: skip
    for _ in range(30):
        chosen = randomly.sample(parts, 8) + randomly.sample(odd, randomly.randrange(3))
        randomly.shuffle(chosen)
        text = B + "".join(f"({part}\n" for part in chosen)
        params = {"P": "/p"} if randomly.random() < 0.5 else {}
        assert told(text, params) == whole(monkeypatch, text, params), text


def test_what_a_constant_means_is_not_kept() -> None:
    rule = "(allow file-read* (subpath a))"
    asked = "file-read-data", Argument(path="/x/f")
    assert compile_profile(f'{B}(define a "/x")\n{rule}', {}).decide(*asked).decision == "allow"
    assert compile_profile(f'{B}(define a "/y")\n{rule}', {}).decide(*asked).decision == "deny"
    with pytest.raises(Rejected, match="expects string arguments") as caught:
        compile_profile(f"{B}{rule}", {})
    assert caught.value.line == 3


def test_a_constant_may_have_the_name_of_a_word() -> None:
    rule = "(allow file-read* (vnode-type DIRECTORY))"
    assert compile_profile(f"{B}{rule}", {}).rules
    with pytest.raises(Rejected, match="expects names") as caught:
        compile_profile(f'{B}(define DIRECTORY "x")\n{rule}', {})
    assert caught.value.line == 4


def test_a_parameter_is_not_kept() -> None:
    text = f'{B}(allow file-read*\n  (subpath (param "P")))'
    for value, expected in (("/x", "allow"), ("/y", "deny"), ("/x", "allow")):
        found = compile_profile(text, {"P": value}).decide("file-read-data", Argument(path="/x/f"))
        assert found.decision == expected
    with pytest.raises(Rejected, match="is not set"):
        compile_profile(text, {})


def test_a_parameter_that_may_be_unset_is_not_kept() -> None:
    text = f'{B}(allow file-read* (literal (if (param "P") "/set" "/unset")))'
    for params, path in (({}, "/unset"), ({"P": "x"}, "/set"), ({}, "/unset")):
        found = compile_profile(text, params).decide("file-read-data", Argument(path=path))
        assert found.decision == "allow"


def test_forms_that_begin_no_line() -> None:
    text = f"{B}  (allow signal)\n\t(allow process-fork) (allow lsopen)\n(allow\n sysctl-read) (allow pseudo-tty)"
    lines = [(rule.operation, rule.line) for rule in compile_profile(text, {}).rules[1:]]
    assert lines == [("signal", 3), ("process-fork", 4), ("lsopen", 4), ("sysctl-read", 5), ("pseudo-tty", 6)]


def test_a_release_is_not_kept() -> None:
    text = f"{B}(allow iokit-open-service)"
    assert compile_profile(text, {}, release=26).rules
    with pytest.raises(Rejected, match="unknown before macOS 26") as caught:
        compile_profile(text, {}, release=15)
    assert caught.value.line == 3
    assert compile_profile(text, {}, release=26).rules


@pytest.mark.parametrize(
    ("rule", "times", "said"),
    [
        ("(allow" + " file-read-data" * 20 + ' (literal "/a")' * 20 + ")", 200, "more than 50000 filters"),
        ('(allow file-read* (regex #"' + "a" * 900 + '"))', 20, "bytes of regular expressions"),
    ],
)
def test_bounds_are_of_the_whole_profile(rule: str, times: int, said: str) -> None:
    """What each piece keeps to, many of them may not."""
    rules = [f"{rule} ; {number}" for number in range(times)]
    text = B + "\n".join(rules)
    assert compile_profile(B + rules[0], {}).rules
    with pytest.raises(Rejected, match=said) as caught:
        compile_profile(text, {})
    assert caught.value.line is not None
    assert caught.value.line > 3


def test_a_cut_in_a_string_or_a_form_is_none() -> None:
    text = f'{B}(allow mach-lookup\n(global-name "a\n(b"))\n(allow signal)'
    rules = compile_profile(text, {}).rules
    assert [(rule.operation, rule.line) for rule in rules] == [
        ("default", 2),
        ("mach-lookup", 3),
        ("signal", 6),
    ]
    assert [shown(form) for form in read(text)][2] == rules[1].text
