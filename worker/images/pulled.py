"""The blocking steps of taking in one image: what is to be fetched, what is here, unpacking, publishing.

Each step leaves the store whole: blobs and trees stand under names that their content proves, and an image
gets its name last, under the lock, when everything it needs is there. Whoever is killed in between leaves
pieces that the next pull finds, or that `prune` deletes.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from worker.errors import PullFailed, ResourceExhausted, is_out_of_space
from worker.platform.descent import OPEN_DIRECTORY

from .chain import chain_id
from .ingest import Ingest
from .layout import Layout
from .model import FROM_INDEX, PULLED, SECRET, ConfigDocument, Descriptor, ImageInfo, Tree
from .reference import DIGEST
from .register import sync_file_system
from .registry.client import Document, RegistryClient
from .registry.failures import persist
from .registry.manifests import (
    MAX_CONFIG_BYTES,
    Blob,
    ImageIndex,
    ImageManifest,
    Platform,
    choose,
    decode,
    mismatch,
)
from .registry.patience import Patience
from .registry.reference import RegistryImage
from .registry.stopping import StopSignal
from .space import RESERVE_BYTES
from .store import ImageStore
from .trees import tree_size
from .unpack_model import LayerFile, UnpackReport

MAX_NESTING = 3
_READ = 1 << 20
# What layers grow to, where nothing says it: programs and libraries compress to a third.
_GROWTH = 3


class Unpack(Protocol):
    """`worker.images.unpack.unpack_layers`."""

    def __call__(
        self,
        layers: Sequence[LayerFile],
        dest: Path,
        *,
        case_insensitive: bool,
        cancelled: Callable[[], bool],
    ) -> UnpackReport: ...


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One image, as the registry describes it."""

    document: Document
    manifest: ImageManifest
    config: bytes
    diff_ids: tuple[str, ...]
    tree: str
    index_digest: str | None
    warnings: tuple[str, ...]

    @property
    def blobs(self) -> tuple[str, ...]:
        """Every blob and the tree: what must not be deleted while it is on its way in."""
        layers = (layer.digest for layer in self.manifest.layers)
        return (self.document.digest, self.manifest.config.digest, *layers, self.tree)


def make_plan(
    client: RegistryClient,
    image: RegistryImage,
    here: tuple[str, str],
    patience: Patience,
    stop: StopSignal,
) -> Plan:
    """Ask for manifest and config; nothing is written. PullFailed."""
    document = client.document(image.reference)
    parsed = decode(document.content, document.content_type, str(image))
    index_digest, warnings = None, []
    for _ in range(MAX_NESTING):
        if isinstance(parsed, ImageManifest):
            break
        choice = choose(parsed, here, str(image))
        index_digest = index_digest or document.digest
        warnings = [choice.warning] if choice.warning else []
        document = _child(client, choice.blob, image)
        parsed = decode(document.content, choice.blob.media_type, str(image))
    if isinstance(parsed, ImageIndex):
        raise PullFailed(f"{image} is an index of indexes, {MAX_NESTING} deep", field="image")
    config = persist(lambda: _config(client, parsed.config), patience, stop)
    found, diff_ids = read_config(config, parsed, image)
    platform = Platform(os=found.os, architecture=found.architecture)
    if index_digest is None and (warning := mismatch(platform, here, str(image))):
        warnings.append(warning)
    return Plan(
        document=document,
        manifest=parsed,
        config=config,
        diff_ids=diff_ids,
        tree=chain_id({"diff_ids": list(diff_ids)}),
        index_digest=index_digest,
        warnings=tuple(warnings),
    )


def _child(client: RegistryClient, blob: Blob, image: RegistryImage) -> Document:
    document = client.document(blob.digest)
    if len(document.content) != blob.size:
        raise PullFailed(
            f"{image}: the index gives {blob.size} bytes for {blob.digest}, which has {len(document.content)}",
            field="image",
        )
    return document


def _config(client: RegistryClient, blob: Blob) -> bytes:
    with client.blob(blob.digest) as answer:
        content = answer.read(min(blob.size, MAX_CONFIG_BYTES))
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    if digest != blob.digest or len(content) != blob.size:
        raise PullFailed(
            f"the registry sent other bytes for the config {blob.digest}: {len(content)} of the digest {digest}",
            field="image",
        )
    return content


def read_config(
    content: bytes, manifest: ImageManifest, image: RegistryImage | str
) -> tuple[ConfigDocument, tuple[str, ...]]:
    """An image's config, which must be for the layers of its manifest, and their diff_ids. PullFailed."""
    try:
        found = msgspec.json.decode(content, type=ConfigDocument)
        diff_ids = msgspec.convert(found.rootfs.get("diff_ids"), tuple[str, ...])
    except (msgspec.MsgspecError, RecursionError) as failure:
        raise PullFailed(f"the config of {image} is refused: {str(failure)[:200]}", field="image") from None
    if len(diff_ids) != len(manifest.layers):
        raise PullFailed(
            f"{image} has {len(manifest.layers)} layers, and its config is for {len(diff_ids)}", field="image"
        )
    for diff_id in diff_ids:
        if DIGEST.fullmatch(diff_id) is None:
            raise PullFailed(f"the config of {image} has {diff_id[:100]!r} for a layer", field="image")
    return found, diff_ids


class TakeIn:
    """The store's side of one pull. Blocking, for threads; the plan's blobs are held meanwhile."""

    def __init__(self, store: ImageStore, ingest: Ingest, plan: Plan, stop: StopSignal) -> None:
        self._store = store
        self._layout: Layout = store.layout
        self._ingest = ingest
        self._plan = plan
        self._stop = stop

    def missing(self) -> list[Blob]:
        """The layers to fetch, each once. What is here but damaged is thrown away and fetched again."""
        unpacked = self._is_unpacked()
        wanted = {layer.digest: layer for layer in self._plan.manifest.layers}
        return [layer for layer in wanted.values() if not self._has(layer, unpacked)]

    def _has(self, layer: Blob, unpacked: bool) -> bool:
        path = self._layout.blob_path(layer.digest)
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            return False
        # What will be unpacked is read anyway; what is unpacked already nobody reads now.
        if size == layer.size and (unpacked or self._digest(path) == layer.digest):
            return True
        with self._layout.locked():
            self._layout.forget(layer.digest)
        return False

    def _digest(self, path: Path) -> str:
        found = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_READ):
                self._stop.check()
                found.update(chunk)
        return f"sha256:{found.hexdigest()}"

    def _is_unpacked(self) -> bool:
        return self._layout.tree_path(self._plan.tree).is_dir()

    def check_space(self, missing: Sequence[Blob]) -> None:
        """ResourceExhausted before anything is fetched. How large layers unpack to is a guess here."""
        fetched = sum(max(0, layer.size - self._ingest.present(layer.digest)) for layer in missing)
        grown = 0
        if not self._is_unpacked():
            for layer in self._plan.manifest.layers:
                grown += layer.size * (_GROWTH if layer.media_type.endswith(("gzip", "zstd")) else 1)
        self._check_free(
            fetched + grown, f"{fetched >> 20} MiB to fetch and about {grown >> 20} MiB to unpack"
        )

    def _check_free(self, needed: int, what: str) -> None:
        free = os.statvfs(self._layout.root)
        available = free.f_bavail * free.f_frsize
        if available < needed + RESERVE_BYTES:
            raise ResourceExhausted(
                f"the image needs {what}, and {RESERVE_BYTES >> 20} MiB must stay free,"
                f" but {self._layout.root} has {available >> 20} MiB left"
            )

    def adopt(self, file: Path, digest: str) -> None:
        """A blob that is complete and checked becomes one of the store's."""
        with self._layout.locked():
            self._layout.adopt_blob(file, digest)

    def unpack(self, unpack: Unpack) -> tuple[str, ...]:
        """Make the tree, unless it is here. Gives remarks on what could not be kept."""
        if self._is_unpacked():
            return ()
        layers = [
            LayerFile(path=self._layout.blob_path(blob.digest), media_type=blob.media_type, diff_id=diff_id)
            for blob, diff_id in zip(self._plan.manifest.layers, self._plan.diff_ids, strict=True)
        ]
        with self._layout.token() as token:
            partial = self._layout.partial(token)
            try:
                partial.mkdir(mode=0o700)
                report = unpack(
                    layers,
                    partial,
                    case_insensitive=_folds_case(self._layout),
                    cancelled=lambda: self._stop.is_set,
                )
                self._stop.check()
                _sync(partial)
                size = tree_size(partial)
                tree = Tree(digest=self._plan.tree, bytes=size.bytes, entries=size.entries)
                with self._layout.locked():
                    if not self._is_unpacked():  # by nobody else meanwhile
                        self._layout.put_tree(token, tree)
            except OSError as failure:
                raise disk_failed(failure, "unpack") from failure
        return report.notes

    def publish(self, name: str, auth: str | None = None) -> ImageInfo:
        """Give the image its name, and remember the name of the secret that it was had by."""
        plan = self._plan
        marks = {PULLED: "1"}
        if auth is not None:
            marks[SECRET] = auth
        if plan.index_digest is not None:
            marks[FROM_INDEX] = plan.index_digest
        with self._layout.locked():
            self._layout.put_blob(plan.config)
            self._layout.put_blob(plan.document.content)
            made = self._store.give_name(
                name,
                Descriptor(
                    media_type=plan.manifest.media_type,
                    digest=plan.document.digest,
                    size=len(plan.document.content),
                    annotations=marks,
                ),
            )
        self._store.record_later(plan.tree)
        return made


def disk_failed(failure: OSError, what: str) -> ResourceExhausted | PullFailed:
    if is_out_of_space(failure.errno):
        return ResourceExhausted(f"no space left to {what} the image")
    return PullFailed(f"cannot {what} the image: {failure.strerror or failure}", field="image")


def _folds_case(layout: Layout) -> bool:
    """Whether two names that differ in case are one here, as on a usual Mac."""
    return (layout.root / "OCI-LAYOUT").exists()


def _sync(tree: Path) -> None:
    fd = os.open(tree, OPEN_DIRECTORY)
    try:
        sync_file_system(fd)
    finally:
        os.close(fd)
