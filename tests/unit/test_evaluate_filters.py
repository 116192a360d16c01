"""What each filter matches, and what it leaves open: paths, names, files, processes, sockets, addresses."""

from typing import Any

import pytest

from worker.platform.darwin.evaluate import Argument, Rejected, compile_profile, evaluate
from worker.platform.darwin.sbpl_paths import ancestors, never_matches, real_path
from worker.platform.darwin.sbpl_regex import MAX_PATTERN_BYTES, Regex, compiled
from worker.platform.darwin.sbpl_request import TARGETS

B = "(version 1)(deny default)"


def allows(filter_: str, operation: str, **argument: Any) -> str:
    return evaluate(f"{B}(allow {operation} {filter_})", {}, operation, Argument(**argument)).decision


class TestPaths:
    @pytest.mark.parametrize(
        ("asked", "seen"),
        [
            ("/tmp/x", "/private/tmp/x"),
            ("/tmp", "/private/tmp"),
            ("/tmpx", "/tmpx"),
            ("/var/folders", "/private/var/folders"),
            ("/etc/hosts", "/private/etc/hosts"),
            ("/private/tmp", "/private/tmp"),
            ("/a//b/./c/", "/a/b/c"),
            ("//a", "/a"),
            ("/a/../b", "/b"),
            ("/tmp/../x", "/private/x"),
            ("/..", "/"),
            ("/", "/"),
            ("/home/w", "/System/Volumes/Data/home/w"),
            ("/System/Volumes/Data/Users/w", "/Users/w"),
            ("/System/Volumes/Data/usr/local/x", "/usr/local/x"),
            ("/System/Volumes/Data/private/tmp", "/private/tmp"),
            ("/System/Volumes/Data/usr/bin", "/System/Volumes/Data/usr/bin"),
            ("/System/Volumes/Data", "/System/Volumes/Data"),
        ],
    )
    def test_as_the_kernel_sees_them(self, asked: str, seen: str) -> None:
        assert real_path(asked, follow=True) == seen
        assert allows(f'(literal "{seen}")', "file-read-data", path=asked) == "allow"

    def test_a_link_itself(self) -> None:
        for operation in ("file-read-metadata", "file-write-unlink"):
            assert allows('(literal "/tmp")', operation, path="/tmp") == "allow"
            assert allows('(literal "/private/tmp")', operation, path="/tmp") == "deny"
            assert allows('(literal "/private/tmp")', operation, path="/tmp", vnode="DIRECTORY") == "allow"
        assert allows('(literal "/tmp")', "file-read-data", path="/tmp") == "deny"
        assert allows('(literal "/tmp")', "file-read-xattr", path="/tmp", vnode="SYMLINK") == "allow"

    def test_where_a_link_leads_is_told(self) -> None:
        assert allows('(subpath "/data")', "file-read-data", path="/a/link", real="/data/x") == "allow"
        assert allows('(subpath "/a")', "file-read-data", path="/a/link", real="/data/x") == "deny"

    @pytest.mark.parametrize(
        ("filter_", "path", "expected"),
        [
            ('(literal "/a")', "/a", "allow"),
            ('(path "/a")', "/a", "allow"),
            ('(path-literal "/a")', "/a", "allow"),
            ('(literal "/a" "/b")', "/b", "allow"),
            ('(subpath "/")', "/a/b", "allow"),
            ('(subpath "/a" "/c")', "/c/d", "allow"),
            ('(prefix "/a/")', "/a", "deny"),
            ('(prefix "/a/")', "/a/b", "allow"),
            ('(path-regex #"^/a$")', "/a", "allow"),
            ('(path-ancestors "/a/b" "/c/d")', "/c", "allow"),
            ('(require-not (subpath "/a"))', "/b", "allow"),
            ('(require-any (literal "/a") (literal "/b"))', "/b", "allow"),
            ('(require-all (subpath "/a") (subpath "/a/b"))', "/a/c", "deny"),
            ('(mount-relative-subpath "/a")', "/a", "unknown"),
            ('(require-all (literal "/a") (mount-relative-literal "/a"))', "/b", "deny"),
            ('(require-any (literal "/a") (mount-relative-literal "/a"))', "/a", "allow"),
            ('(require-not (mount-relative-literal "/a"))', "/a", "unknown"),
            ('(literal "/A")', "/a", "unknown"),
            ('(subpath "/Users/w")', "/users/W/x", "unknown"),
            ('(prefix "/Us")', "/users", "unknown"),
            ('(subpath "/é")', "/e\u0301/x", "unknown"),
            ('(require-all (subpath "/A") (literal "/b"))', "/a", "deny"),
            ('(regex #"^/A")', "/a", "deny"),
        ],
    )
    def test_filters(self, filter_: str, path: str, expected: str) -> None:
        assert allows(filter_, "file-read-data", path=path) == expected

    def test_strict_ancestors(self) -> None:
        assert ancestors("/a/b/c") == ("/", "/a", "/a/b")
        assert ancestors("/a") == ("/",)
        assert ancestors("/") == ()

    @pytest.mark.parametrize(
        ("path", "mode", "dead"),
        [
            ("/a/b", "subpath", False),
            ("/", "subpath", False),
            ("/", "literal", False),
            ("/a/", "subpath", True),
            ("/a/", "literal", True),
            ("/a/", "prefix", False),
            ("/a//b", "prefix", True),
            ("/a/./b", "literal", True),
            ("/a/..", "literal", True),
            ("/a/../b", "subpath", True),
            ("/a/.", "prefix", False),
            ("/a/..b", "literal", False),
            ("a/b", "literal", True),
            ("", "prefix", False),
            ("", "literal", True),
            ("/tmp", "literal", False),
            ("/tmp", "subpath", True),
            ("/tmp/x", "literal", True),
            ("/var/run/x", "subpath", True),
            ("/tmp/", "prefix", True),
            ("/tmp", "prefix", False),
            ("/private/tmp/x", "subpath", False),
            ("/System/Volumes/Data/Users", "subpath", True),
        ],
    )
    def test_what_no_request_ever_has(self, path: str, mode: str, dead: bool) -> None:
        assert (never_matches(path, mode=mode) is not None) is dead


class TestExpressions:
    @pytest.mark.parametrize(
        ("pattern", "text", "expected"),
        [
            ("a", "xax", True),
            ("^a", "xa", False),
            ("a$", "ax", False),
            ("^a$", "a", True),
            ("^/dev/ttys[0-9]+$", "/dev/ttys001", True),
            ("^/dev/ttys[0-9]+$", "/dev/ttys", False),
            ("^/dev/ttys[0-9]*$", "/dev/ttys", True),
            ("^/dev/ttys?$", "/dev/tty", True),
            (r"^/Applications/Xcode[^/]*\.app(/|$)", "/Applications/Xcode-15.app", True),
            (r"^/Applications/Xcode[^/]*\.app(/|$)", "/Applications/Xcode.app/Contents", True),
            (r"^/Applications/Xcode[^/]*\.app(/|$)", "/Applications/Xcode.apple", False),
            (r"\.key$", "/a/b.key", True),
            (r"\.key$", "/a/bXkey", False),
            ("(^|/)x$", "x", True),
            ("(^|/)x$", "/a/x", True),
            ("(^|/)x$", "/ax", False),
            ("^(a|b)+c$", "abbac", True),
            ("^(ab)*$", "abab", True),
            ("^(ab)*$", "aba", False),
            ("^.$", "\n", True),
            ("^...$", "é.", True),
            ("é", "/é/x", True),
            ("[]]", "]", True),
            ("[^]a]", "]a", False),
            ("[a-c-]", "-", True),
            (r"[^\.]", ".", False),
            ("", "", True),
            ("()", "x", True),
            ("a|", "x", True),
            ("x*", "", True),
            ("$", "x", True),
            ("^", "x", True),
            ("a^b", "ab", False),
            ("a}", "a}", True),
            (r"\(\)", "()", True),
            (r"^\\$", "\\", True),
            (r"\d", "1", None),
            ("a{2}", "aa", None),
            ("[[:alpha:]]", "a", None),
            ("(?i)a", "a", None),
            ("a*?", "a", None),
            ("[é]", "é", None),
        ],
    )
    def test_search(self, pattern: str, text: str, expected: bool | None) -> None:
        assert compiled(pattern).search(text) is expected
        assert (compiled(pattern).unconfirmed is None) is (expected is not None)

    @pytest.mark.parametrize(
        "pattern",
        ["(", ")", "a)", "(a", "[", "[a", "[]", "*", "+a", "(*a)", "a|*", "\\", "[z-a]", "[a-", "(" * 40],
    )
    def test_what_is_no_expression(self, pattern: str) -> None:
        with pytest.raises(Rejected):
            Regex(pattern)

    def test_a_long_one(self) -> None:
        Regex("a" * MAX_PATTERN_BYTES)
        with pytest.raises(Rejected):
            Regex("a" * (MAX_PATTERN_BYTES + 1))

    @pytest.mark.parametrize(
        "pattern",
        [
            "(a*)*b",
            "(a|a)*b",
            "(a|aa)+$b",
            "(.*)(.*)(.*)(.*)x",
            "^(([a-z])+.)+[A-Z]([a-z])+$",
            "(a?){1}b",
            "a?" * 500,
        ],
    )
    def test_what_makes_others_backtrack_for_ever(self, pattern: str) -> None:
        assert compiled(pattern).search("a" * 1000) is not None or compiled(pattern).unconfirmed

    def test_many_states_are_bounded(self) -> None:
        expression = Regex("(a|b)*a" + "(a|b)" * 150 + "c")
        text = "".join("ab"[number * number % 7 % 2] for number in range(1000))
        assert expression.search(text) is False
        assert expression.search(text + "a" + "b" * 150 + "c") is True

    def test_in_a_filter(self) -> None:
        assert allows(r'(regex #"^/a/\d")', "file-read-data", path="/a/1") == "unknown"
        assert allows('(regex #"^/a" #"^/b")', "file-read-data", path="/b/c") == "allow"
        assert allows('(regex "^/a\\\\.b$")', "file-read-data", path="/a.b") == "allow"
        assert allows('(regex #"^/a\\"b$")', "file-read-data", path='/a"b') == "allow"
        with pytest.raises(Rejected, match="regex: a \\( that is never closed") as caught:
            compile_profile(f'{B}\n(allow file-read* (regex #"(a"))', {})
        assert caught.value.line == 2


class TestNames:
    @pytest.mark.parametrize(
        ("filter_", "operation"),
        [
            ("sysctl-name", "sysctl-read"),
            ("ipc-posix-name", "ipc-posix-sem-open"),
            ("global-name", "mach-lookup"),
            ("preference-domain", "user-preference-read"),
            ("preference-domain", "managed-preference-read"),
            ("iokit-property", "iokit-set-properties"),
            ("info-type", "system-info"),
            ("mac-policy-name", "system-mac-syscall"),
            ("xattr", "file-read-xattr"),
            ("control-name", "network-outbound"),
            ("nvram-variable", "nvram-get"),
            ("right-name", "authorization-right-obtain"),
            ("extension-class", "file-issue-extension"),
            ("notification-name", "distributed-notification-post"),
            ("appleevent-destination", "appleevent-send"),
        ],
    )
    def test_whole_by_prefix_and_by_expression(self, filter_: str, operation: str) -> None:
        assert allows(f'({filter_} "a.b")', operation, name="a.b") == "allow"
        assert allows(f'({filter_} "a.b")', operation, name="a.bc") != "allow"
        assert allows(f'({filter_}-prefix "a.")', operation, name="a.b") == "allow"
        assert allows(f'({filter_}-regex #"^a[.]b$")', operation, name="a.b") == "allow"
        assert allows(f'({filter_}-regex #"^a[.]b$")', operation, name="aXb") != "allow"
        assert allows(f'({filter_} "a")', operation) == "unknown"

    def test_the_spelling_of_names_counts(self) -> None:
        assert allows('(global-name "A")', "mach-lookup", name="a") == "deny"

    @pytest.mark.parametrize("kind", ["global", "local", "xpc"])
    def test_kinds_of_services_are_apart(self, kind: str) -> None:
        names = {"global": "global-name", "local": "local-name", "xpc": "xpc-service-name"}
        for other, filter_ in names.items():
            expected = "allow" if other == kind else "deny"
            assert allows(f'({filter_} "x")', "mach-lookup", name="x", kind=kind) == expected
            assert allows(f'({filter_}-prefix "")', "mach-lookup", name="x", kind=kind) == expected

    def test_an_iokit_class_has_two_spellings(self) -> None:
        for filter_ in ("iokit-user-client-class", "iokit-registry-entry-class"):
            for operation in ("iokit-open-user-client", "iokit-open-service"):
                assert allows(f'({filter_} "X")', operation, class_="X") == "allow"
            assert allows(f'({filter_}-prefix "AGX")', "iokit-open", class_="AGXAcceleratorG17G") == "allow"
        assert allows('(iokit-connection "IOGPU")', "iokit-open", connection="IOGPU") == "allow"
        assert allows('(iokit-connection "IOGPU")', "iokit-open", class_="IOGPU") == "unknown"


class TestWordsAndNumbers:
    @pytest.mark.parametrize(
        ("wanted", "given", "expected"),
        [
            ("DIRECTORY", "DIRECTORY", "allow"),
            ("DIRECTORY", "REGULAR-FILE", "deny"),
            ("DIRECTORY SYMLINK", "SYMLINK", "allow"),
            ("CHARACTER-DEVICE", "TTY", "allow"),
            ("TTY", "CHARACTER-DEVICE", "unknown"),
            ("TTY", "TTY", "allow"),
            ("DIRECTORY", None, "unknown"),
        ],
    )
    def test_kinds_of_files(self, wanted: str, given: str | None, expected: str) -> None:
        assert allows(f"(vnode-type {wanted})", "file-read-data", path="/a", vnode=given) == expected

    @pytest.mark.parametrize("given", sorted(TARGETS))
    @pytest.mark.parametrize("wanted", ["self", "pgrp", "others", "children", "same-sandbox", "initproc"])
    def test_targets(self, given: str, wanted: str) -> None:
        expected = {True: "allow", False: "deny", None: "unknown"}[TARGETS[given].get(wanted, False)]
        assert allows(f"(target {wanted})", "signal", target=given) == expected

    def test_the_targets_that_isolation_rests_on(self) -> None:
        assert allows("(target same-sandbox)", "signal", target="self") == "allow"
        assert allows("(target same-sandbox)", "signal", target="others") == "deny"
        assert allows("(target same-sandbox)", "signal", target="other-container") == "unknown"
        assert allows("(target self)", "signal", target="children") == "deny"
        assert allows("(target self)", "signal") == "unknown"

    @pytest.mark.parametrize(
        ("filter_", "operation", "argument", "expected"),
        [
            ("(signal-number SIGKILL)", "signal", {"number": 9}, "allow"),
            ("(signal-number 9 15)", "signal", {"number": 1}, "deny"),
            ("(signal-number 9)", "signal", {}, "unknown"),
            ("(mac-syscall-number 67)", "system-mac-syscall", {"number": 67}, "allow"),
            ("(ioctl-command #x2000)", "file-ioctl", {"path": "/a", "number": 8192}, "allow"),
            ("(socket-domain AF_SYSTEM)", "system-socket", {"domain": "AF_SYSTEM"}, "allow"),
            ("(socket-domain AF_SYSTEM)", "system-socket", {"domain": "AF_INET"}, "deny"),
            ("(socket-domain AF_UNIX)", "system-socket", {"domain": "AF_LOCAL"}, "allow"),
            ("(socket-domain AF_SYSTEM)", "system-socket", {}, "unknown"),
            ("(socket-type SOCK_RAW)", "system-socket", {"type": "SOCK_STREAM"}, "deny"),
            ("(socket-protocol 2)", "system-socket", {"number": 2}, "allow"),
            ("(file-mode #o0004)", "file-read-data", {"path": "/a", "mode": 0o644}, "allow"),
            ("(file-mode #o0004)", "file-read-data", {"path": "/a", "mode": 0o640}, "deny"),
            ("(file-mode #o0006)", "file-read-data", {"path": "/a", "mode": 0o644}, "unknown"),
            ("(file-mode 0)", "file-read-data", {"path": "/a", "mode": 0o644}, "unknown"),
            ("(file-mode #o0004)", "file-read-data", {"path": "/a"}, "unknown"),
            ("(device-major 1)", "file-read-data", {"path": "/a"}, "unknown"),
            ("(uid 501)", "file-read-data", {"path": "/a", "uid": 501}, "allow"),
            ("(uid 501)", "file-read-data", {"path": "/a"}, "unknown"),
            ('(process-path "/a")', "file-read-data", {"path": "/b", "process": "/a"}, "allow"),
            ("(process-attribute is-plugin)", "file-read-data", {"path": "/a"}, "unknown"),
            ("(semaphore-owner self)", "ipc-posix-sem-open", {"name": "a"}, "unknown"),
            ('(extension "x")', "file-read-data", {"path": "/a"}, "deny"),
            ('(extension "x")', "file-read-data", {"path": "/a", "extensions": ("y", "x")}, "allow"),
        ],
    )
    def test_others(self, filter_: str, operation: str, argument: dict[str, Any], expected: str) -> None:
        assert allows(filter_, operation, **argument) == expected
