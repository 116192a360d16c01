"""Between the keys of a bucket, which may be any text, and paths in a folder, which may not. Pure.

A path is `a/b/c`, relative to the mirror's folder. What cannot be a path, or cannot be fetched again under the
same name, is left alone on its side and told.
"""

import unicodedata

MAX_KEY_BYTES = 1024  # Amazon's limit; others follow it
MAX_NAME_BYTES = 255
MAX_DEPTH = 100


def unusable(path: str) -> str | None:
    """Why this can be no path in a mirror; None when it can."""
    try:
        size = len(path.encode())
    except UnicodeEncodeError:
        return "the name is not UTF-8"
    if size > MAX_KEY_BYTES:
        return f"the name is longer than {MAX_KEY_BYTES} bytes"
    if any(ord(c) < 0x20 or ord(c) == 0x7F for c in path):
        return "there are control characters in the name"
    parts = path.split("/")
    if "" in parts:
        return "a part of the name is empty"
    if "." in parts or ".." in parts:
        return "a part of the name is `.` or `..`"
    if len(parts) > MAX_DEPTH:
        return f"it lies deeper than {MAX_DEPTH} folders"
    if any(len(part.encode()) > MAX_NAME_BYTES for part in parts):
        return f"a part of the name is longer than {MAX_NAME_BYTES} bytes"
    return None


def path_of(key: str, prefix: str) -> str | None:
    """What of a listed key is the path; None for one that is not below the prefix, or is the prefix itself."""
    return key[len(prefix) :] or None if key.startswith(prefix) else None


def fold(path: str, folding: bool) -> str:
    """Equal for two paths that are one on this file system. `folding`: it ignores case and composition."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold()) if folding else path


def folders_of(path: str) -> list[str]:
    """The folders above a path: `a`, `a/b` for `a/b/c`."""
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def conflict_path(path: str, instance: str) -> str:
    """Where a container's version goes when somebody else has changed the object: beside it, one per instance."""
    suffix = f".conflict-{instance.lower()}"
    folder, slash, name = path.rpartition("/")
    room = min(MAX_NAME_BYTES, MAX_KEY_BYTES - len(f"{folder}{slash}".encode())) - len(suffix)
    if room < 1:  # the folder's name alone takes it all
        folder, slash, room = "", "", MAX_NAME_BYTES - len(suffix)
    while len(name.encode()) > room:
        name = name[:-1]
    return f"{folder}{slash}{name}{suffix}"
