"""Capture files to log chunks in the stream: the shipper.

A few workers take streams from one queue by turns, make one chunk each and send it; so a backlog neither
starves the others nor fills the memory, and nothing runs for a stream that is silent. A stream gets into the
queue when the launcher tells of output (`notify`), when its 100 ms are over, or when a chunk of it was stored
and more is waiting.

The journal gets the cursors at most once a second, for all streams together. Where a new worker goes on, and
why nothing is sent twice or left out, stands in `log_chunks`.
"""

import asyncio
import random
import resource
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from loguru import logger

from schemas.errors import ContractError
from schemas.subjects import Subjects
from worker.capture_files import STREAMS, capture_files, captured_end, write_incomplete_eof
from worker.errors import Internal, ResourceExhausted, is_out_of_space
from worker.log_chunks import Chunk, StoredChunk
from worker.log_cursors import CursorJournal, Cursors
from worker.log_queue import StreamQueue
from worker.log_sent import SentLog
from worker.log_spool import Spool, SpoolMeta
from worker.log_stream import LogSource, LogStream

__all__ = ["ChunkSink", "CursorJournal", "LogShipper", "write_incomplete_eof"]

WORKERS = 96  # each holds a chunk of 256 KiB at most
MAX_OPEN = 4096
DOUBT_S = 1.0
DOUBTS = 3
RETRY_S, LONGEST_RETRY_S = 0.25, 5.0
REPORT_EVERY_S = 30.0
CATCH_UP_POLL_S = 0.02
SENT_LOG = "sent.log"


class ChunkSink(Protocol):
    """Where chunks go. `publish` returns once the chunk is stored."""

    def publish(self, subject: str, data: bytes, headers: dict[str, str]) -> Coroutine[Any, Any, object]: ...
    def last(self, subject: str) -> Coroutine[Any, Any, StoredChunk | None]: ...


class Backlog(NamedTuple):
    """Of both streams of an instance, in bytes; lost ones since the worker's start."""

    cid: str
    instance: str
    lag: int
    lost: int


class LogShipper:
    """Ships the output of all containers of the node. All calls from the loop in which `run` runs."""

    def __init__(
        self,
        *,
        sink: ChunkSink,
        journal: CursorJournal,
        subjects: Subjects,
        node: str,
        spool_dir: Path,
        ack_output: Callable[[str, str, int], object],
    ) -> None:
        self._sink = sink
        self._subjects = subjects
        self._node = node
        self._spool = Spool(spool_dir)
        self._ack_output = ack_output
        self._sent = SentLog(spool_dir / SENT_LOG)
        self._queue = StreamQueue()
        self._sources: dict[str, LogSource] = {}
        self._by_cid: dict[str, list[LogSource]] = {}
        self._cursors = Cursors(journal, self._sent, self._streams)
        self._loaded = self._adopted = False
        self._reported = float("-inf")
        self._lost_before = 0  # bytes of sources that are finished
        self._max_open = _open_limit()
        self._open: OrderedDict[LogStream, None] = OrderedDict()

    async def run(self) -> None:
        """Ship until cancelled; what is under way then is settled by the next worker."""
        await self._cursors.load()
        self._loaded = True
        self._drop_strangers()
        try:
            async with asyncio.TaskGroup() as tasks:
                for number in range(WORKERS):
                    tasks.create_task(self._work(), name=f"log worker {number}")
                tasks.create_task(self._cursors.keep_saving(), name="log cursors")
        finally:
            self._queue.close()
            await self._cursors.save()
            self._sent.close()
            for source in self._sources.values():
                self._close_files(source)

    # -- what there is to ship

    def attach(self, cid: str, instance: str, state_dir: Path, run: int) -> None:
        """Ship what is and will be captured in `state_dir`; `run` is begun next, or was begun last.

        To be called before each start, and at boot for every container that was ever started. Idempotent.
        """
        self._spool.take_back(instance, state_dir)
        source = self._sources.get(instance)
        if source is None:
            for older in [found for found in self._by_cid.get(cid, ()) if not found.closing]:
                logger.error(
                    "the log of {} ({}) was not taken over when it was replaced", cid, older.instance
                )
                self._finish(older)
            source = self._add(cid, instance, state_dir, run)
        source.run = max(source.run, run)
        source.closing = False
        source.move_to(state_dir)
        for stream in source.streams.values():
            stream.told = -1
            stream.exhausted = False
        self._look(source)

    def notify(self, items: Iterable[tuple[str, str, int]]) -> None:
        """The launcher's notices: (cid, stream, end offset)."""
        now = asyncio.get_running_loop().time()
        for cid, name, end in items:
            sources = self._by_cid.get(cid)
            if sources:
                stream = sources[-1].streams[name]
                self._queue.put_later(stream, stream.delay_after_notice(end, now))

    def ended(self, instance: str) -> None:
        """A run has ended: its ends are marked in the files, which the launcher does not tell separately."""
        source = self._sources.get(instance)
        if source is not None:
            self._look(source)

    async def drained(self, cid: str, instance: str, run: int, timeout: float) -> bool:
        """Wait until the ends of `run` are stored on both streams. False at the timeout."""
        source = self._sources.get(instance)
        if source is None:
            return True
        waits: list[asyncio.Future[None]] = []
        for stream in source.streams.values():
            if stream.located and stream.flights.position.eof_run >= run:
                continue
            waits.append(asyncio.get_running_loop().create_future())
            stream.waiters.append((run, waits[-1]))
        self._look(source)
        try:
            async with asyncio.timeout(timeout):
                for wait in waits:
                    await wait
        except TimeoutError:
            return False
        finally:
            for stream in source.streams.values():
                stream.waiters = [waiter for waiter in stream.waiters if waiter[1] not in waits]
        return True

    async def spool(self, cid: str, instance: str, state_dir: Path) -> None:
        """The container is removed: take over its capture files, send what is unsent, then delete them.

        Returns when `state_dir` may be deleted. Internal when the files cannot be moved, ResourceExhausted when the
        disk is full.
        """
        source = self._sources.get(instance)
        if source is None:
            if not capture_files(state_dir):
                return
            source = self._add(cid, instance, state_dir, 1)
        if self._all_sent(source):
            self._finish(source)
            return
        try:
            folder = self._spool.put(SpoolMeta(cid=cid, instance=instance, run=source.run), state_dir)
        except OSError as failure:
            kind = ResourceExhausted if is_out_of_space(failure.errno) else Internal
            raise kind(f"the log of {cid} cannot be moved from {state_dir}: {failure.strerror}") from failure
        source.move_to(folder)
        source.closing = True
        self._look(source)

    def resume_spool(self) -> int:
        """Go on with what removed containers left unsent. To be called when all containers were attached."""
        found = 0
        for meta in self._spool.entries():
            if meta.instance not in self._sources:
                source = self._add(
                    meta.cid, meta.instance, self._spool.folder(meta.instance), meta.run, old=True
                )
                source.closing = True
                self._look(source)
                found += 1
        self._adopted = True
        self._drop_strangers()
        return found

    # -- seen from outside

    def backlog(self) -> list[Backlog]:
        """Of every instance, in no order."""
        return [
            Backlog(
                source.cid,
                source.instance,
                sum(self._lag(stream) for stream in source.streams.values()),
                sum(stream.lost_bytes for stream in source.streams.values()),
            )
            for source in self._sources.values()
        ]

    def _lag(self, stream: LogStream) -> int:
        """Only where some is known the disk is asked for the rest."""
        stored = self._cursors.stored(stream)
        return stream.end_in_files() - stored if stream.end > stored else 0

    @property
    def lost_bytes(self) -> int:
        """Of all instances, also of those that are gone."""
        return self._lost_before + sum(stream.lost_bytes for stream in self._streams())

    async def caught_up(self) -> None:
        """Wait until all that is captured by now is stored."""
        for source in list(self._sources.values()):
            self._look(source)
        behind = [(stream, stream.end_in_files()) for stream in self._streams()]
        while True:
            behind = [
                (stream, end)
                for stream, end in behind
                if stream.source.instance in self._sources and self._cursors.stored(stream) < end
            ]
            if not behind:
                return
            await asyncio.sleep(CATCH_UP_POLL_S)

    # -- sources

    def _streams(self) -> Iterator[LogStream]:
        for source in self._sources.values():
            yield from source.streams.values()

    def _add(self, cid: str, instance: str, folder: Path, run: int, *, old: bool = False) -> LogSource:
        """Instances of one container go one after the other: a subject's newest message is of the newest."""
        subjects = {name: self._subjects.log(self._node, cid, name) for name in STREAMS}
        source = LogSource(cid, instance, folder, run, subjects)
        for stream in source.streams.values():
            stream.captured = captured_end(folder, stream.name)
        self._sources[instance] = source
        line = self._by_cid.setdefault(cid, [])
        at = sum(other.closing and other.instance < instance for other in line) if old else len(line)
        line.insert(at, source)
        for place, other in enumerate(line):
            other.blocked = place > 0
        return source

    def _look(self, source: LogSource) -> None:
        for stream in source.streams.values():
            stream.look_thoroughly()
            self._queue.put(stream)

    def _all_sent(self, source: LogSource) -> bool:
        streams = source.streams.values()
        if any(stream.unsettled or (stream.queued and not stream.located) for stream in streams):
            return False
        if not capture_files(source.folder):
            return True
        return all(stream.located and stream.reader.span(1) is None for stream in streams)

    def _finish(self, source: LogSource) -> None:
        """All of it is stored, and nothing more comes."""
        try:
            self._spool.drop(source.instance)
        except OSError as failure:
            logger.warning("the sent log of {} cannot be deleted: {}", source.cid, failure)
        self._close_files(source)
        self._lost_before += sum(stream.lost_bytes for stream in source.streams.values())
        del self._sources[source.instance]
        line = self._by_cid[source.cid]
        line.remove(source)
        self._cursors.forget([source.instance])
        for stream in source.streams.values():
            for _, waiter in stream.waiters:
                if not waiter.done():
                    waiter.set_result(None)
        if not line:
            del self._by_cid[source.cid]
        elif line[0].blocked:
            line[0].blocked = False
            self._look(line[0])

    def _close_files(self, source: LogSource) -> None:
        for stream in source.streams.values():
            stream.reader.close()
            self._open.pop(stream, None)

    def _drop_strangers(self) -> None:
        if self._loaded and self._adopted:
            self._cursors.forget_strangers(self._sources.keys())

    # -- sending

    async def _work(self) -> None:
        while True:
            stream = await self._queue.take()
            if self._sources.get(stream.source.instance) is stream.source:
                await self._turn(stream)

    async def _turn(self, stream: LogStream) -> None:
        """One chunk of one stream, if one is due."""
        loop = asyncio.get_running_loop()
        try:
            if not stream.located and not await self._locate(stream):
                return
            if stream.full or stream.source.blocked:
                stream.waits_for_ack = stream.full
                return
            chunk, look_s = stream.next(loop.time())
        except (ContractError, OSError) as failure:
            stream.queued = False
            self._look_after_failure(stream, failure)
            return
        finally:
            stream.queued = False
        stream.failures = 0
        self._remember_open(stream)
        if chunk is not None:
            now_us = time.time_ns() // 1000
            if stream.flights.send(chunk.cut, now_us):
                self._sent.sent(stream.key, chunk.cut, now_us)
        if look_s is not None:
            self._queue.put_later(stream, look_s)
        else:
            self._tell_launcher(stream)
        if chunk is not None:
            await self._publish(stream, chunk)
            self._stored(stream, chunk)
        elif look_s is None and stream.source.closing:
            stream.exhausted = True
            self._finish_if_done(stream.source)

    async def _publish(self, stream: LogStream, chunk: Chunk) -> None:
        pause = RETRY_S
        while True:
            try:
                await self._sink.publish(stream.subject, chunk.data, chunk.headers)
                return
            except ContractError as failure:
                self._report(stream, failure)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, LONGEST_RETRY_S)

    def _stored(self, stream: LogStream, chunk: Chunk) -> None:
        stream.flights.ack(chunk.cut)
        self._sent.acked(stream.key, chunk.cut)
        self._position_changed(stream)
        if stream.waits_for_ack:
            stream.waits_for_ack = False
            self._queue.put(stream)
        if stream.source.closing:
            self._finish_if_done(stream.source)

    def _position_changed(self, stream: LogStream) -> None:
        self._cursors.moved(stream)
        position = stream.flights.position
        for run, waiter in stream.waiters:
            if position.eof_run >= run and not waiter.done():
                waiter.set_result(None)

    def _finish_if_done(self, source: LogSource) -> None:
        if source.instance in self._sources and all(
            s.exhausted and not s.unsettled for s in source.streams.values()
        ):
            self._finish(source)

    def _tell_launcher(self, stream: LogStream) -> None:
        offset = stream.reader.offset
        if stream.reader.began and offset != stream.told and not stream.source.closing:
            stream.told = offset
            self._ack_output(stream.source.cid, stream.name, offset)

    def _look_after_failure(self, stream: LogStream, failure: ContractError | OSError) -> None:
        self._report(stream, failure)
        pause = min(RETRY_S * 2 ** min(stream.failures, 10), LONGEST_RETRY_S)
        stream.failures += 1
        stream.reader.close()
        stream.look_thoroughly()
        self._queue.put_later(stream, pause * random.uniform(0.5, 1.0))

    def _report(self, stream: LogStream, failure: ContractError | OSError) -> None:
        """What hinders one stream is likely to hinder all: told now and then."""
        now = time.monotonic()
        if now - self._reported > REPORT_EVERY_S:
            self._reported = now
            logger.warning("the log {} of {} waits: {}", stream.name, stream.source.cid, failure)

    def _remember_open(self, stream: LogStream) -> None:
        """Keep the files of the streams that were used last open, and no more than that."""
        self._open[stream] = None
        self._open.move_to_end(stream)
        if len(self._open) > self._max_open:
            self._open.popitem(last=False)[0].reader.close()

    # -- where to go on

    async def _locate(self, stream: LogStream) -> bool:
        """Find where to go on, asking the stream only if there is something to send. False: not known yet."""
        self._cursors.recall(stream)
        acked = stream.flights.position
        if stream.nothing_new(acked):
            stream.located = True
        else:
            newest = await self._sink.last(stream.subject)
            sure = stream.doubts >= DOUBTS
            if not stream.locate(acked, newest, time.time_ns() // 1000, sure=sure):
                stream.doubts += 1
                stream.queued = False
                self._queue.put_later(stream, DOUBT_S)
                return False
            if stream.flights.position < acked:
                logger.warning(
                    "the stream lost {} bytes of {} that it had; sending them again",
                    acked.offset - stream.flights.position.offset,
                    stream.subject,
                )
        self._position_changed(stream)
        return True


def _open_limit() -> int:
    """How many streams may keep their two files open: a quarter of the descriptors at most."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_OPEN if soft == resource.RLIM_INFINITY else max(1, min(MAX_OPEN, soft // 8))
