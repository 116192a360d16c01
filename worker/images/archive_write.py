"""Writing images as one tar archive that everybody can load.

An OCI image layout (image-spec, image-layout.md), and in it what older programs look for: `manifest.json` as
`docker save` writes it. The names stand under each key that somebody reads: `org.opencontainers.image.ref.name`
(skopeo, umoci; it is the name as it is here), `io.containerd.image.name` (docker, containerd, nerdctl) and
`com.apple.containerization.image.name` (apple/container), the last two with registry and tag in full.

Equal images give equal archives: no times, no owners, blobs in a fixed order.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from worker.errors import ContractError

from .layout import OCI_LAYOUT
from .model import INDEX_TYPE, REF_NAME
from .pack_tar import DIRECTORY, END, FILE, Member, header, padding
from .registry.reference import registry_image

CONTAINERD_NAME = "io.containerd.image.name"
APPLE_NAME = "com.apple.containerization.image.name"
_READ = 256 * 1024


class SavedBlob(msgspec.Struct, frozen=True, kw_only=True):
    """One blob: its bytes, or the file that holds them."""

    digest: str
    size: int
    content: bytes | Path

    @classmethod
    def of(cls, content: bytes) -> "SavedBlob":
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        return cls(digest=digest, size=len(content), content=content)

    @property
    def entry(self) -> str:
        return f"blobs/sha256/{self.digest.removeprefix('sha256:')}"


class SavedImage(msgspec.Struct, frozen=True, kw_only=True):
    """An image to be written. `blobs` are config and layers in this order, without the manifest."""

    names: tuple[str, ...]
    media_type: str
    manifest: SavedBlob
    config: SavedBlob
    layers: tuple[SavedBlob, ...]


def archive_pieces(images: Sequence[SavedImage]) -> Iterator[bytes]:
    """The archive from front to back. OSError from the files; ValueError names the blob whose file is not what it
    should be."""
    index = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": list(_entries(images))}
    yield from _small("oci-layout", OCI_LAYOUT)
    yield from _small("index.json", msgspec.json.encode(index))
    yield from _small("manifest.json", msgspec.json.encode([_for_docker(image) for image in images]))
    for folder in ("blobs", "blobs/sha256"):
        yield header(Member(folder.encode(), DIRECTORY, 0o755, 0))
    written: set[str] = set()
    for image in images:
        for blob in (image.manifest, image.config, *image.layers):
            if blob.digest not in written:
                written.add(blob.digest)
                yield from _blob(blob)
    yield END


def archive_size(images: Sequence[SavedImage]) -> int:
    """How long the archive will be, but for its few small documents."""
    blobs = {b.digest: b.size for image in images for b in (image.manifest, image.config, *image.layers)}
    return sum(size + 1024 for size in blobs.values())


def _entries(images: Sequence[SavedImage]) -> Iterator[dict[str, Any]]:
    for image in images:
        entry = {
            "mediaType": image.media_type,
            "digest": image.manifest.digest,
            "size": image.manifest.size,
        }
        if not image.names:
            yield entry
        for name in image.names:
            full = full_name(name)
            marks = {APPLE_NAME: full, CONTAINERD_NAME: full} if full else {}
            yield {**entry, "annotations": {**marks, REF_NAME: name}}


def _for_docker(image: SavedImage) -> dict[str, Any]:
    tags = [full for name in image.names if (full := full_name(name))]
    return {
        "Config": image.config.entry,
        "RepoTags": tags or None,
        "Layers": [layer.entry for layer in image.layers],
    }


def full_name(name: str) -> str | None:
    """`web` as `docker.io/library/web:latest`; None for what no registry could have."""
    try:
        image = registry_image(name)
    except ContractError:
        return None
    return f"{image.host}/{image.repository}:{image.tag}"


def _small(name: str, content: bytes) -> Iterator[bytes]:
    yield header(Member(name.encode(), FILE, 0o644, 0, size=len(content))) + content + padding(len(content))


def _blob(blob: SavedBlob) -> Iterator[bytes]:
    yield header(Member(blob.entry.encode(), FILE, 0o644, 0, size=blob.size))
    found, left = hashlib.sha256(), blob.size
    for data in _pieces(blob):
        found.update(data)
        left -= len(data)
        yield data
    if left or f"sha256:{found.hexdigest()}" != blob.digest:
        raise ValueError(f"{blob.digest} is damaged: its bytes are not those that its name says")
    yield padding(blob.size)


def _pieces(blob: SavedBlob) -> Iterator[bytes]:
    if isinstance(blob.content, bytes):
        yield blob.content
        return
    with blob.content.open("rb", buffering=0) as file:
        left = blob.size
        while left and (data := file.read(min(_READ, left))):
            left -= len(data)
            yield data
