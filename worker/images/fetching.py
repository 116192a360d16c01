"""Fetching an image from its registry into the store: the part of a pull that needs registries, TLS and archives.

Loaded by the first pull that has to ask a registry (pull.py).
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from typing import Any

from loguru import logger

from schemas.events import ImagePhase
from worker.config import Config

from .access import Access
from .flight import Flight, Pulled
from .ingest import Ingest
from .model import FROM_INDEX
from .pulled import Plan, TakeIn, Unpack, disk_failed, make_plan
from .registry.addresses import is_loopback_name, names_host
from .registry.auth import Authorizer
from .registry.channel import Dialer, Resolve, resolve
from .registry.client import RegistryClient
from .registry.download import fetch
from .registry.manifests import Blob
from .registry.patience import Patience
from .registry.reference import RegistryImage
from .registry.transport import Http, tls_context
from .store import ImageStore
from .unpack import unpack_layers


class Fetching:
    """One per Puller. `tls` is that of the operator's file; the system's own roots are read when needed."""

    def __init__(
        self,
        store: ImageStore,
        ingest: Ingest,
        access: Access,
        config: Config,
        *,
        patience: Patience,
        here: tuple[str, str],
        tls: ssl.SSLContext | None,
        unpack: Unpack | None,
        resolve_with: Resolve | None,
    ) -> None:
        self._store = store
        self._ingest = ingest
        self._access = access
        self._config = config
        self._settings = config.images
        self._patience = patience
        self._here = here
        self._tls = tls
        self._unpack = unpack or unpack_layers
        self._resolve = resolve_with or resolve
        self._downloads = asyncio.Semaphore(self._settings.max_parallel)
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    def grant(self, config: Config) -> None:
        """Go by the policy of `config` from now on; how registries are reached stays."""
        self._config = config

    async def fly(self, flight: Flight, image: RegistryImage, auth: str | None) -> Pulled:
        """Fetch the image, or find that its name still stands for what is here. PullFailed, ResourceExhausted."""
        with ExitStack() as stack:
            async with flight.telling():
                client, http = await flight.thread(partial(self._open_client, flight, image, auth))
                stack.callback(http.close)
                if await flight.thread(partial(self._is_current, client, image, flight.name)):
                    found = self._store.find(flight.name)
                    if found is not None:
                        return Pulled(image=self._store.info(found))
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
