"""Named volumes: folders of the node that outlive every container, and what is remembered of them.

    {data_dir}/volumes/{name}/          the volume itself
    {data_dir}/volumes/.about/{name}    when it was made, the size it was asked for, and whether that is held

A volume without a file in `.about` is one all the same.
"""

import errno
import os
import stat
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from worker.errors import Conflict, CreateFailed, NotFound, ResourceExhausted, is_out_of_space
from worker.ids import new_ulid
from worker.images.trees import remove_tree
from worker.node_file import replace_file
from worker.platform.base import FolderLimits
from worker.platform.descent import OPEN_DIRECTORY, Descent, Moved

ABOUT = ".about"
GONE = ".gone-"
_encode = msgspec.json.Encoder().encode


class About(msgspec.Struct, frozen=True, kw_only=True):
    """`held`: the file system refuses what goes beyond `size_bytes`."""

    created_at: datetime
    size_bytes: int | None = None
    held: bool = False


class Named(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    created_at: datetime
    size_bytes: int | None
    held: bool = False


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What the files take up on disk. Not `complete`: there was no time to see them all, or they kept moving."""

    bytes: int
    files: int
    complete: bool


_decode = msgspec.json.Decoder(About).decode


_making = threading.Lock()


def make_named(folder: Path, size_bytes: int | None, limits: FolderLimits | None = None) -> bool:
    """Make the volume whose folder this is, held to its size where there are `limits`; False when it is there.

    Blocking. CreateFailed, ResourceExhausted. Conflict when it is there, and not held to a size that could be.
    """
    about = folder.parent / ABOUT
    held = limits is not None and size_bytes is not None
    with _making:
        try:
            about.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                if limits is not None and size_bytes is not None:
                    limits.make(folder, size_bytes, 0o700)
                else:
                    folder.mkdir(mode=0o700)
            except FileExistsError:
                if not folder.is_dir() or folder.is_symlink():
                    raise
                there = about_named(folder.parent, folder.name)
                if held and not (there.held and there.size_bytes == size_bytes):
                    raise _other_size(there) from None
                return False
            told = About(created_at=datetime.now(UTC), size_bytes=size_bytes, held=held)
            replace_file(about / folder.name, _encode(told))
        except OSError as failure:
            kind = ResourceExhausted if is_out_of_space(failure.errno) else CreateFailed
            why = (
                "is no directory" if failure.errno == errno.EEXIST else f"cannot be made: {failure.strerror}"
            )
            raise kind(f"{failure.filename or folder} {why}", field="name") from failure
    return True


def create_named(root: Path, name: str, size_bytes: int | None, limits: FolderLimits | None = None) -> bool:
    """As `make_named`; Conflict when it is there with another size."""
    if make_named(root / name, size_bytes, limits):
        return True
    there = about_named(root, name)
    if size_bytes is not None and there.size_bytes != size_bytes:
        raise _other_size(there)
    return False


def _other_size(there: Named) -> Conflict:
    known = "without a size" if there.size_bytes is None else f"with a size of {there.size_bytes} bytes"
    loose = "" if there.held or there.size_bytes is None else ", which nothing holds it to"
    return Conflict(f"the volume {there.name} is there already, {known}{loose}", field="size")


def about_named(root: Path, name: str) -> Named:
    """Blocking. NotFound."""
    try:
        found = os.stat(root / name, follow_symlinks=False)
    except FileNotFoundError:
        raise NotFound(f"there is no volume {name}", field="name") from None
    if not stat.S_ISDIR(found.st_mode):
        raise NotFound(f"there is no volume {name}", field="name")
    try:
        about = _decode((root / ABOUT / name).read_bytes())
    except (OSError, msgspec.DecodeError):
        about = About(created_at=datetime.fromtimestamp(found.st_ctime, UTC))
    return Named(name=name, created_at=about.created_at, size_bytes=about.size_bytes, held=about.held)


def list_named(root: Path) -> list[Named]:
    """All of them, by name. Blocking."""
    found = []
    for name in sorted(os.listdir(root)):
        if not name.startswith("."):
            try:
                found.append(about_named(root, name))
            except NotFound:
                continue
    return found


def take_away(root: Path, name: str) -> Path:
    """Free the name of a volume at one stroke; what it held is to be deleted with `remove_tree`. NotFound.

    Does not block, so that no container can be made of it between the look whether one is and this.
    """
    gone = root / f"{GONE}{new_ulid()}"
    try:
        os.rename(root / name, gone)
    except FileNotFoundError:
        raise NotFound(f"there is no volume {name}", field="name") from None
    (root / ABOUT / name).unlink(missing_ok=True)
    return gone


def sweep_gone(root: Path) -> None:
    """Delete what a dead worker had taken away. Blocking."""
    for name in os.listdir(root):
        if name.startswith(GONE):
            remove_tree(root / name)


def usage(folder: Path, timeout_s: float) -> Usage:
    """Measure a folder that others may be writing, without following a link, for so long at most. Blocking."""
    end = time.monotonic() + timeout_s
    total = files = 0
    try:
        walk = Descent(os.open(folder, OPEN_DIRECTORY))
    except OSError:
        return Usage(bytes=0, files=0, complete=False)
    seen: set[tuple[int, int]] = set()
    complete = True
    pending: list[list[str]] = []

    def look() -> list[str]:
        nonlocal total, files, complete
        folders: list[str] = []
        with os.scandir(walk.fd) as entries:
            for entry in entries:
                try:
                    found = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if time.monotonic() > end:
                    complete = False
                    return []
                if stat.S_ISDIR(found.st_mode):
                    folders.append(entry.name)
                elif found.st_nlink > 1 and (found.st_dev, found.st_ino) in seen:
                    continue
                elif found.st_nlink > 1:
                    seen.add((found.st_dev, found.st_ino))
                files += not stat.S_ISDIR(found.st_mode)
                total += found.st_blocks * 512
        return folders

    try:
        pending.append(look())
        while pending and complete:
            if pending[-1]:
                try:
                    walk.down(pending[-1].pop())
                except OSError as failure:
                    complete = complete and failure.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
                else:
                    pending.append(look())
            else:
                pending.pop()
                if pending:
                    walk.up()
    except (OSError, Moved):
        complete = False
    finally:
        walk.close()
    return Usage(bytes=total, files=files, complete=complete)
