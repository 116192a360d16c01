"""One actor per container: its commands in stream order, and what may overtake them.

A command waits in `_queue` until the one before it (`_current`) is done. `stop`, `kill` and `remove` do not
always wait:

- `stop` and `remove` overtake a create that is still working, `stop`, `kill` and `remove` a start. The
  overtaken command winds up by itself, ends in `conflict`, and the overtaker follows.
- While a stop waits for the processes to end, a `kill` signals at once, a `stop` or `remove` hastens it.
- Starts that wait in front of an overtaker end in `conflict` too.

State changes go through `transition`, under one lock, and are told only after the journal's commit.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, Protocol

from loguru import logger

from schemas.commands import Kill, Remove
from schemas.errors import ContractError
from schemas.events import CommandAccepted
from schemas.status import ContainerStatus, State
from worker.admission import admit
from worker.errors import Conflict, NotFound, ResourceExhausted, unforeseen
from worker.journal import EventHead, Tx
from worker.lifecycle import Trigger, Verdict, next_state
from worker.records import ContainerRecord, encode_record
from worker.services import Services
from worker.supervisor import ExitRecord
from worker.waiting import Waiting
from worker.work import OVERTAKERS, STARTS, Phase, Work, now_utc, write_completion, write_state

JOURNAL_RETRY_S = 1.0


class Operations(Protocol):
    """What the verbs do (`worker.operations`)."""

    def first_step(self, actor: "ContainerActor", work: Work) -> "Begin | None":
        """The first change of a verb that `check` lets through, for the accepting transaction."""

    async def perform(self, actor: "ContainerActor", work: Work) -> dict[str, Any] | None:
        """Do the verb; give the completion's `result`. Raises ContractError."""

    async def hasten(self, actor: "ContainerActor", work: Work) -> None:
        """Make the stop that is waiting end as soon as `work` wants it."""


@dataclass(slots=True)
class Begin:
    """What an idle actor adds to the transaction that accepts a command: the first step of doing it.

    `done` when it is also the last, `answers` when it is nothing but the answer and changes no state.
    """

    write: Callable[[Tx], None]
    record: ContainerRecord | None
    done: bool
    answers: bool = False


class ContainerActor:
    """Owner of one container name."""

    def __init__(
        self,
        cid: str,
        services: Services,
        *,
        operations: Operations,
        spawn: Callable[[Coroutine[Any, Any, None], str], object],
        waiting: Waiting,
        on_idle: Callable[["ContainerActor"], None] = lambda actor: None,
        record: ContainerRecord | None = None,
    ) -> None:
        self.cid = cid
        self.services = services
        self.record = record
        self.early_exit: ExitRecord | None = None
        self.told_at: datetime | None = None
        self._operations = operations
        self._spawn = spawn
        self._on_idle = on_idle
        self._queue: deque[Work] = deque()
        self._waiting = waiting
        self._current: Work | None = None
        self._arriving: set[Work] = set()  # on their way into the journal, in stream order
        self._first: Begin | None = None  # of them the one whose first step is, too
        self._lock = asyncio.Lock()
        self._changed = asyncio.Event()

    # -- what others may ask

    @property
    def state(self) -> State | None:
        return None if self.record is None else self.record.status.state

    @property
    def status(self) -> ContainerStatus:
        if self.record is None:
            raise NotFound(f"there is no container {self.cid}", field="container")
        return self.record.status

    @property
    def idle(self) -> bool:
        return self._current is None and not self._queue and not self._arriving

    @property
    def wanted(self) -> bool:
        """Whether a command waits for the one that is being done."""
        return bool(self._queue)

    def refusal(self, work: Work) -> str | None:
        """Why `work`, before it is reserved for, is to be refused at once though accepted: so much waits already."""
        return None if self.idle else self._waiting.refusal(work)

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds; it is asked again after every change of this container."""
        while not condition():
            await self._changed.wait()

    def notify(self) -> None:
        """Wake whoever waits for a change."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    # -- commands

    def reserve(self, work: Work) -> Begin | None:
        """Keep the place of `work` in the order of the stream; an idle actor also gives the first step of it, to be
        committed with its acceptance.

        None when the actor is busy, or when the command has no first step that stands alone. It ends in
        `accepted` or `release`; until then nothing that came later is begun, and nothing else changes the state.
        """
        first: Begin | None = None
        if self.idle and not self._lock.locked():
            first = self._first_step(work)
            if first is not None and first.answers:
                return first  # nobody has to wait for it
            self._current, self._first = work, first
        self._arriving.add(work)
        self._waiting.add(work)
        return first

    def release(self, work: Work) -> None:
        """The command was not accepted after all."""
        self._arrived(work)
        if self._current is work:
            self._current = self._first = None
            self._pump()
        self.notify()

    def accepted(self, work: Work, begin: Begin | None) -> None:
        """The command stands in the journal; do it in its turn."""
        self._arrived(work)
        if begin is not None and begin.answers:
            work.completed = True
            self._finished(work)
            return
        if self._current is not work:
            self._enqueue(work)
            return
        self._first = None
        if begin is not None:
            self._adopt(begin.record)
        if begin is not None and begin.done:
            work.completed = True
            self._finished(work)
        else:
            self._spawn(self._run(work, begun=begin is not None), f"{work.verb} {self.cid}")

    def _arrived(self, work: Work) -> None:
        if work in self._arriving:
            self._arriving.remove(work)
            self._waiting.remove(work)

    def _enqueue(self, work: Work) -> None:
        later = next((w for w in self._in_hand() if work.precedes(w)), None)
        if later is not None:
            self.drop(work, later.verb)
            return
        self._queue.append(work)
        self._waiting.add(work)
        self._pump()
        self.notify()

    def _dequeue(self, work: Work) -> None:
        self._queue.remove(work)
        self._waiting.remove(work)

    def _in_hand(self) -> list[Work]:
        return [w for w in (self._current, *self._queue) if w is not None]

    def _pump(self) -> None:
        if self._current is None:
            if self._queue:
                work = self._queue[0]
                self._dequeue(work)
                self._current = work
                self._spawn(self._run(work, begun=False), f"{work.verb} {self.cid}")
            return
        for work in list(self._queue):
            if work.verb in OVERTAKERS and self._overtakes(work, self._current):
                break

    def _overtakes(self, work: Work, current: Work) -> bool:
        """Let `work` overtake what is being done, where the contract says so. True when it did."""
        if (
            current.phase is Phase.CREATING and work.verb in {"stop", "remove"}
        ) or current.phase is Phase.STARTING:
            if current.overtaken_by is None:
                current.overtake(work)
        elif current.phase is Phase.STOPPING:
            if isinstance(work.command, Kill) or (
                isinstance(work.command, Remove) and not work.command.force
            ):
                self._dequeue(work)
                self._spawn(self._run(work, begun=False, aside=True), f"{work.verb} {self.cid}")
            elif not work.overtook:
                work.overtook = True
                if current.verb == "restart":
                    current.overtake(work)
                self._spawn(self._operations.hasten(self, work), f"hasten {self.cid}")
        else:
            return False
        self._drop_starts_before(work)
        return True

    def _drop_starts_before(self, work: Work) -> None:
        for waiting in list(self._queue):
            if waiting is work:
                return
            if waiting.verb in STARTS and waiting.seq < work.seq:
                self._dequeue(waiting)
                self.drop(waiting, work.verb)

    def set_phase(self, work: Work, phase: Phase) -> None:
        """Say how far `work` is; whoever may overtake it now does."""
        work.phase = phase
        if self._current is work:
            self._pump()

    async def _run(self, work: Work, *, begun: bool, aside: bool = False) -> None:
        error: ContractError | None = None
        result: dict[str, Any] | None = None
        try:
            if not begun:
                self.check(work)
            result = await self._operations.perform(self, work)
        except ContractError as failure:
            error = failure
        except Exception as failure:
            logger.exception("{} of {} failed", work.verb, self.cid)
            error = unforeseen(work.verb, failure)
        if not work.completed:
            await self._complete(work, error, result)
        if not aside:
            self._finished(work)

    def _finished(self, work: Work) -> None:
        if self._current is work:
            self._current = None
        self.notify()
        self._pump()
        if self.idle:
            self._on_idle(self)

    def drop(self, work: Work, later: str) -> None:
        """End a command that was not begun: a later one, of that verb, has overtaken it."""
        error = Conflict(f"overtaken by a later {later}")
        self._spawn(self._complete(work, error, None), f"end {work.verb} {self.cid}")

    async def _complete(self, work: Work, error: ContractError | None, result: dict[str, Any] | None) -> None:
        """Write the completion. A journal that cannot write now is asked again: the promise is one answer."""
        while not work.completed:
            async with self._changing():
                status = None if self.record is None else self.record.status
                write = partial(
                    write_completion,
                    subjects=self.services.subjects,
                    work=work,
                    error=error,
                    status=status,
                    result=result,
                )
                try:
                    await self.services.journal.transact(write)
                    work.completed = True
                except ResourceExhausted as failure:
                    logger.error("the completion of {} waits: {}", work.id, failure.message)
            if not work.completed:
                await asyncio.sleep(JOURNAL_RETRY_S)

    # -- checks before anything is done

    def check(self, work: Work) -> Verdict:
        """Deadline, instance and verb table. Raises the error the command ends in."""
        return admit(work, self.cid, self.record, now_utc(), leaving=self._is_leaving)

    def _is_leaving(self) -> bool:
        """Some of the directory is gone: a remove was begun."""
        record = self.record
        rootfs = self.services.data.container(self.cid).rootfs
        return record is not None and record.ready and not rootfs.exists()

    def _first_step(self, work: Work) -> Begin | None:
        services = self.services
        try:
            found = self.check(work)
            begin = self._operations.first_step(self, work) if found is Verdict.DO else None
        except ContractError as failure:
            error = failure  # the name `failure` ends with the except block
            status = None if self.record is None else self.record.status
            return Begin(
                write=lambda tx: write_completion(tx, services.subjects, work, error=error, status=status),
                record=self.record,
                done=True,
                answers=True,
            )
        if begin is not None:
            return begin
        if found is Verdict.OK:
            status = None if self.record is None else self.record.status
            return Begin(
                write=lambda tx: write_completion(tx, services.subjects, work, error=None, status=status),
                record=self.record,
                done=True,
                answers=True,
            )
        return None

    # -- state

    @asynccontextmanager
    async def _changing(self) -> AsyncIterator[None]:
        """The right to change the state: one at a time, and after a first step that is on its way."""
        async with self._lock:
            while self._first is not None:
                await self._changed.wait()
            yield

    def _adopt(self, record: ContainerRecord | None) -> None:
        self.record = None if record is None or record.status.state is State.REMOVED else record
        self.told_at = now_utc()
        self.services.on_record(self.cid, self.record)
        self.notify()

    async def transition(
        self,
        trigger: Trigger,
        change: Callable[[ContainerRecord], ContainerRecord],
        *,
        work: Work | None = None,
        only_if: Callable[[ContainerRecord], bool] | None = None,
        finish: bool = False,
        result: dict[str, Any] | None = None,
        error: ContractError | None = None,
    ) -> bool:
        """Move the container on: record, event and, with `finish`, the command's completion in one commit.

        `change` gives the new record but for the state, which `lifecycle` decides. False when `only_if` did
        not hold any more. Raises Conflict when the table has no such step.
        """
        async with self._changing():
            record = self.record
            if record is None or (only_if is not None and not only_if(record)):
                return False
            before = record.status.state
            after = change(record).with_status(state=next_state(before, trigger))

            def write(tx: Tx) -> None:
                write_state(tx, self.services.subjects, before, after, work)
                if finish and work is not None:
                    write_completion(
                        tx, self.services.subjects, work, error=error, status=after.status, result=result
                    )

            await self.services.journal.transact(write)
            if finish and work is not None:
                work.completed = True
            self._adopt(after)
            return True

    async def update(
        self,
        change: Callable[[ContainerRecord], ContainerRecord],
        *,
        work: Work | None = None,
        finish: bool = False,
        result: dict[str, Any] | None = None,
        repeat: bool = False,
        tell: bool = True,
    ) -> None:
        """Change the record without changing the state; `tell` publishes the status again."""
        async with self._changing():
            if self.record is None:
                return
            before = self.record.status.state
            after = change(self.record)

            def write(tx: Tx) -> None:
                if tell:
                    write_state(tx, self.services.subjects, before, after, work, repeat=repeat)
                else:
                    put_record(tx, after)
                if finish and work is not None:
                    write_completion(
                        tx, self.services.subjects, work, error=None, status=after.status, result=result
                    )

            await self.services.journal.transact(write)
            if finish and work is not None:
                work.completed = True
            self._adopt(after)

    async def appear(self, record: ContainerRecord, work: Work | None) -> None:
        """A new instance takes the name (state `pending`)."""
        async with self._changing():
            next_state(self.state, Trigger.CREATE)
            await self.services.journal.transact(
                lambda tx: write_state(tx, self.services.subjects, None, record, work)
            )
            self._adopt(record)


def put_record(tx: Tx, record: ContainerRecord) -> None:
    tx.put_container(record.status.container, record.status.instance, encode_record(record))


def write_accepted(tx: Tx, services: Services, work: Work) -> None:
    """Write the `command_accepted` of a command, with the instance that has its name in this very transaction."""
    instance = None if work.container is None else tx.instance(work.container)

    def make(head: EventHead) -> CommandAccepted:
        return CommandAccepted(
            node=head.node,
            epoch=head.epoch,
            boot=head.boot,
            seq=head.seq,
            time=head.time,
            container=work.container,
            instance=instance,
            command_id=work.id,
            command=work.verb,
            actor=work.command.actor,
        )

    tx.event(services.subjects.command_event(tx.node, work.container), make, headers=work.headers)
