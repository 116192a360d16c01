"""Whether the store still holds what it took in: blobs by their digests, trees by their listings.

Reads every byte of every image. Of an image from a registry what is damaged is thrown away, so that the next pull
fetches it again. What was registered here nobody else has: it stays as it is and is told.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol, cast
from urllib.parse import unquote_to_bytes

import msgspec

from worker.errors import ContractError
from worker.platform.descent import OPEN_DIRECTORY
from worker.platform.treecopy import TreeError, printable
from worker.platform.xattrs import Xattrs

from .layout import Layout
from .listing import write_listing
from .model import NATIVE, REF_NAME, Descriptor

_READ = 1 << 20
# Where the path stands in each kind of line, see `listing`.
_PATH_AT = {"d": 3, "f": 5, "h": 1, "l": 2}

Check = Callable[[], None]


class Damage(msgspec.Struct, frozen=True, kw_only=True):
    """`part` is `blob sha256:…`, `tree`, or `tree PATH` with the first file that is not as it was.

    `dropped`: it is gone, and the next pull of the image brings it back.
    """

    image: str
    digest: str
    part: str
    reason: str
    dropped: bool


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """`checked` counts images; `unrecorded` the trees of which only now was recorded what they hold."""

    checked: int
    unrecorded: int
    damaged: tuple[Damage, ...]


class Keeper(Protocol):
    """The store, as far as it is needed here."""

    @property
    def layout(self) -> Layout: ...

    def hold(self, digests: Iterable[str]) -> None: ...

    def release(self, digests: Iterable[str]) -> None: ...

    def drop_tree(self, digest: str) -> None: ...


class Verification:
    """One look at some images. Blocking; `check` raises when nobody waits for it any more."""

    def __init__(self, store: Keeper, xattrs: Xattrs, check: Check) -> None:
        self._store = store
        self._layout = store.layout
        self._xattrs = xattrs
        self._check = check
        # Of blobs and trees that several images share: the part and what is wrong with it, or None.
        self._known: dict[str, tuple[str, str] | None] = {}
        self._unrecorded = 0

    def run(self, images: list[Descriptor]) -> Verified:
        damaged = [
            Damage(
                image=image.marks[REF_NAME],
                digest=image.digest,
                part=part,
                reason=reason,
                dropped=NATIVE not in image.marks,
            )
            for image in images
            for part, reason in self._image(image)
        ]
        return Verified(checked=len(images), unrecorded=self._unrecorded, damaged=tuple(damaged))

    def _image(self, image: Descriptor) -> Iterator[tuple[str, str]]:
        """What is wrong with it; the manifest must be sound before anything is believed that it names."""
        drop = NATIVE not in image.marks
        with self._held([image.digest]):
            wrong = self._blob(image.digest, drop)
            if wrong is not None:
                yield wrong
                return
            try:
                manifest = self._layout.manifest(image.digest)
            except ContractError as failure:
                yield f"blob {image.digest}", failure.message
                return
            blobs = [manifest.config.digest, *(layer.digest for layer in manifest.layers)]
            with self._held(blobs):
                found = [self._blob(digest, drop) for digest in blobs]
                yield from (one for one in found if one is not None)
                if found[0] is None:
                    tree = self._tree_of(image, drop)
                    if tree is not None:
                        yield tree

    @contextmanager
    def _held(self, digests: list[str]) -> Iterator[None]:
        self._store.hold(digests)
        try:
            yield
        finally:
            self._store.release(digests)

    # -- blobs

    def _blob(self, digest: str, drop: bool) -> tuple[str, str] | None:
        if digest not in self._known:
            reason = self._wrong_blob(digest)
            self._known[digest] = None if reason is None else (f"blob {digest}", reason)
            if reason is not None and drop:
                with self._layout.locked():
                    self._layout.forget(digest)
        return self._known[digest]

    def _wrong_blob(self, digest: str) -> str | None:
        running = hashlib.sha256()
        try:
            with self._layout.blob_path(digest).open("rb") as file:
                while chunk := file.read(_READ):
                    self._check()
                    running.update(chunk)
        except FileNotFoundError:
            return "is missing"
        except OSError as failure:
            return f"cannot be read: {failure.strerror}"
        except ContractError as failure:
            return failure.message
        found = f"sha256:{running.hexdigest()}"
        return None if found == digest else f"has the digest {found}"

    # -- trees

    def _tree_of(self, image: Descriptor, drop: bool) -> tuple[str, str] | None:
        try:
            tree = self._layout.tree_of(image.digest).digest
        except ContractError as failure:
            return "tree", failure.message
        key = f"tree {tree}"  # a listing has the same digest
        if key not in self._known:
            with self._held([tree]):
                wrong = self._known[key] = self._wrong_tree(tree, native=not drop)
                if wrong is not None and drop:
                    self._store.drop_tree(tree)
        return self._known[key]

    def _wrong_tree(self, tree: str, *, native: bool) -> tuple[str, str] | None:
        path = self._layout.blob_path(tree) if native else self._layout.tree_listing(tree)
        try:
            recorded = path.open("rb")
        except FileNotFoundError:
            recorded = None
        if recorded is None and not native:
            self._unrecorded += 1
            try:
                record_tree(self._layout, tree, self._xattrs, self._check)
            except (TreeError, OSError) as failure:
                return _unreadable(failure)
            return None
        comparison = _Comparison(recorded, self._check)
        try:
            found = _list(self._layout.tree_path(tree), comparison, self._xattrs)
            comparison.end()
        except _Differs as difference:
            return f"tree {difference.path}", "is not as it was taken in"
        except (TreeError, OSError) as failure:
            return _unreadable(failure)
        finally:
            if recorded is not None:
                recorded.close()
        return ("tree", "is not as it was taken in") if native and found != tree else None


def record_tree(layout: Layout, tree: str, xattrs: Xattrs, check: Check) -> None:
    """Write down what a tree from a registry holds, for `Verification` to compare with. Blocking.

    Not while it is pulled: it would take half as long again. A tree that goes meanwhile is none's loss. TreeError,
    OSError.
    """
    unfinished = layout.unfinished_listing(tree)
    with layout.locked():
        try:
            top = os.open(layout.tree_path(tree), OPEN_DIRECTORY)
        except FileNotFoundError:
            return
        try:
            out = unfinished.open("wb")
        except OSError:
            os.close(top)
            raise
    try:
        with out:
            write_listing(top, cast("BinaryIO", _Checked(out, check)), xattrs)
            out.flush()
            os.fsync(out.fileno())
        with layout.locked():
            if _is_there(layout.tree_path(tree), top):
                unfinished.rename(layout.tree_listing(tree))
    except TreeError:
        if _is_there(layout.tree_path(tree), top):
            raise
    finally:
        with layout.locked():
            if _is_there(layout.tree_path(tree), top):
                unfinished.unlink(missing_ok=True)
        os.close(top)


def _is_there(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def _list(tree: Path, out: "_Comparison", xattrs: Xattrs) -> str:
    fd = os.open(tree, OPEN_DIRECTORY)
    try:
        return write_listing(fd, cast("BinaryIO", out), xattrs).digest
    finally:
        os.close(fd)


def _unreadable(failure: TreeError | OSError) -> tuple[str, str]:
    if isinstance(failure, TreeError):
        path = printable(failure.path)
        return f"tree {path}" if path else "tree", failure.reason
    if isinstance(failure, FileNotFoundError):
        return "tree", "is missing"
    return "tree", f"cannot be read: {failure.strerror}"


class _Checked:
    def __init__(self, out: BinaryIO, check: Check) -> None:
        self._out = out
        self._check = check

    def write(self, line: bytes) -> None:
        self._check()
        self._out.write(line)


class _Differs(Exception):
    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


class _Comparison:
    """Takes a listing line by line and raises at the first that is another than the recorded one."""

    def __init__(self, recorded: BinaryIO | None, check: Check) -> None:
        self._recorded = recorded
        self._check = check
        self._at = ""

    def write(self, line: bytes) -> None:
        self._check()
        if self._recorded is None:
            return
        known = self._recorded.readline()
        self._at = _path(known) or self._at
        if known != line:
            raise _Differs(self._at or _path(line) or ".")

    def end(self) -> None:
        """Nothing may be left of what was recorded."""
        if self._recorded is not None and (known := self._recorded.readline()):
            raise _Differs(_path(known) or self._at)


def _path(line: bytes) -> str:
    fields = line.decode("ascii", "replace").rstrip("\n").split(" ")
    at = _PATH_AT.get(fields[0], len(fields))
    return printable(os.fsdecode(unquote_to_bytes(fields[at]))) if at < len(fields) else ""
