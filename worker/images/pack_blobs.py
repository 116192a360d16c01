"""Writing a layer: compressed, hashed on both sides.

gzip is the default, as everything that reads images reads it. Its bytes are zlib's, and not every zlib makes the
same of the same (zlib-ng and Apple's do not): `usual_zlib` tells whether this one is the usual one, so that
whoever relies on equal digests is told. The header is written here, as zlib puts the system's number into it.
"""

import hashlib
import struct
import sys
import zlib
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import msgspec

if sys.version_info >= (3, 14):
    from compression.zstd import ZstdCompressor
else:
    from backports.zstd import ZstdCompressor

LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"

GZIP, ZSTD, NONE = "gzip", "zstd", "none"
COMPRESSIONS = (GZIP, ZSTD, NONE)
_SUFFIX = {GZIP: "+gzip", ZSTD: "+zstd", NONE: ""}
# Measured on a Python installation (181 MB): see docs/images.md, "Packing".
_GZIP_LEVEL = 6
_ZSTD_LEVEL = 3
# RFC 1952: no name, no time, system 255 (unknown).
_GZIP_HEAD = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
_PROOF = "fe53e0262fb06718"


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """A blob on disk. `diff_id` is the digest of what it unpacks to."""

    path: Path
    digest: str
    size: int
    diff_id: str
    media_type: str


class LayerWriter:
    """Takes a layer's uncompressed bytes; `finish` tells what became of them. Closes nothing."""

    def __init__(self, out: BinaryIO, compression: str) -> None:
        self._out = out
        self._compression = compression
        self._encoder = _ENCODERS[compression]()
        self._inner: Any = hashlib.sha256()
        self._outer: Any = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes | memoryview) -> None:
        self._inner.update(data)
        self._put(self._encoder.compress(data))

    def _put(self, data: bytes | memoryview) -> None:
        if data:
            self._outer.update(data)
            self._out.write(data)
            self._size += len(data)

    def finish(self, path: Path) -> Layer:
        self._put(self._encoder.flush())
        return Layer(
            path=path,
            digest=f"sha256:{self._outer.hexdigest()}",
            size=self._size,
            diff_id=f"sha256:{self._inner.hexdigest()}",
            media_type=LAYER_TYPE + _SUFFIX[self._compression],
        )


class _Encoder(Protocol):
    def compress(self, data: bytes | memoryview) -> bytes | memoryview: ...

    def flush(self) -> bytes: ...


class _Gzip:
    def __init__(self) -> None:
        self._deflate = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
        self._crc = self._size = 0
        self._head = _GZIP_HEAD

    def compress(self, data: bytes | memoryview) -> bytes:
        self._crc = zlib.crc32(data, self._crc)
        self._size += len(data)
        head, self._head = self._head, b""
        return head + self._deflate.compress(data)

    def flush(self) -> bytes:
        return self._head + self._deflate.flush() + struct.pack("<II", self._crc, self._size & 0xFFFFFFFF)


class _Zstd:
    def __init__(self) -> None:
        self._zstd = ZstdCompressor(level=_ZSTD_LEVEL)

    def compress(self, data: bytes | memoryview) -> bytes:
        return self._zstd.compress(data)

    def flush(self) -> bytes:
        return self._zstd.flush()


class _Plain:
    def compress(self, data: bytes | memoryview) -> bytes | memoryview:
        return data

    def flush(self) -> bytes:
        return b""


_ENCODERS: dict[str, type[_Encoder]] = {GZIP: _Gzip, ZSTD: _Zstd, NONE: _Plain}


@cache
def usual_zlib() -> bool:
    """Whether this zlib compresses a known text to the same bytes as zlib 1.2.13."""
    seeds = (hashlib.sha256(str(number).encode()).digest() for number in range(512))
    text = b"".join(seed[: 1 + seed[0] % 24] * (1 + seed[1] % 5) for seed in seeds)
    deflate = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    made = deflate.compress(text * 8) + deflate.flush()
    return hashlib.sha256(made).hexdigest().startswith(_PROOF)
