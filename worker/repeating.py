"""Containers' statuses are published again: before their newest could fall out of the event stream, and when the
stream has lost it.

A stream loses events when it is purged, made anew, put back from a copy or evicts its oldest. Whenever it may have,
and once at the start, it is asked what it shows for each container; a status that is not there, or not the present
one, is told again. The outbox by itself sends again only what it still keeps, the events of ten minutes.
"""

import asyncio
from datetime import UTC, datetime, timedelta

import msgspec
from loguru import logger

from schemas.status import ContainerStatus
from schemas.subjects import Subjects
from worker.bus.connection import Bus
from worker.bus.jetstream import StreamInfo
from worker.bus.outbox import OutboxPublisher
from worker.errors import ContractError, Unavailable
from worker.records import ContainerRecord
from worker.runtime import Runtime

LOOK_EVERY_S = 600.0
LOOK_AGAIN_S = 5.0
SEND_FIRST_S = 60.0
QUESTIONS_AT_ONCE = 16
NEARLY_FULL = 0.8


def oldest_safe(limits: StreamInfo, now: datetime) -> datetime | None:
    """A status told before this moment is due again; None: nothing can fall out.

    By age, half of the stream's limit is left as a margin. By size, the stream drops its oldest part first:
    once it is nearly full, what stands in its older half is due.
    """
    due: datetime | None = None
    if limits.max_age_s > 0:
        due = now - timedelta(seconds=limits.max_age_s / 2)
    first, last = limits.first_time, limits.last_time
    if limits.max_bytes > 0 and limits.bytes > NEARLY_FULL * limits.max_bytes and first and last:
        middle = first + (last - first) / 2
        due = middle if due is None else max(due, middle)
    return due


class _Told(msgspec.Struct):
    """What of a status tells whether it is the present one."""

    instance: str
    run: int
    state: str
    exit_code: int | None = None


class _Event(msgspec.Struct):
    status: _Told


_event = msgspec.json.Decoder(_Event)


def shows(data: bytes | None, status: ContainerStatus) -> bool:
    """Whether the newest `state_changed` of a container (None: there is none) tells of this status."""
    if data is None:
        return False
    try:
        told = _event.decode(data).status
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    found = (told.instance, told.run, told.state, told.exit_code)
    return found == (status.instance, status.run, str(status.state), status.exit_code)


class Repeater:
    """Looks at the event stream now and then, and when the outbox says that it lost something."""

    def __init__(self, bus: Bus, outbox: OutboxPublisher, runtime: Runtime, subjects: Subjects) -> None:
        self._bus = bus
        self._outbox = outbox
        self._runtime = runtime
        self._subjects = subjects
        self._seen: tuple[str, int, int] | None = None  # how the stream stood when it was searched

    async def run(self) -> None:
        while True:
            pause_s = LOOK_EVERY_S
            try:
                await self.look()
            except ContractError as failure:
                logger.warning("the event stream could not be looked at: {}", failure.message)
                pause_s = LOOK_AGAIN_S
            try:
                async with asyncio.timeout(pause_s):
                    await self._outbox.lost.wait()
            except TimeoutError:
                continue

    async def look(self) -> int:
        """Publish what is due; gives how many statuses that were."""
        if self._outbox.lost.is_set():
            self._outbox.lost.clear()
            self._seen = None
        info = await self._bus.js.stream_info(self._outbox.stream)
        now = (info.created, info.first_seq, info.num_deleted)
        missing = await self._missing() if now != self._seen else frozenset()
        oldest = oldest_safe(info, datetime.now(UTC))

        def is_due(record: ContainerRecord, told_at: datetime | None) -> bool:
            if record.status.container in missing:
                return True
            return oldest is not None and (told_at or _newest_time(record)) < oldest

        count = await self._runtime.repeat(is_due)
        if count:
            logger.info("{} statuses were told again, {} of them lost by the stream", count, len(missing))
        self._seen = now
        return count

    async def _missing(self) -> frozenset[str]:
        """The containers whose present status the stream does not show. Unavailable."""
        statuses = self._runtime.statuses()
        # Their events may be on the way still, and what is sent again may be all that is missing.
        if not await self._outbox.drained(SEND_FIRST_S):
            raise Unavailable("events are still on their way")
        free = asyncio.Semaphore(QUESTIONS_AT_ONCE)
        stream, node, missing = self._outbox.stream, self._bus.node or "", set()

        async def ask(status: ContainerStatus) -> None:
            cid = status.container
            async with free:
                found = await self._bus.js.last_message(stream, self._subjects.state(node, cid))
            # One that has changed meanwhile was told with its change.
            if self._runtime.status(cid) == status and not shows(
                None if found is None else found.data, status
            ):
                missing.add(cid)

        asked = [asyncio.create_task(ask(status)) for status in statuses]
        try:
            await asyncio.gather(*asked)
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        return frozenset(missing)


def _newest_time(record: ContainerRecord) -> datetime:
    """When an adopted container's status was told last, as far as the status itself shows."""
    status = record.status
    times = (status.created_at, status.started_at, status.finished_at)
    return max((time for time in times if time is not None), default=datetime.min.replace(tzinfo=UTC))
