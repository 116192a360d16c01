"""Making an image's tree: files, directories and links, and what whiteouts delete.

What is made is always new: something in its place is unlinked before, so nothing is written through a name
that was there. Where things are made is `unpack_walk`'s part.
"""

import errno
import os
import stat
from collections.abc import Callable
from typing import NamedTuple

from worker.platform.xattrs import Xattrs

from .unpack_model import BadArchive, UnpackLimits
from .unpack_walk import NO_DIRECTORY, Parent, Walk

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_LEFT_OVER = (errno.ENOTEMPTY, errno.EEXIST)


class Metadata(NamedTuple):
    """`owner` is None for the worker's own user; `xattrs` are those that are kept."""

    mode: int
    mtime_ns: int
    owner: tuple[int, int] | None
    xattrs: list[tuple[str, bytes]]


class TreeWriter(Walk):
    """Raises what `Walk` does. `check` is called now and then while a tree is deleted, to raise."""

    def __init__(
        self, top: int, limits: UnpackLimits, xattrs: Xattrs, check: Callable[[], None], *, folding: bool
    ) -> None:
        super().__init__(top, limits, folding=folding)
        self._xattrs = xattrs
        self._check = check

    # -- making

    def directory(self, parent: Parent, name: str, metadata: Metadata) -> None:
        """Make it, or give the one that is there these attributes; its content stays."""
        self.enter(parent, create=True)
        self._asked = None
        try:
            self._down(name)
        except FileNotFoundError:
            self._make_directory(name)
        except OSError as failure:
            if failure.errno not in NO_DIRECTORY:
                raise
            os.unlink(name, dir_fd=self._walk.fd)
            self._make_directory(name)
        else:
            self._record(self._walk.path())
            self._drop_xattrs()
        self._asked = (*parent, name)
        self._describe(metadata)

    def root(self, metadata: Metadata) -> None:
        self.enter((), create=True)
        self._drop_xattrs()
        self._describe(metadata)

    def _describe(self, metadata: Metadata) -> None:
        """The attributes of the current directory; mode and times follow when it is left."""
        frame = self._frames[-1]
        frame.mode = metadata.mode
        frame.atime_ns = frame.mtime_ns = metadata.mtime_ns
        self._set_owner_and_xattrs(self._walk.fd, metadata)

    def _drop_xattrs(self) -> None:
        """An existing directory's attributes are replaced, not added to (layer.md, "Changeset over existing")."""
        old = self._xattrs.read(self._walk.fd)
        if old:
            self._xattrs.remove(self._walk.fd, [name for name, _ in old])

    def create(self, parent: Parent, name: str) -> int:
        """The descriptor of a new, empty file, which the caller fills, finishes and closes."""
        self.enter(parent, create=True)
        self._claim(name)
        try:
            return os.open(name, _CREATE, 0o600, dir_fd=self._walk.fd)
        except FileExistsError:
            self.clear(name)
            return os.open(name, _CREATE, 0o600, dir_fd=self._walk.fd)

    def finish_file(self, fd: int, metadata: Metadata) -> None:
        """Owner first, as changing it takes capabilities and setuid bits away; times last."""
        self._set_owner_and_xattrs(fd, metadata)
        os.fchmod(fd, metadata.mode)
        os.utime(fd, ns=(metadata.mtime_ns, metadata.mtime_ns))

    def _set_owner_and_xattrs(self, fd: int, metadata: Metadata) -> None:
        if metadata.owner is not None:
            os.fchown(fd, *metadata.owner)
        if not metadata.xattrs:
            return
        try:
            self._xattrs.write(fd, metadata.xattrs)
        except OSError as failure:
            # ext4 says ENOSPC when attributes do not fit into a block: not the disk is full.
            size = sum(len(value) for _, value in metadata.xattrs)
            raise BadArchive(
                f"its extended attributes ({size} bytes) cannot be kept here: {failure.strerror}"
            ) from failure

    def symlink(self, parent: Parent, name: str, text: str, metadata: Metadata) -> None:
        self.enter(parent, create=True)
        self._claim(name)
        try:
            os.symlink(text, name, dir_fd=self._walk.fd)
        except FileExistsError:
            self.clear(name)
            os.symlink(text, name, dir_fd=self._walk.fd)
        fd = self._walk.fd
        if metadata.owner is not None:
            os.chown(name, *metadata.owner, dir_fd=fd, follow_symlinks=False)
        times = (metadata.mtime_ns, metadata.mtime_ns)
        os.utime(name, ns=times, dir_fd=fd, follow_symlinks=False)

    def hard_link(self, parent: Parent, name: str, target_parent: Parent, target: str) -> None:
        """Another name for a file that is there. Of a symbolic link it makes a copy: not every file system
        links those, and nobody can tell.
        """
        if not self.enter(target_parent, create=False):
            raise BadArchive("it is a hard link to something that is not there")
        found = self._look(target)
        if found is None:
            raise BadArchive("it is a hard link to something that is not there")
        path = self._walk.path(target)
        if stat.S_ISLNK(found.st_mode):
            text = os.readlink(target, dir_fd=self._walk.fd)
            owner = (found.st_uid, found.st_gid) if os.geteuid() == 0 else None
            self._refuse_self(parent, name, path)
            self.symlink(parent, name, text, Metadata(0o777, found.st_mtime_ns, owner, []))
            return
        if not stat.S_ISREG(found.st_mode):
            raise BadArchive("it is a hard link to a directory")
        source = os.dup(self._walk.fd)
        try:
            self._refuse_self(parent, name, path)
            self._claim(name)
            try:
                self._link(source, target, name)
            except FileExistsError:
                self.clear(name)
                self._link(source, target, name)
        finally:
            os.close(source)

    def _refuse_self(self, parent: Parent, name: str, target: str) -> None:
        self.enter(parent, create=True)
        if self._walk.path(name) == target:
            raise BadArchive("it is a hard link to itself")

    def _link(self, source: int, target: str, name: str) -> None:
        os.link(target, name, src_dir_fd=source, dst_dir_fd=self._walk.fd, follow_symlinks=False)

    def _look(self, name: str) -> os.stat_result | None:
        if self._folding:
            self._refuse_other_spelling(name)
        try:
            return os.stat(name, dir_fd=self._walk.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    # -- deleting

    def make_way(self, parent: Parent, name: str) -> None:
        """Delete what stands there, for something that is then not made."""
        if self.enter(parent, create=False):
            self.clear(name)

    def clear(self, name: str) -> None:
        """Delete a name of the current directory, with all below it, whoever made it."""
        self._delete(name, keep=None)

    def hide(self, parent: Parent, name: str) -> None:
        """A whiteout: delete what lower layers made there."""
        if self._layer and self.enter(parent, create=False):
            path = self._walk.path(name)
            if not self._hidden(path):
                self._delete(name, keep=self._is_ours)
                self._record(_marker(path))

    def hide_all(self, parent: Parent) -> None:
        """An opaque whiteout: the same for everything in a directory."""
        if self._layer and self.enter(parent, create=False):
            path = self._walk.path()
            if not self._hidden(path):
                for name in os.listdir(self._walk.fd):
                    self._delete(name, keep=self._is_ours)
                self._record(_marker(path))

    def _hidden(self, path: str) -> bool:
        """Whether this layer did so before, here or above: then all that is here is its own, however much that
        is, and looking through it for each of a million whiteouts would take for ever.
        """
        while True:
            if self._is_ours(_marker(path)):
                return True
            if not path:
                return False
            path = path.rpartition("/")[0]

    def _is_ours(self, path: str) -> bool:
        return self._index is not None and self._index.made_by(path, self._layer)

    def _delete(self, name: str, keep: Callable[[str], bool] | None) -> None:
        """Depth first. A directory stays while something in it does."""
        found = self._look(name)
        if found is None:
            return
        if not stat.S_ISDIR(found.st_mode):
            self._unlink(name, keep)
            return
        base = len(self._frames)
        asked, self._asked = self._asked, None
        self._down(name)
        pending = [self._sweep(keep)]
        while len(self._frames) > base:
            if pending[-1]:
                name = pending[-1].pop()
                if keep is None or not keep(_marker(self._walk.path(name))):
                    self._down(name)
                    pending.append(self._sweep(keep))
            else:
                pending.pop()
                stays = keep is not None and keep(self._walk.path())
                left = self._up()
                if not stays:
                    self._rmdir(left, keep)
        self._asked = asked

    def _sweep(self, keep: Callable[[str], bool] | None) -> list[str]:
        """Delete what is no directory; gives the names of those."""
        self._check()
        with os.scandir(self._walk.fd) as entries:
            found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        for name, is_directory in found:
            if not is_directory:
                self._unlink(name, keep)
        return [name for name, is_directory in found if is_directory]

    def _unlink(self, name: str, keep: Callable[[str], bool] | None) -> None:
        if keep is None or not keep(self._walk.path(name)):
            os.unlink(name, dir_fd=self._walk.fd)

    def _rmdir(self, name: str, keep: Callable[[str], bool] | None) -> None:
        try:
            os.rmdir(name, dir_fd=self._walk.fd)
        except OSError as failure:
            if keep is None or failure.errno not in _LEFT_OVER:
                raise


def _marker(path: str) -> str:
    """What stands in the index for "everything there is this layer's"; no entry can have such a name."""
    return f"{path}/.wh..wh..opq"
