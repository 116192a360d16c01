"""Manifests and indexes as registries send them: decoded with suspicion, and one chosen for this machine.

Pure. OCI image-spec 1.1 and Docker's schema 2, which differ in their media types only. Every failure is a
PullFailed that says what is wrong with whose document.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

import msgspec

from worker.errors import PullFailed

from ..model import CONFIG_TYPE, INDEX_TYPE, MANIFEST_TYPE
from ..reference import DIGEST

DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
SCHEMA_1 = (
    "application/vnd.docker.distribution.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v1+prettyjws",
)
MANIFESTS = (MANIFEST_TYPE, DOCKER_MANIFEST)
INDEXES = (INDEX_TYPE, DOCKER_LIST)
CONFIGS = (CONFIG_TYPE, DOCKER_CONFIG)
ACCEPT = ", ".join((*MANIFESTS, *INDEXES))

MAX_MANIFEST_BYTES = 4 << 20  # the least that the specification lets a registry refuse
MAX_CONFIG_BYTES = 8 << 20
MAX_LAYERS = 500
MAX_ENTRIES = 1000
MAX_SIZE = 1 << 44

_LAYER = re.compile(
    r"application/vnd\.oci\.image\.layer\.(?:nondistributable\.)?v1\.tar(?:\+(?:gzip|zstd))?"
    r"|application/vnd\.docker\.image\.rootfs\.(?:foreign\.)?diff\.tar(?:\.(?:gzip|zstd))?"
)


class Platform(msgspec.Struct, frozen=True, kw_only=True):
    os: str = ""
    architecture: str = ""
    variant: str | None = None

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))[:80]


class Blob(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A descriptor. Its `urls` are never read: what a manifest points to elsewhere is not fetched."""

    media_type: str
    digest: str
    size: int
    platform: Platform | None = None
    annotations: dict[str, str] | None = None


class ImageManifest(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    schema_version: int
    media_type: str = ""
    config: Blob
    layers: list[Blob]


class ImageIndex(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    schema_version: int
    media_type: str = ""
    manifests: list[Blob]


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """The entry of an index to take, and what a person should know about it."""

    blob: Blob
    warning: str | None = None


def decode(content: bytes, content_type: str | None, name: str) -> ImageManifest | ImageIndex:
    """What a registry sent under the name `name`, with its media type filled in.

    The type must be the one that the document itself states: what is an index to some and a manifest to others
    (CVE-2021-41190) is refused.
    """
    document = _document(content, name)
    sent = (content_type or "").partition(";")[0].strip().lower()
    stated = document.get("mediaType")
    if stated is not None and not isinstance(stated, str):
        raise _bad(name, "mediaType is no text")
    if document.get("schemaVersion") == 1 or sent in SCHEMA_1 or stated in SCHEMA_1:
        raise _bad(name, "it is of the old schema 1, which is not supported: push it again with a newer tool")
    known = (*MANIFESTS, *INDEXES)
    kind = stated or (sent if sent in known else "")
    if stated and sent in known and sent != stated:
        raise _bad(name, f"it was sent as {sent} and says that it is {stated[:100]}")
    if not kind:
        kind = INDEX_TYPE if "manifests" in document else MANIFEST_TYPE
    if kind not in known:
        raise _bad(name, f"the type {kind[:100]} is no image")
    index = kind in INDEXES
    foreign = ("config", "layers", "fsLayers") if index else ("manifests", "fsLayers")
    if any(key in document for key in foreign):
        raise _bad(name, "it can be read as a manifest and as an index")
    found = _index(content, name) if index else _manifest(content, name)
    return msgspec.structs.replace(found, media_type=kind)


def _document(content: bytes, name: str) -> dict[str, Any]:
    """The object, if no key of it comes twice: programs differ in which of the two they would see."""
    try:
        found = json.loads(content, object_pairs_hook=_once)
    except (ValueError, RecursionError) as failure:
        reason = str(failure) if isinstance(failure, _Twice) else "it is no JSON"
        raise _bad(name, reason) from None
    if not isinstance(found, dict):
        raise _bad(name, "it is no JSON object")
    return found


class _Twice(ValueError):
    pass


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Twice("a key comes twice in it")
    return found


def _convert(content: bytes, kind: type[msgspec.Struct], name: str) -> Any:
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.MsgspecError as failure:
        raise _bad(name, str(failure)[:200]) from None


def _manifest(content: bytes, name: str) -> ImageManifest:
    found: ImageManifest = _convert(content, ImageManifest, name)
    if found.schema_version != 2:
        raise _bad(name, f"its schemaVersion is {found.schema_version}, not 2")
    if found.config.media_type not in CONFIGS:
        raise _bad(name, f"it is no container image: its config is {found.config.media_type[:100]}")
    if not 0 < len(found.layers) <= MAX_LAYERS:
        raise _bad(name, f"it has {len(found.layers)} layers; 1 to {MAX_LAYERS} can be unpacked")
    for place, layer in enumerate(found.layers):
        if _LAYER.fullmatch(layer.media_type) is None:
            raise _bad(name, f"layer {place + 1} is of the unknown type {layer.media_type[:100]}")
        _check(layer, f"layer {place + 1}", name)
    _check(found.config, "config", name)
    if found.config.size > MAX_CONFIG_BYTES:
        raise _bad(name, f"its config is larger than {MAX_CONFIG_BYTES >> 20} MiB")
    sizes: dict[str, int] = {}
    for blob in (found.config, *found.layers):
        if sizes.setdefault(blob.digest, blob.size) != blob.size:
            raise _bad(name, f"it gives two sizes for {blob.digest}")
    return found


def _index(content: bytes, name: str) -> ImageIndex:
    found: ImageIndex = _convert(content, ImageIndex, name)
    if found.schema_version != 2:
        raise _bad(name, f"its schemaVersion is {found.schema_version}, not 2")
    if len(found.manifests) > MAX_ENTRIES:
        raise _bad(name, f"it lists more than {MAX_ENTRIES} manifests")
    return found


def _check(blob: Blob, what: str, name: str) -> None:
    if DIGEST.fullmatch(blob.digest) is None:
        raise _bad(name, f"the digest of its {what} is not supported: {blob.digest[:100]!r}")
    if not 0 <= blob.size <= MAX_SIZE:
        raise _bad(name, f"the size of its {what} is impossible: {blob.size}")


def _bad(name: str, reason: str) -> PullFailed:
    return PullFailed(f"the manifest of {name} is refused: {reason}", field="image")


def choose(index: ImageIndex, here: tuple[str, str], name: str) -> Choice:
    """The entry for a machine of the OCI platform `here`. PullFailed lists what there is instead.

    On a Mac an image for linux is better than none, as its files may be all that is wanted: with a warning.
    """
    usable = [blob for blob in index.manifests if blob.media_type in (*MANIFESTS, *INDEXES)]
    found = [blob for blob in usable if blob.platform is not None and blob.platform.os != "unknown"]
    for blob in usable:
        if blob.platform is None and len(usable) == 1:
            found.append(blob)  # nothing is said of it, and there is no other
    system, architecture = here
    for wanted in _preferences(system, architecture):
        matches = [blob for blob in found if blob.platform is None or _fits(blob.platform, wanted)]
        if matches:
            blob = min(matches, key=lambda match: _variant_rank(match.platform))
            _check(blob, f"entry for {blob.platform}", name)
            if blob.size > MAX_MANIFEST_BYTES:
                raise _bad(name, f"its entry for {blob.platform} is larger than a manifest may be")
            return Choice(blob=blob, warning=mismatch(blob.platform, here, name))
    there = ", ".join(sorted({str(blob.platform) for blob in found})) or "none"
    raise PullFailed(
        f"{name} has no image for {system}/{architecture}; there is: {there[:300]}", field="image"
    )


def _preferences(system: str, architecture: str) -> Sequence[tuple[str, str]]:
    if system != "darwin":
        return ((system, architecture),)
    others = [other for other in ("arm64", "amd64") if other != architecture]
    return [(os, arch) for os in ("darwin", "linux") for arch in (architecture, *others)]


def _fits(platform: Platform, wanted: tuple[str, str]) -> bool:
    return (platform.os, platform.architecture) == wanted


def _variant_rank(platform: Platform | None) -> tuple[bool, str]:
    """The least demanding first: amd64 before amd64/v3, arm64 beside arm64/v8."""
    variant = "" if platform is None else platform.variant or ""
    return (variant not in ("", "v1", "v8"), variant)


def mismatch(platform: Platform | None, here: tuple[str, str], name: str) -> str | None:
    """What to tell about an image that is not made for this machine."""
    if platform is None or (platform.os, platform.architecture) == here:
        return None
    system, architecture = here
    if platform.os != system:
        return (
            f"{name} is made for {platform}; there is none for {system}. Its files are here, but its programs"
            f" do not run on this node ({system}/{architecture})"
        )
    if system == "darwin" and platform.architecture == "amd64":
        return f"{name} is made for {platform}: it needs Rosetta to run on this node ({architecture})"
    return f"{name} is made for {platform}, and this node is {system}/{architecture}: it may not run"
