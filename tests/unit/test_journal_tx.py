"""Everything a transaction can read and write."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from schemas.events import CommandAccepted
from tests.unit.journal_help import (
    EVERYTHING,
    NODE,
    START,
    SUBJECT,
    Clock,
    all_rows,
    decoded,
    entry,
    say,
    saying,
)
from worker.errors import Conflict, Internal, NotFound
from worker.ids import new_ulid
from worker.journal import (
    MAX_EVENT_BYTES,
    CommandState,
    Journal,
    LogCursor,
    OutboxState,
    StreamPosition,
    Tx,
)

LATER = START + timedelta(days=1)


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    opened = await Journal.open(tmp_path / "worker.db", node=NODE, clock=Clock())
    yield opened
    await opened.close()


async def fill(journal: Journal, count: int) -> None:
    await journal.transact(lambda tx: [say(tx, f"e{number}") for number in range(1, count + 1)])


def seqs(tx: Tx, after: int = 0) -> list[int]:
    return [row.seq for row in tx.outbox(after, *EVERYTHING)]


# -- events


async def test_an_event_is_kept_as_the_contract_writes_it(journal: Journal) -> None:
    headers = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}
    event = await journal.transact(lambda tx: say(tx, "start", headers=headers))
    (row,) = await all_rows(journal)
    assert (row.subject, row.headers, row.acked_at) == (SUBJECT, headers, None)
    body = msgspec.json.decode(row.payload)
    assert body["type"] == "command_accepted"
    assert (body["node"], body["epoch"], body["boot"], body["seq"]) == (NODE, journal.epoch, journal.boot, 1)
    assert body["time"] == event.time.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    assert event.time.microsecond == START.microsecond
    assert decoded(row) == event


async def test_an_event_that_is_too_large_costs_no_number(journal: Journal) -> None:
    def write(tx: Tx) -> int:
        with pytest.raises(Internal, match="the limit is 65536"):
            say(tx, "x" * MAX_EVENT_BYTES)
        return say(tx, "smaller").seq

    assert await journal.transact(write) == 1


@pytest.mark.parametrize("headers", [{"a": "b\r\nc: d"}, {"a": "grün"}, {"a\n": "b"}])
async def test_a_header_that_cannot_be_sent(journal: Journal, headers: dict[str, str]) -> None:
    with pytest.raises(Internal, match="cannot be sent"):
        await journal.transact(lambda tx: say(tx, headers=headers))


async def test_an_event_without_its_head(journal: Journal) -> None:
    with pytest.raises(Internal, match="without its head"):
        await journal.transact(
            lambda tx: tx.event(
                SUBJECT,
                lambda head: CommandAccepted(
                    node=NODE, epoch=head.epoch, boot=head.boot, seq=7, time=head.time, command="start"
                ),
            )
        )
    assert await all_rows(journal) == []


# -- the outbox


async def test_a_batch_is_bounded_by_rows_and_bytes(journal: Journal) -> None:
    await fill(journal, 20)
    size = len((await all_rows(journal))[0].payload) + len(SUBJECT)

    def batches(tx: Tx) -> list[list[int]]:
        found = [
            tx.outbox(0, 5, 10**9),
            tx.outbox(5, 100, 3 * size + 10),
            tx.outbox(19, 5, 1),
            tx.outbox(20, 5, 9),
        ]
        return [[row.seq for row in rows] for rows in found]

    assert await journal.read(batches) == [[1, 2, 3, 4, 5], [6, 7, 8], [20], []]


async def test_acknowledged_rows_are_kept_until_they_expire(journal: Journal) -> None:
    await fill(journal, 10)
    await journal.transact(lambda tx: tx.outbox_acked(4, LATER))
    await journal.transact(lambda tx: tx.outbox_acked(7, LATER + timedelta(minutes=1)))
    await journal.transact(
        lambda tx: tx.outbox_acked(6, LATER + timedelta(minutes=2))
    )  # an older answer, late
    assert await journal.read(lambda tx: tx.outbox_state()) == OutboxState(1, 7, 10)
    assert (await journal.read(lambda tx: tx.outbox_state())).unsent == 3
    rows = await all_rows(journal)
    assert [row.acked_at for row in rows] == [LATER] * 4 + [LATER + timedelta(minutes=1)] * 3 + [None] * 3
    cut = LATER + timedelta(seconds=1)
    assert await journal.transact(lambda tx: tx.outbox_expire(cut, limit=3)) == 3
    assert await journal.transact(lambda tx: tx.outbox_expire(cut, limit=3)) == 1
    assert await journal.transact(lambda tx: tx.outbox_expire(cut, limit=3)) == 0
    assert await journal.read(lambda tx: tx.outbox_state()) == OutboxState(5, 7, 10)
    assert await journal.transact(lambda tx: tx.outbox_expire(LATER + timedelta(days=9))) == 3
    assert await journal.read(lambda tx: (seqs(tx), tx.outbox_state())) == ([8, 9, 10], OutboxState(8, 7, 10))


async def test_an_empty_outbox_knows_where_it_is(journal: Journal) -> None:
    assert await journal.read(lambda tx: tx.outbox_state()) == OutboxState(1, 0, 0)
    await fill(journal, 3)
    assert await journal.transact(lambda tx: tx.outbox_drop(3)) == 3
    assert await journal.read(lambda tx: tx.outbox_state()) == OutboxState(4, 3, 3)
    assert await journal.transact(saying("next")) == 4


async def test_a_stream_that_lost_events_gets_them_again(journal: Journal) -> None:
    await fill(journal, 10)
    await journal.transact(lambda tx: (tx.outbox_acked(4, LATER), tx.outbox_acked(8, LATER)))
    await journal.transact(lambda tx: tx.outbox_resend(6))
    assert await journal.read(lambda tx: tx.outbox_state()) == OutboxState(1, 5, 10)
    assert [row.acked_at is None for row in await all_rows(journal)] == [False] * 5 + [True] * 5
    await journal.transact(lambda tx: tx.outbox_resend(1))
    assert await journal.read(lambda tx: tx.outbox_state()) == OutboxState(1, 0, 10)


async def test_dropping_what_was_seen_takes_the_unacknowledged_too(journal: Journal) -> None:
    await fill(journal, 5)
    await journal.transact(lambda tx: tx.outbox_acked(2, LATER))
    assert await journal.transact(lambda tx: tx.outbox_drop(4)) == 4
    assert await journal.read(lambda tx: (seqs(tx), tx.outbox_state())) == ([5], OutboxState(5, 4, 5))


async def test_an_acknowledgement_of_what_was_never_made(journal: Journal) -> None:
    with pytest.raises(Internal, match="the last one made is 0"):
        await journal.transact(lambda tx: tx.outbox_acked(1, LATER))


# -- epochs and boots


async def test_a_journal_knows_its_own_events(journal: Journal) -> None:
    await fill(journal, 3)
    await journal.close()
    again = await Journal.open(journal.path, node=NODE)
    await again.transact(say)
    epoch, old, new = again.epoch, journal.boot, again.boot
    cases = [
        (epoch, old, 3, True),
        (epoch, old, 4, False),  # a number that boot never gave: it went on elsewhere
        (epoch, new, 4, True),
        (epoch, new, 5, False),
        (epoch, new, 3, False),
        (epoch, new_ulid(), 3, False),
        (new_ulid(), old, 3, False),
    ]
    try:
        for case_epoch, boot, seq, own in cases:
            assert await again.read(lambda tx, at=(case_epoch, boot, seq): tx.owns(*at)) is own  # type: ignore[misc]
        boots = await again.read(lambda tx: tx.boots())
        assert [(boot.boot, boot.first_seq, boot.last_seq) for boot in boots] == [(old, 1, 3), (new, 4, 4)]
    finally:
        await again.close()


async def test_a_takeover_numbers_the_unsent_anew(journal: Journal) -> None:
    await fill(journal, 6)
    await journal.transact(lambda tx: tx.outbox_acked(3, LATER))
    former, above = journal.epoch, new_ulid()
    told: list[int] = []
    journal.on_outbox = lambda: told.append(1)

    def take_over(tx: Tx) -> tuple[str, int]:
        say(tx, "e7")
        return tx.new_epoch(above), say(tx, "e8").seq

    epoch, seq = await journal.transact(take_over)
    assert epoch == journal.epoch > max(above, former)
    assert seq == 5
    assert told == [1]
    rows = await all_rows(journal)
    events = [decoded(row) for row in rows]
    assert [(row.seq, row.acked_at) for row in rows] == [(number, None) for number in range(1, 6)]
    assert [(event.seq, event.epoch, event.command) for event in events] == [
        (number, epoch, f"e{number + 3}") for number in range(1, 6)
    ]
    assert await journal.read(lambda tx: (tx.owns(epoch, tx.boot, 5), tx.owns(former, tx.boot, 3))) == (
        True,
        False,
    )
    await journal.close()
    again = await Journal.open(
        journal.path, node=NODE, expected_epoch=former
    )  # node.json was not told in time
    assert again.epoch == epoch
    assert await again.transact(saying("next")) == 6
    await again.close()


async def test_a_takeover_without_the_unsent(journal: Journal) -> None:
    await fill(journal, 4)
    await journal.transact(lambda tx: tx.outbox_acked(1, LATER))
    await journal.transact(lambda tx: tx.new_epoch(carry_unsent=False))
    assert await all_rows(journal) == []
    assert await journal.transact(saying("next")) == 1


async def test_a_takeover_that_is_undone(journal: Journal) -> None:
    await fill(journal, 4)
    former = journal.epoch

    def take_over(tx: Tx) -> None:
        tx.new_epoch(new_ulid())
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await journal.transact(take_over)
    with pytest.raises(ValueError, match="is no ULID"):
        await journal.transact(lambda tx: tx.new_epoch("somewhere else"))
    assert journal.epoch == former
    assert await journal.transact(saying("next")) == 5
    assert decoded((await all_rows(journal))[-1]).epoch == former


# -- the ledger


async def test_a_command_from_acceptance_to_result(journal: Journal) -> None:
    given = entry("one", deadline=LATER, headers={"traceparent": "x"}, stream_seq=9)
    await journal.transact(lambda tx: tx.accept(given))
    kept = await journal.read(lambda tx: tx.command("one"))
    assert kept is not None
    assert kept.accepted_at is not None
    assert START < kept.accepted_at < START + timedelta(minutes=1)
    assert kept == msgspec.structs.replace(given, accepted_at=kept.accepted_at)
    assert kept.state is CommandState.ACCEPTED
    await journal.transact(lambda tx: tx.complete("one", b'{"ok":true}', LATER))
    done = await journal.read(lambda tx: tx.command("one"))
    assert done is not None
    assert (done.state, done.result, done.completed_at, done.body) == (
        "completed",
        b'{"ok":true}',
        LATER,
        b"",
    )
    assert await journal.read(lambda tx: (tx.last_applied("web-0"), tx.last_applied("web-1"))) == (9, 0)


async def test_what_the_ledger_refuses(journal: Journal) -> None:
    await journal.transact(lambda tx: tx.accept(entry("one")))
    with pytest.raises(Conflict, match="known already"):
        await journal.transact(lambda tx: tx.accept(entry("one", digest="other")))
    with pytest.raises(NotFound):
        await journal.transact(lambda tx: tx.complete("two", b"{}", LATER))
    await journal.transact(lambda tx: tx.complete("one", b"{}", LATER))
    with pytest.raises(Internal, match="completed twice"):
        await journal.transact(lambda tx: tx.complete("one", b"{}", LATER))


async def test_recovery_follows_the_stream(journal: Journal) -> None:
    for seq in (5, 2, 9, 7):
        await journal.transact(lambda tx, seq=seq: tx.accept(entry(f"c{seq}", stream_seq=seq)))  # type: ignore[misc]
    await journal.transact(lambda tx: tx.complete("c7", b"{}", LATER))
    left = await journal.read(lambda tx: tx.accepted_commands())
    assert [found.id for found in left] == ["c2", "c5", "c9"]
    assert left[0].body == b'{"type":"start"}'


async def test_a_command_behind_a_later_one_is_overtaken(journal: Journal) -> None:
    await journal.transact(lambda tx: tx.accept(entry("ten", stream_seq=10, stream_time=LATER)))
    await journal.transact(
        lambda tx: tx.accept(entry("node", stream_seq=20, stream_time=LATER, container=None))
    )
    assert not await journal.read(lambda tx: tx.overtaken("web-0", 9, START))  # accepted is not applied
    await journal.transact(lambda tx: (tx.complete("ten", b"{}", LATER), tx.complete("node", b"{}", LATER)))
    assert await journal.read(lambda tx: tx.overtaken("web-0", 9, START))
    assert not await journal.read(lambda tx: tx.overtaken("web-0", 11, START))
    assert not await journal.read(lambda tx: tx.overtaken("web-1", 9, START))
    assert await journal.read(lambda tx: (tx.overtaken(None, 19, LATER), tx.last_applied(None))) == (True, 20)


@pytest.mark.parametrize(
    ("later", "overtakes"),
    [
        ({"verb": "stop"}, True),
        ({"verb": "stop", "ok": False}, False),
        ({"verb": "start"}, False),
        ({"verb": "stop", "container": "web-1"}, False),
        ({"verb": "stop", "stream_seq": 9}, False),
        ({"verb": "stop", "stream_time": START - timedelta(minutes=1)}, False),
        ({"verb": "stop", "open": True}, False),
    ],
)
async def test_what_has_overtaken_a_command_that_is_not_answered(
    journal: Journal, later: dict[str, Any], overtakes: bool
) -> None:
    fields = {"stream_seq": 11, **later}
    result = b'{"ok":true}' if fields.pop("ok", True) else b'{"ok":false}'
    is_open = fields.pop("open", False)
    waits = entry("waits", stream_seq=10, accepted_at=START)
    await journal.transact(lambda tx: tx.accept(waits))
    await journal.transact(lambda tx: tx.accept(entry("later", **fields)))
    if not is_open:
        await journal.transact(lambda tx: tx.complete("later", result, LATER))
    found = await journal.read(lambda tx: tx.overtaker(waits, frozenset({"stop", "kill"})))
    assert found == ("stop" if overtakes else None)


async def test_a_stream_made_anew_counts_from_one(journal: Journal) -> None:
    await journal.transact(lambda tx: tx.accept(entry("old", stream_seq=5000, stream_time=START)))
    await journal.transact(lambda tx: tx.complete("old", b"{}", START))
    assert not await journal.read(lambda tx: tx.overtaken("web-0", 1, LATER))
    await journal.transact(lambda tx: tx.accept(entry("new", stream_seq=2, stream_time=LATER)))
    await journal.transact(lambda tx: tx.complete("new", b"{}", LATER))
    assert await journal.read(lambda tx: tx.last_applied("web-0")) == 2
    assert await journal.read(lambda tx: tx.overtaken("web-0", 1, LATER))


async def test_a_rejection_is_told_once(journal: Journal) -> None:
    answers = [await journal.transact(lambda tx: tx.first_rejection(4, START)) for _ in range(2)]
    answers.append(await journal.transact(lambda tx: tx.first_rejection(4, LATER)))  # of a stream made anew
    assert answers == [True, False, True]


async def test_pruning_forgets_only_what_is_old_and_done(journal: Journal) -> None:
    def write(tx: Tx) -> None:
        for number in range(10):
            cid = f"web-{number}"
            tx.accept(entry(f"c{number}", container=cid, stream_seq=number))
            if number != 9:
                tx.complete(f"c{number}", b"{}", START + timedelta(hours=number))
        tx.put_container("web-0", "I", b"{}")
        tx.first_rejection(99, START)

    await journal.transact(write)
    cut = START + timedelta(hours=5)
    assert await journal.transact(lambda tx: tx.prune_commands(cut, settled=-1)) == 0, "may come again"
    removed = [
        await journal.transact(lambda tx, upto=settled: tx.prune_commands(cut, settled=upto, limit=3))
        for settled in (1, 99, 99, 99)
    ]
    assert removed == [2, 3, 0, 0]

    def look(tx: Tx) -> tuple[list[bool], list[int], bool]:
        known = [tx.command(f"c{number}") is not None for number in range(10)]
        return (
            known,
            [tx.last_applied(f"web-{number}") for number in range(1, 9)],
            tx.overtaken("web-0", -1, START),
        )

    known, applied, _ = await journal.read(look)
    assert known == [False] * 5 + [True] * 5
    assert applied == [0, 0, 0, 0, 5, 6, 7, 8]
    assert await journal.transact(lambda tx: tx.first_rejection(99, START)) is True


# -- containers and the rest


async def test_containers(journal: Journal) -> None:
    await journal.transact(
        lambda tx: (tx.put_container("b-0", "I", b"1"), tx.put_container("a-0", "I", b"2"))
    )
    await journal.transact(lambda tx: tx.put_container("b-0", "J", b"3"))
    assert await journal.read(lambda tx: tx.containers()) == [("a-0", b"2"), ("b-0", b"3")]
    await journal.transact(lambda tx: tx.delete_container("a-0"))
    assert await journal.read(lambda tx: (tx.container("a-0"), tx.container("b-0"))) == (None, b"3")


async def test_positions_cursors_and_settings_survive(journal: Journal) -> None:
    position = StreamPosition(
        created="2026-11-24T03:31:39.228339123Z",
        last_seq=17,
        last_event_seq=12,
        last_epoch=journal.epoch,
        last_boot=journal.boot,
    )
    cursor = LogCursor(offset=1 << 40, run=2, eof_run=1)

    def write(tx: Tx) -> None:
        tx.put_position("SANDFLEET_EVT", StreamPosition(created="before", last_seq=1))
        tx.put_position("SANDFLEET_EVT", position)
        tx.put_log_cursor("I", "stdout", LogCursor(offset=1))
        tx.put_log_cursor("I", "stdout", cursor)
        tx.put_log_cursor("J", "stderr", LogCursor(offset=2))
        tx.put_meta("draining", True)
        tx.put_meta("map", {"a": [1, None]})

    await journal.transact(write)
    await journal.close()
    again = await Journal.open(journal.path, node=NODE)

    def look(tx: Tx) -> None:
        assert tx.position("SANDFLEET_EVT") == position
        assert tx.position("SANDFLEET_LOG") is None
        assert tx.log_cursor("I", "stdout") == cursor
        assert tx.log_cursor("I", "stderr") is None
        assert tx.log_cursors() == {("I", "stdout"): cursor, ("J", "stderr"): LogCursor(offset=2)}
        assert (tx.get_meta("draining"), tx.get_meta("map"), tx.get_meta("none")) == (
            True,
            {"a": [1, None]},
            None,
        )

    await again.read(look)
    await again.transact(lambda tx: (tx.delete_log_cursors("I"), tx.delete_meta("map")))
    left = await again.read(lambda tx: (list(tx.log_cursors()), tx.get_meta("map"), tx.now()))
    assert left[:2] == ([("J", "stderr")], None)
    assert left[2].tzinfo is UTC
    assert isinstance(left[2], datetime)
    await again.close()
