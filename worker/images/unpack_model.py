"""What unpacking is given, what bounds it, what it reports and how it fails.

What a layer may do wrong ends as one of these, each naming the layer and the entry:

PullFailed            the archive is damaged, ambiguous, or wants what no image may want
├── UnpackCancelled   nobody wants the result any more
└── Mismatch          the layer is not the one that the image's config names
ResourceExhausted     it wants more bytes, entries or disk than it may have
"""

from pathlib import Path

import msgspec

from worker.errors import PullFailed
from worker.platform.treecopy import printable

from .space import RESERVE_BYTES

# An entry's name in a message; an error is cut at 4 KiB as a whole (schemas.errors).
_SHOWN = 300


class BadArchive(Exception):
    """Raised by the parsers, without a place; `unpack_layers` says where and raises PullFailed."""


class TooMuch(Exception):
    """Raised where a limit is passed; `unpack_layers` says where and raises ResourceExhausted."""


class UnpackCancelled(PullFailed):
    """`cancelled()` said so."""


class Mismatch(PullFailed):
    """The uncompressed bytes have another digest than the image's config says."""


class LayerFile(msgspec.Struct, frozen=True, kw_only=True):
    """A layer's blob on disk. `diff_id` is the digest of its uncompressed bytes, from the image's config.

    With a `diff_id` the bytes are proven to be those that the image's author made, so a wrong media type and
    a missing end marker, which other runtimes accept, are accepted too; without one they are refused.
    """

    path: Path
    media_type: str
    diff_id: str | None = None


class UnpackLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one unpacking, all layers together unless said otherwise.

    `bytes` bounds the layers' uncompressed bytes, and again the sum of the files' sizes with holes counted,
    as whoever reads the tree later reads the holes. `ratio` is uncompressed to compressed bytes of one layer
    and counts from `ratio_floor` bytes on. `pax_bytes` bounds one extended header or long name,
    `xattr_bytes` the attributes of one entry, names included. `window_bytes` bounds the memory that a zstd
    frame may ask for: levels to 19 want 8 MiB at most, `--ultra -22` all of 128. `reserve_bytes` stay free
    on the disk.
    """

    bytes: int = 128 << 30
    entries: int = 2_000_000
    ratio: int = 200
    ratio_floor: int = 256 << 20
    path_bytes: int = 4096
    name_bytes: int = 255
    depth: int = 256
    link_bytes: int = 4095
    pax_bytes: int = 1 << 20
    xattr_bytes: int = 512 << 10
    sparse_segments: int = 100_000
    window_bytes: int = 128 << 20
    reserve_bytes: int = RESERVE_BYTES


class UnpackReport(msgspec.Struct, frozen=True, kw_only=True):
    """`bytes` are the files' own, with holes. `diff_ids` are the layers', computed.

    `skipped` counts entries that were left out (devices, fifos, leavings of AUFS); `notes` name the first of
    them and of whatever else was changed on the way in.
    """

    layers: int
    entries: int
    files: int
    directories: int
    symlinks: int
    hard_links: int
    whiteouts: int
    bytes: int
    skipped: int
    notes: tuple[str, ...]
    diff_ids: tuple[str, ...]


class Notes:
    """Remarks for the report, the first of each kind in words and the rest as a number."""

    _EACH = 8

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._said: list[str] = []

    def add(self, kind: str, what: str) -> None:
        count = self._counts[kind] = self._counts.get(kind, 0) + 1
        if count <= self._EACH:
            self._said.append(f"{what}: {kind}")

    def all(self) -> tuple[str, ...]:
        more = [f"{n - self._EACH} more: {kind}" for kind, n in self._counts.items() if n > self._EACH]
        return (*self._said, *more)


def shown(name: bytes | str) -> str:
    """An entry's name for a message: printable, quoted, cut."""
    text = printable(name if isinstance(name, str) else name.decode("utf-8", "surrogateescape"))
    return f"'{text[:_SHOWN]}' …" if len(text) > _SHOWN else f"'{text}'"
