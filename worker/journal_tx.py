"""What may be read and written inside one transaction of the journal."""

from datetime import datetime, timedelta
from typing import Any

import msgspec

from worker.clock import from_us, to_us
from worker.errors import Conflict, Internal, NotFound
from worker.journal_outbox import OutboxTx, headers_map, headers_text, moment, to_optional_us
from worker.journal_rows import LedgerEntry, LogCursor, StreamPosition

NODE_COMMANDS = "_"  # the place of node commands beside the container names
RECREATED_AFTER = timedelta(seconds=5)  # more than the clocks of a stream's successive leaders differ

_encode = msgspec.json.Encoder().encode
_position = msgspec.json.Decoder(StreamPosition)


class _Ended(msgspec.Struct):
    ok: bool


_ended = msgspec.json.Decoder(_Ended)

_ENTRY = (
    "id, verb, container, digest, subject, stream_seq, stream_time, accepted_at, deadline, headers, body,"
    " result, completed_at"
)


class Tx(OutboxTx):
    """Handed to the functions given to `Journal.transact` and `Journal.read`, and good only inside them."""

    # -- the command ledger

    def command(self, command_id: str) -> LedgerEntry | None:
        row = self._connection.execute(
            f"SELECT {_ENTRY} FROM commands WHERE id = ?", (command_id,)
        ).fetchone()
        return None if row is None else _entry(row)

    def accept(self, entry: LedgerEntry) -> None:
        """Conflict when the id is known already."""
        values = (
            entry.id,
            entry.verb,
            entry.container,
            entry.digest,
            entry.subject,
            entry.stream_seq,
            to_optional_us(entry.stream_time),
            to_optional_us(entry.accepted_at or self._clock()),
            to_optional_us(entry.deadline),
            headers_text(entry.headers),
            entry.body,
            entry.result,
            to_optional_us(entry.completed_at),
        )
        added = self._write(
            f"INSERT INTO commands ({_ENTRY}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT DO NOTHING",
            values,
        )
        if not added:
            raise Conflict(f"the id {entry.id} is known already", field="id")

    def complete(self, command_id: str, result: bytes, at: datetime) -> None:
        """Keep the one result of an accepted command; its body goes."""
        changed = self._written(
            "UPDATE commands SET body = x'', result = ?, completed_at = ?"
            " WHERE id = ? AND completed_at IS NULL RETURNING coalesce(container, ?), stream_seq, stream_time",
            (result, to_us(at), command_id, NODE_COMMANDS),
        )
        if not changed:
            if self.command(command_id) is None:
                raise NotFound(f"no command {command_id} is known")
            raise Internal(f"the command {command_id} was completed twice")
        container, seq, time = changed[0]
        self._write(
            "INSERT INTO applied VALUES (?, ?, ?, ?) ON CONFLICT (container) DO UPDATE SET"
            " stream_seq = excluded.stream_seq, stream_time = excluded.stream_time,"
            " applied_at = excluded.applied_at"
            " WHERE excluded.stream_seq > stream_seq OR excluded.stream_time > stream_time + ?",
            (container, seq, time, to_us(at), RECREATED_AFTER // timedelta(microseconds=1)),
        )

    def accepted_commands(self) -> list[LedgerEntry]:
        """Those not completed yet, in the order of the stream."""
        found = self._connection.execute(
            f"SELECT {_ENTRY} FROM commands WHERE completed_at IS NULL ORDER BY stream_seq"
        )
        return [_entry(row) for row in found]

    def last_applied(self, container: str | None) -> int:
        """The highest stream sequence of a completed command of a container (None: of the node), else 0."""
        place = (container or NODE_COMMANDS,)
        return self._value("SELECT stream_seq FROM applied WHERE container = ?", place) or 0

    def overtaken(self, container: str | None, stream_seq: int, stream_time: datetime) -> bool:
        """Whether a later command was applied already.

        A lower sequence with a later time comes from a stream that was made anew and counts from 1 again.
        """
        row = self._connection.execute(
            "SELECT stream_seq, stream_time FROM applied WHERE container = ?", (container or NODE_COMMANDS,)
        ).fetchone()
        if row is None or row[0] <= stream_seq:
            return False
        return row[1] is None or stream_time <= from_us(row[1]) + RECREATED_AFTER

    def overtaker(self, entry: LedgerEntry, verbs: frozenset[str]) -> str | None:
        """The verb of a later command of these, of the same container, that has ended well since `entry` was
        accepted.
        """
        if entry.stream_time is None or not self.overtaken(
            entry.container, entry.stream_seq, entry.stream_time
        ):
            return None
        found = self._connection.execute(
            "SELECT verb, result FROM commands WHERE completed_at >= ? AND container = ? AND stream_seq > ?"
            " AND stream_time >= ? ORDER BY stream_seq",
            (
                to_optional_us(entry.accepted_at) or 0,
                entry.container,
                entry.stream_seq,
                to_us(entry.stream_time),
            ),
        )
        return next((verb for verb, result in found if verb in verbs and _ended.decode(result).ok), None)

    def first_rejection(self, stream_seq: int, stream_time: datetime) -> bool:
        """True the first time: a message that leaves no ledger entry is answered once, if it comes again."""
        added = self._write(
            "INSERT INTO rejections VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
            (stream_seq, to_us(stream_time), to_us(self._clock())),
        )
        return added == 1

    def prune_commands(self, before: datetime, *, settled: int, limit: int = 200) -> int:
        """Forget at most `limit` commands completed before that; call again while it returns `limit`.

        Only what stands at `settled` or before it in the stream: the rest can be delivered again.
        """
        removed = self._write(
            "DELETE FROM commands WHERE arrival IN (SELECT arrival FROM commands"
            " WHERE completed_at < ? AND stream_seq <= ? ORDER BY completed_at LIMIT ?)",
            (to_us(before), settled, limit),
        )
        self._write(
            "DELETE FROM applied WHERE container IN (SELECT container FROM applied"
            " WHERE applied_at < ? AND stream_seq <= ?"
            " AND container <> ? AND NOT EXISTS (SELECT 1 FROM containers WHERE cid = container) LIMIT ?)",
            (to_us(before), settled, NODE_COMMANDS, limit),
        )
        self._write(
            "DELETE FROM rejections WHERE (stream_seq, stream_time) IN (SELECT stream_seq, stream_time"
            " FROM rejections WHERE rejected_at < ? AND stream_seq <= ? LIMIT ?)",
            (to_us(before), settled, limit),
        )
        return removed

    # -- containers

    def put_container(self, cid: str, instance: str, record: bytes) -> None:
        self._write(
            "INSERT INTO containers VALUES (?, ?, ?) ON CONFLICT (cid) DO UPDATE SET"
            " instance = excluded.instance, record = excluded.record",
            (cid, instance, record),
        )

    def delete_container(self, cid: str) -> None:
        self._write("DELETE FROM containers WHERE cid = ?", (cid,))

    def container(self, cid: str) -> bytes | None:
        found: bytes | None = self._value("SELECT record FROM containers WHERE cid = ?", (cid,))
        return found

    def instance(self, cid: str) -> str | None:
        found: str | None = self._value("SELECT instance FROM containers WHERE cid = ?", (cid,))
        return found

    def containers(self) -> list[tuple[str, bytes]]:
        """All records, by name."""
        return self._connection.execute("SELECT cid, record FROM containers ORDER BY cid").fetchall()

    # -- stream positions, log cursors, settings of the other parts

    def position(self, stream: str) -> StreamPosition | None:
        found = self._value("SELECT position FROM positions WHERE stream = ?", (stream,))
        return None if found is None else _position.decode(found)

    def put_position(self, stream: str, position: StreamPosition) -> None:
        self._write(
            "INSERT INTO positions VALUES (?, ?)"
            " ON CONFLICT (stream) DO UPDATE SET position = excluded.position",
            (stream, _encode(position)),
        )

    def log_cursor(self, instance: str, stream: str) -> LogCursor | None:
        row = self._connection.execute(
            "SELECT next_byte, run, eof_run FROM log_cursors WHERE instance = ? AND stream = ?",
            (instance, stream),
        ).fetchone()
        return None if row is None else LogCursor(offset=row[0], run=row[1], eof_run=row[2])

    def log_cursors(self) -> dict[tuple[str, str], LogCursor]:
        """All of them, by (instance, stream)."""
        found = self._connection.execute("SELECT instance, stream, next_byte, run, eof_run FROM log_cursors")
        return {(row[0], row[1]): LogCursor(offset=row[2], run=row[3], eof_run=row[4]) for row in found}

    def put_log_cursor(self, instance: str, stream: str, cursor: LogCursor) -> None:
        self._write(
            "INSERT OR REPLACE INTO log_cursors VALUES (?, ?, ?, ?, ?)",
            (instance, stream, cursor.offset, cursor.run, cursor.eof_run),
        )

    def delete_log_cursors(self, instance: str) -> None:
        self._write("DELETE FROM log_cursors WHERE instance = ?", (instance,))

    def get_meta(self, key: str) -> Any:
        """The JSON value kept under `key`, else None."""
        found = self._value("SELECT value FROM meta WHERE key = ?", (key,))
        return None if found is None else msgspec.json.decode(found)

    def put_meta(self, key: str, value: Any) -> None:
        self._write(
            "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
            (key, _encode(value)),
        )

    def delete_meta(self, key: str) -> None:
        self._write("DELETE FROM meta WHERE key = ?", (key,))


def _entry(row: tuple[Any, ...]) -> LedgerEntry:
    return LedgerEntry(
        id=row[0],
        verb=row[1],
        container=row[2],
        digest=row[3],
        subject=row[4],
        stream_seq=row[5],
        stream_time=moment(row[6]),
        accepted_at=moment(row[7]),
        deadline=moment(row[8]),
        headers=headers_map(row[9]),
        body=row[10],
        result=row[11],
        completed_at=moment(row[12]),
    )
