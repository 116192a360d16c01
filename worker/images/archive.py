"""Reading archives of images: OCI layouts as tar files and what `docker save` wrote before it wrote these too.

Nothing of an archive is trusted: it is read once, from front to back, by the reader that layers are read with
(`tar_stream`), under the same limits; its names are keys and never paths, its files go under names of our own
into a folder of our own. A blob must have the digest that its name says, and each document what `registry.
manifests` asks of a registry's. The archive itself may be compressed with gzip or zstd.
"""

import hashlib
import os
import posixpath
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from schemas.errors import ContractError
from worker.errors import PullFailed, ResourceExhausted, is_out_of_space

from .archive_write import APPLE_NAME, CONTAINERD_NAME
from .chain import chain_id
from .decompress import LayerStream, detect
from .model import CONFIG_TYPE, INDEX_TYPE, MANIFEST_TYPE, REF_NAME
from .pulled import MAX_NESTING, Plan, read_config
from .reference import DIGEST, parse_name
from .registry.client import Document
from .registry.manifests import (
    INDEXES,
    MANIFESTS,
    MAX_CONFIG_BYTES,
    MAX_LAYERS,
    MAX_MANIFEST_BYTES,
    Blob,
    ImageIndex,
    ImageManifest,
    Platform,
    choose,
    decode,
    mismatch,
)
from .tar_stream import DIRECTORY, FILE, HARD_LINK, SYMLINK, Entry, TarStream
from .unpack_model import BadArchive, TooMuch, UnpackLimits, shown
from .whiteouts import components

# An image has 500 layers at most, an archive perhaps some hundred images that share them.
LIMITS = UnpackLimits(entries=20_000, pax_bytes=64 << 10, path_bytes=1024, depth=16)
MAX_IMAGES = 1000
_LAYER_TYPES = {
    "tar": "application/vnd.oci.image.layer.v1.tar",
    "gzip": "application/vnd.oci.image.layer.v1.tar+gzip",
    "zstd": "application/vnd.oci.image.layer.v1.tar+zstd",
}
_LINK_STEPS = 8

Check = Callable[[], None]


class Staged(msgspec.Struct, frozen=True):
    """A file of the archive, on disk under a name of ours."""

    path: Path
    digest: str
    size: int


class ArchivedImage(msgspec.Struct, frozen=True, kw_only=True):
    """`names` are those that the archive gives. `plan` is what taking it in needs, `files` its blobs by digest."""

    names: tuple[str, ...]
    plan: Plan
    files: dict[str, Path]


class Archive:
    """What was read of one archive. Its files belong to whoever gave the folder."""

    def __init__(self, files: dict[str, Staged]) -> None:
        self._files = files
        self._by_digest = {staged.digest: staged for staged in files.values()}

    @classmethod
    def read(
        cls, source: BinaryIO, folder: Path, check: Check, *, limits: UnpackLimits = LIMITS
    ) -> "Archive":
        """Take the archive apart into `folder`, which is empty. PullFailed, ResourceExhausted name the entry."""
        return cls(_Reading(source, folder, check, limits).run())

    def images(self, here: tuple[str, str]) -> list[ArchivedImage]:
        """Every image in it; of one for several platforms the one for `here`. PullFailed."""
        if "index.json" in self._files:
            found = list(self._from_layout(here))
        elif "manifest.json" in self._files:
            found = list(self._from_docker(here))
        else:
            raise _bad("it has neither index.json nor manifest.json, so it is no archive of images")
        if not found:
            raise _bad("there is no image in it")
        return found

    # -- OCI

    def _from_layout(self, here: tuple[str, str]) -> Iterator[ArchivedImage]:
        index = decode(self._document("index.json"), INDEX_TYPE, "index.json")
        if not isinstance(index, ImageIndex):
            raise _bad("index.json is no index")
        named: dict[str, tuple[Blob, list[str]]] = {}
        for blob in index.manifests:
            if blob.media_type in (*MANIFESTS, *INDEXES):
                _, names = named.setdefault(blob.digest, (blob, []))
                name = _name_of(blob.annotations or {})
                if name is not None and name not in names:
                    names.append(name)
        for blob, names in named.values():
            yield self._image(blob, tuple(names), here)

    def _image(self, blob: Blob, names: tuple[str, ...], here: tuple[str, str]) -> ArchivedImage:
        label = names[0] if names else blob.digest
        index_digest, warnings = None, []
        for _ in range(MAX_NESTING):
            content = self._blob(blob, MAX_MANIFEST_BYTES)
            parsed = decode(content, blob.media_type, label)
            if isinstance(parsed, ImageManifest):
                break
            index_digest = index_digest or blob.digest
            # `docker save` lists all platforms and holds those that were pulled.
            there = [one for one in parsed.manifests if one.digest in self._by_digest]
            choice = choose(msgspec.structs.replace(parsed, manifests=there), here, label)
            blob, warnings = choice.blob, [choice.warning] if choice.warning else []
        else:
            raise _bad(f"{shown(label)} is an index of indexes, {MAX_NESTING} deep")
        config = self._blob(parsed.config, MAX_CONFIG_BYTES)
        document = Document(content=content, content_type=blob.media_type, digest=blob.digest)
        return self._planned(names, label, document, parsed, config, index_digest, warnings, here)

    def _planned(
        self,
        names: tuple[str, ...],
        label: str,
        document: Document,
        manifest: ImageManifest,
        config: bytes,
        index_digest: str | None,
        warnings: list[str],
        here: tuple[str, str],
    ) -> ArchivedImage:
        found, diff_ids = read_config(config, manifest, label)
        platform = Platform(os=found.os, architecture=found.architecture)
        if index_digest is None and (warning := mismatch(platform, here, label)):
            warnings.append(warning)
        files = {}
        for layer in manifest.layers:
            staged = self._by_digest.get(layer.digest)
            if staged is None:
                raise _bad(f"the layer {layer.digest} of {shown(label)} is not in it")
            if staged.size != layer.size:
                raise _bad(
                    f"the layer {layer.digest} has {staged.size} bytes, its manifest says {layer.size}"
                )
            files[layer.digest] = staged.path
        plan = Plan(
            document=document,
            manifest=manifest,
            config=config,
            diff_ids=diff_ids,
            tree=chain_id({"diff_ids": list(diff_ids)}),
            index_digest=index_digest,
            warnings=tuple(warnings),
        )
        return ArchivedImage(names=names, plan=plan, files=files)

    def _blob(self, blob: Blob, most: int) -> bytes:
        staged = self._by_digest.get(blob.digest)
        if staged is None:
            raise _bad(f"{shown(blob.digest)} is not in it")
        if staged.size != blob.size or staged.size > most:
            raise _bad(
                f"{blob.digest} has {staged.size} bytes where {blob.size} were said, of {most} at most"
            )
        return staged.path.read_bytes()

    def _document(self, name: str) -> bytes:
        staged = self._files[name]
        if staged.size > MAX_MANIFEST_BYTES:
            raise _bad(f"{name} is larger than {MAX_MANIFEST_BYTES >> 20} MiB")
        return staged.path.read_bytes()

    # -- docker

    def _from_docker(self, here: tuple[str, str]) -> Iterator[ArchivedImage]:
        try:
            entries = msgspec.json.decode(self._document("manifest.json"), type=list[_DockerEntry])
        except (msgspec.MsgspecError, RecursionError) as failure:
            raise _bad(f"manifest.json is refused: {str(failure)[:200]}") from None
        if len(entries) > MAX_IMAGES:
            raise _bad(f"manifest.json lists more than {MAX_IMAGES} images")
        for entry in entries:
            names = tuple(tag for tag in entry.tags or () if _is_name(tag))
            label = names[0] if names else entry.config[:100]
            config = self._file(entry.config, MAX_CONFIG_BYTES)
            if not 0 < len(entry.layers) <= MAX_LAYERS:
                raise _bad(
                    f"{shown(label)} has {len(entry.layers)} layers; 1 to {MAX_LAYERS} can be unpacked"
                )
            layers = [self._found(layer) for layer in entry.layers]
            content = _manifest(config, layers)
            document = Document(
                content=content,
                content_type=MANIFEST_TYPE,
                digest=f"sha256:{hashlib.sha256(content).hexdigest()}",
            )
            parsed = decode(content, MANIFEST_TYPE, label)
            assert isinstance(parsed, ImageManifest)
            yield self._planned(names, label, document, parsed, config.path.read_bytes(), None, [], here)

    def _file(self, name: str, most: int) -> Staged:
        staged = self._found(name)
        if staged.size > most:
            raise _bad(f"{shown(name)} is larger than {most >> 20} MiB")
        return staged

    def _found(self, name: str) -> Staged:
        staged = self._files.get(posixpath.normpath(name))
        if staged is None:
            raise _bad(f"{shown(name)} is not in it")
        return staged


class _DockerEntry(msgspec.Struct, frozen=True, kw_only=True):
    config: str = msgspec.field(name="Config")
    tags: list[str] | None = msgspec.field(name="RepoTags", default=None)
    layers: list[str] = msgspec.field(name="Layers")


def _manifest(config: Staged, layers: list[Staged]) -> bytes:
    """What a registry would have for an image that comes without a manifest. Equal for equal images."""
    described: list[dict[str, Any]] = []
    for layer in layers:
        with layer.path.open("rb") as file:
            kind = detect(file.read(512))
        described.append({"mediaType": _LAYER_TYPES[kind], "digest": layer.digest, "size": layer.size})
    return msgspec.json.encode(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": {"mediaType": CONFIG_TYPE, "digest": config.digest, "size": config.size},
            "layers": described,
        }
    )


def _name_of(marks: dict[str, str]) -> str | None:
    """What an entry of index.json is called; `ref.name` may be no more than a tag."""
    plain = marks.get(REF_NAME, "")
    whole = plain if ":" in plain or "/" in plain else ""
    for name in (whole, marks.get(APPLE_NAME, ""), marks.get(CONTAINERD_NAME, ""), plain):
        if name and _is_name(name):
            return name
    return None


def _is_name(text: str) -> bool:
    try:
        parse_name(text)
    except ContractError:
        return False
    return True


def _bad(reason: str) -> PullFailed:
    return PullFailed(f"the archive is refused: {reason}", field="source_file")


class _Reading:
    """One reading of one archive."""

    def __init__(self, source: BinaryIO, folder: Path, check: Check, limits: UnpackLimits) -> None:
        self._source = source
        self._folder = folder
        self._check = check
        self._limits = limits
        self._spent = 0
        self._tar: TarStream | None = None

    def run(self) -> dict[str, Staged]:
        try:
            return self._run()
        except BadArchive as failure:
            raise _bad(f"{self._where()}{failure}") from failure
        except TooMuch as failure:
            raise ResourceExhausted(
                f"the archive: {self._where()}{failure}", field="source_file"
            ) from failure
        except OSError as failure:
            if is_out_of_space(failure.errno):
                raise ResourceExhausted("no space left to read the archive", field="source_file") from failure
            raise _bad(f"{self._where()}{failure.strerror or failure}") from failure

    def _where(self) -> str:
        current = None if self._tar is None else self._tar.current
        return f"{shown(current)}: " if current is not None else ""

    def _run(self) -> dict[str, Staged]:
        stream = LayerStream(self._source, self._limits, self._check, self._spend)
        tar = self._tar = TarStream(stream, self._limits)
        files: dict[str, Staged] = {}
        links: dict[str, str] = {}
        for count, entry in enumerate(tar):
            self._check()
            if count >= self._limits.entries:
                raise TooMuch(f"more than {self._limits.entries} entries")
            name = _key(entry.name, self._limits)
            if entry.type == DIRECTORY or not name:
                continue
            if name in files or name in links:
                raise BadArchive("it is in the archive twice")
            if entry.type == FILE:
                files[name] = self._stage(name, count, entry, tar)
            elif entry.type in (SYMLINK, HARD_LINK):
                links[name] = _target(name, entry)
            else:
                raise BadArchive("it is neither a file nor a directory")
        if not tar.ended:
            raise BadArchive("cut off: it has no end marker")
        return {**files, **_followed(links, files)}

    def _spend(self, size: int) -> None:
        self._spent += size
        if self._spent > self._limits.bytes:
            raise TooMuch(f"it has more than {self._limits.bytes} bytes")

    def _stage(self, name: str, number: int, entry: Entry, tar: TarStream) -> Staged:
        if entry.segments is not None:
            raise BadArchive("it is a sparse file, which no archive of images has")
        path = self._folder / str(number)
        digest, left = hashlib.sha256(), entry.size
        free = os.statvfs(self._folder)
        if free.f_bavail * free.f_frsize < entry.size + self._limits.reserve_bytes:
            raise TooMuch("there is no room left on the disk")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags, 0o600), "wb", buffering=0) as out:
            while left:
                part = tar.some(left)
                left -= len(part)
                digest.update(part)
                while part:
                    part = part[out.write(part) :]
            os.fsync(out.fileno())
        found = f"sha256:{digest.hexdigest()}"
        said = f"sha256:{name.removeprefix('blobs/sha256/')}"
        if name.startswith("blobs/sha256/") and DIGEST.fullmatch(said) and found != said:
            raise BadArchive(f"its content has another digest than its name: {found}")
        return Staged(path, found, entry.size)


def _key(name: bytes, limits: UnpackLimits) -> str:
    return os.fsdecode(b"/".join(components(name, limits)))


def _target(name: str, entry: Entry) -> str:
    """Where a link leads, as a name of the archive; docker wrote equal layers once and linked to them."""
    text = os.fsdecode(entry.link)
    if entry.type == HARD_LINK:
        return posixpath.normpath(text)
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), text))


def _followed(links: dict[str, str], files: dict[str, Staged]) -> dict[str, Staged]:
    """The links that lead to a file; others lead nowhere and are forgotten."""
    found = {}
    for name, target in links.items():
        for _ in range(_LINK_STEPS):
            if target in files:
                found[name] = files[target]
                break
            target = links.get(target, "")
    return found
