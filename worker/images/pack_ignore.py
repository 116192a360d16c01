"""What is left out of an image: patterns with the rules of gitignore(5). Pure.

A pattern with a slash before its end is for that place below the top, one without for any depth; a slash at
its end means directories only. `*` and `?` stop at slashes, `**` does not, `[a-z]` is a set. `!` takes back what
an earlier pattern left out; of several that match, the last one counts. Below a directory that is left out
nothing can be taken back.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from worker.errors import InvalidCommand

FILE_NAME = ".sandfleetignore"
MAX_PATTERNS = 10_000
MAX_PATTERN = 1024


class _Pattern(NamedTuple):
    matches: re.Pattern[str]
    keeps: bool
    directories: bool


class Ignore:
    """Made from lines; asked with paths relative to the top, without a slash in front."""

    def __init__(self, lines: Iterable[str], *, where: str = "--exclude") -> None:
        """InvalidCommand names the line that is no pattern."""
        self._patterns: list[_Pattern] = []
        self.extend(lines, where=where)

    def extend(self, lines: Iterable[str], *, where: str) -> None:
        for number, line in enumerate(lines, start=1):
            pattern = _parse(line, f"{where}, pattern {number}")
            if pattern is not None:
                self._patterns.append(pattern)
        if len(self._patterns) > MAX_PATTERNS:
            raise InvalidCommand(f"more than {MAX_PATTERNS} patterns", field="exclude")

    def leaves_out(self, path: str, *, is_directory: bool) -> bool:
        """Whether the last pattern that matches leaves it out. The directories above have been asked before."""
        for pattern in reversed(self._patterns):
            if (is_directory or not pattern.directories) and pattern.matches.fullmatch(path):
                return not pattern.keeps
        return False


def _parse(line: str, where: str) -> _Pattern | None:
    text = line.rstrip("\r\n")
    # A space at the end counts when it is escaped.
    while text.endswith(" ") and not text.endswith("\\ "):
        text = text[:-1]
    if not text or text.startswith("#"):
        return None
    if len(text) > MAX_PATTERN or "\0" in text:
        raise InvalidCommand(f"{where} is too long or has a NUL", field="exclude")
    keeps = text.startswith("!")
    text = text[1:] if keeps else text
    directories = text.endswith("/")
    text = text[:-1] if directories else text
    anchored = "/" in text
    text = text.removeprefix("/")
    if not text:
        raise InvalidCommand(f"{where} names nothing", field="exclude")
    try:
        expression = re.compile(_expression(text, anchored), re.DOTALL)
    except re.error as failure:
        raise InvalidCommand(f"{where} is no pattern: {failure}", field="exclude") from None
    return _Pattern(expression, keeps, directories)


def _expression(text: str, anchored: bool) -> str:
    parts: list[str] = [] if anchored else ["(?:[^/]+/)*"]
    at = 0
    while at < len(text):
        if text.startswith("**/", at) and (at == 0 or text[at - 1] == "/"):
            parts.append("(?:[^/]+/)*")
            at += 3
        elif text.startswith("/**", at) and at + 3 == len(text):
            parts.append("/.+")
            at += 3
        elif text[at] == "*":
            while text.startswith("*", at):
                at += 1
            parts.append("[^/]*")
        elif text[at] == "?":
            parts.append("[^/]")
            at += 1
        elif text[at] == "[" and (end := _set_end(text, at)) is not None:
            parts.append(_set(text[at + 1 : end]))
            at = end + 1
        elif text[at] == "\\" and at + 1 < len(text):
            parts.append(re.escape(text[at + 1]))
            at += 2
        else:
            parts.append(re.escape(text[at]))
            at += 1
    return "".join(parts)


def _set_end(text: str, at: int) -> int | None:
    """Where a set that begins at `at` ends; `]` may stand first in it."""
    first = at + 2 if text[at + 1 : at + 2] in ("!", "^") else at + 1
    end = text.find("]", first + 1)
    return end if end > 0 else None


def _set(inside: str) -> str:
    negated = inside[0] in "!^"
    chars = inside[1:] if negated else inside
    # Everything but a range's dash is meant as it stands.
    escaped = "".join(char if char == "-" or char.isalnum() else re.escape(char) for char in chars)
    return f"(?!/)[{'^' if negated else ''}{escaped}]"
