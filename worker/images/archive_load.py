"""Taking the images of an archive into the store: as a pull does, from a file of this machine.

Read, checked and unpacked before anything gets a name; whoever is killed in between leaves blobs and trees that
`prune` deletes. Loading the same archive again changes nothing.
"""

import os
import stat
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import msgspec

from worker.errors import InvalidCommand, PullFailed
from worker.platform.descent import open_directory
from worker.platform.treecopy import OPEN_FILE, printable

from .archive import Archive, ArchivedImage
from .ingest import Ingest
from .model import ImageInfo
from .pulled import TakeIn, Unpack, disk_failed
from .reference import parse_name
from .registry.stopping import StopSignal
from .store import ImageStore
from .unpack import unpack_layers

MAX_NAMES = 100


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """`images` by name, as the archive has them; `warnings` say what a person should know about them."""

    images: tuple[ImageInfo, ...]
    warnings: tuple[str, ...] = ()


def load_archive(
    store: ImageStore,
    source: Path,
    name: str | None,
    *,
    allowed: Callable[[str], None],
    here: tuple[str, str],
    stop: StopSignal,
    unpack: Unpack = unpack_layers,
) -> Loaded:
    """Blocking. `source` is a canonical path; `name` is for an archive of one image, whatever it calls it.

    `allowed` raises for a name that this node may not have. PullFailed, ResourceExhausted, InvalidCommand.
    """
    layout = store.layout
    with layout.token() as token, open_archive(source) as file:
        folder = layout.partial(token)
        try:
            folder.mkdir(mode=0o700)
            archive = Archive.read(file, folder, stop.check)
            images = archive.images(here)
            wanted = _named(images, name)
            for given, _ in wanted:
                allowed(given)
            warnings: dict[str, None] = {}
            if unnamed := sum(1 for image in images if not image.names) * (name is None):
                warnings[f"{unnamed} images of the archive have no name and were left out"] = None
            with ExitStack() as held:
                ready = []
                for given, image in wanted:
                    store.hold(image.plan.blobs)
                    held.callback(store.release, image.plan.blobs)
                    work = TakeIn(store, Ingest(folder), image.plan, stop)
                    notes = _take_in(work, image, unpack)
                    ready.append((given, work))
                    warnings.update(dict.fromkeys((*image.plan.warnings, *notes)))
                # All are here, so none is named without the others.
                made = tuple(work.publish(given) for given, work in ready)
        except OSError as failure:
            raise disk_failed(failure, "load") from failure
    return Loaded(images=made, warnings=tuple(warnings))


def _take_in(work: TakeIn, image: ArchivedImage, unpack: Unpack) -> tuple[str, ...]:
    missing = work.missing()
    work.check_space(())  # the layers are on the disk already; their content is not
    for blob in missing:
        work.adopt(image.files[blob.digest], blob.digest)
    return work.unpack(unpack)


def _named(images: list[ArchivedImage], name: str | None) -> list[tuple[str, ArchivedImage]]:
    """What to take in under which name; each name once, the last one counts."""
    if name is not None:
        parse_name(name)
        if len(images) > 1:
            raise InvalidCommand(
                f"the archive has {len(images)} images, so one name is not enough", field="image"
            )
        return [(name, images[0])]
    wanted = {given: image for image in images for given in image.names}
    if len(images) == 1 and not wanted:
        raise PullFailed("the archive does not say what its image is called: give a name", field="image")
    if not wanted:
        raise PullFailed("the archive does not say what its images are called", field="source_file")
    if len(wanted) > MAX_NAMES:
        raise PullFailed(f"the archive has more than {MAX_NAMES} names", field="source_file")
    return list(wanted.items())


def open_archive(source: Path) -> BinaryIO:
    """A file at a canonical path, no link followed. PullFailed."""
    try:
        parent = open_directory(source.parent)
        try:
            fd = os.open(source.name, OPEN_FILE, dir_fd=parent)
        finally:
            os.close(parent)
    except OSError as failure:
        shown = printable(str(source))
        raise PullFailed(f"{shown} cannot be read: {failure.strerror}", field="source_file") from failure
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise PullFailed(f"{printable(str(source))} is no file", field="source_file")
    return os.fdopen(fd, "rb", buffering=0)
