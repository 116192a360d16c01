"""Subscriptions of the Bus, which outlive its connections, and a bounded queue of messages for slow
readers.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

from loguru import logger

from worker.bus.messages import Message

if TYPE_CHECKING:
    from worker.bus.connection import Bus

Handler = Callable[[Message], None]


class Subscription:
    def __init__(self, bus: "Bus", subject: str, handler: Handler, queue: str) -> None:
        self.subject = subject
        self.queue = queue
        self.raw: Any = None  # nats-py's own subscription on the present connection
        self.on_end: Callable[[], None] | None = None
        self._bus = bus
        self._handler: Handler | None = handler

    def deliver(self, message: Message) -> None:
        if self._handler is None:
            return
        try:
            self._handler(message)
        except Exception:  # the next message must come through
            logger.exception("a handler of {} failed", self.subject)

    async def stop(self) -> None:
        """No message is delivered after this began."""
        self._handler = None
        await self._bus._detach(self)

    def ended(self) -> None:
        """The bus was closed."""
        self._handler = None
        if self.on_end is not None:
            self.on_end()


class MessageQueue:
    """Messages in order, at most `max_messages` and `max_bytes`; what does not fit is dropped and counted.

    `async for message in queue` ends after `stop`, or when the bus was closed.
    """

    def __init__(self, *, max_messages: int, max_bytes: int) -> None:
        self.dropped = 0
        self.dropped_bytes = 0
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._messages: deque[Message] = deque()
        self._bytes = 0
        self._ready = asyncio.Event()
        self._ended = False
        self._subscription: Subscription | None = None

    def attach(self, subscription: Subscription) -> None:
        self._subscription = subscription
        subscription.on_end = self._end

    def put(self, message: Message) -> None:
        size = len(message.data)
        if len(self._messages) >= self._max_messages or self._bytes + size > self._max_bytes:
            self.dropped += 1
            self.dropped_bytes += size
            return
        self._messages.append(message)
        self._bytes += size
        self._ready.set()

    async def get(self, timeout: float | None = None) -> Message:
        """The next message. TimeoutError; StopAsyncIteration when it has ended and is empty."""
        async with asyncio.timeout(timeout):
            while not self._messages:
                if self._ended:
                    raise StopAsyncIteration
                self._ready.clear()
                await self._ready.wait()
        message = self._messages.popleft()
        self._bytes -= len(message.data)
        return message

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Message:
        return await self.get()

    async def stop(self) -> None:
        self._end()
        if self._subscription is not None:
            await self._subscription.stop()

    def _end(self) -> None:
        self._ended = True
        self._ready.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()
