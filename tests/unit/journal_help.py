"""Events and entries for the journal's tests."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from schemas.events import CommandAccepted
from worker.journal import Journal, LedgerEntry, OutboxRow, Tx

NODE = "node-1"
START = datetime(2026, 11, 24, 3, 31, 39, 228339, tzinfo=UTC)
SUBJECT = "sandfleet.v1.evt.node-1.web-0.command"
EVERYTHING = (10**9, 10**12)


class Clock:
    """Moves on by a second each time it is read."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now


def say(tx: Tx, text: str = "start", **options: Any) -> CommandAccepted:
    return tx.event(SUBJECT, lambda head: CommandAccepted(**head.fields(), command=text), **options)


def saying(text: str) -> Callable[[Tx], int]:
    return lambda tx: say(tx, text).seq


def entry(command_id: str, **changes: Any) -> LedgerEntry:
    fields: dict[str, Any] = {
        "id": command_id,
        "verb": "start",
        "container": "web-0",
        "digest": "d" * 64,
        "subject": "sandfleet.v1.cmd.node-1.web-0.start",
        "stream_seq": 1,
        "stream_time": START,
        "body": b'{"type":"start"}',
    }
    return LedgerEntry(**(fields | changes))


async def all_rows(journal: Journal) -> list[OutboxRow]:
    return await journal.read(lambda tx: tx.outbox(0, *EVERYTHING))


def decoded(row: OutboxRow) -> CommandAccepted:
    return msgspec.json.decode(row.payload, type=CommandAccepted)
