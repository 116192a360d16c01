"""Threads that nothing waits for when the worker ends: one that hangs in a call to a server must not hold it up.

What they do is such that it may end at any moment, as it may when the worker is killed.
"""

import asyncio
import queue
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_daemon_thread(call: Callable[[], T], name: str) -> "asyncio.Future[T]":
    """The outcome of `call`, which goes on in a thread whether or not anybody waits."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def tell(result: T | None, failure: BaseException | None) -> None:
        if outcome.done():
            return
        if failure is None:
            outcome.set_result(result)  # type: ignore[arg-type]
        else:
            outcome.set_exception(failure)

    def work() -> None:
        result: T | None = None
        failure: BaseException | None = None
        try:
            result = call()
        except BaseException as caught:
            failure = caught
        with suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            loop.call_soon_threadsafe(tell, result, failure)

    threading.Thread(target=work, name=name, daemon=True).start()
    return outcome


def side_by_side(
    calls: Iterable[T], do: Callable[[T], R], *, count: int, name: str
) -> Generator[tuple[T, R | None, Exception | None], None, None]:
    """(item, result, failure) of each, `count` at a time, as they end. `calls` is read as there is room.

    Close it, and nothing goes on.
    """
    todo: queue.SimpleQueue[T | None] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[T, R | None, Exception | None]] = queue.SimpleQueue()

    def work() -> None:
        while (item := todo.get()) is not None:
            try:
                done.put((item, do(item), None))
            except Exception as failure:
                done.put((item, None, failure))

    threads = 0
    under_way = 0
    try:
        for item in calls:
            if threads < count:
                threading.Thread(target=work, name=f"{name} {threads}", daemon=True).start()
                threads += 1
            todo.put(item)
            under_way += 1
            if under_way >= count:
                under_way -= 1
                yield done.get()
        while under_way:
            under_way -= 1
            yield done.get()
    finally:
        for _ in range(threads):
            todo.put(None)
        # Nothing goes on behind the back of a caller that has seen enough.
        for _ in range(under_way):
            done.get()
