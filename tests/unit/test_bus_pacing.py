"""How long is waited for answers, how much may be under way, and who waits behind a refused chunk."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.bus.allowance import LEAST_BYTES, QUEUE_S, START_BYTES, Allowance
from worker.bus.patience import Patience
from worker.bus.window import Place, Refusals, Window

MIB = 1024 * 1024
MOST = 16 * MIB
CHUNK = 256 * 1024


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 100))))
def test_patience_stays_within_its_bounds(answers: list[tuple[bool, float]]) -> None:
    patience = Patience(2.0, 20.0)
    for came, took_s in answers:
        if came:
            patience.answered(took_s)
            assert patience.seconds >= min(took_s, 20.0)
        else:
            before = patience.seconds
            patience.silent(before)
            assert patience.seconds >= before
        assert 2.0 <= patience.seconds <= 20.0


@pytest.mark.parametrize("answer_s", [0.001, 0.3, 4.0, 15.0])
def test_a_slow_server_is_heard_at_last_and_then_each_time(answer_s: float) -> None:
    patience, unheard = Patience(2.0, 20.0), 0
    while patience.seconds < answer_s:
        patience.silent(patience.seconds)
        unheard += 1
        assert unheard < 10
    for _ in range(100):
        patience.answered(answer_s)
        assert patience.seconds > answer_s


def test_silences_that_were_waited_for_together_count_once() -> None:
    patience = Patience(2.0, 20.0)
    for _ in range(50):
        patience.silent(2.0)
    assert patience.seconds == pytest.approx(3.0)


class Way:
    """A connection that carries `bytes_per_s`, `distance_s` away, and a sender that always has more."""

    def __init__(self, bytes_per_s: float, distance_s: float) -> None:
        self.bytes_per_s, self.distance_s = bytes_per_s, distance_s
        self.allowance = Allowance(MOST)
        self.now = self.free_at = 0.0
        self.under_way: list[tuple[float, float]] = []  # (answered at, sent at)
        self.took: list[float] = []
        self.answered = 0

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            while (len(self.under_way) + 1) * CHUNK <= max(self.allowance.limit_bytes, CHUNK):
                self.free_at = max(self.now, self.free_at) + CHUNK / self.bytes_per_s
                self.under_way.append((self.free_at + self.distance_s, self.now))
            self.now, sent_at = self.under_way.pop(0)
            self.took.append(self.now - sent_at)
            self.answered += CHUNK
            self.allowance.answered(CHUNK, self.now - sent_at, self.now, held_back=True)


@pytest.mark.parametrize("distance_s", [0.001, 0.02, 0.3])
def test_a_wide_way_is_filled(distance_s: float) -> None:
    way = Way(50e6, distance_s)
    way.run(10)
    way.answered = 0
    way.run(30)
    assert way.answered / 30 > 0.75 * min(50e6, MOST / distance_s)


@pytest.mark.parametrize("distance_s", [0.001, 0.02, 0.3, 2.0])
@pytest.mark.parametrize("bytes_per_s", [2e6, 10e6])
def test_a_narrow_way_does_not_make_events_wait_for_long(bytes_per_s: float, distance_s: float) -> None:
    """Also after many minutes: what is taken for the distance must not creep up with the queue."""
    way = Way(bytes_per_s, distance_s)
    way.run(60)
    way.took.clear()
    way.answered = 0
    way.run(600)
    assert max(way.took) < distance_s + 3 * QUEUE_S + 2 * CHUNK / bytes_per_s
    assert way.answered / 600 > 0.5 * min(bytes_per_s, MOST / distance_s)


def test_a_new_distance_is_learnt() -> None:
    way = Way(50e6, 0.01)
    way.run(5)
    way.distance_s = 1.0
    way.run(60)
    assert way.allowance.limit_bytes > 8 * MIB


def test_silence_halves_once_for_all_that_was_under_way() -> None:
    allowance = Allowance(MOST)
    for _ in range(50):
        allowance.silent(3.0, 10.0)
    assert allowance.limit_bytes == START_BYTES // 2
    for now in range(100):
        allowance.silent(3.0, 20.0 + 4 * now)
    assert allowance.limit_bytes == LEAST_BYTES


def test_what_is_not_used_does_not_grow() -> None:
    allowance = Allowance(MOST)
    for now in range(100):
        allowance.answered(CHUNK, 0.01, float(now), held_back=False)
    assert allowance.limit_bytes == START_BYTES


async def test_a_window_that_grows_lets_in_and_one_that_shrinks_throws_nobody_out() -> None:
    window = Window(max_messages=10, max_bytes=2)
    inside = [await window.enter("a", 1), await window.enter("a", 1)]
    entering = asyncio.create_task(window.enter("a", 1))
    await settle()
    assert window.holds_back
    assert not entering.done()
    window.resize(3)
    inside.append(await asyncio.wait_for(entering, 1))
    assert not window.holds_back
    window.resize(1)
    last = asyncio.create_task(window.enter("a", 1))
    for place in inside[:2]:
        window.leave(place)
        await settle()
        assert not last.done()
    window.leave(inside[2])
    window.leave(await asyncio.wait_for(last, 1))


def places(count: int, subject: str = "a") -> list[Place]:
    made = [Place(subject, 1) for _ in range(count)]
    for number, place in enumerate(made, 1):
        place.number = number
    return made


async def test_all_wait_behind_the_first_refused_one_and_go_on_in_order() -> None:
    refusals, (a1, a2, a3, a4), (b1,) = Refusals(), places(4), places(1, "b")
    went: list[int] = []

    async def go(place: Place) -> None:
        await refusals.turn(place)
        went.append(place.number)

    refusals.refused(a3)
    refusals.refused(a2)  # its refusal was heard later
    refusals.refused(a4)
    assert [refusals.is_head(place) for place in (a1, a2, a3, a4)] == [False, True, False, False]
    await asyncio.wait_for(refusals.turn(b1), 1)
    await asyncio.wait_for(refusals.turn(a1), 1)
    await asyncio.wait_for(refusals.turn(a2), 1)
    tasks = [asyncio.create_task(go(place)) for place in (a4, a3)]
    await settle()
    assert went == []
    refusals.settled(a3)  # not the head: nothing changes
    await settle()
    assert went == []
    refusals.settled(a2)
    await asyncio.gather(*tasks)
    assert went == [3, 4]


async def test_who_gives_up_while_waiting_or_as_the_head_blocks_nobody() -> None:
    refusals, (a1, a2, a3) = Refusals(), places(3)
    refusals.refused(a1)
    tasks = [asyncio.create_task(refusals.turn(place)) for place in (a2, a3)]
    await settle()
    tasks[0].cancel()
    await asyncio.gather(tasks[0], return_exceptions=True)
    refusals.settled(a1)
    await asyncio.wait_for(tasks[1], 1)
