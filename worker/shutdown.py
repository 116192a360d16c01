"""How a worker ends: in order and within ten seconds when it is asked once, at once when it is asked twice.

What is given up then is not lost: the ledger, the outbox and the capture files have it for the next worker.
"""

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from loguru import logger

# Counted from the first signal. Commands, and the stops of containers, have until the first; what they gave rise to
# is sent until the second; then the parts are closed.
COMMANDS_S = 7.0
SENDING_S = 9.0
LIMIT_S = 10.0
# How long the parts may take to be closed when nothing is waited for.
FORCED_S = 1.0
GIVEN_UP = 4  # the contract's exit code for what failed


class Shutdown:
    """`asked` once, `forced` by the second time. All calls from the loop."""

    def __init__(self, asked: asyncio.Event | None = None) -> None:
        self.asked = asked or asyncio.Event()
        self.forced = asyncio.Event()
        self._began: float | None = None

    def ask(self) -> None:
        if self.asked.is_set():
            self.forced.set()
        self.asked.set()

    async def begun(self) -> None:
        """Wait until it is asked for; the time counts from then on."""
        await self.asked.wait()
        self._begin()

    async def give(self, work: Coroutine[Any, Any, object], until_s: float) -> bool:
        """Let `work` go on until it is done, `until_s` after the beginning, or forced. Whether it was done.

        What it raises is raised here.
        """
        loop = asyncio.get_running_loop()
        task: asyncio.Task[object] = asyncio.ensure_future(work)
        forced = asyncio.ensure_future(self.forced.wait())
        try:
            left_s = max(0.0, self._begin() + until_s - loop.time())
            both: set[asyncio.Future[Any]] = {task, forced}
            await asyncio.wait(both, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
            return task.done()
        finally:
            for one in (task, forced):
                one.cancel()
            await asyncio.gather(task, forced, return_exceptions=True)

    def _begin(self) -> float:
        if self._began is None:
            self._began = asyncio.get_running_loop().time()
        return self._began


@contextmanager
def on_signals(shutdown: Shutdown, reload: Callable[[], None]) -> Iterator[None]:
    """Heed the signals of a process that is nothing but this worker.

    Whatever hangs while the parts are closed, such as a thread that writes to a dead disk, the process is gone when
    its time is over. A terminal that is closed ends the worker, too: nobody would find it again.
    """
    loop = asyncio.get_running_loop()
    terminal = os.isatty(2)

    def end() -> None:
        if shutdown.forced.is_set():
            return
        again = shutdown.asked.is_set()
        shutdown.ask()
        if again:
            logger.warning("asked again: ending at once; the next worker goes on with what is left")
        limit = threading.Timer(FORCED_S if again else LIMIT_S, os._exit, (GIVEN_UP if again else 0,))
        limit.daemon = True
        limit.start()

    def hang_up() -> None:
        if terminal and not os.isatty(2):
            end()
        else:
            reload()

    handlers = {signal.SIGTERM: end, signal.SIGINT: end, signal.SIGHUP: hang_up}
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        for number in handlers:
            loop.remove_signal_handler(number)
