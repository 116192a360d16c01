"""Log chunks into their stream: many under way, each sent again with identical bytes until it is stored.

nats-py's own pipelining never resolves on an error, so each publish here has a reply of its own with a
timeout. A chunk carries `Nats-Msg-Id`, so a repetition within the stream's duplicate window is recognised;
that is why the bytes must be the same. First sends of one subject keep the order of the calls. The window
is bounded by messages and by bytes over all subjects, and it is fair: a subject with a backlog waits behind
one that has little under way.
"""

import asyncio
import random
from collections import deque
from datetime import datetime

import msgspec
from loguru import logger

from worker.bus.connection import Bus
from worker.bus.failures import JetStreamError, NoAnswer, NoResponders, NotConnected
from worker.bus.jetstream import PubAck, StreamNames, read_ack
from worker.bus.messages import Headers
from worker.errors import Internal, ResourceExhausted, Unavailable
from worker.log_chunks import INSTANCE, MESSAGE_ID, OFFSET

WINDOW_BYTES = 8 * 1024 * 1024
WINDOW_MESSAGES = 64
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


class _Place:
    """A chunk's place in the window."""

    __slots__ = ("admitted", "size", "subject")

    def __init__(self, subject: str, size: int) -> None:
        self.subject = subject
        self.size = size
        self.admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Window:
    """Admits chunks up to `max_messages` and `max_bytes` (always one), by turns over the subjects that
    wait.
    """

    def __init__(self, max_messages: int = WINDOW_MESSAGES, max_bytes: int = WINDOW_BYTES) -> None:
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._messages = 0
        self._bytes = 0
        self._waiting: dict[str, deque[_Place]] = {}  # in the order of their turns
        self._waking = 0  # admitted, and not running yet

    async def enter(self, subject: str, size: int) -> _Place:
        place = _Place(subject, size)
        # Nobody overtakes one that was admitted and has yet to run.
        if not self._waiting and not self._waking and self._has_room(size):
            self._take(place)
            return place
        self._waiting.setdefault(subject, deque()).append(place)
        try:
            await place.admitted
        except asyncio.CancelledError:
            self._withdraw(place)
            raise
        self._waking -= 1
        self._next_turns()
        return place

    def leave(self, place: _Place) -> None:
        self._messages -= 1
        self._bytes -= place.size
        self._next_turns()

    def _has_room(self, size: int) -> bool:
        if self._messages == 0:
            return True
        return self._messages < self._max_messages and self._bytes + size <= self._max_bytes

    def _take(self, place: _Place) -> None:
        self._messages += 1
        self._bytes += place.size

    def _next_turns(self) -> None:
        while self._waiting:
            subject, places = next(iter(self._waiting.items()))
            if not self._has_room(places[0].size):
                return
            place = places.popleft()
            del self._waiting[subject]
            if places:
                self._waiting[subject] = places  # at the end of the turns
            if place.admitted.cancelled():
                continue
            self._take(place)
            self._waking += 1
            place.admitted.set_result(None)

    def _withdraw(self, place: _Place) -> None:
        """Cancelled while it waited, or just after it was admitted."""
        if not place.admitted.cancelled():
            self._waking -= 1
            self.leave(place)
            return
        places = self._waiting.get(place.subject)
        if places is not None and place in places:
            places.remove(place)
            if not places:
                del self._waiting[place.subject]
        self._next_turns()


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
        self._window = Window(max_in_flight, max_bytes)
        self._ack_timeout_s = ack_timeout_s
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
            return await self._until_stored(subject, data, headers)
        finally:
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

    async def _until_stored(self, subject: str, data: bytes, headers: Headers) -> PubAck:
        loop = asyncio.get_running_loop()
        pause, patience = RETRY_S, self._ack_timeout_s
        plain_loss = True  # nothing but lost connections has kept it from being stored
        while True:
            sent = loop.time()
            try:
                return await self._once(subject, data, headers, patience)
            except NotConnected:
                # All wait for the same thing and go on in the order in which they came: no pause.
                await self._bus.wait_connected()
                self.retries += 1
                if plain_loss and loop.time() - sent > DOUBT_S:
                    found = await self._find(subject, data, headers)
                    if found is not None:
                        return found
                continue
            except ResourceExhausted:
                raise
            except Unavailable as failure:
                plain_loss = False
                self._tell(subject, failure)
                if isinstance(failure, NoAnswer):
                    patience = min(patience * 2, LONGEST_ACK_TIMEOUT_S)
            self.retries += 1
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, LONGEST_RETRY_S)

    async def _find(self, subject: str, data: bytes, headers: Headers) -> PubAck | None:
        """After an absence that the stream's memory of ids may not cover: was it stored before it?"""
        try:
            last = await self.last(subject)
        except Unavailable:
            return None
        if last is None or not stored_by(last, headers, len(data)):
            return None
        return PubAck(self.stream, last.stream_seq, duplicate=True)

    async def _once(self, subject: str, data: bytes, headers: Headers, patience_s: float) -> PubAck:
        token, reply = self._bus.expect()
        try:
            await self._bus.publish(subject, data, headers, reply=self._bus.reply_subject(token))
            async with asyncio.timeout(patience_s):
                message = await reply
        except TimeoutError:
            raise NoAnswer(f"no acknowledgement for {subject}") from None
        finally:
            self._bus.forget(token)
        if message.status == 503:
            raise NoResponders(f"no stream takes {subject}")
        return read_ack(message)

    def _tell(self, subject: str, failure: Unavailable) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._told < REPORT_EVERY_S:
            return
        self._told = now
        what = failure.description if isinstance(failure, JetStreamError) else failure.message
        logger.warning("log chunks wait ({}): {}; trying again", subject, what)
