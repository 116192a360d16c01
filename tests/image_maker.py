"""Small images for tests, put into a test registry: layers, config, manifest, index."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from dataclasses import dataclass
from typing import Any

from tests.registry_server import Registry, digest_of
from worker.images.model import CONFIG_TYPE, INDEX_TYPE, MANIFEST_TYPE, oci_platform

OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"


@dataclass(frozen=True)
class Layer:
    """`content` is the blob, `tar` what it unpacks to."""

    content: bytes
    tar: bytes
    media_type: str

    @property
    def digest(self) -> str:
        return digest_of(self.content)

    def descriptor(self) -> dict[str, Any]:
        return {"mediaType": self.media_type, "digest": self.digest, "size": len(self.content)}


def layer(files: dict[str, bytes], *, compress: bool = True, media_type: str | None = None) -> Layer:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.mtime = len(content), 0o755, 1_700_000_000
            archive.addfile(info, io.BytesIO(content))
    tar = raw.getvalue()
    if compress:
        return Layer(gzip.compress(tar, 1, mtime=0), tar, media_type or f"{OCI_LAYER}+gzip")
    return Layer(tar, tar, media_type or OCI_LAYER)


def config_of(layers: list[Layer], platform: tuple[str, str] | None = None, **config: Any) -> bytes:
    system, architecture = platform or oci_platform()
    document = {
        "architecture": architecture,
        "os": system,
        "created": "2026-01-02T03:04:05.123456789Z",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [digest_of(one.tar) for one in layers]},
        "history": [{"created_by": "test"}],
    }
    return json.dumps(document).encode()


def manifest_of(
    layers: list[Layer],
    config: bytes,
    changes: dict[str, Any] | None = None,
    *,
    media_type: str = MANIFEST_TYPE,
) -> bytes:
    docker = media_type == DOCKER_MANIFEST
    document = {
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": {
            "mediaType": DOCKER_CONFIG if docker else CONFIG_TYPE,
            "digest": digest_of(config),
            "size": len(config),
        },
        "layers": [one.descriptor() for one in layers],
        **(changes or {}),
    }
    return json.dumps(document).encode()


def put_image(
    registry: Registry,
    repository: str,
    layers: list[Layer],
    *tags: str,
    platform: tuple[str, str] | None = None,
    media_type: str = MANIFEST_TYPE,
    changes: dict[str, Any] | None = None,
    **config: Any,
) -> str:
    """Store a whole image; gives its manifest's digest."""
    content = config_of(layers, platform, **config)
    registry.add_blob(repository, content)
    for one in layers:
        registry.add_blob(repository, one.content)
    manifest = manifest_of(layers, content, changes, media_type=media_type)
    return registry.add_manifest(repository, manifest, media_type, *tags)


def put_index(
    registry: Registry, repository: str, entries: list[tuple[str, dict[str, Any]]], *tags: str
) -> str:
    """An index of manifests (digest, platform) that are there already."""
    manifests = []
    for digest, platform in entries:
        media_type, content = registry.manifests[repository][digest]
        manifests.append(
            {"mediaType": media_type, "digest": digest, "size": len(content), "platform": platform}
        )
    document = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": manifests}
    return registry.add_manifest(repository, json.dumps(document).encode(), INDEX_TYPE, *tags)


def here(**more: str) -> dict[str, str]:
    """This machine in an index's words."""
    system, architecture = oci_platform()
    return {"os": system, "architecture": architecture, **more}
