"""Fetching what a node gives in pieces (`export`, `save`): in order, checked, several pieces on their way."""

import asyncio
import hashlib
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress

import msgspec

from schemas import queries as q
from worker.bus.failures import NoAnswer, NoResponders, NotConnected
from worker.client import FleetClient, new_id
from worker.errors import ContractError, Internal, Unavailable

AHEAD = 6
TIMEOUT_S = 20.0
# How long a node may be silent: a worker that was replaced knows nothing of the session.
PATIENCE_S = 30.0
_RETRY_S = 0.25

Ask = Callable[[str, int, int], q.ExportRequest | q.SaveRequest]


class Download:
    """One session. `notes` and `total` are known when all pieces have come."""

    def __init__(self, fleet: FleetClient, node: str, verb: str, ask: Ask) -> None:
        """`ask` makes the request from session, offset and how much has arrived."""
        self._fleet = fleet
        self._node = node
        self._verb = verb
        self._ask = ask
        self._session = new_id()
        self._arrived = 0
        self.total: int | None = None
        self.notes: list[str] = []

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The bytes from front to back. Errors are the node's; Internal when it sent something else than it says."""
        found = hashlib.sha256()
        waiting: deque[asyncio.Task[q.PieceReply]] = deque()
        asked = 0
        try:
            while self.total is None:
                # Only once the first has come is it known that there is anything to be fetched.
                while len(waiting) < (AHEAD if self._arrived else 1):
                    waiting.append(asyncio.ensure_future(self._fetch(asked)))
                    asked += q.PIECE_BYTES
                reply = await waiting.popleft()
                if reply.offset != self._arrived or (len(reply.data) != q.PIECE_BYTES and not reply.eof):
                    raise Internal(f"node {self._node} sent another piece than it was asked for")
                found.update(reply.data)
                self._arrived += len(reply.data)
                if reply.data:
                    yield reply.data
                if reply.eof:
                    if (reply.total, reply.sha256) != (self._arrived, found.hexdigest()):
                        raise Internal(f"what node {self._node} sent is not what it made: something was lost")
                    self.total, self.notes = self._arrived, reply.notes
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        # A courtesy: the session would end by itself.
        with suppress(ContractError):
            await self._query(self._arrived)

    async def _fetch(self, offset: int) -> q.PieceReply:
        """One piece, asked for until it is there."""
        loop = asyncio.get_running_loop()
        silent_since: float | None = None
        while True:
            try:
                reply = await self._query(offset)
            except (NoAnswer, NoResponders, NotConnected) as failure:
                silent_since = silent_since or loop.time()
                if loop.time() - silent_since > PATIENCE_S:
                    raise Unavailable(f"{failure.message}; what has come so far is not all of it") from None
                await asyncio.sleep(_RETRY_S)
                continue
            silent_since = None
            if reply.ready:
                return reply

    async def _query(self, offset: int) -> q.PieceReply:
        request: msgspec.Struct = self._ask(self._session, offset, self._arrived)
        return await self._fleet.query(self._node, self._verb, request, q.PieceReply, timeout_s=TIMEOUT_S)
