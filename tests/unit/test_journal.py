"""The owner thread: group commit, failures of one and of all, laziness, closing; and what survives."""

import asyncio
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.journal_help import NODE, START, Clock, all_rows, decoded, entry, say, saying
from worker.errors import Conflict, Internal, ResourceExhausted, Unavailable
from worker.journal import Journal, Tx


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    opened = await Journal.open(tmp_path / "worker.db", node=NODE, clock=Clock())
    yield opened
    await opened.close()


async def reopened(journal: Journal) -> Journal:
    await journal.close()
    return await Journal.open(journal.path, node=NODE, clock=Clock())


class Oops(Exception):
    pass


def failing(*, after: Callable[[Tx], Any]) -> Callable[[Tx], None]:
    def function(tx: Tx) -> None:
        after(tx)
        raise Oops("on purpose")

    return function


async def test_events_are_numbered_across_restarts(journal: Journal) -> None:
    first = await journal.transact(say)
    assert (first.seq, first.node, first.epoch, first.boot) == (1, NODE, journal.epoch, journal.boot)
    assert first.time > START
    again = await reopened(journal)
    try:
        assert again.epoch == journal.epoch
        assert again.boot > journal.boot
        assert (await again.transact(say)).seq == 2
        assert [decoded(row).boot for row in await all_rows(again)] == [journal.boot, again.boot]
    finally:
        await again.close()


async def test_it_runs_in_one_named_thread(journal: Journal) -> None:
    names = {await journal.transact(lambda tx: threading.current_thread().name) for _ in range(3)}
    names.add(await journal.read(lambda tx: threading.current_thread().name))
    assert names == {"journal"}


async def test_a_failure_comes_back_and_undoes_only_itself(journal: Journal) -> None:
    def accepting(tx: Tx) -> None:
        tx.accept(entry("one"))
        say(tx, "lost")

    results = await asyncio.gather(
        journal.transact(saying("a")),
        journal.transact(failing(after=accepting)),
        journal.transact(saying("b")),
        return_exceptions=True,
    )
    assert results[0::2] == [1, 2]
    assert isinstance(results[1], Oops)
    assert [decoded(row).command for row in await all_rows(journal)] == ["a", "b"]
    assert await journal.read(lambda tx: tx.command("one")) is None


async def test_a_failure_alone_gives_its_number_back(journal: Journal) -> None:
    with pytest.raises(Oops):
        await journal.transact(failing(after=say))
    assert (await journal.transact(say)).seq == 1


async def test_what_waits_is_committed_together(journal: Journal) -> None:
    release = threading.Event()
    blocker = asyncio.ensure_future(journal.read(lambda tx: release.wait(10)))
    depth: list[bool] = []
    waiting = [
        asyncio.ensure_future(journal.transact(lambda tx: depth.append(tx._connection.in_transaction)))
        for _ in range(20)
    ]
    changes = journal.transact(lambda tx: tx._connection.total_changes)
    await asyncio.sleep(0)
    release.set()
    await asyncio.gather(blocker, *waiting, changes)
    assert depth == [True] * 20


async def test_answers_come_in_the_order_of_the_calls(journal: Journal) -> None:
    order: list[int] = []

    async def call(number: int) -> None:
        await journal.transact(saying(str(number)))
        order.append(number)

    await asyncio.gather(*(call(number) for number in range(600)))
    assert order == list(range(600))
    rows = await all_rows(journal)
    assert [decoded(row).command for row in rows] == [str(number) for number in range(600)]


async def test_read_must_not_write(journal: Journal) -> None:
    with pytest.raises(Internal, match="outside of a transaction"):
        await journal.read(say)
    assert (await journal.transact(say)).seq == 1


async def test_a_reader_sees_what_was_answered_before(journal: Journal) -> None:
    for number in range(1, 20):
        await journal.transact(say)
        assert await journal.read(lambda tx: tx.outbox_state().last_seq) == number


async def test_lazy_work_waits_for_company_and_not_for_ever(journal: Journal) -> None:
    lazy = asyncio.ensure_future(journal.transact(lambda tx: tx.put_meta("k", 1), lazy=True))
    await asyncio.sleep(0)
    assert (
        await journal.read(lambda tx: tx.get_meta("k")) is None
    )  # a reader is no company: it needs no commit
    await journal.transact(lambda tx: tx.put_meta("other", 1))
    assert lazy.done()
    async with asyncio.timeout(5):
        await journal.transact(lambda tx: tx.put_meta("k", 2), lazy=True)
    assert await journal.read(lambda tx: tx.get_meta("k")) == 2


async def test_lazy_work_keeps_its_place(journal: Journal) -> None:
    lazy = asyncio.ensure_future(journal.transact(saying("first"), lazy=True))
    await asyncio.sleep(0)
    assert await journal.transact(saying("second")) == 2
    assert lazy.result() == 1


async def test_closing_finishes_what_was_asked(journal: Journal) -> None:
    calls = [asyncio.ensure_future(journal.transact(saying(str(n)), lazy=n % 2 == 0)) for n in range(700)]
    await asyncio.sleep(0)
    again = await reopened(journal)
    try:
        assert [call.result() for call in calls] == list(range(1, 701))
        assert len(await all_rows(again)) == 700
        with pytest.raises(Unavailable):
            await journal.transact(say)
        await journal.close()
    finally:
        await again.close()


async def test_who_gives_up_does_not_undo(journal: Journal) -> None:
    call = asyncio.ensure_future(journal.transact(saying("kept")))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert await journal.transact(saying("next")) == 2


async def test_who_gives_up_opening_leaves_nothing_open(tmp_path: Path) -> None:
    opening = asyncio.ensure_future(Journal.open(tmp_path / "worker.db", node=NODE))
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    async with asyncio.timeout(10):
        while any(thread.name == "journal" for thread in threading.enumerate()):
            await asyncio.sleep(0.01)
    assert [path.name for path in tmp_path.iterdir()] == ["worker.db"]


async def test_the_publisher_is_told_of_new_rows_only(journal: Journal) -> None:
    told: list[str] = []
    journal.on_outbox = lambda: told.append(threading.current_thread().name)
    await journal.transact(lambda tx: tx.put_meta("k", 1))
    await journal.read(lambda tx: tx.get_meta("k"))
    with pytest.raises(Oops):
        await journal.transact(failing(after=say))
    assert told == []
    await journal.transact(say)
    assert told == [threading.current_thread().name]


async def test_a_full_file_fails_the_group_and_works_again_with_space(journal: Journal) -> None:
    await journal.transact(saying("before"))
    pages = await journal.read(lambda tx: tx._connection.execute("PRAGMA page_count").fetchone()[0])
    await journal.read(lambda tx: tx._connection.execute(f"PRAGMA max_page_count = {pages + 2}").fetchone())
    big = b"x" * 200_000
    results = await asyncio.gather(
        journal.transact(saying("small")),
        journal.transact(lambda tx: tx.put_container("web-0", "I", big)),
        journal.transact(saying("small too")),
        return_exceptions=True,
    )
    assert any(isinstance(result, ResourceExhausted) for result in results)
    with pytest.raises(ResourceExhausted, match="the disk is full"):
        await journal.transact(lambda tx: (say(tx), tx.put_container("web-0", "I", big)))
    await journal.read(lambda tx: tx._connection.execute("PRAGMA max_page_count = 1000000").fetchone())
    await journal.transact(saying("after"))
    rows = await all_rows(journal)
    assert [row.seq for row in rows] == list(range(1, len(rows) + 1))
    answered = [result for result in results if isinstance(result, int)]
    assert len(rows) == 2 + len(answered)
    assert await journal.read(lambda tx: tx.container("web-0")) is None


async def test_a_transaction_that_is_gone_is_not_called_committed(journal: Journal) -> None:
    """SQLite may give one up by itself, and a function may have caught the error that told of it."""
    with pytest.raises(Internal, match="gave the transaction up"):
        await journal.transact(lambda tx: (say(tx), tx._connection.execute("ROLLBACK")))
    results = await asyncio.gather(
        journal.transact(say),
        journal.transact(lambda tx: tx._connection.execute("ROLLBACK")),
        return_exceptions=True,
    )
    assert all(isinstance(result, Internal) for result in results)
    assert (await journal.transact(say)).seq == 1


async def test_a_conflict_of_one_hurts_no_other(journal: Journal) -> None:
    results = await asyncio.gather(
        *(journal.transact(lambda tx: tx.accept(entry("same"))) for _ in range(3)),
        journal.transact(say),
        return_exceptions=True,
    )
    assert [type(result) for result in results[:3]] == [type(None), Conflict, Conflict]
    assert results[3].seq == 1  # type: ignore[union-attr]


Step = tuple[str, int]
transactions = st.lists(
    st.tuples(
        st.lists(
            st.tuples(st.sampled_from(["event", "put", "delete", "accept", "complete"]), st.integers(0, 4)),
            max_size=5,
        ),
        st.sampled_from(["commit", "fail", "lazy"]),
    ),
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(st.lists(transactions, max_size=4), st.booleans())
def test_random_transactions_leave_no_gap_and_no_half(groups: list[Any], reopen: bool) -> None:
    """Against a model that applies whole transactions, or nothing of them, in the order of the calls."""

    async def play(path: Path) -> None:
        journal = await Journal.open(path, node=NODE)
        events: list[str] = []
        containers: dict[str, bytes] = {}
        commands: dict[str, bool] = {}
        for number, group in enumerate(groups):
            calls = []
            for place, (steps, ending) in enumerate(group):
                label = f"{number}.{place}"
                model = (list(events), dict(containers), dict(commands))
                fails = not _apply_to_model(*model, steps, label) or ending == "fail"
                if not fails:
                    events, containers, commands = model
                calls.append((journal.transact(_steps(steps, label, ending), lazy=ending == "lazy"), fails))
            results = await asyncio.gather(*(call for call, _ in calls), return_exceptions=True)
            for result, (_, fails) in zip(results, calls, strict=True):
                assert isinstance(result, Exception) == fails, result
            if reopen:
                await journal.close()
                journal = await Journal.open(path, node=NODE)
        rows = await all_rows(journal)
        assert [row.seq for row in rows] == list(range(1, len(events) + 1))
        assert [decoded(row).command for row in rows] == events
        assert dict(await journal.read(lambda tx: tx.containers())) == containers
        accepted = await journal.read(lambda tx: tx.accepted_commands())
        assert {found.id for found in accepted} == {name for name, done in commands.items() if not done}
        await journal.close()

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(play(Path(folder) / "worker.db"))


def _apply_to_model(
    events: list[str], containers: dict[str, bytes], commands: dict[str, bool], steps: list[Step], label: str
) -> bool:
    """False when the transaction must fail."""
    for kind, number in steps:
        name = f"c-{number}"
        if kind == "event":
            events.append(f"{label} {number}")
        elif kind == "put":
            containers[name] = label.encode()
        elif kind == "delete":
            containers.pop(name, None)
        elif kind == "accept":
            if name in commands:
                return False
            commands[name] = False
        else:
            if commands.get(name, True):
                return False
            commands[name] = True
    return True


def _steps(steps: list[Step], label: str, ending: str) -> Callable[[Tx], None]:
    def function(tx: Tx) -> None:
        for kind, number in steps:
            name = f"c-{number}"
            if kind == "event":
                say(tx, f"{label} {number}")
            elif kind == "put":
                tx.put_container(name, "I", label.encode())
            elif kind == "delete":
                tx.delete_container(name)
            elif kind == "accept":
                tx.accept(entry(name))
            else:
                tx.complete(name, b"{}", START + timedelta(seconds=1))
        if ending == "fail":
            raise Oops("on purpose")

    return function


async def test_a_busy_loop_does_not_starve_the_thread(journal: Journal) -> None:
    """Short callbacks without end kept a transaction waiting for seconds before the loop gave way."""
    busy = True

    async def spin() -> None:
        while busy:
            sum(range(5000))
            await asyncio.sleep(0)

    spinning = asyncio.ensure_future(spin())
    try:
        async with asyncio.timeout(20):
            for _ in range(100):
                await journal.transact(say)
    finally:
        busy = False
        await spinning


async def test_the_loop_gives_way_to_urgent_work_only(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(journal._progress, "wait", waits.append)
    await asyncio.gather(*(journal.transact(lambda tx: tx.put_meta("k", 1), lazy=True) for _ in range(3)))
    assert waits == []
    release = threading.Event()
    reading = asyncio.ensure_future(journal.read(lambda tx: release.wait(10)))
    async with asyncio.timeout(10):
        while len(waits) < 3:
            await asyncio.sleep(0.001)
    release.set()
    await reading
