"""What compiles and cannot be meant is said, with the line; what is meant is not."""

import pytest

from worker.platform.darwin.evaluate import compile_profile

B = "(version 1)\n(deny default)\n"


def warned(rules: str, **params: str) -> tuple[str, ...]:
    return compile_profile(B + rules, params).warnings


@pytest.mark.parametrize(
    ("rules", "line", "words"),
    [
        ('(allow file-read* (subpath "/a/"))', 3, "ends with a slash"),
        ('(allow file-read*\n (subpath "/b")\n (subpath "/a//b"))', 3, "two slashes"),
        ('(allow file-read* (literal "/a/./b"))', 3, "has a `.`"),
        ('(allow file-read* (literal "/a/../b"))', 3, "has a `..`"),
        ('(allow file-read* (literal "a"))', 3, "not absolute"),
        ('\n(allow file-read* (subpath "/tmp/x"))', 4, "sees /private/tmp/x"),
        ('(allow file-read* (subpath "/var"))', 3, "sees /private/var"),
        ('(allow file-read* (prefix "/etc/ssh"))', 3, "sees /private/etc/ssh"),
        ('(allow file-read* (regex #"^/tmp/x"))', 3, "sees /private/tmp/"),
        ('(allow file-read* (require-all (subpath "/tmp/x") (vnode-type FIFO)))', 3, "never matches"),
        ('(allow file-read* (subpath (param "P")))', 3, "ends with a slash"),
        ('(allow network-outbound (local ip "*:*"))', 3, "opens every outgoing connection"),
        ('(allow network* (require-all (local ip "localhost:*")))', 3, "opens every outgoing connection"),
        ('(allow network-inbound (remote ip "*:80"))', 3, "no known effect"),
        (r'(allow file-read* (regex #"/a\d"))', 3, "unconfirmed"),
        ('(allow file-read* (literal "/a"))\n(deny file-read* (literal "/a"))', 3, "shadowed entirely by that of"),
        ('(allow file-read* (literal "/a") (literal "/b"))\n(deny file-read* (literal "/b") (literal "/a"))', 3,
         "shadowed entirely"),
        ('(allow file-read* (require-any (literal "/a") (literal "/b")))\n'
         '(deny file-read* (require-any (literal "/b") (literal "/a")))', 3, "shadowed entirely"),
        ("(allow process-fork)\n(deny process-fork)", 3, "shadowed entirely"),
        ('(allow iokit-open (iokit-user-client-class "x"))\n(allow iokit-open (iokit-registry-entry-class "x"))', 3,
         "shadowed entirely"),
        ('(allow file-read-data (subpath "/a"))\n(deny file-read* (literal "/a/k"))', 4,
         "does not undo the grant of file-read-data in line 3"),
        ('(allow process-exec (subpath "/a"))\n(deny process* (subpath "/a/b"))', 4, "does not undo"),
        ('(allow sysctl-read (sysctl-name "x"))\n(deny sysctl* (sysctl-name "x"))', 4, "does not undo"),
    ],
)  # fmt: skip
def test_a_warning(rules: str, line: int, words: str) -> None:
    found = warned(rules, P="/a/")
    assert len(found) == 1, found
    assert found[0].startswith(f"line {line}: ")
    assert words in found[0]


@pytest.mark.parametrize(
    "rules",
    [
        '(allow file-read-metadata (literal "/tmp") (literal "/var") (literal "/"))',
        '(allow file-read* (subpath "/"))',
        '(allow file-read* (literal "/a"))\n(deny file-read* (subpath "/a"))',
        '(allow file-read* (literal "/a"))\n(allow file-write* (literal "/a"))',
        '(allow file-read* file-ioctl (literal "/a"))\n(deny file-read* (literal "/a"))',
        '(allow file-read* (literal "/a"))\n(deny file-read*)',
        '(allow file-write-data (literal "/a"))\n(deny file-write*)',
        '(allow file-read-data (subpath "/a"))\n(deny file-read* (literal "/b"))',
        '(deny file-read* (literal "/a/k"))\n(allow file-read-data (subpath "/a"))',
        '(allow file-read-data (subpath "/a"))\n(deny file-read* file-read-data (literal "/a/k"))',
        '(allow network-bind (local ip "*:80"))',
        '(deny network-outbound (local ip "*:80"))',
        "(deny process-info*)\n(allow process-info* (target same-sandbox))",
    ],
)
def test_no_warning(rules: str) -> None:
    assert warned(rules) == ()


def test_a_large_rule() -> None:
    filters = " ".join(f'(literal "/{"a" * 200}{number}")' for number in range(90))
    (found,) = warned(f"(allow file-read* {filters})")
    assert found.startswith("line 3: ")
    assert "split it" in found


def test_a_large_profile() -> None:
    rules = "\n".join(f'(allow file-read* (literal "/{"a" * 200}{number}"))' for number in range(300))
    (found,) = warned(rules)
    assert "the profile has" in found


def test_they_come_in_the_order_of_the_text() -> None:
    found = warned('(allow file-read* (subpath "/b/"))\n(allow file-write* (subpath "/a/"))')
    assert [one.split(":")[0] for one in found] == ["line 3", "line 4"]
