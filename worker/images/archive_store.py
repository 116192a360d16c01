"""The store's images as others can have them: to be saved in an archive or pushed.

What came from a registry or an archive is given as it came, byte for byte. What was registered here has no layers:
its tree is packed, times and all, so every node gives the same.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from worker.errors import Internal, NotFound

from .archive_write import SavedBlob, SavedImage
from .layout import Layout
from .model import MANIFEST_TYPE, Descriptor
from .pack import Packed, PackOptions, pack
from .registry.stopping import StopSignal
from .store import ImageStore


@contextmanager
def open_image(store: ImageStore, name: str, stop: StopSignal) -> Iterator[SavedImage]:
    """The image of this name, which nobody deletes while the block lasts. Blocking: a registered one is packed.

    NotFound, PullFailed, ResourceExhausted, CalledOff.
    """
    layout = store.layout
    with layout.locked():
        found = store.find(name)
        if found is None:
            raise NotFound(f"no image {name} on this node", field="image")
        manifest = layout.manifest(found.digest)
        layers = [layer.digest for layer in manifest.layers]
        needed = (found.digest, manifest.config.digest, *layers, layout.tree_of(found.digest).digest)
        store.hold(needed)
    try:
        if manifest.native:
            with _packed(store, found, stop) as packed:
                yield _of_packed(packed, name)
        else:
            yield SavedImage(
                names=(name,),
                media_type=found.media_type,
                manifest=_blob(layout, found.digest),
                config=_blob(layout, manifest.config.digest),
                layers=tuple(_blob(layout, digest) for digest in layers),
            )
    finally:
        store.release(needed)


@contextmanager
def _packed(store: ImageStore, found: Descriptor, stop: StopSignal) -> Iterator[Packed]:
    layout = store.layout
    document = layout.config(layout.manifest(found.digest).config.digest)
    options = PackOptions(
        config=store.config(found.digest),
        platform=(document.os, document.architecture, None),
        time_s=None,
        ignore_file=False,
    )
    with layout.token() as token:
        scratch = layout.partial(token)
        scratch.mkdir(mode=0o700)
        tree = Path(os.path.realpath(layout.tree_path(layout.tree_of(found.digest).digest)))
        yield pack(tree, scratch, options, check=stop.check)


def _of_packed(packed: Packed, name: str) -> SavedImage:
    return SavedImage(
        names=(name,),
        media_type=MANIFEST_TYPE,
        manifest=SavedBlob.of(packed.manifest),
        config=SavedBlob.of(packed.config),
        layers=tuple(
            SavedBlob(digest=layer.digest, size=layer.size, content=layer.path) for layer in packed.layers
        ),
    )


def _blob(layout: Layout, digest: str) -> SavedBlob:
    path = layout.blob_path(digest)
    try:
        return SavedBlob(digest=digest, size=path.stat().st_size, content=path)
    except FileNotFoundError:
        raise Internal(
            f"the image store has lost {digest}; sandfleet verify finds what else is missing"
        ) from None
