"""What the tests of packing share: trees made from a description in any order, packed images as files."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from worker.images.archive_write import SavedBlob, SavedImage, archive_pieces
from worker.images.pack import Packed, PackOptions, pack
from worker.platform.xattrs import Xattrs, system_xattrs

Description = dict[str, Any]

# path -> content (bytes), link (str), None for a directory; with a mode as (mode, content) and
# ("hard", path) for another name of a file.
SAMPLE: Description = {
    "bin": None,
    "bin/tool": (0o755, b"\xcf\xfa\xed\xfe" + b"mach-o" * 2000),
    "bin/tool-13": "tool",
    "lib/Frameworks/A.framework/_CodeSignature/CodeResources": (0o644, b"<plist/>"),
    "lib/Frameworks/A.framework/A": (0o555, bytes(range(256)) * 40),
    "lib/Frameworks/Current": "/nowhere/at all",
    "lib/hard": ("hard", "bin/tool"),
    "share/ünï\ncode": (0o600, "π".encode()),
    "share/" + "deep/" * 30 + "l" * 120: (0o644, b"long"),
    "share/long link": "t" * 180,
    "empty": (0o700, None),
    "zero": (0o640, b""),
}


def plant(
    top: Path, tree: Description, order: Sequence[str] | None = None, *, start: int = 1_600_000_000
) -> None:
    """Make it, one entry after the other; each has another time."""
    top.mkdir(parents=True, exist_ok=True)
    made: dict[str, int | None] = {}
    for count, path in enumerate(order or list(tree)):
        _make(top, path, tree, made)
        os.utime(
            top / path, ns=((start + count) * 10**9, (start + count) * 10**9 + 123), follow_symlinks=False
        )
    for path, mode in made.items():
        if mode is not None:
            os.chmod(top / path, mode)


def _make(top: Path, path: str, tree: Description, made: dict[str, int | None]) -> None:
    if path in made:
        return
    value = tree[path]
    mode, content = value if isinstance(value, tuple) and isinstance(value[0], int) else (None, value)
    where = top / path
    where.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, tuple):
        _make(top, content[1], tree, made)
        os.link(top / content[1], where)
    elif isinstance(content, str):
        where.symlink_to(content)
    elif content is None:
        where.mkdir(exist_ok=True)
        mode = 0o755 if mode is None else mode
    else:
        where.write_bytes(content)
    made[path] = mode
    for parent in Path(path).parents:
        if str(parent) != "." and str(parent) not in tree:
            made[str(parent)] = 0o755


def packed(top: Path, scratch: Path, **options: Any) -> Packed:
    xattrs: Xattrs | None = options.pop("xattrs", None)
    scratch.mkdir()
    return pack(top.resolve(), scratch, PackOptions(**options), xattrs=xattrs)


def saved(image: Packed, *names: str) -> SavedImage:
    """The image as an archive takes it."""
    return SavedImage(
        names=names,
        media_type="application/vnd.oci.image.manifest.v1+json",
        manifest=SavedBlob.of(image.manifest),
        config=SavedBlob.of(image.config),
        layers=tuple(
            SavedBlob(digest=layer.digest, size=layer.size, content=layer.path) for layer in image.layers
        ),
    )


def write_archive(path: Path, pieces: Iterator[bytes] | Sequence[SavedImage]) -> Path:
    if isinstance(pieces, Sequence):
        pieces = archive_pieces(pieces)
    with path.open("wb") as out:
        for piece in pieces:
            out.write(piece)
    return path


def has_xattrs(folder: Path) -> bool:
    """Whether the file system keeps attributes of the user."""
    probe = folder / "probe"
    probe.write_bytes(b"")
    fd = os.open(probe, os.O_RDWR)
    try:
        system_xattrs().write(fd, [("user.probe", b"1")])
        return bool(system_xattrs().read(fd))
    finally:
        os.close(fd)
        probe.unlink()


class FakeXattrs:
    """Attributes by inode, for what only macOS keeps (`com.apple.cs.*`)."""

    def __init__(self, kept: dict[tuple[int, int], list[tuple[str, bytes]]] | None = None) -> None:
        self.kept = kept if kept is not None else {}

    def read(self, fd: int) -> list[tuple[str, bytes]]:
        return sorted(self.kept.get(self._key(fd), []))

    def write(self, fd: int, items: list[tuple[str, bytes]]) -> None:
        self.kept.setdefault(self._key(fd), []).extend(items)

    def remove(self, fd: int, names: list[str]) -> None:
        key = self._key(fd)
        self.kept[key] = [item for item in self.kept.get(key, []) if item[0] not in names]

    def _key(self, fd: int) -> tuple[int, int]:
        info = os.fstat(fd)
        return info.st_dev, info.st_ino
