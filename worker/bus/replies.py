"""Answers to requests: one subscription for all of them, told apart by a token in the reply subject."""

import asyncio

from worker.bus.failures import NotConnected
from worker.bus.messages import Message


class Replies:
    """The Bus points `inbox` at a fresh subject on each connection and subscribes `arrived` to what is
    below.
    """

    def __init__(self) -> None:
        self.inbox = ""
        self._count = 0
        self._waiting: dict[str, asyncio.Future[Message]] = {}

    def expect(self) -> tuple[str, asyncio.Future[Message]]:
        self._count += 1
        token = format(self._count, "x")
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[token] = future
        return token, future

    def subject(self, token: str) -> str:
        return f"{self.inbox}.{token}"

    def forget(self, token: str) -> None:
        future = self._waiting.pop(token, None)
        if future is None:
            return
        if not future.done():
            future.cancel()
        elif not future.cancelled():
            future.exception()  # seen: an abandoned answer is no error

    def arrived(self, message: Message) -> None:
        future = self._waiting.get(message.subject.rpartition(".")[2])
        if future is not None and not future.done():
            future.set_result(message)

    def fail(self, why: str) -> None:
        """The connection broke: nobody will answer."""
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(NotConnected(why))
