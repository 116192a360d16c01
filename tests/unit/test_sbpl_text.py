"""The text of profiles: its order and limits, its tags, and that nothing from outside becomes part of it."""

import os
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.status import Gpu, Network
from worker.errors import CreateFailed, Internal, InvalidSpec
from worker.platform.base import Device, NetworkPolicy, PathRule
from worker.platform.darwin.denials import read_log
from worker.platform.darwin.groups import GROUPS
from worker.platform.darwin.sbpl import (
    ALL_ON_PATHS,
    MAX_PROFILE_BYTES,
    MAX_RULE_BYTES,
    Sbpl,
    build_profile,
    canonical,
    run_tag,
)
from worker.platform.darwin.sbpl_operations import chain, in_rule

from .sbpl_help import (
    DATA,
    INSTANCE,
    NATS,
    ROOT,
    Asked,
    ask,
    built,
    policy,
    policy_of,
)


class TestText:
    def test_it_starts_as_it_must(self) -> None:
        lines = built(run=7).text.splitlines()
        assert lines[0] == "(version 1)"
        assert lines[1] == f'(deny default (with message "sandfleet:{INSTANCE}/7"))'

    def test_the_run_comes_with_the_policy(self) -> None:
        made = [build_profile(policy_of({}, run=run), release=15) for run in (0, 12)]
        for run, profile in zip((0, 12), made, strict=True):
            assert f'"sandfleet:{INSTANCE}/{run}"' in profile.text
        assert made[0].params == made[1].params

    def test_every_denial_bears_the_runs_tag(self) -> None:
        profile = ask(
            PathRule(f"{ROOT}/ro", "r", "volume"),
            network=NetworkPolicy(level=Network.OUTBOUND, denied_ports=(1,)),
        )
        denials = [rule for rule in profile.compiled.rules if rule.action == "deny"]
        assert len(denials) > 10
        assert all(run_tag(INSTANCE, 1) in rule.text for rule in denials)
        assert not any("sandfleet:" in rule.text for rule in profile.compiled.rules if rule.action == "allow")

    def test_the_tag_is_the_one_that_the_reader_of_the_log_knows(self) -> None:
        line = (
            '{"timestamp": "2025-01-01 00:00:00.000000+0000", "processID": 0, "eventMessage": '
            f'"Sandbox: sh(42) deny(1) file-read-data /x\\n{run_tag(INSTANCE, 3)}"}}\n'
        )
        (denial,) = read_log(line.encode(), instance=INSTANCE).denials
        assert (denial.operation, denial.argument, denial.pid) == ("file-read-data", "/x", 42)

    def test_denials_of_what_the_default_misses_come_before_any_allow(self) -> None:
        text = built().text
        for name in (
            "process-info*",
            "nvram*",
            "sysctl*",
            "iokit-get-properties",
            "file-clone",
            "mach-lookup",
        ):
            assert text.index(f"(deny {name}") < text.index("(allow ")

    def test_what_must_never_be_reached_is_denied_last(self) -> None:
        profile = ask(network=NetworkPolicy(level=Network.FULL, denied_ports=(NATS,)), gpu=Gpu.METAL_COMPUTE)
        allowed = max(rule.line for rule in profile.compiled.rules if rule.action == "allow")
        last = [rule for rule in profile.compiled.rules if rule.line > allowed]
        assert {rule.action for rule in last} == {"deny"}
        for what in ("kern.procargs", f'(remote ip "*:{NATS}")', f'(local ip "*:{NATS}")', "DENIED_3"):
            assert any(what in rule.text for rule in last), what
        assert profile.params["DENIED_3"] == f"{DATA}/launcher.sock"

    def test_never_names_every_operation_that_is_allowed_on_a_path(self) -> None:
        """A denial on a wildcard does not undo a grant on a more specific operation."""
        profile = ask(
            PathRule("/srv", "rwx", "volume"),
            groups=tuple(GROUPS),
            devices=(Device(path="/dev/x"),),
            network=NetworkPolicy(level=Network.FULL, unix_sockets=("/s",)),
        )
        never = {in_rule(name) for name in ALL_ON_PATHS.split()} | {"file-test-existence"}
        for rule in profile.compiled.rules:
            if rule.action == "allow" and re.search(r"\((?:literal|subpath|regex) ", rule.text):
                assert in_rule(rule.operation) in never, rule.text
        files = {name for name in never if "file*" in chain(name)}
        assert {"file-read*", "file-write*", "file-link", "file-clone", "file-test-existence"} <= files

    def test_it_is_deterministic_and_in_any_order_the_same(self) -> None:
        rules = [PathRule(f"/Users/w/{name}", "r", "volume") for name in "dbca"]
        assert built(*rules) == built(*rules)
        assert built(*rules).text == built(*reversed(rules)).text
        assert built(*rules).params == built(*reversed(rules)).params
        assert built(groups=("tls", "git")).text == built(groups=("git", "tls", "git")).text

    def test_no_path_of_the_policy_stands_in_the_text(self) -> None:
        profile = built(
            PathRule("/Users/w/volume", "rw", "volume"),
            network=NetworkPolicy(level=Network.FULL, unix_sockets=("/Users/w/s.sock",)),
            mach_lookup=("com.example.secret",),
            devices=(Device(path="/dev/odd"),),
            groups=("sockets", "realpath"),
        )
        for value in ("/Users", "com.example", "/dev/odd"):
            assert value not in profile.text
        assert set(re.findall(r'\(param "([A-Z_0-9]+)"\)', profile.text)) == set(profile.params)

    def test_lines_fit_a_page_and_sections_have_names(self) -> None:
        text = built(
            groups=tuple(GROUPS), gpu=Gpu.METAL_COMPUTE, network=NetworkPolicy(level=Network.FULL)
        ).text
        assert max(len(line) for line in text.splitlines()) <= 110
        sections = re.findall(r"^; --- (.+)$", text, re.MULTILINE)
        assert len(sections) == len(set(sections))
        assert sections[0] == "what (deny default) does not cover"
        assert sections[-1].startswith("never: ")

    def test_a_rule_never_grows_too_long(self) -> None:
        rules = [PathRule(f"/Users/w/{'x' * 200}/{number:04}", "r", "volume") for number in range(30)]
        sockets = tuple(f"/Users/w/{'y' * 200}/{number:04}" for number in range(75))
        profile = ask(*rules, network=NetworkPolicy(unix_sockets=sockets))
        sizes: dict[int, int] = {}
        for rule in profile.compiled.rules:
            names = re.findall(r'\(param "([A-Z_0-9]+)"\)', rule.text)
            sizes[rule.line] = sum(len(profile.params[name]) + 16 for name in names)
        assert MAX_RULE_BYTES // 2 < max(sizes.values()) <= MAX_RULE_BYTES
        assert all(profile.allows("file-read-data", path=f"{rule.path}/f") for rule in rules)
        assert all(profile.allows("network-outbound", path=socket) for socket in sockets)
        assert profile.compiled.warnings == ()

    def test_a_profile_that_is_too_long_is_refused(self) -> None:
        for size, count in ((10, 600), (200, 200)):  # by its text, by its values
            rules = [PathRule(f"/w/{'x' * size}{number}", "r", "volume") for number in range(count)]
            with pytest.raises(CreateFailed, match="bytes"):
                built(*rules)
            fits = built(*rules[: count // 3])
            assert len(fits.text) + sum(map(len, fits.params.values())) < MAX_PROFILE_BYTES

    def test_an_instance_that_is_no_tag(self) -> None:
        for instance in ('x"))(allow default)', "", "a b", "a\n"):
            with pytest.raises(Internal):
                built(instance=instance)
        with pytest.raises(Internal):
            built(run=-1)

    def test_an_origin_cannot_leave_its_comment(self) -> None:
        text = built(PathRule("/Users/w/x", "r", "volume\n(allow default)")).text
        assert "(allow default)" not in text
        assert "\n(allow default" not in text

    def test_an_unknown_group_is_named(self) -> None:
        with pytest.raises(InvalidSpec, match="'nope'") as caught:
            built(groups=("nope",))
        assert caught.value.field == "spec.sandbox.groups"


# Operations that our rules name: in libsandbox's table of macOS 10.15 (0xbf00/simbple, catalina/operations.c), the
# last three by the names that its sbpl_v1.scm and WebKit's com.apple.WebProcess.sb.in (shm-read*) have for them.
KNOWN_TO_ALL = """
default file-clone file-ioctl file-link file-map-executable file-read* file-read-data file-read-metadata
file-test-existence file-write* file-write-data file-write-setugid file-write-unlink iokit-get-properties
iokit-open ipc-posix-shm-read-data ipc-posix-shm-write-create ipc-posix-shm-write-data
ipc-posix-shm-write-unlink ipc-sysv* mach-cross-domain-lookup mach-lookup network-bind network-inbound
network-outbound nvram* process-exec* process-fork process-info* process-info-codesignature pseudo-tty signal
sysctl* sysctl-read sysctl-write system-info system-privilege system-socket user-preference-read
ipc-posix-sem ipc-posix-shm ipc-posix-shm-read*
"""
# Filters that need no release: each stands in a profile named in docs/seatbelt.md that is used before macOS 26.
FILTERS_OF_ALL = """
extension global-name iokit-property iokit-user-client-class ipc-posix-name ipc-posix-name-prefix
ipc-posix-name-regex literal local local-name param preference-domain regex remote require-all socket-domain
socket-protocol subpath sysctl-name sysctl-name-prefix target vnode-type with xpc-service-name
xpc-service-name-prefix
"""


def words(release: int) -> tuple[set[str], set[str]]:
    """All operations and filters that the rules of a release name."""
    operations: set[str] = set()
    filters: set[str] = set()
    for level in Network:
        for gpu in Gpu:
            text = built(
                PathRule(f"{ROOT}/ro", "r", "volume"),
                release=release,
                gpu=gpu,
                groups=tuple(GROUPS),
                mach_lookup=("x",),
                devices=(Device(path="/dev/x"),),
                network=NetworkPolicy(
                    level=level, bind_ports=(1,), connect_ports=(2,), denied_ports=(3,), unix_sockets=("/s",)
                ),
            ).text
            text = re.sub(r'"(?:[^"\\]|\\.)*"', "", re.sub(r"(?m)^;.*$", "", text))
            for rule in re.finditer(r"\((?:allow|deny)((?:\s+[a-z*-]+)+)", text):
                operations |= set(rule[1].split())
            filters |= set(re.findall(r"\(([a-z-]+)", text)) - {"version", "allow", "deny"}
    return operations, filters


@pytest.mark.parametrize("release", range(12, 27))
def test_no_release_is_given_a_name_that_it_may_not_know(release: int) -> None:
    """One unknown word, and no container starts there (S16)."""
    operations, filters = words(release)
    fine = {"iokit-open-service", "iokit-open-user-client"}
    fine_filters = {"iokit-registry-entry-class", "iokit-registry-entry-class-prefix"}
    assert operations == set(KNOWN_TO_ALL.split()) | (fine if release >= 26 else set())
    assert filters == set(FILTERS_OF_ALL.split()) | (fine_filters if release >= 26 else set())


class TestCanonical:
    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ("/tmp", "/private/tmp"),
            ("/tmp/x", "/private/tmp/x"),
            ("/var/folders/x", "/private/var/folders/x"),
            ("/etc/hosts", "/private/etc/hosts"),
            ("/tmpx", "/tmpx"),
            ("/private/tmp/x", "/private/tmp/x"),
            ("/a//b/./c/", "/a/b/c"),
            ("//a", "/a"),
            ("/ü b", "/ü b"),
            ("/System/Volumes/Data/Users/w", "/Users/w"),
            ("/System/Volumes/Data/srv", "/System/Volumes/Data/srv"),
            ("/System/Volumes/Data", "/System/Volumes/Data"),
        ],
    )
    def test_paths(self, given: str, expected: str) -> None:
        assert canonical(given) == expected

    @pytest.mark.parametrize(
        "path", ["", "a", "./a", "/a/../b", "/..", "/a\nb", "/a\0", "/\x7f", "/\x1b[0m", "/\ud800"]
    )
    def test_no_paths(self, path: str) -> None:
        with pytest.raises(InvalidSpec):
            canonical(path)

    @pytest.mark.parametrize("letter", ["x", "ü", "\udcff"])
    def test_the_longest_path(self, letter: str) -> None:
        size = len(os.fsencode(letter))
        longest = "/" + letter * (1022 // size)
        assert longest in built(PathRule(longest, "r", "volume")).params.values()
        with pytest.raises(InvalidSpec, match="bytes"):
            canonical(longest + "xx")
        with pytest.raises(InvalidSpec, match="bytes"):
            built(mach_lookup=(letter * 1024,))


hostile = st.one_of(
    st.text(
        st.characters(min_codepoint=32, exclude_characters="\x7f/", codec="utf-8"), min_size=1, max_size=40
    ),
    st.sampled_from(
        [
            'x") (allow default) ("',
            "a\\",
            'a\\"b',
            "#|",
            "|#",
            "; x",
            "(param",
            '"',
            "')",
            "#t",
            '#"raw"',
            "...",
        ]
    ),
).filter(lambda name: name not in (".", ".."))


@settings(max_examples=100, deadline=None)
@given(names=st.lists(hostile, min_size=1, max_size=4, unique=True), service=hostile)
def test_nothing_from_outside_is_read_as_text(names: list[str], service: str) -> None:
    rules = [PathRule(f"/Users/w/{name}", "rw", "volume") for name in names]
    changes: dict[str, Any] = {
        "mach_lookup": (service,),
        "network": NetworkPolicy(level=Network.NONE, unix_sockets=tuple(f"/s/{name}" for name in names)),
        "devices": tuple(Device(path=f"/dev/x/{name}") for name in names),
        "groups": ("realpath", "sockets"),
    }
    profile = built(*rules, **changes)
    count = range(len(names))
    plain = built(
        *(PathRule(f"/Users/w/plain{number}", "rw", "volume") for number in count),
        mach_lookup=("plain",),
        network=NetworkPolicy(
            level=Network.NONE, unix_sockets=tuple(f"/s/plain{number}" for number in count)
        ),
        devices=tuple(Device(path=f"/dev/x/plain{number}") for number in count),
        groups=("realpath", "sockets"),
    )
    assert profile.text == plain.text
    asked = Asked(profile, 15)
    assert all(asked.allows("file-write-data", path=f"/Users/w/{name}/f") for name in names)
    assert asked.allows("mach-lookup", name=service)
    assert not asked.allows("file-read-data", path="/Users/w/elsewhere of all/f")


def test_the_struct_is_what_the_launcher_takes() -> None:
    made: Sbpl = build_profile(policy(), release=12)
    assert made.text.isascii()
    assert all("\0" not in value for value in made.params.values())
