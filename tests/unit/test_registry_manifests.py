"""Documents of registries: what is taken, what is refused, and which image is chosen for a machine."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import PullFailed
from worker.images.chain import chain_id
from worker.images.registry.manifests import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    MAX_LAYERS,
    SCHEMA_1,
    Blob,
    ImageIndex,
    ImageManifest,
    Platform,
    choose,
    decode,
)

OCI = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
A, B, C = (f"sha256:{letter * 64}" for letter in "abc")


def manifest(**changes: Any) -> dict[str, Any]:
    document: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": OCI,
        "config": {"mediaType": CONFIG, "digest": A, "size": 10},
        "layers": [{"mediaType": LAYER, "digest": B, "size": 20}],
    }
    document.update(changes)
    return {key: value for key, value in document.items() if value is not None}


def layer(**changes: Any) -> dict[str, Any]:
    return {"mediaType": LAYER, "digest": B, "size": 20, **changes}


def taken(document: Any, content_type: str | None = OCI) -> ImageManifest | ImageIndex:
    return decode(json.dumps(document).encode(), content_type, "a.test/app:1")


def test_a_manifest() -> None:
    found = taken(manifest())
    assert isinstance(found, ImageManifest)
    assert [blob.digest for blob in found.layers] == [B]


@pytest.mark.parametrize(
    ("content_type", "stated", "kind"),
    [
        (OCI, None, OCI),
        (OCI, OCI, OCI),
        (f"{OCI}; charset=utf-8", OCI, OCI),
        (None, OCI, OCI),
        (None, None, OCI),
        ("application/json", None, OCI),
        (DOCKER_MANIFEST, DOCKER_MANIFEST, DOCKER_MANIFEST),
        (DOCKER_MANIFEST, None, DOCKER_MANIFEST),
    ],
)
def test_its_type(content_type: str | None, stated: str | None, kind: str) -> None:
    assert taken(manifest(mediaType=stated), content_type).media_type == kind


@pytest.mark.parametrize(
    "kind",
    [
        "application/vnd.oci.image.layer.v1.tar",
        "application/vnd.oci.image.layer.v1.tar+gzip",
        "application/vnd.oci.image.layer.v1.tar+zstd",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
        "application/vnd.docker.image.rootfs.diff.tar",
        "application/vnd.docker.image.rootfs.diff.tar.gzip",
        "application/vnd.docker.image.rootfs.diff.tar.zstd",
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
    ],
)
def test_kinds_of_layers(kind: str) -> None:
    assert isinstance(taken(manifest(layers=[layer(mediaType=kind)])), ImageManifest)


@pytest.mark.parametrize(
    ("document", "content_type", "message"),
    [
        (manifest(schemaVersion=1), OCI, "old schema 1"),
        (manifest(), SCHEMA_1[1], "old schema 1"),
        (manifest(mediaType=SCHEMA_1[0]), None, "old schema 1"),
        (manifest(schemaVersion=3), OCI, "schemaVersion is 3"),
        (manifest(schemaVersion="2"), OCI, "Expected `int`"),
        (manifest(), OCI_INDEX, "was sent as"),
        (manifest(mediaType=OCI_INDEX), OCI_INDEX, "as a manifest and as an index"),
        (manifest(manifests=[]), OCI, "as a manifest and as an index"),
        (manifest(fsLayers=[]), OCI, "as a manifest and as an index"),
        (manifest(mediaType="text/html"), OCI, "was sent as"),
        (manifest(mediaType="text/html"), None, "no image"),
        (manifest(mediaType=5), OCI, "no text"),
        (manifest(config=None), OCI, "config"),
        (manifest(config={"mediaType": "application/vnd.cncf.helm.config.v1+json", "digest": A, "size": 1}), OCI,
         "no container image: its config is application/vnd.cncf.helm"),
        (manifest(config={"mediaType": CONFIG, "digest": A, "size": 1 << 40}), OCI, "config is larger"),
        (manifest(layers=[]), OCI, "0 layers"),
        (manifest(layers=[layer()] * (MAX_LAYERS + 1)), OCI, "501 layers"),
        (manifest(layers=[layer(mediaType="application/vnd.sandfleet.tree.v1")]), OCI, "layer 1 is of the unknown"),
        (manifest(layers=[layer(mediaType=f"{LAYER}+encrypted")]), OCI, "unknown type .*encrypted"),
        (manifest(layers=[layer(), layer(digest="sha512:" + "a" * 128)]), OCI, "the digest of its layer 2"),
        (manifest(layers=[layer(digest="sha256:../../../etc/passwd")]), OCI, "the digest of its layer 1"),
        (manifest(layers=[layer(digest=B.upper())]), OCI, "the digest of its layer 1"),
        (manifest(layers=[layer(size=-1)]), OCI, "impossible: -1"),
        (manifest(layers=[layer(size=1 << 50)]), OCI, "impossible"),
        (manifest(layers=[layer(size=1.5)]), OCI, "Expected `int`"),
        (manifest(layers=[layer(), layer(size=21)]), OCI, "two sizes"),
        ([], OCI, "no JSON object"),
        ("text", OCI, "no JSON object"),
    ],
)  # fmt: skip
def test_documents_that_are_refused(document: Any, content_type: str | None, message: str) -> None:
    with pytest.raises(PullFailed, match=message) as caught:
        taken(document, content_type)
    assert caught.value.field == "image"
    assert "a.test/app:1" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no JSON"),
        (b"<html>", "no JSON"),
        (b"[" * 200_000, "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b'{"schemaVersion": 2, "schemaVersion": 2}', "twice"),
        (json.dumps(manifest())[:-1].encode() + b', "config": {}}', "twice"),
    ],
)
def test_content_that_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(PullFailed, match=message):
        decode(content, OCI, "app")


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_decoder(content: bytes) -> None:
    with suppress(PullFailed):
        decode(content, None, "app")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(["schemaVersion", "mediaType", "config", "layers", "manifests"]), json_values)
def test_no_value_crashes_the_decoder(key: str, value: Any) -> None:
    for content_type in (OCI, OCI_INDEX, DOCKER_LIST, None):
        document = {**manifest(), key: value}
        with suppress(PullFailed):
            taken(document, content_type)


# -- choosing


def index(*entries: tuple[str, str] | tuple[str, str, str] | None) -> ImageIndex:
    """Entries in order, told apart by their size, 1, 2, 3 …"""
    blobs = []
    for size, entry in enumerate(entries, 1):
        platform = None
        if entry is not None:
            platform = Platform(os=entry[0], architecture=entry[1], variant=(*entry, None)[2])
        blobs.append(Blob(media_type=OCI, digest=A, size=size, platform=platform))
    return ImageIndex(schema_version=2, manifests=blobs)


@pytest.mark.parametrize(
    ("here", "entries", "chosen", "warning"),
    [
        (("linux", "amd64"), [("linux", "arm64"), ("linux", "amd64")], 2, None),
        (("linux", "amd64"), [("linux", "amd64", "v3"), ("linux", "amd64")], 2, None),
        (("linux", "amd64"), [("linux", "amd64", "v3"), ("linux", "amd64", "v2")], 2, None),
        (("linux", "arm64"), [("linux", "arm", "v7"), ("linux", "arm64", "v8")], 2, None),
        (("linux", "amd64"), [("unknown", "unknown"), ("linux", "amd64")], 2, None),
        (("linux", "amd64"), [None], 1, None),
        (("darwin", "arm64"), [("linux", "arm64"), ("darwin", "amd64"), ("darwin", "arm64")], 3, None),
        (("darwin", "arm64"), [("linux", "arm64"), ("darwin", "amd64")], 2, "needs Rosetta"),
        (("darwin", "arm64"), [("linux", "amd64"), ("linux", "arm64")], 2, "there is none for darwin"),
        (("darwin", "arm64"), [("windows", "amd64"), ("linux", "amd64")], 2, "do not run on this node"),
        (("darwin", "amd64"), [("linux", "arm64"), ("linux", "amd64")], 2, "do not run"),
    ],
)
def test_what_is_chosen(here: tuple[str, str], entries: list[Any], chosen: int, warning: str | None) -> None:
    choice = choose(index(*entries), here, "app")
    assert choice.blob.size == chosen
    if warning is None:
        assert choice.warning is None
    else:
        assert choice.warning is not None
        assert warning in choice.warning


@pytest.mark.parametrize(
    ("here", "entries", "listed"),
    [
        (("linux", "amd64"), [("linux", "arm64"), ("windows", "amd64")], "linux/arm64, windows/amd64"),
        (("linux", "amd64"), [("darwin", "amd64")], "darwin/amd64"),
        (("darwin", "arm64"), [("windows", "amd64")], "windows/amd64"),
        (("linux", "amd64"), [], "none"),
        (("linux", "amd64"), [("unknown", "unknown")], "none"),
        (("linux", "amd64"), [None, None], "none"),
    ],
)
def test_nothing_to_choose(here: tuple[str, str], entries: list[Any], listed: str) -> None:
    with pytest.raises(PullFailed, match=f"has no image for {'/'.join(here)}; there is: {listed}$"):
        choose(index(*entries), here, "app")


# -- the name of a pile of layers


def test_chain_ids() -> None:
    """The rule and its example: image-spec, config.md, "Layer ChainID"."""
    import hashlib

    assert chain_id({"diff_ids": [A]}) == A
    two = f"sha256:{hashlib.sha256(f'{A} {B}'.encode()).hexdigest()}"
    assert chain_id({"diff_ids": [A, B]}) == two
    assert chain_id({"diff_ids": [A, B, C]}) == f"sha256:{hashlib.sha256(f'{two} {C}'.encode()).hexdigest()}"
    assert chain_id({"diff_ids": [B, A]}) != two
