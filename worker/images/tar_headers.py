"""The blocks of a tar archive as values: pure, strict, bounded.

Sources: POSIX.1-2017 pax(1) (ustar and pax), the GNU tar manual "Basic Tar Format", "Storing Sparse Files"
and "Extended Numbers", star(1) for the `tar\\0` trailer. Where parsers are known to disagree about a header
(a number with signs or underscores, a directory with content, a record that does not end where it says) it
is refused rather than read one way: two readings of one archive are how one smuggles files past the other.
"""

import re
import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from .unpack_model import BadArchive, TooMuch

BLOCK = 512
ZEROS = bytes(BLOCK)

_FIELDS = struct.Struct("100s8s8s8s12s12s8s1s100s6s2s32s32s8s8s155s12s")
_CHECKSUM = slice(148, 156)
# `sum` over the checksum field read as eight spaces.
_SPACES = 8 * 0x20

_MAX = 2**63 - 1
# Times outside of these are brought to the nearer one: file systems end at 2^34 s at most (ext4).
_EARLIEST_S, _LATEST_S = -(2**36), 2**36
_NS = 1_000_000_000
_PAX_TIME = re.compile(rb"(-?)(\d{1,20})(?:\.(\d{0,30}))?")

Segments = list[tuple[int, int]]


class Header(NamedTuple):
    """One ustar, GNU or v7 header. `size` is that of the content which follows."""

    name: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    type: bytes
    link: bytes
    gnu: bool


def parse_header(block: bytes) -> Header:
    """Raises BadArchive. The checksum is the sum of unsigned bytes (POSIX)."""
    fields = _FIELDS.unpack(block)
    name, mode, uid, gid, size, mtime, checksum, kind, link, magic, version = fields[:11]
    prefix = fields[15]
    if number(checksum, "checksum") != sum(block) - sum(block[_CHECKSUM]) + _SPACES:
        raise BadArchive("the checksum of its header is wrong")
    name = _text(name)
    if magic == b"ustar\0":
        if block[508:] == b"tar\0":
            prefix = prefix[:131]
        prefix = _text(prefix)
        if prefix:
            name = prefix + b"/" + name
    return Header(
        name=name,
        mode=number(mode, "mode") & 0o7777,
        uid=number(uid, "uid"),
        gid=number(gid, "gid"),
        size=number(size, "size"),
        mtime_ns=clamp_s(number(mtime, "mtime", True)) * _NS,
        type=kind,
        link=_text(link),
        gnu=magic + version == b"ustar  \0",
    )


def raw_name(block: bytes) -> bytes:
    """The name field of a header that may be damaged, for messages."""
    return _text(block[:100])


def _text(field: bytes) -> bytes:
    end = field.find(b"\0")
    return field if end < 0 else field[:end]


@lru_cache(maxsize=4096)  # an archive says the same few modes, owners and times again and again
def number(field: bytes, what: str, signed: bool = False) -> int:
    """Octal digits between spaces and NULs, nothing at all for 0, or base-256 (first byte 0x80, negative 0xFF).

    BadArchive when it is neither, below 0 where it may not be, or above 2^63 - 1.
    """
    if field[0] == 0x80:
        value = int.from_bytes(field[1:], "big")
    elif field[0] == 0xFF:
        value = int.from_bytes(field, "big", signed=True)
    else:
        digits = field.strip(b" \0")
        if not digits:
            return 0
        if not digits.isdigit() or b"8" in digits or b"9" in digits:
            raise BadArchive(f"the {what} in its header is no number: {field!r}")
        value = int(digits, 8)
    if value > _MAX or value < -_MAX or (value < 0 and not signed):
        raise BadArchive(f"the {what} in its header is out of range: {value}")
    return value


def clamp_s(seconds: int) -> int:
    return min(max(seconds, _EARLIEST_S), _LATEST_S)


def decimal(text: bytes, what: str) -> int:
    """A decimal number of pax and of sparse maps, at most 2^63 - 1."""
    if not text.isdigit() or len(text) > 19 or int(text) > _MAX:
        raise BadArchive(f"{what} is no number: {text[:40]!r}")
    return int(text)


def pax_records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """`LENGTH KEY=VALUE\\n` one after the other; LENGTH counts the whole record."""
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 9)
        length = data[at : max(space, at)]
        if not length.isdigit():
            raise BadArchive("a record of its pax header has no length")
        end = at + int(length)
        if end > len(data) or end - 1 <= space or data[end - 1 : end] != b"\n":
            raise BadArchive("a record of its pax header does not end where it says")
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not equals or not key:
            raise BadArchive("a record of its pax header has no key")
        yield key, value
        at = end


def pax_time(text: bytes, key: str) -> int:
    """Seconds with a decimal fraction as nanoseconds, rounded towards the past (pax(1))."""
    found = _PAX_TIME.fullmatch(text)
    if found is None:
        raise BadArchive(f"{key} in its pax header is no time: {text[:40]!r}")
    sign, whole, fraction = found.groups()
    fraction = fraction or b""
    ns = int(whole) * _NS + int(fraction[:9].ljust(9, b"0"))
    if sign:
        ns = -ns - (1 if fraction[9:].strip(b"0") else 0)
    return min(max(ns, _EARLIEST_S * _NS), _LATEST_S * _NS)


def gnu_sparse(block: bytes) -> tuple[Segments, bool, int]:
    """The segments in an old GNU sparse header, whether a block of more follows, and the file's real size."""
    return _old_segments(block, 386, 4), block[482] != 0, number(block[483:495], "real size")


def gnu_sparse_more(block: bytes) -> tuple[Segments, bool]:
    """The same from a block that continues it."""
    return _old_segments(block, 0, 21), block[504] != 0


def _old_segments(block: bytes, at: int, count: int) -> Segments:
    found = []
    for start in range(at, at + 24 * count, 24):
        entry = block[start : start + 24]
        if not entry.strip(b"\0 "):
            break  # the list ends early
        found.append((number(entry[:12], "sparse offset"), number(entry[12:], "sparse length")))
    return found


def pairs(numbers: list[int]) -> Segments:
    """Offset, length, offset, length … as segments."""
    if len(numbers) % 2:
        raise BadArchive("its sparse map has an offset without a length")
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def check_segments(segments: Segments, stored: int, size: int, most: int) -> None:
    """In order, apart, inside the file, and as long as what is stored; BadArchive, TooMuch."""
    if len(segments) > most:
        raise TooMuch(f"its sparse map has more than {most} segments")
    end = total = 0
    for offset, length in segments:
        if offset < end or offset + length > size:
            raise BadArchive("its sparse map is out of order or leaves the file")
        end = offset + length
        total += length
    if total != stored:
        raise BadArchive(f"its sparse map stands for {total} bytes, and {stored} are stored")
