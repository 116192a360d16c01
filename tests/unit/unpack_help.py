"""What the tests of unpacking share: running it beside a canary, and trees as values."""

import hashlib
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from worker.images.trees import remove_tree
from worker.images.unpack import LayerFile, UnpackReport, unpack_layers
from worker.platform.xattrs import system_xattrs

from .hostile_archives import TAR, Case, Layer

Tree = dict[str, tuple[Any, ...]]


def plant_canary(home: Path) -> Path:
    """A folder that everything hostile is after."""
    canary = home / "canary"
    (canary / "sub").mkdir(parents=True)
    (canary / "precious").write_bytes(b"do not touch")
    (canary / "kept").write_bytes(b"neither this")
    (canary / "sub" / "deep").write_bytes(b"nor this")
    (canary / "link").symlink_to("precious")
    os.chmod(canary / "precious", 0o640)
    os.chmod(canary, 0o711)
    return canary


def surroundings(home: Path, besides: str = "dest") -> Tree:
    """Everything below `home` but one entry, with what a write, a link or a chmod would change."""
    return snapshot(home, inodes=True, besides=besides)


def snapshot(top: Path, *, inodes: bool = False, besides: str | None = None) -> Tree:
    """path -> (kind, mode, mtime in ns, content or target, xattrs), the top as ``."""
    tree: Tree = {}
    pending = [""]
    while pending:
        path = pending.pop()
        where = top / path
        info = os.lstat(where)
        content: object = None
        attributes: list[tuple[str, bytes]] = []
        if stat.S_ISLNK(info.st_mode):
            content = os.readlink(where)
        elif stat.S_ISREG(info.st_mode):
            content = where.read_bytes()
        elif stat.S_ISDIR(info.st_mode):
            names = [name for name in os.listdir(where) if path or name != besides]
            pending += [f"{path}/{name}" if path else name for name in names]
        if not stat.S_ISLNK(info.st_mode) and os.access(where, os.R_OK):
            fd = os.open(where, os.O_RDONLY)
            attributes = system_xattrs().read(fd)
            os.close(fd)
        facts: tuple[Any, ...] = (
            stat.S_IFMT(info.st_mode),
            stat.S_IMODE(info.st_mode),
            info.st_mtime_ns,
            content,
            attributes,
        )
        if inodes:
            times = () if path == "" else (info.st_ctime_ns,)
            facts = (*facts, info.st_ino, info.st_nlink if path else 0, info.st_uid, info.st_gid, *times)
            if path == "":
                facts = (*facts[:2], *facts[3:])
        tree[path] = facts
    return tree


def write_layers(home: Path, layers: Sequence[Layer]) -> list[LayerFile]:
    files = []
    blobs = home / "blobs"
    blobs.mkdir(exist_ok=True)
    for layer in layers:
        path = blobs / hashlib.sha256(layer.data).hexdigest()
        if not path.exists():
            path.write_bytes(layer.data)
        files.append(LayerFile(path=path, media_type=layer.media_type, diff_id=layer.diff_id))
    return files


def unpack(home: Path, *layers: bytes | Layer, **options: Any) -> UnpackReport:
    """Into a new `home/dest`."""
    dest = home / "dest"
    remove_tree(dest)
    dest.mkdir()
    made = [Layer(layer, TAR) if isinstance(layer, bytes) else layer for layer in layers]
    return unpack_layers(write_layers(home, made), dest, **options)


def look(dest: Path, path: str) -> bytes | str | None:
    """What stands at a path, in the words of `Case.holds`; no link is followed."""
    where = dest / path
    try:
        info = os.lstat(where)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if stat.S_ISLNK(info.st_mode):
        return f"-> {os.readlink(where)}"
    return "/" if stat.S_ISDIR(info.st_mode) else where.read_bytes()


def try_case(case: Case, home: Path) -> str | None:
    """Runs a hostile archive; what went wrong in words, None when all is well."""
    canary = plant_canary(home)
    layers = write_layers(home, case.build(os.fsencode(os.path.abspath(canary))))
    dest = home / "dest"
    dest.mkdir(mode=0o700)
    before = surroundings(home)
    report = failure = None
    try:
        report = unpack_layers(layers, dest, **case.options)
    except case.error as raised:
        failure = raised
    if surroundings(home) != before:
        return "the surroundings have changed"
    if case.refused is not None:
        if failure is None:
            return "was not refused"
        return None if re.search(case.refused, failure.message) else f"refused with {failure.message!r}"
    if failure is not None or report is None:
        return f"refused with {failure}"
    for path, wanted in case.holds.items():
        if look(dest, path) != wanted:
            return f"{path!r} is {look(dest, path)!r}"
    for path in case.lacks:
        if look(dest, path) is not None:
            return f"{path!r} is there"
    if case.noted is not None and not any(case.noted in note for note in report.notes):
        return f"the notes are {report.notes}"
    return None
