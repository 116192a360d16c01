"""What a store keeps and what it lets go: reference counts, pruning, eviction, verification."""

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec
from loguru import logger

from worker.clock import Clock
from worker.errors import Internal, NotFound
from worker.platform.treecopy import TreeError
from worker.platform.xattrs import Xattrs

from .catalog import Catalog, entries, natives
from .collect import Detached, closure, detach
from .eviction import Held, choose, total_bytes
from .layout import Layout
from .model import MANIFEST_TYPE, PULLED, REF_NAME, Descriptor, ImageInfo, Index
from .threads import run_in
from .verify import Verification, Verified, record_tree

_THREADS = 4

T = TypeVar("T")
Check = Callable[[], None]


class Pruned(msgspec.Struct, frozen=True, kw_only=True):
    """`images` by name, or by digest where there was none; `bytes` is all that was set free."""

    images: tuple[ImageInfo, ...] = ()
    bytes: int = 0


class Use(msgspec.Struct, frozen=True, kw_only=True):
    """`images` counts names. `reclaimable` are the bytes that only images without a container need."""

    images: int
    bytes: int
    reclaimable: int


class _CalledOff(Exception):
    """Whoever asked for this work has gone."""


class Keeping(Catalog):
    """The part of a store that deletes. Its blocking work has threads of its own."""

    def __init__(self, layout: Layout, clock: Clock, xattrs: Xattrs, max_bytes: int | None) -> None:
        super().__init__(layout, clock)
        self._xattrs = xattrs
        self._max_bytes = max_bytes
        self._pins: Counter[str] = Counter()
        self._held: Counter[str] = Counter()
        self._closing = threading.Event()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="images")

    def close(self) -> None:
        """Waits for work that still runs."""
        self._closing.set()
        self._threads.shutdown(wait=True)
        self._layout.close()

    # -- who needs an image

    def keep_for(self, container: str, digest: str) -> None:
        """The image is a container's, which is there already (a new worker tells of those before anything can be
        deleted) or about to be made."""
        self._containers[container] = digest

    def let_go(self, container: str) -> None:
        """The container is gone; when its image was last used is now. No error when it had none."""
        digest = self._containers.pop(container, None)
        if digest is not None:
            self._layout.touch(digest)

    def hold(self, digests: Iterable[str]) -> None:
        """Keep single blobs and trees from being deleted before anything names them. Blocking."""
        with self._layout.locked():
            self._held.update(digests)

    def release(self, digests: Iterable[str]) -> None:
        with self._layout.locked():
            self._held.subtract(digests)
            self._held = +self._held

    def _held_now(self) -> set[str]:
        return set(self._held)

    # -- deleting

    async def prune(
        self, *, older_than_s: float | None = None, keep_bytes: int | None = None, spare: str | None = None
    ) -> Pruned:
        """Delete every image that has neither name nor container, and of those with a name what `choose` says.

        What a container was made from stays, and so does `spare`.
        """

        def work(check: Check) -> Pruned:
            with self._layout.locked():
                needed = self._needed()
                index = self._layout.read_index()
                busy = {*needed, *self._held, *([] if spare is None else [spare])}
                held = [
                    msgspec.structs.replace(one, used=one.digest in busy)
                    for one in self._held_images(index, needed)
                ]
                doomed = choose(held, now=self._clock(), older_than_s=older_than_s, keep_bytes=keep_bytes)
                names = [entry for _, entry in entries(index) if entry is not None and entry.digest in doomed]
                if names:
                    kept = [raw for raw, entry in entries(index) if entry not in names]
                    self._layout.write_index(Index(manifests=kept))
                gone = detach(self._layout, needed, held=self._held_now())
            return _pruned(names, gone.delete(), gone.blob_bytes)

        return await self._run(work)

    async def evict(self, *, spare: str | None = None) -> Pruned:
        """Get down to `max_bytes`, least recently used first, when there is more; `spare` was just taken in."""
        limit = self._max_bytes
        if limit is None or await self._run(lambda check: self._bytes()) <= limit:
            return Pruned()
        pruned = await self.prune(keep_bytes=limit, spare=spare)
        left = await self._run(lambda check: self._bytes())
        if left > limit:
            logger.warning("the images that are used have {} bytes, images.max_bytes is {}", left, limit)
        return pruned

    async def use(self) -> Use:
        """What the store takes up, and what of it no container needs."""

        def work(check: Check) -> Use:
            with self._layout.locked():
                index, needed = self._layout.read_index(), self._needed()
                images = self._held_images(index, needed)
            total, used = total_bytes(images), total_bytes([one for one in images if one.used])
            names = len(natives(index))
            return Use(images=names, bytes=self._bytes(), reclaimable=total - used)

        return await self._run(work)

    def _bytes(self) -> int:
        """Of all blobs and trees, and of what pulls are fetching."""
        with self._layout.locked():
            images = self._held_images(self._layout.read_index(), self._needed())
        trees = {part: size for one in images for part, size in one.trees.items()}
        folders = (self._layout.root / "blobs" / "sha256", self._layout.root / "ingest")
        return sum(trees.values()) + sum(map(_file_bytes, folders))

    def _held_images(self, index: Index, needed: set[str]) -> list[Held]:
        """Every image that a name or a container reaches. Under the lock."""
        named = {entry.digest: entry.media_type for entry in natives(index)}
        found = []
        for digest, media_type in {**dict.fromkeys(needed, MANIFEST_TYPE), **named}.items():
            with suppress(NotFound, Internal):  # a damaged one has nothing that could be counted
                last_used = self._layout.last_used(digest)
                tree = self._layout.tree_of(digest)
                blobs = closure(self._layout, digest, media_type) - {tree.digest}
                parts = {blob: self._layout.blob_bytes(blob) for blob in blobs}
                trees = {f"tree {tree.digest}": tree.bytes}
                used = digest in needed
                found.append(Held(digest=digest, blobs=parts, trees=trees, last_used=last_used, used=used))
        return found

    def _needed(self) -> set[str]:
        pinned = {digest for digest, count in self._pins.items() if count > 0}
        return pinned.union(self._containers.copy().values())

    # -- verifying

    async def verify(self, name: str | None = None) -> Verified:
        """Read all of an image, or of all of them. NotFound. See `verify`."""

        def work(check: Check) -> Verified:
            index = self._layout.read_index()
            images = natives(index)
            if name is not None:
                found = self._find(index, name)
                if found is None:
                    raise NotFound(f"no image {name} on this node", field="image")
                images = [found]
            return Verification(self, self._xattrs, check).run(images)

        return await self._run(work)

    def drop_tree(self, digest: str) -> None:
        """Delete a damaged tree of a registry's image; the next pull unpacks it again. Blocking."""
        gone = Detached()
        with self._layout.locked():
            if self._layout.tree_path(digest).is_dir():
                gone.add_tree(self._layout, digest)
        gone.delete()

    def record_later(self, tree: str) -> None:
        """Write down what a tree from a registry holds, when there is time."""
        self._threads.submit(self._record, tree)

    def _record_missing(self) -> None:
        """Of trees whose pull was the last thing that a dead worker did."""
        for entry in natives(self._layout.read_index()):
            if PULLED not in entry.marks:
                continue
            with suppress(NotFound, Internal):  # `verify` tells of it
                tree = self._layout.tree_of(entry.digest).digest
                if self._layout.tree_path(tree).is_dir() and not self._layout.tree_listing(tree).exists():
                    self.record_later(tree)

    def _record(self, tree: str) -> None:
        try:
            if not self._layout.tree_listing(tree).exists():
                record_tree(self._layout, tree, self._xattrs, self._check_open)
        except _CalledOff:
            return
        except (TreeError, OSError) as failure:
            logger.warning("the tree {} cannot be recorded, and not be verified later: {}", tree, failure)

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise _CalledOff

    # -- threads

    async def _run(self, work: Callable[[Check], T]) -> T:
        """Run in a thread of the store, see `run_in`."""
        called_off = threading.Event()

        def check() -> None:
            if called_off.is_set():
                raise _CalledOff

        return await run_in(self._threads, lambda: work(check), called_off.set)


def _pruned(names: list[Descriptor], gone: list[ImageInfo], blob_bytes: int) -> Pruned:
    """Each name that went, and by their digests the images that had none. What shares a tree counts it once."""
    freed = {info.digest: info for info in gone}
    found = []
    for entry in names:
        info = freed.get(entry.digest)
        if info is not None:
            found.append(msgspec.structs.replace(info, name=entry.marks[REF_NAME]))
            freed[entry.digest] = msgspec.structs.replace(info, bytes=0)
    named = {entry.digest for entry in names}
    found += [info for info in gone if info.digest not in named]
    return Pruned(images=tuple(found), bytes=blob_bytes + sum(info.bytes for info in found))


def _file_bytes(folder: Path) -> int:
    """Of the files right in it, which may go meanwhile."""
    total = 0
    with suppress(FileNotFoundError), os.scandir(folder) as found:
        for entry in found:
            with suppress(FileNotFoundError):
                total += entry.stat(follow_symlinks=False).st_size
    return total
