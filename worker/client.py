"""`FleetClient`: what a program does with the fleet, by the contract alone.

    async with await FleetClient.connect(config.nats) as fleet:
        node = await fleet.default_node()
        done = await fleet.command(node, "web-0", Run(id=new_id(), spec=spec))
        status = await fleet.wait(node, "web-0")

Errors are those of `worker.errors`: what a node answers keeps its code; what nobody answers is one of
`worker.bus.failures` (NoResponders, NoAnswer, NotConnected).
"""

import asyncio
import uuid
from collections.abc import Callable
from contextlib import aclosing
from typing import Any, Self, TypeVar

import msgspec

from schemas import queries as q
from schemas.commands import AnyCommand
from schemas.events import CommandCompleted, CommandRejected
from schemas.node import NodeInfo, Presence
from schemas.status import ContainerStatus, State, Stats
from schemas.subjects import DEFAULT_PREFIX
from worker import errors
from worker.bus import rpc
from worker.bus.connection import Bus
from worker.bus.credentials import NatsSettings
from worker.bus.failures import JetStreamError, NoAnswer, NoResponders, NotConnected
from worker.bus.reader import read_bucket
from worker.client_streams import FleetStreams
from worker.errors import from_wire

QUERY_TIMEOUT_S = 5.0
ABSENT_AFTER_S = 8.0
PRESENCE_EVERY_S = 2.0
RETRY_S = 0.25
SEND_TRIES_S = 2.0
WAIT_STEP_S = 10.0  # a request that a worker took along when it died is answered by nobody
SUBJECT_FULL = (10077, 10047)  # per subject, and of the stream: "maximum messages …", "insufficient storage"

T = TypeVar("T")

_presence = msgspec.json.Decoder(Presence)


def new_id() -> str:
    """A command id."""
    return str(uuid.uuid4())


class Detail(ContainerStatus, frozen=True, kw_only=True):
    """A status with the spec that it was made of."""

    spec: dict[str, Any] | None = None


class FleetClient(FleetStreams):
    """Commands and queries, and all that `FleetStreams` reads."""

    @classmethod
    async def connect(
        cls, cfg: NatsSettings, *, name: str = "sandfleet", prefix: str = DEFAULT_PREFIX
    ) -> Self:
        """Unavailable: nobody answers. Configuration: the wrong server or the wrong credentials."""
        return cls(await Bus.connect(cfg, node=None, name=name, retry=False), prefix=prefix)

    async def close(self) -> None:
        await self.bus.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    # -- nodes

    async def nodes(self) -> list[Presence]:
        """The nodes that are there now, by name."""
        try:
            values = await read_bucket(self.bus, self.names.nodes_bucket)
        except JetStreamError as failure:
            raise self.not_set_up(failure, self.names.nodes_bucket) from None
        found = (_present(value) for value in values.values())
        return sorted((presence for presence in found if presence is not None), key=lambda one: one.node)

    async def is_present(self, node: str) -> bool:
        subject = f"$KV.{self.names.nodes_bucket}.{node}"
        message = await self.bus.js.last_message(self.names.nodes, subject)
        return message is not None and bool(message.data) and _present(message.data) is not None

    async def default_node(self) -> str:
        """The only node. NotFound when there is none, Conflict when there are several."""
        names = [presence.node for presence in await self.nodes()]
        if not names:
            raise errors.NotFound("no node is there: start one with sandfleet dev or sandfleet worker")
        if len(names) > 1:
            raise errors.Conflict(f"there are {len(names)} nodes ({_some(names)}): choose one with --node")
        return names[0]

    # -- commands

    async def command(
        self,
        node: str,
        cid: str | None,
        command: AnyCommand,
        *,
        timeout_s: float | None = None,
        absent_s: float | None = ABSENT_AFTER_S,
        on_absent: Callable[[str], None] | None = None,
        check: bool = True,
        headers: dict[str, str] | None = None,
    ) -> CommandCompleted:
        """Publish a command and wait for its completion; `cid` null commands the node.

        With `check` a completion that is not ok raises its error. A rejection raises always. NoAnswer: not
        completed within `timeout_s`, or the node has been away for `absent_s` (null: wait for it for ever);
        the command stands in the stream all the same. `on_absent(node)` is called when it is first missed.
        """
        since = await self.event_position()
        await self.send(node, cid, command, headers=headers)
        answer = asyncio.ensure_future(self.completion(node, cid, command.id, since))
        watch = asyncio.ensure_future(self._watch_presence(node, command.id, absent_s, on_absent))
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.wait({answer, watch}, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            raise NoAnswer(
                f"node {node} has not completed the command within {timeout_s:g} s; it stands in the stream"
            ) from None
        finally:
            for task in (answer, watch):
                task.cancel()
            await asyncio.gather(answer, watch, return_exceptions=True)
        if not answer.done() or answer.cancelled():
            watch.result()  # raises: it ends in no other way
        completed = answer.result()
        if check and completed.error is not None:
            raise from_wire(completed.error)
        return completed

    async def send(
        self, node: str, cid: str | None, command: AnyCommand, *, headers: dict[str, str] | None = None
    ) -> int:
        """Store a command without waiting for what becomes of it; its place in the command stream.

        Tried again while the stream has no leader or the connection comes back: a node judges repetition by
        the id. NoResponders: there is no such stream. NoAnswer: whether it was stored is unknown.
        """
        verb = str(type(command).__struct_config__.tag)
        subject = self.subjects.command(node, cid, verb)
        body = msgspec.json.encode(command)
        end = asyncio.get_running_loop().time() + SEND_TRIES_S
        while True:
            try:
                return (await self.bus.js.publish(subject, body, headers)).seq
            except JetStreamError as failure:
                if failure.err_code in SUBJECT_FULL:
                    raise errors.ResourceExhausted(
                        f"too many commands wait for {cid or node} already: is node {node} there?"
                    ) from None
                raise
            except (NoResponders, NoAnswer, NotConnected) as failure:
                if asyncio.get_running_loop().time() < end:
                    await asyncio.sleep(RETRY_S)
                    continue
                if isinstance(failure, NoResponders):
                    raise NoResponders(
                        "this server has no stream for commands: run sandfleet setup"
                    ) from None
                raise NoAnswer(
                    f"the server does not confirm that it stored the command {command.id} ({failure.message})"
                ) from None

    async def completion(self, node: str, cid: str | None, command_id: str, since: int) -> CommandCompleted:
        """The completion of a command, from the events after `since`. A rejection raises its error."""
        subject = self.subjects.command_event(node, cid)
        async with aclosing(self.read_events((subject,), after=since, follow=True)) as events:
            async for seen in events:
                event = seen.event
                if isinstance(event, CommandCompleted) and event.command_id == command_id:
                    return event
                if isinstance(event, CommandRejected) and event.command_id == command_id:
                    raise from_wire(event.error)
        raise NoAnswer("the connection to the server was closed")

    async def _watch_presence(
        self, node: str, command_id: str, absent_s: float | None, on_absent: Callable[[str], None] | None
    ) -> None:
        loop = asyncio.get_running_loop()
        missed: float | None = None
        while True:
            if await self._seems_present(node):
                missed = None
            elif missed is None:
                missed = loop.time()
                if on_absent is not None:
                    on_absent(node)
                    on_absent = None
            if missed is not None and absent_s is not None and loop.time() - missed >= absent_s:
                raise NoAnswer(
                    f"node {node} is not there; the command {command_id} waits for it, up to its deadline"
                )
            await asyncio.sleep(min(PRESENCE_EVERY_S, absent_s or PRESENCE_EVERY_S))

    async def _seems_present(self, node: str) -> bool:
        """Doubt counts for it: while the connection comes back, nothing is known of the node."""
        try:
            return await self.is_present(node)
        except errors.Unavailable:
            return True

    # -- queries

    async def query(
        self,
        node: str,
        verb: str,
        request: msgspec.Struct | None,
        reply: type[T],
        *,
        timeout_s: float = QUERY_TIMEOUT_S,
    ) -> T:
        """Ask a node. NoResponders: it is not there. An error reply raises the error in it."""
        body = b"{}" if request is None else msgspec.json.encode(request)
        try:
            answer = await rpc.query(self.bus, self.subjects.rpc(node, verb), body, timeout_s)
        except NoResponders:
            raise NoResponders(f"node {node} does not answer: see sandfleet nodes") from None
        except NoAnswer:
            raise NoAnswer(f"node {node} did not answer within {timeout_s:g} s") from None
        try:
            return msgspec.json.decode(answer, type=reply)
        except (msgspec.DecodeError, UnicodeDecodeError) as failure:
            raise errors.Internal(f"the answer of node {node} to {verb} cannot be read: {failure}") from None

    async def info(self, node: str) -> NodeInfo:
        return await self.query(node, "info", None, NodeInfo)

    async def containers(
        self, node: str, *, state: State | None = None, labels: dict[str, str] | None = None
    ) -> list[ContainerStatus]:
        """All pages of a node's containers."""
        found: list[ContainerStatus] = []
        cursor: str | None = None
        while True:
            request = q.ListRequest(state=state, labels=labels or None, cursor=cursor)
            page = await self.query(node, "list", request, q.ListReply)
            found += page.containers
            if not page.cursor or page.cursor == cursor:
                return found
            cursor = page.cursor

    async def state(self, node: str, cid: str) -> ContainerStatus:
        return await self.query(node, "state", q.StateRequest(container=cid), ContainerStatus)

    async def detail(self, node: str, cid: str) -> Detail:
        return await self.query(node, "state", q.StateRequest(container=cid, spec=True), Detail)

    async def stats(self, node: str, cid: str) -> Stats:
        return await self.query(node, "stats", q.StatsRequest(container=cid), Stats)

    async def images(self, node: str) -> list[q.ImageEntry]:
        return (await self.query(node, "images", q.ImagesRequest(), q.ImagesReply)).images

    async def volumes(self, node: str, name: str | None = None) -> list[q.VolumeEntry]:
        """All named volumes and mirrors of s3 volumes, or one. NotFound."""
        return (await self.query(node, "volumes", q.VolumesRequest(name=name), q.VolumesReply)).volumes

    async def wait(
        self, node: str, cid: str, *, until: q.WaitUntil = q.WaitUntil.EXIT, timeout_s: float | None = None
    ) -> ContainerStatus:
        """The status once the container has ended. DeadlineExceeded after `timeout_s`, which has no limit.

        The worker may be replaced meanwhile: only a node that stays silent for a while is given up.
        """
        loop = asyncio.get_running_loop()
        end = None if timeout_s is None else loop.time() + timeout_s
        silent_since: float | None = None
        while True:
            left = WAIT_STEP_S if end is None else min(WAIT_STEP_S, end - loop.time())
            request = q.WaitRequest(container=cid, until=until, timeout_s=max(left, 0.0))
            try:
                return await self.query(
                    node, "wait", request, ContainerStatus, timeout_s=request.timeout_s + QUERY_TIMEOUT_S
                )
            except errors.DeadlineExceeded:
                silent_since = None
                if end is not None and loop.time() >= end:
                    raise errors.DeadlineExceeded(f"{cid} has not ended within {timeout_s:g} s") from None
            except (NoResponders, NoAnswer, NotConnected):
                silent_since = silent_since or loop.time()
                if loop.time() - silent_since > ABSENT_AFTER_S:
                    raise
                await asyncio.sleep(RETRY_S)

    async def exec(self, node: str, request: q.ExecRequest) -> q.ExecReply:
        return await self.query(
            node, "exec", request, q.ExecReply, timeout_s=request.timeout_s + QUERY_TIMEOUT_S
        )


def _present(value: bytes) -> Presence | None:
    try:
        return _presence.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None  # not written by a node


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
