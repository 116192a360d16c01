"""Events on their way out: numbered and kept in one transaction with what they tell of."""

import sqlite3
from collections.abc import Callable
from datetime import datetime
from typing import Any, TypeVar

import msgspec

from schemas.events import Event
from worker.clock import Clock, from_us, to_us
from worker.errors import Internal
from worker.ids import UlidMaker, is_ulid
from worker.journal_rows import BootRecord, EventHead, OutboxRow, OutboxState

MAX_EVENT_BYTES = 64 * 1024

E = TypeVar("E", bound=Event)

_encode = msgspec.json.Encoder().encode
_headers = msgspec.json.Decoder(dict[str, str])


class OutboxTx:
    """The part of a transaction that numbers, keeps and forgets events; `Tx` has the rest.

    Numbers given out by `event` become part of the transaction: when it is undone they are given again.
    """

    def __init__(
        self, connection: sqlite3.Connection, *, node: str, epoch: str, boot: str, last_seq: int, clock: Clock
    ) -> None:
        self._connection = connection
        self._clock = clock
        self._ulids = UlidMaker(clock)
        self._writable = False
        self.node = node
        self.epoch = epoch
        self.boot = boot
        self.last_seq = last_seq  # of the newest event
        self.fresh: list[OutboxRow] = []  # the events of this transaction

    def now(self) -> datetime:
        return self._clock()

    def event(
        self, subject: str, make: Callable[[EventHead], E], *, headers: dict[str, str] | None = None
    ) -> E:
        """Append an event under the next number. Internal when it is larger than 64 KiB or cannot be sent."""
        seq = self.last_seq + 1
        event = make(EventHead(self.node, self.epoch, self.boot, seq, self._clock()))
        if (event.node, event.epoch, event.boot, event.seq) != (self.node, self.epoch, self.boot, seq):
            raise Internal(f"an event for {subject} was made without its head")
        payload = _encode(event)
        if len(payload) > MAX_EVENT_BYTES:
            raise Internal(f"an event of {len(payload)} bytes for {subject}: the limit is {MAX_EVENT_BYTES}")
        for name, value in (headers or {}).items():
            if not (name + value).isascii() or not (name + value).isprintable():
                raise Internal(f"the header {name!r} of an event for {subject} cannot be sent")
        self._write(
            "INSERT INTO outbox (seq, subject, payload, headers) VALUES (?, ?, ?, ?)",
            (seq, subject, payload, headers_text(headers)),
        )
        self.last_seq = seq
        self.fresh.append(OutboxRow(seq, subject, payload, headers, None))
        return event

    def outbox(self, after_seq: int, limit: int, max_bytes: int) -> list[OutboxRow]:
        """Rows after `after_seq` in order, acknowledged or not: at most `limit` and `max_bytes`, or one."""
        rows: list[OutboxRow] = []
        size = 0
        found = self._connection.execute(
            "SELECT seq, subject, payload, headers, (SELECT acked_at FROM acks WHERE upto_seq >= outbox.seq"
            " ORDER BY upto_seq LIMIT 1) FROM outbox WHERE seq > ? ORDER BY seq LIMIT ?",
            (after_seq, limit),
        )
        for seq, subject, payload, headers, acked_at in found:
            size += len(subject) + len(payload) + len(headers or "")
            if rows and size > max_bytes:
                found.close()
                break
            rows.append(OutboxRow(seq, subject, payload, headers_map(headers), moment(acked_at)))
        return rows

    def outbox_state(self) -> OutboxState:
        first = self._value("SELECT min(seq) FROM outbox") or self.last_seq + 1
        acked = self._value("SELECT max(upto_seq) FROM acks") or 0
        return OutboxState(first, max(acked, first - 1), self.last_seq)

    def outbox_acked(self, upto_seq: int, at: datetime) -> None:
        """The stream has acknowledged all up to `upto_seq`; the rows are kept until they expire."""
        if upto_seq > self.last_seq:
            raise Internal(f"event {upto_seq} was acknowledged, the last one made is {self.last_seq}")
        state = self.outbox_state()
        if upto_seq > state.acked_seq:
            self._write("INSERT INTO acks VALUES (?, ?)", (upto_seq, to_us(at)))

    def outbox_resend(self, from_seq: int) -> None:
        """What was acknowledged from `from_seq` on counts as not sent: the stream has lost it."""
        covering = self._value("SELECT min(acked_at) FROM acks WHERE upto_seq >= ?", (from_seq,))
        self._write("DELETE FROM acks WHERE upto_seq >= ?", (from_seq,))
        if covering is not None and self._value("SELECT 1 FROM outbox WHERE seq < ?", (from_seq,)):
            self._write("INSERT OR IGNORE INTO acks VALUES (?, ?)", (from_seq - 1, covering))

    def outbox_drop(self, upto_seq: int) -> int:
        """Delete the rows up to `upto_seq`, acknowledged or not: they were seen in the stream."""
        deleted = self._write("DELETE FROM outbox WHERE seq <= ?", (upto_seq,))
        self._write("DELETE FROM acks WHERE upto_seq <= ?", (upto_seq,))
        return deleted

    def outbox_expire(self, acked_before: datetime, *, limit: int = 500) -> int:
        """Delete at most `limit` rows acknowledged before that; call again while it returns `limit`."""
        upto = self._value("SELECT max(upto_seq) FROM acks WHERE acked_at < ?", (to_us(acked_before),))
        first = self._value("SELECT min(seq) FROM outbox")
        if upto is None or first is None:
            return 0
        return self.outbox_drop(min(upto, first + limit - 1))

    # -- epochs and boots

    def owns(self, epoch: str, boot: str, seq: int) -> bool:
        """Whether this very journal made that event: this epoch, a boot of ours, a number that boot gave."""
        if epoch != self.epoch:
            return False
        return self._gave(epoch, boot, seq, self.last_seq if boot == self.boot else None)

    def owned(self, epoch: str, boot: str, seq: int) -> bool:
        """The same of an epoch before this one: what it made then may come back with an old copy of the stream."""
        return epoch < self.epoch and self._gave(epoch, boot, seq, None)

    def _gave(self, epoch: str, boot: str, seq: int, last_seq: int | None) -> bool:
        row = self._connection.execute(
            "SELECT first_seq, last_seq FROM boots WHERE epoch = ? AND boot = ?", (epoch, boot)
        ).fetchone()
        return row is not None and row[0] <= seq <= (row[1] if last_seq is None else last_seq)

    def boots(self) -> list[BootRecord]:
        """All boots that made events, and this one, oldest first; those of former epochs too."""
        found = self._connection.execute("SELECT epoch, boot, first_seq, last_seq, opened_at FROM boots")
        return [
            BootRecord(
                epoch,
                boot,
                first_seq,
                self.last_seq if (epoch, boot) == (self.epoch, self.boot) else last_seq,
                from_us(opened_at),
            )
            for epoch, boot, first_seq, last_seq, opened_at in found
        ]

    def new_epoch(self, above: str | None = None, *, carry_unsent: bool = True) -> str:
        """Take the name over: begin an epoch greater than `above` and than our own, with numbers from 1.

        What the stream had acknowledged stands there under the former epoch (or was lost with it) and is
        dropped. Events that were never acknowledged are numbered anew in their order, so that no result is
        lost; `carry_unsent=False` drops them too, for a journal put back from an old copy. ValueError when
        `above` is no ULID. Tell the data directory (`bind_epoch`) once this is committed.
        """
        if above is not None and not is_ulid(above):
            raise ValueError(f"{above[:40]!r} is no ULID")
        epoch = self._ulids.above(max(self.epoch, above or ""))
        acked = self.outbox_state().acked_seq
        self._write("DELETE FROM outbox WHERE seq <= ?", (acked if carry_unsent else self.last_seq,))
        self._write("DELETE FROM acks")
        former, self.epoch = self.epoch, epoch
        self._write("UPDATE journal SET epoch = ?", (epoch,))
        this_boot = (former, self.boot)
        self._write("UPDATE boots SET last_seq = ? WHERE epoch = ? AND boot = ?", (self.last_seq, *this_boot))
        opened_at = self._value("SELECT opened_at FROM boots WHERE epoch = ? AND boot = ?", this_boot)
        self.last_seq = 0
        # A number only ever moves down into the space that the deleted rows left: no two meet on the way.
        while row := self._connection.execute(
            "SELECT seq, payload FROM outbox WHERE seq > ? ORDER BY seq LIMIT 1", (self.last_seq,)
        ).fetchone():
            self.last_seq += 1
            payload = _with_head(row[1], epoch, self.boot, self.last_seq)
            moved = (self.last_seq, payload, row[0])
            self._write("UPDATE outbox SET seq = ?, payload = ? WHERE seq = ?", moved)
        self._write("INSERT INTO boots VALUES (?, ?, 1, ?, ?)", (epoch, self.boot, self.last_seq, opened_at))
        return epoch

    # -- the journal's own side

    def _write(self, sql: str, values: tuple[Any, ...] = ()) -> int:
        if not self._writable:
            raise Internal("the journal was written to outside of a transaction")
        return self._connection.execute(sql, values).rowcount

    def _written(self, sql: str, values: tuple[Any, ...]) -> list[Any]:
        """What a statement with RETURNING gives."""
        if not self._writable:
            raise Internal("the journal was written to outside of a transaction")
        return self._connection.execute(sql, values).fetchall()

    def _value(self, sql: str, values: tuple[Any, ...] = ()) -> Any:
        row = self._connection.execute(sql, values).fetchone()
        return None if row is None else row[0]


def _with_head(payload: bytes, epoch: str, boot: str, seq: int) -> bytes:
    fields = msgspec.json.decode(payload, type=dict[str, msgspec.Raw])
    for name, value in (("epoch", epoch), ("boot", boot), ("seq", seq)):
        fields[name] = msgspec.Raw(_encode(value))
    return _encode(fields)


def headers_text(headers: dict[str, str] | None) -> str | None:
    return _encode(headers).decode() if headers else None


def headers_map(text: str | None) -> dict[str, str] | None:
    return None if text is None else _headers.decode(text)


def to_optional_us(moment: datetime | None) -> int | None:
    return None if moment is None else to_us(moment)


def moment(us: int | None) -> datetime | None:
    return None if us is None else from_us(us)
