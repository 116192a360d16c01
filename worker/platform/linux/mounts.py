"""The file system that a container of isolation `rootfs` sees: carries out a list of mounts by descriptors.

Nothing here is done by path once the root is open: the image's own links are resolved inside the root
(openat2, RESOLVE_IN_ROOT), and what is mounted was opened without following any. Standard library only.
Facts are those of open_tree(2), move_mount(2), fsopen(2), mount_setattr(2), pivot_root(2); Linux 5.12.

Each mount is a list, its name first; targets are absolute paths inside the root, made when they are missing:

bind     target source access        the same file or folder; access `ro`, `rw`, or `dev` for a device
fill     target source when          `ro`, where the image has nothing, or nothing in it; when `bare`: only in an image
                                     that has no system of its own, and there also below its folders
tmpfs    target bytes mode access    empty and its own; bytes 0: as the kernel thinks; access `rw` or `exec`
devpts   target                      terminals of its own
link     target text when            a symbolic link, where there is nothing
folder   target mode                 an empty folder, where there is nothing
mask     target                      nothing can be read there, where there is something
fixed    target                      read-only from now on, where there is something
"""

import contextlib
import errno
import os
import stat
import struct
from collections.abc import Callable, Iterator
from typing import Any

from . import system
from .landlock import open_plain
from .libc import O_PATH, syscall

_OPEN_TREE, _MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT = 428, 429, 430, 431, 432
_OPENAT2, _MOUNT_SETATTR = 437, 442

_AT_EMPTY_PATH, _AT_RECURSIVE = 0x1000, 0x8000
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
_MOVE_FROM_EMPTY, _MOVE_TO_EMPTY = 0x4, 0x40
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = 1
_SET_FLAG, _SET_STRING, _CREATE = 0, 1, 6
_RESOLVE_NO_MAGICLINKS, _RESOLVE_IN_ROOT = 0x02, 0x10

RDONLY, NOSUID, NODEV, NOEXEC = 1, 2, 4, 8
_ATTRIBUTES = {"ro": RDONLY | NOSUID | NODEV, "rw": NOSUID | NODEV, "dev": NOSUID | NOEXEC}
_TMPFS = {"rw": NOSUID | NODEV | NOEXEC, "exec": NOSUID | NODEV}

# An image with one of these can run programs by itself.
_SYSTEM_MARKS = (
    "/bin/sh",
    "/usr/bin/sh",
    "/lib64",
    "/usr/lib64",
    "/lib/ld-musl-x86_64.so.1",
    "/lib/ld-musl-aarch64.so.1",
    "/lib/ld-linux-aarch64.so.1",
    "/usr/lib/ld-linux-aarch64.so.1",
    "/nix/store",
)

# What `/dev` has.
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
DEV_BYTES = 1024 * 1024
DEV_LINKS = (
    ("/dev/ptmx", "pts/ptmx"),
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
)
_OWN_PLACES = ("/dev/", "/proc/", "/proc", "/dev")

_CLOSED = os.O_CLOEXEC
_MAX_LINKS = 8


class Ready:
    """Mounts made before they are wanted, detached, each for one use: by source and access, and those of `/dev`."""

    def __init__(self) -> None:
        self.binds: dict[tuple[str, str], tuple[int, bool]] = {}
        self.dev: int | None = None
        self.devpts: int | None = None
        self.system: system.System | None = None

    def take(self, source: str, access: str) -> tuple[int, bool] | None:
        """(mount, whether it is a folder), if there is one; it is the caller's to close."""
        return self.binds.pop((source, access), None)

    def close(self) -> None:
        for fd, _ in self.binds.values():
            os.close(fd)
        for one in (self.dev, self.devpts):
            if one is not None:
                os.close(one)
        self.binds, self.dev, self.devpts = {}, None, None

    def forget_stale(self) -> None:
        """Let go of the host's files if any may have been replaced since."""
        if self.system is not None and self.system.stale():
            for key in [key for key in self.binds if key[1] == "ro"]:
                os.close(self.binds.pop(key)[0])


def make_ready() -> Ready:
    """What nearly every root has: the host's system, `/dev` with its devices and links, its terminals."""
    ready = Ready()
    ready.system = system.system()
    wanted = [(rule.path, "ro") for rule in ready.system.rules if not rule.path.startswith(_OWN_PLACES)]
    wanted += [(f"/dev/{name}", "dev") for name in DEVICES]
    for source, access in wanted:
        with contextlib.suppress(OSError), opened(open_plain(source)) as found:
            ready.binds[source, access] = _bound(found, access), stat.S_ISDIR(os.fstat(found).st_mode)
    ready.dev = new_file_system("tmpfs", {"mode": "755", "size": str(DEV_BYTES)}, _TMPFS["exec"])
    for name in DEVICES:
        _make(name, ready.dev, folder=False)
    for name in ("pts", "shm"):
        _make(name, ready.dev, folder=True)
    for target, text in DEV_LINKS:
        os.symlink(text, os.path.basename(target), dir_fd=ready.dev)
    ready.devpts = _new_devpts()
    return ready


class Root:
    """The root of a container, mounted in this process's own mount namespace and not yet entered.

    `ready` are mounts to be used; what of it is not, is closed when the root is entered.
    """

    def __init__(self, path: str, ready: Ready | None = None) -> None:
        """Mount `path` on itself. OSError."""
        self._ready = ready or Ready()
        self._ready.forget_stale()
        place = open_plain(path)
        try:
            self.fd = clone(place, recursive=False)
            set_attributes(self.fd, NOSUID | NODEV, recursive=False)
            move(self.fd, place)
        finally:
            os.close(place)
        self._bare: bool | None = None

    def carry_out(self, mounts: list[list[Any]]) -> None:
        """Do the mounts in their order. OSError, with the target as its file name."""
        for name, target, *arguments in mounts:
            try:
                _MOUNTS[name](self, target, *arguments)
            except OSError as failure:
                failure.filename = target
                raise

    def enter(self) -> None:
        """Make it the root of every process of this mount namespace, and let go of the old one."""
        self._ready.close()
        os.fchdir(self.fd)
        here = b".\0"
        syscall(_number("pivot_root"), here, here)
        syscall(_number("umount2"), here, 2)  # MNT_DETACH
        os.chdir("/")
        os.close(self.fd)

    # -- the mounts

    def bind(self, target: str, source: str, access: str) -> None:
        ready = self._ready.take(source, access)
        if ready is not None:
            self._attach(target, *ready)
            return
        with opened(open_plain(source)) as found:
            self._bind(target, found, access)

    def fill(self, target: str, source: str, when: str) -> None:
        if when == "bare" and not self.bare:
            return
        if self._is_free(target):
            ready = self._ready.take(source, "ro")
            if ready is not None:
                self._attach(target, *ready)
                return
        try:
            found = open_plain(source)
        except OSError as failure:
            if failure.errno in (errno.ENOENT, errno.ELOOP):
                return
            raise
        with opened(found):
            self._fill(target, found, deep=when == "bare")

    def tmpfs(self, target: str, size_bytes: int, mode: int, access: str) -> None:
        if target == "/dev" and self._ready.dev is not None:
            made, self._ready.dev = self._ready.dev, None
            self._attach(target, made, True)
            return
        options = {"mode": f"{mode:o}"} | ({"size": str(size_bytes)} if size_bytes else {})
        with (
            opened(new_file_system("tmpfs", options, _TMPFS[access])) as made,
            opened(self.place(target)) as at,
        ):
            move(made, at)

    def devpts(self, target: str) -> None:
        made, self._ready.devpts = self._ready.devpts, None
        self._attach(target, _new_devpts() if made is None else made, True)

    def link(self, target: str, text: str, when: str) -> None:
        if when == "bare" and not self.bare:
            return
        with contextlib.suppress(FileExistsError), opened(self._parent(target)) as parent:
            os.symlink(text, os.path.basename(target), dir_fd=parent)

    def folder(self, target: str, mode: int) -> None:
        with contextlib.suppress(FileExistsError), opened(self._parent(target)) as parent:
            os.mkdir(os.path.basename(target), mode, dir_fd=parent)

    def mask(self, target: str) -> None:
        found = self._find(target)
        if found is None:
            return
        with opened(found):
            if stat.S_ISDIR(os.fstat(found).st_mode):
                made = new_file_system("tmpfs", {"mode": "555"}, RDONLY | NOSUID | NODEV | NOEXEC)
            else:
                with opened(open_plain("/dev/null")) as null:
                    made = clone(null, recursive=False)
            with opened(made):
                move(made, found)

    def fixed(self, target: str) -> None:
        found = self._find(target)
        if found is None:
            return
        with opened(found), opened(clone(found, recursive=True)) as copy:
            set_attributes(copy, RDONLY | NOSUID | NODEV | NOEXEC, recursive=True)
            move(copy, found)

    # -- places

    @property
    def bare(self) -> bool:
        if self._bare is None:
            self._bare = is_bare(self.fd)
        return self._bare

    def place(self, target: str, *, folder: bool = True, links: int = _MAX_LINKS) -> int:
        """A descriptor of the target, made when it is missing: where a link to nothing leads, too."""
        found = self._find(target)
        if found is not None:
            return found
        name = os.path.basename(target)
        with opened(self._parent(target)) as parent:
            try:
                _make(name, parent, folder=folder)
            except FileExistsError:
                if links == 0:
                    raise
                leads_to = os.path.join(os.path.dirname(target), os.readlink(name, dir_fd=parent))
                return self.place(os.path.normpath(leads_to), folder=folder, links=links - 1)
            return os.open(name, O_PATH | os.O_NOFOLLOW | _CLOSED, dir_fd=parent)

    def _parent(self, target: str) -> int:
        return self.place(os.path.dirname(target))

    def _find(self, target: str) -> int | None:
        return find(self.fd, target)

    def _bind(self, target: str, source: int, access: str) -> None:
        self._attach(target, _bound(source, access), stat.S_ISDIR(os.fstat(source).st_mode))

    def _attach(self, target: str, mount: int, folder: bool) -> None:
        """Put a detached mount at its place, and close its descriptor."""
        with opened(mount), opened(self.place(target, folder=folder)) as at:
            move(mount, at)

    def _is_free(self, target: str) -> bool:
        found = self._find(target)
        if found is None:
            return True
        with opened(found):
            return is_empty(found)

    def _fill(self, target: str, source: int, *, deep: bool) -> None:
        found = self._find(target)
        if found is None:
            self._bind(target, source, "ro")
            return
        with opened(found):
            both = all(stat.S_ISDIR(os.fstat(fd).st_mode) for fd in (found, source))
            if is_empty(found):
                self._bind(target, source, "ro")
                return
        if deep and both and target.count("/") < 3:
            with opened(os.open(".", os.O_RDONLY | os.O_DIRECTORY | _CLOSED, dir_fd=source)) as listed:
                names = sorted(os.listdir(listed))
            for name in names:
                with opened(os.open(name, O_PATH | os.O_NOFOLLOW | _CLOSED, dir_fd=source)) as below:
                    if stat.S_ISLNK(os.fstat(below).st_mode):
                        self.link(f"{target}/{name}", os.readlink(name, dir_fd=source), "always")
                    else:
                        self._fill(f"{target}/{name}", below, deep=True)


_MOUNTS: dict[str, Callable[..., None]] = {
    "bind": Root.bind,
    "fill": Root.fill,
    "tmpfs": Root.tmpfs,
    "devpts": Root.devpts,
    "link": Root.link,
    "folder": Root.folder,
    "mask": Root.mask,
    "fixed": Root.fixed,
}


def _make(name: str, parent: int, *, folder: bool) -> None:
    if folder:
        os.mkdir(name, 0o755, dir_fd=parent)
    else:
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | _CLOSED
        os.close(os.open(name, flags, 0o644, dir_fd=parent))


def is_bare(root: int) -> bool:
    """Whether an image has no system of its own: no shell, and no loader for programs."""
    for mark in _SYSTEM_MARKS:
        found = find(root, mark)
        if found is not None:
            with opened(found):
                if not is_empty(found):
                    return False
    return True


def is_empty(fd: int) -> bool:
    """Whether there is nothing in it: the place of a mount of an earlier run, or as good as that."""
    status = os.fstat(fd)
    if stat.S_ISDIR(status.st_mode):
        with opened(os.open(".", os.O_RDONLY | os.O_DIRECTORY | _CLOSED, dir_fd=fd)) as listed:
            return not os.listdir(listed)
    return stat.S_ISREG(status.st_mode) and status.st_size == 0


def find(root: int, target: str) -> int | None:
    """A descriptor of what a path names to a process with this root; None where there is nothing."""
    how = struct.pack("=QQQ", O_PATH | _CLOSED, 0, _RESOLVE_NO_MAGICLINKS | _RESOLVE_IN_ROOT)
    try:
        return syscall(_OPENAT2, root, os.fsencode(target.lstrip("/") or ".") + b"\0", how, len(how))
    except (FileNotFoundError, NotADirectoryError):
        return None


# -- calls of the kernel


def clone(fd: int, *, recursive: bool) -> int:
    """A detached copy of the mount at an open descriptor; with all below it when `recursive`."""
    flags = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | _AT_EMPTY_PATH | (_AT_RECURSIVE if recursive else 0)
    return syscall(_OPEN_TREE, fd, b"\0", flags)


def set_attributes(mount: int, attributes: int, *, recursive: bool) -> None:
    """Add MOUNT_ATTR_* to a mount, and make it private."""
    attr = struct.pack("=QQQQ", attributes, 0, 1 << 18, 0)  # MS_PRIVATE
    flags = _AT_EMPTY_PATH | (_AT_RECURSIVE if recursive else 0)
    syscall(_MOUNT_SETATTR, mount, b"\0", flags, attr, len(attr))


def move(mount: int, place: int) -> None:
    """Attach a detached mount on an open descriptor."""
    syscall(_MOVE_MOUNT, mount, b"\0", place, b"\0", _MOVE_FROM_EMPTY | _MOVE_TO_EMPTY)


def new_file_system(kind: str, options: dict[str, str], attributes: int) -> int:
    """A detached mount of a new file system; an option without a value is a flag."""
    with opened(syscall(_FSOPEN, kind.encode() + b"\0", _FSOPEN_CLOEXEC)) as context:
        for name, value in options.items():
            if value:
                syscall(_FSCONFIG, context, _SET_STRING, name.encode() + b"\0", value.encode() + b"\0", 0)
            else:
                syscall(_FSCONFIG, context, _SET_FLAG, name.encode() + b"\0", None, 0)
        syscall(_FSCONFIG, context, _CREATE, None, None, 0)
        return syscall(_FSMOUNT, context, _FSMOUNT_CLOEXEC, attributes)


def _bound(source: int, access: str) -> int:
    """A detached copy of what is mounted at an open descriptor, and below, with the attributes of an access."""
    copy = clone(source, recursive=True)
    try:
        set_attributes(copy, _ATTRIBUTES[access], recursive=True)
    except OSError:
        os.close(copy)
        raise
    return copy


def _new_devpts() -> int:
    options = {"newinstance": "", "ptmxmode": "0666", "mode": "620"}
    return new_file_system("devpts", options, NOSUID | NOEXEC)


def make_private() -> None:
    """No mount of this namespace is told to the one that it was copied from, nor the reverse."""
    with opened(os.open("/", O_PATH | _CLOSED)) as root:
        set_attributes(root, 0, recursive=True)


def _number(name: str) -> int:
    x86, arm = {"pivot_root": (155, 41), "umount2": (166, 39)}[name]
    return arm if os.uname().machine == "aarch64" else x86


@contextlib.contextmanager
def opened(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)
