"""Paths and names that come from outside, made fit for a profile: checked, and as the kernel will see them."""

import functools
import os
import re
from collections.abc import Iterable

from worker.errors import InvalidSpec

from .sbpl_paths import ancestors, real_path

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# PATH_MAX of macOS less its NUL (sys/syslimits.h). One value alone can so never fill a rule.
MAX_VALUE_BYTES = 1023


@functools.lru_cache(maxsize=4096)
def canonical(path: str) -> str:
    """A path as the kernel compares it, without asking the file system.

    InvalidSpec for what cannot be a path in a profile: relative, with `..`, or with control characters.
    """
    check_nameable(path)
    if not path.startswith("/") or ".." in path.split("/"):
        raise InvalidSpec(f"{path!r} is not an absolute path without `..`")
    return real_path(path, follow=True)


def check_nameable(text: str) -> None:
    """InvalidSpec for what no parameter can hold: the compiler takes C strings, the log shows them as lines."""
    try:
        size = len(os.fsencode(text))
    except UnicodeEncodeError as failure:
        raise InvalidSpec(f"{text!r} is no text that this system can name") from failure
    if size > MAX_VALUE_BYTES:
        raise InvalidSpec(f"{text[:64]!r}… has {size} bytes, and a path on macOS at most {MAX_VALUE_BYTES}")
    if _CONTROL.search(text):
        raise InvalidSpec(f"{text!r} holds control characters, which no sandbox profile can name")


def parents(paths: Iterable[str]) -> set[str]:
    """All folders above, but `/`, which everybody may read."""
    return {above for path in paths for above in ancestors(path)} - {"/"}
