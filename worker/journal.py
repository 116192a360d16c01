"""The node's memory: commands, containers, outgoing events, positions; one SQLite file, owned by one thread.

A state change and its event are one transaction. Whatever waits when the thread is free is committed
together (group commit): each function under a savepoint of its own, then one commit and one fsync for all,
then all the answers. An answer therefore means that the data is on the disk.
"""

import asyncio
import queue
import sqlite3
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from loguru import logger

from worker.clock import Clock, utc_now
from worker.errors import Configuration, ContractError, Internal, Unavailable
from worker.journal_check import LateCheck
from worker.journal_file import Opened, close_database, open_database, storage_failure
from worker.journal_outbox import MAX_EVENT_BYTES
from worker.journal_rows import (
    BootRecord,
    CommandState,
    EventHead,
    LedgerEntry,
    LogCursor,
    OutboxRow,
    OutboxState,
    StreamPosition,
)
from worker.journal_tx import Tx

__all__ = [
    "MAX_EVENT_BYTES",
    "BootRecord",
    "CommandState",
    "EventHead",
    "Journal",
    "LedgerEntry",
    "LogCursor",
    "OutboxRow",
    "OutboxState",
    "StreamPosition",
    "Tx",
]

MAX_GROUP = 256
LAZY_S = 1.0
SWITCH_S = 0.001
PATIENCE_S = 0.002
GIVE_WAY_S = 0.002
GIVE_WAY_IN_COMMIT_S = 0.0005
LONGEST_PATIENCE_S = 0.016
SLOW_COMMIT_S = 1.0
CHECK_BUDGET_S = 0.4
MAX_FRESH_BYTES = 1 << 20

T = TypeVar("T")


class _Work(NamedTuple):
    function: Callable[[Tx], Any]
    future: asyncio.Future[Any]
    writes: bool
    due: float  # monotonic; later than now: it may wait for company until then


class _Answer(NamedTuple):
    future: asyncio.Future[Any]
    value: Any
    failure: Exception | None


class _State(NamedTuple):
    """What a transaction changes in memory, to be put back when it is undone."""

    epoch: str
    last_seq: int


class Journal:
    """Open with `await Journal.open(…)`; use from the event loop that opened it."""

    def __init__(self, path: Path, node: str, clock: Clock) -> None:
        self.path = path
        self.node = node
        self.epoch = ""
        self.boot = ""
        self.on_outbox: Callable[[], None] | None = None
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._closed: asyncio.Future[None] | None = None
        self._urgent: set[asyncio.Future[Any]] = set()  # what is not answered yet
        self._given = 0  # by the owner thread
        self._answered = 0
        self._answered_before = 0
        self._watching = False
        self._patience_s = PATIENCE_S
        self._in_commit = False
        self._progress = threading.Event()
        self._fresh: deque[OutboxRow] = deque()
        self._fresh_bytes = 0
        self._damage: Configuration | None = None
        self._sound: asyncio.Future[None] = self._loop.create_future()
        self._sound.add_done_callback(
            lambda done: done.cancelled() or done.exception()
        )  # seen, if nobody waits
        self._late_check = LateCheck(path, self._found_damaged)

    @classmethod
    async def open(
        cls,
        path: Path,
        *,
        node: str,
        epoch: str | None = None,
        expected_epoch: str | None = None,
        takeover: bool = False,
        clock: Clock = utc_now,
        check_budget_s: float = CHECK_BUDGET_S,
    ) -> "Journal":
        """Open the file, or make it where there is none.

        `epoch` is for the new file (default: one is made). `expected_epoch` is what node.json remembers: a
        journal that is missing or of another epoch is refused unless `takeover`, which begins a new epoch.
        Configuration when the file is foreign, damaged, newer, another node's, or cannot be written.
        """
        # A step of the owner thread waits this long for the interpreter lock while a callback computes.
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_S))
        journal = cls(path, node, clock)
        opened: asyncio.Future[Opened] = journal._loop.create_future()

        def run() -> None:
            try:
                found = open_database(
                    path,
                    node=node,
                    epoch=epoch,
                    expected_epoch=expected_epoch,
                    takeover=takeover,
                    clock=clock,
                    check_budget_s=check_budget_s,
                )
            except Exception as failure:
                journal._answer([_Answer(opened, None, failure)], None)
                return
            if not found.checked:
                journal._late_check.start()
            journal._answer([_Answer(opened, found, None)], None)
            _Owner(journal, found).run()

        threading.Thread(target=run, name="journal", daemon=True).start()
        opened.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, if nobody waits
        try:
            found = await asyncio.shield(opened)
        except asyncio.CancelledError:
            journal._queue.put(None)
            raise
        journal.epoch, journal.boot = found.epoch, found.boot
        return journal

    async def transact(self, function: Callable[[Tx], T], *, lazy: bool = False) -> T:
        """Run `function` in the owner thread, in the order of the calls, and return once it is committed.

        What it raises undoes it alone and comes back here. ResourceExhausted when the disk does not take it:
        nothing of it happened, and the journal works again when the disk does. Giving up the wait does not
        undo it. `lazy` lets it wait up to a second for a commit that others need anyway: for what may be late.
        """
        due = time.monotonic() + LAZY_S if lazy else 0.0
        return await self._submit(function, writes=True, due=due)

    async def read(self, function: Callable[[Tx], T]) -> T:
        """Run `function` in the owner thread on what is committed; it must not write."""
        return await self._submit(function, writes=False, due=0.0)

    async def sound(self) -> None:
        """Wait until the file is found to be damaged, then raise Configuration; return when the journal is closed.

        Nothing is written to a damaged file any more, nor is it marked as closed.
        """
        await asyncio.shield(self._sound)

    def take_fresh(self, after_seq: int) -> list[OutboxRow]:
        """Events just committed, if they begin right after `after_seq`: it saves reading them from the file.

        They are given once. An empty list says nothing: what there is stands in the file.
        """
        while self._fresh and self._fresh[0].seq <= after_seq:
            self._fresh.popleft()
        rows = list(self._fresh) if self._fresh and self._fresh[0].seq == after_seq + 1 else []
        self._fresh.clear()
        self._fresh_bytes = 0
        return rows

    async def close(self) -> None:
        """Finish what was asked for, mark the file as closed, and end the thread."""
        if self._closed is None:
            self._closed = self._loop.create_future()
            self._queue.put(None)
        await asyncio.shield(self._closed)
        if not self._sound.done():
            self._sound.set_result(None)

    async def _submit(self, function: Callable[[Tx], T], *, writes: bool, due: float) -> T:
        if self._closed is not None:
            raise Unavailable("the journal is closed")
        future: asyncio.Future[T] = self._loop.create_future()
        if due == 0.0:
            self._urgent.add(future)
            self._watch_over()
        self._queue.put(_Work(function, future, writes, due))
        return await future

    def _found_damaged(self, damage: Configuration) -> None:
        """From the owner thread, or from the one that checks."""
        if self._damage is None:
            self._damage = damage
            with suppress(RuntimeError):  # the loop is gone
                self._loop.call_soon_threadsafe(self._tell_unsound, damage)

    def _tell_unsound(self, damage: Configuration) -> None:
        if not self._sound.done():
            self._sound.set_exception(damage)

    def _watch_over(self) -> None:
        if not self._watching:
            self._watching = True
            self._answered_before = self._answered
            self._loop.call_later(self._patience_s, self._give_way)

    def _give_way(self) -> None:
        """Let the owner thread have the interpreter lock when it seems to get none of it.

        A loop that is busy with short callbacks gives the lock back and takes it again before another thread
        has woken up: measured, a transaction then waited for up to 4 s. So the loop stands still until the
        thread has come to its commit or to its answer, 2 ms at most, and less often when the disk is slow.
        """
        self._watching = False
        on_their_way = self._given != self._answered
        if not self._urgent or on_their_way or self._answered != self._answered_before:
            self._patience_s = PATIENCE_S
        else:
            self._progress.clear()
            self._progress.wait(GIVE_WAY_IN_COMMIT_S if self._in_commit else GIVE_WAY_S)
            self._patience_s = min(self._patience_s * 2, LONGEST_PATIENCE_S)
        if self._urgent:
            self._watch_over()

    def _answer(
        self, answers: list[_Answer], done: _State | None, fresh: list[OutboxRow] | None = None
    ) -> bool:
        """From the owner thread: give answers to the loop in one step. False when the loop is gone.

        `fresh` are the committed events, None when none were made or changed.
        """
        self._given += 1
        self._progress.set()
        try:
            self._loop.call_soon_threadsafe(self._resolve, answers, done, fresh)
        except RuntimeError:
            return False
        return True

    def _resolve(self, answers: list[_Answer], done: _State | None, fresh: list[OutboxRow] | None) -> None:
        if done is not None:
            if done.epoch != self.epoch:
                self._fresh.clear()
            self.epoch = done.epoch
        if fresh is not None:
            self._keep_fresh(fresh)
        self._answered += 1
        for future, value, failure in answers:
            self._urgent.discard(future)
            if future.done():
                continue
            if failure is None:
                future.set_result(value)
            else:
                future.set_exception(failure)
        # After the answers: what they set going, such as a program's start, comes before its publication.
        if fresh is not None and self.on_outbox is not None:
            self.on_outbox()

    def _keep_fresh(self, rows: list[OutboxRow]) -> None:
        """Bounded: while nobody takes them, they are in the file all the same."""
        self._fresh.extend(rows)
        self._fresh_bytes += sum(len(row.payload) for row in rows)
        if self._fresh_bytes > MAX_FRESH_BYTES:
            self._fresh.clear()
            self._fresh_bytes = 0


class _Owner:
    """The thread's side."""

    def __init__(self, journal: Journal, opened: Opened) -> None:
        self._journal = journal
        self._queue = journal._queue
        self._connection = opened.connection
        self._tx = Tx(
            opened.connection,
            node=journal.node,
            epoch=opened.epoch,
            boot=opened.boot,
            last_seq=opened.last_seq,
            clock=journal._clock,
        )
        self._opened_whole = opened.checked
        self._held: list[_Work] = []
        self._ending = False

    def run(self) -> None:
        listened_to = True
        while listened_to and not self._ending:
            reads, writes = self._next_group()
            if reads:
                listened_to = self._journal._answer([self._run(work) for work in reads], None)
            if writes:
                before = self._state()
                self._tx.fresh = []
                answers = self._commit(writes)
                after = self._state()
                # Another epoch has renumbered what was not sent: that is for the file to tell.
                made = self._tx.fresh if after.epoch == before.epoch else []
                listened_to = self._journal._answer(answers, after, made if after != before else None)
        if not self._opened_whole:
            self._journal._late_check.stop()
        close_database(self._connection, clean=listened_to and self._journal._damage is None)
        if listened_to and self._journal._closed is not None:
            self._journal._answer([_Answer(self._journal._closed, None, None)], None)

    def _next_group(self) -> tuple[list[_Work], list[_Work]]:
        """The reads and the writes that wait, in order. Lazy writes alone stay until the first is due."""
        group, self._held = self._held, []
        hurry = False
        while len(group) < MAX_GROUP:
            wait_s = max(0.0, group[0].due - time.monotonic()) if group else None
            try:
                work = self._queue.get(not hurry, wait_s)
            except queue.Empty:
                break
            if work is None:
                self._ending = True
                break
            group.append(work)
            hurry = hurry or work.due == 0.0
        reads = [work for work in group if not work.writes]
        writes = [work for work in group if work.writes]
        now = time.monotonic()
        if not self._ending and all(work.due > now for work in writes):
            self._held, writes = writes, []
        return reads, writes

    def _commit(self, group: list[_Work]) -> list[_Answer]:
        """Run a group in one transaction. All of it fails when the disk does."""
        if self._journal._damage is not None:
            return [_Answer(work.future, None, self._journal._damage) for work in group]
        before = self._state()
        self._tx._writable = True
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            answers = self._run_all(group)
            if all(answer.failure is not None for answer in answers):
                self._undo(before)
            elif self._connection.in_transaction:
                self._flush_and_commit(before)
            else:
                raise Internal("SQLite gave the transaction up")
            return answers
        except Exception as failure:
            self._undo(before)
            known = self._storage_failure(failure)
            if known is None:
                logger.opt(exception=failure).error("a group of transactions failed")
                known = Internal(f"the journal failed: {failure!r}")
            else:
                logger.error("{}", known.message)
            return [_Answer(work.future, None, known) for work in group]
        finally:
            self._tx._writable = False

    def _run_all(self, group: list[_Work]) -> list[_Answer]:
        if len(group) == 1:
            # A transaction alone needs no savepoint: undoing it undoes everything.
            return [self._run(group[0])]
        answers = []
        for work in group:
            before = self._state()
            self._connection.execute("SAVEPOINT one")
            answer = self._run(work)
            if answer.failure is not None:
                self._connection.execute("ROLLBACK TO one")
                self._restore(before)
            self._connection.execute("RELEASE one")
            answers.append(answer)
        return answers

    def _run(self, work: _Work) -> _Answer:
        """One function. A failure of the disk in a writer is raised: it concerns the whole group."""
        try:
            return _Answer(work.future, work.function(self._tx), None)
        except sqlite3.Error as failure:
            known = self._storage_failure(failure)
            if known is None:
                return _Answer(work.future, None, failure)
            if work.writes:
                raise
            return _Answer(work.future, None, known)
        except Exception as failure:
            return _Answer(work.future, None, failure)

    def _storage_failure(self, failure: Exception) -> ContractError | None:
        known = storage_failure(failure, self._journal.path)
        if isinstance(known, Configuration):
            self._journal._found_damaged(known)
        return known

    def _flush_and_commit(self, before: _State) -> None:
        if self._state() != before:
            self._connection.execute(
                "UPDATE boots SET last_seq = ? WHERE epoch = ? AND boot = ?",
                (self._tx.last_seq, self._tx.epoch, self._tx.boot),
            )
        started = time.monotonic()
        self._journal._in_commit = True
        self._journal._progress.set()
        try:
            self._connection.execute("COMMIT")
        finally:
            self._journal._in_commit = False
        took = time.monotonic() - started
        if took > SLOW_COMMIT_S:
            logger.warning("the disk took {:.1f} s for a commit of the journal", took)

    def _undo(self, before: _State) -> None:
        # SQLite itself undoes the transaction after some failures of the disk.
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")
        self._restore(before)

    def _state(self) -> _State:
        return _State(self._tx.epoch, self._tx.last_seq)

    def _restore(self, state: _State) -> None:
        self._tx.epoch, self._tx.last_seq = state
        self._tx.fresh = [row for row in self._tx.fresh if row.seq <= state.last_seq]
