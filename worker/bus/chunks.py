"""Log chunks into their stream: many under way, each sent again with identical bytes until it is stored.

nats-py's own pipelining never resolves on an error, so each publish here has a reply of its own with a
timeout. A chunk carries `Nats-Msg-Id`, so a repetition within the stream's duplicate window is recognised;
that is why the bytes must be the same. The chunks of one subject keep the order of the calls, through a
reconnect too; only one that the server itself refused (a stream without a leader, or a full one) may follow
later ones that were under way already. The window is bounded by messages and by bytes over all subjects, and it
is fair: a subject with a backlog waits behind one that has little under way. Its bytes follow what the way to
the server carries (`allowance`).
"""

import asyncio
import random
from datetime import datetime

import msgspec
from loguru import logger

from worker.bus.allowance import Allowance
from worker.bus.connection import Bus
from worker.bus.failures import JetStreamError, NoAnswer, NoResponders, NotConnected
from worker.bus.jetstream import PubAck, StreamNames, read_ack
from worker.bus.messages import Headers
from worker.bus.patience import Patience
from worker.bus.window import WINDOW_BYTES, WINDOW_MESSAGES, Place, Refusals, Turnstile, Window
from worker.errors import Internal, ResourceExhausted, Unavailable
from worker.log_chunks import INSTANCE, MESSAGE_ID, OFFSET

ACK_TIMEOUT_S = 3.0  # a leader that steps down takes what it was sent with it
LONGEST_ACK_TIMEOUT_S = 20.0
RETRY_S = 0.1
LONGEST_RETRY_S = 5.0
REPORT_EVERY_S = 30.0
DOUBT_S = 60.0  # half of the stream's duplicate window


class StoredChunk(msgspec.Struct, frozen=True):
    """The newest chunk of a subject; `size` is that of its payload."""

    subject: str
    headers: Headers
    size: int
    stream_seq: int
    time: datetime


def stored_by(last: StoredChunk, headers: Headers, size: int) -> bool:
    """Whether a chunk was stored, judged by the newest of its subject: a connection that breaks loses only
    what was sent last, so everything before the newest is there. Pure.
    """
    if last.headers.get(MESSAGE_ID) == headers.get(MESSAGE_ID):
        return True
    if last.headers.get(INSTANCE) != headers.get(INSTANCE):
        return False
    try:
        there, ours = int(last.headers[OFFSET]), int(headers[OFFSET])
    except (KeyError, ValueError):
        return False
    # At one offset the empty ones (a gap, the end of a run) come before the bytes.
    return there > ours or (there == ours and last.size > 0 and size == 0)


class _Flight:
    """A chunk under way. `plain_loss`: nothing but lost connections has kept it from being stored."""

    __slots__ = ("data", "headers", "place", "plain_loss", "sent_at")

    def __init__(self, place: Place, data: bytes, headers: Headers) -> None:
        self.place = place
        self.data = data
        self.headers = headers
        self.sent_at: float | None = None
        self.plain_loss = True


class ChunkPublisher:
    def __init__(
        self,
        bus: Bus,
        *,
        max_in_flight: int = WINDOW_MESSAGES,
        max_bytes: int = WINDOW_BYTES,
        ack_timeout_s: float = ACK_TIMEOUT_S,
    ) -> None:
        self.stream = StreamNames(bus.cfg.stream_prefix).logs
        self.retries = 0
        self._bus = bus
        self._allowance = Allowance(max_bytes)
        self._window = Window(max_in_flight, self._allowance.limit_bytes)
        self._refusals = Refusals()
        self._turnstile = Turnstile(lambda: bus.connected or bus.closed)
        bus.listen(lambda connected: self._turnstile.advance())
        self._patience = Patience(ack_timeout_s, LONGEST_ACK_TIMEOUT_S)
        self._told = float("-inf")

    async def publish(self, subject: str, data: bytes, headers: Headers) -> PubAck:
        """Return once the chunk is stored; until then it is sent again, for as long as it takes.

        The acknowledgement names its sequence and whether it was stored before. ResourceExhausted: it is
        larger than the server takes. Cancel to give up; whether it was stored is unknown then.
        """
        if MESSAGE_ID not in headers:
            raise Internal(f"a chunk for {subject} without {MESSAGE_ID} could be stored twice")
        place = await self._window.enter(subject, len(data))
        try:
            return await self._until_stored(place, data, headers)
        finally:
            self._refusals.settled(place)
            self._window.leave(place)

    async def last(self, subject: str) -> StoredChunk | None:
        """The newest chunk of a subject, or None. Unavailable."""
        message = await self._bus.js.last_message(self.stream, subject)
        if message is None:
            return None
        return StoredChunk(
            message.subject, message.headers, len(message.data), message.stream_seq, message.time
        )

    async def publish_stats(self, subject: str, data: bytes) -> bool:
        """Into the stats stream, without waiting for anything; a sample may be lost. False when it surely
        was.
        """
        try:
            await self._bus.publish(subject, data)
        except Unavailable:
            return False
        return True

    async def _until_stored(self, place: Place, data: bytes, headers: Headers) -> PubAck:
        pause = RETRY_S
        flight = _Flight(place, data, headers)
        while True:
            await self._refusals.turn(place)
            try:
                return await self._once(flight)
            except NotConnected:
                # All wait for the same thing, and go on in their order at the turnstile: no pause.
                if self._bus.closed:
                    raise
                self.retries += 1
                await asyncio.sleep(0)
                continue
            except ResourceExhausted:
                raise
            except Unavailable as failure:
                flight.plain_loss = False
                self._tell(place.subject, failure)
                self.retries += 1
                if not isinstance(failure, NoAnswer):
                    self._refusals.refused(place)
                    if not self._refusals.is_head(place):
                        continue
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, LONGEST_RETRY_S)

    async def _once(self, flight: _Flight) -> PubAck:
        token, reply = "", None
        await self._turnstile.enter(flight.place.number)
        try:
            found = await self._find(flight)
            if found is not None:
                return found
            token, reply = self._bus.expect()
            answer_to = self._bus.reply_subject(token)
            flight.sent_at = self._now()
            await self._bus.publish(flight.place.subject, flight.data, flight.headers, reply=answer_to)
        except BaseException:
            self._bus.forget(token)
            raise
        finally:
            self._turnstile.leave()
        patience_s = self._patience.seconds
        try:
            async with asyncio.timeout(patience_s):
                message = await reply
        except TimeoutError:
            self._patience.silent(patience_s)
            self._allowance.silent(patience_s, self._now())
            self._window.resize(self._allowance.limit_bytes)
            raise NoAnswer(f"no acknowledgement for {flight.place.subject}") from None
        finally:
            self._bus.forget(token)
        self._answered(flight.place, self._now() - flight.sent_at)
        if message.status == 503:
            raise NoResponders(f"no stream takes {flight.place.subject}")
        return read_ack(message)

    def _answered(self, place: Place, took_s: float) -> None:
        self._patience.answered(took_s)
        self._allowance.answered(place.size, took_s, self._now(), held_back=self._window.holds_back)
        self._window.resize(self._allowance.limit_bytes)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    async def _find(self, flight: _Flight) -> PubAck | None:
        """After an absence that the stream's memory of ids may not cover: was it stored before it?"""
        if not flight.plain_loss or flight.sent_at is None:
            return None
        if self._now() - flight.sent_at < DOUBT_S:
            return None
        last = await self.last(flight.place.subject)
        if last is None or not stored_by(last, flight.headers, len(flight.data)):
            return None
        return PubAck(self.stream, last.stream_seq, duplicate=True)

    def _tell(self, subject: str, failure: Unavailable) -> None:
        now = self._now()
        if now - self._told < REPORT_EVERY_S:
            return
        self._told = now
        what = failure.description if isinstance(failure, JetStreamError) else failure.message
        logger.warning("log chunks wait ({}): {}; trying again", subject, what)
