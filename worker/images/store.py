"""The node's images: registered, named, listed, cloned for containers, pruned.

Two digests are at work. The *tree digest* (see `listing`) names an unpacked tree and is the same for equal
trees. The *image digest*, which is what the contract reports, is the manifest's; it covers the tree digest
and the config, so equal trees with equal configs have one image digest, whatever their names.
"""

import asyncio
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from schemas.queries import ImageEntry
from worker.clock import Clock, utc_now
from worker.errors import Conflict, ContractError, CreateFailed, NotFound, PullFailed, ResourceExhausted
from worker.platform.treecopy import TreeError
from worker.platform.xattrs import Xattrs, system_xattrs

from .collect import detach
from .layout import Layout, is_out_of_space
from .model import (
    CREATED,
    FROM_INDEX,
    MANIFEST_TYPE,
    NATIVE,
    PULLED,
    REF_NAME,
    Descriptor,
    ImageConfig,
    ImageInfo,
    Index,
    Tree,
)
from .reference import DIGEST, Reference, parse_name, parse_reference
from .register import Built, Registration, TreeCloner
from .space import Space
from .trees import remove_tree

__all__ = ["ImageConfig", "ImageInfo", "ImageStore"]

_THREADS = 4
_NEVER = datetime(1970, 1, 1, tzinfo=UTC)

Infos = list[ImageInfo]
T = TypeVar("T")
Check = Callable[[], None]


class _CalledOff(Exception):
    """Whoever asked for this work has gone."""


class ImageStore:
    """One per data directory. Methods may run at once, in any number; blocking work has its own threads."""

    def __init__(
        self, layout: Layout, driver: TreeCloner, xattrs: Xattrs, clock: Clock, space: Space
    ) -> None:
        self._layout = layout
        self._driver = driver
        self._xattrs = xattrs
        self._clock = clock
        self._space = space
        self._pins: Counter[str] = Counter()
        self._held: Counter[str] = Counter()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="images")

    @classmethod
    def open(
        cls,
        root: Path,
        driver: TreeCloner,
        *,
        xattrs: Xattrs | None = None,
        clock: Clock = utc_now,
        space: Space | None = None,
    ) -> "ImageStore":
        """Blocking. Configuration when the folder cannot be used or holds something else."""
        layout = Layout.open(root)
        return cls(layout, driver, xattrs or system_xattrs(), clock, space or Space())

    def close(self) -> None:
        """Waits for work that still runs."""
        self._threads.shutdown(wait=True)
        self._layout.close()

    # -- asking

    def resolve(self, name: str) -> ImageInfo:
        """The image of this name, of `name@digest`, or of a bare digest; NotFound."""
        found = self._find(self._layout.read_index(), name)
        if found is None:
            raise NotFound(f"no image {name} on this node", field="image")
        return self.info(found)

    def list(self, containers: Mapping[str, int]) -> list[ImageEntry]:
        """Every name, sorted; `containers` counts those made from a digest."""
        infos = [self.info(entry) for entry in _native(self._layout.read_index())]
        return [
            ImageEntry(
                name=info.name,
                digest=info.digest,
                bytes=info.bytes,
                created_at=info.created_at,
                containers=containers.get(info.digest, 0),
            )
            for info in sorted(infos, key=lambda info: info.name)
        ]

    def config(self, digest: str) -> ImageConfig:
        """What the image says about how to run it; NotFound for an unknown digest."""
        manifest = self._layout.manifest(digest)
        return self._layout.config(manifest.config.digest).config or ImageConfig()

    def _find(self, index: Index, name: str) -> Descriptor | None:
        by_digest = DIGEST.fullmatch(name) is not None
        wanted = None if by_digest else parse_reference(name)
        for entry in _native(index):
            if wanted is None:
                if entry.digest == name:
                    return entry
            elif _answers(entry, wanted):
                return entry
        return None

    def info(self, entry: Descriptor) -> ImageInfo:
        return ImageInfo(
            name=entry.marks[REF_NAME],
            digest=entry.digest,
            bytes=self._layout.tree_of(entry.digest).bytes,
            created_at=_created(entry),
        )

    # -- naming

    async def register(self, name: str, source_dir: Path) -> ImageInfo:
        """Take in a folder of this machine, whose path is canonical. A name that exists moves to it.

        PullFailed names the file that cannot be part of an image or changed meanwhile.
        """
        parse_name(name)

        def work(check: Check) -> ImageInfo:
            source = Path(source_dir)
            if source.is_relative_to(self._layout.root) or self._layout.root.is_relative_to(source):
                raise PullFailed(f"{source} overlaps the image store", field="source_dir")
            made: list[ImageInfo] = []

            def publish(built: Built) -> None:
                descriptor = Descriptor(
                    media_type=MANIFEST_TYPE, digest=built.digest, size=built.size, annotations={NATIVE: "1"}
                )
                made.append(self.give_name(name, descriptor))

            Registration(self._layout, self._driver, self._xattrs, self._space, source, check).run(publish)
            return made[0]

        return await self._run(work)

    async def tag(self, source: str, target: str) -> ImageInfo:
        """Give the image `source` one more name, which moves if it exists."""
        parse_name(target, field="target")

        def work(check: Check) -> ImageInfo:
            with self._layout.locked():
                found = self._find(self._layout.read_index(), source)
                if found is None:
                    raise NotFound(f"no image {source} on this node", field="source")
                return self.give_name(target, found)

        return await self._run(work)

    def give_name(self, name: str, target: Descriptor) -> ImageInfo:
        """Let a name stand for an image that is here, tree and all. Under the lock of the layout."""
        index = self._layout.read_index()
        key = parse_reference(name).key
        others, created = [], self._clock()
        for raw, entry in _entries(index):
            if entry is None or _reference(entry).key != key:
                others.append(raw)
            elif entry.digest == target.digest:
                created = _created(entry)
        entry = Descriptor(
            media_type=target.media_type,
            digest=target.digest,
            size=target.size,
            annotations={**target.marks, REF_NAME: name, CREATED: created.isoformat()},
        )
        self._layout.write_index(Index(manifests=[*others, msgspec.to_builtins(entry)]))
        return self.info(entry)

    # -- cloning

    async def clone(self, digest: str, dst: Path) -> None:
        """Make a container's root at `dst`, which must not exist or be an empty folder.

        It shares nothing with the image that a write could reach. NotFound, CreateFailed,
        ResourceExhausted; on any of these, and when the caller is cancelled, nothing is left.
        """

        def work(check: Check) -> None:
            with self._pinned(digest) as tree:
                self._clone(digest, tree, dst, check)

        await self._run(work)

    def _clone(self, digest: str, tree: Tree, dst: Path, check: Check) -> None:
        # A sibling: whatever deletes the container's folder after a crash deletes this too.
        staging = dst.with_name(f".{dst.name}-{os.urandom(8).hex()}")
        try:
            self._space.check(dst.parent, tree.bytes, tree.entries, "the container's root")
            check()
            path = self._layout.tree_path(tree.digest)
            self._space.learn(self._driver.clone_tree(path, staging).method)
            check()
            staging.rename(dst)
        except TreeError as failure:
            raise _clone_failed(digest, str(failure), failure.errno) from failure
        except OSError as failure:
            raise _clone_failed(digest, failure.strerror or str(failure), failure.errno) from failure
        finally:
            remove_tree(staging)

    @contextmanager
    def _pinned(self, digest: str) -> Iterator[Tree]:
        """The image's tree; it is deleted by nobody meanwhile."""
        with self._layout.locked():
            tree = self._layout.tree_of(digest)
            if not self._layout.tree_path(tree.digest).is_dir():
                raise NotFound(
                    f"the tree of {digest} is gone; pull or register the image again", field="image"
                )
            self._pins[digest] += 1
        try:
            yield tree
        finally:
            with self._layout.locked():
                self._pins[digest] -= 1

    # -- deleting

    async def remove(self, name: str, *, force: bool = False, in_use: set[str]) -> ImageInfo:
        """Take away a name, and the image with its last one unless a container still needs it.

        Conflict while a container was made from it, unless `force`; `prune` deletes what then remains.
        """

        def work(check: Check) -> ImageInfo:
            with self._layout.locked():
                index = self._layout.read_index()
                found = self._find(index, name)
                if found is None:
                    raise NotFound(f"no image {name} on this node", field="image")
                if found.digest in in_use and not force:
                    raise Conflict(f"{name} is used by a container; `force` removes the name all the same")
                info = self.info(found)
                kept = [raw for raw, entry in _entries(index) if entry != found]
                self._layout.write_index(Index(manifests=kept))
                gone = detach(self._layout, self._needed(in_use), only=found.digest, held=self._held_now())
            gone.delete()
            return info

        return await self._run(work)

    async def prune(self, in_use: set[str]) -> Infos:
        """Delete every image that has neither name nor container.

        `bytes` are what each freed, `name` its digest.
        """

        def work(check: Check) -> Infos:
            with self._layout.locked():
                gone = detach(self._layout, self._needed(in_use), held=self._held_now())
            return gone.delete()

        return await self._run(work)

    def _needed(self, in_use: set[str]) -> set[str]:
        return in_use | {digest for digest, count in self._pins.items() if count > 0}

    # -- for images on their way in

    @property
    def layout(self) -> Layout:
        return self._layout

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

    def find(self, name: str) -> Descriptor | None:
        """The entry of a name, if its tree is there to be cloned. What was registered no registry can replace."""
        found = self._find(self._layout.read_index(), name)
        if found is None or NATIVE in found.marks:
            return found
        tree = self._layout.tree_of(found.digest)
        return found if self._layout.tree_path(tree.digest).is_dir() else None

    # -- threads

    async def _run(self, work: Callable[[Check], T]) -> T:
        """Run in a thread of the store.

        One that is cancelled is called off and waited for, as it still writes.
        """
        called_off = threading.Event()

        def check() -> None:
            if called_off.is_set():
                raise _CalledOff

        future = asyncio.get_running_loop().run_in_executor(self._threads, work, check)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            called_off.set()
            while not future.done():
                try:
                    await asyncio.wait([future])
                except asyncio.CancelledError:
                    continue
            if not future.cancelled():
                future.exception()  # seen: the cancellation is the answer
            raise


def _entries(index: Index) -> Iterator[tuple[dict[str, Any], Descriptor | None]]:
    """Every entry as it stands, and as ours where it is."""
    for raw in index.manifests:
        try:
            entry = msgspec.convert(raw, Descriptor)
        except msgspec.ValidationError:
            yield raw, None
            continue
        ours = NATIVE in entry.marks or PULLED in entry.marks
        named = ours and REF_NAME in entry.marks
        yield raw, entry if named and DIGEST.fullmatch(entry.digest) else None


def _native(index: Index) -> list[Descriptor]:
    return [entry for _, entry in _entries(index) if entry is not None]


def _reference(entry: Descriptor) -> Reference:
    return parse_reference(entry.marks[REF_NAME])


def _answers(entry: Descriptor, wanted: Reference) -> bool:
    """A digest may be the manifest's or that of the index which it was chosen from."""
    known = _reference(entry)
    if wanted.digest is not None:
        digests = (entry.digest, entry.marks.get(FROM_INDEX))
        return wanted.digest in digests and wanted.repository == known.repository
    return wanted.key == known.key


def _created(entry: Descriptor) -> datetime:
    try:
        return datetime.fromisoformat(entry.marks.get(CREATED, ""))
    except ValueError:
        return _NEVER


def _clone_failed(digest: str, reason: str, code: int | None) -> ContractError:
    if is_out_of_space(code):
        return ResourceExhausted(f"no space left to clone {digest}")
    return CreateFailed(f"cannot clone {digest}: {reason}")
