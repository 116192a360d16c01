"""A tar archive read once from front to back: its entries, with everything that extended headers say of them.

Read here and not by `tarfile`: that guesses where this must refuse (it takes a damaged header inside an
archive for its end, numbers with signs and underscores, any typeflag for a file), keeps every member and
whole extended headers of any size in memory, and recurses once per extended header. Its extraction filters,
bypassed through links time and again (CVE-2025-4138, -4330, -4517), would not be used anyway.
"""

from collections.abc import Iterator

from .decompress import LayerStream
from .tar_headers import (
    BLOCK,
    ZEROS,
    Header,
    Segments,
    check_segments,
    decimal,
    gnu_sparse,
    gnu_sparse_more,
    pairs,
    parse_header,
    pax_records,
    pax_time,
    raw_name,
)
from .unpack_model import BadArchive, TooMuch, UnpackLimits, shown

FILE, HARD_LINK, SYMLINK, CHAR, BLOCK_DEVICE, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"
_OLD_FILE, _CONTIGUOUS = b"\0", b"7"
_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK, _GNU_SPARSE = b"x", b"g", b"L", b"K", b"S"

KINDS = {
    FILE: "a file",
    HARD_LINK: "a hard link",
    SYMLINK: "a symbolic link",
    CHAR: "a character device",
    BLOCK_DEVICE: "a block device",
    DIRECTORY: "a directory",
    FIFO: "a fifo",
}

_XATTR = b"SCHILY.xattr."
_SPARSE = b"GNU.sparse."
# What a header for all that follows may say. A name, a size or a map for all of them is an attack or an error.
_NOT_GLOBAL = (b"path", b"linkpath", b"size")
_WANTED = frozenset({b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime"})
_GLOBAL_WANTED = frozenset({b"uid", b"gid", b"mtime"})
_CHUNK = 1 << 20


class Entry:
    """One thing of the archive. `size` is that of the file it makes, `segments` where its content goes.

    `segments` is None when the content is the file from front to back. `xattrs` are all that were given.
    """

    __slots__ = ("gid", "link", "mode", "mtime_ns", "name", "segments", "size", "type", "uid", "xattrs")

    def __init__(self, header: Header) -> None:
        self.name = header.name
        self.type = header.type
        self.mode = header.mode
        self.uid = header.uid
        self.gid = header.gid
        self.size = header.size
        self.mtime_ns = header.mtime_ns
        self.link = header.link
        self.xattrs: list[tuple[bytes, bytes]] = []
        self.segments: Segments | None = None


class _Extension:
    """What the headers in front of an entry say about it."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()
        self.long_name: bytes | None = None
        self.long_link: bytes | None = None
        self.fields: dict[bytes, bytes] = {}
        self.xattrs: dict[bytes, bytes] = {}
        self.sparse: dict[bytes, bytes] = {}
        self.sparse_numbers: list[int] = []


class TarStream:
    """Iterating gives the entries; `some()` the current one's bytes, and what is left of them is skipped.

    Raises BadArchive and TooMuch. After the last entry the whole stream has been read and `ended` tells
    whether the archive had its end marker. `current` is the raw name of the entry being read, for messages.
    """

    def __init__(self, source: LayerStream, limits: UnpackLimits) -> None:
        self._source = source
        self._limits = limits
        self._globals: dict[bytes, bytes] = {}
        self._left = 0
        self._padding = 0
        self._headers = 0
        self.current: bytes | None = None
        self.ended = False

    def __iter__(self) -> Iterator[Entry]:
        while (entry := self._entry()) is not None:
            yield entry

    def some(self, at_most: int) -> memoryview:
        """The next stored bytes of the current entry, at least one; never asked for more than there are."""
        part = self._source.some(min(at_most, self._left))
        if not part:
            raise BadArchive(f"cut off: {self._left} bytes of its content are missing")
        self._left -= len(part)
        return part

    def _skip(self) -> None:
        while self._left:
            self.some(_CHUNK)
        if self._padding:
            self._source.take(self._padding, "the padding of an entry")
            self._padding = 0

    def _block(self, what: str) -> bytes:
        return self._source.take(BLOCK, what)

    def _begin(self, size: int) -> None:
        self._left = size
        self._padding = -size % BLOCK

    # -- entries

    def _entry(self) -> Entry | None:
        self._skip()
        self.current = None
        extension = _Extension()
        while True:
            first = self._source.some(BLOCK)
            if not first:
                break
            block = bytes(first)
            if len(block) < BLOCK:
                block += self._source.take(BLOCK - len(block), "a header")
            if block == ZEROS:
                self._end_marker()
                break
            self._headers += 1
            if self._headers > 2 * self._limits.entries:
                raise TooMuch(f"more than {2 * self._limits.entries} headers in one layer")
            if not extension.seen:
                self.current = raw_name(block)
            header = parse_header(block)
            if header.type not in (_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK):
                return self._finish(header, block, extension)
            self._extend(header, extension)
        if extension.seen:
            raise BadArchive("cut off: an extended header has no entry behind it")
        return None

    def _end_marker(self) -> None:
        """Two blocks of zeros; behind them may be more of the same and nothing else."""
        size = 0
        while part := self._source.some(_CHUNK):
            if bytes(part).strip(b"\0"):
                raise BadArchive("there is something behind the archive's end")
            size += len(part)
        self.ended = size >= BLOCK

    def _extend(self, header: Header, extension: _Extension) -> None:
        kind = header.type
        if header.size > self._limits.pax_bytes:
            raise TooMuch(f"an extended header of {header.size} bytes, more than {self._limits.pax_bytes}")
        if kind != _PAX_GLOBAL:
            if kind in extension.seen:
                raise BadArchive("two extended headers of one kind for one entry")
            extension.seen.add(kind)
        data = self._source.take(header.size, "an extended header")
        self._source.take(-header.size % BLOCK, "an extended header")
        if kind == _PAX:
            self._pax(data, extension)
        elif kind == _PAX_GLOBAL:
            self._pax_global(data)
        elif kind == _LONG_NAME:
            extension.long_name = self.current = data.rstrip(b"\0")
        else:
            extension.long_link = data.rstrip(b"\0")

    def _pax(self, data: bytes, extension: _Extension) -> None:
        held = 0
        for key, value in pax_records(data):
            if key in _WANTED:
                extension.fields[key] = value
                if key == b"path":
                    self.current = value
            elif key.startswith(_XATTR):
                held += len(key) + len(value)
                if held > self._limits.xattr_bytes:
                    raise TooMuch(f"more than {self._limits.xattr_bytes} bytes of extended attributes")
                extension.xattrs[key[len(_XATTR) :]] = value
            elif key.startswith(_SPARSE):
                self._sparse_record(key[len(_SPARSE) :], value, extension)

    def _sparse_record(self, key: bytes, value: bytes, extension: _Extension) -> None:
        """Format 0.0 repeats `offset` and `numbytes`, 0.1 has `map`, 1.0 has its map before the content."""
        if key in (b"offset", b"numbytes"):
            expected = b"numbytes" if len(extension.sparse_numbers) % 2 else b"offset"
            if key != expected:
                raise BadArchive("its sparse map is out of order")
            self._count_segments(len(extension.sparse_numbers) // 2)
            extension.sparse_numbers.append(decimal(value, "a number of its sparse map"))
        else:
            extension.sparse[key] = value

    def _pax_global(self, data: bytes) -> None:
        for key, value in pax_records(data):
            if key in _NOT_GLOBAL or key.startswith(_SPARSE):
                raise BadArchive(f"a global pax header sets {shown(key)} for all entries behind it")
            if key in _GLOBAL_WANTED:
                self._globals[key] = value

    def _finish(self, header: Header, block: bytes, extension: _Extension) -> Entry:
        entry = Entry(header)
        fields = {**self._globals, **extension.fields} if self._globals else extension.fields
        if extension.long_name is not None:
            entry.name = extension.long_name
        if extension.long_link is not None:
            entry.link = extension.long_link
        if fields:
            _apply(fields, entry)
        if b"name" in extension.sparse:
            entry.name = extension.sparse[b"name"]
        self.current = entry.name
        if extension.xattrs:
            entry.xattrs = list(extension.xattrs.items())
        self._settle_type(entry)
        self._begin(entry.size)
        if header.type == _GNU_SPARSE:
            self._old_sparse(header, block, entry)
        elif extension.sparse or extension.sparse_numbers:
            self._pax_sparse(extension, entry)
        return entry

    def _settle_type(self, entry: Entry) -> None:
        if entry.type == _OLD_FILE and entry.name.endswith(b"/"):
            entry.type = DIRECTORY  # as v7 wrote them
        elif entry.type in (_OLD_FILE, _CONTIGUOUS, _GNU_SPARSE):
            entry.type = FILE
        kind = KINDS.get(entry.type)
        if kind is None:
            raise BadArchive(f"it is of type {entry.type!r}, which has no meaning in an image")
        if entry.type != FILE and entry.size:
            raise BadArchive(f"{kind} with {entry.size} bytes of content")
        if entry.type != DIRECTORY and entry.name.endswith(b"/"):
            raise BadArchive(f"{kind} whose name ends in a slash")

    # -- sparse files

    def _count_segments(self, count: int) -> None:
        if count > self._limits.sparse_segments:
            raise TooMuch(f"its sparse map has more than {self._limits.sparse_segments} segments")

    def _old_sparse(self, header: Header, block: bytes, entry: Entry) -> None:
        if not header.gnu:
            raise BadArchive("it is a sparse file of a format that is not supported")
        segments, more, real = gnu_sparse(block)
        while more:
            found, more = gnu_sparse_more(self._block("a sparse map"))
            segments += found
            self._count_segments(len(segments))
        self._set_segments(entry, segments, entry.size, real)

    def _pax_sparse(self, extension: _Extension, entry: Entry) -> None:
        said = extension.sparse
        if entry.type != FILE:
            raise BadArchive("it has a sparse map and is no file")
        if said.get(b"major", b"0") not in (b"0", b"1") or said.get(b"minor", b"0") not in (b"0", b"1"):
            raise BadArchive("its sparse map is of an unknown version")
        stored = entry.size
        if said.get(b"major") == b"1":
            numbers, used = self._map_in_content()
            stored -= used
            real = said.get(b"realsize", b"")
        elif b"map" in said:
            numbers = [decimal(part, "a number of its sparse map") for part in _split(said[b"map"])]
            real = said.get(b"size", b"")
        else:
            numbers = extension.sparse_numbers
            real = said.get(b"size", b"")
        self._set_segments(entry, pairs(numbers), stored, decimal(real, "the real size of a sparse file"))

    def _map_in_content(self) -> tuple[list[int], int]:
        """Decimal numbers, one a line, the first their count of pairs, filled up to whole blocks."""
        numbers: list[int] = []
        wanted = 1
        rest = b""
        used = 0
        while len(numbers) < wanted:
            if self._left < BLOCK:
                raise BadArchive("its sparse map is longer than its content")
            self._left -= BLOCK
            used += BLOCK
            *lines, rest = (rest + self._block("a sparse map")).split(b"\n")
            if len(rest) > BLOCK:
                raise BadArchive("its sparse map has a line without an end")
            for line in lines:
                if len(numbers) == wanted:
                    break
                numbers.append(decimal(line, "a number of its sparse map"))
                if len(numbers) == 1:
                    self._count_segments(numbers[0])
                    wanted = 1 + 2 * numbers[0]
        return numbers[1:], used

    def _set_segments(self, entry: Entry, segments: Segments, stored: int, real: int) -> None:
        check_segments(segments, stored, real, self._limits.sparse_segments)
        entry.segments = segments
        entry.size = real


def _split(text: bytes) -> list[bytes]:
    return text.split(b",") if text else []


def _apply(fields: dict[bytes, bytes], entry: Entry) -> None:
    """An empty value takes back what a global header said (pax(1)); then the entry's own header counts."""
    for key, value in fields.items():
        if not value:
            continue
        if key == b"path":
            entry.name = value
        elif key == b"linkpath":
            entry.link = value
        elif key == b"size":
            entry.size = decimal(value, "the size in its pax header")
        elif key == b"mtime":
            entry.mtime_ns = pax_time(value, "mtime")
        elif key == b"uid":
            entry.uid = decimal(value, "the uid in its pax header")
        else:
            entry.gid = decimal(value, "the gid in its pax header")
