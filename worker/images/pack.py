"""An image made of a folder: its layers, its config, its manifest, and their one digest.

What the digest depends on is what the folder holds and what was asked for, nothing else: names, contents, modes,
links and attributes of the entries. Not their owners (0 in the image) nor their times, unless these are to be
kept, nor the order in which a file system lists them, nor who packs where and when.

Attributes that macOS gives each file by itself (`com.apple.quarantine`, `.provenance`, …) stay behind; those of
code signatures go along (`com.apple.cs.*`, for what is no Mach-O file), as do resource forks.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from worker.errors import ContractError, PullFailed, ResourceExhausted, is_out_of_space
from worker.platform.descent import Descent, open_directory
from worker.platform.treecopy import OPEN_FILE, TreeError, naming, printable
from worker.platform.xattrs import Xattrs, system_xattrs

from .model import CONFIG_TYPE, MANIFEST_TYPE, ImageConfig, oci_platform
from .pack_blobs import COMPRESSIONS, GZIP, Layer, LayerWriter, usual_zlib
from .pack_ignore import FILE_NAME, Ignore
from .pack_layers import LEAST_BYTES, split
from .pack_scan import Found, Scan, scan
from .pack_tar import DIRECTORY, END, FILE, SYMLINK, Member, header, padding
from .unpack_model import UnpackLimits

MAX_IGNORE_BYTES = 1 << 20
__all__ = ["COMPRESSIONS", "GZIP", "PackOptions", "Packed", "pack"]

_READ = 1 << 20
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_THREADS = 4
_XATTR_BYTES = UnpackLimits().xattr_bytes

OTHER_ZLIB = (
    "this Python's zlib compresses in its own way: the image's content is the same as anywhere, but with gzip"
    " its digest is that of machines with the same zlib only (--compress none has one digest everywhere)"
)

Check = Callable[[], None]


def _go_on() -> None:
    return None


class PackOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`time_s` is given to every entry and to the image; None keeps the files' own.

    `platform` is (os, architecture, variant), this machine's by default. `plain_modes`: 755 for directories
    and what its owner may execute, 644 for the rest, whatever umask the files were made under.
    """

    config: ImageConfig = ImageConfig()
    platform: tuple[str, str, str | None] | None = None
    compression: str = GZIP
    time_s: int | None = 0
    plain_modes: bool = False
    exclude: tuple[str, ...] = ()
    ignore_file: bool = True
    least_bytes: int = LEAST_BYTES


class Packed(msgspec.Struct, frozen=True, kw_only=True):
    """`bytes` are those of the files. The layers lie where they were asked to be; the rest is small."""

    layers: tuple[Layer, ...]
    config: bytes
    manifest: bytes
    bytes: int
    entries: int
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        return _digest(self.manifest)


def pack(
    source: Path,
    scratch: Path,
    options: PackOptions,
    *,
    check: Check = _go_on,
    xattrs: Xattrs | None = None,
) -> Packed:
    """Pack the folder at this canonical path; its layers are written into `scratch`, an empty folder.

    Blocking; `check` is asked often and raises when nobody wants the result. PullFailed names the file that
    cannot be part of an image or changed meanwhile, ResourceExhausted.
    """
    try:
        top = open_directory(source)
        try:
            return _Packing(top, scratch, options, check, xattrs or system_xattrs()).run()
        finally:
            os.close(top)
    except TreeError as failure:
        where = f"{printable(failure.path)}: " if failure.path else ""
        raise _failed(source, where + failure.reason, failure.errno) from failure
    except OSError as failure:
        raise _failed(source, failure.strerror or str(failure), failure.errno) from failure


def _failed(source: Path, reason: str, code: int | None) -> ContractError:
    if is_out_of_space(code):
        return ResourceExhausted(f"no space left to pack {printable(str(source))}")
    return PullFailed(f"cannot pack {printable(str(source))}: {reason}", field="directory")


class _Packing:
    def __init__(self, top: int, scratch: Path, options: PackOptions, check: Check, xattrs: Xattrs) -> None:
        self._top = top
        self._scratch = scratch
        self._options = options
        self._check = check
        self._xattrs = xattrs

    def run(self) -> Packed:
        options = self._options
        ignore = self._ignore()
        system, architecture, variant = options.platform or (*oci_platform(), None)
        folding = system == "darwin"
        before = scan(self._top, ignore, folding=folding)
        self._check()
        parts = split(before.entries, before.bytes, options.least_bytes)
        with ThreadPoolExecutor(min(_THREADS, len(parts), os.cpu_count() or 1)) as threads:
            jobs = [threads.submit(self._layer, number, part) for number, part in enumerate(parts)]
            try:
                layers = tuple(job.result() for job in jobs)
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise
        before.check_unchanged(scan(self._top, ignore, folding=folding))
        config = _encode(self._config(before, layers, system, architecture, variant))
        notes = before.notes
        if options.compression == GZIP and not usual_zlib():
            notes = (*notes, OTHER_ZLIB)
        return Packed(
            layers=layers,
            config=config,
            manifest=_encode(_manifest(config, layers)),
            bytes=before.bytes,
            entries=len(before.entries),
            notes=notes,
        )

    def _ignore(self) -> Ignore:
        """The patterns of the folder's own file, then those that were given, which have the last word."""
        ignore = Ignore(())
        if self._options.ignore_file:
            try:
                fd = os.open(FILE_NAME, OPEN_FILE, dir_fd=self._top)
            except FileNotFoundError:
                fd = -1
            if fd >= 0:
                with os.fdopen(fd, "rb") as file:
                    content = file.read(MAX_IGNORE_BYTES + 1)
                if len(content) > MAX_IGNORE_BYTES:
                    raise TreeError(FILE_NAME, f"is larger than {MAX_IGNORE_BYTES >> 20} MiB")
                lines = content.decode("utf-8", "surrogateescape").split("\n")
                ignore.extend([f"/{FILE_NAME}"], where=FILE_NAME)
                ignore.extend(lines, where=FILE_NAME)
        ignore.extend(self._options.exclude, where="--exclude")
        return ignore

    # -- layers

    def _layer(self, number: int, entries: Sequence[Found]) -> Layer:
        path = self._scratch / f"layer-{number}"
        walk = Descent(os.dup(self._top))
        try:
            with _new_file(path) as out:
                writer = LayerWriter(out, self._options.compression)
                for entry in entries:
                    self._check()
                    _go_to(walk, entry.path.rpartition("/")[0])
                    with naming(walk, entry.path.rpartition("/")[2]):
                        self._entry(walk, entry, writer)
                writer.write(END)
                made = writer.finish(path)
                out.flush()
                os.fsync(out.fileno())
        finally:
            walk.close()
        return made

    def _entry(self, walk: Descent, entry: Found, writer: LayerWriter) -> None:
        name = entry.path.rpartition("/")[2]
        if entry.kind == FILE:
            self._file(walk, entry, writer)
        elif entry.kind == DIRECTORY:
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=walk.fd)
            try:
                writer.write(self._header(entry, fd))
            finally:
                os.close(fd)
        else:
            writer.write(self._header(entry, None))

    def _file(self, walk: Descent, entry: Found, writer: LayerWriter) -> None:
        fd = os.open(entry.path.rpartition("/")[2], OPEN_FILE, dir_fd=walk.fd)
        try:
            found = os.fstat(fd)
            identity = (found.st_dev, found.st_ino)
            if identity != entry.identity or found.st_size != entry.size:
                raise TreeError(entry.path, "changed while it was being packed")
            writer.write(self._header(entry, fd))
            left = entry.size
            while left:
                self._check()
                data = os.read(fd, min(_READ, left))
                if not data:
                    raise TreeError(entry.path, "changed while it was being packed")
                writer.write(data)
                left -= len(data)
            writer.write(padding(entry.size))
        finally:
            os.close(fd)

    def _header(self, entry: Found, fd: int | None) -> bytes:
        options = self._options
        mode = entry.mode
        if options.plain_modes and entry.kind != SYMLINK:
            mode = 0o755 if entry.kind == DIRECTORY or mode & 0o100 else 0o644
        member = Member(
            name=os.fsencode(entry.path),
            kind=entry.kind,
            mode=mode,
            mtime_ns=entry.mtime_ns if options.time_s is None else options.time_s * 1_000_000_000,
            size=entry.size,
            link=os.fsencode(entry.link),
            xattrs=() if fd is None else self._attributes(entry, fd),
        )
        try:
            return header(member)
        except ValueError as failure:
            raise TreeError(entry.path, str(failure)) from None

    def _attributes(self, entry: Found, fd: int) -> list[tuple[bytes, bytes]]:
        found = [(os.fsencode(name), value) for name, value in self._xattrs.read(fd)]
        if sum(len(name) + len(value) + 32 for name, value in found) > _XATTR_BYTES:
            raise TreeError(entry.path, f"more than {_XATTR_BYTES} bytes of extended attributes")
        return found

    # -- documents

    def _config(
        self, found: Scan, layers: Sequence[Layer], system: str, architecture: str, variant: str | None
    ) -> dict[str, Any]:
        time_s = self._options.time_s
        document: dict[str, Any] = {
            "created": _moment(found.newest_ns if time_s is None else time_s * 1_000_000_000),
            "architecture": architecture,
            "os": system,
        }
        if variant:
            document["variant"] = variant
        run = {key: value for key, value in msgspec.to_builtins(self._options.config).items() if value}
        if "Labels" in run:
            run["Labels"] = dict(sorted(run["Labels"].items()))
        document["config"] = run
        document["rootfs"] = {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]}
        return document


def _go_to(walk: Descent, directory: str) -> None:
    """Stand in another directory of the tree."""
    wanted = directory.split("/") if directory else []
    common = 0
    for ours, theirs in zip(walk.names, wanted, strict=False):
        if ours != theirs:
            break
        common += 1
    with naming(walk):
        while len(walk.names) > common:
            walk.up()
        for name in wanted[common:]:
            walk.down(name)


def _manifest(config: bytes, layers: Sequence[Layer]) -> dict[str, Any]:
    return {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": {"mediaType": CONFIG_TYPE, "digest": _digest(config), "size": len(config)},
        "layers": [
            {"mediaType": layer.media_type, "digest": layer.digest, "size": layer.size} for layer in layers
        ],
    }


def _moment(ns: int) -> str:
    """To the second. A time that no calendar has (a file's may be any number) is the nearest that one has."""
    latest = datetime(9999, 12, 31, tzinfo=UTC)
    seconds = min(max(ns // 1_000_000_000, 0), int((latest - _EPOCH).total_seconds()))
    return (_EPOCH + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def _new_file(path: Path) -> BinaryIO:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o600), "wb")


def _encode(document: dict[str, Any]) -> bytes:
    return msgspec.json.encode(document)


def _digest(content: bytes) -> str:
    return f"sha256:{sha256(content).hexdigest()}"
