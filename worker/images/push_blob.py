"""Sending one blob to a registry, however often it must be tried.

It goes in one PATCH that streams it from its file, as docker and skopeo send it: some registries take larger
pieces that way than in numbered ones (ghcr.io refuses numbered pieces above 4 MiB). After a cut the registry is
asked how far it came, and the rest follows; where it does not say, says nonsense (ECR's `Range` can stand
still) or the digest is wrong in the end, the blob is sent once more from the start. A proxy or registry that
finds the whole too large gets pieces of 4 MiB.
"""

from worker.errors import PullFailed, Unavailable

from .registry.failures import TransportError
from .registry.patience import Patience
from .registry.reference import RegistryImage
from .registry.stopping import StopSignal
from .registry.upload import Outgoing, Refused, Report, UploadClient

PIECE_BYTES = 4 << 20
SMALL_BYTES = 1 << 20
_TOO_LARGE = 413


class Upload:
    """One blob on its way, however often it must be tried."""

    def __init__(
        self,
        client: UploadClient,
        image: RegistryImage,
        blob: Outgoing,
        patience: Patience,
        stop: StopSignal,
        report: Report,
    ) -> None:
        self._client = client
        self._image = image
        self._blob = blob
        self._patience = patience
        self._stop = stop
        self._report = report
        self._location: str | None = None
        self._done = self._most = 0
        self._piece: int | None = None
        self._least_piece = 0
        self._fresh = True
        self._resumed = self._restarted = False

    def run(self, mount_from: str | None) -> str:
        """`known` when the registry had it, `mounted`, or `sent`. PullFailed, Unavailable, CalledOff."""
        failures = 0
        while True:
            before = self._most
            try:
                return self._attempt(mount_from)
            except TransportError as failure:
                self._stop.check()
                # Only what was never reached before is progress: who loses all time and again is given up.
                failures = 1 if self._most > before else failures + 1
                if self._changes_course(failure):
                    continue
                if not failure.again or failures >= self._patience.attempts:
                    raise refusal(failure, failures) from failure
                self._stop.wait(self._patience.pause_s(failures, failure.after_s))

    def _changes_course(self, failure: TransportError) -> bool:
        """After a refusal that another way of sending may not meet: once for each way."""
        status = failure.status if isinstance(failure, Refused) else 0
        if status == 400:
            self._blob.check()  # it may be ours that is damaged
        large = self._blob.size > PIECE_BYTES and self._done == 0
        if self._piece is None and large and status in (_TOO_LARGE, 416):
            self._piece = max(PIECE_BYTES, self._least_piece)
        elif self._resumed and not self._restarted and status in (400, 404, 416):
            self._restarted = True
        else:
            return False
        self._start_over()
        return True

    def _reached(self, done: int) -> None:
        self._done = done
        self._most = max(self._most, done)
        self._report(done)

    def _start_over(self) -> None:
        self._location = None
        self._fresh = True  # it may have finished without our hearing of it
        self._done = 0
        self._resumed = False
        self._report(0)

    def _attempt(self, mount_from: str | None) -> str:
        if self._fresh:
            if self._client.has_blob(self._blob.digest):
                return "known"
            self._fresh = False
        if self._location is not None:
            self._resume(self._location)
        if self._location is None:
            mount = None if mount_from is None else (self._blob.digest, mount_from)
            begun = self._client.begin(mount)
            if begun is None:
                return "mounted"
            self._location, self._least_piece = begun
            self._done = 0
        if self._blob.size <= SMALL_BYTES and self._done == 0:
            location, self._location = self._location, None  # cut off, it begins anew
            self._client.finish(location, self._blob, whole=True)
        else:
            self._send_rest()
            self._client.finish(self._location, self._blob)
        self._report(self._blob.size)
        return "sent"

    def _resume(self, location: str) -> None:
        """Ask how far it came; where the registry has no answer that makes sense, begin anew."""
        try:
            location, done = self._client.received(location)
        except Refused as failure:
            if failure.again:
                raise
            self._start_over()
            return
        if done > self._blob.size:
            self._start_over()
            return
        self._location, self._resumed = location, done > 0
        self._reached(done)

    def _send_rest(self) -> None:
        size = self._blob.size
        while self._done < size:
            self._stop.check()
            assert self._location is not None
            end = size if self._piece is None else min(size, self._done + self._piece)
            numbered = self._piece is not None or self._done > 0
            self._location = self._client.append(
                self._location, self._blob, self._done, end, numbered=numbered, report=self._report
            )
            self._reached(end)


def refusal(failure: TransportError, failures: int) -> Unavailable | PullFailed:
    """What a push ends with: nobody is there, or able to answer now; or a no."""
    kind = Unavailable if failure.again or failure.absent else PullFailed
    tried = f" (tried {failures} times)" if failures > 1 else ""
    return kind(f"{failure.reason}{tried}", field="target")
