"""Paths as the kernel of macOS compares them, and paths in a profile that it never sees.

The kernel resolves the path of a request to that of the file and compares text; the text in a profile is
never resolved. Pure: links are known for the system's own aliases only.
"""

import re
import unicodedata
from functools import lru_cache

# The kernel refuses longer ones (PATH_MAX of <sys/syslimits.h>).
MAX_PATH_BYTES = 1024

# Links at the root of the system volume.
_ALIASES = {
    "/tmp": "/private/tmp",
    "/var": "/private/var",
    "/etc": "/private/etc",
    "/home": "/System/Volumes/Data/home",
}

# Folders of the data volume that are canonical as seen from / (/usr/share/firmlinks).
_DATA = "/System/Volumes/Data"
_FIRMLINKS = (
    "/Users",
    "/Applications",
    "/Library",
    "/usr/local",
    "/opt",
    "/private",
    "/Volumes",
    "/cores",
)


# What only a path that is never seen has, or one that is looked at closely.
_SUSPECT = re.compile(
    r"^(?!/)|/$|//|/\.\.?(?:/|$)|^/(?:tmp|var|etc|home|System/Volumes/Data)|^.{1025}", re.DOTALL
)


def real_path(path: str, *, follow: bool) -> str:
    """An absolute path without aliases, `.`, `..` and doubled slashes.

    Without `follow` the last component stands for itself, as for lstat and unlink.
    """
    parts = [part for part in path.split("/") if part not in ("", ".")]
    here = ""
    for number, part in enumerate(parts):
        if part == "..":
            here = here.rpartition("/")[0]
            continue
        here = f"{here}/{part}"
        if follow or number < len(parts) - 1:
            here = _ALIASES.get(here, here)
    if here.startswith(_DATA + "/"):
        seen = here[len(_DATA) :]
        if any(covers(link, seen) for link in _FIRMLINKS):
            return seen
    return here or "/"


def folded(path: str) -> str:
    """One spelling for all that differ by case or by the form of their accents only.

    Volumes of macOS take these for one name. Whether a filter does is unconfirmed.
    """
    return path.lower() if path.isascii() else unicodedata.normalize("NFD", path).casefold()


def covers(outer: str, inner: str) -> bool:
    """Whether a path is another or lies below it."""
    return inner == outer or inner.startswith("/" if outer == "/" else outer + "/")


@lru_cache(maxsize=4096)
def ancestors(path: str) -> tuple[str, ...]:
    """Every folder strictly above a path, `/` first (`path-ancestors` of libsandbox's sbpl_v1.scm)."""
    parts = path.rstrip("/").split("/")[:-1]
    return tuple("/".join(parts[:count]) or "/" for count in range(1, len(parts) + 1))


def never_matches(path: str, *, mode: str) -> str | None:
    """Why no request ever has this path; None when one may. `mode` is literal, subpath or prefix."""
    if path == "/" or not _SUSPECT.search(path):
        return None
    if len(path) > MAX_PATH_BYTES:
        return "it is longer than any path"
    if not path.startswith("/"):
        return None if mode == "prefix" and not path else "it is not absolute"
    if mode != "prefix" and path.endswith("/"):
        return "it ends with a slash"
    if "//" in path:
        return "it has two slashes in a row"
    inner = path.split("/")[1:-1] if mode == "prefix" else path.split("/")[1:]
    if "." in inner or ".." in inner:
        return f"it has a `{'..' if '..' in inner else '.'}`"
    whole = real_path(path, follow=False)
    # `path` itself may be a link, which has its own path; what is below it has not.
    if mode == "literal" and whole != path:
        return f"the kernel sees {whole}"
    below = real_path(path + "/x", follow=False)
    if mode == "subpath" and below != path + "/x":
        return f"the kernel sees {real_path(path, follow=True)}"
    if mode == "prefix" and real_path(path + "x", follow=False) != path + "x":
        return f"the kernel sees {real_path(path + 'x', follow=False)[:-1]}"
    return None
