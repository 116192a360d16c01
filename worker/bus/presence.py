"""The node's line in the bucket of nodes, written anew every 5 s; it expires 15 s after the last one."""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
from loguru import logger

from worker.bus.connection import Bus
from worker.bus.jetstream import StreamNames
from worker.errors import Unavailable

INTERVAL_S = 5.0

_encode = msgspec.json.Encoder().encode


class Presence:
    """`describe()` gives `{node, boot, epoch, state, slots, slots_used}` (a dict or a struct) at each
    writing.
    """

    def __init__(
        self,
        bus: Bus,
        node: str,
        describe: Callable[[], Any],
        *,
        allowed: Callable[[], bool] = lambda: True,
        interval_s: float = INTERVAL_S,
    ) -> None:
        """While `allowed` says no, nothing is written: the name may be another's."""
        self._bus = bus
        self._describe = describe
        self._allowed = allowed
        self._interval_s = interval_s
        self._subject = f"{bus.js.kv_prefix}.{StreamNames(bus.cfg.stream_prefix).nodes_bucket}.{node}"
        self._now = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled. A lost connection is waited out and the line written as soon as it is back."""
        unlisten = self._bus.listen(lambda connected: self.refresh() if connected else None)
        try:
            while True:
                self._now.clear()
                await self._put(_encode(self._describe()), {})
                try:
                    async with asyncio.timeout(self._interval_s):
                        await self._now.wait()
                except TimeoutError:
                    continue
        finally:
            unlisten()

    def refresh(self) -> None:
        """Write the line now: the state or the slots changed."""
        self._now.set()

    async def withdraw(self) -> None:
        """The node stops in order: its line goes at once. Call after `run` has ended."""
        await self._put(b"", {"KV-Operation": "DEL"})

    async def _put(self, value: bytes, headers: dict[str, str]) -> None:
        if not self._allowed():
            return
        try:
            await self._bus.publish(self._subject, value, headers)
        except Unavailable as failure:
            logger.debug("the node's presence was not told: {}", failure.message)
