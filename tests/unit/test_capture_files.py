"""Reading capture files while they are written, rotated and deleted; ending a run whose launcher died."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.capture_writer import CaptureWriter
from worker.capture_files import (
    MARK,
    STREAMS,
    Extent,
    Mark,
    MarkKind,
    Segment,
    capture_files,
    extents,
    list_segments,
    move_capture_files,
    segment_path,
    write_incomplete_eof,
)
from worker.capture_reader import CaptureReader, RunEnd, Span

LIMIT = 256 * 1024


@pytest.fixture
def writer(tmp_path: Path) -> CaptureWriter:
    return CaptureWriter(tmp_path)


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[CaptureReader]:
    found = CaptureReader(tmp_path, "stdout")
    yield found
    found.close()


def take(reader: CaptureReader, limit: int = LIMIT) -> tuple[Span, bytes]:
    span = reader.span(limit)
    assert span is not None
    data = reader.read(span) if span.length and span.lost is None else b""
    reader.commit(span)
    return span, data


def newest_marks(folder: Path, stream: str) -> list[Mark]:
    segment = Segment.open(folder, stream, list_segments(folder, stream)[-1])
    assert segment is not None
    try:
        return list(segment.marks())
    finally:
        segment.close()


def test_nothing_yet(reader: CaptureReader) -> None:
    assert reader.span(LIMIT) is None
    assert not reader.began


def test_reads_join_and_keep_their_times(writer: CaptureWriter, reader: CaptureReader) -> None:
    writer.write(b"one\n")
    writer.write(b"two\n")
    span, data = take(reader)
    assert data == b"one\ntwo\n"
    assert span.times == [(0, 1_000_001), (4, 1_000_002)]
    assert span.last
    assert reader.span(LIMIT) is None
    writer.write(b"three")
    span, data = take(reader)
    assert (span.offset, data) == (8, b"three")


def test_bytes_without_their_mark_are_not_seen(writer: CaptureWriter, reader: CaptureReader) -> None:
    writer.write(b"seen")
    writer.write(b"not yet", marked=False)
    assert take(reader)[1] == b"seen"
    assert reader.span(LIMIT) is None


def test_half_a_mark_is_not_seen(writer: CaptureWriter, reader: CaptureReader, tmp_path: Path) -> None:
    writer.write(b"seen")
    with open(segment_path(tmp_path, "stdout", 0, "marks"), "ab") as file:
        file.write(MARK.pack(4, 1, 5, 0)[:31])
    assert take(reader)[1] == b"seen"
    assert reader.span(LIMIT) is None


def test_a_limit_and_a_part_of_a_span(writer: CaptureWriter, reader: CaptureReader) -> None:
    writer.write(b"0123456789")
    writer.write(b"abcdef")
    span = reader.span(12)
    assert span is not None
    assert span.full
    assert reader.read(span) == b"0123456789ab"
    reader.commit(span, 7)
    span, data = take(reader)
    assert (span.offset, data) == (7, b"789abcdef")
    assert [at for at, _ in span.times] == [7, 10]


def test_the_end_of_a_run(writer: CaptureWriter, reader: CaptureReader) -> None:
    writer.write(b"bye")
    writer.finish_run(1)
    writer.write(b"again")
    writer.finish_run(2, incomplete=True)
    writer.finish_run(3)
    assert take(reader)[0].end == RunEnd(1, incomplete=False)
    span, data = take(reader)
    assert (data, span.end) == (b"again", RunEnd(2, incomplete=True))
    span, _ = take(reader)
    assert (span.length, span.end) == (0, RunEnd(3, incomplete=False))
    assert reader.span(LIMIT) is None


def test_lost_marks_join_by_reason(writer: CaptureWriter, reader: CaptureReader) -> None:
    writer.write(b"a")
    writer.lose(5)
    writer.lose(6)
    writer.lose(7, "disk")
    writer.finish_run(1)
    writer.rotate()
    writer.write(b"b")
    assert take(reader)[1] == b"a"
    assert take(reader)[0][:4] == (1, 11, [], "rate")
    assert take(reader)[0][:4] == (12, 7, [], "disk")
    assert take(reader)[0].end == RunEnd(1, incomplete=False)
    span, data = take(reader)
    assert (span.offset, data) == (19, b"b")


def test_what_was_deleted_is_lost_by_size(writer: CaptureWriter, reader: CaptureReader) -> None:
    for text in (b"first", b"second", b"third"):
        writer.rotate()
        writer.write(text)
    writer.delete_oldest()
    span, _ = take(reader)
    assert (span.offset, span.length, span.lost) == (0, 5, "size")
    assert take(reader)[1] == b"second"
    writer.delete_oldest()
    assert take(reader)[1] == b"third"


def test_a_deleted_segment_that_is_open_is_read_to_its_end(
    writer: CaptureWriter, reader: CaptureReader
) -> None:
    writer.write(b"first")
    assert take(reader, 2)[1] == b"fi"
    for text in (b"second", b"third"):
        writer.rotate()
        writer.write(text)
    writer.delete_oldest()
    writer.delete_oldest()
    assert take(reader)[1] == b"rst"
    assert take(reader)[0][:4] == (5, 6, (), "size")
    assert take(reader)[1] == b"third"


def test_a_gap_between_segments_that_are_there_is_the_disks(
    writer: CaptureWriter, reader: CaptureReader, tmp_path: Path
) -> None:
    writer.write(b"first")
    writer.content += b"unmarked"
    writer.rotate()
    writer.write(b"second")
    assert take(reader)[1] == b"first"
    assert reader.span(LIMIT, thorough=False) is None
    assert take(reader)[0][:4] == (5, 8, (), "disk")
    assert take(reader)[1] == b"second"


def test_a_gap_between_marks_is_the_disks(
    writer: CaptureWriter, reader: CaptureReader, tmp_path: Path
) -> None:
    writer.write(b"first")
    writer.content += b"gone"
    writer.write(b"second")
    assert take(reader)[1] == b"first"
    assert take(reader)[0][:4] == (5, 4, [], "disk")
    assert take(reader)[1] == b"second"


def test_a_log_cut_by_a_crash_gives_what_there_is(
    writer: CaptureWriter, reader: CaptureReader, tmp_path: Path
) -> None:
    writer.write(b"0123456789")
    with open(segment_path(tmp_path, "stdout", 0, "log"), "r+b") as file:
        file.truncate(4)
    span = reader.span(LIMIT)
    assert span is not None
    assert reader.read(span) == b"0123"


def test_marks_of_a_newer_launcher_are_passed_over(writer: CaptureWriter, reader: CaptureReader) -> None:
    writer.write(b"a")
    writer._mark(77, 9)
    writer.write(b"b")
    assert take(reader)[1] == b"ab"


def test_long_marks_files_are_passed_by_blocks(writer: CaptureWriter, tmp_path: Path) -> None:
    line = b"x" * 99 + b"\n"
    writer.write(b"")
    with (
        open(segment_path(tmp_path, "stdout", 0, "log"), "ab") as log,
        open(segment_path(tmp_path, "stdout", 0, "marks"), "ab") as marks,
    ):
        for number in range(20_000):
            log.write(line)
            marks.write(MARK.pack(number * 100, number + 1, 100, 0))
    reader = CaptureReader(tmp_path, "stdout", 1_234_567, 0)
    span, data = take(reader, 100)
    assert span.times[0] == (1_234_567, 12346)
    assert data == (line + line)[67:167]
    reader.close()


def test_which_run_output_belongs_to(writer: CaptureWriter, reader: CaptureReader) -> None:
    writer.write(b"one")
    writer.finish_run(1)
    writer.rotate()
    writer.write(b"three")  # the start of run 2 failed, and nothing was captured for it
    seen = []
    while (span := reader.span(2)) is not None:
        seen.append((span.offset, reader.run_of(span, 3)))
        reader.commit(span)
    assert seen == [(0, 1), (2, 1), (3, 3), (5, 3), (7, 3)]


def test_extents_say_where_bytes_stand(writer: CaptureWriter, tmp_path: Path) -> None:
    writer.write(b"abc")
    writer.write(b"de")
    writer.finish_run(1)
    writer.write(b"f")
    writer.lose(10)
    writer.write(b"gh")
    segment = Segment.open(tmp_path, "stdout", 0)
    assert segment is not None
    try:
        assert extents(segment) == [Extent(0, 0, 5), Extent(5, 5, 1), Extent(16, 6, 2)]
    finally:
        segment.close()


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(1, 50)),
        st.tuples(st.just("lose"), st.integers(1, 50)),
        st.tuples(st.just("end"), st.just(0)),
        st.tuples(st.just("rotate"), st.just(0)),
        st.tuples(st.just("delete"), st.just(0)),
        st.tuples(st.just("read"), st.integers(1, 60)),
        st.tuples(st.just("part"), st.integers(1, 60)),
        st.tuples(st.just("close"), st.just(0)),
        st.tuples(st.just("again"), st.just(0)),
    ),
    max_size=60,
)


@given(OPERATIONS)
@settings(max_examples=300, deadline=None)
def test_every_byte_once_or_said_to_be_lost(operations: list[tuple[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        writer, reader = CaptureWriter(Path(name)), CaptureReader(Path(name), "stdout")
        deleted_to, expected, runs, ends = 0, 0, 0, []

        def look(limit: int, part: int | None = None) -> bool:
            nonlocal expected
            span = reader.span(limit)
            if span is None:
                return False
            assert span.offset == expected
            length = span.length if part is None or span.lost is not None else min(part, span.length)
            if span.lost == "size":
                assert span.stop <= deleted_to
            elif span.lost is not None:
                covered = sum(
                    max(0, min(stop, span.stop) - max(start, span.offset))
                    for start, stop, reason in writer.lost
                    if reason == span.lost
                )
                assert covered == span.length
            elif span.length:
                data = reader.read(span)
                assert data == writer.content[span.offset : span.stop]
                assert len(data) <= limit
                assert span.times[0][0] == span.offset
                assert not any(start < span.stop and stop > span.offset for start, stop, _ in writer.lost)
                assert not any(span.offset < at < span.stop for at, _ in writer.ends)
            reader.commit(span, length)
            expected += length
            if span.end is not None and length == span.length:
                ends.append(span.end.run)
            return True

        for operation, value in operations:
            match operation:
                case "write":
                    writer.write(bytes((writer.end + i) * 7 % 256 for i in range(value)))
                case "lose":
                    writer.lose(value, "rate" if value % 2 else "disk")
                    writer.rotate()
                case "end":
                    runs += 1
                    writer.finish_run(runs)
                case "rotate":
                    writer.rotate()
                case "delete":
                    writer.delete_oldest()
                    deleted_to = max(deleted_to, writer.bases[0] if writer.bases else 0)
                case "read":
                    look(value)
                case "part":
                    look(value, max(1, value // 2))
                case "close":
                    reader.close()
                case "again":
                    reader.seek(reader.offset, reader.eof_run)
        while look(1000):
            pass
        reader.close()
        assert expected == writer.end
        assert ends == sorted(set(ends))
        kept = [run for at, run in writer.ends if at > deleted_to]
        assert set(kept) <= set(ends)


class TestIncompleteEof:
    def test_marks_what_was_written_and_ends_the_run_once(self, tmp_path: Path) -> None:
        writer = CaptureWriter(tmp_path)
        writer.write(b"marked")
        writer.write(b"unmarked", marked=False)
        with open(segment_path(tmp_path, "stdout", 0, "marks"), "ab") as file:
            file.write(b"torn")
        for _ in range(2):
            write_incomplete_eof(tmp_path, 1)
        marks = newest_marks(tmp_path, "stdout")
        assert [(m.offset, m.argument, m.kind) for m in marks] == [
            (0, 6, MarkKind.DATA),
            (6, 8, MarkKind.DATA),
            (14, 1, MarkKind.EOF_INCOMPLETE),
        ]
        [only] = newest_marks(tmp_path, "stderr")
        assert (only.offset, only.argument, only.kind) == (0, 1, MarkKind.EOF_INCOMPLETE)

    def test_counts_what_was_lost_before(self, tmp_path: Path) -> None:
        writer = CaptureWriter(tmp_path)
        writer.write(b"abc")
        writer.lose(10)
        write_incomplete_eof(tmp_path, 4)
        assert newest_marks(tmp_path, "stdout")[-1].offset == 13

    def test_leaves_a_run_that_ended_alone(self, tmp_path: Path) -> None:
        for stream in STREAMS:
            writer = CaptureWriter(tmp_path, stream)
            writer.write(b"abc")
            writer.finish_run(1)
            writer.write(b"d" * 10)
            writer.finish_run(2)
        before = {name: (tmp_path / name).read_bytes() for name in capture_files(tmp_path)}
        write_incomplete_eof(tmp_path, 2)
        assert {name: (tmp_path / name).read_bytes() for name in capture_files(tmp_path)} == before
        write_incomplete_eof(tmp_path, 3)
        assert newest_marks(tmp_path, "stderr")[-1][2:] == (3, MarkKind.EOF_INCOMPLETE)


def test_moving_takes_capture_files_only(tmp_path: Path) -> None:
    source, target = tmp_path / "state", tmp_path / "spool"
    target.mkdir()
    writer = CaptureWriter(source)
    writer.write(b"abc")
    (source / "exit.json").write_text("{}")
    move_capture_files(source, target)
    move_capture_files(source, target)
    assert [path.name for path in source.iterdir()] == ["exit.json"]
    assert len(capture_files(target)) == 2
    assert list_segments(target, "stdout") == [0]
    assert list_segments(tmp_path / "none", "stdout") == []
