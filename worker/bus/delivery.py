"""One message of the command stream in the hands of whoever handles it."""

from datetime import datetime
from typing import Protocol

from worker.bus.messages import Headers, Message

_ACK, _TERM, _PROGRESS = b"+ACK", b"+TERM", b"+WPI"


class Consumer(Protocol):
    """The side of the consumer that a delivery talks to."""

    async def answer(self, reply: str, answer: bytes, *, wait: bool = False) -> None: ...
    def finished(self, delivery: "Delivery") -> None: ...
    def replay_after(self, delay_s: float) -> None: ...


class Delivery:
    """One message. Whoever got it ends it with exactly one of `ack`, `term` or `nak`; further calls do
    nothing.

    None of them fails: an acknowledgement that is lost brings the message again, which the ledger knows.
    """

    __slots__ = (
        "_consumer",
        "_reply",
        "data",
        "done",
        "headers",
        "since",
        "stream_seq",
        "subject",
        "time",
        "times",
    )

    def __init__(
        self,
        consumer: Consumer,
        message: Message,
        *,
        stream_seq: int,
        time: datetime,
        deliveries: int,
        since: float,
    ) -> None:
        self.subject = message.subject
        self.headers: Headers = message.headers
        self.data = message.data
        self.stream_seq = stream_seq
        self.time = time
        self.times = deliveries
        self.since = since
        self.done = False
        self._reply = message.reply
        self._consumer = consumer

    @property
    def redelivered(self) -> bool:
        return self.times > 1

    def redelivered_as(self, reply: str) -> None:
        """The server has sent it again: the newest delivery is the one to answer."""
        self._reply = reply

    async def ack(self, *, wait: bool = False) -> None:
        """It is in the journal: the stream may forget it. `wait` for the server's confirmation."""
        await self._finish(_ACK, wait=wait)

    async def term(self) -> None:
        """It can never be understood: it is not to come again."""
        await self._finish(_TERM)

    async def nak(self, delay_s: float = 0.0) -> None:
        """It cannot be taken now: it and all after it come again, in order, after `delay_s`."""
        if not self.done:
            self.done = True
            self._consumer.replay_after(delay_s)
            self._consumer.finished(self)

    async def in_progress(self) -> None:
        """It is being worked on. (The consumer says so by itself for what it has handed out.)"""
        if not self.done:
            await self._consumer.answer(self._reply, _PROGRESS)

    async def _finish(self, answer: bytes, *, wait: bool = False) -> None:
        if self.done:
            return
        self.done = True
        await self._consumer.answer(self._reply, answer, wait=wait)
        self._consumer.finished(self)
