"""Blocking work in a thread that can be called off."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

T = TypeVar("T")


async def run_in(threads: Executor, work: Callable[[], T], call_off: Callable[[], None]) -> T:
    """Run `work` in one of the threads. Whoever is cancelled meanwhile calls it off and waits for it all the same,
    as it still writes.
    """
    future = asyncio.get_running_loop().run_in_executor(threads, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        call_off()
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError:
                continue
        if not future.cancelled():
            future.exception()  # seen: the cancellation is the answer
        raise
