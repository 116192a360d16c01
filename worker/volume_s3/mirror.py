"""One mirror: what it is, what it is doing, and the blocking part of it."""

import asyncio
import threading
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from .outcome import Outcome
from .source import S3Credentials, S3Source
from .state import MirrorState

if TYPE_CHECKING:
    from .sync import MirrorPass

SETTLED = "settled"


class MirrorFile(msgspec.Struct, frozen=True, kw_only=True):
    """mirror.json: all that a new worker must know of it. No secret is in it, only its name."""

    source: S3Source
    container: str
    instance: str
    target: str
    created_at: datetime


class Mirror:
    """`running`: the container may write into it. `pending`: it may hold what the bucket has not. `released`: its
    container is gone. `kept`: a task looks after it. `attempted`: since the end of the run it was written back, or
    tried to. `owner` (uid, gid) is the container's user where that is not the worker's."""

    def __init__(self, name: str, folder: Path, told: MirrorFile) -> None:
        self.name = name
        self.folder = folder
        self.files = folder / "files"
        self.incoming = folder / "incoming"
        self.told = told
        self.running = self.pending = self.released = self.fetching = self.kept = False
        self.owner: tuple[int, int] | None = None
        self.error: str | None = None
        self.said: str | None = None
        self.progress = ""
        self.last: Outcome | None = None
        self.lock = asyncio.Lock()
        self.kick = asyncio.Event()
        self.attempted = asyncio.Event()
        self.gone = asyncio.Event()
        self.stopped = threading.Event()
        self.thread: asyncio.Future[Outcome] | None = None

    async def kicked(self, timeout_s: float | None) -> bool:
        """Wait until something has changed; False when nothing did for that long."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.kick.wait()
        except TimeoutError:
            return False
        return True

    def begin(self) -> None:
        """The next pass is one that nobody has stopped."""
        self.stopped = threading.Event()
        self.progress = ""

    def settled(self) -> bool:
        """Whether the last run's end was written back. Blocking."""
        if not (self.folder / "state.db").exists():
            return True  # nothing was ever fetched, and so nothing was ever started
        state = MirrorState(self.folder)
        try:
            return state.get(SETTLED) == "yes"
        finally:
            state.close()

    def work(
        self,
        credentials: S3Credentials | None,
        ca: Path | None,
        *,
        private: bool,
        fetching: bool,
        owned: bool,
    ) -> Outcome:
        """One pass. Blocking. S3Failure, Stopped, OSError."""
        # Here, in the thread of the first pass: a node without such volumes never needs any of it.
        from .client import S3Client
        from .files import MirrorTree
        from .sync import MirrorPass

        stopped = self.stopped
        tree = MirrorTree(self.files, self.incoming, self.owner)
        try:
            state = MirrorState(self.folder)
            try:
                client = S3Client(self.told.source, credentials, ca=ca, private=private, stopped=stopped)
                try:
                    one = MirrorPass(
                        source=self.told.source,
                        client=client,
                        state=state,
                        tree=tree,
                        instance=self.told.instance,
                        fetching=fetching,
                        owned=owned,
                        stopped=stopped,
                        progress=self._show,
                    )
                    return self._record(state, one, fetching=fetching, owned=owned)
                finally:
                    client.close()
            finally:
                state.close()
        finally:
            tree.close()

    def _record(self, state: MirrorState, one: "MirrorPass", *, fetching: bool, owned: bool) -> Outcome:
        if fetching:
            # Written down before the container can write: whoever finds the mirror later writes it back.
            state.put(SETTLED, "no")
        elif not one.has_changes():
            if owned:
                state.put(SETTLED, "yes")
            return Outcome()
        outcome = one.run()
        if owned and not fetching and not outcome.left:
            state.put(SETTLED, "yes")
        self.last = outcome
        return outcome

    def _show(self, text: str) -> None:
        self.progress = text
