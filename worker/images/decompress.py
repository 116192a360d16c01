"""A layer's blob as its uncompressed bytes: hashed, counted, bounded, a chunk at a time.

What the blob is, is told by its first bytes (gzip RFC 1952, zstd RFC 8878, else a plain tar); the media type
must be a layer's, and must agree unless the caller can prove the content otherwise. A gzip blob may have
several members (RFC 1952 2.2) and zeros behind the last, a zstd blob several frames and skippable ones
(RFC 8878 3.1): eStargz and zstd:chunked layers are made so. Anything else behind the end is refused.
"""

import hashlib
import os
import stat
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from worker.platform.treecopy import OPEN_FILE

from .unpack_model import BadArchive, TooMuch, UnpackLimits, shown

if sys.version_info >= (3, 14):
    from compression.zstd import DecompressionParameter, ZstdDecompressor, ZstdError
else:
    from backports.zstd import DecompressionParameter, ZstdDecompressor, ZstdError

_INPUT = 128 << 10
_OUTPUT = 1 << 20
_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_SKIPPABLE = b"\x2a\x4d\x18"
_OTHERS = {b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"PK\x03\x04": "zip", b"\x04\x22\x4d\x18": "lz4"}

_HASHES = ("sha256", "sha512")

# image-spec 1.1 media-types.md; distribution's docker schema 2.
_TYPES = {
    "application/vnd.oci.image.layer.v1.tar": "tar",
    "application/vnd.oci.image.layer.v1.tar+gzip": "gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd": "zstd",
    "application/vnd.oci.image.layer.nondistributable.v1.tar": "tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": "gzip",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd": "zstd",
    "application/vnd.docker.image.rootfs.diff.tar": "tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip": "gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd": "zstd",
    "application/vnd.docker.image.rootfs.foreign.diff.tar": "tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip": "gzip",
}


def compression_of(media_type: str) -> str:
    """`tar`, `gzip` or `zstd`; BadArchive when it is no layer's type."""
    kind = _TYPES.get(media_type)
    if kind is None:
        raise BadArchive(f"{shown(media_type)} is no layer that can be unpacked")
    return kind


def detect(head: bytes) -> str:
    """The same from a blob's first bytes. Whether a `tar` is one is for its parser to say."""
    if head.startswith(_GZIP):
        return "gzip"
    if head.startswith(_ZSTD) or (head[1:4] == _SKIPPABLE and head[:1] and head[0] & 0xF0 == 0x50):
        return "zstd"
    for magic, name in _OTHERS.items():
        if head.startswith(magic):
            raise BadArchive(f"compressed with {name}, which is no layer format")
    return "tar"


class LayerStream:
    """The bytes of one layer in order. Closes nothing; raises BadArchive, TooMuch, and what `check` raises.

    `check` is called for every chunk. `spend` is told how many bytes came out and raises TooMuch when it were
    too many for the whole image. `digest` is right once the stream has been read to its end.
    """

    def __init__(
        self,
        file: BinaryIO,
        limits: UnpackLimits,
        check: Callable[[], None],
        spend: Callable[[int], None],
        algorithm: str = "sha256",
    ) -> None:
        if algorithm not in _HASHES:
            raise BadArchive(f"its diff_id uses {shown(algorithm)}, which is not supported")
        self._file = file
        self._limits = limits
        self._check = check
        self._spend = spend
        self._hash = hashlib.new(algorithm)
        self._compressed = 0
        self._total = 0
        head = self._read()
        self.compression = detect(head)
        self._chunks = self._produce(head)
        self._chunk = memoryview(b"")

    @property
    def digest(self) -> str:
        return f"{self._hash.name}:{self._hash.hexdigest()}"

    def some(self, at_most: int) -> memoryview:
        """The next bytes, at least one and at most so many; empty at the end."""
        if not self._chunk:
            self._chunk = self._next()
        part = self._chunk[:at_most]
        self._chunk = self._chunk[at_most:]
        return part

    def take(self, size: int, what: str) -> bytes:
        """Exactly so many bytes; BadArchive naming `what` when the stream ends before."""
        part = self.some(size)
        if len(part) == size:
            return bytes(part)
        parts = bytearray(part)
        while len(parts) < size:
            part = self.some(size - len(parts))
            if not part:
                raise BadArchive(f"cut off: it ends inside {what}")
            parts += part
        return bytes(parts)

    def _next(self) -> memoryview:
        for chunk in self._chunks:
            self._check()
            self._total += len(chunk)
            self._spend(len(chunk))
            if self._total > self._limits.ratio_floor and self._total > self._limits.ratio * self._compressed:
                raise TooMuch(
                    f"{self._compressed} bytes unpack to more than {self._total}, "
                    f"past the limit of {self._limits.ratio} times: a decompression bomb"
                )
            self._hash.update(chunk)
            return memoryview(chunk)
        return memoryview(b"")

    def _read(self) -> bytes:
        data = self._file.read(_INPUT)
        self._compressed += len(data)
        return data

    def _produce(self, head: bytes) -> Iterator[bytes]:
        if self.compression == "gzip":
            return self._frames(head, _Gzip)
        if self.compression == "zstd":
            return self._frames(head, lambda: _Zstd(self._limits.window_bytes))
        return self._plain(head)

    def _plain(self, data: bytes) -> Iterator[bytes]:
        while data:
            yield data
            data = self._read()

    def _frames(self, data: bytes, start: Callable[[], "_Decoder"]) -> Iterator[bytes]:
        """One decoder after the other, for as long as there are bytes."""
        count = 0
        while data:
            count += 1
            if count > self._limits.entries:
                raise TooMuch(f"more than {self._limits.entries} compressed frames in one layer")
            decoder = start()
            while True:
                yield from self._decode(decoder, data, count)
                if decoder.eof:
                    break
                self._check()
                data = self._read()
                if not data:
                    raise BadArchive(f"cut off: its {self.compression} stream has no end")
            data = self._rest(decoder.unused_data)

    def _decode(self, decoder: "_Decoder", data: bytes, count: int) -> Iterator[bytes]:
        try:
            yield from decoder.pump(data)
        except (zlib.error, ZstdError) as failure:
            where = "damaged" if count == 1 else f"damaged, or has something else behind frame {count - 1}"
            raise BadArchive(f"its {self.compression} stream is {where}: {failure}") from failure

    def _rest(self, data: bytes) -> bytes:
        """What follows a frame: the next one's bytes, or nothing. gzip(1) pads tapes with zeros."""
        data = data or self._read()
        while self.compression == "gzip" and data[:1] == b"\0":
            if data.strip(b"\0"):
                raise BadArchive("its gzip stream is followed by something that is no gzip stream")
            self._check()
            data = self._read()
            if data[:1] not in (b"", b"\0"):
                raise BadArchive("its gzip stream is followed by something that is no gzip stream")
        return data


class _Decoder(Protocol):
    """One gzip member or zstd frame."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def pump(self, data: bytes) -> Iterator[bytes]:
        """Everything that these bytes decompress to, in chunks of at most 1 MiB."""


class _Gzip:
    def __init__(self) -> None:
        # 16 + 15: a gzip header and its checksums are demanded (zlib.h, inflateInit2).
        self._z = zlib.decompressobj(31)

    @property
    def eof(self) -> bool:
        return self._z.eof

    @property
    def unused_data(self) -> bytes:
        return self._z.unused_data

    def pump(self, data: bytes) -> Iterator[bytes]:
        while True:
            out = self._z.decompress(data, _OUTPUT)
            if out:
                yield out
            data = self._z.unconsumed_tail
            # A full chunk may have left more behind inside, without any input left.
            if self._z.eof or (not data and len(out) < _OUTPUT):
                return


class _Zstd:
    def __init__(self, window_bytes: int) -> None:
        options: dict[Any, int] = {DecompressionParameter.window_log_max: window_bytes.bit_length() - 1}
        self._z = ZstdDecompressor(options=options)

    @property
    def eof(self) -> bool:
        return self._z.eof

    @property
    def unused_data(self) -> bytes:
        return self._z.unused_data

    def pump(self, data: bytes) -> Iterator[bytes]:
        while True:
            out = self._z.decompress(data, _OUTPUT)
            if out:
                yield out
            data = b""
            if self._z.eof or self._z.needs_input:
                return


def open_blob(path: Path) -> BinaryIO:
    """A blob for reading, unbuffered. OSError for a link, BadArchive for anything else that is no file."""
    fd = os.open(path, OPEN_FILE)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise BadArchive("its blob is no file")
    return os.fdopen(fd, "rb", buffering=0)
