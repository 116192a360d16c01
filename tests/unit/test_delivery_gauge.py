"""What waits on its way out, measured on a real journal; also when that is long or hangs."""

import asyncio
import threading
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest_asyncio

from schemas.node import LogBacklog
from tests.unit.journal_help import NODE, Clock, saying
from worker.delivery_gauge import DeliveryGauge, unsent, worst
from worker.journal import Journal, Tx
from worker.logs import Backlog


class Logs:
    def __init__(self, *backlog: Backlog, gone: int = 0) -> None:
        self._backlog = list(backlog)
        self.lost_bytes = gone + sum(one.lost for one in backlog)

    def backlog(self) -> list[Backlog]:
        return self._backlog


@pytest_asyncio.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    made = await Journal.open(tmp_path / "worker.db", node=NODE, clock=Clock())
    yield made
    await made.close()


def gauge(journal: Journal, sent: int, logs: Any = None, **more: Any) -> DeliveryGauge:
    return DeliveryGauge(
        journal,
        logs or Logs(),
        bus=SimpleNamespace(session=3),
        outbox=SimpleNamespace(sent_seq=sent),
        consumer=SimpleNamespace(redelivered=7),
        **more,
    )


async def test_nothing_waits(journal: Journal) -> None:
    await journal.transact(saying("a"))
    info = await gauge(journal, 1).measure()
    assert (info.outbox_events, info.oldest_event_age_s) == (0, None)
    assert (info.log_lag_bytes, info.log_lost_bytes, info.logs, info.logs_omitted) == (0, 0, [], 0)
    assert (info.commands_redelivered, info.reconnects) == (7, 2)


async def test_the_oldest_unsent_event_is_the_one_behind_the_last_sent(journal: Journal) -> None:
    for text in "abcd":
        await journal.transact(saying(text))
    rows = await journal.read(lambda tx: tx.outbox(2, 1, 1))
    count, oldest = await journal.read(lambda tx: unsent(tx, 2))
    assert count == 2
    assert oldest is not None
    assert oldest.isoformat().replace("+00:00", "Z").encode() in rows[0].payload
    later = oldest + timedelta(seconds=90)
    info = await gauge(journal, 2, clock=lambda: later).measure()
    assert (info.outbox_events, info.oldest_event_age_s) == (2, 90.0)


async def test_a_clock_that_went_back_gives_no_negative_age(journal: Journal) -> None:
    await journal.transact(saying("a"))
    _, oldest = await journal.read(lambda tx: unsent(tx, 0))
    assert oldest is not None
    earlier = oldest - timedelta(hours=1)
    assert (await gauge(journal, 0, clock=lambda: earlier).measure()).oldest_event_age_s == 0.0


async def test_a_long_outbox_is_not_gone_through(journal: Journal) -> None:
    """SQLite counts the steps of its machine: a few dozen, however much waits."""

    def fill(tx: Tx) -> None:
        for number in range(5000):
            saying(f"{number}")(tx)

    def steps(tx: Tx) -> int:
        count = 0

        def step() -> None:
            nonlocal count
            count += 1

        tx._connection.set_progress_handler(step, 1)
        try:
            unsent(tx, 10)
        finally:
            tx._connection.set_progress_handler(None, 0)
        return count

    await journal.transact(fill)
    assert await journal.read(lambda tx: unsent(tx, 10)[0]) == 4990
    assert await journal.read(steps) < 200


async def test_a_journal_that_hangs_does_not_hide_the_rest(journal: Journal) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def hang(tx: Tx) -> None:
        inside.set()
        go_on.wait(30)

    hanging = asyncio.create_task(journal.read(hang))
    try:
        while not inside.is_set():
            await asyncio.sleep(0.001)
        logs = Logs(Backlog("web-0", "I", 5, 1))
        info = await gauge(journal, 0, logs, patience_s=0.01).measure()
    finally:
        go_on.set()
        await hanging
    assert (info.outbox_events, info.oldest_event_age_s) == (None, None)
    assert info.log_lag_bytes == 5


async def test_a_journal_that_is_closed_does_not_either(tmp_path: Path) -> None:
    journal = await Journal.open(tmp_path / "closed.db", node=NODE)
    await journal.close()
    assert (await gauge(journal, 0).measure()).outbox_events is None


async def test_sums_are_of_all_and_the_list_is_of_the_worst(journal: Journal) -> None:
    backlog = [Backlog(f"c-{number}", "I", number, 0) for number in range(1500)]
    info = await gauge(journal, 0, Logs(*backlog, gone=11)).measure()
    assert info.log_lag_bytes == sum(range(1500))
    assert info.log_lost_bytes == 11
    assert len(info.logs) == 1000
    assert info.logs_omitted == 499
    assert info.logs[0] == LogBacklog(container="c-1499", instance="I", lag_bytes=1499, lost_bytes=0)


def test_the_order_of_the_worst() -> None:
    found = worst([Backlog("a-0", "I", 0, 5), Backlog("b-0", "I", 0, 0), Backlog("c-0", "I", 9, 0)], 10)
    assert [one.container for one in found] == ["c-0", "a-0"]
