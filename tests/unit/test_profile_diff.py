"""What two sandboxes decide differently."""

from typing import Any

import pytest

from worker.answers import SeatbeltSandbox, sandbox_of
from worker.platform.darwin.evaluate import CompiledProfile, compile_profile
from worker.platform.darwin.groups import GROUPS
from worker.profile_diff import Side, as_row, differences, question_set
from worker.profile_samples import all_sampled, differing, samples
from worker.questions import RawQuestion, requests, spoken

from .profile_help import PLATFORMS, made


def side(platform: str = "darwin", *, place: dict[str, Any] | None = None, **fields: Any) -> Side:
    one = made(platform, place=place, **fields)
    return Side(one.profile.language, one.policy, sandbox_of(one.profile))


def compiled(one: Side) -> CompiledProfile:
    assert isinstance(one.sandbox, SeatbeltSandbox)
    return one.sandbox.compiled()


def told(one: Side, other: Side) -> dict[str, tuple[str, str]]:
    return {spoken(d.question): (d.one.decision, d.other.decision) for d in differences(one, other)}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_same_spec_is_no_difference(platform: str) -> None:
    fields: dict[str, Any] = {"sandbox": {"read": ["/opt/data"]}, "network": {"access": "localhost"}}
    assert differences(side(platform, **fields), side(platform, **fields)) == []


def test_another_text_is_no_difference() -> None:
    one = side("darwin", place={"instance": "01JD8Z6M0000000000000000AB"}, sandbox={"groups": ["git", "tls"]})
    other = side(
        "darwin", place={"instance": "01JD8Z6M0000000000000000AB"}, sandbox={"groups": ["tls", "git", "git"]}
    )
    assert differences(one, other) == []


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(
    ("fields", "question"),
    [
        ({"sandbox": {"read": ["/opt/data"]}}, "read /opt/data/some-file"),
        ({"sandbox": {"write": ["/opt/data"]}}, "write /opt/data/some-file"),
        ({"network": {"access": "outbound"}}, "bind 8080"),
        ({"network": {"access": "none"}}, "connect 198.51.100.1:443"),
        ({"storage": [{"type": "bind", "source": "/srv/x", "target": "/x"}]}, "write /srv/x/some-file"),
        ({"devices": [{"path": "/dev/thing"}]}, "read /dev/thing"),
    ],
)
def test_one_grant_is_told(platform: str, fields: dict[str, Any], question: str) -> None:
    found = told(side(platform), side(platform, **fields))
    assert question in found
    assert set(found[question]) == {"allow", "deny"}


def test_ports_of_either_side_are_asked() -> None:
    one = side("darwin", network={"access": "localhost", "connect_ports": [5432]})
    other = side("darwin", network={"access": "localhost", "connect_ports": [6379]})
    found = told(one, other)
    assert found["connect localhost:5432"] == ("allow", "deny")
    assert found["connect localhost:6379"] == ("deny", "allow")


@pytest.mark.parametrize("name", sorted(GROUPS))
def test_what_a_group_adds_is_told_by_its_own_rules(name: str) -> None:
    """A question can be made of every rule of every group, and of those that add something one is decided anew."""
    bare = compiled(side("darwin", network={"access": "none"}))
    more = compiled(side("darwin", network={"access": "none"}, sandbox={"groups": [name]}))
    rules = differing(bare, more)
    assert all_sampled(rules)
    anew = [
        one
        for one in samples(rules)
        for operation, argument in requests(one)
        if bare.decide(operation, argument).decision != more.decide(operation, argument).decision
    ]
    assert bool(anew) == bool(rules)


def test_two_platforms_are_compared_in_plain_words() -> None:
    one, other = side("darwin"), side("linux")
    assert not [q for q in question_set(one, other) if isinstance(q, RawQuestion)]
    found = told(one, other)
    assert found["lookup com.apple.logd"] == ("allow", "deny")
    assert found["connect 198.51.100.1:4222"] == ("deny", "allow")


def test_a_row_has_both_rules() -> None:
    row = as_row(differences(side("darwin"), side("darwin", sandbox={"read": ["/opt/data"]}))[0])
    assert set(row) == {"question", "a", "b", "a_rule", "b_rule"}
    assert row["a_rule"] != row["b_rule"]


# -- questions made of rules

HEAD = "(version 1)(deny default)"


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        ('(allow file-read* (subpath "/a"))', "file-read-data /a/some-file"),
        ('(allow file-write* (literal "/a b"))', "file-write-data /a b"),
        ('(allow file-read* (prefix "/a"))', "file-read-data /ax"),
        ('(allow mach-lookup (xpc-service-name-prefix "com.a."))', "lookup xpc:com.a.x"),
        ('(allow mach-lookup (local-name "x"))', "lookup local:x"),
        ('(allow sysctl-read (sysctl-name-prefix "hw."))', "sysctl-read hw.x"),
        ('(allow iokit-get-properties (iokit-property "model"))', "iokit-get-properties model"),
        ('(allow network-outbound (remote tcp "localhost:81"))', "network-outbound 127.0.0.1:81"),
        ('(allow network-outbound (remote udp "*:53"))', "network-outbound 198.51.100.1:53/udp"),
        ('(allow network-bind (local ip "*:81"))', "network-bind *:81"),
        ("(allow signal (target others))", "signal others"),
        ('(allow file-read* (require-all (literal "/a") (vnode-type DIRECTORY)))', "file-read-data /a"),
        ('(allow file-read* (literal "/a\\"b"))', 'file-read-data /a"b'),
        ("(allow process-fork)", "process-fork"),
        ('(allow file-read* (regex #"^/dev/ttys[0-9]+$"))', "file-read-data /dev/ttys1"),
        (
            '(allow file-read* (regex #"^/Applications/Xcode[^/]*\\.app(/|$)"))',
            "file-read-data /Applications/Xcodexx.app/",
        ),
    ],
)
def test_a_sample_of_a_rule(rule: str, wanted: str) -> None:
    assert wanted in [spoken(one) for one in samples(compile_profile(HEAD + rule, {}).rules)]


def test_differing_rules_keep_only_what_is_new() -> None:
    one = compile_profile(HEAD + '(allow file-read* (literal "/a") (literal "/b"))', {})
    other = compile_profile(HEAD + '(allow file-read* (literal "/b"))(deny process-fork)', {})
    found = {
        (rule.action, rule.operation, tuple(f.text for f in rule.filters)) for rule in differing(one, other)
    }
    assert found == {("allow", "file-read*", ('(literal "/a")',)), ("deny", "process-fork", ())}
