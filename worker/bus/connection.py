"""`Bus`: one logical connection to NATS that comes back for ever, and what a worker or a client does over it.

    bus = await Bus.connect(cfg, node="mac-1", name="worker", retry=True)
    await bus.publish(subject, data, headers)        core publish; NotConnected while there is no connection
    await bus.request(subject, data, timeout=5)      NoResponders, NoAnswer, NotConnected (all Unavailable)
    await bus.subscribe(subject, handler)            handler(Message) is called in order, must not block
    await bus.queue(subject, max_messages=…, max_bytes=…)     `async for message in queue`; `queue.dropped`
    await bus.flush()                                the server has processed all that was sent before
    await bus.close()
    bus.listen(fn)                                   fn(connected: bool) at each change; returns "stop"
    bus.js                                           JetStream: api, stream_info, last_message, publish

Streams and KV: `worker.bus.reader`; queries: `worker.bus.rpc.query`; set-up: `worker.bus.streams`.

Subscriptions survive a reconnect; requests under way fail with NotConnected, and nothing is buffered
meanwhile.
"""

import asyncio
import random
from collections.abc import Callable
from typing import Any, Self

from loguru import logger
from nats import errors as nats_errors
from nats.aio.msg import Msg
from nats.nuid import NUID

from worker.bus.credentials import NatsSettings, check_credentials
from worker.bus.dial import Dialer, cancellations
from worker.bus.failures import NoAnswer, NoResponders, NotConnected
from worker.bus.jetstream import JetStream
from worker.bus.messages import Headers, Message, Reply, check_headers, check_pattern, from_nats
from worker.bus.probe import Refused
from worker.bus.replies import Replies
from worker.bus.subscription import Handler, MessageQueue, Subscription
from worker.bus.wire import WireClient, describe
from worker.errors import Internal, ResourceExhausted, Unavailable

FIRST_RETRY_S = 0.05
LONGEST_RETRY_S = 5.0
REPORT_EVERY_S = 30.0
HIGH_WATER_BYTES = 8 * 1024 * 1024
NO_RESPONDERS = 503
KEPT_COMPLAINTS = 100


class Bus:
    """Make one with `connect`. All methods belong to the event loop that made it."""

    def __init__(self, cfg: NatsSettings, *, node: str | None, name: str) -> None:
        self.cfg = cfg
        self.node = node
        self.name = name
        self.inbox_prefix = f"_INBOX_{node}" if node is not None else "_INBOX"
        self.session = 0  # counts the connections made; rises at each reconnect
        self.complaints: list[str] = []  # what the server refused out of band (permissions), the newest
        self.js = JetStream(self, domain=cfg.domain)
        self._dialer = Dialer(cfg, name=name, inbox_prefix=self.inbox_prefix, needs_payload=node is not None)
        self._client: WireClient | None = None
        self._broken = asyncio.Event()
        self._up = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._closing = False
        self._subscriptions: dict[int, Subscription] = {}
        self._listeners: list[Callable[[bool], None]] = []
        self._nuid = NUID()
        self._replies = Replies()
        self._pongs: set[asyncio.Future[Any]] = set()

    @classmethod
    async def connect(cls, cfg: NatsSettings, *, node: str | None, name: str, retry: bool) -> Self:
        """Connect, or with `retry` wait until somebody answers.

        `node` is a worker's own name (it decides the inbox prefix), None for a client. Configuration: what
        answers is no NATS server or one that will not do, the credentials are refused, or a worker has none
        and is not allowed to be insecure. Unavailable: nobody answers (never with `retry`).
        """
        bus = cls(cfg, node=node, name=name)
        if node is not None:
            check_credentials(cfg)
        await bus._first_connect(retry=retry)
        bus._keeper = asyncio.create_task(bus._keep(), name="bus")
        return bus

    # -- state

    @property
    def connected(self) -> bool:
        return self._up.is_set() and not self._closing

    @property
    def closed(self) -> bool:
        """It will not come back."""
        return self._closing

    @property
    def insecure(self) -> bool:
        """Nothing authenticates this client."""
        return self._dialer.insecure

    @property
    def server_version(self) -> str:
        return str(self._info.get("version", ""))

    @property
    def server_name(self) -> str:
        return str(self._info.get("server_name", ""))

    @property
    def url(self) -> str:
        """The server in use, or the first configured; never with credentials."""
        return self._dialer.servers[0].url

    @property
    def max_payload(self) -> int:
        return int(self._info.get("max_payload", 1024 * 1024))

    @property
    def peer_ports(self) -> frozenset[int]:
        """The ports of all known servers, which no container may reach."""
        return frozenset(server.port for server in self._dialer.servers)

    @property
    def _info(self) -> dict[str, Any]:
        return self._client.info if self._client is not None else {}

    async def wait_connected(self) -> None:
        """NotConnected once the bus is closed, also for those who wait already.

        Gives way once in any case: a client whose end was not noticed yet would keep its caller, who tries
        again at once, from ever letting it be noticed.
        """
        await asyncio.sleep(0)
        await self._up.wait()
        if self._closing:
            raise NotConnected("the connection is closed")

    def listen(self, fn: Callable[[bool], None]) -> Callable[[], None]:
        """Call `fn(connected)` at each change, from the event loop. Returns what ends it."""
        self._listeners.append(fn)

        def stop() -> None:
            if fn in self._listeners:
                self._listeners.remove(fn)

        return stop

    # -- messages

    async def publish(
        self, subject: str, data: bytes = b"", headers: Headers | None = None, *, reply: str = ""
    ) -> None:
        """Hand a message to the connection. NotConnected, or ResourceExhausted when it is over
        `max_payload`.
        """
        client = self._connected_client()
        size = len(data) + check_headers(headers)
        if size > self.max_payload:
            raise ResourceExhausted(
                f"{size} bytes for {subject} are more than the server's {self.max_payload}"
            )
        try:
            await client.publish(subject, data, reply=reply, headers=headers or None)
        except nats_errors.BadSubjectError:
            raise Internal(f"{subject!r} is no subject to publish on") from None
        except nats_errors.Error as error:
            if client.is_closed and client is self._client:
                self._went_down(describe(error))
            raise NotConnected(f"the connection to NATS broke: {describe(error)}") from error
        if client.pending_data_size > HIGH_WATER_BYTES:
            await self.flush(timeout=60.0)

    async def request(
        self, subject: str, data: bytes = b"", timeout: float = 5.0, *, headers: Headers | None = None
    ) -> Reply:
        """The first answer. NoResponders, NoAnswer after `timeout` seconds, NotConnected."""
        token, future = self.expect()
        try:
            await self.publish(subject, data, headers, reply=self.reply_subject(token))
            async with asyncio.timeout(timeout):
                reply = await future
        except TimeoutError:
            raise NoAnswer(f"no answer on {subject} within {timeout:g} s") from None
        finally:
            self.forget(token)
        if reply.status == NO_RESPONDERS:
            raise NoResponders(f"nobody answers on {subject}")
        return reply

    def expect(self) -> tuple[str, asyncio.Future[Message]]:
        """A token and the future of one answer to `reply_subject(token)`; give the token back with `forget`.

        For pipelining: publish with that reply subject and await the future under a timeout. It fails with
        NotConnected when the connection breaks.
        """
        return self._replies.expect()

    def reply_subject(self, token: str) -> str:
        return self._replies.subject(token)

    def forget(self, token: str) -> None:
        self._replies.forget(token)

    def new_inbox(self) -> str:
        """A fresh subject below this node's inbox prefix."""
        return f"{self.inbox_prefix}.{self._nuid.next().decode()}"

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> Subscription:
        """Call `handler(message)` for each message, in order. It survives reconnects; end it with `stop`."""
        check_pattern(subject)
        subscription = Subscription(self, subject, handler, queue)
        self._subscriptions[id(subscription)] = subscription
        if self.connected:
            await self._attach(subscription)
        return subscription

    async def queue(
        self, subject: str, *, queue: str = "", max_messages: int = 65536, max_bytes: int = 64 * 1024 * 1024
    ) -> MessageQueue:
        """A bounded queue of messages to iterate over; what does not fit is dropped and counted."""
        messages = MessageQueue(max_messages=max_messages, max_bytes=max_bytes)
        messages.attach(await self.subscribe(subject, messages.put, queue=queue))
        return messages

    async def flush(self, timeout: float = 10.0) -> None:
        """Return once the server has processed what was sent before. NoAnswer, NotConnected."""
        client = self._connected_client()
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pongs.add(future)
        try:
            await client.ping(future)
            async with asyncio.timeout(timeout):
                await future
        except TimeoutError:
            raise NoAnswer(f"{self.url} does not answer a ping within {timeout:g} s") from None
        finally:
            self._pongs.discard(future)

    async def close(self) -> None:
        """Send what is pending, then end everything. Calling it again does nothing."""
        self._closing = True
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
            self._keeper = None
        client, self._client = self._client, None
        self._went_down("the connection is closed")
        if client is not None:
            await client.close()
        for subscription in list(self._subscriptions.values()):
            subscription.ended()
        self._subscriptions.clear()
        self._up.set()  # for those who wait for a connection
        self._tell(False)

    # -- the connection and its successor

    async def _first_connect(self, *, retry: bool) -> None:
        pause = FIRST_RETRY_S
        told = False
        give_up = cancellations()
        while True:
            try:
                await self._dialer.find()
                await self._open()
                return
            except Refused as refused:
                if not retry:
                    raise Unavailable(f"no NATS server: {refused.message}", field="nats.url") from None
                if not told:
                    logger.warning("no NATS server yet ({}); waiting and trying again", refused.message)
                    told = True
                if cancellations() > give_up:
                    raise asyncio.CancelledError from None
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, LONGEST_RETRY_S)

    async def _open(self) -> None:
        """Connect and subscribe all again. Configuration, or Refused, which may pass."""
        client = await self._dialer.dial(on_down=self._on_down, on_error=self._complain)
        self._broken.clear()
        self._client = client
        try:
            await self._resume(client)
        except BaseException:
            self._client = None
            self._unsubscribed()  # those that came so far went with it
            await client.close()
            raise
        self.session += 1
        self._up.set()
        self._tell(True)

    def _on_down(self, client: WireClient) -> None:
        if client is self._client:
            self._went_down("the connection to NATS broke")

    async def _resume(self, client: WireClient) -> None:
        self._replies.inbox = self.new_inbox()
        await self._subscribe_wire(client, f"{self._replies.inbox}.*", "", self._replies.arrived)
        # More may be added meanwhile.
        while missing := [sub for sub in self._subscriptions.values() if sub.raw is None]:
            for subscription in missing:
                await self._attach(subscription)
            if not client.is_connected:
                break
        if not client.is_connected:
            raise Refused(f"{self.url} closed the connection")

    async def _keep(self) -> None:
        while not self._closing:
            await self._broken.wait()
            logger.warning("the connection to {} broke; reconnecting", self.url)
            await self._reconnect()
            logger.info("connected again to {} (nats-server {})", self.url, self.server_version)

    async def _reconnect(self) -> None:
        loop = asyncio.get_running_loop()
        pause, told = FIRST_RETRY_S, loop.time()
        while True:
            await asyncio.sleep(pause * random.uniform(0.2, 1.0))
            url = self.url
            try:
                await self._open()
                return
            except Exception as error:  # whatever it is, a worker goes on trying
                if self._closing:
                    raise asyncio.CancelledError from None
                if loop.time() - told > REPORT_EVERY_S:
                    told = loop.time()
                    logger.warning("still no connection to {}: {}; trying again", url, describe(error))
                self._dialer.try_next()
            pause = min(pause * 1.6, LONGEST_RETRY_S)

    def _went_down(self, why: str) -> None:
        was_up = self._up.is_set()
        self._up.clear()
        self._replies.fail(why)
        for future in self._pongs:
            if not future.done():
                future.set_exception(NotConnected(why))
        self._unsubscribed()
        self._broken.set()
        if was_up:
            self._tell(False)

    def _unsubscribed(self) -> None:
        for subscription in self._subscriptions.values():
            subscription.raw = None

    def _tell(self, connected: bool) -> None:
        for listener in list(self._listeners):
            listener(connected)

    def _complain(self, error: Exception) -> None:
        text = describe(error)
        if isinstance(error, OSError | nats_errors.StaleConnectionError):
            logger.debug("NATS: {}", text)  # the connection broke, which is told elsewhere
            return
        self.complaints = [*self.complaints[1 - KEPT_COMPLAINTS :], text]
        logger.warning("NATS: {}", text)

    # -- the wire

    def _connected_client(self) -> WireClient:
        if self._client is None or not self.connected:
            raise NotConnected("there is no connection to NATS now")
        return self._client

    async def _attach(self, subscription: Subscription) -> None:
        client = self._client
        if client is None:
            return
        try:
            raw = await self._subscribe_wire(
                client, subscription.subject, subscription.queue, subscription.deliver
            )
        except nats_errors.Error:
            return  # the connection is going; its successor subscribes again
        if client is self._client:
            subscription.raw = raw
        if id(subscription) not in self._subscriptions:
            await self._detach(subscription)

    async def _subscribe_wire(self, client: WireClient, subject: str, queue: str, handler: Handler) -> Any:
        async def on_message(msg: Msg) -> None:
            handler(from_nats(msg.subject, msg.reply, msg.data, msg.headers))

        return await client.subscribe(subject, queue=queue, cb=on_message)

    async def _detach(self, subscription: Subscription) -> None:
        self._subscriptions.pop(id(subscription), None)
        raw, subscription.raw = subscription.raw, None
        if raw is None or not self.connected:
            return
        try:
            await raw.unsubscribe()
        except nats_errors.Error:
            return  # gone with its connection
