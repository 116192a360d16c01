"""Live containers' statuses are published again before their newest could fall out of the event stream."""

import asyncio
from datetime import UTC, datetime, timedelta

from loguru import logger

from worker.bus.connection import Bus
from worker.bus.jetstream import StreamInfo
from worker.bus.outbox import OutboxPublisher
from worker.errors import ContractError
from worker.records import ContainerRecord
from worker.runtime import Runtime

LOOK_EVERY_S = 600.0
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


class Repeater:
    """Looks at the event stream now and then and has due statuses published again."""

    def __init__(self, bus: Bus, outbox: OutboxPublisher, runtime: Runtime) -> None:
        self._bus = bus
        self._stream = outbox.stream
        self._runtime = runtime

    async def run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                await self.look()
            except ContractError as failure:
                logger.warning("the event stream could not be looked at: {}", failure.message)

    async def look(self) -> int:
        """Publish what is due; gives how many statuses that were."""
        info = await self._bus.js.stream_info(self._stream)
        due = oldest_safe(info, datetime.now(UTC))
        if due is None:
            return 0

        def is_due(record: ContainerRecord, told_at: datetime | None) -> bool:
            return (told_at or _newest_time(record)) < due

        return await self._runtime.repeat(is_due)


def _newest_time(record: ContainerRecord) -> datetime:
    """When an adopted container's status was told last, as far as the status itself shows."""
    status = record.status
    times = (status.created_at, status.started_at, status.finished_at)
    return max((time for time in times if time is not None), default=datetime.min.replace(tzinfo=UTC))
