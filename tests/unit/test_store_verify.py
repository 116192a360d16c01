"""What `verify` finds, what it throws away, and that nothing else is touched."""

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.image_maker import Layer, config_of, layer, manifest_of
from tests.registry_server import digest_of
from worker.errors import NotFound
from worker.images.layout import Layout
from worker.images.model import MANIFEST_TYPE, PULLED, Descriptor, Tree
from worker.images.store import ImageStore
from worker.images.unpack import unpack_layers
from worker.images.unpack_model import LayerFile
from worker.images.verify import Damage
from worker.platform.base import CloneReport

pytestmark = pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="clones with the Linux driver")

NAME = "registry.test/app:1"
FILES = {"bin/run": b"#!/bin/sh\n", "data/numbers": bytes(range(256)), "data/more": b"x" * 100_000}


class Cloner:
    def clone_tree(self, src: Path, dst: Path) -> CloneReport:
        from worker.platform.linux.clone import clone_tree

        return clone_tree(src, dst)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ImageStore]:
    made = ImageStore.open(tmp_path / "images", Cloner())
    yield made
    made.close()


def take_in(store: ImageStore, name: str = NAME, files: dict[str, bytes] = FILES) -> Layer:
    """An image as a pull leaves it."""
    layout = store.layout
    made = layer(files)
    config = config_of([made])
    manifest = manifest_of([made], config)
    with layout.token() as token:
        layout.partial(token).mkdir(mode=0o700)
        with layout.locked():
            layout.put_blob(made.content)
        source = LayerFile(
            path=layout.blob_path(made.digest), media_type=made.media_type, diff_id=digest_of(made.tar)
        )
        unpack_layers([source], layout.partial(token))
        size = sum(len(content) for content in files.values())
        with layout.locked():
            layout.put_tree(token, Tree(digest=digest_of(made.tar), bytes=size, entries=10))
            layout.put_blob(config)
            layout.put_blob(manifest)
            store.give_name(
                name,
                Descriptor(
                    media_type=MANIFEST_TYPE,
                    digest=digest_of(manifest),
                    size=len(manifest),
                    annotations={PULLED: "1"},
                ),
            )
    store.record_later(digest_of(made.tar))
    return made


async def recorded(store: ImageStore, made: Layer) -> Path:
    """The tree, once it was written down what it holds."""
    tree = digest_of(made.tar)
    async with asyncio.timeout(20):
        while not store.layout.tree_listing(tree).exists():
            await asyncio.sleep(0.01)
    return store.layout.tree_path(tree)


def edit(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change a file so that nothing but its bytes tells."""
    before = path.stat()
    path.write_bytes(change(path.read_bytes()))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def flip(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


async def test_a_sound_store(store: ImageStore, tmp_path: Path) -> None:
    await recorded(store, take_in(store))
    source = tmp_path / "source"
    source.mkdir()
    (source / "f").write_text("f")
    await store.register("own", source)
    found = await store.verify()
    assert (found.checked, found.unrecorded, found.damaged) == (2, 0, ())
    assert (await store.verify("own")).checked == 1
    with pytest.raises(NotFound):
        await store.verify("other")


async def test_a_flipped_bit_of_a_layer(store: ImageStore) -> None:
    made = take_in(store)
    tree = await recorded(store, made)
    edit(store.layout.blob_path(made.digest), flip)
    found = store.find(NAME)
    assert found is not None
    assert store.is_whole(found)
    (damage,) = (await store.verify()).damaged
    assert (damage.image, damage.part, damage.dropped) == (NAME, f"blob {made.digest}", True)
    assert "digest" in damage.reason
    assert not store.layout.blob_path(made.digest).exists()
    # Containers can still be made of the tree; a pull knows that something is missing.
    assert tree.is_dir()
    found = store.find(NAME)
    assert found is not None
    assert not store.is_whole(found)
    (damage,) = (await store.verify()).damaged
    assert damage.reason == "is missing"


@pytest.mark.parametrize(
    ("harm", "part"),
    [
        (lambda tree: edit(tree / "data/numbers", flip), "tree data/numbers"),
        (lambda tree: (tree / "data/more").unlink(), "tree data"),
        (lambda tree: (tree / "bin/new").write_text("x"), "tree bin"),
        (lambda tree: (tree / "bin/run").chmod(0o700), "tree bin/run"),
        (lambda tree: os.utime(tree / "bin/run", ns=(0, 0)), "tree bin/run"),
        (lambda tree: (tree / "zzz").symlink_to("/etc"), "tree ."),
    ],
)
async def test_a_tree_that_is_not_as_it_was(
    store: ImageStore, harm: Callable[[Path], object], part: str
) -> None:
    tree = await recorded(store, take_in(store))
    harm(tree)
    (damage,) = (await store.verify()).damaged
    assert (damage.image, damage.part, damage.reason) == (NAME, part, "is not as it was taken in")
    # It is gone, and its image is one that a pull brings back.
    assert not tree.exists()
    assert store.find(NAME) is None
    assert [entry.name for entry in store.list()] == [NAME]


@pytest.mark.parametrize("document", ["manifest", "config"])
async def test_a_damaged_document(store: ImageStore, document: str) -> None:
    await recorded(store, take_in(store))
    found = store.find(NAME)
    assert found is not None
    manifest = store.layout.manifest(found.digest)
    digest = found.digest if document == "manifest" else manifest.config.digest
    edit(store.layout.blob_path(digest), flip)
    (damage,) = (await store.verify()).damaged
    assert damage.part == f"blob {digest}"
    assert store.find(NAME) is None
    assert [(entry.name, entry.bytes) for entry in store.list()] == [(NAME, 0)]
    assert (await store.use()).images == 1


async def test_what_was_registered_stays(store: ImageStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "f").write_text("f")
    info = await store.register("own", source)
    tree = store.layout.tree_path(store.layout.tree_of(info.digest).digest)
    edit(tree / "f", flip)
    (damage,) = (await store.verify()).damaged
    assert damage == Damage(
        image="own", digest=info.digest, part="tree f", reason="is not as it was taken in", dropped=False
    )
    assert tree.is_dir()
    assert store.find("own") is not None


async def test_images_that_share_are_read_once_and_told_each(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = take_in(store)
    await store.tag(NAME, "registry.test/app:2")
    await recorded(store, made)
    edit(store.layout.blob_path(made.digest), flip)
    found = await store.verify()
    assert [damage.image for damage in found.damaged] == [NAME, "registry.test/app:2"]


async def test_a_tree_without_a_record_gets_one(store: ImageStore) -> None:
    made = take_in(store)
    tree = await recorded(store, made)
    listing = store.layout.tree_listing(digest_of(made.tar))
    content = listing.read_bytes()
    listing.unlink()
    found = await store.verify()
    assert (found.unrecorded, found.damaged) == (1, ())
    assert listing.read_bytes() == content
    edit(tree / "data/numbers", flip)
    assert len((await store.verify()).damaged) == 1


async def test_a_record_that_a_dead_worker_owed_is_made_up_for(tmp_path: Path) -> None:
    first = ImageStore.open(tmp_path / "images", Cloner())
    made = take_in(first)
    await recorded(first, made)
    first.close()
    listing = Layout.open(tmp_path / "images").tree_listing(digest_of(made.tar))
    listing.rename(listing.with_suffix(".listing"))  # as if it had died while writing
    second = ImageStore.open(tmp_path / "images", Cloner())
    try:
        await recorded(second, made)
        assert not listing.with_suffix(".listing").exists()
    finally:
        second.close()


async def test_what_stands_beside_a_tree_that_is_gone_is_swept(tmp_path: Path) -> None:
    ImageStore.open(tmp_path / "images", Cloner()).close()
    rootfs = tmp_path / "images" / "rootfs"
    for kind in ("json", "list", "listing"):
        (rootfs / f"{'a' * 64}.{kind}").write_text("{}")
    ImageStore.open(tmp_path / "images", Cloner()).close()
    assert os.listdir(rootfs) == []
