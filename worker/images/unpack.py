"""Unpacking the layers of an OCI or docker image into one tree, whatever the archives hold.

Nothing is written outside of `dest`, whatever an archive says: see `unpack_tree` for how, `tar_stream` and
`tar_headers` for what is refused before. What happens to an entry:

    kept        files, holes, directories, links as they are, hard links to files of this or a lower layer,
                modes, times to the nanosecond, extended attributes of the user
    as asked    setuid, setgid, sticky on files, `security.capability` (`keep_setuid`); owners (`keep_owners`,
                else everything is the worker's own; ignored unless it is root)
    changed     `/` in front of a name falls away; a worker that is not root gets the right to read what it
                owns (`u+r`, `u+rx` for directories), as else it could neither list nor copy its own image
    left out    devices, fifos, leavings of AUFS; other extended attributes: noted in the report
    refused     everything else, naming the entry

After any exception `dest` holds half a tree, to be deleted with `trees.remove_tree`. Nothing is synced.
"""

import errno
import os
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from worker.errors import ContractError, PullFailed, ResourceExhausted, is_out_of_space
from worker.platform.descent import OPEN_DIRECTORY
from worker.platform.xattrs import VOLATILE, Xattrs, system_xattrs

from .decompress import LayerStream, compression_of, open_blob
from .name_index import NameIndex, fold
from .tar_stream import DIRECTORY, FILE, HARD_LINK, KINDS, SYMLINK, Entry, TarStream
from .unpack_model import (
    BadArchive,
    LayerFile,
    Mismatch,
    Notes,
    TooMuch,
    UnpackCancelled,
    UnpackLimits,
    UnpackReport,
    shown,
)
from .unpack_tree import Metadata, TreeWriter
from .whiteouts import PREFIX, Meaning, Place, components, place_of

__all__ = ["LayerFile", "Mismatch", "UnpackCancelled", "UnpackLimits", "UnpackReport", "unpack_layers"]

_LIMITS = UnpackLimits()
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_CAPABILITY = "security.capability"
_KEPT_XATTRS = ("user.", "com.apple.")
# The kernel's "leave it as it is" (chown(2)), so no owner.
_NO_ID = 2**32 - 1
# How much is written between two looks at the disk.
_LOOK_BYTES = 16 << 20
_LOOK_ENTRIES = 512


def _never() -> bool:
    return False


def unpack_layers(
    layers: Sequence[LayerFile],
    dest: Path,
    *,
    limits: UnpackLimits = _LIMITS,
    keep_setuid: bool = False,
    keep_owners: bool = False,
    case_insensitive: bool = False,
    cancelled: Callable[[], bool] = _never,
    xattrs: Xattrs | None = None,
) -> UnpackReport:
    """Unpack the layers, lowest first, into `dest`: an empty directory in which nobody else works.

    Blocking. `case_insensitive` when the file system below is (APFS): two names that it takes for one are
    refused, naming both, and so are names that are no UTF-8. The tree is what was asked for once this
    returns: digests are checked, directories have their modes and times.

    Raises PullFailed (UnpackCancelled, Mismatch) and ResourceExhausted, see `unpack_model`.
    """
    with ExitStack() as held:
        try:
            top = os.open(dest, OPEN_DIRECTORY)
            held.callback(os.close, top)
            with os.scandir(top) as entries:
                if any(entries):
                    raise PullFailed(f"{shown(str(dest))} is not empty, so no image is unpacked into it")
            work = _Unpacking(
                top,
                limits,
                xattrs or system_xattrs(),
                cancelled,
                setuid=keep_setuid,
                owners=keep_owners and os.geteuid() == 0,
                folding=case_insensitive,
            )
        except OSError as failure:
            raise _os_failed(f"cannot unpack into {shown(str(dest))}", failure) from failure
        held.callback(work.close)
        return work.run(layers)


class _Unpacking:
    """One call of `unpack_layers`."""

    def __init__(
        self,
        top: int,
        limits: UnpackLimits,
        xattrs: Xattrs,
        cancelled: Callable[[], bool],
        *,
        setuid: bool,
        owners: bool,
        folding: bool,
    ) -> None:
        self._top = top
        self._limits = limits
        self._cancelled = cancelled
        self._setuid = setuid
        self._owners = owners
        self._readable = 0 if os.geteuid() == 0 else 0o400
        self._folding = folding
        self._index: NameIndex | None = None
        self._notes = Notes()
        self._where = "layer"
        self._tar: TarStream | None = None
        self._entries = self._files = self._directories = self._symlinks = 0
        self._hard_links = self._whiteouts = self._skipped = 0
        self._bytes = self._unpacked = 0
        self._unlooked_bytes = self._unlooked_entries = 0
        self._tree = TreeWriter(top, limits, xattrs, self._check, folding=folding)

    def close(self) -> None:
        self._tree.close()
        if self._index is not None:
            self._index.close()

    def run(self, layers: Sequence[LayerFile]) -> UnpackReport:
        digests = []
        for number, layer in enumerate(layers):
            self._tar = None
            self._where = f"layer {number + 1} of {len(layers)}"
            with _Told(self):
                digests.append(self._layer(number, layer))
        with _Told(self):
            self._tree.finish()
        return UnpackReport(
            layers=len(layers),
            entries=self._entries,
            files=self._files,
            directories=self._directories,
            symlinks=self._symlinks,
            hard_links=self._hard_links,
            whiteouts=self._whiteouts,
            bytes=self._bytes,
            skipped=self._skipped,
            notes=self._notes.all(),
            diff_ids=tuple(digests),
        )

    def where(self) -> str:
        """The layer, and the entry that is being read."""
        if self._tar is None or self._tar.current is None:
            return self._where
        return f"{self._where}, {shown(self._tar.current)}"

    def _check(self) -> None:
        if self._cancelled():
            raise UnpackCancelled("unpacking was called off")

    # -- layers

    def _layer(self, number: int, layer: LayerFile) -> str:
        if self._index is None and (number or self._folding):
            self._index = NameIndex(fold if self._folding else None)
        self._tree.begin(number, self._index)
        said = compression_of(layer.media_type)
        with open_blob(layer.path) as blob:
            algorithm = layer.diff_id.partition(":")[0] if layer.diff_id else "sha256"
            source = LayerStream(blob, self._limits, self._check, self._spend, algorithm)
            if source.compression != said:
                self._tell_unless_proven(layer, f"its media type says {said}, and it is {source.compression}")
            tar = self._tar = TarStream(source, self._limits)
            for entry in tar:
                self._check()
                self._count()
                self._apply(entry, tar)
        if layer.diff_id is not None and layer.diff_id != source.digest:
            raise Mismatch(
                f"{self._where}: its content is {source.digest}, "
                f"and the image's config says {shown(layer.diff_id)}"
            )
        if not tar.ended:
            self._tell_unless_proven(layer, "cut off: it has no end marker")
        return source.digest

    def _tell_unless_proven(self, layer: LayerFile, what: str) -> None:
        if layer.diff_id is None:
            raise BadArchive(what)
        self._notes.add(what, self._where)

    def _spend(self, size: int) -> None:
        self._unpacked += size
        if self._unpacked > self._limits.bytes:
            raise TooMuch(f"the layers unpack to more than {self._limits.bytes} bytes")

    def _count(self) -> None:
        self._entries += 1
        if self._entries > self._limits.entries:
            raise TooMuch(f"the image has more than {self._limits.entries} entries")
        self._unlooked_entries += 1
        if self._unlooked_entries >= _LOOK_ENTRIES:
            self._look_at_disk(0)

    def _look_at_disk(self, size: int) -> None:
        """ResourceExhausted before the disk is full for everybody else."""
        self._unlooked_bytes = self._unlooked_entries = 0
        free = os.fstatvfs(self._top)
        if free.f_bavail * free.f_frsize < size + self._limits.reserve_bytes:
            raise TooMuch("there is no room left on the disk")
        # File systems that make inodes as they need them report none at all.
        if free.f_files and free.f_favail < _LOOK_ENTRIES:
            raise TooMuch("the disk has no room for more files")

    # -- entries

    def _apply(self, entry: Entry, tar: TarStream) -> None:
        if not entry.name:
            raise BadArchive("an entry without a name")
        place = place_of(entry.name, self._limits)
        if place.meaning is Meaning.LEAVING:
            self._skip("left behind by AUFS, left out", entry)
        elif place.meaning is not Meaning.ENTRY:
            self._hide(place, entry)
        elif entry.type == DIRECTORY:
            self._directory(place, entry)
        elif not place.name:
            raise BadArchive(f"the root of an image cannot be {KINDS[entry.type]}")
        elif entry.type == FILE:
            self._file(place, entry, tar)
        elif entry.type == SYMLINK:
            self._symlink(place, entry)
        elif entry.type == HARD_LINK:
            self._hard_link(place, entry)
        else:
            self._tree.make_way(*_decoded(place))
            self._skip(f"{KINDS[entry.type]}, left out", entry)

    def _skip(self, why: str, entry: Entry) -> None:
        self._skipped += 1
        self._notes.add(why, f"{self._where}, {shown(entry.name)}")

    def _hide(self, place: Place, entry: Entry) -> None:
        # AUFS made its whiteouts hard links of one another, and docker kept them so.
        if entry.type not in (FILE, HARD_LINK):
            raise BadArchive(f"a whiteout that is {KINDS[entry.type]}")
        self._whiteouts += 1
        parent, name = _decoded(place)
        if place.meaning is Meaning.OPAQUE:
            self._tree.hide_all(parent)
        else:
            self._tree.hide(parent, name)

    def _directory(self, place: Place, entry: Entry) -> None:
        self._directories += 1
        metadata = self._metadata(entry)
        if place.name:
            self._tree.directory(*_decoded(place), metadata)
        else:
            self._tree.root(metadata)

    def _file(self, place: Place, entry: Entry, tar: TarStream) -> None:
        self._files += 1
        self._bytes += entry.size
        if self._bytes > self._limits.bytes:
            raise TooMuch(f"the files of the image have more than {self._limits.bytes} bytes")
        metadata = self._metadata(entry)
        fd = self._tree.create(*_decoded(place))
        try:
            if entry.segments is None:
                if entry.size >= _LOOK_BYTES:
                    self._look_at_disk(entry.size)
                self._write(fd, entry.size, tar)
            else:
                for offset, length in entry.segments:
                    os.lseek(fd, offset, os.SEEK_SET)
                    self._write(fd, length, tar)
                os.ftruncate(fd, entry.size)
            self._tree.finish_file(fd, metadata)
        finally:
            os.close(fd)

    def _write(self, fd: int, size: int, tar: TarStream) -> None:
        while size:
            part = tar.some(size)
            size -= len(part)
            self._unlooked_bytes += len(part)
            while part:
                part = part[os.write(fd, part) :]
            if self._unlooked_bytes >= _LOOK_BYTES:
                self._look_at_disk(0)

    def _symlink(self, place: Place, entry: Entry) -> None:
        text = entry.link
        if not text or b"\0" in text:
            raise BadArchive(
                "a symbolic link that leads nowhere" if not text else "there is a NUL in its target"
            )
        if len(text) > self._limits.link_bytes:
            raise TooMuch(f"a symbolic link of {len(text)} bytes, more than {self._limits.link_bytes}")
        self._symlinks += 1
        self._tree.symlink(*_decoded(place), os.fsdecode(text), self._metadata(entry))

    def _hard_link(self, place: Place, entry: Entry) -> None:
        """Mode, owner and times are those of the file that is there already."""
        target = components(entry.link, self._limits)
        if not target or any(part.startswith(PREFIX) for part in target):
            raise BadArchive("it is a hard link to something that is not there")
        self._hard_links += 1
        parent, name = _decoded(place)
        above = tuple(os.fsdecode(part) for part in target[:-1])
        self._tree.hard_link(parent, name, above, os.fsdecode(target[-1]))

    # -- attributes

    def _metadata(self, entry: Entry) -> Metadata:
        return Metadata(
            mode=self._mode(entry),
            mtime_ns=entry.mtime_ns,
            owner=self._owner(entry) if self._owners else None,
            xattrs=self._kept_xattrs(entry) if entry.xattrs else [],
        )

    def _mode(self, entry: Entry) -> int:
        mode = entry.mode
        if mode & 0o7000 and entry.type != SYMLINK and not self._setuid:
            # Sticky on a directory takes rights away and gives none.
            mode &= 0o1777 if entry.type == DIRECTORY else 0o777
            if mode != entry.mode:
                self._notes.add("setuid, setgid or sticky dropped", shown(entry.name))
        if entry.type == DIRECTORY:
            return mode | self._readable | self._readable >> 2
        return mode | self._readable

    def _owner(self, entry: Entry) -> tuple[int, int]:
        if not (0 <= entry.uid < _NO_ID and 0 <= entry.gid < _NO_ID):
            raise BadArchive(f"its owner {entry.uid}:{entry.gid} is out of range")
        return entry.uid, entry.gid

    def _kept_xattrs(self, entry: Entry) -> list[tuple[str, bytes]]:
        kept = []
        for raw, value in entry.xattrs:
            name = os.fsdecode(raw)
            if not name or "\0" in name or len(raw) > self._limits.name_bytes:
                raise BadArchive("an extended attribute whose name is empty, too long or has a NUL")
            capability = name == _CAPABILITY and self._setuid and entry.type == FILE
            if capability or (name.startswith(_KEPT_XATTRS) and not name.startswith(VOLATILE)):
                kept.append((name, value))
            else:
                self._notes.add("extended attribute dropped", f"{shown(entry.name)}, {shown(name)}")
        return kept


class _Told:
    """Turns what happens inside into an error of the contract that says where."""

    def __init__(self, work: _Unpacking) -> None:
        self._work = work

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, failure: BaseException | None, trace: object) -> None:
        if isinstance(failure, BadArchive):
            raise PullFailed(f"{self._work.where()}: {failure}", field="image") from failure
        if isinstance(failure, TooMuch | sqlite3.Error):
            raise ResourceExhausted(f"{self._work.where()}: {failure}", field="image") from failure
        if isinstance(failure, OSError):
            raise _os_failed(self._work.where(), failure) from failure


def _os_failed(what: str, failure: OSError) -> ContractError:
    reason = failure.strerror or str(failure)
    if is_out_of_space(failure.errno) or failure.errno in _EXHAUSTED:
        return ResourceExhausted(f"{what}: {reason}")
    return PullFailed(f"{what}: {reason}", field="image")


def _decoded(place: Place) -> tuple[tuple[str, ...], str]:
    return tuple(map(os.fsdecode, place.parent)), os.fsdecode(place.name)
