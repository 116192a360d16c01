"""Receiving a blob: in pieces, from where the last try stopped, checked before it counts.

A partial blob is only a prefix that a later try may use: its bytes are read and hashed again, and when the
whole has another digest it is thrown away and fetched once more from its start. So it does not matter how a
file came to its content, nor when its writer was killed.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from worker.errors import PullFailed

from .client import RegistryClient
from .failures import TransportError, given_up
from .manifests import Blob
from .patience import Patience
from .stopping import StopSignal
from .transport import Answer

_CHUNK = 512 * 1024
_READ = 1 << 20

Report = Callable[[int], None]


def fetch(
    client: RegistryClient,
    blob: Blob,
    path: Path,
    patience: Patience,
    stop: StopSignal,
    report: Report,
) -> None:
    """Receive one blob into `path`, a claimed file: complete, checked and on the disk.

    `report` is told how many of its bytes are here. PullFailed, CalledOff; OSError of the disk, after which
    the file is gone, as it may be what fills it.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        _Fetch(client, blob, fd, patience, stop, report).run()
        os.fsync(fd)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


class _Fetch:
    def __init__(
        self,
        client: RegistryClient,
        blob: Blob,
        fd: int,
        patience: Patience,
        stop: StopSignal,
        report: Report,
    ) -> None:
        self._client = client
        self._blob = blob
        self._fd = fd
        self._patience = patience
        self._stop = stop
        self._report = report
        self._hash: Any = hashlib.sha256()
        self._done = 0

    def run(self) -> None:
        self._take_up()
        failures, pieces, restarted = 0, self._done > 0, False
        while True:
            before = self._done
            try:
                self._receive()
            except TransportError as failure:
                # A few bytes for each new connection are no progress.
                went_on = self._done - before >= self._patience.slow_bytes
                failures = 1 if went_on else failures + 1
                if not failure.again or failures >= self._patience.attempts:
                    raise given_up(failure, failures) from failure
                self._stop.wait(self._patience.pause_s(failures, failure.after_s))
                pieces = pieces or self._done > 0
                continue
            found = f"sha256:{self._hash.hexdigest()}"
            if found == self._blob.digest:
                return
            self._start_over()
            if restarted or not pieces:
                raise PullFailed(
                    f"the registry sent other bytes for {self._blob.digest}: their digest is {found}",
                    field="image",
                )
            restarted = True  # the pieces may have been of different times or places

    def _take_up(self) -> None:
        """Hash what is here already; more than the whole is of no use."""
        if os.fstat(self._fd).st_size > self._blob.size:
            self._start_over()
        while chunk := os.read(self._fd, _READ):
            self._stop.check()
            self._hash.update(chunk)
            self._done += len(chunk)
        self._report(self._done)

    def _start_over(self) -> None:
        os.ftruncate(self._fd, 0)
        os.lseek(self._fd, 0, os.SEEK_SET)
        self._hash = hashlib.sha256()
        self._done = 0
        self._report(0)

    def _receive(self) -> None:
        """Up to the end of the blob, in one answer."""
        if self._done == self._blob.size:
            return
        answer = self._client.blob(self._blob.digest, self._done)
        try:
            self._agree(answer)
            self._copy(answer)
        finally:
            answer.close()

    def _agree(self, answer: Answer) -> None:
        """Make sure that the answer goes on where we are; without ranges it begins again."""
        size = self._blob.size
        if answer.status == 206:
            span = answer.headers.get("Content-Range", "").strip()
            if not span.startswith(f"bytes {self._done}-"):
                raise TransportError(
                    f"{answer.origin.netloc}: answers with another range: {span[:80]!r}", again=False
                )
        elif answer.status == 416:
            self._start_over()
            raise TransportError(f"{answer.origin.netloc}: has no such range", again=True)
        elif self._done:
            self._start_over()
        if answer.length is not None and answer.length != size - self._done:
            raise PullFailed(
                f"the size of {self._blob.digest} is {self._done + answer.length} bytes where the manifest says {size}",
                field="image",
            )

    def _copy(self, answer: Answer) -> None:
        buffer = memoryview(bytearray(_CHUNK))
        size = self._blob.size
        while count := answer.read_into(buffer):
            chunk = buffer[:count]
            if self._done + count > size:
                raise PullFailed(
                    f"the registry sends more than the {size} bytes of {self._blob.digest}", field="image"
                )
            self._hash.update(chunk)
            _write(self._fd, chunk)
            self._done += count
            self._report(self._done)
        if self._done < size:
            raise TransportError(f"{answer.origin.netloc}: the layer ended too early", again=True)


def _write(fd: int, chunk: memoryview) -> None:
    while chunk:
        chunk = chunk[os.write(fd, chunk) :]
