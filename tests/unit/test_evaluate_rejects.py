"""What the real compiler refuses, the evaluator refuses, and says in which line."""

import pytest

from worker.platform.darwin.evaluate import Argument, Rejected, compile_profile, evaluate

B = "(version 1)\n(deny default)\n"


def refused(text: str, params: dict[str, str] | None = None, release: int | None = None) -> Rejected:
    with pytest.raises(Rejected) as caught:
        compile_profile(text, params or {}, release=release)
    return caught.value


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("", 1, "begins with (version 1)"),
        ("; nothing\n", 1, "begins with (version 1)"),
        ("(deny default)", 1, "begins with (version 1)"),
        ("(deny default)(version 1)", 1, "begins with (version 1)"),
        ("\n(version 2)(deny default)", 2, "version 2"),
        ("(version 3)(deny default)", 1, "version 3"),
        ('(version "1")(deny default)', 1, "expects a number"),
        ("(version)(deny default)", 1, "expects a number"),
        ("(version 1)", None, "no rule on default"),
        ("(version 1)(allow file-read*)", None, "no rule on default"),
        (f"{B}(allow file-read*", 3, "never closed"),
        (f"{B}(allow file-read* (subpath \"/a\")\n", 3, "never closed"),
        (f"{B}\n)", 4, "closing parenthesis"),
        (f"{B}allow", 3, "outside of any form"),
        (f'{B}"text"', 3, "outside of any form"),
        (f"{B}; a comment\n#| block |#", 4, "nothing that profiles"),
        (f'{B}(allow file-read* (subpath "/a))', 3, "never ends"),
        (f'{B}; "comment"\n  (allow file-read* (subpath "/a\n', 4, "never ends"),
        (f'{B}(allow file-read* (regex #"/a))', 3, "never ends"),
        (f"{B}(allow file-read* (subpath '/a))", 3, "nothing that profiles"),
        (f"{B}(allow file-read* \0)", 3, "NUL"),
        (f'{B}(allow file-read* (subpath "/a\\n"))', 3, "escape"),
        (f'{B}(allow file-read* (subpath "/\\u00e9"))', 3, "escape"),
        (f"{B}()", 3, "does not begin with a name"),
        (f"{B}((allow) file-read*)", 3, "does not begin with a name"),
        (f'{B}(import "bsd.sb")', 3, "import"),
        (f'{B}(trace "/a")', 3, "trace"),
        (f'{B}(for-each allow (list "/a"))', 3, "for-each"),
        (f'{B}(with-filter (process-path "/a") (allow file-read*))', 3, "with-filter"),
        (f"{B}(let ((a 1)) (allow file-read*))", 3, "let"),
        (f"{B}(allow)", 3, "names no operation"),
        (f'{B}(allow (subpath "/a"))', 3, "names no operation"),
        (f'{B}(allow "file-read*")', 3, "neither an operation nor a filter"),
        (f"{B}(allow 1)", 3, "neither an operation nor a filter"),
        (f"{B}(allow file-raed*)", 3, "file-raed*"),
        (f"{B}(allow file-read* file-raed)", 3, "file-raed"),
        (f'{B}(allow file-read*\n (subpaht "/a"))', 4, "no filter subpaht"),
        (f'{B}(allow file-read* (home-subpath "/a"))', 3, "no filter home-subpath"),
        (f"{B}(allow file-read* subpath)", 3, "without its parentheses"),
        (f"{B}(allow file-read* (subpath))", 3, "expects string"),
        (f"{B}(allow file-read* (subpath 1))", 3, "expects string"),
        (f'{B}(allow file-read* (subpath (literal "/a")))', 3, "expects string"),
        (f"{B}(allow file-read* (subpath somewhere))", 3, "expects string"),
        (f'{B}(allow file-read* (path-ancestors "a"))', 3, "must start with a /"),
        (f"{B}(allow file-read* (vnode-type FILE))", 3, "does not know FILE"),
        (f'{B}(allow file-read* (vnode-type "FIFO"))', 3, "expects names"),
        (f"{B}(allow signal (target everybody))", 3, "does not know everybody"),
        (f'{B}(allow file-read* (file-mode "4"))', 3, "expects numbers"),
        (f"{B}(allow file-read* (require-all))", 3, "expects filters"),
        (f"{B}(allow file-read* (require-any 1))", 3, "expects filters"),
        (f'{B}(allow file-read* (require-not (literal "/a") (literal "/b")))', 3, "expects one filter"),
        (f'{B}(allow file-read* (subpath (param "X")))', 3, 'param "X") is not set'),
        (f"{B}(allow file-read* (subpath (param X)))", 3, "param takes"),
        (f'{B}(allow file-read* (subpath (string-append "/a" (param "X"))))', 3, "string-append takes strings"),
        (f'{B}(define (f x) (subpath x))', 3, "define takes"),
        (f'{B}(define subpath "/a")', 3, "cannot be defined anew"),
        (f'{B}(define allow "/a")', 3, "cannot be defined anew"),
        (f'{B}(define file-read* "/a")', 3, "cannot be defined anew"),
        (f"{B}(define x y)", 3, "no name y"),
        (f'{B}(if (param "X"))', 3, "if takes"),
        (f'{B}(when (param "X"))', 3, "when takes"),
        (f'{B}(if #t "a")', 3, "where a rule is expected"),
        (f'{B}(if (equal? "a" "b") (allow file*))', 3, "no filter equal?"),
    ],
)  # fmt: skip
def test_a_text_that_does_not_compile(text: str, line: int | None, reason: str) -> None:
    found = refused(text)
    assert reason in str(found)
    assert found.line == line
    verdict = evaluate(text, {}, "file-read-data", Argument(path="/a"))
    assert (verdict.decision, verdict.line, verdict.rule) == ("reject", line, None)
    assert verdict.reason == str(found)


@pytest.mark.parametrize(
    ("filter_", "operation"),
    [
        ('(global-name "x")', "file-read*"),
        ('(subpath "/x")', "mach-lookup"),
        ('(subpath "/x")', "process-fork"),
        ('(subpath "/x")', "default"),
        ('(sysctl-name "x")', "file*"),
        ('(remote ip "*:80")', "file-write*"),
        ('(remote unix-socket (subpath "/x"))', "process-exec"),
        ("(target self)", "file-read*"),
        ("(target self)", "process-fork"),
        ("(vnode-type FIFO)", "sysctl-read"),
        ('(iokit-user-client-class "x")', "mach-lookup"),
        ('(preference-domain "x")', "file-read*"),
        ("(socket-domain AF_SYSTEM)", "file-read*"),
        ('(ipc-posix-name "x")', "ipc-sysv-shm"),
        ('(xattr "x")', "file-read-data"),
        ("(signal-number SIGKILL)", "process-fork"),
    ],
)
def test_a_filter_on_the_wrong_operation(filter_: str, operation: str) -> None:
    name = filter_.strip("()").split()[0]
    for inside in (filter_, f"(require-not (require-all {filter_}))"):
        found = refused(f"{B}(allow {operation} {inside})")
        assert f"the filter {name} does not apply" in str(found)
        assert found.line == 3


@pytest.mark.parametrize(
    "text",
    [
        '(allow network* (remote ip "*:80") (literal "/a"))',
        '(allow process-info* (target same-sandbox))',
        '(allow process* (target self))',
        '(allow ipc-posix* (ipc-posix-name "x"))',
        '(allow file* (xattr "x"))',
        '(allow file-read* network-outbound (literal "/a"))',
        '(allow mach-lookup mach-register (global-name "a") (local-name-prefix "b") (xpc-service-name-regex "c"))',
        '(allow iokit-open iokit-get-properties (iokit-registry-entry-class-prefix "AGX" "IOGPU"))',
        "(allow system-socket (require-all (socket-domain AF_SYSTEM) (socket-protocol 2)) (socket-domain AF_ROUTE))",
        '(allow system-mac-syscall (require-all (mac-policy-name "Sandbox") (mac-syscall-number 67)))',
        '(allow file-read* (process-path "/a") (uid 501) (process-attribute is-plugin) (extension "x"))',
        "(allow file-read* (file-mode #o0004))",
        "(allow file-ioctl (ioctl-command 1074030207 #x2000))",
        "(allow network-outbound (remote udp4) (remote tcp6 \"localhost:*\") (to ip \"*:1\") (from ip))",
        '(allow network-outbound (remote unix-socket) (remote unix-socket (path-literal "/a")))',
        "(version 1)",
        "(debug deny)",
        "(debug all 1 \"x\")",
        '(define home "/Users/w")(allow file-read* (subpath home) (subpath (string-append home "/x")))',
        '(define mine (require-any (subpath "/a") (literal "/b")))(allow file-read* mine)',
        '(if (param "X") (allow file-read* (subpath (param "X"))))',
        '(when (param "X") (allow file-read*) (allow file-write*))',
        '(allow file-read* (subpath (if (param "X") (param "X") "/a")))',
        "(allow file-unlink file-write-mount file-write-unmount file-fsctl time-set ipc-posix-sem iokit-open)",
        "(allow process-exec process-exec-interpreter process-exec* mach-per-user-lookup)",
        "; ünïcode (\n#;",
    ],
)  # fmt: skip
def test_a_text_that_compiles(text: str) -> None:
    if "#;" in text:
        refused(B + text)
    else:
        assert compile_profile(B + text, {}).rules


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("127.0.0.1:80", "host must be * or localhost"),
        ("[::1]:80", "host must be * or localhost"),
        ("example.com:443", "host must be * or localhost"),
        ("192.168.1.0/24", "port missing"),
        ("localhost", "port missing"),
        ("*", "port missing"),
        ("localhost:0", "invalid port"),
        ("*:65536", "invalid port"),
        ("*:1-100", "invalid port"),
        ("*:http", "invalid port"),
        ("*:", "invalid port"),
        ("*:²", "invalid port"),
        (":80", "host must be"),
        ("", "port missing"),
    ],
)
@pytest.mark.parametrize("side", ["remote", "local"])
def test_an_address_that_is_none(side: str, host: str, reason: str) -> None:
    found = refused(f'{B}(allow network-bind\n ({side} ip "{host}"))')
    assert reason in str(found)
    assert found.line == 4


@pytest.mark.parametrize(
    ("rest", "reason"),
    [
        ("", "expects a protocol"),
        ('"localhost:80"', "expects a protocol"),
        ('sctp "*:80"', "no protocol"),
        ("ip 80", "expects string argument"),
        ('ip "*:80" "*:81"', "expects string argument"),
        ('ip (regex #"^192")', "expects string argument"),
        ('unix-socket "/a"', "at most"),
        ("unix-socket (vnode-type SOCKET)", "expects a filter on a path"),
    ],
)
def test_a_side_that_is_none(rest: str, reason: str) -> None:
    assert reason in str(refused(f"{B}(allow network-outbound (remote {rest}))"))


class TestModifiers:
    @pytest.mark.parametrize(
        "rule",
        [
            '(deny default (with message "x"))',
            "(deny file-read* (with no-log))",
            "(deny file-read* (with no-report))",
            "(deny file-read* (with errno EACCES))",
            "(allow file-read* (with report))",
            "(allow process-exec (with no-sandbox))",
            "(allow file-read-metadata (with no-times))",
            "(deny syscall-unix (with send-signal SIGKILL))",
            "(allow file-read* (with telemetry) (with report) (with message \"a\"))",
            "(allow file-read* (with grant))",
            "(deny default (with no-callout) (with partial-symbolication))",
        ],
    )  # fmt: skip
    def test_taken(self, rule: str) -> None:
        compile_profile(B + rule, {})

    @pytest.mark.parametrize(
        ("rule", "reason"),
        [
            ("(allow file-read* (with no-log))", "no-log does not apply to allow"),
            ("(allow file-read* (with errno EPERM))", "errno does not apply to allow"),
            ("(deny file-read* (with report))", "report does not apply to deny"),
            ("(deny process-exec (with no-sandbox))", "no-sandbox does not apply to deny"),
            ("(allow file-read* (with no-sandbox))", "no-sandbox does not apply to file-read*"),
            ("(deny file-read* (with errno 13))", "does not take that"),
            ("(deny file-read* (with errno EVIL))", "does not take that"),
            ("(deny file-read* (with send-signal KILL))", "does not take that"),
            ("(deny file-read* (with message))", "does not take that"),
            ("(deny file-read* (with message 1))", "does not take that"),
            ("(deny file-read* (with no-log 1))", "does not take that"),
            ("(deny file-read* (with))", "no modifier"),
            ("(deny file-read* (with quietly))", "no modifier"),
            ('(deny file-read* (with "no-log"))', "no modifier"),
        ],
    )
    def test_refused(self, rule: str, reason: str) -> None:
        assert reason in str(refused(B + rule))


class TestReleases:
    @pytest.mark.parametrize("name", ["iokit-open-service", "iokit-open-user-client", "iokit-open*"])
    def test_a_name_of_macos_26(self, name: str) -> None:
        text = f'{B}(allow {name} (iokit-user-client-class "x"))'
        for release in (12, 15):
            assert f"{name} is unknown before macOS 26" in str(refused(text, release=release))
        for newer in (26, None):
            compile_profile(text, {}, release=newer)

    def test_the_old_name_is_known_everywhere(self) -> None:
        for release in (12, 26):
            compile_profile(f"{B}(allow iokit-open)", {}, release=release)

    def test_a_release_is_part_of_the_question(self) -> None:
        text = f"{B}(allow iokit-open-service)"
        asked = "iokit-open-service"
        assert evaluate(text, {}, asked, release=15).decision == "reject"
        assert evaluate(text, {}, asked, release=26).decision == "allow"


class TestBounds:
    def test_the_patterns_of_a_rule(self) -> None:
        filters = " ".join(f'(literal "/{"a" * 1000}{number}")' for number in range(70))
        assert "exceeds maximum (65535)" in str(refused(f"{B}(allow file-read* {filters})"))
        long = "/" + "a" * 65535
        assert "65536" in str(refused(f'{B}(allow file-read* (subpath (param "P")))', {"P": long}))
        compile_profile(f'{B}(allow file-read* (subpath (param "P")))', {"P": long[:-1]})

    def test_deep_nesting(self) -> None:
        deep = "(require-not " * 10_000 + '(literal "/a")' + ")" * 10_000
        assert "deep" in str(refused(f"{B}(allow file-read* {deep})"))
        assert "deep" in str(refused("(" * 200_000))

    def test_nesting_by_constants(self) -> None:
        steps = "".join(f"(define f{n + 1} (require-not f{n}))" for n in range(1000))
        assert "deep" in str(refused(f'{B}(define f0 (literal "/a")){steps}'))

    def test_doubling_by_constants(self) -> None:
        filters = "".join(f"(define f{n + 1} (require-all f{n} f{n}))" for n in range(60))
        assert "filters" in str(refused(f'{B}(define f0 (literal "/a")){filters}'))
        texts = "".join(f"(define s{n + 1} (string-append s{n} s{n}))" for n in range(60))
        assert "characters" in str(refused(f'{B}(define s0 "/aaaaaaaaaaaaaaa"){texts}'))
        many = "(define many (require-any " + '(literal "/a") ' * 6_000 + "))"
        assert "filters" in str(refused(f"{B}{many}" + "(allow file-read* many)" * 20))

    def test_the_folders_above_a_long_path(self) -> None:
        text = f'{B}(allow file-read* (path-ancestors (param "P")))'
        assert "path-ancestors" in str(refused(text, {"P": "/a" * 30_000}))
        compile_profile(text, {"P": "/a" * 200})

    def test_a_text_that_is_too_long(self) -> None:
        assert "characters" in str(refused(B + ";" * 300_000))

    def test_a_parameter_with_a_nul(self) -> None:
        assert "NUL" in str(refused(f'{B}(allow file-read* (subpath (param "P")))', {"P": "/a\0b"}))

    def test_numbers_that_no_machine_has(self) -> None:
        assert "nothing that profiles" in str(refused(f"{B}(allow file-read* (file-mode {'9' * 5000}))"))
