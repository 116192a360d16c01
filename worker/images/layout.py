"""The store on disk: an OCI image layout, and beside its blobs each tree once, unpacked.

    images/
      oci-layout  index.json             names -> manifest digests
      blobs/sha256/<hex>                 manifests, configs, tree listings, layers. The time of a manifest's file is
                                         when a container was last made of it, or ended
      rootfs/<hex of the tree's digest>/ a tree; beside a pulled one `.json`, its size, and `.list`, its listing
      rootfs/.partial-<token>/           a tree on its way in or out
      staging/<token>.lock, <token>      held while a token is in use; what nobody holds is swept at the next open

Everything appears by a rename, so whoever is killed leaves only what the sweep removes. Changes of names
and what they reach are made under one lock, between threads and between processes.
"""

import fcntl
import hashlib
import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec

from worker.errors import Configuration, Internal, NotFound

from .chain import chain_id
from .model import ConfigDocument, Index, Manifest, Tree
from .reference import DIGEST
from .trees import remove_tree, tree_size

OCI_LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'
PARTIAL = ".partial-"
LISTING, UNFINISHED = "list", "listing"
# A layer of a registry's image may begin like a document.
MAX_DOCUMENT_BYTES = 16 << 20

_BESIDE = ("json", LISTING, UNFINISHED)
_FOLDERS = (".", "blobs", "blobs/sha256", "rootfs", "staging")

T = TypeVar("T")


class Layout:
    def __init__(self, root: Path) -> None:
        self.root = root
        self._thread_lock = threading.RLock()
        self._lock_fd = -1
        self._manifests: dict[str, Manifest] = {}
        self._trees: dict[str, Tree] = {}
        self._index: tuple[tuple[int, int, int], Index] | None = None

    @classmethod
    def open(cls, root: Path) -> "Layout":
        """Makes what is missing and sweeps what a dead process left.

        Configuration when it is no store of ours.
        """
        try:
            for folder in _FOLDERS:
                (root / folder).mkdir(mode=0o700, parents=True, exist_ok=True)
            self = cls(Path(os.path.realpath(root, strict=True)))
            self._lock_fd = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            with self.locked():
                self._found()
                self._sweep()
        except OSError as failure:
            raise Configuration(f"the image store {root} cannot be used: {failure}") from failure
        return self

    def close(self) -> None:
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _found(self) -> None:
        marker = self.root / "oci-layout"
        if not marker.exists():
            if (self.root / "index.json").exists():
                raise Configuration(f"{self.root} has an index.json but no oci-layout: not an image store")
            self._write(self.root / "index.json", msgspec.json.encode(Index()))
            self._write(marker, OCI_LAYOUT)
        self.read_index()

    # -- locks

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The right to change names and to delete what no name reaches. Held for moments."""
        with self._thread_lock:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._lock_fd, fcntl.LOCK_UN)

    @contextmanager
    def token(self) -> Iterator[str]:
        """A name for unfinished work, taken for as long as this process lives or the block lasts."""
        while True:
            token = secrets.token_hex(8)
            path = self.root / "staging" / f"{token}.lock"
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            if _try_lock(fd):
                break
            os.close(fd)  # a sweep came between the two
        try:
            yield token
        finally:
            try:
                self._discard(token)
            finally:
                path.unlink(missing_ok=True)
                os.close(fd)

    def partial(self, token: str) -> Path:
        """Where a token's tree is built: beside its final place, as a directory moves only within its parent
        without a right to write to itself."""
        return self.root / "rootfs" / f"{PARTIAL}{token}"

    def scratch(self, token: str) -> Path:
        return self.root / "staging" / token

    def open_scratch(self, token: str) -> BinaryIO:
        return _create(self.scratch(token))

    def _discard(self, token: str) -> None:
        self.scratch(token).unlink(missing_ok=True)
        remove_tree(self.partial(token))

    def _sweep(self) -> None:
        tokens = {name.removesuffix(".lock") for name in os.listdir(self.root / "staging")}
        for name in os.listdir(self.root / "rootfs"):
            if name.startswith(PARTIAL):
                tokens.add(name.removeprefix(PARTIAL))
        for token in sorted(tokens):
            path = self.root / "staging" / f"{token}.lock"
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if _try_lock(fd):
                    self._discard(token)
                    path.unlink(missing_ok=True)
            finally:
                os.close(fd)
        self._sweep_records()

    def _sweep_records(self) -> None:
        """What stands beside a tree that is gone, and listings that were not finished."""
        for name in os.listdir(self.root / "rootfs"):
            tree, _, kind = name.rpartition(".")
            if kind in _BESIDE and (kind == UNFINISHED or not (self.root / "rootfs" / tree).is_dir()):
                (self.root / "rootfs" / name).unlink()

    # -- names

    def read_index(self) -> Index:
        path = self.root / "index.json"
        with path.open("rb") as file:
            info = os.fstat(file.fileno())
            identity = (info.st_ino, info.st_mtime_ns, info.st_size)
            known = self._index
            if known is not None and known[0] == identity:
                return known[1]
            try:
                index = msgspec.json.decode(file.read(), type=Index)
            except (msgspec.MsgspecError, RecursionError) as failure:
                raise Configuration(f"{path} cannot be read: {failure}") from failure
        self._index = (identity, index)
        return index

    def write_index(self, index: Index) -> None:
        """Under the lock."""
        self._write(self.root / "index.json", msgspec.json.format(msgspec.json.encode(index), indent=1))
        self._index = None

    # -- blobs and trees

    def blob_path(self, digest: str) -> Path:
        if DIGEST.fullmatch(digest) is None:
            raise NotFound(f"{digest[:100]!r} is no digest of this store")
        return self.root / "blobs" / "sha256" / digest.removeprefix("sha256:")

    def tree_path(self, tree: str) -> Path:
        return self.root / "rootfs" / self.blob_path(tree).name

    def place_tree(self, token: str, tree: str) -> None:
        """Give a finished tree its name. Under the lock."""
        self.partial(token).rename(self.tree_path(tree))
        _sync_directory(self.root / "rootfs")

    def blob_bytes(self, digest: str) -> int:
        """Of the file; 0 when it is not there."""
        try:
            return self.blob_path(digest).stat().st_size
        except FileNotFoundError:
            return 0

    def put_blob(self, content: bytes) -> str:
        """Store bytes under their digest. Under the lock."""
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        path = self.blob_path(digest)
        if not path.exists():
            self._write(path, content)
        return digest

    def adopt_blob(self, file: Path, digest: str) -> None:
        """Move a finished, synced file to where its digest says. Under the lock."""
        path = self.blob_path(digest)
        if path.exists():
            file.unlink()
        else:
            file.rename(path)
            _sync_directory(path.parent)

    def manifest(self, digest: str) -> Manifest:
        """NotFound when there is none, Internal when it is not what its name says."""
        known = self._manifests.get(digest)
        if known is None:
            known = self._manifests[digest] = self._document(digest, Manifest)
        return known

    def config(self, digest: str) -> ConfigDocument:
        return self._document(digest, ConfigDocument)

    def tree_of(self, digest: str) -> Tree:
        """The tree of the image with this manifest, which need not be there. Raises as `manifest` does."""
        known = self._trees.get(digest)
        if known is None:
            manifest = self.manifest(digest)
            if manifest.native:
                known = Tree(digest=manifest.tree, bytes=manifest.bytes, entries=manifest.entries)
            else:
                known = self._pulled_tree(chain_id(self.config(manifest.config.digest).rootfs))
            self._trees[digest] = known
        return known

    def _pulled_tree(self, digest: str) -> Tree:
        try:
            return msgspec.json.decode(self.tree_record(digest).read_bytes(), type=Tree)
        except (FileNotFoundError, msgspec.MsgspecError):
            path = self.tree_path(digest)
            size = tree_size(path) if path.is_dir() else None
            return Tree(
                digest=digest,
                bytes=size.bytes if size is not None else 0,
                entries=size.entries if size is not None else 0,
            )

    def tree_record(self, digest: str) -> Path:
        """Beside a pulled tree: its size, so that nobody need walk it."""
        path = self.tree_path(digest)
        return path.with_name(f"{path.name}.json")

    def tree_listing(self, digest: str) -> Path:
        """Beside a pulled tree: what was unpacked, see `listing`; made a moment later."""
        path = self.tree_path(digest)
        return path.with_name(f"{path.name}.{LISTING}")

    def unfinished_listing(self, digest: str) -> Path:
        path = self.tree_path(digest)
        return path.with_name(f"{path.name}.{UNFINISHED}")

    def touch(self, digest: str) -> None:
        """The image of this manifest is used now. No error when it is gone."""
        with suppress(FileNotFoundError):
            os.utime(self.blob_path(digest))

    def last_used(self, digest: str) -> datetime:
        """NotFound when there is no such manifest."""
        try:
            return datetime.fromtimestamp(self.blob_path(digest).stat().st_mtime, UTC)
        except FileNotFoundError as failure:
            raise NotFound(f"the image store has no {digest}") from failure

    def put_tree(self, token: str, tree: Tree) -> None:
        """Give a finished tree its name, and its record. Under the lock."""
        self._write(self.tree_record(tree.digest), msgspec.json.encode(tree))
        self.place_tree(token, tree.digest)
        self._trees.clear()

    def forget(self, digest: str) -> int:
        """Delete a blob; gives its size. Under the lock."""
        self._manifests.pop(digest, None)
        self._trees.clear()  # found through configs, too
        path = self.blob_path(digest)
        try:
            size = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            return 0
        return size

    def _document(self, digest: str, kind: type[T]) -> T:
        path = self.blob_path(digest)
        try:
            with path.open("rb") as file:
                content = file.read(MAX_DOCUMENT_BYTES + 1)
        except FileNotFoundError as failure:
            raise NotFound(f"the image store has no {digest}") from failure
        if len(content) > MAX_DOCUMENT_BYTES:
            raise Internal(f"the blob {path} is too large for a manifest or config")
        if hashlib.sha256(content).hexdigest() != path.name:
            raise Internal(f"the blob {path} is damaged: it has another digest than its name")
        try:
            return msgspec.json.decode(content, type=kind)
        except (msgspec.MsgspecError, RecursionError) as failure:
            raise Internal(f"the blob {path} cannot be read: {failure}") from failure

    def _write(self, path: Path, content: bytes) -> None:
        """The whole file or none, also after a power cut.

        Under the lock, which keeps a sweep away meanwhile.
        """
        temporary = self.scratch(secrets.token_hex(8))
        try:
            with _create(temporary) as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
        except OSError:
            with suppress(FileNotFoundError):
                temporary.unlink()
            raise
        _sync_directory(path.parent)


def _create(path: Path) -> BinaryIO:
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
