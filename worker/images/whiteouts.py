"""What an entry's name means: a place below the root, or something to be deleted from the layers below.

Pure. Names are bytes as the archive has them. Of the image specification (layer.md, "Whiteouts"): a name
`.wh.NAME` deletes NAME, `.wh..wh..opq` everything of its directory, of lower layers only. AUFS left other
`.wh..wh.` names in old docker layers; they mean nothing to anyone and are left out.
"""

from enum import Enum, auto
from typing import NamedTuple

from worker.platform.treecopy import printable

from .unpack_model import BadArchive, TooMuch, UnpackLimits

PREFIX = b".wh."
OPAQUE = b".wh..wh..opq"
_META = b".wh..wh."


class Meaning(Enum):
    ENTRY = auto()
    WHITEOUT = auto()  # `name` is what it deletes
    OPAQUE = auto()  # `name` is empty; `parent` is emptied
    LEAVING = auto()  # of AUFS


class Place(NamedTuple):
    """Where an entry goes. The root itself has neither parent nor name."""

    meaning: Meaning
    parent: tuple[bytes, ...]
    name: bytes

    @property
    def path(self) -> bytes:
        return b"/".join((*self.parent, self.name))


def components(name: bytes, limits: UnpackLimits) -> tuple[bytes, ...]:
    """A name as the components below the root; `/` in front, `.` and doubled slashes fall away.

    BadArchive for `..`, which no two programs read alike, and NUL; TooMuch for what is too long or too deep.
    """
    if b"\0" in name:
        raise BadArchive("there is a NUL in its name")
    if len(name) > limits.path_bytes:
        raise TooMuch(f"its name has {len(name)} bytes, more than {limits.path_bytes}")
    parts = tuple(part for part in name.split(b"/") if part not in (b"", b"."))
    if b".." in parts:
        raise BadArchive("there is `..` in its name, which could lead outside of the image")
    if len(parts) > limits.depth:
        raise TooMuch(f"it lies {len(parts)} directories deep, more than {limits.depth}")
    for part in parts:
        if len(part) > limits.name_bytes:
            raise TooMuch(f"a component of its name has {len(part)} bytes, more than {limits.name_bytes}")
    return parts


def place_of(name: bytes, limits: UnpackLimits) -> Place:
    """Raises what `components` does, and BadArchive for whiteouts of nothing and entries below a whiteout."""
    parts = components(name, limits)
    if not parts:
        return Place(Meaning.ENTRY, (), b"")
    parent, last = parts[:-1], parts[-1]
    marked = next((part for part in parent if part.startswith(PREFIX)), None)
    if marked is not None:
        if marked.startswith(_META) and marked != OPAQUE:
            return Place(Meaning.LEAVING, parent, last)
        raise BadArchive(f"it lies below a whiteout, {printable(marked.decode('utf-8', 'surrogateescape'))}")
    if not last.startswith(PREFIX):
        return Place(Meaning.ENTRY, parent, last)
    if last == OPAQUE:
        return Place(Meaning.OPAQUE, parent, b"")
    if last.startswith(_META):
        return Place(Meaning.LEAVING, parent, last)
    victim = last[len(PREFIX) :]
    if victim in (b"", b".", b".."):
        raise BadArchive("it is a whiteout that names nothing which could be deleted")
    return Place(Meaning.WHITEOUT, parent, victim)
