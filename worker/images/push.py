"""Pushing an image: its blobs side by side, those that are there left out, its manifest last.

So a registry never shows an image of which something is missing, and whoever is killed in between has only sent
blobs that the next push finds there. Nothing is held in memory but a few pieces of each blob under way.
"""

import ssl
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import msgspec

from worker.errors import ContractError, PullFailed

from .push_blob import Upload, refusal
from .registry.addresses import is_loopback_name
from .registry.auth import Authorizer
from .registry.channel import Dialer, Resolve, resolve
from .registry.credentials import Credentials
from .registry.failures import TransportError
from .registry.patience import Patience
from .registry.reference import RegistryImage
from .registry.stopping import CalledOff, StopSignal
from .registry.upload import Outgoing, UploadClient, UploadHttp

MAX_PARALLEL = 4
# A registry reads a blob again before it says that it has all of it, which takes as long as the blob is large.
PATIENCE = Patience(idle_s=120, headers_s=300)

T = TypeVar("T")
Tell = Callable[[str, int], None]


class Reach(msgspec.Struct, frozen=True, kw_only=True):
    """How a registry is reached. `plain`: without TLS, too; `private`: also at an address that is not public."""

    tls: ssl.SSLContext
    credentials: Credentials | None = None
    plain: bool = False
    private: bool = True
    how_to_allow: str = ""
    patience: Patience = PATIENCE
    resolve: Resolve = resolve
    max_parallel: int = MAX_PARALLEL


class Parcel(msgspec.Struct, frozen=True, kw_only=True):
    """An image to be pushed. `blobs` are config and layers. `mount_from` is another repository of the registry
    that may have them."""

    media_type: str
    manifest: Outgoing
    blobs: tuple[Outgoing, ...]
    mount_from: str | None = None


class Pushed(msgspec.Struct, frozen=True, kw_only=True):
    """`sent`, `mounted` and `known` count blobs; `bytes` were sent."""

    digest: str
    sent: int = 0
    mounted: int = 0
    known: int = 0
    bytes: int = 0


def push(parcel: Parcel, image: RegistryImage, reach: Reach, stop: StopSignal, tell: Tell) -> Pushed:
    """Blocking, with threads of its own. `tell` hears from them how much of which blob is there.

    Unavailable when the registry is not there or cannot now; PullFailed when it says no; CalledOff. `stop` is
    set after any failure.
    """
    plain = reach.plain or is_loopback_name(image.hostname)
    dialer = Dialer(
        reach.tls,
        reach.patience,
        stop,
        private=reach.private,
        how_to_allow=reach.how_to_allow,
        resolve=reach.resolve,
    )
    http = UploadHttp(dialer, plain=plain, agent="sandfleet")
    try:
        auth = Authorizer(http, image.host, image.repository, reach.credentials, actions="pull,push")
        client = UploadClient(http, image, auth, reach.patience, stop, plain=plain)
        return _Push(client, parcel, image, reach, stop, tell).run()
    except ContractError as failure:
        raise _of_target(failure) from failure
    finally:
        http.close()


def _of_target(failure: ContractError) -> ContractError:
    """The parts that pulls use too name `image`; here it is the target that is meant."""
    if failure.field == "image":
        failure.field = "target"
    return failure


class _Push:
    def __init__(
        self,
        client: UploadClient,
        parcel: Parcel,
        image: RegistryImage,
        reach: Reach,
        stop: StopSignal,
        tell: Tell,
    ) -> None:
        self._client = client
        self._parcel = parcel
        self._image = image
        self._reach = reach
        self._stop = stop
        self._tell = tell

    def run(self) -> Pushed:
        digest = self._parcel.manifest.digest
        if self._persist(lambda: self._client.stored(self._image.tag)) == digest:
            for blob in self._parcel.blobs:
                self._tell(blob.digest, blob.size)
            return Pushed(digest=digest, known=len(self._parcel.blobs))
        blobs = list({blob.digest: blob for blob in self._parcel.blobs}.values())
        outcomes = self._all(blobs)
        self._store_manifest()
        return Pushed(
            digest=digest,
            sent=outcomes.count("sent"),
            mounted=outcomes.count("mounted"),
            known=outcomes.count("known"),
            bytes=sum(blob.size for blob, how in zip(blobs, outcomes, strict=True) if how == "sent"),
        )

    def _all(self, blobs: Sequence[Outgoing]) -> list[str]:
        """Every blob; the first failure ends the others and is the one that is raised."""
        with ThreadPoolExecutor(self._reach.max_parallel, thread_name_prefix="push") as threads:
            jobs = [threads.submit(self._one, blob) for blob in blobs]
            first: BaseException | None = None
            for job in as_completed(jobs):
                failure = job.exception()
                if failure is not None and (first is None or isinstance(first, CalledOff)):
                    first = failure
                    self._stop.set()
            if first is not None:
                raise first
            return [job.result() for job in jobs]

    def _one(self, blob: Outgoing) -> str:
        self._stop.check()
        upload = Upload(
            self._client,
            self._image,
            blob,
            self._reach.patience,
            self._stop,
            lambda done: self._tell(blob.digest, done),
        )
        try:
            how = upload.run(self._parcel.mount_from)
        except OSError as failure:
            raise PullFailed(f"{blob.digest} cannot be read: {failure.strerror or failure}") from failure
        self._tell(blob.digest, blob.size)
        return how

    def _store_manifest(self) -> None:
        parcel, tag = self._parcel, self._image.tag
        self._persist(lambda: self._client.put_manifest(tag, parcel.media_type, parcel.manifest))

    def _persist(self, call: Callable[[], T]) -> T:
        patience, failures = self._reach.patience, 0
        while True:
            try:
                return call()
            except TransportError as failure:
                failures += 1
                most = patience.absent_attempts if failure.absent else patience.attempts
                if not failure.again or failures >= most:
                    raise refusal(failure, failures) from failure
                self._stop.wait(patience.pause_s(failures, failure.after_s))
