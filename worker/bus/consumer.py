"""The node's durable consumer of its commands: one at a time in stream order, several under way, bounded.

Order is what a scheduler relies on, and a message that was sent to a broken connection comes again only
after the acknowledgement wait, behind newer ones. So the consumer is deleted and made anew (deliver all)
whenever something may have been lost on the way: at boot, after a reconnect or a leader's change with
unacknowledged messages, after `nak`. What is still in the hands of `handle` then is recognised and not
handed out twice.

Whoever finds its consumer deleted or replaced by another asks `check_fence` first: a second worker may have
taken the name.
"""

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import msgspec
from loguru import logger

from schemas.subjects import Subjects
from worker.bus.connection import Bus
from worker.bus.delivery import Delivery
from worker.bus.failures import JetStreamError, NoAnswer, NoResponders
from worker.bus.jetstream import StreamNames
from worker.bus.messages import Message, parse_ack
from worker.bus.patience import Patience
from worker.bus.subscription import Subscription
from worker.errors import Unavailable

__all__ = ["CommandConsumer", "Delivery"]

NANOS = 1_000_000_000
MAX_IN_FLIGHT = 256
ACK_WAIT_S = 60.0
MAX_ACK_PENDING = 10_000
PULL_EXPIRES_S = 60.0
HEARTBEAT_S = 5.0
SILENCE_S = 2.5 * HEARTBEAT_S
MAX_PULL_BYTES = 2 * 1024 * 1024
MAX_HELD_BYTES = 4 * 1024 * 1024  # no more is asked for then; decoded, that may be twelve times as much
FENCE_PAUSE_S = 0.5
PATIENCE_S = 2.0  # for one answer of the API: a leader that steps down takes the question with it
LONGEST_PATIENCE_S = 20.0
RETRY_S = 0.1
LONGEST_RETRY_S = 2.0
REPORT_EVERY_S = 30.0
SETTLED_ALL = (1 << 63) - 1

_HEARTBEAT = 100
# Both are 409, and tell how many messages less the request has brought (seen with nats-server 2.15).
_ENDS_OF_A_REQUEST = frozenset({"batch completed", "message size exceeds maxbytes"})

Handle = Callable[[Delivery], Awaitable[None]]


class CommandConsumer:
    """`await run(handle)` until cancelled. `handle` is awaited for one delivery after the other.

    `check_fence` raises Fenced when another worker has the name; that ends `run`.
    """

    def __init__(
        self,
        bus: Bus,
        *,
        node: str,
        subjects: Subjects,
        check_fence: Callable[[], Awaitable[None]],
        max_in_flight: int = MAX_IN_FLIGHT,
        ack_wait_s: float = ACK_WAIT_S,
    ) -> None:
        self.stream = StreamNames(bus.cfg.stream_prefix).commands
        self.name = node
        self.ready = asyncio.Event()  # the consumer is there and asks for messages
        self.rebuilds = 0
        self.redelivered = 0  # messages that came more than once
        self._newest = (datetime.min.replace(tzinfo=UTC), 0)  # when it was stored, and where
        self._bus = bus
        self._pattern = subjects.commands_of(node)
        self._check_fence = check_fence
        self._max = max(2, max_in_flight)
        self._ack_wait_s = ack_wait_s
        self._held: dict[int, Delivery] = {}  # handed out or queued, by stream sequence
        self.held_bytes = 0  # of their bodies
        self._queue: deque[Delivery] = deque()
        self._wake = asyncio.Event()
        self._subscription: Subscription | None = None
        self._inbox = ""
        self._created = ""
        self._session = -1
        self._asked = 0  # messages that open pull requests may still bring
        self._heard = 0.0
        self._trouble = ""  # why the consumer must be looked at
        self._rebuild = False  # and that it must be made anew, whatever it looks like
        self._gone = False  # somebody deleted it
        self._replay_at: float | None = None
        self._patience = Patience(PATIENCE_S, LONGEST_PATIENCE_S)

    async def run(self, handle: Handle) -> None:
        unlisten = self._bus.listen(self._on_connection)
        progress = asyncio.create_task(self._tell_progress(), name="command progress")
        try:
            await self._make()
            while True:
                if self._trouble or self._session != self._bus.session or not self._bus.connected:
                    # Without a connection nothing is begun either: another may take the name meanwhile.
                    self.ready.clear()
                    await self._mend()
                    continue
                if self._queue:
                    delivery = self._queue.popleft()
                    await handle(delivery)
                    continue
                await self._wait()
        finally:
            unlisten()
            self.ready.clear()
            progress.cancel()
            await asyncio.gather(progress, return_exceptions=True)
            await self._unsubscribe()

    # -- arrivals

    def _on_connection(self, connected: bool) -> None:
        self._wake.set()

    def _on_message(self, message: Message) -> None:
        now = self._heard = self._now()
        ack = parse_ack(message.reply)
        if ack is None:
            self._on_status(message)
            return
        self._asked -= 1
        # First deliveries come in the order of the stream, also from a consumer that was made anew.
        place = (ack.time, ack.stream_seq)
        self.redelivered += ack.deliveries > 1 or place <= self._newest
        self._newest = max(self._newest, place)
        if self._replay_at is not None:
            return  # it comes again, behind what was given back
        held = self._held.get(ack.stream_seq)
        if held is not None:
            held.redelivered_as(message.reply)
            return
        delivery = Delivery(
            self, message, stream_seq=ack.stream_seq, time=ack.time, deliveries=ack.deliveries, since=now
        )
        self._held[ack.stream_seq] = delivery
        self.held_bytes += len(delivery.data)
        self._queue.append(delivery)
        self._wake.set()

    def _on_status(self, message: Message) -> None:
        if message.status == _HEARTBEAT:
            return
        what = message.description.lower()
        if message.status == 408 or what in _ENDS_OF_A_REQUEST:
            left = message.headers.get("Nats-Pending-Messages", "")
            self._asked -= int(left) if left.isdigit() else self._asked
        elif what == "exceeded maxwaiting":
            self._asked = 0
        else:
            # Consumer deleted, leadership change, server shutdown, no such consumer …
            self._trouble = message.description or f"status {message.status}"
            self._gone = self._gone or "deleted" in what
        self._wake.set()

    async def _wait(self) -> None:
        """Until there is something to do; asks for more messages whenever half of what may be asked is
        free.
        """
        try:
            await self._pull()
        except Unavailable as failure:
            self._trouble = failure.message
            return
        self._wake.clear()
        if self._queue or self._trouble or self._session != self._bus.session:
            return
        try:
            async with asyncio.timeout_at(self._next_look()):
                await self._wake.wait()
        except TimeoutError:
            if self._replay_at is not None and self._now() >= self._replay_at:
                self._trouble, self._rebuild = "messages were given back", True
            elif self._bus.connected:
                self._trouble = "no heartbeat"

    def _next_look(self) -> float | None:
        """When to wake up by ourselves. Heartbeats come only while a request is open."""
        if self._replay_at is not None:
            return self._replay_at
        return self._heard + SILENCE_S if self._asked > 0 else None

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    async def _pull(self) -> None:
        half = self._max // 2
        while self._has_room() and self._replay_at is None:
            # Two requests that expire at different times, so that one is always open.
            expires_s = PULL_EXPIRES_S if self._asked > 0 else PULL_EXPIRES_S / 2
            if self._asked <= 0:
                self._heard = self._now()
            request = {
                "batch": half,
                "max_bytes": max(MAX_PULL_BYTES, 2 * self._bus.max_payload),
                "expires": int(expires_s * NANOS),
                "idle_heartbeat": int(HEARTBEAT_S * NANOS),
            }
            subject = f"{self._bus.js.prefix}.CONSUMER.MSG.NEXT.{self.stream}.{self.name}"
            await self._bus.publish(subject, msgspec.json.encode(request), reply=self._inbox)
            self._asked = max(0, self._asked) + half

    def _has_room(self) -> bool:
        """Whether half of what may be asked for is free."""
        free = self._max - len(self._held) - max(0, self._asked)
        return free >= self._max // 2 and self.held_bytes < MAX_HELD_BYTES

    async def settled(self) -> int:
        """The place in the stream up to which everything was acknowledged, and so is not delivered again.

        SETTLED_ALL when nothing of this node waits there. Unavailable when that is not known now.
        """
        info = await self._api(f"CONSUMER.INFO.{self.stream}.{self.name}")
        if info.get("created") != self._created:
            raise Unavailable(f"the consumer {self.name} is about to be made anew")
        if not info.get("num_pending") and not info.get("num_ack_pending"):
            return SETTLED_ALL
        return int(info.get("ack_floor", {}).get("stream_seq", 0))

    # -- answers

    async def answer(self, reply: str, answer: bytes, *, wait: bool = False) -> None:
        try:
            if wait:
                await self._bus.request(reply, answer)
            else:
                await self._bus.publish(reply, answer)
        except Unavailable as failure:
            # It comes again, and the ledger knows it.
            logger.debug("an acknowledgement was not sent: {}", failure.message)

    def finished(self, delivery: Delivery) -> None:
        if self._held.get(delivery.stream_seq) is delivery:
            self._let_go(delivery)
        if not self._queue and self._has_room():
            self._wake.set()

    def _let_go(self, delivery: Delivery) -> None:
        del self._held[delivery.stream_seq]
        self.held_bytes -= len(delivery.data)

    def replay_after(self, delay_s: float) -> None:
        at = self._now() + delay_s
        self._replay_at = at if self._replay_at is None else max(self._replay_at, at)
        self._empty_queue()
        self._wake.set()

    def _empty_queue(self) -> None:
        """What is queued is held too, each under its own sequence."""
        for queued in self._queue:
            self._let_go(queued)
        self._queue.clear()

    async def _tell_progress(self) -> None:
        """Keep what is held from being redelivered while it waits or is worked on."""
        while True:
            await asyncio.sleep(self._ack_wait_s / 3)
            oldest = self._now() - self._ack_wait_s / 4
            for delivery in list(self._held.values()):
                if delivery.since < oldest:
                    await delivery.in_progress()

    # -- making, checking and replacing the consumer

    async def _mend(self) -> None:
        """After trouble: go on when nothing can have been lost, else make the consumer anew."""
        await self._bus.wait_connected()
        session = self._bus.session
        trouble, rebuild, gone = self._trouble or "reconnected", self._rebuild, self._gone
        self._trouble = ""
        if session != self._session and self._created:
            try:
                await self._check_fence()
            except Unavailable as failure:
                await self._retry_later(failure)
                return
        if not rebuild and not gone:
            try:
                info = await self._api(f"CONSUMER.INFO.{self.stream}.{self.name}")
            except JetStreamError as error:
                gone = error.status == 404
                if not gone:
                    await self._retry_later(error)
                    return
            except Unavailable as failure:
                await self._retry_later(failure)
                return
            else:
                gone = info.get("created") != self._created
                if not gone and not info.get("num_ack_pending") and not self._held:
                    self._go_on(session)
                    return
        if gone:
            # Whoever took the name has had the time to say so in the stream.
            await asyncio.sleep(FENCE_PAUSE_S * random.uniform(0.5, 1.5))
            try:
                await self._check_fence()
            except Unavailable as failure:
                await self._retry_later(failure)
                return
        logger.info("making the command consumer {} anew: {}", self.name, trouble)
        await self._make()

    async def _retry_later(self, failure: Unavailable) -> None:
        self._trouble = failure.message
        await asyncio.sleep(RETRY_S * random.uniform(1, 5))

    async def _make(self) -> None:
        """Delete and create, until it works.

        In a cluster that has lost a server it can take longer to create one than is waited for the answer: what
        was asked for and not answered is looked for before it is deleted and asked for again.
        """
        loop = asyncio.get_running_loop()
        pause, told = RETRY_S, loop.time() - REPORT_EVERY_S
        asked = False
        while True:
            try:
                await self._bus.wait_connected()
                session = self._bus.session
                if not (asked and await self._find_untouched()):
                    asked = False
                    await self._delete()
                    asked = True
                    await self._create()
                self._go_on(session)
                return
            except Unavailable as failure:
                if loop.time() - told >= REPORT_EVERY_S:
                    told = loop.time()
                    logger.warning("waiting for the command stream {}: {}", self.stream, _reason(failure))
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, LONGEST_RETRY_S)

    async def _api(self, call: str, request: Any = None) -> dict[str, Any]:
        began, patience_s = self._now(), self._patience.seconds
        try:
            answer = await self._bus.js.api(call, request, timeout=patience_s)
        except NoAnswer:
            self._patience.silent(patience_s)
            raise
        self._patience.answered(self._now() - began)
        return answer

    async def _find_untouched(self) -> bool:
        """Whether the consumer is there and has not given anybody a message yet."""
        try:
            info = await self._api(f"CONSUMER.INFO.{self.stream}.{self.name}")
        except JetStreamError as error:
            if error.status == 404:
                return False
            raise
        if info.get("num_ack_pending") or info.get("delivered", {}).get("consumer_seq"):
            return False
        self._created = str(info.get("created", ""))
        self.rebuilds += 1
        return True

    async def _delete(self) -> None:
        try:
            await self._api(f"CONSUMER.DELETE.{self.stream}.{self.name}")
        except JetStreamError as error:
            if error.err_code != JetStreamError.CONSUMER_NOT_FOUND:
                raise

    async def _create(self) -> None:
        # A new inbox, so that nothing from the old consumer can be taken for the new one's.
        await self._unsubscribe()
        self._empty_queue()
        self._inbox = self._bus.new_inbox()
        self._subscription = await self._bus.subscribe(self._inbox, self._on_message)
        call = f"CONSUMER.CREATE.{self.stream}.{self.name}.{self._pattern}"
        request = {"stream_name": self.stream, "config": self._config(), "action": "create"}
        answer = await self._api(call, request)
        self._created = str(answer.get("created", ""))
        self.rebuilds += 1

    def _config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "durable_name": self.name,
            "filter_subject": self._pattern,
            "deliver_policy": "all",
            "ack_policy": "explicit",
            "ack_wait": int(self._ack_wait_s * NANOS),
            "max_ack_pending": MAX_ACK_PENDING,
            "max_deliver": -1,
            "replay_policy": "instant",
        }

    def _go_on(self, session: int) -> None:
        self._session = session
        self._trouble, self._rebuild, self._gone, self._replay_at = "", False, False, None
        self._asked = 0
        self._heard = self._now()
        self.ready.set()

    async def _unsubscribe(self) -> None:
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await subscription.stop()


def _reason(failure: Unavailable) -> str:
    if isinstance(failure, NoResponders):
        return "JetStream does not answer"
    return failure.message
