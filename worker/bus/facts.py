"""What the stream shows of this node's events, beside what the journal remembers: the facts of a decision."""

import asyncio
from collections.abc import Callable

import msgspec

from worker.bus.connection import Bus
from worker.bus.failures import NotConnected
from worker.bus.recovery import Decision, IsFenced, Shown, Stream, decide, may_be_stale, needs_deleted
from worker.errors import Configuration
from worker.journal import Journal, StreamPosition, Tx

STALE_LOOKS = 8
STALE_PAUSE_S = 0.25
DELETED_TIMEOUT_S = 15.0


class Head(msgspec.Struct, frozen=True):
    """Which event it is. An empty `epoch`: none."""

    epoch: str
    boot: str
    seq: int


head_of = msgspec.json.Decoder(Head).decode


class Facts(msgspec.Struct, frozen=True):
    """What a decision is made from."""

    epoch: str
    position: StreamPosition | None
    stream: Stream
    shown: Shown | None

    def decide(self) -> Decision:
        return decide(epoch=self.epoch, position=self.position, stream=self.stream, shown=self.shown)

    def may_be_stale(self) -> bool:
        stale = may_be_stale(position=self.position, stream=self.stream, shown=self.shown)
        return stale and isinstance(self.decide(), IsFenced)


class Looker:
    """Asks for the facts. `position` gives what is newer than the journal's by what is being recorded: (whether it is,
    it).
    """

    def __init__(
        self,
        bus: Bus,
        journal: Journal,
        *,
        stream: str,
        pattern: str,
        position: Callable[[], tuple[bool, StreamPosition | None]],
    ) -> None:
        self._bus = bus
        self._journal = journal
        self._stream = stream
        self._pattern = pattern
        self._position = position

    async def facts(self, patience_s: float) -> Facts:
        """What can be believed: a replica that lags behind is asked again."""
        facts = await self._look(patience_s)
        for _ in range(STALE_LOOKS):
            if not facts.may_be_stale():
                break
            await asyncio.sleep(STALE_PAUSE_S)
            facts = await self._look(patience_s)
        return facts

    async def _look(self, patience_s: float) -> Facts:
        """Of one connection: the stream first, so that what is shown is not older than it."""
        session = self._bus.session
        js = self._bus.js
        info = await js.stream_info(self._stream, timeout=patience_s)
        if not info.config.get("allow_direct"):
            raise Configuration(f"the stream {self._stream} does not allow direct get, which a worker needs")
        stream = Stream(info.created, info.first_seq, info.last_seq, info.num_deleted)
        message = await js.last_message(self._stream, self._pattern, timeout=patience_s)
        head: Head | None = None
        if message is not None:
            try:
                head = head_of(message.data)
            except (msgspec.DecodeError, UnicodeDecodeError):
                head = Head(epoch="", boot="", seq=0)

        def look(tx: Tx) -> tuple[str, StreamPosition | None, bool, bool]:
            ours = head is not None and tx.owns(head.epoch, head.boot, head.seq)
            former = head is not None and tx.owned(head.epoch, head.boot, head.seq)
            return tx.epoch, tx.position(self._stream), ours, former

        epoch, position, ours, former = await self._journal.read(look)
        newer, ours_is = self._position()
        if newer:
            position = ours_is
        shown = None
        if message is not None and head is not None:
            shown = Shown(message.stream_seq, head.epoch, head.boot, head.seq, ours, former)
        if needs_deleted(epoch=epoch, position=position, stream=stream, shown=shown):
            info = await js.stream_info(self._stream, deleted=True, timeout=DELETED_TIMEOUT_S)
            stream = Stream(info.created, info.first_seq, info.last_seq, info.num_deleted, info.deleted)
        if session != self._bus.session:
            raise NotConnected("the connection changed while the stream was looked at")
        return Facts(epoch, position, stream, shown)
