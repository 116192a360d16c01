from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.clock import from_us, to_us
from worker.ids import UlidMaker, decode_ulid, encode_ulid, is_ulid, new_ulid, ulid_time

START = datetime(2026, 11, 24, 3, 31, 39, 228339, tzinfo=UTC)
LAST = "7ZZZZZZZZZZZZZZZZZZZZZZZZZ"


class TurnedClock:
    def __init__(self, *steps: timedelta) -> None:
        self.now = START
        self.steps = list(steps)

    def __call__(self) -> datetime:
        if self.steps:
            self.now += self.steps.pop(0)
        return self.now


@given(st.integers(min_value=0, max_value=(1 << 128) - 1))
def test_decode_undoes_encode(value: int) -> None:
    assert decode_ulid(encode_ulid(value)) == value


@given(st.integers(min_value=0, max_value=(1 << 128) - 1), st.integers(min_value=0, max_value=(1 << 128) - 1))
def test_text_sorts_as_the_number(left: int, right: int) -> None:
    assert (left < right) == (encode_ulid(left) < encode_ulid(right))


@given(st.datetimes(min_value=datetime(1, 1, 2), timezones=st.just(UTC)))
def test_microseconds_are_exact(moment: datetime) -> None:
    assert from_us(to_us(moment)) == moment


def test_the_example_of_the_specification() -> None:
    assert ulid_time("01ARYZ6S410000000000000000") == datetime(2016, 7, 30, 22, 36, 16, 385000, tzinfo=UTC)


@given(st.lists(st.timedeltas(min_value=timedelta(hours=-1), max_value=timedelta(hours=1)), max_size=50))
def test_a_maker_rises_whatever_the_clock_does(steps: list[timedelta]) -> None:
    make = UlidMaker(TurnedClock(*steps)).new
    made = [make() for _ in range(len(steps) + 20)]
    assert made == sorted(set(made))
    assert all(is_ulid(ulid) for ulid in made)


def test_it_carries_its_time() -> None:
    assert ulid_time(UlidMaker(lambda: START).new()) == START.replace(microsecond=228000)


def test_above_is_greater_and_so_is_what_follows() -> None:
    maker = UlidMaker(lambda: START)
    far = UlidMaker(lambda: START + timedelta(days=900)).new()
    above = maker.above(far)
    assert far < above < maker.new()
    assert UlidMaker(lambda: START).above(UlidMaker(lambda: START - timedelta(days=1)).new()) > encode_ulid(0)


def test_nothing_is_above_the_last() -> None:
    with pytest.raises(ValueError, match="no ULID is left"):
        UlidMaker().above(LAST)


@pytest.mark.parametrize(
    "text", ["", "01ARYZ6S41", "8ZZZZZZZZZZZZZZZZZZZZZZZZZ", LAST.lower(), "7" + "I" * 25]
)
def test_what_is_no_ulid(text: str) -> None:
    assert not is_ulid(text)
    with pytest.raises(ValueError, match="is no ULID"):
        decode_ulid(text)


def test_new_ulid_is_unique() -> None:
    assert len({new_ulid() for _ in range(1000)}) == 1000
