"""Long answers in pieces: a container's files (`export`), images as an archive (`save`).

A session is a stream that is made while it is fetched, on this node alone: nothing of it is on the disk, and what
was sent is kept only until its arrival is told. A client asks for pieces by their place, several at a time, and
for one again whose answer was lost. Sessions that nobody asks of end by themselves, as does every one with the
worker; what has arrived by then is of no use, since files change.
"""

import asyncio
import hashlib
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

from loguru import logger

from schemas.queries import PIECE_BYTES, ExportRequest, PieceReply, SaveRequest
from worker.errors import (
    Conflict,
    Internal,
    InvalidCommand,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from worker.images.registry.stopping import CalledOff, StopSignal
from worker.images.unpack_model import Notes
from worker.platform.descent import open_directory
from worker.platform.xattrs import system_xattrs
from worker.runtime import Runtime
from worker.services import Services

MAX_SESSIONS = 8
# So many pieces may be on their way; a client that tells of no arrival gets no more.
WINDOW = 16
IDLE_S = 60.0
# How long a request waits for a stream that is still being prepared.
PATIENCE_S = 2.0

# Opens what the stream is made of and gives the stream; what it enters is left when the session ends.
Opener = Callable[[ExitStack, StopSignal, Notes], Iterator[bytes]]


class TooFast(ResourceExhausted):
    """More is asked for than may be on its way."""


class Downloads:
    """The sessions of one node. `close` ends them all."""

    def __init__(self, services: Services, runtime: Runtime, *, idle_s: float = IDLE_S) -> None:
        self._services = services
        self._runtime = runtime
        self._idle_s = idle_s
        self._sessions: dict[str, _Session] = {}

    async def close(self) -> None:
        for session in list(self._sessions.values()):
            await self._end(session)

    async def export(self, request: ExportRequest) -> PieceReply:
        actor = self._runtime.known(request.container)
        record = actor.record
        if record is None:
            raise NotFound(f"there is no container {request.container}", field="container")
        instance = record.status.instance
        rootfs = self._services.data.container(request.container).rootfs

        def opener(stack: ExitStack, stop: StopSignal, notes: Notes) -> Iterator[bytes]:
            try:
                top = open_directory(rootfs)
            except OSError as failure:
                raise Conflict(f"{request.container} has no files yet: {failure.strerror}") from failure
            stack.callback(os.close, top)
            from worker.images.export_tree import tree_pieces  # in its thread, by the first one

            return tree_pieces(top, system_xattrs(), notes)

        return await self._piece(request, f"{request.container} {instance}", opener)

    async def save(self, request: SaveRequest) -> PieceReply:
        transfers = self._services.transfers

        def opener(stack: ExitStack, stop: StopSignal, notes: Notes) -> Iterator[bytes]:
            from worker.images.archive_write import archive_pieces  # in its thread, by the first one

            return archive_pieces(stack.enter_context(transfers.opened(request.images, stop)))

        return await self._piece(request, "images " + "\n".join(request.images), opener)

    async def _piece(self, request: ExportRequest | SaveRequest, subject: str, opener: Opener) -> PieceReply:
        if request.offset % PIECE_BYTES and request.offset != request.acked:
            raise InvalidCommand(f"must be a multiple of {PIECE_BYTES}", field="offset")
        session = self._sessions.get(request.session)
        if session is None:
            if request.offset:
                raise NotFound("this session has ended; begin a new one", field="session")
            session = self._begin(request.session, subject, opener)
        elif session.subject != subject:
            await self._end(session)
            raise Conflict("what this session was for is not there any more, or it is for something else")
        session.rest()
        try:
            reply = await session.piece(request.offset, request.acked)
        except (InvalidCommand, TooFast):
            raise  # this request was wrong, or came late; the stream goes on
        except BaseException:
            await self._end(session)
            raise
        if session.is_over:
            await self._end(session)
        return reply

    def _begin(self, name: str, subject: str, opener: Opener) -> "_Session":
        if len(self._sessions) >= MAX_SESSIONS:
            raise ResourceExhausted(f"{MAX_SESSIONS} downloads are under way on this node")
        session = _Session(name, subject, opener, self._services, self._idle_s, self._expire)
        self._sessions[name] = session
        return session

    def _expire(self, session: "_Session") -> None:
        logger.info("the download {} was left alone and has ended", session.name)
        self._runtime.spawn(self._end(session), "end download")

    async def _end(self, session: "_Session") -> None:
        if self._sessions.get(session.name) is session:
            del self._sessions[session.name]
        await session.close()


class _Session:
    """One stream. Its blocking work is done by the store's transfers, one step at a time."""

    def __init__(
        self,
        name: str,
        subject: str,
        opener: Opener,
        services: Services,
        idle_s: float,
        expire: Callable[["_Session"], None],
    ) -> None:
        self.name = name
        self.subject = subject
        self._services = services
        self._idle_s = idle_s
        self._expire = expire
        self._timer: asyncio.TimerHandle | None = None
        self._lock = asyncio.Lock()
        self._stop = StopSignal()
        self._stack = ExitStack()
        self._notes = Notes()
        self._kept: dict[int, bytes] = {}
        self._made = self._acked = 0
        self._total: int | None = None
        self._hash: Any = hashlib.sha256()
        self._rest = b""
        self._pieces: Iterator[bytes] = iter(())
        self._closed = False
        self._preparing = asyncio.ensure_future(self._prepare(opener))

    @property
    def is_over(self) -> bool:
        """Everything has arrived."""
        return self._total is not None and self._acked >= self._total

    def rest(self) -> None:
        """Somebody asks: the time until it ends by itself begins anew."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(self._idle_s, self._expire, self)

    async def _run(self, work: Callable[[], Any]) -> Any:
        try:
            return await self._services.transfers.step(work, self._stop)
        except CalledOff:
            raise Unavailable("the download was ended") from None
        except ValueError as failure:
            raise Internal(str(failure)) from failure
        except OSError as failure:
            raise Unavailable(f"the files cannot be read: {failure.strerror or failure}") from failure

    async def _prepare(self, opener: Opener) -> None:
        self._pieces = await self._run(partial(opener, self._stack, self._stop, self._notes))

    async def piece(self, offset: int, acked: int) -> PieceReply:
        done, _ = await asyncio.wait({self._preparing}, timeout=PATIENCE_S)
        if not done:
            return self._reply(offset, b"", ready=False)
        self._preparing.result()
        async with self._lock:
            if self._closed:
                raise NotFound("this session has ended; begin a new one", field="session")
            self._acked = max(self._acked, min(acked, self._made))
            for place in [place for place in self._kept if place + PIECE_BYTES <= self._acked]:
                del self._kept[place]
            while offset >= self._made and self._total is None:
                if len(self._kept) >= WINDOW:
                    raise TooFast(
                        f"{WINDOW} pieces are on their way, and none was told to have arrived", field="acked"
                    )
                await self._make()
            if self._total is not None and offset >= self._total:
                return self._reply(offset, b"", ready=True)
            data = self._kept.get(offset)
            if data is None:
                raise InvalidCommand("was told to have arrived already", field="offset")
            return self._reply(offset, data, ready=True)

    async def _make(self) -> None:
        """The next piece, the last of which may be short or empty."""
        data = await self._run(self._next)
        self._hash.update(data)
        self._kept[self._made] = data
        self._made += len(data)
        if len(data) < PIECE_BYTES:
            self._total = self._made

    def _next(self) -> bytes:
        parts, size = [self._rest], len(self._rest)
        while size < PIECE_BYTES:
            self._stop.check()
            part = next(self._pieces, None)
            if part is None:
                break
            parts.append(part)
            size += len(part)
        whole = b"".join(parts)
        self._rest = whole[PIECE_BYTES:]
        return whole[:PIECE_BYTES]

    def _reply(self, offset: int, data: bytes, *, ready: bool) -> PieceReply:
        eof = self._total is not None and offset + len(data) >= self._total
        return PieceReply(
            offset=offset,
            data=data,
            ready=ready,
            eof=eof,
            total=self._total if eof else None,
            sha256=self._hash.hexdigest() if eof else None,
            notes=list(self._notes.all()) if eof else [],
        )

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._stop.set()
        await asyncio.gather(self._preparing, return_exceptions=True)
        async with self._lock:
            if self._closed:
                return
            self._closed = True
            self._kept.clear()
            if isinstance(self._pieces, Generator):
                self._pieces.close()
            await self._services.in_thread(self._stack.close)
