"""When a finished container goes."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from schemas.spec import ImageSpec, ServiceSpec
from schemas.status import ContainerStatus, State
from worker.expiry import Expiry, seconds_left
from worker.records import ContainerRecord

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def record(
    state: State, *, ttl_s: float | None = 60.0, finished_s_ago: float | None = 10.0, **more: object
) -> ContainerRecord:
    finished = None if finished_s_ago is None else NOW - timedelta(seconds=finished_s_ago)
    status = ContainerStatus(
        container="web-0", service="web", replica=0, instance="i1", state=state, finished_at=finished, **more
    )  # type: ignore[arg-type]
    return ContainerRecord(
        status=status, spec=ServiceSpec(image=ImageSpec(name="app"), ttl_after_finished_s=ttl_s)
    )


@pytest.mark.parametrize(
    ("made", "left_s"),
    [
        (record(State.EXITED), 50.0),
        (record(State.FAILED), 50.0),
        (record(State.EXITED, finished_s_ago=61), 0.0),
        (record(State.EXITED, ttl_s=0), 0.0),
        (record(State.EXITED, ttl_s=None), None),
        (record(State.RUNNING), None),
        (record(State.PENDING, finished_s_ago=None), None),
        (record(State.STOPPING), None),
        (record(State.EXITED, finished_s_ago=None, created_at=NOW - timedelta(seconds=20)), 40.0),
        (record(State.EXITED, finished_s_ago=None), None),
        (record(State.EXITED, next_start_at=NOW), None),
    ],
)
def test_how_long_it_stays(made: ContainerRecord, left_s: float | None) -> None:
    assert seconds_left(made, NOW) == left_s


class Removals:
    def __init__(self, *, busy: bool = False) -> None:
        self.asked: list[tuple[str, str]] = []
        self.busy = busy
        self.happened = asyncio.Event()

    def __call__(self, cid: str, instance: str) -> bool:
        self.asked.append((cid, instance))
        self.happened.set()
        return not self.busy


async def test_it_goes_when_its_time_is_over() -> None:
    removals = Removals()
    expiry = Expiry(removals, clock=lambda: NOW)
    expiry.begin()
    expiry.watch("web-0", record(State.EXITED, ttl_s=10.01))
    async with asyncio.timeout(5):
        # The clock stands still, so it asks the record again until that says 0.
        expiry.watch("web-0", record(State.EXITED, ttl_s=10))
        await removals.happened.wait()
    assert removals.asked == [("web-0", "i1")]
    expiry.close()


async def test_one_that_was_started_is_spared() -> None:
    removals = Removals()
    expiry = Expiry(removals, clock=lambda: NOW)
    expiry.begin()
    expiry.watch("web-0", record(State.EXITED, ttl_s=0))
    expiry.watch("web-0", record(State.INITIALIZING, ttl_s=0, finished_s_ago=None))
    expiry.watch("web-1", record(State.EXITED, ttl_s=0))
    expiry.watch("web-1", None)
    for _ in range(5):
        await asyncio.sleep(0)
    assert removals.asked == []
    expiry.close()


async def test_one_that_is_busy_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.expiry.RETRY_S", 0.01)
    removals = Removals(busy=True)
    expiry = Expiry(removals, clock=lambda: NOW)
    expiry.begin()
    expiry.watch("web-0", record(State.EXITED, ttl_s=0))
    async with asyncio.timeout(5):
        while len(removals.asked) < 3:
            removals.happened.clear()
            await removals.happened.wait()
    expiry.close()


async def test_the_wall_clock_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set back meanwhile, it stays longer; the timer alone removes nothing."""
    monkeypatch.setattr("worker.expiry.LONGEST_PAUSE_S", 0.01)
    now, looks = NOW, 0

    def clock() -> datetime:
        nonlocal looks
        looks += 1
        return now

    removals = Removals()
    expiry = Expiry(removals, clock=clock)
    expiry.begin()
    expiry.watch("web-0", record(State.EXITED, ttl_s=3600))
    async with asyncio.timeout(5):
        while looks < 4:
            await asyncio.sleep(0)
    assert removals.asked == []
    now = NOW + timedelta(hours=2)
    async with asyncio.timeout(5):
        await removals.happened.wait()
    expiry.close()


async def test_nothing_goes_before_it_has_begun() -> None:
    removals = Removals()
    expiry = Expiry(removals, clock=lambda: NOW)
    expiry.watch("web-0", record(State.EXITED, ttl_s=0))
    expiry.watch("web-1", record(State.EXITED, ttl_s=0))
    expiry.watch("web-1", record(State.INITIALIZING, ttl_s=0, finished_s_ago=None))
    for _ in range(5):
        await asyncio.sleep(0)
    assert removals.asked == []
    expiry.begin()
    async with asyncio.timeout(5):
        await removals.happened.wait()
    assert removals.asked == [("web-0", "i1")]
    expiry.close()
