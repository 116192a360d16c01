"""Blocking work of a verb in a thread, which Ctrl-C ends and waits for."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from worker.images.registry.stopping import CalledOff, StopSignal

T = TypeVar("T")


async def in_thread(work: Callable[[StopSignal], T]) -> T:
    """`work` asks its signal often, and leaves nothing behind when that is set."""
    stop = StopSignal()
    future = asyncio.get_running_loop().run_in_executor(None, work, stop)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([future])
        raise
    except CalledOff:
        raise asyncio.CancelledError from None
