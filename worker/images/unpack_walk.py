"""Standing in a directory of an image that is being made, and nowhere else.

Every step goes from a directory's descriptor to a name in it, and no link is ever followed by the kernel. A
link among the directories of an entry's path (`lib` -> `usr/lib`) is read and walked here, as inside a
chroot: `/` is the image's root and `..` ends there.

A directory carries its final mode and times whenever the walk does not stand in or below it; they are put
back each time it is left. So nothing has to be remembered of it, and the time of a change is in no tree:
unpacking the same layers twice gives equal trees. A directory that no entry describes has mode 0755 and the
time 0.
"""

import errno
import os
import stat

from worker.platform.descent import OPEN_DIRECTORY, Descent

from .name_index import NameIndex
from .trees import make_accessible
from .unpack_model import BadArchive, TooMuch, UnpackLimits, shown

NO_DIRECTORY = (errno.ENOTDIR, errno.ELOOP)

_IMPLICIT_MODE = 0o755
# As many as Linux follows in one path (path_resolution(7)), and what their texts may add up to.
_MAX_LINKS = 40
_MAX_STEPS = 1000

Parent = tuple[str, ...]


class Frame:
    """What a directory shall have when it is left.

    `now` is the mode it has meanwhile, where that is known; `length` is that of its path with a slash.
    """

    __slots__ = ("atime_ns", "length", "mode", "mtime_ns", "now")

    def __init__(self, mode: int, now: int | None, atime_ns: int, mtime_ns: int, length: int) -> None:
        self.mode = mode
        self.now = now
        self.atime_ns = atime_ns
        self.mtime_ns = mtime_ns
        self.length = length


class Walk:
    """Raises OSError, BadArchive and TooMuch, naming nothing. Leaves the descriptor that it was given open.

    With an `index`, what each layer makes is recorded, which deleting from lower layers needs; with `folding`
    two names which that index takes for one are refused.
    """

    def __init__(self, top: int, limits: UnpackLimits, *, folding: bool) -> None:
        self._limits = limits
        self._folding = folding
        self._index: NameIndex | None = None
        self._layer = 0
        os.fchmod(top, 0o700)
        self._walk = Descent(os.dup(top))
        self._frames = [Frame(_IMPLICIT_MODE, None, 0, 0, 0)]
        self._asked: Parent | None = ()

    def begin(self, layer: int, index: NameIndex | None) -> None:
        """What is made from here on is this layer's."""
        self._layer = layer
        self._index = index

    def finish(self) -> None:
        """Give every directory that is still open its mode and times."""
        self._asked = None
        while len(self._frames) > 1:
            self._up()
        self._settle(self._walk.fd, self._frames[0])

    def close(self) -> None:
        self._walk.close()

    # -- moving

    def enter(self, parent: Parent, *, create: bool) -> bool:
        """Stand in this directory, made if need be; False when it is not there and may not be made.

        BadArchive when a component is neither a directory nor a link to one.
        """
        if parent == self._asked:
            return True
        self._asked = None
        names = self._walk.names
        common = 0
        for ours, theirs in zip(names, parent, strict=False):
            if ours != theirs:
                break
            common += 1
        while len(names) > common:
            self._up()
        if not self._resolve([*reversed(parent[common:])], create):
            return False
        self._asked = parent
        return True

    def _resolve(self, pending: list[str], create: bool) -> bool:
        links = steps = 0
        while pending:
            name = pending.pop()
            steps += 1
            if steps > _MAX_STEPS:
                raise BadArchive("there are too many symbolic links in its path")
            if name == "..":  # from a link's text only
                if len(self._frames) > 1:
                    self._up()
                continue
            try:
                self._down(name)
            except FileNotFoundError:
                if not create:
                    return False
                self._make_directory(name)
            except OSError as failure:
                if failure.errno not in NO_DIRECTORY:
                    raise
                text = self._link_text(name)
                links += 1
                if links > _MAX_LINKS:
                    raise BadArchive("there are too many symbolic links in its path") from failure
                if text.startswith("/"):
                    while len(self._frames) > 1:
                        self._up()
                pending += reversed([part for part in text.split("/") if part not in ("", ".")])
        return True

    def _link_text(self, name: str) -> str:
        try:
            return os.readlink(name, dir_fd=self._walk.fd)
        except OSError as failure:
            if failure.errno != errno.EINVAL:
                raise
            raise BadArchive(f"{shown(self._walk.path(name))} in its path is no directory") from failure

    def _down(self, name: str) -> None:
        """Enter a directory that is there; OSError, and nothing changed, when it is none."""
        if self._folding:
            self._refuse_other_spelling(name)
        self._refuse_depth(name)
        parent = self._walk.fd
        try:
            fd = os.open(name, OPEN_DIRECTORY, dir_fd=parent)
            found = os.fstat(fd)
        except PermissionError:
            found = os.stat(name, dir_fd=parent, follow_symlinks=False)
            make_accessible(parent, name)
            fd = os.open(name, OPEN_DIRECTORY, dir_fd=parent)
        mode = now = stat.S_IMODE(found.st_mode)
        if mode & 0o700 != 0o700:
            os.fchmod(fd, 0o700)
            now = 0o700
        self._stand(fd, name, Frame(mode, now, found.st_atime_ns, found.st_mtime_ns, self._length(name)))

    def _make_directory(self, name: str) -> None:
        """Make and enter a directory."""
        self._claim(name)
        self._refuse_depth(name)
        os.mkdir(name, 0o700, dir_fd=self._walk.fd)
        fd = os.open(name, OPEN_DIRECTORY, dir_fd=self._walk.fd)
        self._stand(fd, name, Frame(_IMPLICIT_MODE, None, 0, 0, self._length(name)))

    def _stand(self, fd: int, name: str, frame: Frame) -> None:
        self._walk.adopt(fd, name)
        self._frames.append(frame)

    def _length(self, name: str) -> int:
        return self._frames[-1].length + len(os.fsencode(name)) + 1

    def _refuse_depth(self, name: str) -> None:
        """Links can lead deeper than any name in the archive is."""
        if len(self._frames) > self._limits.depth:
            raise TooMuch(f"it lies more than {self._limits.depth} directories deep")
        if self._length(name) > self._limits.path_bytes + 1:
            raise TooMuch(f"its path has more than {self._limits.path_bytes} bytes")

    def _up(self) -> str:
        frame = self._frames.pop()
        self._settle(self._walk.fd, frame)
        return self._walk.up()

    def _settle(self, fd: int, frame: Frame) -> None:
        if frame.mode != frame.now:
            os.fchmod(fd, frame.mode)
        os.utime(fd, ns=(frame.atime_ns, frame.mtime_ns))

    # -- names

    def _claim(self, name: str) -> None:
        """Before something new is made."""
        if self._folding:
            self._refuse_other_spelling(name)
        self._record(self._walk.path(name))

    def _record(self, path: str) -> None:
        if self._index is not None:
            self._index.record(path, self._layer)

    def _refuse_other_spelling(self, name: str) -> None:
        """BadArchive when something stands here under a name that the file system takes for this one."""
        assert self._index is not None
        try:
            name.encode("utf-8")
        except UnicodeEncodeError as failure:
            raise BadArchive("its name is no UTF-8, which this file system demands") from failure
        path = self._walk.path(name)
        known = self._index.spelling(path)
        if known is None or known == path:
            return
        try:
            # Of a directory that is gone there is nothing here; whatever is here has been recorded since.
            os.stat(known.rpartition("/")[2], dir_fd=self._walk.fd, follow_symlinks=False)
        except FileNotFoundError:
            return
        raise BadArchive(f"this file system takes it for {shown(known)}, which is there too")
