"""Finding and deleting what no name and no container reaches any more."""

import os
from collections.abc import Iterable
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

import msgspec

from worker.errors import Internal, NotFound

from .layout import MAX_DOCUMENT_BYTES, PARTIAL, Layout
from .model import INDEX_TYPE, MANIFEST_TYPE, ImageInfo, Tree
from .reference import DIGEST
from .trees import tree_size

_MANIFEST_TYPES = (
    MANIFEST_TYPE,
    INDEX_TYPE,
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Detached:
    """What was taken out of the store, out of everyone's sight, but still takes up its room."""

    def __init__(self) -> None:
        self.images: list[ImageInfo] = []
        self.blob_bytes = 0
        self._trees = ExitStack()

    def add_tree(self, layout: Layout, tree: str) -> None:
        """Under the lock: from here on the tree is nothing but rubbish of a token."""
        token = self._trees.enter_context(layout.token())
        layout.tree_path(tree).rename(layout.partial(token))
        layout.tree_record(tree).unlink(missing_ok=True)
        layout.tree_listing(tree).unlink(missing_ok=True)
        layout.unfinished_listing(tree).unlink(missing_ok=True)

    def delete(self) -> list[ImageInfo]:
        """Blocking, without the lock. `bytes` of each image are what its end set free."""
        self._trees.close()
        return self.images


def detach(
    layout: Layout, kept: Iterable[str], *, only: str | None = None, held: Iterable[str] = ()
) -> Detached:
    """Take out all that neither the index nor the digests in `kept` reach, or of that only what `only` names.

    `held` are single blobs and trees of images on their way in. Under the lock.
    """
    reached = _reached(layout, kept).union(held)
    gone = Detached()
    blobs = closure(layout, only) if only is not None else _blobs(layout)
    trees = [tree for tree in _trees(layout) if tree not in reached and (only is None or tree in blobs)]
    unclaimed = dict.fromkeys(trees)
    for digest in sorted(blobs - reached):
        image = _tree(layout, digest)
        if image is None:
            continue
        size = image.bytes if image.digest in unclaimed else 0
        unclaimed.pop(image.digest, None)
        gone.images.append(_info(digest, size))
    # A crash between placing a tree and naming it.
    gone.images += [_info(tree, tree_size(layout.tree_path(tree)).bytes) for tree in unclaimed]
    try:
        for tree in trees:
            gone.add_tree(layout, tree)
        for digest in blobs - reached:
            gone.blob_bytes += layout.forget(digest)
    except OSError:
        gone.delete()
        raise
    return gone


def _info(digest: str, size: int) -> ImageInfo:
    return ImageInfo(name=digest, digest=digest, bytes=size, created_at=_EPOCH)


def _reached(layout: Layout, kept: Iterable[str]) -> set[str]:
    reached: set[str] = set()
    for raw in layout.read_index().manifests:
        reached |= closure(layout, str(raw.get("digest")), str(raw.get("mediaType")))
    for digest in kept:
        reached |= closure(layout, digest)
    return reached


def closure(layout: Layout, digest: str, media_type: str = MANIFEST_TYPE) -> set[str]:
    """A digest and all that it leads to, also where another program wrote it."""
    if DIGEST.fullmatch(digest) is None:
        return set()
    found = {digest}
    if media_type not in _MANIFEST_TYPES:
        return found
    tree = _tree(layout, digest)
    if tree is not None:
        found.add(tree.digest)
    for child in _children(layout, digest):
        if child.get("digest") not in found:
            found |= closure(layout, str(child.get("digest")), str(child.get("mediaType")))
    return found


def _children(layout: Layout, digest: str) -> list[dict[str, Any]]:
    try:
        with layout.blob_path(digest).open("rb") as file:
            document = msgspec.json.decode(file.read(MAX_DOCUMENT_BYTES))
    except (FileNotFoundError, msgspec.DecodeError, RecursionError):
        return []
    if not isinstance(document, dict):
        return []
    found = [document.get("config"), *_items(document, "layers"), *_items(document, "manifests")]
    return [child for child in found if isinstance(child, dict)]


def _items(document: dict[str, Any], key: str) -> list[Any]:
    value = document.get(key)
    return value if isinstance(value, list) else []


def _blobs(layout: Layout) -> set[str]:
    names = (f"sha256:{name}" for name in os.listdir(layout.root / "blobs" / "sha256"))
    return {name for name in names if DIGEST.fullmatch(name)}


def _trees(layout: Layout) -> list[str]:
    names = sorted(os.listdir(layout.root / "rootfs"))
    digests = (f"sha256:{name}" for name in names if not name.startswith(PARTIAL))
    return [digest for digest in digests if DIGEST.fullmatch(digest)]


def _tree(layout: Layout, digest: str) -> Tree | None:
    """The tree of a blob that is an image's manifest."""
    try:
        head = layout.blob_path(digest).open("rb")
    except FileNotFoundError:
        return None
    with head:
        if head.read(1) != b"{":
            return None  # a listing or a layer, which may be long
    try:
        return layout.tree_of(digest)
    except (NotFound, Internal):
        return None
