"""The node's queries as the NATS micro service `sandfleet` (ADR-32), which `nats micro list|info|stats`
discovers.

nats-py's own service answers the requests of an endpoint one after the other and knows no endpoint for what
does not exist; this one has a single subscription for all verbs, so that an unknown one is answered too,
and runs the handlers side by side up to a bound.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec
from loguru import logger

from schemas.errors import ContractError, Error, Unsupported
from schemas.queries import ERROR_STATUS
from schemas.subjects import Subjects
from schemas.values import shorten
from worker.bus.connection import Bus
from worker.bus.failures import NotConnected
from worker.bus.messages import Headers, Message
from worker.bus.subscription import Subscription
from worker.errors import Internal, ResourceExhausted, from_wire

NAME = "sandfleet"
ERROR_TEXT = "Nats-Service-Error"
ERROR_CODE = "Nats-Service-Error-Code"
MAX_RUNNING = 512
MAX_ERROR_TEXT = 512

_PING = "io.nats.micro.v1.ping_response"
_INFO = "io.nats.micro.v1.info_response"
_STATS = "io.nats.micro.v1.stats_response"

Handler = Callable[[bytes, Headers], Awaitable[bytes]]
# What the service's STATS tell in `data` of an endpoint, by verb (ADR-32).
Data = Callable[[], Awaitable[Mapping[str, Any]]]


async def _no_data() -> Mapping[str, Any]:
    return {}


_encode = msgspec.json.Encoder().encode
_error = msgspec.json.Decoder(Error)


class _Endpoint:
    """A verb and what it was asked so far."""

    def __init__(self, verb: str, subject: str) -> None:
        self.verb = verb
        self.subject = subject
        self.reset()

    def reset(self) -> None:
        self.requests = 0
        self.errors = 0
        self.last_error = ""
        self.nanos = 0

    def info(self) -> dict[str, Any]:
        return {"name": self.verb, "subject": self.subject, "queue_group": "", "metadata": {}}

    def stats(self) -> dict[str, Any]:
        average = self.nanos // self.requests if self.requests else 0
        return {
            "name": self.verb,
            "subject": self.subject,
            "queue_group": "",
            "num_requests": self.requests,
            "num_errors": self.errors,
            "last_error": self.last_error,
            "processing_time": self.nanos,
            "average_processing_time": average,
        }


class Service:
    """Made by `serve_queries`; `stop` ends it."""

    def __init__(
        self,
        bus: Bus,
        node: str,
        handlers: Mapping[str, Handler],
        *,
        subjects: Subjects,
        version: str,
        description: str,
        max_running: int,
        data: Data,
    ) -> None:
        self.id = bus.new_inbox().rpartition(".")[2]
        self._bus = bus
        self._node = node
        self._handlers = dict(handlers)
        self._subjects = subjects
        self._version = version
        self._description = description
        self._max_running = max_running
        self._data = data
        self._started = datetime.now(UTC)
        self._endpoints = {verb: _Endpoint(verb, subjects.rpc(node, verb)) for verb in handlers}
        self._subscriptions: list[Subscription] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        # No queue group: the subjects are this node's alone, and during a takeover both must not share them.
        rpc = self._subjects.rpc_of(self._node)
        self._subscriptions.append(await self._bus.subscribe(rpc, self._on_request))
        for verb, describe in (("PING", self._ping), ("INFO", self._info), ("STATS", self._stats)):
            for subject in (f"$SRV.{verb}", f"$SRV.{verb}.{NAME}", f"$SRV.{verb}.{NAME}.{self.id}"):
                handler = self._describer(describe)
                self._subscriptions.append(await self._bus.subscribe(subject, handler))

    async def stop(self) -> None:
        """Take no more requests and give up those under way."""
        for subscription in self._subscriptions:
            await subscription.stop()
        self._subscriptions.clear()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def running(self) -> int:
        return len(self._tasks)

    # -- queries

    def _on_request(self, message: Message) -> None:
        if not message.reply:
            return
        verb = message.subject.rpartition(".")[2]
        if len(self._tasks) >= self._max_running:
            failure = ResourceExhausted(f"{self._max_running} queries are under way on this node")
            self._spawn(self._fail(message, verb, failure))
            return
        self._spawn(self._serve(message, verb))

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, message: Message, verb: str) -> None:
        endpoint = self._endpoints.get(verb)
        began = time.perf_counter_ns()
        try:
            handler = self._handlers.get(verb)
            if handler is None:
                raise Unsupported(f"there is no query {shorten(verb)} here", field="verb")
            reply = await handler(message.data, message.headers)
            if len(reply) > self._bus.max_payload:
                raise ResourceExhausted(
                    f"the answer has {len(reply)} bytes, more than the server's {self._bus.max_payload}: "
                    "ask for less"
                )
            await self._bus.publish(message.reply, reply)
        except NotConnected:
            return  # who asked has seen the connection break, or asks again
        except ContractError as failure:
            await self._fail(message, verb, failure)
        except Exception as failure:  # a bug of ours must not leave the caller without an answer
            logger.exception("the query {} failed", verb)
            await self._fail(message, verb, Internal(f"the query {verb} failed: {type(failure).__name__}"))
        finally:
            if endpoint is not None:
                endpoint.requests += 1
                endpoint.nanos += time.perf_counter_ns() - began

    async def _fail(self, message: Message, verb: str, failure: ContractError) -> None:
        error = failure.to_error()
        status = ERROR_STATUS.get(failure.code, 500)
        text = header_text(error.message)
        endpoint = self._endpoints.get(verb)
        if endpoint is not None:
            endpoint.errors += 1
            endpoint.last_error = f"{status}:{text}"
        try:
            headers = {ERROR_TEXT: text, ERROR_CODE: str(status)}
            await self._bus.publish(message.reply, _encode(error), headers)
        except ContractError as lost:
            logger.debug("an error reply was not sent: {}", lost.message)

    # -- discovery

    def _describer(self, describe: Callable[[], Awaitable[dict[str, Any]]]) -> Callable[[Message], None]:
        def on_message(message: Message) -> None:
            if message.reply:
                self._spawn(self._describe(message, describe))

        return on_message

    async def _describe(self, message: Message, describe: Callable[[], Awaitable[dict[str, Any]]]) -> None:
        try:
            await self._bus.publish(message.reply, _encode(await describe()))
        except ContractError as lost:
            logger.debug("a discovery reply was not sent: {}", lost.message)

    def _identity(self, kind: str) -> dict[str, Any]:
        return {
            "type": kind,
            "name": NAME,
            "id": self.id,
            "version": self._version,
            "metadata": {"node": self._node},
        }

    async def _ping(self) -> dict[str, Any]:
        return self._identity(_PING)

    async def _info(self) -> dict[str, Any]:
        endpoints = [endpoint.info() for endpoint in self._endpoints.values()]
        return {**self._identity(_INFO), "description": self._description, "endpoints": endpoints}

    async def _stats(self) -> dict[str, Any]:
        started = self._started.isoformat(timespec="microseconds").replace("+00:00", "Z")
        data = await self._data()
        endpoints = [
            endpoint.stats() | ({"data": data[verb]} if verb in data else {})
            for verb, endpoint in self._endpoints.items()
        ]
        return {**self._identity(_STATS), "started": started, "endpoints": endpoints}


async def serve_queries(
    bus: Bus,
    node: str,
    handlers: Mapping[str, Handler],
    version: str,
    description: str = "sandfleet node",
    *,
    subjects: Subjects | None = None,
    max_running: int = MAX_RUNNING,
    data: Data = _no_data,
) -> Service:
    """Answer `P.rpc.<node>.<verb>` by `handlers[verb](body, headers) -> reply body`.

    A ContractError becomes the error reply of the contract; a verb without handler is `unsupported`; beyond
    `max_running` at once it is `resource_exhausted`, and so is a reply over the server's `max_payload`.
    `data()` gives what STATS tell of verbs beyond their counters.
    """
    service = Service(
        bus,
        node,
        handlers,
        subjects=subjects or Subjects(),
        version=version,
        description=description,
        max_running=max_running,
        data=data,
    )
    await service.start()
    return service


async def query(
    bus: Bus, subject: str, body: bytes, timeout: float, *, headers: Headers | None = None
) -> bytes:
    """A query's reply body. An error reply is raised as the ContractError that it tells; NoResponders when
    the node is not there.
    """
    reply = await bus.request(subject, body, timeout, headers=headers)
    if ERROR_CODE in reply.headers:
        raise error_of(reply)
    return reply.data


def error_of(reply: Message) -> ContractError:
    """The exception for an error reply, of the class that its code has here."""
    try:
        error = _error.decode(reply.data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        text = reply.headers.get(ERROR_TEXT, "")
        return Internal(f"the node answered {reply.headers.get(ERROR_CODE, '')}: {text}")
    return from_wire(error)


def header_text(text: str) -> str:
    """One line of printable ASCII for a header; the whole message is in the body."""
    plain = " ".join(text.split()).encode("ascii", "replace").decode()
    return "".join(char if char.isprintable() else "?" for char in plain)[:MAX_ERROR_TEXT] or "error"
