"""How far each stream is stored, kept over a restart: cursors in the journal, what is younger in SentLog."""

import asyncio
from collections.abc import Callable, Collection, Iterable
from typing import Protocol, TypeVar

from loguru import logger

from schemas.errors import ContractError
from worker.journal_rows import LogCursor
from worker.journal_tx import Tx
from worker.log_chunks import Position
from worker.log_sent import Flights, Key, SentLog
from worker.log_stream import LogStream

SAVE_EVERY_S = 1.0

T = TypeVar("T")


class CursorJournal(Protocol):
    async def transact(self, function: Callable[[Tx], T], /) -> T: ...
    async def read(self, function: Callable[[Tx], T], /) -> T: ...


class Cursors:
    """`streams` gives all streams that are shipped now."""

    def __init__(
        self, journal: CursorJournal, sent: SentLog, streams: Callable[[], Iterable[LogStream]]
    ) -> None:
        self._journal = journal
        self._sent = sent
        self._streams = streams
        self._loaded: dict[Key, LogCursor] = {}
        self._recovered: dict[Key, Flights] = {}
        self._forgotten: set[str] = set()
        self._to_save = asyncio.Event()
        self._failing = False

    async def load(self) -> None:
        self._loaded = await self._journal.read(lambda tx: tx.log_cursors())
        self._recovered = self._sent.open()

    def recall(self, stream: LogStream) -> None:
        """Give a stream what is known of it, once."""
        cursor = self._loaded.pop(stream.key, None)
        if cursor is not None:
            stream.saved = Position(cursor.offset, cursor.eof_run)
            stream.flights = Flights(stream.saved)
        recovered = self._recovered.pop(stream.key, None)
        if recovered is not None:
            recovered.advance(stream.saved)
            stream.flights = recovered

    def stored(self, stream: LogStream) -> int:
        """The offset up to which a stream is known to be stored, also before it was looked at."""
        found = [stream.flights.position.offset]
        cursor, recovered = self._loaded.get(stream.key), self._recovered.get(stream.key)
        if cursor is not None:
            found.append(cursor.offset)
        if recovered is not None:
            found.append(recovered.position.offset)
        return max(found)

    def moved(self, stream: LogStream) -> None:
        if stream.flights.position != stream.saved:
            self._to_save.set()

    def forget(self, instances: Iterable[str]) -> None:
        self._forgotten.update(instances)
        if self._forgotten:
            self._to_save.set()

    def forget_strangers(self, known: Collection[str]) -> None:
        """What is left of instances that are neither there nor in the spool is of no use."""
        self.forget({instance for instance, _ in self._loaded if instance not in known})
        self._loaded = {key: cursor for key, cursor in self._loaded.items() if key[0] in known}
        self._recovered = {key: flights for key, flights in self._recovered.items() if key[0] in known}

    async def keep_saving(self) -> None:
        """At most one transaction a second, and none while nothing moves."""
        while True:
            await self._to_save.wait()
            await asyncio.sleep(SAVE_EVERY_S)
            await self.save()

    async def save(self) -> None:
        self._to_save.clear()
        forgotten = frozenset(self._forgotten)
        moved = [
            (stream, stream.flights.position, stream.source.run)
            for stream in self._streams()
            if stream.located and stream.flights.position != stream.saved
        ]

        def write(tx: Tx) -> None:
            for instance in forgotten:
                tx.delete_log_cursors(instance)
            for stream, position, run in moved:
                cursor = LogCursor(offset=position.offset, run=run, eof_run=position.eof_run)
                tx.put_log_cursor(*stream.key, cursor)

        if moved or forgotten:
            try:
                await self._journal.transact(write)
            except ContractError as failure:
                if not self._failing:
                    logger.warning("the log cursors are not saved yet: {}", failure.message)
                self._failing = True
                self._to_save.set()
            else:
                self._failing = False
                self._forgotten -= forgotten
                for stream, position, _ in moved:
                    stream.saved = position
        self._compact()

    def _compact(self) -> None:
        """Keep beside the journal only what it does not have."""
        left = list(self._recovered.items())
        for stream in self._streams():
            flights = stream.flights
            if flights.waiting or flights.position != stream.saved or flights.position != flights.tail:
                left.append((stream.key, flights))
                self.moved(stream)
        self._sent.rewrite(left)
