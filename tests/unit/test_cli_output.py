"""Tables, colours and JSON: plain in a pipe, calm on a terminal, nothing that steers it."""

import asyncio
import io
import json
from datetime import UTC, datetime, timedelta

import pytest

from schemas.status import ContainerStatus, Reason, State
from worker.cli.human import age, brief, exit_name, size, span, state_cell
from worker.cli.output import Cell, Column, Output
from worker.cli.style import clean, colours, paint

COLUMNS = [Column("NAME", keep=True), Column("SIZE", right=True), Column("IMAGE")]
ROWS = [["web-0", "9.5 KiB", "ghcr.io/acme/web:1"], [Cell("db-0", "good"), "10 B", "x\x1b[31mred\nline"]]


class Terminal(io.TextIOWrapper):
    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", write_through=True)

    def isatty(self) -> bool:
        return True

    def text(self) -> str:
        buffer = self.buffer
        assert isinstance(buffer, io.BytesIO)
        return buffer.getvalue().decode()


def pipe() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)


def text_of(stream: io.TextIOWrapper) -> str:
    stream.flush()
    buffer = stream.buffer
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue().decode()


def status(**changes: object) -> ContainerStatus:
    given: dict[str, object] = {
        "container": "web-0",
        "service": "web",
        "replica": 0,
        "instance": "01J" + "0" * 23,
        "state": State.RUNNING,
    }
    return ContainerStatus(**{**given, **changes})  # type: ignore[arg-type]


def test_a_pipe_gets_aligned_text_and_no_colour() -> None:
    stdout = pipe()
    Output(stdout=stdout, stderr=pipe()).table(COLUMNS, ROWS)
    assert text_of(stdout).splitlines() == [
        "NAME      SIZE  IMAGE",
        "web-0  9.5 KiB  ghcr.io/acme/web:1",
        "db-0      10 B  x�[31mred line",
    ]


def test_a_terminal_gets_colours_and_its_own_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal()
    Output(stdout=terminal, stderr=pipe()).table(COLUMNS, ROWS)
    text = terminal.text()
    assert "\x1b[32mdb-0" in text
    assert "\x1b[31m" not in text
    assert "…" in text
    assert "9.5 KiB" in text


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_no_colour_when_not_wanted(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(name, value)
    terminal = Terminal()
    assert not colours(terminal)
    Output(stdout=terminal, stderr=pipe()).table(COLUMNS, ROWS)
    assert "\x1b" not in terminal.text()


def test_json_is_one_line_in_a_pipe_and_indented_on_a_terminal() -> None:
    stdout, terminal = pipe(), Terminal()
    Output(as_json=True, stdout=stdout, stderr=pipe()).document([status()])
    Output(as_json=True, stdout=terminal, stderr=pipe()).document([status()])
    assert text_of(stdout).count("\n") == 1
    assert terminal.text().count("\n") > 5
    assert json.loads(text_of(stdout)) == json.loads(terminal.text())


def test_an_empty_list_says_so_on_stderr_only() -> None:
    stdout, stderr = pipe(), pipe()
    Output(stdout=stdout, stderr=stderr).table(COLUMNS, [], empty="no containers")
    assert (text_of(stdout), text_of(stderr)) == ("", "no containers\n")


async def test_a_spinner_turns_only_on_a_terminal_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.cli.output.SPINNER_AFTER_S", 0.0)
    terminal, stderr = Terminal(), pipe()
    async with Output(stdout=pipe(), stderr=terminal).busy("pulling x\x1b[2J"):
        for _ in range(100):
            if "pulling" in terminal.text():
                break
            await asyncio.sleep(0.01)
    assert terminal.text().endswith("\r\x1b[2K")
    assert "\x1b[2J" not in terminal.text()
    async with Output(stdout=pipe(), stderr=stderr).busy("pulling"):
        await asyncio.sleep(0)
    assert text_of(stderr) == ""


def test_text_from_afar_cannot_steer_a_terminal() -> None:
    assert clean("a\x1b]0;t\x07b\x9bc\r\nd\u202ee") == "a�]0;t�b�c  d�e"
    assert paint("", "bad", True) == ""


def test_lines_have_no_trailing_space() -> None:
    lines = Output(stdout=pipe(), stderr=pipe()).table_lines(COLUMNS, [["a", "1", ""]], width=None)
    assert lines[1] == "a        1"


def test_only_what_may_be_shortened_is() -> None:
    out = Output(stdout=pipe(), stderr=pipe())
    long = ["a-container-of-a-long-name-0", "10.0 MiB", "ghcr.io/acme/a-long-image:1"]
    lines = out.table_lines(COLUMNS, [long], width=50)
    assert [len(line) for line in lines] == [45, 50]
    assert lines[1] == "a-container-of-a-long-name-0  10.0 MiB  ghcr.io/a…"
    assert out.table_lines(COLUMNS, [long], width=10)[1] == "a-conta…  10.0 MiB  ghcr.io…"


def test_wide_characters_take_two_columns() -> None:
    lines = Output(stdout=pipe(), stderr=pipe()).table_lines(COLUMNS, [["a", "1", "日本語日本語"]], width=22)
    assert lines[1].endswith("日本語日…")


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "-"), (0, "0 B"), (999, "999 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"),
     (2**20, "1.0 MiB"), (5 * 2**30, "5.0 GiB"), (3 * 2**40, "3.0 TiB"), (5000 * 2**40, "5000.0 TiB")],
)  # fmt: skip
def test_sizes(count: int | None, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "short", "full"),
    [(-1, "now", "0ms"), (0.25, "now", "250ms"), (3, "3s", "3s"), (65, "1m", "1m 5s"), (7800, "2h", "2h 10m"),
     (356400, "4d", "4d 3h"), (3600, "1h", "1h")],
)  # fmt: skip
def test_spans(seconds: float, short: str, full: str) -> None:
    assert (brief(seconds), span(seconds)) == (short, full)


def test_ages() -> None:
    at = datetime(2026, 1, 1, 12, tzinfo=UTC)
    assert age(at - timedelta(minutes=3), at) == "3m ago"
    assert age(at, at) == "now"
    assert age(None, at) == "-"


@pytest.mark.parametrize(
    ("changes", "text", "style"),
    [
        ({}, "running", "good"),
        ({"state": State.EXITED, "exit_code": 0}, "exited 0", "dim"),
        ({"state": State.EXITED, "exit_code": 3}, "exited 3", "bad"),
        ({"state": State.EXITED, "exit_code": -9}, "exited SIGKILL", "bad"),
        ({"state": State.EXITED, "exit_code": -15, "reason": Reason.STOPPED}, "exited SIGTERM", "dim"),
        ({"state": State.FAILED}, "failed", "bad"),
        ({"state": State("frozen")}, "frozen", ""),
    ],
)
def test_states(changes: dict[str, object], text: str, style: str) -> None:
    assert state_cell(status(**changes)) == Cell(text, style)  # type: ignore[arg-type]


def test_exit_names() -> None:
    assert [exit_name(code) for code in (0, 7, -11, -99)] == ["0", "7", "SIGSEGV", "signal 99"]
