"""The way to the log and stats streams before there is a connection: whoever sends waits for it."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Protocol

import msgspec

from schemas.events import ImageProgress
from schemas.status import Stats
from schemas.subjects import Subjects
from worker.images.flight import PullProgress
from worker.log_chunks import StoredChunk

_encode = msgspec.json.Encoder().encode


class Publisher(Protocol):
    async def publish(self, subject: str, data: bytes, headers: dict[str, str]) -> object: ...
    async def last(self, subject: str) -> StoredChunk | None: ...
    async def publish_stats(self, subject: str, data: bytes) -> bool: ...


class LateSink:
    """Passes on to the real publisher once it is there, chunks in the order of the calls. Samples of before then are
    dropped.
    """

    def __init__(self) -> None:
        self._there: asyncio.Future[Publisher] = asyncio.get_running_loop().create_future()
        self._waiting: deque[asyncio.Future[None]] = deque()

    def open(self, publisher: Publisher) -> None:
        self._there.set_result(publisher)
        self._wake()

    async def publish(self, subject: str, data: bytes, headers: dict[str, str]) -> object:
        if self._waiting or not self._there.done():
            await self._turn()
        return await self._there.result().publish(subject, data, headers)

    async def last(self, subject: str) -> StoredChunk | None:
        publisher = await asyncio.shield(self._there)
        return await publisher.last(subject)

    async def _turn(self) -> None:
        """Wait behind those who wait already; each lets in the next, so that nobody who comes new overtakes."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        finally:
            self._waiting.remove(turn)
            self._wake()

    def _wake(self) -> None:
        if self._there.done() and self._waiting and not self._waiting[0].done():
            self._waiting[0].set_result(None)

    def publish_progress_of(self, subjects: Subjects, node: str) -> Callable[[PullProgress], Awaitable[None]]:
        """Progress of pulls, for whoever listens now."""
        subject = subjects.progress(node)

        async def publish(progress: PullProgress) -> None:
            if self._there.done():
                event = ImageProgress(
                    node=node,
                    time=datetime.now(UTC),
                    image=progress.image,
                    layers=len(progress.layers),
                    bytes_done=sum(layer.bytes_done for layer in progress.layers),
                    bytes_total=sum(layer.bytes_total for layer in progress.layers) or None,
                    phase=progress.phase,
                    by_layer=progress.layers,
                )
                await self._there.result().publish_stats(subject, _encode(event))

        return publish

    def publish_stats_of(self, subjects: Subjects) -> Callable[[Stats], Awaitable[None]]:
        async def publish(stats: Stats) -> None:
            if self._there.done():
                subject = subjects.stat(stats.node, stats.container)
                await self._there.result().publish_stats(subject, _encode(stats))

        return publish
