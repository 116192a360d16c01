"""One verb's arguments: argparse with one-line errors, a calm help page and names for shell completion.

argparse because it is loaded in 3 ms: a verb answers before a larger framework has been imported.
"""

import argparse
import os
import shutil
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn

from worker.cli.style import paint

Namespace = argparse.Namespace
# "container", "target" (a container, or a spec's file), "node", "image", "secret", "file", "dir"
Complete = str

MAX_WIDTH = 100
MIN_WIDTH = 40
FLAG_COLUMN = 26


class UsageError(Exception):
    """The command line cannot be understood. `verb` names the help page that explains it."""

    def __init__(self, message: str, *, verb: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.verb = verb


class Parser(argparse.ArgumentParser):
    """The arguments of one verb.

    With `command_tail` the words after the first one are a command: they are kept as they are, so that
    `exec web-0 ls -l` works; `--` may stand before them. They arrive as `command`.
    """

    def __init__(self, verb: str, summary: str, *, command_tail: bool = False) -> None:
        super().__init__(prog=f"sandfleet {verb}", add_help=False, allow_abbrev=False)
        self.verb = verb
        self.summary = summary
        self.details = ""
        self.examples: list[tuple[str, str]] = []
        self.settings: list[tuple[str, str]] = []
        self.completes: dict[str, Complete] = {}
        self.sections: dict[str, list[argparse.Action]] = {}
        self._section: str | None = None
        self._command_tail = command_tail

    def argument(
        self, *names: str, complete: Complete | None = None, hidden: bool = False, **options: Any
    ) -> None:
        """As `add_argument`, and placed on the help page; `complete` says what the shell may offer."""
        action = self.add_argument(*names, **options)
        if complete is not None:
            self.completes[action.dest] = complete
        if not hidden:
            title = self._section or ("Options" if action.option_strings else "Arguments")
            self.sections.setdefault(title, []).append(action)

    @contextmanager
    def section(self, title: str) -> Iterator[None]:
        """Arguments added inside stand under `title` on the help page."""
        before, self._section = self._section, title
        try:
            yield
        finally:
            self._section = before

    def setting(self, name: str, text: str) -> None:
        """A setting that is no argument, for the help page."""
        self.settings.append((name, text))

    def example(self, line: str, meaning: str = "") -> None:
        self.examples.append((line, meaning))

    def read(self, argv: Sequence[str]) -> Namespace:
        """Parse, or raise UsageError."""
        if not self._command_tail:
            return self.parse_intermixed_args(list(argv))
        head, tail = self.split_command(argv)
        args = self.parse_intermixed_args(head)
        args.command = tail
        return args

    def split_command(self, argv: Sequence[str]) -> tuple[list[str], list[str]]:
        """Options and the first word; and the command, which begins at `--` or at the second word."""
        words = position = 0
        while position < len(argv):
            token = argv[position]
            if token == "--":
                rest = list(argv[position + 1 :])
                if words or not rest:
                    return list(argv[:position]), rest
                return [*argv[:position], rest[0]], rest[1:]
            if token.startswith("-") and token != "-":
                position += 2 if self.takes_next(token) else 1
                continue
            words += 1
            if words == 2:
                return list(argv[:position]), list(argv[position:])
            position += 1
        return list(argv), []

    def takes_next(self, token: str) -> bool:
        """Whether the word after this option is its value."""
        flags = {flag: action for action in self._actions for flag in action.option_strings}
        if token.startswith("--"):
            action = flags.get(token)
            return action is not None and action.nargs != 0
        for place, letter in enumerate(token[1:], start=1):
            action = flags.get(f"-{letter}")
            if action is None:
                return False
            if action.nargs != 0:
                return place == len(token) - 1
        return False

    def error(self, message: str) -> NoReturn:
        raise UsageError(_readable(message), verb=self.verb)

    def format_usage(self) -> str:
        words = [self.prog]
        if any(action.option_strings for action in self._actions):
            words.append("[OPTIONS]")
        words += [_metavar(action) for action in self._actions if not action.option_strings]
        if self._command_tail:
            words.append("[--] COMMAND...")
        return " ".join(words)

    def page(self, *, colour: bool) -> str:
        """The help page."""
        width = page_width()
        lines = [f"{paint('Usage:', 'strong', colour)} {self.format_usage()}", ""]
        lines += wrapped(self.summary, width, "  ")
        for paragraph in textwrap.dedent(self.details).strip().split("\n\n"):
            if paragraph:
                lines += ["", *wrapped(" ".join(paragraph.split()), width, "  ")]
        for title, actions in self.sections.items():
            lines += ["", paint(title, "strong", colour)]
            for action in actions:
                lines += two_columns(_flags(action), _help(action), width, colour)
        if self.settings:
            lines += ["", paint("Settings", "strong", colour)]
            for name, text in self.settings:
                lines += two_columns(name, text, width, colour)
        if self.examples:
            lines += ["", paint("Examples", "strong", colour)]
            for line, meaning in self.examples:
                lines.append(f"  {line}" + (paint(f"   # {meaning}", "dim", colour) if meaning else ""))
        return "\n".join(lines) + "\n"


def page_width() -> int:
    return max(MIN_WIDTH, min(shutil.get_terminal_size((80, 24)).columns, MAX_WIDTH))


def wrapped(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def two_columns(left: str, right: str, width: int, colour: bool, column: int = FLAG_COLUMN) -> list[str]:
    """`left`, and beside it (below it when it is long) the text."""
    body = wrapped(right, width - column, "") or [""]
    head = "  " + paint(left, "name", colour)
    if len(left) + 4 > column:
        return [head, *(" " * column + line for line in body)]
    first = head + " " * (column - 2 - len(left)) + body[0]
    return [first.rstrip(), *(" " * column + line for line in body[1:])]


def _metavar(action: argparse.Action) -> str:
    name = str(action.metavar or action.dest.upper())
    if action.nargs == "*":
        return f"[{name}...]"
    if action.nargs == "+":
        return f"{name}..."
    return f"[{name}]" if action.nargs == "?" else name


def _flags(action: argparse.Action) -> str:
    if not action.option_strings:
        return _metavar(action)
    flags = ", ".join(action.option_strings)
    if action.nargs == 0:
        return flags
    if action.choices is not None and action.metavar is None:
        return f"{flags} {'|'.join(str(choice) for choice in action.choices)}"
    return f"{flags} {action.metavar or action.dest.upper()}"


def _help(action: argparse.Action) -> str:
    return action.help or ""


def _readable(message: str) -> str:
    """argparse's own sentences in the words of the other errors."""
    prefix = "the following arguments are required: "
    if message.startswith(prefix):
        return f"{message[len(prefix) :]} is missing"
    if message.startswith("unrecognized arguments: "):
        return f"unknown option {message.removeprefix('unrecognized arguments: ')}"
    if message.startswith("argument "):
        name, _, rest = message.removeprefix("argument ").partition(": ")
        return f"{name}: {rest}"
    return message


# Types of option values: each raises ArgumentTypeError with a sentence that names what is wanted.


def byte_size(text: str) -> int:
    """An argument type: `512Mi`, `20Gi`, or a number of bytes."""
    from schemas.errors import ContractError
    from schemas.values import parse_memory

    try:
        return 0 if text == "0" else parse_memory(text, field="size")
    except ContractError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size (512Mi, 20Gi or bytes)") from None


def duration(text: str) -> float:
    """`250ms`, `5s`, `1m30s`, `2h` or a number of seconds."""
    from schemas.values import parse_duration
    from worker.errors import ContractError

    plain = text.replace(".", "", 1).isdecimal()
    try:
        return parse_duration(float(text) if plain else text, field="duration")
    except ContractError:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration (5s, 1m30s, 250ms or seconds)") from None


def when(text: str) -> datetime:
    """A moment: RFC 3339 (local time without an offset), or how long ago (`10m`)."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        try:
            return datetime.now(UTC) - timedelta(seconds=duration(text))
        except (argparse.ArgumentTypeError, OverflowError):
            raise argparse.ArgumentTypeError(
                f"{text!r} is neither a time (RFC 3339) nor an age (10m)"
            ) from None
    return moment.astimezone(UTC)


def whole(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """A whole number within bounds."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
        if value < minimum or (maximum is not None and value > maximum):
            bounds = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
            raise argparse.ArgumentTypeError(f"{value} must be {bounds}")
        return value

    return convert


def absolute(text: str) -> str:
    """A path of this machine, from the working directory, as it will be seen from elsewhere."""
    return os.path.abspath(os.path.expanduser(text))


def pair(text: str) -> tuple[str, str]:
    """`NAME=VALUE`; a lone `NAME` takes its value from this shell's environment."""
    name, equals, value = text.partition("=")
    if not name:
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=VALUE")
    if equals:
        return name, value
    if name not in os.environ:
        raise argparse.ArgumentTypeError(f"{name} is not set here; write {name}=VALUE")
    return name, os.environ[name]
