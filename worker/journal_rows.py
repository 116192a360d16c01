"""What the journal's tables hold, as the rest of the worker sees it."""

from datetime import datetime
from enum import StrEnum
from typing import Any

import msgspec


class EventHead(msgspec.Struct, frozen=True):
    """What the journal gives an event that is being made; `make` copies it into the event."""

    node: str
    epoch: str
    boot: str
    seq: int
    time: datetime

    def fields(self) -> dict[str, Any]:
        """For `StateChanged(**head.fields(), …)`."""
        return msgspec.structs.asdict(self)


class CommandState(StrEnum):
    ACCEPTED = "accepted"
    COMPLETED = "completed"


class LedgerEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A command under its id. `container` is None for a command of the node.

    `stream_seq` and `stream_time` are its place in the command stream, `digest` is of the canonical body,
    `headers` go to its events (traceparent). `accepted_at` is set by the journal when it is left out. `body`
    is kept until the command is completed, `result` (the encoded CommandCompleted) from then on.
    """

    id: str
    verb: str
    container: str | None
    digest: str
    subject: str
    stream_seq: int
    stream_time: datetime | None = None
    accepted_at: datetime | None = None
    deadline: datetime | None = None
    headers: dict[str, str] | None = None
    body: bytes = b""
    result: bytes | None = None
    completed_at: datetime | None = None

    @property
    def state(self) -> CommandState:
        return CommandState.ACCEPTED if self.completed_at is None else CommandState.COMPLETED


class OutboxRow(msgspec.Struct, frozen=True):
    seq: int
    subject: str
    payload: bytes
    headers: dict[str, str] | None
    acked_at: datetime | None


class OutboxState(msgspec.Struct, frozen=True):
    """The rows kept are `first_seq` to `last_seq`, no gap; `first_seq` is `last_seq + 1` if there is none.

    The stream acknowledged all up to `acked_seq`. `last_seq` is also the number of the newest event ever made
    in this epoch.
    """

    first_seq: int
    acked_seq: int
    last_seq: int

    @property
    def unsent(self) -> int:
        return self.last_seq - self.acked_seq


class BootRecord(msgspec.Struct, frozen=True):
    """A worker's life on this journal: it made the events `first_seq` … `last_seq` of `epoch`."""

    epoch: str
    boot: str
    first_seq: int
    last_seq: int
    opened_at: datetime


class StreamPosition(msgspec.Struct, frozen=True, kw_only=True):
    """What this node knows of a stream: when it was created (as the server wrote it), the sequence of the
    last message acknowledged to us, and which event that was."""

    created: str
    last_seq: int
    last_event_seq: int = 0
    last_epoch: str | None = None
    last_boot: str | None = None


class LogCursor(msgspec.Struct, frozen=True, kw_only=True):
    """How far one stream of an instance was stored: bytes before `offset`, run ends up to `eof_run`."""

    offset: int
    run: int = 0
    eof_run: int = 0
