"""How the evaluator explains an answer, and where it says that nobody knows."""

from typing import Any

import msgspec
import pytest

from worker.platform.darwin.evaluate import Argument, compile_profile, evaluate

from .test_evaluate import A12, A31, ROOT, B, verdict


class TestExplanations:
    TEXT = '(version 1)\n(deny default (with message "run"))\n(allow file-read*\n  (subpath "/a")\n  (literal "/b"))\n'

    def test_the_rule_that_decides(self) -> None:
        found = verdict(self.TEXT, "file-read-data", path="/a/x")
        assert found.rule == '(allow file-read* (subpath "/a") (literal "/b"))'
        assert found.line == 3
        assert found.reason == '(subpath "/a") in the last rule on file-read* that matches'

    def test_the_default(self) -> None:
        found = verdict(self.TEXT, "file-read-data", path="/c")
        assert (found.decision, found.line) == ("deny", 2)
        assert found.rule == '(deny default (with message "run"))'
        assert (
            found.reason == "no rule on file-read-data, file-read* or file* matches; (deny default) decides"
        )

    def test_a_rule_without_filters(self) -> None:
        found = verdict(f"{self.TEXT}(allow file-write*)", "file-write-data", path="/c")
        assert (found.decision, found.rule, found.line) == ("allow", "(allow file-write*)", 6)
        assert "file-write-data or file-write*" in found.reason
        assert "without a filter" in found.reason

    def test_parameters_are_named_in_the_rule_and_valued_in_the_reason(self) -> None:
        found = verdict(A31, "file-read-data", {"ROOT": ROOT}, path=f"{ROOT}/x")
        assert found.rule == '(allow file-read* file-write* (subpath (param "ROOT")))'
        assert f'(subpath "{ROOT}")' in found.reason

    def test_what_the_default_does_not_cover(self) -> None:
        found = verdict(B, "process-info-pidinfo", target="others")
        assert (found.decision, found.rule, found.line) == ("allow", None, None)
        assert "does not cover" in found.reason

    def test_a_refusal_has_its_line(self) -> None:
        found = verdict("(version 1)\n(deny default)\n\n(allow file-raed*)\n", "file-read-data", path="/a")
        assert (found.decision, found.rule, found.line) == ("reject", None, 4)
        assert "file-raed*" in found.reason

    @pytest.mark.parametrize("operation", ["file-raed*", "", "(", "default\n"])
    def test_a_question_about_nothing(self, operation: str) -> None:
        found = verdict(B, operation, path="/a")
        assert found.decision == "unknown"
        assert "no operation" in found.reason

    @pytest.mark.parametrize(
        "argument",
        [
            {"path": "a/b"},
            {"path": ""},
            {"path": "/a\0b"},
            {"path": "/" + "a" * 1100},
            {"path": "/a", "vnode": "FILE"},
            {"path": "/a", "target": "nobody"},
            {"path": "/a", "kind": "mach"},
        ],
    )
    def test_an_argument_that_cannot_be(self, argument: dict[str, Any]) -> None:
        assert verdict(f"{B}(allow file*)", "file-read-data", **argument).decision == "unknown"

    @pytest.mark.parametrize(
        "text", ["1.2.3.4", "::1:80", "[1.2.3.4]:80", ":80", "1.2.3.4:x", "1.2.3.4:70000"]
    )
    def test_an_address_that_cannot_be(self, text: str) -> None:
        assert verdict(f"{B}(allow network*)", "network-outbound", address=text).decision == "unknown"

    def test_a_compiled_profile_answers_alike(self) -> None:
        profile = compile_profile(A12, {})
        assert profile.decide("file-read-data", Argument(path="/a/x")).decision == "allow"
        assert profile.decide("file-read-data").decision == "unknown"
        assert [(rule.action, rule.operation, rule.line) for rule in profile.rules] == [
            ("deny", "default", 1),
            ("allow", "file-read*", 1),
            ("deny", "file-read*", 1),
        ]
        assert profile.warnings == ()


class TestUnsettled:
    @pytest.mark.parametrize(
        "operation",
        [
            "nvram-set",
            "system-privilege",
            "iokit-get-properties",
            "file-link",
            "file-clone",
            "file-test-existence",
        ],
    )
    def test_what_the_default_may_not_cover(self, operation: str) -> None:
        assert verdict(B, operation, path="/a", name="x", class_="y").decision == "unknown"
        assert verdict(f"{B}(deny {operation})", operation, path="/a", name="x").decision == "deny"
        assert verdict(f"{B}(allow {operation})", operation, path="/a", name="x").decision == "allow"

    def test_a_denial_on_a_parent_may_not_reach(self) -> None:
        text = f'{B}(allow file-read*)(deny file* (subpath "/a"))(deny process*)'
        assert verdict(text, "file-link", path="/a/x").decision == "unknown"
        assert verdict(text, "process-info-pidinfo", target="others").decision == "unknown"
        assert verdict(text, "process-fork").decision == "deny"

    def test_a_grant_on_a_parent_does(self) -> None:
        assert verdict(f'{B}(allow file* (subpath "/a"))', "file-link", path="/a/x").decision == "allow"

    def test_a_grant_that_may_not_be_needed(self) -> None:
        found = verdict(B, "file-map-executable", path="/a/x")
        assert found.decision == "deny"
        assert "may allow it by default" in found.reason
        assert (
            "may allow"
            not in verdict(f"{B}(deny file-map-executable)", "file-map-executable", path="/a").reason
        )

    def test_an_unsure_rule_that_says_the_same_is_none(self) -> None:
        text = f'{B}(allow file-read* (subpath "/a"))(allow file-read* (vnode-type DIRECTORY))'
        assert verdict(text, "file-read-data", path="/a/x").decision == "allow"
        found = verdict(text, "file-read-data", path="/b")
        assert (found.decision, found.rule) == ("unknown", "(allow file-read* (vnode-type DIRECTORY))")
        assert "unknown; if it does, the answer is allow, else deny" in found.reason

    def test_the_no_sandbox_modifier_runs_a_setuid_program(self) -> None:
        text = f'{B}(allow process-exec (literal "/bin/ps") (with no-sandbox))'
        assert verdict(text, "process-exec", path="/bin/ps").decision == "allow"


def test_the_argument_as_json() -> None:
    given = Argument(path="/a", class_="X", extensions=("e",))
    written = msgspec.json.encode(given)
    assert b'"class":"X"' in written
    assert msgspec.json.decode(written, type=Argument) == given
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b'{"pfad":"/a"}', type=Argument)


def test_the_same_text_is_compiled_once_and_for_each_parameter() -> None:
    for value, expected in (("/a", "allow"), ("/b", "deny"), ("/a", "allow")):
        text = "".join(["(version 1)(deny default)", '(allow file-read* (subpath (param "P")))'])
        assert evaluate(text, {"P": value}, "file-read-data", Argument(path="/a/x")).decision == expected
