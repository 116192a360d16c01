"""The query `logs`: whole lines, both streams by time, pages that fit together, in bounded replies."""

import asyncio
import base64
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.queries import LogLine
from tests.unit.capture_writer import CaptureWriter
from worker.clock import from_us
from worker.errors import InvalidCommand, Unavailable
from worker.log_lines import LINE_BYTES, LineReader
from worker.log_query import PAGE_BYTES, read_lines


@pytest.fixture
def out(tmp_path: Path) -> CaptureWriter:
    return CaptureWriter(tmp_path)


@pytest.fixture
def err(tmp_path: Path) -> CaptureWriter:
    return CaptureWriter(tmp_path, "stderr")


def texts(lines: list[LogLine]) -> list[str]:
    return [line.text for line in lines]


async def all_pages(folder: Path, **query: object) -> list[LogLine]:
    found: list[LogLine] = []
    cursor = None
    while True:
        lines, cursor = await read_lines(folder, cursor=cursor, **query)  # type: ignore[arg-type]
        if cursor is None:
            assert not lines
            return found
        found += lines


async def test_nothing(tmp_path: Path) -> None:
    assert await read_lines(tmp_path) == ([], None)
    assert await read_lines(tmp_path / "none", tail=5) == ([], None)


async def test_lines_of_both_streams_by_time(tmp_path: Path, out: CaptureWriter, err: CaptureWriter) -> None:
    for number in range(6):
        writer = err if number % 3 == 2 else out
        writer.time_us = 1_000_000 * number
        writer.write(b"line %d\n" % number)
    lines, _ = await read_lines(tmp_path)
    assert texts(lines) == [f"line {number}" for number in range(6)]
    assert [line.stream for line in lines] == ["stdout", "stdout", "stderr"] * 2
    assert lines[3].time == datetime(1970, 1, 1, 0, 0, 3, 1, tzinfo=UTC)
    only, _ = await read_lines(tmp_path, stream="stderr")
    assert texts(only) == ["line 2", "line 5"]


async def test_the_time_is_that_of_the_first_byte(tmp_path: Path, out: CaptureWriter) -> None:
    out.write(b"a\nb")
    out.write(b"egun before\nc\n")
    lines, _ = await read_lines(tmp_path)
    assert [(line.text, line.time) for line in lines] == [
        ("a", from_us(1_000_001)),
        ("begun before", from_us(1_000_001)),
        ("c", from_us(1_000_002)),
    ]


async def test_a_line_over_segments_and_what_breaks_one(tmp_path: Path, out: CaptureWriter) -> None:
    out.write(b"over ")
    out.rotate()
    out.write(b"segments\nno newline")
    out.finish_run(1)
    out.write(b"next run, ")
    out.lose(10)
    out.rotate()
    out.write(b"after the gap\n")
    lines, _ = await read_lines(tmp_path)
    assert texts(lines) == ["over segments", "no newline", "next run, ", "after the gap"]


async def test_the_last_lines(tmp_path: Path, out: CaptureWriter, err: CaptureWriter) -> None:
    for number in range(3000):
        out.write(b"%d\n" % number)
        if number % 700 == 0:
            out.rotate()
    err.time_us = out.time_us - 2
    err.write(b"oops\n")
    err.finish_run(1)
    lines, cursor = await read_lines(tmp_path, tail=3)
    assert texts(lines) == ["2998", "oops", "2999"] or texts(lines) == ["oops", "2998", "2999"]
    assert await read_lines(tmp_path, cursor=cursor) == ([], None)
    out.write(b"more\n")
    lines, _ = await read_lines(tmp_path, cursor=cursor, tail=3)
    assert texts(lines) == ["more"]
    assert len(await all_pages(tmp_path, tail=2500)) == 2500
    assert texts((await read_lines(tmp_path, stream="stderr", tail=5))[0]) == ["oops"]


async def test_skipped_lines_of_the_other_stream_do_not_come_later(
    tmp_path: Path, out: CaptureWriter, err: CaptureWriter
) -> None:
    err.write(b"early 1\nearly 2\n")
    out.time_us += 1_000
    out.write(b"late 1\nlate 2\n")
    lines, cursor = await read_lines(tmp_path, tail=2)
    assert texts(lines) == ["late 1", "late 2"]
    assert await read_lines(tmp_path, cursor=cursor) == ([], None)


async def test_since(tmp_path: Path, out: CaptureWriter) -> None:
    for number in range(20):
        out.time_us = number * 1_000_000 - 1
        out.write(b"%d\n" % number)
        if number % 5 == 4:
            out.rotate()
    since = from_us(12_000_000)
    assert texts((await read_lines(tmp_path, since=since))[0]) == [str(n) for n in range(12, 20)]
    assert texts((await read_lines(tmp_path, since=since, tail=3))[0]) == ["17", "18", "19"]
    assert texts((await read_lines(tmp_path, since=since, tail=100))[0]) == [str(n) for n in range(12, 20)]
    assert await read_lines(tmp_path, since=from_us(30_000_000)) == ([], None)


async def test_a_cursor_survives_rotation(tmp_path: Path, out: CaptureWriter) -> None:
    for number in range(10):
        out.write(b"%d\n" % number)
        out.rotate()
    lines, cursor = await read_lines(tmp_path, max_lines=3)
    assert texts(lines) == ["0", "1", "2"]
    for _ in range(5):
        out.delete_oldest()
    lines, _ = await read_lines(tmp_path, cursor=cursor)
    assert texts(lines) == ["5", "6", "7", "8", "9"]


async def test_another_instance_begins_anew(tmp_path: Path, out: CaptureWriter) -> None:
    out.write(b"a\nb\n")
    _, cursor = await read_lines(tmp_path, instance="01A")
    assert await read_lines(tmp_path, cursor=cursor, instance="01A") == ([], None)
    assert texts((await read_lines(tmp_path, cursor=cursor, instance="01B"))[0]) == ["a", "b"]


@pytest.mark.parametrize("cursor", ["", "x", "1.2", "1.2.3", "1.-2.3.", "1.2.3.\n", "1.²2.3.", "9" * 4000])
async def test_no_cursor_of_ours(tmp_path: Path, cursor: str) -> None:
    with pytest.raises(InvalidCommand) as caught:
        await read_lines(tmp_path, cursor=cursor)
    assert caught.value.field == "cursor"


async def test_other_bytes_are_base64(tmp_path: Path, out: CaptureWriter) -> None:
    out.write("grüße\n".encode() + b"a\x00\xffb\n")
    lines, _ = await read_lines(tmp_path)
    assert (lines[0].text, lines[0].encoding) == ("grüße", msgspec.UNSET)
    assert base64.b64decode(lines[1].text) == b"a\x00\xffb"
    assert lines[1].encoding == "base64"


async def test_long_lines_are_split_and_replies_bounded(tmp_path: Path, out: CaptureWriter) -> None:
    out.write(b"\0" * (3 * LINE_BYTES) + b"\n")
    out.write(b"x" * LINE_BYTES + b"\n")
    out.write(b"y" * (LINE_BYTES + 1) + b"\n")
    out.finish_run(1)
    cursor, sizes = None, []
    while True:
        lines, cursor = await read_lines(tmp_path, cursor=cursor)
        if cursor is None:
            break
        assert len(msgspec.json.encode(lines)) <= PAGE_BYTES + 100
        sizes += [len(line.text) for line in lines]
    assert sizes == [LINE_BYTES, LINE_BYTES, LINE_BYTES, LINE_BYTES, LINE_BYTES, 1]


async def test_a_prompt_is_shown_and_a_line_that_is_being_written_is_not(
    tmp_path: Path, out: CaptureWriter
) -> None:
    out.time_us = time.time_ns() // 1000 + 60_000_000
    out.write(b"done\nbeing writ")
    lines, cursor = await read_lines(tmp_path)
    assert texts(lines) == ["done"]
    out.write(b"ten\n")
    assert texts((await read_lines(tmp_path, cursor=cursor))[0]) == ["being written"]
    out.time_us = 1
    out.write(b"prompt> ")
    assert texts((await read_lines(tmp_path, tail=1))[0]) == ["prompt> "]


async def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "stdout.00000000000000000000.log").mkdir()
    (tmp_path / "stdout.00000000000000000000.marks").mkdir()
    with pytest.raises(Unavailable):
        await read_lines(tmp_path)


PIECES = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.text("ab\n", min_size=1, max_size=12)),
        st.tuples(st.sampled_from(["rotate", "end", "lose"]), st.just("")),
    ),
    max_size=40,
)


def expected_lines(pieces: list[tuple[str, str]], writer: CaptureWriter) -> list[bytes]:
    """Write the pieces, and cut the lines by hand."""
    lines, open_line, runs = [], b"", 0
    for what, text in pieces:
        match what:
            case "write":
                writer.write(text.encode())
                *whole, open_line = (open_line + text.encode()).split(b"\n")
                lines += whole
                continue
            case "rotate":
                writer.rotate()
                continue
            case "end":
                runs += 1
                writer.finish_run(runs)
            case "lose":
                writer.lose(5)
                writer.rotate()
        lines += [open_line] if open_line else []
        open_line = b""
    return [*lines, open_line] if open_line else lines


@given(PIECES, st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_lines_forwards_and_from_behind(pieces: list[tuple[str, str]], tail: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = expected_lines(pieces, CaptureWriter(folder))
        now_us = time.time_ns() // 1000
        assert [line.data for line in LineReader(folder, "stdout", 0, 1 << 62, now_us)] == expected
        lines, _ = asyncio.run(read_lines(folder, stream="stdout", tail=tail))
        assert [text.encode() for text in texts(lines)] == expected[-tail:]
        paged = asyncio.run(all_pages(folder, max_lines=3))
        assert [text.encode() for text in texts(paged)] == expected
