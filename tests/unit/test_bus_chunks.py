"""The window of chunks under way, and what the newest message of a subject proves."""

import asyncio
from datetime import UTC, datetime

import pytest

from worker.bus.chunks import StoredChunk, stored_by
from worker.bus.window import Turnstile, Window


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class Walker:
    """Enters a window, notes it, and leaves when told."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self.inside: list[str] = []
        self.most = 0
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.gates: dict[str, asyncio.Event] = {}

    def start(self, name: str, subject: str, size: int = 1) -> None:
        self.gates[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._walk(name, subject, size))

    async def _walk(self, name: str, subject: str, size: int) -> None:
        place = await self.window.enter(subject, size)
        self.inside.append(name)
        try:
            await self.gates[name].wait()
        finally:
            self.window.leave(place)

    async def leave(self, name: str) -> None:
        self.gates[name].set()
        await self.tasks[name]
        await settle()

    async def cancel(self, *names: str) -> None:
        for name in names:
            self.tasks[name].cancel()
        await asyncio.gather(*(self.tasks[name] for name in names), return_exceptions=True)
        await settle()


async def test_messages_and_bytes_bound_it() -> None:
    walker = Walker(Window(max_messages=3, max_bytes=10))
    for name, size in (("a", 4), ("b", 5), ("c", 4)):
        walker.start(name, "s", size)
    await settle()
    assert walker.inside == ["a", "b"]
    await walker.leave("a")
    assert walker.inside == ["a", "b", "c"]
    await walker.cancel("b", "c")


async def test_one_larger_than_the_window_goes_alone() -> None:
    walker = Walker(Window(max_messages=3, max_bytes=10))
    walker.start("a", "s", 1)
    walker.start("big", "s", 100)
    walker.start("b", "s", 1)
    await settle()
    assert walker.inside == ["a"]
    await walker.leave("a")
    assert walker.inside == ["a", "big"]
    await walker.leave("big")
    assert walker.inside == ["a", "big", "b"]
    await walker.leave("b")


async def test_subjects_take_turns() -> None:
    walker = Walker(Window(max_messages=1, max_bytes=100))
    for name in ("a1", "a2", "a3", "b1", "c1", "b2"):
        walker.start(name, name[0])
    await settle()
    order = []
    for _ in range(6):
        order.append(walker.inside[-1])
        await walker.leave(walker.inside[-1])
    assert order == ["a1", "a2", "b1", "c1", "a3", "b2"]


async def test_nobody_overtakes_one_of_the_same_subject() -> None:
    window = Window(max_messages=2, max_bytes=100)
    first, second = await window.enter("a", 1), await window.enter("b", 1)
    walker = Walker(window)
    walker.start("a2", "a")
    await settle()
    # Two places come free at once: a2 is admitted and has not run yet when a3 asks.
    window.leave(first)
    window.leave(second)
    third = asyncio.create_task(window.enter("a", 1))
    third.add_done_callback(lambda _: walker.inside.append("a3"))
    assert walker.inside == []
    await settle()
    assert walker.inside == ["a2", "a3"]
    window.leave(third.result())
    await walker.leave("a2")


@pytest.mark.parametrize("admitted", [False, True])
async def test_a_cancelled_one_gives_its_place_away(admitted: bool) -> None:
    window = Window(max_messages=1, max_bytes=100)
    place = await window.enter("a", 1)
    walker = Walker(window)
    for name in ("a2", "b1", "a3"):
        walker.start(name, name[0])
    await settle()
    if admitted:
        window.leave(place)  # a2 has the place and has not run yet
    await walker.cancel("a2", "b1")
    if not admitted:
        assert walker.inside == []
        window.leave(place)
        await settle()
    assert walker.inside == ["a3"]
    await walker.leave("a3")
    window.leave(await asyncio.wait_for(window.enter("a", 1), 1))


async def test_its_turn_comes_while_it_is_being_cancelled() -> None:
    window = Window(max_messages=1, max_bytes=100)
    place = await window.enter("a", 1)
    walker = Walker(window)
    for name in ("a2", "a3"):
        walker.start(name, name[0])
    await settle()
    walker.tasks["a2"].cancel()
    window.leave(place)  # before the cancelled one could withdraw
    await settle()
    assert walker.inside == ["a3"]
    await walker.leave("a3")
    window.leave(await asyncio.wait_for(window.enter("a", 1), 1))
    await walker.cancel("a2")


class Gate:
    """A turnstile that can be opened and closed, and those who went through."""

    def __init__(self) -> None:
        self.open = True
        self.turnstile = Turnstile(lambda: self.open)
        self.through: list[int] = []
        self.tasks: list[asyncio.Task[None]] = []

    def start(self, *numbers: int, steps: int = 0) -> None:
        self.tasks += [asyncio.create_task(self._walk(number, steps)) for number in numbers]

    async def _walk(self, number: int, steps: int) -> None:
        await self.turnstile.enter(number)
        for _ in range(steps):
            await asyncio.sleep(0)
        self.through.append(number)
        self.turnstile.leave()

    def let_through(self) -> None:
        self.open = True
        self.turnstile.advance()


async def test_an_open_turnstile_lets_through_at_once() -> None:
    gate = Gate()
    gate.start(3, 1, 2)
    await settle()
    assert gate.through == [3, 1, 2]


async def test_a_closed_one_lets_through_in_order_when_it_opens() -> None:
    gate = Gate()
    gate.open = False
    gate.start(7, 3, 9)
    await settle()
    gate.start(5, 1)
    await settle()
    assert gate.through == []
    gate.let_through()
    gate.start(10, 11)  # new ones do not overtake
    for _ in range(4):
        await settle()
    assert gate.through == [1, 3, 5, 7, 9, 10, 11]


async def test_one_at_a_time_even_when_it_takes_long() -> None:
    gate = Gate()
    gate.open = False
    gate.start(1, steps=20)
    gate.start(2)
    await settle()
    gate.let_through()
    await settle()
    gate.start(3)
    await settle()
    assert gate.through == []
    await asyncio.gather(*gate.tasks)
    assert gate.through == [1, 2, 3]


async def test_it_closes_again_under_way() -> None:
    gate = Gate()
    gate.open = False
    gate.start(1, 2, 3)
    await settle()
    gate.let_through()
    gate.open = False  # the first is through, the others wait on
    await settle()
    assert gate.through == [1]
    gate.let_through()
    await asyncio.gather(*gate.tasks)
    assert gate.through == [1, 2, 3]


@pytest.mark.parametrize("let", [False, True])
async def test_a_cancelled_one_does_not_block_the_others(let: bool) -> None:
    gate = Gate()
    gate.open = False
    gate.start(1, 2, 3)
    await settle()
    if let:
        gate.let_through()  # the first has its turn and has not run yet
    gate.tasks[0].cancel()
    gate.let_through()
    await asyncio.gather(*gate.tasks, return_exceptions=True)
    assert gate.through == [2, 3]
    await asyncio.wait_for(gate.turnstile.enter(4), 1)


def headers(offset: int, name: str, instance: str = "I1") -> dict[str, str]:
    return {
        "Sandfleet-Instance": instance,
        "Sandfleet-Offset": str(offset),
        "Nats-Msg-Id": f"{instance}/stdout/{name}",
    }


@pytest.mark.parametrize(
    ("last", "last_size", "ours", "size", "expected"),
    [
        (headers(0, "0+5"), 5, headers(0, "0+5"), 5, True),  # it is the newest
        (headers(5, "5+5"), 5, headers(0, "0+5"), 5, True),  # a later one is there
        (headers(0, "0+5"), 5, headers(5, "5+5"), 5, False),  # only an earlier one
        (headers(9, "9+1", "I2"), 1, headers(0, "0+5"), 5, False),  # another instance
        (headers(5, "5+eof1"), 0, headers(5, "5+5"), 5, False),  # an empty one comes before the bytes
        (headers(5, "5+5"), 5, headers(5, "5+eof1"), 0, True),
        (headers(5, "5+lost3"), 0, headers(5, "5+eof1"), 0, False),  # unknown: sent again
        ({}, 5, headers(0, "0+5"), 5, False),
        ({**headers(0, "x"), "Sandfleet-Offset": "?"}, 5, headers(0, "0+5"), 5, False),
    ],
)
def test_stored_by(
    last: dict[str, str], last_size: int, ours: dict[str, str], size: int, expected: bool
) -> None:
    chunk = StoredChunk("s", last, last_size, 1, datetime.now(UTC))
    assert stored_by(chunk, ours, size) is expected
