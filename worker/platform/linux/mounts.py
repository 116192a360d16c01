"""The file system that a container of isolation `rootfs` sees: carries out a list of mounts by descriptors.

Nothing here is done by path once the root is open: the image's own links are resolved inside the root
(openat2, RESOLVE_IN_ROOT), and what is mounted was opened without following any. Standard library only.
Facts are those of open_tree(2), move_mount(2), fsopen(2), mount_setattr(2), pivot_root(2); Linux 5.12.

Each mount is a list, its name first; targets are absolute paths inside the root, made when they are missing:

bind     target source access        the same file or folder; access `ro`, `rw`, `data` for `ro` and nothing to be
                                     executed, or `dev` for a device
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
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from . import system
from .landlock import open_plain
from .libc import O_PATH, syscall

_OPEN_TREE, _MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT = 428, 429, 430, 431, 432
_FSPICK, _OPENAT2, _MOUNT_SETATTR = 433, 437, 442

_AT_EMPTY_PATH, _AT_RECURSIVE = 0x1000, 0x8000
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
_MOVE_FROM_EMPTY, _MOVE_TO_EMPTY = 0x4, 0x40
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = 1
_FSPICK_CLOEXEC, _FSPICK_EMPTY_PATH = 0x1, 0x8
_SET_FLAG, _SET_STRING, _CREATE, _RECONFIGURE = 0, 1, 6, 7
_RESOLVE_NO_MAGICLINKS, _RESOLVE_IN_ROOT = 0x02, 0x10

RDONLY, NOSUID, NODEV, NOEXEC = 1, 2, 4, 8
_ATTRIBUTES = {
    "data": RDONLY | NOSUID | NODEV | NOEXEC,
    "ro": RDONLY | NOSUID | NODEV,
    "rw": NOSUID | NODEV,
    "dev": NOSUID | NOEXEC,
}
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

SHARED_MEMORY, SHARED_MODE = "/dev/shm", 0o1777
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
# Names of programs on Debian and its like are links through this.
ALTERNATIVES = "/etc/alternatives"

_CLOSED = os.O_CLOEXEC
_MAX_LINKS = 8
_HOW = struct.pack("=QQQ", O_PATH | _CLOSED, 0, _RESOLVE_NO_MAGICLINKS | _RESOLVE_IN_ROOT)


class Ready:
    """Mounts made before they are wanted, detached, each for one use.

    `trees` are whole folders of a root by their targets, with the targets in them that are taken care of; `binds`
    by source, as `ro`, with whether it is a folder; `memory` is for SHARED_MEMORY. `system` tells whether the host's
    files in them may be others by now.
    """

    def __init__(self) -> None:
        self.trees: dict[str, tuple[int, frozenset[str]]] = {}
        self.binds: dict[str, tuple[int, bool]] = {}
        self.memory: int | None = None
        self.system: system.System | None = None

    def close(self) -> None:
        for fd, _ in (*self.binds.values(), *self.trees.values()):
            os.close(fd)
        if self.memory is not None:
            os.close(self.memory)
        self.binds, self.trees, self.memory = {}, {}, None

    def forget_stale(self) -> None:
        """Let go of the host's files if any may have been replaced since."""
        if self.system is not None and system.stale_at_start(self.system):
            for fd, _ in self.binds.values():
                os.close(fd)
            self.binds = {}
            for top in _SYSTEM_TREES & self.trees.keys():
                os.close(self.trees.pop(top)[0])


# Folders of a root that are made ready whole; the second kind where an image has nothing there.
_OWN_TREES = frozenset({"/dev", "/proc"})
_SYSTEM_TREES = frozenset({"/etc", "/sys"})


def make_ready(proc: int, *, masked: Iterable[str], fixed: Iterable[str]) -> Ready:
    """What nearly every root has: the host's system, `/dev` with its devices and terminals, and `proc`, a mount of
    /proc, closed to what is `masked` and read-only where it is `fixed`.

    It is put together on top of /proc, and taken away from there.
    """
    ready = Ready()
    ready.system = system.system()
    with opened(new_file_system("tmpfs", {"mode": "755", "size": str(DEV_BYTES)}, NOSUID | NODEV)) as scratch:
        with opened(os.open("/proc", O_PATH | os.O_DIRECTORY | _CLOSED)) as at:
            move(scratch, at)
        stage = Root(scratch)
        stage._bare = True
        made: dict[str, set[str]] = {top: {top} for top in _OWN_TREES | _SYSTEM_TREES}
        plan = [*dev_mounts(), ["folder", SHARED_MEMORY, 0o755]]
        for path in (*(rule.path for rule in ready.system.rules), ALTERNATIVES):
            top = "/" + path.split("/")[1]
            if top in _SYSTEM_TREES:
                plan.append(["fill", path, path, "always"])
            elif top not in _OWN_TREES:
                with contextlib.suppress(OSError), opened(open_plain(path)) as found:
                    ready.binds[path] = _bound(found, "ro"), stat.S_ISDIR(os.fstat(found).st_mode)
        for path, text in system.links().items():
            if path.startswith(tuple(f"{top}/" for top in _SYSTEM_TREES)):
                plan.append(["link", path, text, "always"])
        stage.carry_out(plan)
        with opened(stage.place("/proc")) as at:
            move(proc, at)
        os.close(proc)
        stage.carry_out([*(["mask", target] for target in masked), *(["fixed", target] for target in fixed)])
        for _, target, *_ in plan:
            made.setdefault("/" + target.split("/")[1], set()).add(target)
        made["/dev"].discard(SHARED_MEMORY)
        for top, targets in made.items():
            found_top = stage._find(top)
            if found_top is not None:
                with opened(found_top):
                    tree = clone(found_top, recursive=True)
                if top in _SYSTEM_TREES:
                    set_attributes(tree, _ATTRIBUTES["ro"], recursive=True)
                ready.trees[top] = tree, frozenset(targets)
    syscall(_number("umount2"), b"/proc\0", 2)  # MNT_DETACH
    ready.memory = new_file_system("tmpfs", {"mode": f"{SHARED_MODE:o}"}, _TMPFS["rw"])
    return ready


def dev_mounts() -> list[list[Any]]:
    """`/dev`, but for its shared memory, whose size is the container's."""
    return [
        ["tmpfs", "/dev", DEV_BYTES, 0o755, "exec"],
        *(["bind", f"/dev/{name}", f"/dev/{name}", "dev"] for name in DEVICES),
        ["devpts", "/dev/pts"],
        *(["link", path, text, "always"] for path, text in DEV_LINKS),
    ]


class Root:
    """The root of a container, mounted in this process's own mount namespace and not yet entered.

    `ready` are mounts to be used; what of it is not, is closed when the root is entered.
    """

    def __init__(self, fd: int, ready: Ready | None = None) -> None:
        self.fd = fd
        self._ready = ready or Ready()
        self._bare: bool | None = None

    @classmethod
    def mounted(cls, path: str, ready: Ready) -> "Root":
        """The root at `path`, mounted on itself. OSError."""
        with opened(open_plain(path)) as place:
            root = clone(place, recursive=False)
            set_attributes(root, NOSUID | NODEV, recursive=False)
            move(root, place)
        return cls(root, ready)

    def carry_out(self, mounts: list[list[Any]]) -> None:
        """Do the mounts in their order, those that are ready first. OSError, with the target as its file name."""
        done = self._attach_trees()
        for name, target, *arguments in mounts:
            if target in done:
                continue
            try:
                _MOUNTS[name](self, target, *arguments)
            except OSError as failure:
                failure.filename = target
                raise

    def _attach_trees(self) -> set[str]:
        """The targets that are taken care of."""
        self._ready.forget_stale()
        done: set[str] = set()
        for top, (tree, targets) in list(self._ready.trees.items()):
            if top in _OWN_TREES or (self.bare and self._is_free(top)):
                del self._ready.trees[top]
                self._attach(top, tree, True)
                done |= targets
        return done

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
        with opened(open_plain(source)) as found:
            self._bind(target, found, access)

    def fill(self, target: str, source: str, when: str) -> None:
        if when == "bare" and not self.bare:
            return
        if source in self._ready.binds and self._is_free(target):
            self._attach(target, *self._ready.binds.pop(source))
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
        if self._ready.memory is not None and (target, mode, access) == (SHARED_MEMORY, SHARED_MODE, "rw"):
            memory, self._ready.memory = self._ready.memory, None
            if size_bytes:
                resize(memory, size_bytes)
            self._attach(target, memory, True)
            return
        options = {"mode": f"{mode:o}"} | ({"size": str(size_bytes)} if size_bytes else {})
        self._attach(target, new_file_system("tmpfs", options, _TMPFS[access]), True)

    def devpts(self, target: str) -> None:
        options = {"newinstance": "", "ptmxmode": "0666", "mode": "620"}
        self._attach(target, new_file_system("devpts", options, NOSUID | NOEXEC), True)

    def link(self, target: str, text: str, when: str) -> None:
        if when == "bare" and not self.bare:
            return
        with contextlib.suppress(FileExistsError), self._parent(target) as parent:
            os.symlink(text, os.path.basename(target), dir_fd=parent)

    def folder(self, target: str, mode: int) -> None:
        with contextlib.suppress(FileExistsError), self._parent(target) as parent:
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
        with self._parent(target) as parent:
            try:
                _make(name, parent, folder=folder)
            except FileExistsError:
                if links == 0:
                    raise
                leads_to = os.path.join(os.path.dirname(target), os.readlink(name, dir_fd=parent))
                return self.place(os.path.normpath(leads_to), folder=folder, links=links - 1)
            return os.open(name, O_PATH | os.O_NOFOLLOW | _CLOSED, dir_fd=parent)

    @contextlib.contextmanager
    def _parent(self, target: str) -> Iterator[int]:
        """A descriptor of the folder that the target is to be in; the root itself is open already."""
        above = os.path.dirname(target)
        if above == "/":
            yield self.fd
            return
        with opened(self.place(above)) as parent:
            yield parent

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
    try:
        return syscall(_OPENAT2, root, os.fsencode(target.lstrip("/") or ".") + b"\0", _HOW, len(_HOW))
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


def resize(memory: int, size_bytes: int) -> None:
    """Bound what a detached mount of a tmpfs can hold."""
    flags = _FSPICK_CLOEXEC | _FSPICK_EMPTY_PATH
    with opened(syscall(_FSPICK, memory, b"\0", flags)) as context:
        syscall(_FSCONFIG, context, _SET_STRING, b"size\0", str(size_bytes).encode() + b"\0", 0)
        syscall(_FSCONFIG, context, _RECONFIGURE, None, None, 0)


def _bound(source: int, access: str) -> int:
    """A detached copy of what is mounted at an open descriptor, and below, with the attributes of an access."""
    copy = clone(source, recursive=True)
    try:
        set_attributes(copy, _ATTRIBUTES[access], recursive=True)
    except OSError:
        os.close(copy)
        raise
    return copy


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
