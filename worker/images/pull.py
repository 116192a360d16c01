"""Pulling: by which policy, as whom, from where, how many at a time, and who is told how far it is.

One pull of a name is under way at a time; whoever asks for the same meanwhile waits for that one. It is given
up when nobody waits any more, which leaves what has come for the next. Pulls of different names share each
layer they have in common: the second waits for the first one's download.
"""

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from loguru import logger

from schemas.spec import PullPolicy
from worker.config import Config
from worker.errors import Configuration, PullFailed
from worker.secret_files import SecretReader

from .access import Access
from .flight import Flight, Pulled, PullProgress, Tell
from .ingest import Ingest
from .model import ImageInfo, oci_platform
from .reference import parse_reference
from .registry.patience import Patience
from .registry.reference import RegistryImage, registry_image
from .store import ImageStore

if TYPE_CHECKING:
    from .fetching import Fetching
    from .pulled import Unpack
    from .registry.channel import Resolve

# For all but downloads: questions to registries, which may be slow to answer, and unpacking.
_SPARE_THREADS = 16


async def _tell_nobody(progress: PullProgress) -> None:
    return None


class Puller:
    """One per store. `tell` is called a few times a second while something is pulled."""

    def __init__(
        self,
        store: ImageStore,
        config: Config,
        secrets: SecretReader,
        *,
        tell: Tell = _tell_nobody,
        patience: Patience | None = None,
        here: tuple[str, str] | None = None,
        unpack: "Unpack | None" = None,
        resolve: "Resolve | None" = None,
    ) -> None:
        """Configuration when the store or a file that the settings name cannot be used."""
        self._store = store
        self._config = config
        self._settings = config.images
        self._access = Access(config, secrets)
        self._tell = tell
        self._patience = patience or Patience()
        self._here = here or oci_platform()
        self._unpack = unpack
        self._resolve = resolve
        self._tls = _context(self._settings.ca)
        folder = store.layout.root / "ingest"
        try:
            self._ingest = Ingest.open(folder)
        except OSError as failure:
            raise Configuration(f"the image store {folder} cannot be used: {failure}") from failure
        most = self._settings.max_parallel
        self._fetching: Fetching | None = None
        self._threads = ThreadPoolExecutor(most + _SPARE_THREADS, thread_name_prefix="pull")
        self._flights: dict[tuple[str, str | None], Flight] = {}
        self._tasks: set[asyncio.Task[Pulled]] = set()

    def grant(self, config: Config) -> None:
        """Go by the policy of `config` from now on; how registries are reached stays."""
        self._config = config
        self._access.grant(config)
        if self._fetching is not None:
            self._fetching.grant(config)

    async def close(self) -> None:
        """Gives up what is under way and waits for its threads."""
        for flight in self._flights.values():
            flight.stop.set()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._threads.shutdown(wait=True)

    # -- asking

    async def pull(
        self,
        name: str,
        policy: PullPolicy | str,
        auth: str | None = None,
        *,
        on_fetch: Callable[[], Awaitable[None]] | None = None,
    ) -> Pulled:
        """The image of that name, by the policy. `auth` is the name of a secret of the node; `on_fetch` is
        awaited before a registry is asked.

        Whether the node may have the image at all was checked before. PullFailed, PolicyDenied,
        ResourceExhausted.
        """
        policy = PullPolicy(policy)
        known = self._known(name)
        if known is not None and (
            policy in (PullPolicy.IF_NOT_PRESENT, PullPolicy.NEVER)
            or (parse_reference(name).digest is not None and self._is_whole(name))
        ):
            return Pulled(image=known)
        if policy is PullPolicy.NEVER:
            raise PullFailed(f"{name} is not on this node, and the policy is never", field="image")
        image = registry_image(name)
        self._access.check(auth, image)
        if on_fetch is not None:
            await on_fetch()
        try:
            return await self._join(name, image, auth)
        except PullFailed as failure:
            if policy is not PullPolicy.NEWER or known is None:
                raise
            warning = f"the image of this node is used, as its registry gave no other: {failure.message}"
            logger.warning("{}: {}", name, warning)
            return Pulled(image=known, warnings=(warning,))

    async def drop_partial(self) -> int:
        """Delete what pulls that are no longer under way left to be gone on with; gives its size."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._ingest.sweep)

    def _known(self, name: str) -> ImageInfo | None:
        found = self._store.find(name)
        return None if found is None else self._store.info(found)

    def _is_whole(self, name: str) -> bool:
        found = self._store.find(name)
        return found is not None and self._store.is_whole(found)

    async def _join(self, name: str, image: RegistryImage, auth: str | None) -> Pulled:
        key = (name, auth)
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = Flight(name, self._threads, self._tell)
            flight.task = asyncio.create_task(self._fly(flight, image, auth), name=f"pull {name}")
            self._tasks.add(flight.task)
            flight.task.add_done_callback(partial(self._landed, key, flight))
        assert flight.task is not None
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiting -= 1
            if flight.waiting == 0 and not flight.task.done():
                self._forget(key, flight)
                flight.stop.set()
                flight.task.cancel()

    def _landed(self, key: tuple[str, str | None], flight: Flight, task: "asyncio.Task[Pulled]") -> None:
        self._tasks.discard(task)
        self._forget(key, flight)
        if not task.cancelled():
            task.exception()  # seen, also when everybody has gone meanwhile

    def _forget(self, key: tuple[str, str | None], flight: Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]

    async def _fly(self, flight: Flight, image: RegistryImage, auth: str | None) -> Pulled:
        if self._fetching is None:
            # In a thread: fifty modules that a worker does not need before it is ready, or at all.
            kind = await flight.thread(_fetching)
            self._fetching = self._fetching or kind(
                self._store,
                self._ingest,
                self._access,
                self._config,
                patience=self._patience,
                here=self._here,
                tls=self._tls,
                unpack=self._unpack,
                resolve_with=self._resolve,
            )
        return await self._fetching.fly(flight, image, auth)


def _fetching() -> "type[Fetching]":
    from .fetching import Fetching

    return Fetching


def _context(ca: str | None) -> ssl.SSLContext | None:
    """A file that cannot be used is told at the start; the system's own roots are read when needed."""
    if not ca:
        return None
    from .registry.transport import tls_context  # only where such a file is configured

    return tls_context(Path(ca))
