"""Host paths that a spec asks for, held against what the node's operator has granted.

A path is resolved first, and what it resolves to must lie below a granted folder: a link that somebody put
into that folder leads nowhere else. The resolved path is what the sandbox gets; the enforcer then opens it
without following any link, so that nothing can be put in its way later.
"""

import os
from collections.abc import Callable, Iterable

Canonical = Callable[[str], str]


class NotGranted(Exception):
    """The path is outside of every granted folder. The text does not tell whether it exists."""


class Forbidden(Exception):
    """No operator can grant this path: the node's own files are there."""


class Missing(Exception):
    """Granted, but there is nothing, or it cannot be resolved."""


def real_path(path: str) -> str:
    """Absolute and free of links; OSError when it does not exist."""
    return os.path.realpath(path, strict=True)


def below(path: str, top: str) -> bool:
    """Whether a canonical path is `top` or stands under it."""
    return path == top or path.startswith(top.rstrip("/") + "/")


def overlap(one: str, other: str) -> bool:
    return below(one, other) or below(other, one)


def granted_path(path: str, grants: Iterable[str], protected: Iterable[str], canonical: Canonical) -> str:
    """The canonical form of `path`, which lies below one of `grants` and does not overlap `protected`.

    Raises NotGranted, Forbidden, Missing. A path that is outside as it is written is NotGranted whether it
    exists or not: whoever may send specs shall not explore the host with them.
    """
    return _granted(path, list(_resolved(grants, canonical)), protected, canonical)


def granted_socket(path: str, grants: Iterable[str], protected: Iterable[str], canonical: Canonical) -> str:
    """As `granted_path`, for a socket, which may be made later; its folder must exist."""

    def resolve(one: str) -> str:
        try:
            return canonical(one)
        except FileNotFoundError:
            return os.path.join(canonical(os.path.dirname(one)), os.path.basename(one))

    return _granted(path, list(_resolved(grants, resolve)), protected, resolve)


def _granted(
    path: str, folders: list[tuple[str, str]], protected: Iterable[str], canonical: Canonical
) -> str:
    written = os.path.normpath(path)
    if not any(below(written, top) for folder in folders for top in folder):
        raise NotGranted(f"{path} is in no folder that this node grants")
    try:
        real = canonical(written)
    except (OSError, ValueError) as error:
        raise Missing(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if not any(below(real, top) for _, top in folders):
        raise NotGranted(f"{path} leads out of the folders that this node grants")
    if any(overlap(real, own) for own in protected):
        raise Forbidden(f"{path} overlaps files of the node itself, which no setting can grant")
    return real


def _resolved(grants: Iterable[str], canonical: Canonical) -> Iterable[tuple[str, str]]:
    """(as the operator wrote it, resolved) for each granted folder that exists."""
    for grant in grants:
        try:
            yield os.path.normpath(grant), canonical(grant)
        except OSError:
            continue  # a folder that is not there grants nothing
