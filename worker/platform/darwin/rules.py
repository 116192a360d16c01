"""The shape of our Seatbelt rules and how they are written: one form of text for each.

Texts here are constants of ours. Whatever comes from outside becomes a parameter in `sbpl.py`.
"""

import textwrap
from functools import lru_cache
from typing import Literal

import msgspec

OLDEST_RELEASE = 12

_WIDTH = 110  # columns of text

# access(2) with F_OK asks for an operation of its own, which Apple's profiles pair with these two. Every release
# since 10.15 knows it (libsandbox's table in 0xbf00/simbple), so no release needs to be asked.
_COMPANIONS = {"file-read*": "file-test-existence", "file-read-metadata": "file-test-existence"}


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """Allows `operations` (separated by a space) where any of `filters` matches; without one, everywhere.

    `since` is the first macOS that is known to take the rule. `source` says who ships it. `reach` adds the
    places that only the builder knows: `own` the container's rootfs and tmp, `above` all folders above
    what it was granted.
    """

    operations: str
    filters: tuple[str, ...] = ()
    source: str
    since: int = OLDEST_RELEASE
    reach: Literal["", "own", "above"] = ""


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """A named set of rules. `always`: part of every profile. `grant`: only with the node operator's word."""

    name: str
    purpose: str
    rules: tuple[Rule, ...]
    always: bool = False
    grant: bool = False
    includes: tuple[str, ...] = ()


def form(action: str, operations: str, *filters: str, tag: str = "") -> str:
    """One rule as text. `tag` is what the log shall say of a denial."""
    parts = [*filters, *([f'(with message "{tag}")'] if tag else [])]
    line = f"({' '.join([action, operations, *parts])})"
    if len(line) <= _WIDTH and (len(parts) <= 1 or (tag and len(parts) == 2)):
        return line + "\n"
    return _head(action, operations) + "".join(f"\n  {one}" for one in parts) + ")\n"


@lru_cache(maxsize=256)
def _head(action: str, operations: str) -> str:
    return textwrap.fill(
        f"({action} {operations}", _WIDTH, subsequent_indent="      ", break_on_hyphens=False
    )


@lru_cache(maxsize=256)
def complete(operations: str) -> str:
    """The operations, each with what belongs to it."""
    found: dict[str, None] = {}
    for name in operations.split():
        found[name] = None
        if name in _COMPANIONS:
            found[_COMPANIONS[name]] = None
    return " ".join(found)


def named(kind: str, *values: str) -> tuple[str, ...]:
    """Filters of one kind; the values hold neither quotes nor backslashes."""
    return tuple(f'({kind} "{value}")' for value in values)


def literal(*paths: str) -> tuple[str, ...]:
    return named("literal", *paths)


def subpath(*paths: str) -> tuple[str, ...]:
    return named("subpath", *paths)


def services(*names: str) -> tuple[str, ...]:
    return named("global-name", *names)
