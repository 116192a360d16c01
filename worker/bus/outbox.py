"""The outbox on its way into the event stream: exactly once, in order, without a gap (decisions 3 and 3a).

Each batch says which message of this node it expects to be the newest, so a batch that was stored although
its answer was lost, or a second worker under the same name, is refused and looked into (`recovery`). Events
carry no message id.

`batches` has the form in which they are written. Rows stay in the journal for 10 minutes after their
acknowledgement, and after a reconnect until they were seen again: an acknowledgement is no fsync.
"""

import asyncio
import random
from collections import deque
from datetime import timedelta

import msgspec
from loguru import logger

from schemas.subjects import Subjects
from worker.bus.batches import EventWriter
from worker.bus.connection import Bus
from worker.bus.facts import Facts, Looker, head_of
from worker.bus.failures import JetStreamError, NoAnswer, NotConnected
from worker.bus.jetstream import StreamNames
from worker.bus.patience import Patience
from worker.bus.recovery import GoOn, IsFenced, Shown, Stream, position_at
from worker.clock import Clock, utc_now
from worker.errors import ContractError, Fenced, ResourceExhausted, Unavailable
from worker.journal import Journal, OutboxRow, StreamPosition, Tx

READ_EVENTS = 1000
READ_BYTES = 4 * 1024 * 1024
KEEP = timedelta(minutes=10)
EXPIRE_EVERY_S = 60.0
PATIENCE_S = 2.0  # for one answer: a leader that steps down takes what it was asked with it
LONGEST_PATIENCE_S = 20.0
RETRY_S = 0.02
LONGEST_RETRY_S = 2.0
REPORT_EVERY_S = 30.0


class OutboxPublisher:
    """`await fence(takeover)` at boot, before anything is published; then `run()` until cancelled.

    It takes over `journal.on_outbox`. `idle` is set while nothing is left to send. `lost` is set when the
    stream was found to have lost some of this node's events, sent again or not; whoever heeds it clears it.
    """

    def __init__(self, bus: Bus, journal: Journal, subjects: Subjects, *, clock: Clock = utc_now) -> None:
        self.stream = StreamNames(bus.cfg.stream_prefix).events
        self.idle = asyncio.Event()
        self.sent_seq = 0  # the newest event of this epoch known to be in the stream
        self.lost = asyncio.Event()
        self.writer = EventWriter(bus, subjects.events_of(journal.node))
        self._bus = bus
        self._journal = journal
        self._clock = clock
        self._expected = 0
        self._created = ""
        self._verified = -1  # the session of the connection in which the stream was looked at
        self._claimed = False
        self._taken_from: str | None = None  # the epoch that ours follows, until an event of ours is stored
        self._patience = Patience(PATIENCE_S, LONGEST_PATIENCE_S)
        self._work = asyncio.Event()
        self._rows: deque[OutboxRow] = deque()
        self._progress = asyncio.Condition()
        self._position: StreamPosition | None = None  # newer than the journal's by what is being recorded
        self._position_known = False
        self._ack: StreamPosition | None = None  # to be recorded
        self._ack_added = asyncio.Event()
        self._told = float("-inf")
        self._looker = Looker(
            bus,
            journal,
            stream=self.stream,
            pattern=subjects.events_of(journal.node),
            position=lambda: (self._position_known, self._position),
        )
        journal.on_outbox = self.wake

    def wake(self) -> None:
        """There are new events. From the event loop."""
        self.idle.clear()
        self._work.set()

    # -- at boot and whenever asked

    async def fence(self, takeover: bool = False) -> bool:
        """Fenced when another worker has published under this name, unless `takeover`, which begins a new
        epoch.

        True when it did: the data directory must be told. Waits for a stream that does not answer yet.
        """
        facts = await self._facts_at_last()
        decision = facts.decide()
        if isinstance(decision, GoOn):
            await self._apply(facts, decision)
            return False
        if not takeover or facts.shown is None:
            raise Fenced(f"{decision.why}; stop the other one, or start this one with --takeover")
        logger.warning("taking over the name {}: {}", self._journal.node, decision.why)
        await self._take_over(facts, facts.shown)
        return True

    async def _take_over(self, facts: Facts, shown: Shown) -> None:
        base = await self._journal.transact(lambda tx: _begin_epoch(tx, self.stream, facts.stream, shown))
        self._taken_from = shown.epoch
        facts = msgspec.structs.replace(facts, epoch=self._journal.epoch, position=base)
        await self._apply(facts, GoOn(sent=0, expected=shown.stream_seq))

    async def check_fence(self) -> None:
        """Fenced when another worker has published under this name meanwhile; Unavailable when unknown."""
        facts = await self._looker.facts(self._patience.seconds)
        decision = facts.decide()
        if isinstance(decision, IsFenced):
            raise Fenced(decision.why)

    async def claim(self) -> None:
        """Return once what this boot has written is in the stream, however long that takes.

        `fence` alone lets two copies of one journal pass while neither has published: each stands on the other's
        past. Of their first own events the stream takes one and refuses the other.
        """
        await self._sent_all()
        async with self._progress:
            self._claimed = True
            self._progress.notify_all()

    @property
    def owns(self) -> bool:
        """Whether the name is known to be this worker's, in this very connection: behind one that was cut, another
        may have taken it.
        """
        return self._claimed and self._verified == self._bus.session

    async def owned(self, timeout_s: float) -> None:
        """Return once `owns` holds. Unavailable when it does not in time."""
        try:
            async with asyncio.timeout(timeout_s), self._progress:
                await self._progress.wait_for(lambda: self.owns)
        except TimeoutError:
            raise Unavailable("this worker does not know yet whether it still has its node's name") from None

    async def drained(self, timeout_s: float) -> bool:
        """Wait until all events made before the call are in the stream. False when they are not in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._sent_all()
        except TimeoutError:
            return False
        return True

    async def _sent_all(self) -> None:
        state = await self._journal.read(lambda tx: tx.outbox_state())
        async with self._progress:
            await self._progress.wait_for(lambda: self.sent_seq >= state.last_seq)

    # -- the work

    async def run(self) -> None:
        """Send until cancelled. Raises Fenced when another worker publishes under this name."""
        unlisten = self._bus.listen(lambda connected: self._work.set())
        recorder = asyncio.create_task(self._record_acks(), name="outbox acks")
        try:
            await self._run()
        finally:
            unlisten()
            recorder.cancel()
            await asyncio.gather(recorder, return_exceptions=True)
            try:
                await self._record_ack()
            except ContractError as failure:
                logger.debug("the last acknowledgement was not recorded: {}", failure.message)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        expire_at = loop.time() + EXPIRE_EVERY_S
        failures = 0
        while True:
            try:
                await self._bus.wait_connected()
                if self._verified != self._bus.session:
                    await self._recover()
                if loop.time() >= expire_at:
                    expire_at = loop.time() + EXPIRE_EVERY_S
                    await self._expire()
                self._work.clear()
                if not self._rows and not await self._read_rows():
                    if not self._work.is_set():
                        self.idle.set()
                    await self._wait_for_work(expire_at)
                    continue
                await self._send()
                failures = 0
            except Unavailable as failure:
                failures += 1
                await self._after(failure, failures)
            except ResourceExhausted as failure:
                # The journal's disk is full, or the server takes smaller messages than before.
                failures += 1
                self._tell(failure)
                await asyncio.sleep(LONGEST_RETRY_S)

    async def _after(self, failure: Unavailable, failures: int) -> None:
        """What a failed send or look calls for."""
        if isinstance(failure, JetStreamError) and failure.err_code == JetStreamError.ATOMIC_DISABLED:
            logger.warning("the stream {} has no atomic batches: events go one by one", self.stream)
            self.writer.atomic = False
            return
        self._lose_patience(failure)
        unstored = isinstance(failure, JetStreamError) and failure.err_code in (
            JetStreamError.ATOMIC_INCOMPLETE,
            JetStreamError.ATOMIC_TOO_MANY,
        )
        if not unstored:
            self._verified = -1  # look before the next one
        refused = isinstance(failure, JetStreamError) and failure.refused_sequence
        if refused and failures == 1:
            return
        if not isinstance(failure, NotConnected) and failures > 3:
            self._tell(failure)
        pause = min(RETRY_S * 2 ** min(failures, 10), LONGEST_RETRY_S)
        await asyncio.sleep(pause * random.uniform(0.3, 1.0))

    def _lose_patience(self, failure: Unavailable) -> None:
        if isinstance(failure, NoAnswer):
            self._patience.silent(self._patience.seconds)

    async def _wait_for_work(self, until: float) -> None:
        try:
            async with asyncio.timeout_at(until):
                await self._work.wait()
        except TimeoutError:
            return

    async def _read_rows(self) -> bool:
        after = self.sent_seq
        self._rows.extend(
            self._journal.take_fresh(after)
            or await self._journal.read(lambda tx: tx.outbox(after, READ_EVENTS, READ_BYTES))
        )
        return bool(self._rows)

    async def _send(self) -> None:
        rows = self.writer.choose(self._rows)
        loop = asyncio.get_running_loop()
        began = loop.time()
        ack = await self.writer.write(rows, expected=self._expected, patience_s=self._patience.seconds)
        self._patience.answered(loop.time() - began)
        self._taken_from = None
        for _ in rows:
            self._rows.popleft()
        head = head_of(rows[-1].payload)
        self._position = self._ack = StreamPosition(
            created=self._created,
            last_seq=ack.seq,
            last_event_seq=head.seq,
            last_epoch=head.epoch,
            last_boot=head.boot,
        )
        self._ack_added.set()
        self._expected = ack.seq
        await self._advance(head.seq)

    async def _advance(self, seq: int) -> None:
        async with self._progress:
            self.sent_seq = seq
            self._progress.notify_all()

    # -- what the stream shows

    async def _recover(self) -> None:
        """Look where the stream stands and go on from there. Fenced, Unavailable."""
        facts = await self._looker.facts(self._patience.seconds)
        decision = facts.decide()
        if isinstance(decision, IsFenced):
            shown = facts.shown
            if shown is None or shown.epoch != self._taken_from:
                raise Fenced(decision.why)
            # It has added to its epoch before it could notice that the name is taken: go on behind that.
            decision = GoOn(sent=0, expected=shown.stream_seq, position=position_at(facts.stream, shown))
        await self._apply(facts, decision)

    async def _facts_at_last(self) -> Facts:
        failures = 0
        while True:
            try:
                return await self._looker.facts(self._patience.seconds)
            except Unavailable as failure:
                self._lose_patience(failure)
                failures += 1
                if failures > 3:
                    self._tell(failure)
            pause = min(RETRY_S * 2 ** min(failures, 10), LONGEST_RETRY_S)
            await asyncio.sleep(pause * random.uniform(0.3, 1.0))
            await self._bus.wait_connected()

    async def _apply(self, facts: Facts, decision: GoOn) -> None:
        if decision.why:
            logger.info("events go on after {}: {}", decision.sent, decision.why)

        def write(tx: Tx) -> None:
            if decision.resend:
                tx.outbox_resend(decision.sent + 1)
            tx.outbox_acked(decision.sent, self._clock())
            if decision.position is not None:
                tx.put_position(self.stream, decision.position)

        if decision.resend or decision.position not in (None, facts.position):
            await self._journal.transact(write)
        self._position = decision.position or facts.position
        self._position_known = True
        self._rows.clear()
        self._created = facts.stream.created
        self._expected = decision.expected
        self._verified = self._bus.session
        if decision.lost:
            self.lost.set()
        await self._advance(decision.sent)
        self._work.set()

    # -- the journal's side

    async def _record_acks(self) -> None:
        while True:
            await self._ack_added.wait()
            try:
                await self._record_ack(lazy=True)
            except ContractError as failure:
                # Harmless: it is found again in the stream.
                logger.warning("an acknowledgement was not recorded: {}", failure.message)
                await asyncio.sleep(LONGEST_RETRY_S)

    async def _record_ack(self, *, lazy: bool = False) -> None:
        position, self._ack = self._ack, None
        self._ack_added.clear()
        if position is None:
            return

        def write(tx: Tx) -> None:
            if position.last_epoch == tx.epoch:
                tx.outbox_acked(position.last_event_seq, self._clock())
                tx.put_position(self.stream, position)

        await self._journal.transact(write, lazy=lazy)

    async def _expire(self) -> None:
        """Forget what was acknowledged 10 minutes ago, once the stream was seen to have it still."""
        before = self._clock() - KEEP
        state = await self._journal.read(lambda tx: tx.outbox_state())
        if state.first_seq > state.acked_seq:
            return
        rows = await self._journal.read(lambda tx: tx.outbox(state.first_seq - 1, 1, 1))
        if not rows or rows[0].acked_at is None or rows[0].acked_at >= before:
            return
        await self._recover()
        while await self._journal.transact(lambda tx: tx.outbox_expire(before)):
            self._work.set()  # what came meanwhile is sent after this

    def _tell(self, failure: ContractError) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._told >= REPORT_EVERY_S:
            self._told = now
            logger.warning("events wait for the stream {}: {}; trying again", self.stream, failure.message)


def _begin_epoch(tx: Tx, name: str, stream: Stream, shown: Shown) -> StreamPosition:
    """A new epoch above the shown one's, which stands on the other worker's last message."""
    # A copy of this journal may have sent what is unsent here: it would be there twice.
    copied = shown.epoch == tx.epoch
    try:
        tx.new_epoch(shown.epoch or None, carry_unsent=not copied)
    except ValueError:
        tx.new_epoch(None, carry_unsent=not copied)
    position = position_at(stream, shown)
    tx.put_position(name, position)
    return position
