"""One object across, in either direction: whole or not at all, in bounded memory, and never twice as two.

A file is read twice: once for its MD5, which the server checks, once to send it. What changes meanwhile is left for
later. Every upload bears a token that was written down before, so that one whose answer was lost, or whose worker
was killed, is known again and is no conflict.
"""

import base64
import hashlib
import io
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress

import msgspec

from worker.errors import is_out_of_space

from .client import EXECUTABLE, MTIME, TOKEN, RemoteHead, S3Client
from .failures import Changed, NoRoom, S3Failure, Unable, Unsettled
from .files import MirrorTree, stamp_of
from .patience import Patience
from .state import Base, Intent, MirrorState, Stamp, There

PART_BYTES = 16 << 20
MAX_PARTS = 9000
READ_BYTES = 1 << 20
# A file that was written so shortly before it was read may be written again without its times telling.
RACY_NS = 2_000_000_000


class FileSlice(io.RawIOBase):
    """Part of an open file as a body. Unsettled when the file turns out shorter."""

    def __init__(self, fd: int, start: int, size: int, check: Callable[[], None]) -> None:
        self._fd = fd
        self._start = start
        self._size = size
        self._check = check
        self._at = 0

    def read(self, size: int = -1) -> bytes:
        self._check()
        left = self._size - self._at
        wanted = left if size is None or size < 0 else min(size, left)
        wanted = min(wanted, READ_BYTES) if size is not None and size >= 0 else wanted
        if wanted <= 0:
            return b""
        chunk = os.pread(self._fd, wanted, self._start + self._at)
        if not chunk:
            raise Unsettled("it was cut while it was being read")
        self._at += len(chunk)
        return chunk

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


class Transfer:
    def __init__(
        self,
        *,
        client: S3Client,
        state: MirrorState,
        tree: MirrorTree,
        prefix: str,
        patience: Patience,
        owned: bool,
        part_bytes: int = PART_BYTES,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """`owned`: nothing runs that could write into the folder."""
        self._client = client
        self._state = state
        self._tree = tree
        self._prefix = prefix
        self._patience = patience
        self._owned = owned
        self._part_bytes = part_bytes
        self._now_ns = now_ns
        self._conditional = True

    # -- reading

    def digest(self, path: str) -> tuple[str, Stamp, bool]:
        """(MD5, stamp, racy) of a file. Unsettled when it changes meanwhile."""
        fd = self._tree.open(path, owned=self._owned)
        try:
            return self._digest(fd)
        finally:
            os.close(fd)

    def _digest(self, fd: int) -> tuple[str, Stamp, bool]:
        stamp = stamp_of(os.fstat(fd))
        racy = self._racy(stamp)
        whole = hashlib.md5(usedforsecurity=False)
        self._feed(FileSlice(fd, 0, stamp.size, self._patience.check), whole.update)
        self._same(fd, stamp)
        return whole.hexdigest(), stamp, racy

    def _feed(self, body: FileSlice, update: Callable[[bytes], None]) -> None:
        while chunk := body.read(READ_BYTES):
            update(chunk)

    def _racy(self, stamp: Stamp) -> bool:
        return max(stamp.mtime_ns, stamp.ctime_ns) > self._now_ns() - RACY_NS

    def _same(self, fd: int, stamp: Stamp) -> None:
        if stamp_of(os.fstat(fd)) != stamp:
            raise Unsettled

    # -- up

    def send(self, path: str, fold: str, target: str, expected: str | None) -> tuple[str, Intent]:
        """Upload a file as the object `target`; its ETag, and what was sent. `expected` is as in `S3Client.put`.

        Changed, Unsettled, S3Failure.
        """
        fd = self._tree.open(path, owned=self._owned)
        try:
            found = os.fstat(fd)
            intent = Intent(
                target=target,
                path=path,
                fold=fold,
                token=secrets.token_hex(16),
                stamp=stamp_of(found),
                md5="",
                racy=self._racy(stamp_of(found)),
            )
            metadata = {
                TOKEN: intent.token,
                MTIME: f"{found.st_mtime_ns // 10**9}.{found.st_mtime_ns % 10**9:09d}",
            }
            if found.st_mode & 0o100:
                metadata[EXECUTABLE] = "1"
            if found.st_size <= self._part_bytes:
                return self._send_whole(fd, intent, metadata, expected)
            return self._send_parts(fd, intent, metadata, expected)
        finally:
            os.close(fd)

    def _send_whole(
        self, fd: int, intent: Intent, metadata: dict[str, str], expected: str | None
    ) -> tuple[str, Intent]:
        md5, stamp, _ = self._digest(fd)
        if stamp != intent.stamp:
            raise Unsettled
        intent = msgspec.structs.replace(intent, md5=md5)
        self._state.intend(intent)
        key = self._prefix + intent.target
        body = FileSlice(fd, 0, stamp.size, self._patience.check)

        def put(condition: str | None) -> str:
            body.seek(0)
            return self._client.put(key, body, _base64(md5), metadata, condition)

        return self._written(key, intent, expected, put), intent

    def _send_parts(
        self, fd: int, intent: Intent, metadata: dict[str, str], expected: str | None
    ) -> tuple[str, Intent]:
        key, size = self._prefix + intent.target, intent.stamp.size
        upload = self._patience.call(lambda: self._client.begin_parts(key, metadata))
        intent = msgspec.structs.replace(intent, upload_id=upload)
        self._state.intend(intent)
        try:
            etags, md5 = self._parts(fd, key, upload, size)
            self._same(fd, intent.stamp)
            intent = msgspec.structs.replace(intent, md5=md5)
            self._state.intend(intent)
            if expected is not None:
                # Not every server that knows the condition of a plain upload knows it here.
                self._check(key, expected)
            etag = self._written(
                key, intent, expected, lambda condition: self._client.end_parts(key, upload, etags, condition)
            )
        except S3Failure:
            with suppress(S3Failure):
                self._client.abort_parts(key, upload)
            raise
        return etag, intent

    def _parts(self, fd: int, key: str, upload: str, size: int) -> tuple[list[str], str]:
        part_bytes = max(self._part_bytes, -(-size // MAX_PARTS))
        whole = hashlib.md5(usedforsecurity=False)
        etags: list[str] = []
        for number, start in enumerate(range(0, size, part_bytes), 1):
            body = FileSlice(fd, start, min(part_bytes, size - start), self._patience.check)
            one = hashlib.md5(usedforsecurity=False)

            def feed(chunk: bytes, one: "hashlib._Hash" = one) -> None:
                one.update(chunk)
                whole.update(chunk)

            self._feed(body, feed)
            md5 = _base64(one.hexdigest())

            def put(body: FileSlice = body, number: int = number, md5: str = md5) -> str:
                body.seek(0)
                return self._client.put_part(key, upload, number, body, md5)

            etags.append(self._patience.call(put))
        return etags, whole.hexdigest()

    def _written(
        self, key: str, intent: Intent, expected: str | None, write: Callable[[str | None], str]
    ) -> str:
        """The ETag of a write that may have been done by an attempt whose answer never came."""

        def attempt() -> str:
            try:
                if self._conditional or expected is None:
                    try:
                        return write(expected)
                    except Unable:
                        if expected is None:
                            raise
                        self._conditional = False
                self._check(key, expected or "")
                return write(None)
            except S3Failure:
                head = self._client.head(key)
                if head is not None and head.metadata.get(TOKEN) == intent.token:
                    return head.etag
                raise

        return self._patience.call(attempt)

    def _check(self, key: str, expected: str) -> None:
        head = self._client.head(key)
        if ("" if head is None else head.etag) != expected:
            raise Changed

    def unsend(self, intent: Intent) -> RemoteHead | None:
        """What became of an upload that a dead worker had begun: the object when it was done, else None."""
        key = self._prefix + intent.target
        head = self._patience.call(lambda: self._client.head(key))
        if head is not None and head.metadata.get(TOKEN) == intent.token and intent.md5:
            return head
        if intent.upload_id is not None:
            upload = intent.upload_id
            self._patience.call(lambda: self._client.abort_parts(key, upload))
        return None

    def delete(self, path: str, expected: str) -> None:
        """Delete the object if it is that version. Changed."""
        key = self._prefix + path

        def attempt() -> None:
            if self._conditional:
                try:
                    self._client.delete(key, expected)
                    return
                except Unable:
                    self._conditional = False
            head = self._client.head(key)
            if head is not None and head.etag != expected:
                raise Changed
            self._client.delete(key, None)

        self._patience.call(attempt)

    def head(self, path: str) -> RemoteHead | None:
        return self._patience.call(lambda: self._client.head(self._prefix + path))

    # -- down

    def fetch(self, there: There, fold: str, name: str) -> None:
        """Bring an object to its place; `name` is free for it among what is not whole yet.

        Changed, Missing, InTheWay, NoRoom, S3Failure.
        """
        fd = self._tree.new_file(name)
        try:
            whole = hashlib.md5(usedforsecurity=False)
            head = self._fill(fd, there, whole.update)
            os.fchmod(fd, 0o755 if head.metadata.get(EXECUTABLE) == "1" else 0o644)
            mtime_ns = _mtime_ns(head.metadata.get(MTIME, ""))
            if mtime_ns is not None:
                os.utime(fd, ns=(mtime_ns, mtime_ns))
            # On disk before it is believed to be: a file that a power failure emptied must not go back as a change.
            os.fsync(fd)
            self._tree.place(name, there.path)
            base = Base(
                path=there.path,
                etag=there.etag,
                stamp=stamp_of(os.fstat(fd)),
                md5=whole.hexdigest(),
                token=head.metadata.get(TOKEN, ""),
            )
            self._state.know(fold, base)
        except OSError as failure:
            if is_out_of_space(failure.errno):
                raise NoRoom("the node's disk is full", again=True) from failure
            raise S3Failure(f"it cannot be written: {failure.strerror}", again=True) from failure
        finally:
            os.close(fd)
            self._tree.drop(name)

    def _fill(self, fd: int, there: There, update: Callable[[bytes], None]) -> RemoteHead:
        """Go on where a connection broke off for as long as each brings something."""
        key, offset = self._prefix + there.path, 0
        first: RemoteHead | None = None

        def attempt() -> None:
            nonlocal offset, first
            download = self._client.get(key, there.etag, offset)
            try:
                first = first or download.head
                if offset + download.head.size != there.size:
                    raise Changed
                for chunk in download.chunks():
                    self._patience.check()
                    view = memoryview(chunk)
                    while view:
                        view = view[os.write(fd, view) :]
                    update(chunk)
                    offset += len(chunk)
            finally:
                download.close()

        while first is None or offset < there.size:
            before = offset
            try:
                self._patience.call(attempt)
            except S3Failure as failure:
                if not failure.again or offset == before or isinstance(failure, Changed):
                    raise
        return first


def _base64(hexdigest: str) -> str:
    return base64.b64encode(bytes.fromhex(hexdigest)).decode("ascii")


def _mtime_ns(text: str) -> int | None:
    """Of `1700000000.25`; None for anything else, and for a time that no file can have."""
    whole, _, fraction = text.partition(".")
    if not (whole.isascii() and whole.isdigit() and len(whole) <= 11):
        return None
    if fraction and not (fraction.isascii() and fraction.isdigit()):
        return None
    return int(whole) * 10**9 + int(fraction[:9].ljust(9, "0") or "0")
