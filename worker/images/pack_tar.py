"""The headers of a tar archive (POSIX.1-2017 pax(1)): equal members give equal bytes, on any machine.

Plain ustar where it is enough. A pax header goes before what it has no room for: long or non-ASCII names,
extended attributes (`SCHILY.xattr.`, star(1), as docker and bsdtar read them), times that are no whole second,
large numbers, holes (GNU sparse format 1.0). Owners have numbers and no names.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .tar_headers import BLOCK, ZEROS
from .tar_stream import DIRECTORY, FILE, HARD_LINK, SYMLINK

__all__ = ["DIRECTORY", "END", "FILE", "HARD_LINK", "SYMLINK", "Member", "header", "padding"]

# Two blocks of zeros end an archive.
END = ZEROS * 2

_PAX_NAME = b"././@PaxHeader"
_NAME, _LINK = 100, 100
_MAX_SIZE = 8**11 - 1
_MAX_ID = 8**7 - 1
_NS = 1_000_000_000
_XATTR = b"SCHILY.xattr."

Segments = Sequence[tuple[int, int]]


class Member(NamedTuple):
    """`name` has no slash at its end. `segments` are a file's pieces between holes: (offset, length)."""

    name: bytes
    kind: bytes
    mode: int
    mtime_ns: int
    size: int = 0
    link: bytes = b""
    xattrs: Sequence[tuple[bytes, bytes]] = ()
    uid: int = 0
    gid: int = 0
    segments: Segments | None = None


def header(member: Member) -> bytes:
    """Everything that stands before the member's content: whole blocks.

    ValueError for an attribute whose name pax cannot hold.
    """
    if member.segments is not None:
        return _sparse(member, member.segments)
    return _headers(member, member.size, ())


def padding(size: int) -> bytes:
    """What fills the content's last block."""
    return bytes(-size % BLOCK)


def _sparse(member: Member, segments: Segments) -> bytes:
    """GNU tar manual, "Storing Sparse Files": the map is the content's beginning, filled up to a block."""
    pieces = [*segments]
    end = sum(pieces[-1]) if pieces else 0
    if end < member.size:
        pieces.append((member.size, 0))  # as GNU tar does, so that the file ends where it shall
    numbers = [len(pieces), *(number for piece in pieces for number in piece)]
    where = b"".join(b"%d\n" % number for number in numbers)
    where += padding(len(where))
    stored = len(where) + sum(length for _, length in pieces)
    parent, slash, name = member.name.rpartition(b"/")
    records = (
        (b"GNU.sparse.major", b"1"),
        (b"GNU.sparse.minor", b"0"),
        (b"GNU.sparse.name", member.name),
        (b"GNU.sparse.realsize", b"%d" % member.size),
    )
    renamed = member._replace(name=parent + slash + b"GNUSparseFile.0/" + name)
    return _headers(renamed, stored, records) + where


def _headers(member: Member, size: int, extra: Sequence[tuple[bytes, bytes]]) -> bytes:
    name = member.name + b"/" if member.kind == DIRECTORY else member.name
    records = dict(extra)
    if len(name) > _NAME or not name.isascii():
        records[b"path"] = name
    if len(member.link) > _LINK or not member.link.isascii():
        records[b"linkpath"] = member.link
    if size > _MAX_SIZE:
        records[b"size"] = b"%d" % size
    for key, number in ((b"uid", member.uid), (b"gid", member.gid)):
        if number > _MAX_ID:
            records[key] = b"%d" % number
    seconds, ns = divmod(member.mtime_ns, _NS)
    if ns or not 0 <= seconds <= _MAX_SIZE:
        records[b"mtime"] = _time(member.mtime_ns)
    for key, value in member.xattrs:
        if b"=" in key:
            raise ValueError("the name of an extended attribute has `=`, which no archive can hold")
        records[_XATTR + key] = value
    block = _block(
        _plain(name)[:_NAME],
        member.kind,
        member.mode,
        uid=member.uid if member.uid <= _MAX_ID else 0,
        gid=member.gid if member.gid <= _MAX_ID else 0,
        size=size if size <= _MAX_SIZE else 0,
        mtime=min(max(seconds, 0), _MAX_SIZE),
        link=_plain(member.link)[:_LINK],
    )
    if not records:
        return block
    data = b"".join(_record(key, records[key]) for key in sorted(records))
    pax = _block(_PAX_NAME, b"x", 0o644, uid=0, gid=0, size=len(data), mtime=0, link=b"")
    return pax + data + padding(len(data)) + block


def _plain(name: bytes) -> bytes:
    """What a reader without pax sees in the place of a name that is not ASCII."""
    return name if name.isascii() else bytes(byte if byte < 0x80 else ord("?") for byte in name)


def _record(key: bytes, value: bytes) -> bytes:
    """`LENGTH KEY=VALUE\\n`, where LENGTH counts itself."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def _time(ns: int) -> bytes:
    seconds, fraction = divmod(abs(ns), _NS)
    text = f"{seconds}.{fraction:09d}".rstrip("0").rstrip(".")
    return f"{'-' if ns < 0 else ''}{text}".encode("ascii")


def _block(
    name: bytes, kind: bytes, mode: int, *, uid: int, gid: int, size: int, mtime: int, link: bytes
) -> bytes:
    parts = (
        name.ljust(100, b"\0"),
        b"%07o\0%07o\0%07o\0%011o\0%011o\0" % (mode, uid, gid, size, mtime),
        b" " * 8,
        kind,
        link.ljust(100, b"\0"),
        b"ustar\x0000",
        bytes(64),
        b"%07o\0%07o\0" % (0, 0),
        bytes(155 + 12),
    )
    block = b"".join(parts)
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def zeros(size: int, piece: int = 1 << 20) -> Iterator[bytes]:
    """So many bytes of nothing, in pieces."""
    while size:
        part = min(size, piece)
        yield bytes(part)
        size -= part
