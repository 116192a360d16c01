"""The folders behind volumes, and where they appear without a mount namespace: a link in the rootfs, at the
target, to the folder on the host.

Called while nothing of the container runs, on a rootfs that an image filled: every link in it is somebody
else's, so each step is resolved inside the root.
"""

import errno
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath

from loguru import logger

from worker.errors import CreateFailed, Unsupported
from worker.ids import new_ulid
from worker.images.trees import remove_tree
from worker.platform.base import Driver, FolderLimits, VolumeMount
from worker.rootpath import resolve_in_root
from worker.volumes_named import GONE, make_named

OWN_KINDS = ("named", "anonymous", "tmpfs")


def find_limits(driver: Driver, root: Path) -> None:
    """Let the driver see whether folders in `root`, where the named volumes are, can be held to a size. Blocking."""
    try:
        driver.find_folder_limits(
            root / f"{GONE}{new_ulid()}"
        )  # which the next start deletes, if this one dies
    except OSError as failure:
        logger.warning("whether {} holds volumes to a size cannot be seen: {}", root, failure)


def mount_volumes(volumes: Iterable[VolumeMount], rootfs: Path, limits: FolderLimits | None = None) -> None:
    """Make the sources that are ours and put a link at each target. What the image has there is covered: gone.

    Raises Unsupported for a target below another volume's, CreateFailed for one that cannot be made.
    """
    placed: list[str] = []
    for volume in sorted(volumes, key=lambda v: len(v.target)):
        above = next((p for p in placed if volume.target.startswith(p.rstrip("/") + "/")), None)
        if above is not None:
            raise Unsupported(
                f"the volume at {volume.target} lies inside the one at {above}, which needs isolation rootfs",
                field="spec.storage",
            )
        placed.append(volume.target)
        make_sources((volume,), limits)
        try:
            _link(volume, rootfs)
        except OSError as failure:
            raise CreateFailed(
                f"the volume target {volume.target} cannot be made: {failure.strerror}", field="spec.storage"
            ) from failure


def make_sources(volumes: Iterable[VolumeMount], limits: FolderLimits | None = None) -> None:
    """Make the folders that are ours to make, held to their size where there are `limits`. CreateFailed, Conflict."""
    for volume in volumes:
        if volume.kind == "named":
            make_named(Path(volume.source), volume.size_bytes, limits)
        elif volume.kind in OWN_KINDS:
            _make_source(volume, limits)


def make_places(volumes: Iterable[VolumeMount]) -> None:
    """Make, inside of volumes that are ours, the folders at which others are mounted: a read-only one could not be
    given them later. What stands there stays. CreateFailed.

    Volumes of the operator's (`bind`) get theirs by the mount itself, and only where they may be written.
    """
    placed = sorted(volumes, key=lambda v: len(v.target))
    for inner in placed:
        above = [v for v in placed if inner.target.startswith(v.target.rstrip("/") + "/")]
        if not above or above[-1].kind in ("bind", "tmpfs"):
            continue
        below = PurePosixPath("/") / inner.target[len(above[-1].target) :].lstrip("/")
        try:
            _make_folders(Path(above[-1].source), below)
        except OSError as failure:
            raise CreateFailed(
                f"the place for {inner.target} in the volume at {above[-1].target} cannot be made: "
                f"{failure.strerror}",
                field="spec.storage",
            ) from failure


def empty_tmpfs(volumes: Iterable[VolumeMount], limits: FolderLimits | None = None) -> None:
    """A `tmpfs` begins each run empty."""
    for volume in volumes:
        if volume.kind == "tmpfs":
            remove_tree(Path(volume.source))
            _make_source(volume, limits)


def _make_source(volume: VolumeMount, limits: FolderLimits | None = None) -> None:
    source = Path(volume.source)
    try:
        source.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if limits is not None and volume.size_bytes is not None:
            with suppress(FileExistsError):
                limits.make(source, volume.size_bytes, 0o700)
        else:
            source.mkdir(mode=0o700, exist_ok=True)
        if volume.mode is not None:
            source.chmod(volume.mode)
    except OSError as failure:
        raise CreateFailed(f"{source}: {failure.strerror}", field="spec.storage") from failure


def _link(volume: VolumeMount, rootfs: Path) -> None:
    target = PurePosixPath(volume.target)
    if len(target.parts) < 2:
        raise OSError(errno.EBUSY, "the root itself cannot be covered")
    folder = _make_folders(rootfs, target.parent)
    place = folder / target.name
    remove_tree(place)
    os.symlink(volume.source, place)


def _make_folders(rootfs: Path, path: PurePosixPath) -> Path:
    """The folder of that path inside the root, made where it is missing."""
    at = PurePosixPath("/")
    found = rootfs
    for name in path.parts[1:]:
        at = at / name
        try:
            found = resolve_in_root(rootfs, f"{at}/")
        except FileNotFoundError:
            # A dangling link is covered too: mkdir does not follow it, so it goes first.
            made = resolve_in_root(rootfs, f"{at.parent}/") / name
            if made.is_symlink():
                made.unlink()
            made.mkdir(mode=0o755)
            found = made
    return found
