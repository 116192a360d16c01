"""What the verbs print: tables and lines for people, JSON for programs.

With `--json` a verb that gives one thing prints one JSON object, one that gives a list prints one JSON array,
and one that acts on several things or follows something prints one JSON object a line. The objects are the
contract's own (ContainerStatus, NodeInfo, Stats, events …), whole: raw bytes, seconds and RFC 3339 times.
Everything else (errors, progress, remarks) goes to stderr.
"""

import asyncio
import json
import shutil
import sys
import textwrap
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

from worker.cli.style import Style, clean, colours, is_terminal, paint

SPINNER_AFTER_S = 0.4
LEAST_COLUMN = 8


@dataclass(frozen=True, slots=True)
class Cell:
    text: str
    style: Style = ""


@dataclass(frozen=True, slots=True)
class Column:
    """`keep`: shortened only when nothing else is left to shorten; `right`: a number, never shortened."""

    title: str
    right: bool = False
    keep: bool = False


Row = Sequence[Cell | str]


class Output:
    """Where a verb writes. `as_json` is `--json`."""

    def __init__(
        self, *, as_json: bool = False, stdout: TextIO | None = None, stderr: TextIO | None = None
    ) -> None:
        self.as_json = as_json
        self.stdout = stdout or sys.stdout
        self.stderr = stderr or sys.stderr
        self.colour = colours(self.stdout)
        self.terminal = is_terminal(self.stdout)
        self._error_colour = colours(self.stderr)
        self._busy: Clearable | None = None

    def cover(self, view: "Clearable | None") -> None:
        """Something stands on the terminal below what is printed, until None takes its place."""
        self._busy = view

    def paint(self, text: str, style: Style) -> str:
        return paint(text, style, self.colour)

    def line(self, text: str = "") -> None:
        """A line on stdout, printed at once: a reader of a pipe follows along."""
        self._clear_busy()
        print(text, file=self.stdout, flush=True)

    def note(self, text: str, style: Style = "dim") -> None:
        """A remark on stderr."""
        self._say(paint(clean(text), style, self._error_colour))

    def warning(self, text: str) -> None:
        self._say(f"{paint('warning:', 'warn', self._error_colour)} {clean(text)}")

    def error(self, text: str) -> None:
        self._say(f"{paint('error:', 'bad', self._error_colour)} {clean(text)}")

    def _say(self, line: str) -> None:
        self._clear_busy()
        print(line, file=self.stderr, flush=True)

    def _clear_busy(self) -> None:
        """The spinner's line is free for what is printed now; it turns on below it."""
        if self._busy is not None:
            self._busy.clear()

    def raw(self, data: bytes, *, to_stderr: bool = False) -> None:
        """Bytes exactly as they are."""
        self._clear_busy()
        stream = self.stderr if to_stderr else self.stdout
        stream.flush()
        stream.buffer.write(data)
        stream.buffer.flush()

    def document(self, value: Any) -> None:
        """The one JSON document of a verb: indented on a terminal, one line otherwise."""
        raw = encode(value)
        if self.terminal:
            self.line(json.dumps(json.loads(raw), indent=2, ensure_ascii=False))
        else:
            self.line(raw.decode())

    def json_line(self, value: Any) -> None:
        self.line(encode(value).decode())

    def table(self, columns: Sequence[Column], rows: Iterable[Row], *, empty: str = "") -> None:
        """Aligned text in a pipe, whole; on a terminal coloured and shortened to its width."""
        lines = self.table_lines(columns, rows, width=terminal_width() if self.terminal else None)
        if len(lines) == 1 and empty:
            self.note(empty)
            return
        for line in lines:
            self.line(line)

    def table_lines(self, columns: Sequence[Column], rows: Iterable[Row], *, width: int | None) -> list[str]:
        """The title line and one for each row, at most `width` wide where that is possible."""
        head = [Cell(column.title, "dim") for column in columns]
        table = [head, *([_cell(cell) for cell in row] for row in rows)]
        texts = [[clean(cell.text) for cell in row] for row in table]
        widths = column_widths(columns, texts, width)
        lines = []
        for row, shown in zip(table, texts, strict=True):
            parts = [
                paint(_fitted(text, space, column.right), cell.style, self.colour)
                for text, space, column, cell in zip(shown, widths, columns, row, strict=True)
            ]
            if not columns[-1].right:
                parts[-1] = paint(_shortened(shown[-1], widths[-1]), row[-1].style, self.colour)
            lines.append("  ".join(parts).rstrip())
        return lines

    def fields(self, rows: Iterable[tuple[str, Cell | str]]) -> None:
        """Names and values below each other."""
        kept = [(name, _cell(value)) for name, value in rows]
        width = max((len(name) for name, _ in kept), default=0) + 2
        for name, value in kept:
            self.hanging(name.ljust(width), clean(value.text), style=value.style)

    def hanging(self, lead: str, text: str, *, style: Style = "") -> None:
        """A text beside its name; on a terminal its further lines stand below the first."""
        lines = [text]
        if self.terminal:
            room = max(20, terminal_width() - len(lead))
            lines = textwrap.wrap(text, room, break_on_hyphens=False) or [""]
        for number, line in enumerate(lines):
            head = lead if number == 0 else " " * len(lead)
            self.line(f"{paint(head, 'dim', self.colour)}{paint(line, style, self.colour)}".rstrip())

    def break_line(self) -> None:
        """After a Ctrl-C the terminal shows `^C`: what follows begins on a line of its own."""
        if is_terminal(self.stderr):
            print(file=self.stderr)

    @asynccontextmanager
    async def busy(self, text: str) -> AsyncIterator["Busy"]:
        """A spinner on stderr once the block has taken a moment; nothing when stderr is no terminal."""
        busy = Busy(self.stderr, text, colour=self._error_colour)
        if not is_terminal(self.stderr) or self.as_json:
            yield busy
            return
        task = asyncio.create_task(busy.turn(SPINNER_AFTER_S))
        before, self._busy = self._busy, busy
        try:
            yield busy
        finally:
            self._busy = before
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            busy.clear()


class Clearable(Protocol):
    def clear(self) -> None:
        """Make room for a line."""


class Busy:
    """A line on the terminal that turns while something is awaited. `text` may change at any time."""

    FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"

    def __init__(self, stream: TextIO, text: str, *, colour: bool) -> None:
        self.text = text
        self._stream = stream
        self._colour = colour
        self._shown = False
        self._frames = self.FRAMES if (stream.encoding or "").lower().startswith("utf") else "|/-\\"

    async def turn(self, after_s: float) -> None:
        await asyncio.sleep(after_s)
        count = 0
        while True:
            frame = self._frames[count % len(self._frames)]
            text = clean(self.text)[: terminal_width() - 3]
            self._stream.write(f"\r\x1b[2K{paint(frame, 'name', self._colour)} {text}")
            self._stream.flush()
            self._shown = True
            count += 1
            await asyncio.sleep(0.1)

    def clear(self) -> None:
        if self._shown:
            self._stream.write("\r\x1b[2K")
            self._stream.flush()
            self._shown = False


def encode(value: Any) -> bytes:
    import msgspec

    return msgspec.json.encode(value)


def column_widths(columns: Sequence[Column], texts: Sequence[Sequence[str]], width: int | None) -> list[int]:
    """As wide as their longest text; where that is too much, the longest give way, those to keep last."""
    widths = [max(cells(row[place]) for row in texts) for place in range(len(columns))]
    texty = [place for place, column in enumerate(columns) if not column.right]
    for free in ([place for place in texty if not columns[place].keep], texty):
        while width is not None and sum(widths) + 2 * (len(widths) - 1) > width:
            longest = max(free, key=lambda place: widths[place], default=None)
            if longest is None or widths[longest] <= LEAST_COLUMN:
                break
            widths[longest] -= 1
    return widths


def terminal_width() -> int:
    return shutil.get_terminal_size((80, 24)).columns


def cells(text: str) -> int:
    """How many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def _shortened(text: str, space: int) -> str:
    if cells(text) <= space:
        return text
    from rich.cells import set_cell_size

    return set_cell_size(text, space - 1).rstrip() + "…"


def _fitted(text: str, space: int, right: bool) -> str:
    text = _shortened(text, space)
    gap = " " * (space - cells(text))
    return gap + text if right else text + gap


def _cell(value: Cell | str) -> Cell:
    return value if isinstance(value, Cell) else Cell(value)
