"""The order and the bounds of an end: what is given time, what is given up, what a second request does."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from worker.shutdown import COMMANDS_S, FORCED_S, LIMIT_S, SENDING_S, Shutdown
from worker.winding_up import Counted


async def forever() -> None:
    await asyncio.Event().wait()


def test_the_parts_fit_into_ten_seconds() -> None:
    assert COMMANDS_S < SENDING_S < LIMIT_S <= 10
    assert FORCED_S <= 1


async def test_work_that_ends_is_waited_for() -> None:
    shutdown = Shutdown()
    shutdown.ask()
    await shutdown.begun()
    assert await shutdown.give(asyncio.sleep(0), SENDING_S)
    assert not shutdown.forced.is_set()


async def test_work_that_does_not_end_is_given_up_and_cancelled() -> None:
    shutdown = Shutdown()
    shutdown.ask()
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await forever()
        finally:
            ended.set()

    assert not await shutdown.give(work(), 0.01)
    assert ended.is_set()


async def test_time_counts_from_the_first_request_on() -> None:
    shutdown = Shutdown()
    shutdown.ask()
    await shutdown.begun()
    assert not await shutdown.give(forever(), 0.05)
    # What is over is over: nothing gets the same time again.
    assert not await shutdown.give(forever(), 0.05)


async def test_the_second_request_forces_it() -> None:
    shutdown = Shutdown()
    shutdown.ask()
    assert not shutdown.forced.is_set()
    giving = asyncio.create_task(shutdown.give(forever(), 3600))
    await asyncio.sleep(0)
    shutdown.ask()
    assert shutdown.forced.is_set()
    assert not await giving
    assert not await shutdown.give(forever(), 3600)


async def test_a_failure_is_not_swallowed() -> None:
    async def fail() -> None:
        raise ValueError("no")

    shutdown = Shutdown()
    shutdown.ask()
    with pytest.raises(ValueError, match="no"):
        await shutdown.give(fail(), SENDING_S)


async def test_somebody_elses_event_may_ask() -> None:
    asked = asyncio.Event()
    shutdown = Shutdown(asked)
    asked.set()
    await shutdown.begun()
    shutdown.ask()
    assert shutdown.forced.is_set()


async def test_what_was_spawned_is_counted_from_the_call_on() -> None:
    tasks: list[asyncio.Task[None]] = []

    def spawn(work: Coroutine[Any, Any, None], name: str) -> None:
        tasks.append(asyncio.create_task(work, name=name))

    counted = Counted(spawn, waiting=frozenset({"drain"}))
    counted.spawn(asyncio.sleep(0), "accept")
    counted.spawn(forever(), "pull")
    counted.spawn(forever(), "drain")
    assert counted.under_way == 2
    await tasks[0]
    assert counted.under_way == 1
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert counted.under_way == 0
