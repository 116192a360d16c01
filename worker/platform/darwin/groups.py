"""The rule groups of macOS, put together: which there are, which need a grant, which a profile holds.

What depends on names only (a group, a GPU level, a release) is made once and kept.
"""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

from schemas.status import Gpu
from worker.platform.base import RuleGroup

from .groups_asked import ASKED
from .groups_base import BASE, EXECUTABLE
from .groups_gpu import GPU_LEVELS
from .paths import parents
from .rules import Group, Rule, complete, form

__all__ = ["BY_NAME", "EXECUTABLE", "GROUPS", "Places", "gpu_text", "group_text", "places", "selected"]

_PLACE = re.compile(r'\((literal|subpath) "(/[^"]*)"\)')

BY_NAME: Mapping[str, Group] = MappingProxyType({group.name: group for group in (*BASE, *ASKED)})


def selected(names: Iterable[str]) -> tuple[Group, ...]:
    """What every profile holds, then the named groups and those they include, each once, in order of name.

    KeyError for a name that is none.
    """
    wanted: set[str] = set()
    ahead = list(names)
    while ahead:
        group = BY_NAME[ahead.pop()]
        if group.name not in wanted:
            wanted.add(group.name)
            ahead += group.includes
    return (*BASE, *(BY_NAME[name] for name in sorted(wanted) if not BY_NAME[name].always))


# What `sandbox.groups` may name; the groups of every profile too, so that a spec may say what it relies on.
GROUPS: Mapping[str, RuleGroup] = MappingProxyType(
    {
        name: RuleGroup(
            name=name,
            harmless=not any(part.grant for part in selected([name])),
            text=BY_NAME[name].purpose,
        )
        for name in sorted(BY_NAME)
    }
)


def rules_text(rules: Iterable[Rule], release: int) -> str:
    """Rules that reach nothing but what they name."""
    return "".join(
        form("allow", complete(rule.operations), *rule.filters) for rule in rules if rule.since <= release
    )


@lru_cache(maxsize=1024)
def group_text(name: str, release: int) -> str | None:
    """The group's rules as text; None for a group with a rule that only the builder can write."""
    rules = BY_NAME[name].rules
    return None if any(rule.reach for rule in rules) else rules_text(rules, release)


@lru_cache(maxsize=64)
def gpu_text(level: Gpu, release: int) -> str:
    return rules_text(GPU_LEVELS[level], release)


class Places(NamedTuple):
    """Of the folders that rules name: those to be read whole, and all above that are not in one of them."""

    readable: tuple[str, ...]
    above: tuple[str, ...]


@lru_cache(maxsize=256)
def places(names: tuple[str, ...], level: Gpu) -> Places:
    """Of the named groups and a GPU level."""
    rules = [rule for name in names for rule in BY_NAME[name].rules] + list(GPU_LEVELS[level])
    found = [(rule, *place) for rule in rules for one in rule.filters for place in _PLACE.findall(one)]
    readable = tuple(
        path for rule, kind, path in found if kind == "subpath" and "file-read*" in rule.operations
    )
    above = parents(path for _, _, path in found).difference(readable)
    inside = tuple(f"{top}/" for top in readable)
    return Places(readable, tuple(sorted(path for path in above if not path.startswith(inside))))
