"""Which stream is to be looked at next: those that are due by turns, the others when their time comes."""

import asyncio
import heapq
import itertools
import time
from collections import deque

from worker.log_stream import LogStream

PASS_BUDGET_S = 0.002
TICK_S = 0.001


class StreamQueue:
    """Each stream stands in it once at most. One timer serves all that wait; nothing runs while none does.

    In one pass of the loop streams are handed out for PASS_BUDGET_S, so that the rest of the worker gets its turn.
    """

    def __init__(self) -> None:
        self._ready: deque[LogStream] = deque()
        self._takers: deque[asyncio.Future[None]] = deque()
        self._waking = 0
        self._pass_open = False
        self._pass_ends = 0.0
        self._later: list[tuple[float, int, LogStream]] = []
        self._count = itertools.count()
        self._timer: asyncio.Handle | None = None
        self._timer_due = 0.0

    def put(self, stream: LogStream) -> None:
        """Look at it as soon as a worker is free. A stream whose source is blocked is passed over."""
        if stream.queued or stream.source.blocked:
            return
        stream.due = None
        stream.queued = True
        self._ready.append(stream)
        self._wake()

    def put_later(self, stream: LogStream, delay_s: float) -> None:
        """Look at it in `delay_s` seconds, unless it is to be looked at before."""
        if delay_s <= 0:
            self.put(stream)
            return
        loop = asyncio.get_running_loop()
        due = loop.time() + delay_s
        if stream.queued or (stream.due is not None and stream.due <= due):
            return
        stream.due = due
        heapq.heappush(self._later, (due, next(self._count), stream))
        self._arm(loop)

    async def take(self) -> LogStream:
        """The next one; it may be put again only once `queued` is reset."""
        while not (self._ready and self._within_budget()):
            taker = asyncio.get_running_loop().create_future()
            self._takers.append(taker)
            try:
                await taker
            except asyncio.CancelledError:
                if not taker.cancelled():
                    self._waking -= 1
                    self._wake()
                raise
            self._waking -= 1
        stream = self._ready.popleft()
        self._wake()
        return stream

    @property
    def idle(self) -> bool:
        """Whether nothing is due, now or later."""
        return not self._ready and self._timer is None

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wake(self) -> None:
        """Wake one worker if there is work; that one wakes the next."""
        while self._ready and self._takers and not self._waking:
            taker = self._takers.popleft()
            if not taker.done():  # it is, when its worker was cancelled
                self._waking += 1
                taker.set_result(None)

    def _within_budget(self) -> bool:
        now = time.monotonic()
        if not self._pass_open:
            self._pass_open = True
            self._pass_ends = now + PASS_BUDGET_S
            asyncio.get_running_loop().call_soon(self._end_pass)
        return now < self._pass_ends

    def _end_pass(self) -> None:
        self._pass_open = False
        self._wake()

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        due = self._later[0][0]
        if self._timer is not None:
            if self._timer_due <= due:
                return
            self._timer.cancel()
        self._timer_due = due
        self._timer = loop.call_at(due, self._tick)

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = None
        until = loop.time() + TICK_S
        while self._later and self._later[0][0] <= until:
            due, _, stream = heapq.heappop(self._later)
            if stream.due == due:
                self.put(stream)
                stream.due = None
        if self._later:
            self._arm(loop)
