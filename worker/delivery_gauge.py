"""What is on its way from the node to the streams, measured when somebody asks: for `info` and the service's STATS.

Nothing is counted by going through tables: one row of the outbox is looked up by its number, the rest is in memory.
"""

import asyncio
from datetime import datetime
from typing import Protocol

import msgspec

from schemas.errors import ContractError
from schemas.node import DeliveryInfo, LogBacklog
from worker.clock import Clock, utc_now
from worker.journal import Journal, Tx
from worker.logs import Backlog, LogShipper

MAX_LOGS = 1000
PATIENCE_S = 1.0


class Connection(Protocol):
    @property
    def session(self) -> int: ...


class Outbox(Protocol):
    @property
    def sent_seq(self) -> int: ...


class Consumer(Protocol):
    @property
    def redelivered(self) -> int: ...


class DeliveryGauge:
    """Of one connection's parts. `session` counts the connections made."""

    def __init__(
        self,
        journal: Journal,
        logs: LogShipper,
        *,
        bus: Connection,
        outbox: Outbox,
        consumer: Consumer,
        clock: Clock = utc_now,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._journal = journal
        self._logs = logs
        self._bus = bus
        self._outbox = outbox
        self._consumer = consumer
        self._clock = clock
        self._patience_s = patience_s

    async def measure(self) -> DeliveryInfo:
        """A journal that hangs does not keep the rest from being told."""
        events, oldest = await self._unsent()
        backlog = self._logs.backlog()
        logs = worst(backlog, MAX_LOGS)
        return DeliveryInfo(
            outbox_events=events,
            oldest_event_age_s=None if oldest is None else max(0.0, (self._clock() - oldest).total_seconds()),
            log_lag_bytes=sum(one.lag for one in backlog),
            log_lost_bytes=self._logs.lost_bytes,
            logs=logs,
            logs_omitted=sum(bool(one.lag or one.lost) for one in backlog) - len(logs),
            commands_redelivered=self._consumer.redelivered,
            reconnects=max(0, self._bus.session - 1),
        )

    async def _unsent(self) -> tuple[int | None, datetime | None]:
        after = self._outbox.sent_seq
        try:
            async with asyncio.timeout(self._patience_s):
                return await self._journal.read(lambda tx: unsent(tx, after))
        except (TimeoutError, ContractError):
            return None, None  # what the contract says of a journal that does not answer


def unsent(tx: Tx, after_seq: int) -> tuple[int, datetime | None]:
    """How many events follow `after_seq`, and when the first of them was made."""
    first = tx.outbox(after_seq, 1, 1)
    return (max(0, tx.last_seq - after_seq), _event.decode(first[0].payload).time) if first else (0, None)


def worst(backlog: list[Backlog], most: int) -> list[LogBacklog]:
    """Those with any lag or loss, the greatest first."""
    found = [one for one in backlog if one.lag or one.lost]
    found.sort(key=lambda one: (-one.lag, -one.lost, one.cid, one.instance))
    return [
        LogBacklog(container=one.cid, instance=one.instance, lag_bytes=one.lag, lost_bytes=one.lost)
        for one in found[:most]
    ]


class _Timed(msgspec.Struct):
    time: datetime


_event = msgspec.json.Decoder(_Timed)
