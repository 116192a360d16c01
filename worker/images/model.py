"""What the store knows of an image, and the OCI documents it keeps (image-spec 1.1).

The reported digest of an image is the sha256 of its manifest. Manifest, config and tree listing hold
nothing but what follows from the tree and the platform, so the same tree registered twice, anywhere, has
the same digest. When it was registered is said by the index.
"""

import platform
from datetime import datetime
from typing import Any

import msgspec

INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
TREE_TYPE = "application/vnd.sandfleet.tree.v1"

# On a manifest: its one layer is a tree listing, and the tree itself stands unpacked in `rootfs/`.
NATIVE = "dev.sandfleet.image.native"
BYTES = "dev.sandfleet.image.bytes"
ENTRIES = "dev.sandfleet.image.entries"
# On an index entry. PULLED marks one that came from a registry, whose manifest is the registry's own; beside it
# the digest of the index that it was chosen from, if there was one, and the name of the secret that it was had by.
PULLED = "dev.sandfleet.image.pulled"
FROM_INDEX = "dev.sandfleet.image.index"
SECRET = "dev.sandfleet.image.secret"
REF_NAME = "org.opencontainers.image.ref.name"
CREATED = "org.opencontainers.image.created"

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


class ImageInfo(msgspec.Struct, frozen=True, kw_only=True):
    """An image by one of its names. `bytes` are its files' own; `created_at` is when it came to this node."""

    name: str
    digest: str
    bytes: int
    created_at: datetime


class ImageConfig(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """What an image says about how it wants to be run. Names and defaults are OCI's."""

    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    env: list[str] | None = None
    working_dir: str | None = None
    user: str | None = None
    stop_signal: str | None = None
    labels: dict[str, str] | None = None
    exposed_ports: dict[str, Any] | None = None

    @property
    def environment(self) -> dict[str, str]:
        return dict(item.split("=", 1) for item in self.env or () if "=" in item)


class ConfigDocument(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    architecture: str
    os: str
    created: datetime | None = None
    config: ImageConfig | None = None
    rootfs: dict[str, Any]


class Descriptor(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    media_type: str
    digest: str
    size: int
    annotations: dict[str, str] | None = {}

    @property
    def marks(self) -> dict[str, str]:
        return self.annotations or {}


class Tree(msgspec.Struct, frozen=True, kw_only=True):
    """An unpacked root: the digest it is kept under, and what a copy of it needs."""

    digest: str
    bytes: int
    entries: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    schema_version: int
    media_type: str = ""
    config: Descriptor
    layers: list[Descriptor]
    annotations: dict[str, str] | None = {}

    @property
    def marks(self) -> dict[str, str]:
        return self.annotations or {}

    @property
    def native(self) -> bool:
        """Made here. A registry's manifest may carry the mark too, but never has such a layer."""
        marked = NATIVE in self.marks
        return marked and len(self.layers) == 1 and self.layers[0].media_type == TREE_TYPE

    @property
    def tree(self) -> str:
        """The digest under which the unpacked tree is kept."""
        return self.layers[0].digest

    @property
    def bytes(self) -> int:
        return int(self.marks.get(BYTES, 0))

    @property
    def entries(self) -> int:
        return int(self.marks.get(ENTRIES, 0))


class Index(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The names. Entries are kept as they were read: another program's may have more to say than ours."""

    schema_version: int = 2
    media_type: str = INDEX_TYPE
    manifests: list[dict[str, Any]] = []


def oci_platform() -> tuple[str, str]:
    """(os, architecture) of this machine in OCI's words."""
    machine = platform.machine().lower()
    return platform.system().lower(), _ARCHITECTURES.get(machine, machine)
