"""The queue on both kinds of loop, the one of the worker and the one of the tests."""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop

from worker.log_queue import StreamQueue
from worker.log_stream import LogSource, LogStream

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop

    def run(main: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(asyncio.wait_for(main, 10))

    return run


def make_streams(folder: Path, count: int) -> list[LogStream]:
    subjects = {"stdout": "out", "stderr": "err"}
    return [LogSource(f"c-{n}", f"I{n}", folder, 1, subjects).streams["stdout"] for n in range(count)]


async def take(queue: StreamQueue) -> LogStream:
    stream = await queue.take()
    stream.queued = False
    return stream


def test_turns_and_each_once(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        queue, streams = StreamQueue(), make_streams(tmp_path, 3)
        for stream in [*streams, *streams]:
            queue.put(stream)
        assert [await take(queue) for _ in streams] == streams
        assert queue.idle

    run(main())


def test_due_later_in_order_and_the_earlier_counts(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        queue, (a, b, c) = StreamQueue(), make_streams(tmp_path, 3)
        queue.put_later(a, 0.06)
        queue.put_later(b, 0.01)
        queue.put_later(b, 5.0)
        queue.put_later(c, 5.0)
        queue.put_later(c, 0.03)
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert [await take(queue) for _ in range(3)] == [b, c, a]
        assert 0.05 < loop.time() - began < 3
        queue.put_later(a, 1e-9)  # due before it is armed
        assert await take(queue) is a
        queue.close()

    run(main())


def test_what_is_put_now_is_not_given_again_when_its_time_comes(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        queue, (a, b) = StreamQueue(), make_streams(tmp_path, 2)
        queue.put_later(a, 0.01)
        queue.put(a)
        assert await take(queue) is a
        queue.put_later(b, 0.03)
        assert await take(queue) is b
        assert queue.idle

    run(main())


def test_a_blocked_source_is_passed_over(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        queue, (a, b) = StreamQueue(), make_streams(tmp_path, 2)
        a.source.blocked = True
        queue.put(a)
        queue.put_later(a, 0.001)
        queue.put_later(b, 0.02)
        assert await take(queue) is b

    run(main())


def test_many_workers_share_and_none_hogs_the_loop(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        queue, [stream] = StreamQueue(), make_streams(tmp_path, 1)
        taken = 0

        async def work() -> None:
            nonlocal taken
            while True:
                await take(queue)
                taken += 1
                queue.put(stream)  # always more to do, and never a real wait

        tasks = [asyncio.create_task(work()) for _ in range(8)]
        queue.put(stream)
        for _ in range(20):
            await asyncio.sleep(0)
        assert taken > 20
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(main())


def test_a_cancelled_worker_passes_its_turn_on(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        queue, [stream] = StreamQueue(), make_streams(tmp_path, 1)
        first, second = (asyncio.create_task(queue.take()) for _ in range(2))
        await asyncio.sleep(0)
        queue.put(stream)
        first.cancel()
        assert await second is stream
        await asyncio.gather(first, return_exceptions=True)

    run(main())
