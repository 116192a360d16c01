"""Chunks back in order by offset, each byte once; lines with the time of their first byte."""

import random
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from worker.client_logs import HELD_CHUNKS, LineCutter, LogChunk, LogOrder, Piece, parse_chunk, time_at

INSTANCE = "01J00000000000000000000000"
LATER = "01K00000000000000000000000"
TIME = datetime(2026, 11, 24, 3, 31, 39, 228339, tzinfo=UTC)
MICROS = 1795491099228339


def chunk(offset: int, data: bytes = b"", *, stream: str = "stdout", instance: str = INSTANCE, lost: int = 0,
          eof: int | None = None, seq: int = 1) -> LogChunk:  # fmt: skip
    return LogChunk(
        stream=stream,
        instance=instance,
        run=1,
        offset=offset,
        data=data,
        time=TIME,
        seq=seq,
        lost=lost,
        lost_reason="rate" if lost else None,
        eof=eof,
    )


def put_all(order: LogOrder, chunks: list[LogChunk]) -> list[Piece]:
    return [piece for one in chunks for piece in order.put(one)] + order.give_up()


def shape(pieces: list[Piece]) -> list[tuple[int, bytes, int, str | None]]:
    return [(piece.offset, piece.data, piece.missing, piece.reason) for piece in pieces]


def test_a_chunk_is_read_from_its_headers() -> None:
    headers = {
        "Sandfleet-Instance": INSTANCE,
        "Sandfleet-Run": "2",
        "Sandfleet-Offset": "100",
        "Sandfleet-Times": f"0:{MICROS},5:{MICROS + 1}",
        "Sandfleet-Eof": "2",
        "Sandfleet-Incomplete": "supervisor_lost",
    }
    found = parse_chunk("stderr", b"hello\n", headers, time=TIME, seq=7)
    assert found is not None
    assert found.marks == ((100, TIME), (105, TIME + timedelta(microseconds=1)))
    assert (found.run, found.offset, found.eof, found.incomplete, found.lost) == (
        2,
        100,
        2,
        "supervisor_lost",
        0,
    )


def test_what_is_no_chunk_is_none() -> None:
    for headers in ({}, {"Sandfleet-Offset": "x", "Sandfleet-Instance": INSTANCE}, {"Sandfleet-Offset": "1"}):
        assert parse_chunk("stdout", b"", headers, time=TIME, seq=1) is None


def test_a_later_chunk_waits_for_an_earlier_one() -> None:
    order = LogOrder(from_start=True)
    assert shape(order.put(chunk(3, b"def"))) == []
    assert order.waiting
    assert shape(order.put(chunk(0, b"abc"))) == [(0, b"abc", 0, None), (3, b"def", 0, None)]
    assert not order.waiting


def test_no_byte_is_given_twice() -> None:
    pieces = put_all(
        LogOrder(from_start=True), [chunk(0, b"abc"), chunk(0, b"abc"), chunk(2, b"cdef"), chunk(1, b"bcd")]
    )
    assert shape(pieces) == [(0, b"abc", 0, None), (3, b"def", 0, None)]


def test_lost_bytes_are_told_and_counted() -> None:
    pieces = put_all(
        LogOrder(from_start=True), [chunk(0, b"abc"), chunk(3, lost=10), chunk(13, b"xyz", eof=1)]
    )
    assert shape(pieces) == [(0, b"abc", 0, None), (3, b"", 10, "rate"), (13, b"xyz", 0, None)]
    assert pieces[-1].eof == 1


def test_what_the_stream_no_longer_has_is_told_as_evicted() -> None:
    pieces = put_all(LogOrder(from_start=True), [chunk(100, b"abc"), chunk(110, b"xyz")])
    assert shape(pieces) == [
        (0, b"", 100, "evicted"),
        (100, b"abc", 0, None),
        (103, b"", 7, "missing"),
        (110, b"xyz", 0, None),
    ]


def test_a_hole_is_given_up_when_too_much_waits_behind_it() -> None:
    order = LogOrder(from_start=True)
    order.put(chunk(0, b"a"))
    pieces = [piece for at in range(HELD_CHUNKS + 1) for piece in order.put(chunk(10 + at, b"b"))]
    assert shape(pieces[:2]) == [(1, b"", 9, "missing"), (10, b"b", 0, None)]
    assert b"".join(piece.data for piece in pieces) == b"b" * (HELD_CHUNKS + 1)


def test_reading_may_begin_anywhere() -> None:
    assert shape(put_all(LogOrder(from_start=False), [chunk(50, b"abc")])) == [(50, b"abc", 0, None)]


def test_a_newer_instance_takes_over_and_an_older_one_is_ignored() -> None:
    pieces = put_all(
        LogOrder(from_start=True),
        [chunk(0, b"old"), chunk(9, b"?"), chunk(0, b"new", instance=LATER), chunk(3, b"older")],
    )
    assert [(piece.instance, piece.data) for piece in pieces] == [
        (INSTANCE, b"old"),
        (INSTANCE, b""),
        (INSTANCE, b"?"),
        (LATER, b"new"),
    ]
    fixed = LogOrder(from_start=True, instance=INSTANCE)
    assert shape(put_all(fixed, [chunk(0, b"old"), chunk(0, b"new", instance=LATER)])) == [
        (0, b"old", 0, None)
    ]


def test_an_end_without_bytes_comes_through() -> None:
    pieces = put_all(
        LogOrder(from_start=True), [chunk(0, b"a"), chunk(1, eof=1), chunk(1, b"b"), chunk(2, eof=2)]
    )
    assert [piece.eof for piece in pieces] == [None, 1, None, 2]


@given(
    st.lists(st.binary(min_size=1, max_size=12), min_size=1, max_size=30),
    st.lists(st.binary(min_size=1, max_size=12), max_size=10),
    st.randoms(use_true_random=False),
)
def test_whatever_the_order_every_byte_comes_once(
    out: list[bytes], err: list[bytes], chance: random.Random
) -> None:
    chunks = []
    for stream, parts in (("stdout", out), ("stderr", err)):
        at = 0
        for part in parts:
            chunks.append(chunk(at, part, stream=stream))
            at += len(part)
    chunks += chance.sample(chunks, len(chunks) // 3)
    chance.shuffle(chunks)
    pieces = put_all(LogOrder(from_start=True), chunks)
    assert all(not piece.missing for piece in pieces)
    for stream, parts in (("stdout", out), ("stderr", err)):
        assert b"".join(piece.data for piece in pieces if piece.stream == stream) == b"".join(parts)


def piece(offset: int, data: bytes, *, stream: str = "stdout", **more: object) -> Piece:
    return Piece(stream=stream, instance=INSTANCE, offset=offset, time=TIME, data=data, **more)  # type: ignore[arg-type]


def test_lines_have_the_time_of_their_first_byte() -> None:
    marks = ((0, TIME), (4, TIME + timedelta(seconds=1)))
    lines = LineCutter().put(piece(0, b"one\ntwo\nth", marks=marks))
    assert [(line.data, line.time) for line in lines] == [
        (b"one", TIME),
        (b"two", TIME + timedelta(seconds=1)),
    ]
    assert time_at(piece(0, b"", marks=marks), 3) == TIME


def test_a_line_over_several_pieces_is_one() -> None:
    cutter = LineCutter()
    assert cutter.put(piece(0, b"he")) == []
    assert cutter.put(piece(0, b"!\n", stream="stderr"))[0].data == b"!"
    assert cutter.put(piece(2, b"")) == []
    assert [line.data for line in cutter.put(piece(2, b"llo\n\nx"))] == [b"hello", b""]
    (rest,) = cutter.rest()
    assert (rest.data, rest.partial) == (b"x", True)
    assert cutter.rest() == []


def test_the_end_of_a_run_or_a_gap_ends_a_line() -> None:
    cutter = LineCutter()
    assert [line.data for line in cutter.put(piece(0, b"last", eof=1))] == [b"last"]
    cutter.put(piece(4, b"cut"))
    assert [line.data for line in cutter.put(piece(7, b"", missing=3))] == [b"cut"]


def test_lines_are_json_as_the_query_writes_them() -> None:
    good, bad = LineCutter().put(piece(0, "é\n".encode() + b"\xff\n"))
    assert good.wire() == {"time": TIME, "stream": "stdout", "text": "é"}
    assert bad.wire() == {"time": TIME, "stream": "stdout", "text": "/w==", "encoding": "base64"}


@given(st.lists(st.binary(max_size=20), max_size=20))
def test_lines_put_together_are_the_bytes(parts: list[bytes]) -> None:
    cutter, lines, at = LineCutter(), [], 0
    for part in parts:
        lines += cutter.put(piece(at, part))
        at += len(part)
    lines += cutter.rest()
    whole = b"".join(line.data + (b"" if line.partial else b"\n") for line in lines)
    assert whole == b"".join(parts)
