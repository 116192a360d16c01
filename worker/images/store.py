"""The node's images: registered, named, listed, cloned for containers, pruned, verified.

Two digests are at work. The *tree digest* (see `listing`) names an unpacked tree and is the same for equal
trees. The *image digest*, which is what the contract reports, is the manifest's; it covers the tree digest
and the config, so equal trees with equal configs have one image digest, whatever their names.

What needs an image is counted here, under the lock that deletes: its names, the containers that were made of it
(told again by a new worker before it obeys), and for a moment whoever clones or pulls it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from worker.clock import Clock, utc_now
from worker.errors import (
    Conflict,
    ContractError,
    CreateFailed,
    NotFound,
    PullFailed,
    ResourceExhausted,
    is_out_of_space,
)
from worker.platform.treecopy import TreeError
from worker.platform.xattrs import Xattrs, system_xattrs

from .catalog import entries
from .collect import detach
from .keeping import Check, Keeping
from .layout import Layout
from .model import MANIFEST_TYPE, NATIVE, Descriptor, ImageConfig, ImageInfo, Index, Tree
from .reference import parse_name
from .register import Built, Registration, TreeCloner
from .space import Space
from .trees import remove_tree

__all__ = ["ImageConfig", "ImageInfo", "ImageStore"]


class ImageStore(Keeping):
    """One per data directory. Methods may run at once, in any number; blocking work has its own threads."""

    def __init__(
        self,
        layout: Layout,
        driver: TreeCloner,
        xattrs: Xattrs,
        clock: Clock,
        space: Space,
        max_bytes: int | None = None,
    ) -> None:
        super().__init__(layout, clock, xattrs, max_bytes)
        self._driver = driver
        self._space = space

    @classmethod
    def open(
        cls,
        root: Path,
        driver: TreeCloner,
        *,
        xattrs: Xattrs | None = None,
        clock: Clock = utc_now,
        space: Space | None = None,
        max_bytes: int | None = None,
    ) -> "ImageStore":
        """Blocking. Configuration when the folder cannot be used or holds something else.

        `max_bytes` is what `evict` keeps to.
        """
        layout = Layout.open(root)
        store = cls(layout, driver, xattrs or system_xattrs(), clock, space or Space(), max_bytes)
        store._record_missing()
        return store

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

    # -- cloning

    async def clone(self, digest: str, dst: Path, *, container: str | None = None) -> None:
        """Make a container's root at `dst`, which must not exist or be an empty folder.

        It shares nothing with the image that a write could reach. The image is then `container`'s, until that is
        `let_go`. NotFound, CreateFailed, ResourceExhausted; on any of these, and when the caller is cancelled,
        nothing is left.
        """

        def work(check: Check) -> None:
            with self._pinned(digest) as tree:
                self._clone(digest, tree, dst, check)
                self._layout.touch(digest)
                if container is not None:
                    self._containers[container] = digest

        try:
            await self._run(work)
        except BaseException:
            if container is not None:
                self._containers.pop(container, None)
            raise

    def _clone(self, digest: str, tree: Tree, dst: Path, check: Check) -> None:
        # A sibling: whatever deletes the container's folder after a crash deletes this too.
        staging = dst.with_name(f".{dst.name}-{os.urandom(8).hex()}")
        try:
            self._space.check(dst.parent, tree.bytes, tree.entries, "the container's root")
            check()
            path = self._layout.tree_path(tree.digest)
            self._space.learn(self._driver.clone_tree(path, staging))
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

    async def remove(self, name: str, *, force: bool = False) -> ImageInfo:
        """Take away a name, and the image with its last one unless a container still needs it.

        Conflict while a container was made from it, unless `force`; `prune` deletes what then remains.
        """

        def work(check: Check) -> ImageInfo:
            with self._layout.locked():
                index = self._layout.read_index()
                found = self._find(index, name)
                if found is None:
                    raise NotFound(f"no image {name} on this node", field="image")
                if found.digest in self._containers.values() and not force:
                    raise Conflict(f"{name} is used by a container; `force` removes the name all the same")
                info = self.info(found)
                kept = [raw for raw, entry in entries(index) if entry != found]
                self._layout.write_index(Index(manifests=kept))
                gone = detach(self._layout, self._needed(), only=found.digest, held=self._held_now())
            gone.delete()
            return info

        return await self._run(work)


def _clone_failed(digest: str, reason: str, code: int | None) -> ContractError:
    if is_out_of_space(code):
        return ResourceExhausted(f"no space left to clone {digest}")
    return CreateFailed(f"cannot clone {digest}: {reason}")
