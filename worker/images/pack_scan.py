"""What of a folder becomes an image: every entry in one order, whatever order the file system gives.

A directory comes before what is in it: first its files and links, sorted by their bytes, then its directories
in the same order, each with all below it. Two scans of an unchanged folder are equal, so a second one after the
files were read tells whether what was read is one state of the folder.
"""

import os
import stat
from typing import NamedTuple

from worker.platform.descent import Descent
from worker.platform.treecopy import KEPT_MODE, TreeError, kind_refused, naming

from .name_index import fold
from .pack_ignore import Ignore
from .pack_tar import DIRECTORY, FILE, HARD_LINK, SYMLINK
from .unpack_model import BadArchive, Notes, TooMuch, UnpackLimits
from .whiteouts import PREFIX, components

_LINK_MODE = 0o777


class Found(NamedTuple):
    """One entry. `link` is a symbolic link's text, or the first name of a file that has several.

    `identity` and `ctime_ns` tell whether the file is still the one that was found.
    """

    path: str
    kind: bytes
    mode: int
    size: int
    mtime_ns: int
    link: str
    identity: tuple[int, int]
    ctime_ns: int


class Scan(NamedTuple):
    """`bytes` are those of the files; `notes` tell what is left out or changed."""

    entries: list[Found]
    bytes: int
    newest_ns: int
    notes: tuple[str, ...]

    def check_unchanged(self, later: "Scan") -> None:
        """Raises TreeError naming the first entry that is another one."""
        if self.entries == later.entries:
            return
        known = {entry.path: entry for entry in self.entries}
        now = {entry.path: entry for entry in later.entries}
        for path in sorted(known.keys() | now.keys()):
            if known.get(path) != now.get(path):
                raise TreeError(path, "changed while it was being packed")


def scan(top: int, ignore: Ignore, *, folding: bool = False, limits: UnpackLimits | None = None) -> Scan:
    """Everything below an open directory that is not left out; raises TreeError.

    What no node could unpack is refused here: with `folding` also two names that macOS takes for one.
    """
    work = _Scan(top, ignore, folding, limits or UnpackLimits())
    try:
        return work.run()
    finally:
        work.walk.close()


class _Scan:
    def __init__(self, top: int, ignore: Ignore, folding: bool, limits: UnpackLimits) -> None:
        self.walk = Descent(os.dup(top))
        self._ignore = ignore
        self._folding = folding
        self._limits = limits
        self._entries: list[Found] = []
        self._bytes = self._newest = 0
        self._first: dict[tuple[int, int], str] = {}
        self._spelt: dict[str, str] = {}
        self._notes = Notes()

    def run(self) -> Scan:
        pending = [self._directory()]
        while pending:
            if pending[-1]:
                name = pending[-1].pop()
                with naming(self.walk, name):
                    found = self.walk.down(name)
                self._add(self.walk.path(), DIRECTORY, found)
                pending.append(self._directory())
            else:
                pending.pop()
                if pending:
                    with naming(self.walk):
                        self.walk.up()
        return Scan(self._entries, self._bytes, self._newest, self._notes.all())

    def _directory(self) -> list[str]:
        """Takes in the files and links of the current directory; gives its directories, the last one first."""
        with naming(self.walk), os.scandir(self.walk.fd) as listed:
            names = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in listed]
        names.sort(key=lambda item: os.fsencode(item[0]))
        directories = []
        for name, is_directory in names:
            path = self.walk.path(name)
            if self._ignore.leaves_out(path, is_directory=is_directory):
                continue
            self._check_name(path)
            if is_directory:
                directories.append(name)
            else:
                self._take(name, path)
        directories.reverse()
        return directories

    def _check_name(self, path: str) -> None:
        raw = os.fsencode(path)
        if raw.rpartition(b"/")[2].startswith(PREFIX):
            raise TreeError(path, "a name that begins with `.wh.` deletes something in an image")
        try:
            components(raw, self._limits)
        except (BadArchive, TooMuch) as failure:
            raise TreeError(path, str(failure)) from None
        if not self._folding:
            return
        try:
            path.encode("utf-8")
        except UnicodeEncodeError:
            raise TreeError(path, "its name is no UTF-8, which macOS demands") from None
        other = self._spelt.setdefault(fold(path), path)
        if other != path:
            raise TreeError(path, f"macOS takes it for {other}, which is there too")

    def _take(self, name: str, path: str) -> None:
        with naming(self.walk, name):
            found = os.stat(name, dir_fd=self.walk.fd, follow_symlinks=False)
            if stat.S_ISLNK(found.st_mode):
                text = os.readlink(name, dir_fd=self.walk.fd)
                if len(os.fsencode(text)) > self._limits.link_bytes:
                    raise TreeError(path, "its target is too long")
                self._add(path, SYMLINK, found, text)
                return
        if not stat.S_ISREG(found.st_mode):
            raise TreeError(path, kind_refused(found.st_mode) or "changed while it was being read")
        if found.st_nlink > 1:
            first = self._first.setdefault((found.st_dev, found.st_ino), path)
            if first != path:
                self._add(path, HARD_LINK, found, first)
                return
        self._bytes += found.st_size
        self._add(path, FILE, found)

    def _add(self, path: str, kind: bytes, found: os.stat_result, link: str = "") -> None:
        self._newest = max(self._newest, found.st_mtime_ns)
        mode = found.st_mode & KEPT_MODE
        if found.st_mode & (stat.S_ISUID | stat.S_ISGID) and kind == FILE:
            self._notes.add("setuid or setgid dropped", path)
        if kind != DIRECTORY:
            mode &= 0o777  # sticky means something for directories only
        self._entries.append(
            Found(
                path=path,
                kind=kind,
                mode=_LINK_MODE if kind == SYMLINK else mode,
                size=found.st_size if kind == FILE else 0,
                mtime_ns=found.st_mtime_ns,
                link=link,
                identity=(found.st_dev, found.st_ino),
                ctime_ns=found.st_ctime_ns,
            )
        )
        if len(self._entries) > self._limits.entries:
            raise TreeError(path, f"more than {self._limits.entries} entries, which no node would unpack")
