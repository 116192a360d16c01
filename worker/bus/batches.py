"""Events as the stream takes them: one plain publish, or an atomic batch (ADR-50), whichever is faster.

A batch costs the server a fixed effort (4 to 6 ms for file storage on one server, next to nothing with
replicas), a single publish a round trip. So a few events go one by one and a backlog in batches, by what
was measured so far. Both say which message of the node they expect to be the newest.
"""

import asyncio
import secrets
from collections.abc import Sequence

from worker.bus.connection import Bus
from worker.bus.failures import JetStreamError, NoAnswer, NoResponders
from worker.bus.jetstream import PubAck, read_ack
from worker.journal import OutboxRow

BATCH_EVENTS = 200
BATCH_BYTES = 512 * 1024
CERTAINLY = 32  # so many waiting events go in a batch whatever was measured

EXPECTED = "Nats-Expected-Last-Subject-Sequence"
EXPECTED_SUBJECT = "Nats-Expected-Last-Subject-Sequence-Subject"
BATCH_ID = "Nats-Batch-Id"
BATCH_SEQUENCE = "Nats-Batch-Sequence"
BATCH_COMMIT = "Nats-Batch-Commit"


class Pace:
    """Whether `waiting` events are better sent one by one or as a batch, by moving averages. Pure."""

    def __init__(self, single_s: float = 0.0005, extra_s: float = 0.005) -> None:
        self.single_s = single_s
        self.extra_s = extra_s  # what a batch costs beyond a single publish

    def batch_is_better(self, waiting: int) -> bool:
        return waiting >= 32 or (waiting > 1 and (waiting - 1) * self.single_s > self.extra_s)

    def single_took(self, seconds: float) -> None:
        self.single_s += (min(seconds, 1.0) - self.single_s) * 0.2

    def batch_took(self, seconds: float) -> None:
        extra = min(max(seconds - self.single_s, 0.0), 0.05)
        self.extra_s += (extra - self.extra_s) * 0.2


class EventWriter:
    """Writes events below `pattern`. `pace` chooses; set `atomic` to False for a stream without batches."""

    def __init__(self, bus: Bus, pattern: str) -> None:
        self.pace = Pace()
        self.atomic = True
        self._most = BATCH_EVENTS  # less while the stream is full
        self._bus = bus
        self._pattern = pattern

    def choose(self, waiting: Sequence[OutboxRow]) -> list[OutboxRow]:
        """The first of the waiting events that are best written together."""
        if not self.atomic or self._most == 1 or not self.pace.batch_is_better(len(waiting)):
            return [waiting[0]]
        rows: list[OutboxRow] = []
        size = 0
        for row in waiting:
            size += len(row.payload)
            if rows and (len(rows) == self._most or size > BATCH_BYTES):
                break
            rows.append(row)
        return rows

    async def write(self, rows: Sequence[OutboxRow], *, expected: int, patience_s: float) -> PubAck:
        """Store them all or none. JetStreamError (`refused_sequence`: another message is the newest),
        NoAnswer, NoResponders, NotConnected.
        """
        try:
            ack = await self._write(rows, expected, patience_s)
        except JetStreamError as error:
            if error.err_code == JetStreamError.STORE_FAILED:
                self._most = max(1, len(rows) // 2)
            raise
        self._most = min(2 * self._most, BATCH_EVENTS)
        return ack

    async def _write(self, rows: Sequence[OutboxRow], expected: int, patience_s: float) -> PubAck:
        loop = asyncio.get_running_loop()
        began = loop.time()
        if len(rows) == 1:
            headers = {**(rows[0].headers or {}), **self._expectation(expected)}
            ack = await self._bus.js.publish(rows[0].subject, rows[0].payload, headers, timeout=patience_s)
            self.pace.single_took(loop.time() - began)
        else:
            ack = await self._write_batch(rows, expected, patience_s)
            self.pace.batch_took(loop.time() - began)
        return ack

    async def _write_batch(self, rows: Sequence[OutboxRow], expected: int, patience_s: float) -> PubAck:
        """Written at once, since the server keeps few batches open; only the commit is answered."""
        batch = secrets.token_hex(16)
        token, reply = self._bus.expect()
        try:
            for number, row in enumerate(rows, 1):
                headers = {**(row.headers or {}), BATCH_ID: batch, BATCH_SEQUENCE: str(number)}
                answer_to = ""
                if number == 1:
                    headers |= self._expectation(expected)
                if number == len(rows):
                    headers[BATCH_COMMIT] = "1"
                    answer_to = self._bus.reply_subject(token)
                await self._bus.publish(row.subject, row.payload, headers, reply=answer_to)
            async with asyncio.timeout(patience_s):
                message = await reply
        except TimeoutError:
            raise NoAnswer("no acknowledgement for a batch of events") from None
        finally:
            self._bus.forget(token)
        if message.status == 503:
            raise NoResponders(f"no stream takes {self._pattern}")
        return read_ack(message)

    def _expectation(self, expected: int) -> dict[str, str]:
        return {EXPECTED: str(expected), EXPECTED_SUBJECT: self._pattern}
