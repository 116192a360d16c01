"""Reading what the fleet's streams hold: events, the truth about every container, logs."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import datetime

import msgspec

from schemas.errors import ContractError
from schemas.events import AnyEvent, NodeChanged
from schemas.status import ContainerStatus, State
from schemas.subjects import DEFAULT_PREFIX, Subjects
from worker.bus.connection import Bus
from worker.bus.failures import JetStreamError, NoResponders
from worker.bus.jetstream import StreamNames
from worker.bus.messages import StreamMessage
from worker.bus.reader import StreamReader
from worker.client_logs import LogChunk, parse_chunk
from worker.errors import Configuration

_events = msgspec.json.Decoder(AnyEvent)


class SeenEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event as it lies in the stream. `event` is null for a type that this client does not know."""

    seq: int
    subject: str
    time: datetime
    data: bytes
    event: AnyEvent | None


class FleetStreams:
    """What `FleetClient` can do without any node being there."""

    def __init__(self, bus: Bus, *, prefix: str = DEFAULT_PREFIX) -> None:
        self.bus = bus
        self.subjects = Subjects(prefix)
        self.names = StreamNames(bus.cfg.stream_prefix)

    # -- events

    async def event_position(self) -> int:
        """The sequence of the newest event; what happens next comes after it."""
        return await self._last_seq(self.names.events)

    async def read_events(
        self,
        subjects: tuple[str, ...],
        *,
        after: int | None = None,
        since: datetime | None = None,
        follow: bool = False,
    ) -> AsyncGenerator[SeenEvent, None]:
        """Events in stream order: after a sequence, since a time, or all; `follow` goes on for ever."""
        start = None if after is None else after + 1
        reading = self._read(self.names.events, subjects, start_seq=start, start_time=since, follow=follow)
        async with aclosing(reading):
            async for message in reading:
                yield SeenEvent(
                    seq=message.stream_seq,
                    subject=message.subject,
                    time=message.time,
                    data=message.data,
                    event=_decode_event(message.data),
                )

    async def snapshot(
        self, node: str | None = None, cid: str | None = None
    ) -> dict[tuple[str, str], ContainerStatus]:
        """The truth about every container by the event stream alone, also of nodes that are away."""
        subjects = (
            self.subjects.events_of(node)
            if node is None or cid is None
            else self.subjects.container_events_of(node, cid)
        )
        newest: dict[tuple[str, str], tuple[tuple[str, int], ContainerStatus]] = {}
        async for message in self._read(self.names.events, (subjects,), last_per_subject=True):
            event = _decode_event(message.data)
            status = getattr(event, "status", None)
            if event is None or not isinstance(status, ContainerStatus):
                continue
            key, place = (event.node, status.container), (event.epoch, event.seq)
            if key not in newest or newest[key][0] < place:
                newest[key] = (place, status)
        return {key: status for key, (_, status) in newest.items() if status.state != State.REMOVED}

    async def last_seen(self) -> dict[str, NodeChanged]:
        """The newest `node_changed` of every node that the event stream remembers, present or not."""
        found: dict[str, NodeChanged] = {}
        pattern = f"{self.subjects.prefix}.evt.*._.node"
        async for message in self._read(self.names.events, (pattern,), last_per_subject=True):
            event = _decode_event(message.data)
            if isinstance(event, NodeChanged):
                found[event.node] = event
        return found

    # -- logs

    async def log_chunks(
        self,
        node: str,
        cid: str,
        *,
        stream: str = "*",
        start_seq: int | None = None,
        since: datetime | None = None,
        follow: bool = False,
    ) -> AsyncGenerator[LogChunk, None]:
        """A container's chunks in stream order; `LogOrder` puts them in order of offset."""
        subject = f"{self.subjects.logs_of(node, cid).removesuffix('*')}{stream}"
        reading = self._read(
            self.names.logs, (subject,), start_seq=start_seq, start_time=since, follow=follow
        )
        async with aclosing(reading):
            async for message in reading:
                chunk = parse_chunk(
                    message.subject.rpartition(".")[2],
                    message.data,
                    message.headers,
                    time=message.time,
                    seq=message.stream_seq,
                )
                if chunk is not None:
                    yield chunk

    async def log_position(self) -> int:
        """The sequence of the newest log chunk of the fleet."""
        return await self._last_seq(self.names.logs)

    # -- streams

    async def _last_seq(self, stream: str) -> int:
        try:
            return (await self.bus.js.stream_info(stream)).last_seq
        except (JetStreamError, NoResponders) as failure:
            raise self.not_set_up(failure, stream) from None

    async def _read(
        self,
        stream: str,
        subjects: tuple[str, ...],
        *,
        start_seq: int | None = None,
        start_time: datetime | None = None,
        last_per_subject: bool = False,
        follow: bool = False,
    ) -> AsyncGenerator[StreamMessage, None]:
        reader = StreamReader(
            self.bus,
            stream,
            subjects,
            start_seq=start_seq,
            start_time=start_time,
            last_per_subject=last_per_subject,
            follow=follow,
        )
        async with reader:
            try:
                async for message in reader:
                    yield message
            except (JetStreamError, NoResponders) as failure:
                raise self.not_set_up(failure, stream) from None

    def not_set_up(self, failure: ContractError, stream: str) -> ContractError:
        """The failure itself, unless it means that the streams were never made."""
        missing = isinstance(failure, JetStreamError) and failure.err_code == JetStreamError.STREAM_NOT_FOUND
        if missing:
            return Configuration(f"{self.bus.url} has no stream {stream}: run sandfleet setup")
        if isinstance(failure, NoResponders):
            return NoResponders(f"JetStream does not answer at {self.bus.url}: is it enabled there?")
        return failure


def _decode_event(data: bytes) -> AnyEvent | None:
    """Null for a type that is not known here: the contract lets new ones appear."""
    try:
        event: AnyEvent = _events.decode(data)
        return event
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
