"""Ids, headers and positions of chunks, and where to go on: pure rules."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.log_server import Stored
from worker.log_chunks import (
    LOST,
    OFFSET,
    REASONS,
    RUN,
    TIMES,
    Cut,
    Position,
    Sent,
    What,
    format_times,
    make_headers,
    newline_cut,
    resume,
    stored_position,
)

ID = "01JD00000000000000000000A1"
CUTS = st.builds(
    Cut,
    st.sampled_from(What),
    st.integers(0, 1 << 60),
    st.integers(0, 1 << 40),
    st.integers(1, 1 << 20),
    eof=st.booleans(),
    reason=st.sampled_from(REASONS[1:]),
)


@given(CUTS)
def test_the_stream_tells_the_position_behind_a_chunk(cut: Cut) -> None:
    if cut.what is What.EOF:
        cut = cut._replace(length=0, eof=True)
    headers = make_headers(ID, "stdout", cut)

    class Message:
        size = cut.length if cut.what is What.DATA else 0

    message = Message()
    message.headers = headers  # type: ignore[attr-defined]
    assert stored_position(ID, message) == cut.after  # type: ignore[arg-type]
    assert stored_position("01OTHER", message) is None  # type: ignore[arg-type]
    assert all(value.isascii() and value.isprintable() for value in headers.values())


@pytest.mark.parametrize("broken", [{OFFSET: "x"}, {RUN: ""}, {LOST: "many"}])
def test_headers_that_are_not_ours(broken: dict[str, str]) -> None:
    headers = make_headers(ID, "stdout", Cut(What.DATA, 1, 2, 1)) | broken
    assert stored_position(ID, Stored(headers, b"ab")) is None
    del headers[next(iter(broken))]
    if LOST not in broken:
        assert stored_position(ID, Stored(headers, b"ab")) is None


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=500), st.integers(0, 1 << 50))
def test_times(gaps: list[int], start: int) -> None:
    times, offset = [], start
    for gap in gaps:
        times.append((offset, offset + 7))
        offset += gap
    marks = [tuple(map(int, mark.split(":"))) for mark in format_times(times).split(",")]
    assert marks[0] == (0, start + 7)
    assert len(marks) == min(64, len(times))
    assert {(at + start, us) for at, us in marks} <= set(times)
    assert marks == sorted(set(marks))


def test_times_stand_in_data_only() -> None:
    assert TIMES not in make_headers(ID, "stdout", Cut(What.EOF, 5, 0, 1, eof=True))


@pytest.mark.parametrize(
    ("data", "cut"),
    [
        (b"x" * 100, 100),
        (b"x" * 95 + b"\n" + b"y" * 4, 96),
        (b"\n" + b"x" * 99, 100),
        (b"x" * 99 + b"\n", 100),
        (b"", 0),
    ],
)
def test_a_newline_near_the_end(data: bytes, cut: int) -> None:
    assert newline_cut(data) == cut


def chunks(*lengths: int) -> list[Cut]:
    cuts, offset = [], 0
    for length in lengths:
        cuts.append(Cut(What.DATA, offset, length, 1))
        offset += length
    return cuts


def newest(cut: Cut, instance: str = ID) -> Stored:
    return Stored(make_headers(instance, "stdout", cut), b"x" * cut.length)


A, B, C = chunks(10, 10, 10)
ZERO = Position(0, 0)


def decide(sent: list[Sent], last: Stored | None, *, fresh: bool = True, acked: Position = ZERO):  # type: ignore[no-untyped-def]
    return resume(ID, acked=acked, sent=sent, fresh=fresh, tail=acked, newest=last)


class TestResume:
    def test_within_the_window_all_but_the_newest_go_again(self) -> None:
        sent = [Sent(A, False), Sent(B, False), Sent(C, False)]
        assert decide(sent, newest(B))[:4] == (C.after, B.after, (A, C), False)
        assert decide(sent, None)[:4] == (C.after, C.after, (A, B, C), False)

    def test_later_the_newest_decides(self) -> None:
        sent = [Sent(A, False), Sent(B, False), Sent(C, False)]
        assert decide(sent, newest(B), fresh=False)[:4] == (B.after, B.after, (), False)
        assert decide(sent, None, fresh=False)[:4] == (ZERO, ZERO, (), False)

    def test_what_is_older_than_an_answered_one_was_refused(self) -> None:
        sent = [Sent(A, False), Sent(B, True), Sent(C, False)]
        assert decide(sent, newest(B), fresh=False)[:4] == (B.after, B.after, (A,), False)
        assert decide(sent, newest(A), fresh=False)[:4] == (B.after, A.after, (), False)

    def test_a_record_that_is_gone_leaves_it_to_the_stream(self) -> None:
        assert decide([], newest(C), acked=A.after)[:4] == (C.after, C.after, (), False)

    def test_less_than_was_acknowledged_is_doubtful(self) -> None:
        found = decide([], newest(A), acked=C.after)
        assert (found.position, found.doubtful) == (A.after, True)

    def test_another_instance_says_nothing(self) -> None:
        assert decide([], newest(A, "01OTHER"), acked=C.after)[:4] == (C.after, C.after, (), False)

    def test_what_the_newest_shows_to_be_there_is_never_called_lost(self) -> None:
        sent = [Sent(A, False), Sent(B, False), Sent(C, False)]
        assert decide(sent, newest(B)).there == {A}
        assert decide(sent, newest(C)).there == {A, B}
        assert decide(sent, None).there == set()
        assert decide(sent, newest(C, "01OTHER")).there == set()

    def test_what_was_refused_is_not_there_whatever_the_newest_is(self) -> None:
        sent = [Sent(A, False), Sent(B, True), Sent(C, False)]
        assert decide(sent, newest(C)).there == set()
