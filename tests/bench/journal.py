"""The journal over a million events: how large the file gets with its log, and how fast they go through."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from schemas.events import CommandAccepted
from worker.journal import Journal, LedgerEntry, Tx

Row = Callable[[str, float | None, str, str, bool | None], dict[str, Any]]

EVENTS, KEPT = 1_000_000, 40_000
MOST_BYTES = 96 << 20
GROUP = 200  # events in a transaction, as many as go out in one batch
TEXT = "x" * 300  # about what a status takes


class _Clock:
    def __init__(self) -> None:
        self.now = datetime(2026, 11, 24, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


async def churn(path: Path, *, events: int, kept: int) -> list[int]:
    """Events that are acknowledged and expire when `kept` newer ones are there, each with a command that is completed
    and pruned as they are. Gives the size of all files of the journal along the way, 40 times.
    """
    clock = _Clock()
    journal = await Journal.open(path, node="n1", clock=clock)
    sizes: list[int] = []
    age = timedelta(seconds=kept // GROUP)
    try:
        for number in range(events // GROUP):
            clock.now += timedelta(seconds=1)
            await journal.transact(lambda tx, number=number: _write(tx, number))  # type: ignore[misc]
            await journal.transact(lambda tx: tx.outbox_acked(tx.last_seq, clock.now))
            if number % 5 == 0:
                while await journal.transact(lambda tx: tx.outbox_expire(clock.now - age)) == 500:
                    pass
                while (
                    await journal.transact(
                        lambda tx: tx.prune_commands(clock.now - age, settled=tx.last_seq, limit=1000)
                    )
                    == 1000
                ):
                    pass
            if number % max(1, events // GROUP // 40) == 0:
                sizes.append(size_of(path))
    finally:
        await journal.close()
    return sizes


def _write(tx: Tx, number: int) -> None:
    for place in range(GROUP):
        event = tx.event(
            "sandfleet.v1.evt.n1.web-0.command",
            lambda head: CommandAccepted(**head.fields(), command="x", actor=TEXT),
        )
        command_id = f"c{number}-{place}"
        tx.accept(
            LedgerEntry(
                id=command_id,
                verb="kill",
                container=f"web-{place}",
                digest="d" * 64,
                subject="sandfleet.v1.cmd.n1.web-0.kill",
                stream_seq=event.seq,
                stream_time=event.time,
                body=b"{}",
            )
        )
        tx.complete(command_id, TEXT.encode(), event.time)
        tx.put_container("web-0", "I", TEXT.encode())


def size_of(path: Path) -> int:
    """Bytes of the file, its log and the log's index."""
    files = (path, path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm"))
    return sum(os.stat(file).st_size for file in files if file.exists())


async def measure(fleet: object, row: Row) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        sizes = await churn(Path(folder) / "worker.db", events=EVENTS, kept=KEPT)
        took = time.perf_counter() - began
    settled = max(sizes[len(sizes) // 4 :])
    steady = settled <= max(sizes[: len(sizes) // 2]) * 1.1
    return [
        row(
            f"{EVENTS:,} events and commands through the journal, {KEPT:,} kept: its files at most",
            max(sizes) / 1e6,
            "MB",
            f"below {MOST_BYTES / 1e6:.0f} MB, and no more at the end than before",
            max(sizes) < MOST_BYTES and steady,
        ),
        row("  events with a command each", EVENTS / took, "/s", "", None),
    ]
