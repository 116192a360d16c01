"""Pulling: by which policy, as whom, from where, how many at a time, and who is told how far it is.

One pull of a name is under way at a time; whoever asks for the same meanwhile waits for that one. It is given
up when nobody waits any more, which leaves what has come for the next. Pulls of different names share each
layer they have in common: the second waits for the first one's download.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from loguru import logger

from schemas.events import ImagePhase
from schemas.spec import PullPolicy
from worker.config import Config
from worker.errors import Configuration, PullFailed
from worker.secret_files import SecretReader

from .access import Access
from .flight import Flight, Pulled, PullProgress, Tell
from .model import FROM_INDEX, ImageInfo, oci_platform
from .pulled import Plan, TakeIn, Unpack, disk_failed, make_plan
from .reference import parse_reference
from .registry.addresses import is_loopback_name, names_host
from .registry.auth import Authorizer
from .registry.channel import Dialer, Resolve, resolve
from .registry.client import RegistryClient
from .registry.download import Ingest, fetch
from .registry.manifests import Blob
from .registry.patience import Patience
from .registry.reference import RegistryImage, registry_image
from .registry.transport import Http, tls_context
from .store import ImageStore
from .unpack import unpack_layers

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
        unpack: Unpack = unpack_layers,
        resolve: Resolve = resolve,
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
        # A file that cannot be used is told at the start; the system's own roots are read when needed.
        self._tls = tls_context(Path(self._settings.ca)) if self._settings.ca else None
        folder = store.layout.root / "ingest"
        try:
            self._ingest = Ingest.open(folder)
        except OSError as failure:
            raise Configuration(f"the image store {folder} cannot be used: {failure}") from failure
        most = self._settings.max_parallel
        self._downloads = asyncio.Semaphore(most)
        self._threads = ThreadPoolExecutor(most + _SPARE_THREADS, thread_name_prefix="pull")
        self._flights: dict[tuple[str, str | None], Flight] = {}
        self._tasks: set[asyncio.Task[Pulled]] = set()
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    def grant(self, config: Config) -> None:
        """Go by the policy of `config` from now on; how registries are reached stays."""
        self._config = config
        self._access.grant(config)

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

    # -- one pull

    async def _fly(self, flight: Flight, image: RegistryImage, auth: str | None) -> Pulled:
        with ExitStack() as stack:
            async with flight.telling():
                client, http = await flight.thread(partial(self._open_client, flight, image, auth))
                stack.callback(http.close)
                if await flight.thread(partial(self._is_current, client, image, flight.name)):
                    known = self._known(flight.name)
                    if known is not None:
                        return Pulled(image=known)
                plan = await flight.thread(
                    partial(make_plan, client, image, self._here, self._patience, flight.stop)
                )
                for warning in plan.warnings:
                    logger.warning("{}", warning)
                async with self._holding(flight, plan):
                    return await self._take_in(flight, client, plan, auth)

    async def _take_in(self, flight: Flight, client: RegistryClient, plan: Plan, auth: str | None) -> Pulled:
        work = TakeIn(self._store, self._ingest, plan, flight.stop)
        missing = await flight.thread(work.missing)
        await flight.thread(partial(work.check_space, missing))
        flight.plan(plan)
        for layer in missing:
            flight.done[layer.digest] = 0
        flight.phase = ImagePhase.DOWNLOADING
        await _all(self._fetch(flight, client, work, layer) for layer in missing)
        flight.phase = ImagePhase.UNPACKING
        async with self._alone(plan.tree):
            notes = await flight.thread(partial(work.unpack, self._unpack))
        for note in notes:
            logger.info("{}: {}", flight.name, note)
        info = await flight.thread(partial(work.publish, flight.name, auth))
        logger.info(
            "pulled {} as {} ({} of {} layers fetched)",
            info.name,
            info.digest,
            len(missing),
            len(plan.manifest.layers),
        )
        return Pulled(image=info, fetched=True, warnings=plan.warnings)

    async def _fetch(self, flight: Flight, client: RegistryClient, work: TakeIn, layer: Blob) -> None:
        def report(done: int) -> None:
            flight.done[layer.digest] = done

        def work_it() -> None:
            if self._store.layout.blob_path(layer.digest).exists():
                return  # another pull was faster
            try:
                with self._ingest.claimed(layer.digest) as file:
                    fetch(client, layer, file, self._patience, flight.stop, report)
                    work.adopt(file, layer.digest)
            except OSError as failure:
                raise disk_failed(failure, "fetch") from failure

        async with self._alone(layer.digest), self._downloads:
            await flight.thread(work_it)
        flight.done[layer.digest] = layer.size

    def _open_client(
        self, flight: Flight, image: RegistryImage, auth: str | None
    ) -> tuple[RegistryClient, Http]:
        credentials = self._access.credentials(image, auth)
        plain = is_loopback_name(image.hostname) or image.host in self._settings.plain_http
        named = names_host(self._config.policy.images, image.host) or image.host in self._settings.plain_http
        pattern = f"{image.host}/*"
        hint = f"; an operator may name the registry: {self._config.how_to_allow('images', pattern)}"
        self._tls = self._tls or tls_context(None)
        dialer = Dialer(
            self._tls,
            self._patience,
            flight.stop,
            private=named,
            how_to_allow=hint,
            resolve=self._resolve,
        )
        http = Http(dialer, plain=plain, agent="sandfleet")
        authorizer = Authorizer(http, image.host, image.repository, credentials)
        client = RegistryClient(http, image, authorizer, self._patience, flight.stop, plain=plain)
        return client, http

    def _is_whole(self, name: str) -> bool:
        found = self._store.find(name)
        return found is not None and self._store.is_whole(found)

    def _is_current(self, client: RegistryClient, image: RegistryImage, name: str) -> bool:
        """Whether the tag still stands for what is here: one small question instead of all of it."""
        found = self._store.find(name)
        if found is None or image.digest is not None or not self._store.is_whole(found):
            return False
        digest = client.current_digest(image.tag)
        return digest is not None and digest in (found.digest, found.marks.get(FROM_INDEX))

    # -- threads, locks, telling

    @asynccontextmanager
    async def _holding(self, flight: Flight, plan: Plan) -> AsyncIterator[None]:
        try:
            await flight.thread(partial(self._store.hold, plan.blobs))
            yield
        finally:
            await flight.thread(partial(self._store.release, plan.blobs))

    @asynccontextmanager
    async def _alone(self, digest: str) -> AsyncIterator[None]:
        """One at a time for each digest: a download, or an unpacking."""
        with self._lock(digest) as lock:
            async with lock:
                yield

    @contextmanager
    def _lock(self, digest: str) -> Iterator[asyncio.Lock]:
        lock, users = self._locks.get(digest, (None, 0))
        lock = lock or asyncio.Lock()
        self._locks[digest] = (lock, users + 1)
        try:
            yield lock
        finally:
            _, users = self._locks[digest]
            if users == 1:
                del self._locks[digest]
            else:
                self._locks[digest] = (lock, users - 1)


async def _all(jobs: Iterator[Coroutine[Any, Any, None]]) -> None:
    """Run all at once; the first failure ends the others and is the one that is raised."""
    try:
        async with asyncio.TaskGroup() as tasks:
            for job in jobs:
                tasks.create_task(job)
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None
