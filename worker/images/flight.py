"""One pull under way: who waits for it, what it works with, and how far it is."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeVar

import msgspec

from schemas.events import ImagePhase, LayerProgress

from .model import ImageInfo
from .registry.stopping import StopSignal
from .threads import run_in

if TYPE_CHECKING:
    from .pulled import Plan
    from .registry.manifests import Blob

TELL_S = 0.25

T = TypeVar("T")


class Pulled(msgspec.Struct, frozen=True, kw_only=True):
    """`fetched`: a registry was asked and the name is new or has moved."""

    image: ImageInfo
    fetched: bool = False
    warnings: tuple[str, ...] = ()


class PullProgress(msgspec.Struct, frozen=True, kw_only=True):
    image: str
    phase: ImagePhase
    layers: tuple[LayerProgress, ...] = ()


Tell = Callable[[PullProgress], Awaitable[None]]


class Flight:
    """A pull under way, and how many wait for it. Its counters are set by the downloading threads."""

    def __init__(self, name: str, threads: ThreadPoolExecutor, tell: Tell) -> None:
        self.name = name
        self._threads = threads
        self._tell = tell
        self.stop = StopSignal()
        self.waiting = 0
        self.phase = ImagePhase.RESOLVING
        self.layers: dict[str, Blob] = {}
        self.done: dict[str, int] = {}
        self.task: asyncio.Task[Pulled] | None = None

    def plan(self, plan: "Plan") -> None:
        self.layers = {layer.digest: layer for layer in plan.manifest.layers}
        self.done = {digest: layer.size for digest, layer in self.layers.items()}

    def progress(self) -> PullProgress:
        layers = tuple(
            LayerProgress(digest=digest, bytes_done=self.done[digest], bytes_total=layer.size)
            for digest, layer in self.layers.items()
        )
        return PullProgress(image=self.name, phase=self.phase, layers=layers)

    async def thread(self, work: Callable[[], T]) -> T:
        """Run in a thread, see `run_in`."""
        return await run_in(self._threads, work, self.stop.set)

    @asynccontextmanager
    async def telling(self) -> AsyncIterator[None]:
        """Tell, for as long as the block lasts, when something has changed, and the end if it is a good one."""

        async def tell() -> None:
            last: PullProgress | None = None
            while True:
                progress = self.progress()
                if progress != last:
                    await self._tell(progress)
                    last = progress
                await asyncio.sleep(TELL_S)

        teller = asyncio.create_task(tell(), name=f"progress {self.name}")
        try:
            yield
            self.phase = ImagePhase.DONE
            await self._tell(self.progress())
        finally:
            teller.cancel()
            await asyncio.gather(teller, return_exceptions=True)
