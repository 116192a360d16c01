"""Images on their way between the store and elsewhere, but for pulls: loaded, pushed, saved.

Blocking work has threads of its own. Whoever is cancelled calls it off and waits for it, as it still writes. What
only that work needs is imported there, by its first use: archives, uploads and TLS are no part of a worker's start.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from loguru import logger

from schemas.events import ImagePhase, LayerProgress
from worker.config import Config
from worker.errors import ContractError, PolicyDenied
from worker.secret_files import SecretReader

from .access import Access
from .flight import TELL_S, PullProgress, Tell
from .model import PULLED, oci_platform
from .reference import parse_name
from .registry.addresses import names_host
from .registry.patience import Patience
from .registry.reference import RegistryImage, registry_image
from .registry.stopping import StopSignal
from .store import ImageStore
from .threads import run_in

if TYPE_CHECKING:
    from .archive_load import Loaded
    from .archive_write import SavedImage
    from .push import Parcel, Pushed, Reach
    from .registry.channel import Resolve

# Loads and pushes take long; a step of a download does not, and must not wait for them.
_THREADS = 4
_LIGHT_THREADS = 8
# An event has 64 KiB at most.
_MOST_WARNINGS, _SHOWN = 40, 300

T = TypeVar("T")


async def _tell_nobody(progress: PullProgress) -> None:
    return None


class Transfers:
    """One per store. `tell` is called a few times a second while something is pushed."""

    def __init__(
        self,
        store: ImageStore,
        config: Config,
        secrets: SecretReader,
        *,
        tell: Tell = _tell_nobody,
        patience: Patience | None = None,
        here: tuple[str, str] | None = None,
        resolve: "Resolve | None" = None,
    ) -> None:
        self._store = store
        self._config = config
        self._settings = config.images
        self._access = Access(config, secrets)
        self._tell = tell
        self._patience = patience
        self._here = here or oci_platform()
        self._resolve = resolve
        self._tls: ssl.SSLContext | None = None
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="transfer")
        self._light = ThreadPoolExecutor(_LIGHT_THREADS, thread_name_prefix="download")
        self._stops: set[StopSignal] = set()

    def grant(self, config: Config) -> None:
        """Go by the policy of `config` from now on; how registries are reached stays."""
        self._config = config
        self._access.grant(config)

    async def close(self) -> None:
        """Calls off what is under way and waits for its threads."""
        for stop in self._stops:
            stop.set()
        for threads in (self._threads, self._light):
            await asyncio.get_running_loop().run_in_executor(None, threads.shutdown)

    async def step(self, work: Callable[[], T], stop: StopSignal) -> T:
        """One step of a download, in a thread. CalledOff when `stop` is set meanwhile."""
        return await self._run(self._light, work, stop)

    async def _run(self, threads: ThreadPoolExecutor, work: Callable[[], T], stop: StopSignal) -> T:
        self._stops.add(stop)
        try:
            return await run_in(threads, work, stop.set)
        finally:
            self._stops.discard(stop)

    # -- load

    async def load(self, source: Path, name: str | None, allowed: Callable[[str], None]) -> "Loaded":
        """Take in the archive at this canonical path. Raises as `load_archive` does."""
        stop = StopSignal()

        def work() -> "Loaded":
            from .archive_load import load_archive

            return load_archive(self._store, source, name, allowed=allowed, here=self._here, stop=stop)

        return await self._run(self._threads, work, stop)

    # -- push

    async def push(self, name: str, target: str, auth: str | None) -> "Pushed":
        """Send an image to a registry. `auth` is the name of a secret of the node.

        NotFound, InvalidCommand, PolicyDenied, PullFailed, Unavailable, ResourceExhausted.
        """
        parse_name(target, field="target")
        image = registry_image(target, field="target")
        self._check_target(target)
        self._access.check(auth, image)
        stop = StopSignal()
        progress = _Progress(target)
        async with progress.telling(self._tell):
            pushed = await self._run(
                self._threads, lambda: self._push(name, image, auth, stop, progress), stop
            )
        logger.info(
            "pushed {} as {} to {} ({} of {} blobs sent)",
            name, pushed.digest, image, pushed.sent, pushed.sent + pushed.known + pushed.mounted,
        )  # fmt: skip
        return pushed

    def _push(
        self, name: str, image: RegistryImage, auth: str | None, stop: StopSignal, progress: "_Progress"
    ) -> "Pushed":
        from .archive_store import open_image
        from .parcel import parcel_of
        from .push import push

        reach = self._reach(image, auth)
        progress.phase = ImagePhase.PACKING
        with open_image(self._store, name, stop) as saved:
            parcel = parcel_of(saved, self._mount_from(name, image))
            progress.phase = ImagePhase.UPLOADING
            progress.plan(parcel)
            return push(parcel, image, reach, stop, progress.report)

    def _check_target(self, target: str) -> None:
        if not self._config.policy.may_push(target):
            raise PolicyDenied(
                f"this node pushes nothing as {target}; {self._config.how_to_allow('push', target)}",
                field="target",
            )

    def _reach(self, image: RegistryImage, auth: str | None) -> "Reach":
        from .push import PATIENCE, Reach
        from .registry.channel import resolve
        from .registry.transport import tls_context

        settings = self._settings
        self._tls = self._tls or tls_context(Path(settings.ca) if settings.ca else None)
        plain = image.host in settings.plain_http
        pattern = f"{image.host}/*"
        return Reach(
            tls=self._tls,
            credentials=self._access.credentials(image, auth),
            plain=plain,
            private=plain or names_host(self._config.policy.push, image.host),
            how_to_allow=f"; an operator may name the registry: {self._config.how_to_allow('push', pattern)}",
            patience=self._patience or PATIENCE,
            resolve=self._resolve or resolve,
            max_parallel=settings.max_parallel,
        )

    def _mount_from(self, name: str, image: RegistryImage) -> str | None:
        """The repository that the image was pulled from, where it is another one of the same registry."""
        found = self._store.find(name)
        if found is None or PULLED not in found.marks:
            return None
        try:
            source = registry_image(name)
        except ContractError:
            return None
        return (
            source.repository if source.host == image.host and source.repository != image.repository else None
        )

    # -- save

    @contextmanager
    def opened(self, names: Sequence[str], stop: StopSignal) -> "Iterator[list[SavedImage]]":
        """Images for an archive, held while the block lasts; one with several of the names comes once. Blocking."""
        from .archive_store import open_image

        with ExitStack() as held:
            found: dict[str, SavedImage] = {}
            for name in names:
                image = held.enter_context(open_image(self._store, name, stop))
                known = found.get(image.manifest.digest)
                if known is not None:
                    image = msgspec.structs.replace(known, names=(*known.names, name))
                found[image.manifest.digest] = image
            yield list(found.values())


def load_result(loaded: "Loaded") -> dict[str, Any]:
    """What the completion of a `load_image` tells."""
    result: dict[str, Any] = {
        "digest": loaded.images[0].digest,
        "images": [{"image": image.name, "digest": image.digest} for image in loaded.images],
    }
    if loaded.warnings:
        result["warnings"] = [warning[:_SHOWN] for warning in loaded.warnings[:_MOST_WARNINGS]]
    return result


def push_result(pushed: "Pushed") -> dict[str, Any]:
    """What the completion of a `push_image` tells."""
    return {"digest": pushed.digest, "sent": pushed.sent, "bytes": pushed.bytes}


class _Progress:
    """How far a push is; its counters are set by the threads that send."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.phase = ImagePhase.RESOLVING
        self._sizes: dict[str, int] = {}
        self._done: dict[str, int] = {}

    def plan(self, parcel: "Parcel") -> None:
        self._sizes = {blob.digest: blob.size for blob in parcel.blobs}

    def report(self, digest: str, done: int) -> None:
        self._done[digest] = done

    def _now(self) -> PullProgress:
        layers = tuple(
            LayerProgress(digest=digest, bytes_done=self._done.get(digest, 0), bytes_total=size)
            for digest, size in self._sizes.items()
        )
        return PullProgress(image=self._name, phase=self.phase, layers=layers)

    @asynccontextmanager
    async def telling(self, tell: Tell) -> AsyncIterator[None]:
        async def keep_telling() -> None:
            last: PullProgress | None = None
            while True:
                now = self._now()
                if now != last:
                    await tell(now)
                    last = now
                await asyncio.sleep(TELL_S)

        teller = asyncio.create_task(keep_telling(), name=f"progress {self._name}")
        try:
            yield
            self.phase = ImagePhase.DONE
            await tell(self._now())
        finally:
            teller.cancel()
            await asyncio.gather(teller, return_exceptions=True)
