"""From a folder on this machine to an image in the store, all at once or not at all."""

import ctypes
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

import msgspec

from worker.errors import ContractError, PullFailed, ResourceExhausted, is_out_of_space
from worker.platform.base import CloneReport
from worker.platform.descent import OPEN_DIRECTORY, open_directory
from worker.platform.treecopy import TreeError, printable
from worker.platform.xattrs import Xattrs

from .layout import Layout
from .listing import Listing, write_listing
from .model import (
    BYTES,
    CONFIG_TYPE,
    ENTRIES,
    MANIFEST_TYPE,
    NATIVE,
    TREE_TYPE,
    ConfigDocument,
    Descriptor,
    Manifest,
    oci_platform,
)
from .snapshot import calm_snapshot, take_snapshot
from .space import Space

# Up to here each file is synced by itself (about 3 ms each); syncing the whole file system instead also
# waits for what everybody else has written.
_FEW = 32

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class TreeCloner(Protocol):
    """The one thing that the store needs of a platform driver."""

    def clone_tree(self, src: Path, dst: Path) -> CloneReport: ...


class Built(msgspec.Struct, frozen=True, kw_only=True):
    """A manifest that is in the store, with everything it names."""

    digest: str
    size: int
    bytes: int


class Registration:
    """One try to take in one folder.

    Runs in a thread; `check` raises when nobody wants the result any more.
    """

    def __init__(
        self,
        layout: Layout,
        cloner: TreeCloner,
        xattrs: Xattrs,
        space: Space,
        source: Path,
        check: Callable[[], None],
    ) -> None:
        self._layout = layout
        self._cloner = cloner
        self._xattrs = xattrs
        self._space = space
        self._source = source
        self._check = check

    def run(self, publish: Callable[[Built], None]) -> Built:
        """Build the image and call `publish` under the lock that keeps it from being pruned unnamed."""
        with self._layout.token() as token:
            try:
                listing = self._stage(token)
            except TreeError as failure:
                raise self._tree_failed(failure) from failure
            except OSError as failure:
                raise self._failed(failure.strerror or str(failure), failure.errno) from failure
            with self._layout.locked():
                built = self._put(token, listing)
                publish(built)
        return built

    def _tree_failed(self, failure: TreeError) -> ContractError:
        where = f"{printable(failure.path)}: " if failure.path else ""
        return self._failed(where + failure.reason, failure.errno)

    def _failed(self, reason: str, code: int | None) -> ContractError:
        if is_out_of_space(code):
            return ResourceExhausted(f"no space left to register {self._source}")
        shown = printable(str(self._source))
        return PullFailed(f"cannot register {shown}: {reason}", field="source_dir")

    def _stage(self, token: str) -> Listing:
        """Copy and list the source; what is listed is the copy, so the digest is that of what is kept."""
        source = open_directory(self._source)
        try:
            before = calm_snapshot(source)
            self._check()
            self._space.check(
                self._layout.root, before.bytes, before.entries, f"registering {printable(str(self._source))}"
            )
            partial = self._layout.partial(token)
            report = self._cloner.clone_tree(self._source, partial)
            self._space.learn(report)
            self._check()
            before.check_unchanged(take_snapshot(source))
        finally:
            os.close(source)
        copied = os.open(partial, OPEN_DIRECTORY)
        try:
            few = before.entries <= _FEW
            with self._layout.open_scratch(token) as out:
                listing = write_listing(copied, out, self._xattrs, sync=few)
                out.flush()
                os.fsync(out.fileno())
            self._check()
            if not few:
                sync_file_system(copied)
        finally:
            os.close(copied)
        return listing

    def _put(self, token: str, listing: Listing) -> Built:
        tree = self._layout.tree_path(listing.digest)
        if not tree.exists():
            self._layout.place_tree(token, listing.digest)
        self._layout.adopt_blob(self._layout.scratch(token), listing.digest)
        config = msgspec.json.encode(_config(listing))
        config_digest = self._layout.put_blob(config)
        manifest = msgspec.json.encode(_manifest(listing, config_digest, len(config)))
        digest = self._layout.put_blob(manifest)
        return Built(digest=digest, size=len(manifest), bytes=listing.bytes)


def _config(listing: Listing) -> ConfigDocument:
    system, architecture = oci_platform()
    return ConfigDocument(
        architecture=architecture,
        os=system,
        created=_moment(listing.newest_ns),
        rootfs={"type": "layers", "diff_ids": [listing.digest]},
    )


def _manifest(listing: Listing, config_digest: str, config_size: int) -> Manifest:
    return Manifest(
        schema_version=2,
        media_type=MANIFEST_TYPE,
        config=Descriptor(media_type=CONFIG_TYPE, digest=config_digest, size=config_size),
        layers=[Descriptor(media_type=TREE_TYPE, digest=listing.digest, size=listing.size)],
        annotations={NATIVE: "1", BYTES: str(listing.bytes), ENTRIES: str(listing.entries)},
    )


def _moment(ns: int) -> datetime | None:
    """The newest file's time stands for the image's.

    A clock here would give each registration its own digest.
    """
    try:
        return _EPOCH + timedelta(microseconds=ns // 1000)
    except OverflowError:
        return None


def sync_file_system(fd: int) -> None:
    """Bring a whole tree to the disk before anything names it.

    One syncfs(2) where there is one, else sync(2).
    """
    syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    if syncfs is None or syncfs(fd) != 0:
        os.sync()
