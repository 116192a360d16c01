"""Reading a stream in order with a cursor of one's own, and watching a key-value bucket.

    async with StreamReader(bus, "SANDFLEET_EVT", ["P.evt.n.>"], last_per_subject=True) as reader:
        async for message in reader: …          # StreamMessage, in stream order, each once

Start at `start_seq`, at `start_time`, with the last message per subject, with new ones only, or (default)
with the first there is. With `follow=False` it ends at what was the end when it began. `caught_up` is set
once all that was there has been given; `cursor` is the sequence of the last message given.

A reader survives reconnects, a lost consumer and gaps: it makes a new consumer right after its cursor. When
the stream itself was made anew it begins again with the first message. (nats-py's ordered consumer resets
silently and does not know domains.)
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Self

import msgspec
from loguru import logger

from worker.bus.connection import Bus
from worker.bus.failures import NotConnected
from worker.bus.messages import Message, StreamMessage, parse_ack
from worker.bus.subscription import Subscription
from worker.errors import Unavailable

NANOS = 1_000_000_000
CREATE_TIMEOUT_S = 60.0  # last-per-subject over 150,000 subjects takes the server seconds
PULL_MESSAGES = 1000
PULL_BYTES = 8 * 1024 * 1024
PULL_EXPIRES_S = 60.0
HEARTBEAT_S = 5.0
SILENCE_S = 2.5 * HEARTBEAT_S
INACTIVE_S = 120.0
RETRY_S = 0.5

_HEARTBEAT = 100
_NEW = {"deliver_policy": "new"}


class StreamReader:
    def __init__(
        self,
        bus: Bus,
        stream: str,
        filters: Sequence[str] = (),
        *,
        start_seq: int | None = None,
        start_time: datetime | None = None,
        last_per_subject: bool = False,
        new_only: bool = False,
        follow: bool = True,
    ) -> None:
        self.stream = stream
        self.caught_up = asyncio.Event()
        self.cursor = 0
        self._bus = bus
        self._filters = list(filters) or [">"]  # last-per-subject needs one
        self._begin = _beginning(start_seq, start_time, last_per_subject, new_only)
        self._follow = follow
        self._end_seq: int | None = None  # of `follow=False`
        self._created = ""
        self._consumer = ""
        self._inbox = ""
        self._session = -1
        self._subscription: Subscription | None = None
        self._arrived: deque[Message] = deque()
        self._ready = asyncio.Event()
        self._asked = 0  # messages that open pull requests may still bring
        self._heard = 0.0
        self._next_consumer_seq = 1
        self._lost = ""
        self._closed = False
        self._unlisten = bus.listen(lambda _: self._ready.set())

    # -- iteration

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StreamMessage:
        while True:
            if self._closed or self._at_end():
                await self.aclose()
                raise StopAsyncIteration
            if not self._consumer or self._lost or self._session != self._bus.session:
                await self._start()
                continue
            message = self._take()
            if message is None:
                await self._wait()
                continue
            return message

    async def next(self, timeout_s: float) -> StreamMessage | None:
        """The next message, or None when none came in time or the reader has ended."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self.__anext__()
        except (TimeoutError, StopAsyncIteration):
            return None

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._unlisten()
        self._ready.set()
        await self._drop()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    def _at_end(self) -> bool:
        if self._follow or not self._created:
            return False
        return self.caught_up.is_set() or (self._end_seq is not None and self.cursor >= self._end_seq)

    # -- messages

    def _on_message(self, message: Message) -> None:
        self._heard = asyncio.get_running_loop().time()
        self._arrived.append(message)
        self._ready.set()

    def _take(self) -> StreamMessage | None:
        """The next message in order, or None when there is none yet (or it is time for another consumer)."""
        while self._arrived:
            message = self._arrived.popleft()
            ack = parse_ack(message.reply)
            if ack is None:
                self._on_status(message)
                continue
            self._asked -= 1
            if ack.consumer_seq != self._next_consumer_seq:
                self._lose("a message is missing")
                return None
            self._next_consumer_seq += 1
            self.cursor = ack.stream_seq
            if ack.pending == 0:
                self.caught_up.set()
            return StreamMessage(
                message.subject, message.data, message.headers, ack.stream_seq, ack.time, ack.pending
            )
        return None

    def _on_status(self, message: Message) -> None:
        if message.status == _HEARTBEAT:
            return
        left = message.headers.get("Nats-Pending-Messages", "")
        if message.status == 408 or message.description == "Batch Completed":
            self._asked -= int(left) if left.isdigit() else self._asked
        else:  # consumer deleted, leadership change, no such consumer
            self._lose(message.description)

    def _lose(self, why: str) -> None:
        self._lost = why or "the consumer is gone"
        self._arrived.clear()

    async def _wait(self) -> None:
        """Until something arrived, or the consumer has been silent for too long."""
        if self._lost or self._at_end():
            return
        try:
            if self._asked <= PULL_MESSAGES // 2:
                await self._pull()
            self._ready.clear()
            if self._arrived or self._session != self._bus.session:
                return
            silent_s = asyncio.get_running_loop().time() - self._heard
            async with asyncio.timeout(max(0.0, SILENCE_S - silent_s)):
                await self._ready.wait()
        except TimeoutError:
            self._lose("no heartbeat")
        except Unavailable as failure:
            self._lose(failure.message)

    async def _pull(self) -> None:
        request = {
            "batch": PULL_MESSAGES - max(0, self._asked),
            "max_bytes": max(PULL_BYTES, 2 * self._bus.max_payload),
            "expires": int(PULL_EXPIRES_S * NANOS),
            "idle_heartbeat": int(HEARTBEAT_S * NANOS),
        }
        subject = f"{self._bus.js.prefix}.CONSUMER.MSG.NEXT.{self.stream}.{self._consumer}"
        await self._bus.publish(subject, msgspec.json.encode(request), reply=self._inbox)
        self._asked = PULL_MESSAGES

    # -- the consumer

    async def _start(self) -> None:
        """Make a consumer at the cursor; an error of the first is raised, a later one is tried for ever."""
        if self._lost:
            logger.debug("reading {} again from {}: {}", self.stream, self.cursor, self._lost)
        while not self._closed:
            first = not self._created
            try:
                await self._bus.wait_connected()
                await self._drop()
                await self._create()
                return
            except Unavailable as failure:
                if first and not isinstance(failure, NotConnected):
                    raise
                self._lost = failure.message
            await asyncio.sleep(RETRY_S)

    async def _create(self) -> None:
        session = self._bus.session
        info = await self._bus.js.stream_info(self.stream)
        if self._created and (info.created != self._created or info.last_seq < self.cursor):
            logger.warning("the stream {} was made anew: reading it from its beginning", self.stream)
            self.cursor = 0
        if self._end_seq is None:
            self._end_seq = info.last_seq
        if self._begin == _NEW:  # pinned, so that a second consumer misses nothing
            self._begin = {"deliver_policy": "by_start_sequence", "opt_start_seq": info.last_seq + 1}
        self._inbox = self._bus.new_inbox()
        name = self._inbox.rpartition(".")[2]
        self._reset()
        self._subscription = await self._bus.subscribe(self._inbox, self._on_message)
        answer = await self._bus.js.api(
            f"CONSUMER.CREATE.{self.stream}.{name}",
            {"stream_name": self.stream, "config": self._config(name), "action": "create"},
            timeout=CREATE_TIMEOUT_S,
        )
        self._consumer, self._session, self._created = name, session, info.created
        self._heard = asyncio.get_running_loop().time()
        if not answer.get("num_pending"):
            self.caught_up.set()

    def _config(self, name: str) -> dict[str, Any]:
        begin = self._begin
        if self.cursor:
            begin = {"deliver_policy": "by_start_sequence", "opt_start_seq": self.cursor + 1}
        config: dict[str, Any] = {
            "name": name,
            "ack_policy": "none",
            "max_deliver": 1,
            "mem_storage": True,
            "num_replicas": 1,
            "inactive_threshold": int(INACTIVE_S * NANOS),
            **begin,
        }
        if len(self._filters) == 1:
            config["filter_subject"] = self._filters[0]
        else:
            config["filter_subjects"] = self._filters
        return config

    def _reset(self) -> None:
        self._arrived.clear()
        self._asked = 0
        self._next_consumer_seq = 1
        self._lost = ""

    async def _drop(self) -> None:
        """Give up the present consumer; the server forgets it in time when it cannot be told."""
        subscription, self._subscription = self._subscription, None
        consumer, self._consumer = self._consumer, ""
        if subscription is not None:
            await subscription.stop()
        if consumer and self._bus.connected:
            try:
                await self._bus.js.api(f"CONSUMER.DELETE.{self.stream}.{consumer}", timeout=1.0)
            except Unavailable as failure:
                logger.debug("a consumer of {} was not deleted: {}", self.stream, failure.message)


def _beginning(
    start_seq: int | None, start_time: datetime | None, last_per_subject: bool, new_only: bool
) -> dict[str, Any]:
    if last_per_subject:
        return {"deliver_policy": "last_per_subject"}
    if new_only:
        return _NEW
    if start_seq is not None:
        return {"deliver_policy": "by_start_sequence", "opt_start_seq": max(1, start_seq)}
    if start_time is not None:
        return {"deliver_policy": "by_start_time", "opt_start_time": start_time.isoformat()}
    return {"deliver_policy": "all"}


class Entry(msgspec.Struct, frozen=True):
    """A key's newest state; `value` is None when the key was deleted, purged or has expired."""

    key: str
    value: bytes | None
    revision: int
    time: datetime


class BucketWatcher:
    """Each change of a bucket's keys, beginning with what is there; `caught_up` is set after that."""

    def __init__(self, bus: Bus, bucket: str, *, follow: bool = True) -> None:
        self._lead = f"$KV.{bucket}."
        self._reader = StreamReader(
            bus, f"KV_{bucket}", [f"{self._lead}>"], last_per_subject=True, follow=follow
        )
        self.caught_up = self._reader.caught_up

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Entry:
        message = await self._reader.__anext__()
        gone = "Nats-Marker-Reason" in message.headers or message.headers.get("KV-Operation") in (
            "DEL",
            "PURGE",
        )
        key = message.subject.removeprefix(self._lead)
        return Entry(key, None if gone else message.data, message.stream_seq, message.time)

    async def aclose(self) -> None:
        await self._reader.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()


async def read_bucket(bus: Bus, bucket: str) -> dict[str, bytes]:
    """The present values by key. JetStreamError when there is no such bucket."""
    values: dict[str, bytes] = {}
    async with BucketWatcher(bus, bucket, follow=False) as watcher:
        async for entry in watcher:
            if entry.value is None:
                values.pop(entry.key, None)
            else:
                values[entry.key] = entry.value
    return values
