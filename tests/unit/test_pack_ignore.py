"""Patterns of what is left out: a table, and git itself as the judge."""

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker.errors import InvalidCommand
from worker.images.pack_ignore import Ignore

GIT = shutil.which("git")

TABLE = [
    ("*.o", "a.o", True),
    ("*.o", "deep/er/a.o", True),
    ("*.o", "a.oo", False),
    ("/a.o", "sub/a.o", False),
    ("sub/a.o", "sub/a.o", True),
    ("sub/a.o", "x/sub/a.o", False),
    ("**/sub/a.o", "x/y/sub/a.o", True),
    ("a/**/b", "a/b", True),
    ("a/**/b", "a/x/y/b", True),
    ("a/**", "a/x/y", True),
    ("a/**", "a", False),
    ("a*", "a/b", False),
    ("?", "x", True),
    ("/?", "x/y", False),
    ("a?b", "a/b", False),
    ("[a-c]x", "bx", True),
    ("[!a-c]x", "bx", False),
    ("[!a-c]x", "zx", True),
    ("[]]", "]", True),
    ("[a", "[a", True),
    ("\\#x", "#x", True),
    ("\\!x", "!x", True),
    ("#x", "#x", False),
    ("x\\ ", "x ", True),
    ("x  ", "x", True),
    ("a.b", "axb", False),
    ("a+(b)|c", "a+(b)|c", True),
    ("ü*", "übung", True),
]


@pytest.mark.parametrize(("pattern", "path", "left_out"), TABLE)
def test_patterns(pattern: str, path: str, left_out: bool) -> None:
    assert Ignore([pattern]).leaves_out(path, is_directory=False) is left_out


def test_directories_only() -> None:
    ignore = Ignore(["build/"])
    assert ignore.leaves_out("x/build", is_directory=True)
    assert not ignore.leaves_out("x/build", is_directory=False)


def test_the_last_one_counts() -> None:
    ignore = Ignore(["*.o", "!keep.o", "/sub/keep.o"])
    assert ignore.leaves_out("a.o", is_directory=False)
    assert not ignore.leaves_out("keep.o", is_directory=False)
    assert ignore.leaves_out("sub/keep.o", is_directory=False)


@pytest.mark.parametrize("pattern", ["[z-a]", "/", "!", "x" * 2000, "a\0b"])
def test_what_is_no_pattern_is_named(pattern: str) -> None:
    with pytest.raises(InvalidCommand, match="file, pattern 2"):
        Ignore(["fine", pattern], where="file")


@given(st.lists(st.text(), max_size=5), st.text())
def test_any_lines_give_patterns_or_an_error(lines: list[str], path: str) -> None:
    try:
        ignore = Ignore(lines)
    except InvalidCommand:
        return
    assert ignore.leaves_out(path, is_directory=False) in (True, False)


PIECES = st.sampled_from(["a", "b", "*", "?", "[ab]", "/", "**", "ab", "."])
PATHS = ["a", "b", "ab", "a/a", "a/b", "b/ab", "a/a/a", "a/b/ab", "b/a/b/a", "ab/b", ".", "a.b"]


@pytest.mark.skipif(GIT is None, reason="git is not installed")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(PIECES, min_size=1, max_size=5).map("".join), min_size=1, max_size=4))
def test_git_agrees(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    # What git does with `***` and `a**b` is its own.
    lines = [line for line in lines if "***" not in line and line.strip("/")]
    try:
        ignore = Ignore(lines)
    except InvalidCommand:
        return
    paths = [path for path in PATHS if path != "."]
    home: Path = tmp_path_factory.getbasetemp() / "ignore"
    if not home.exists():
        assert GIT is not None
        subprocess.run([GIT, "init", "-q", str(home)], check=True)
    (home / ".gitignore").write_text("\n".join(lines) + "\n")
    assert GIT is not None
    said = subprocess.run(
        [GIT, "-C", str(home), "check-ignore", "--no-index", "-z", "--stdin"],
        input="\0".join(paths) + "\0",
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode in (0, 1), said.stderr
    ignored = {path for path in said.stdout.split("\0") if path}
    assert {path for path in paths if _left_out(ignore, path)} == ignored


def _left_out(ignore: Ignore, path: str) -> bool:
    """As packing asks: the directories above first."""
    parts = path.split("/")
    above = ("/".join(parts[:count]) for count in range(1, len(parts)))
    return any(ignore.leaves_out(one, is_directory=True) for one in above) or ignore.leaves_out(
        path, is_directory=False
    )
