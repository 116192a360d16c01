"""Cron expressions of the reference system: `sec min hour day-of-month month day-of-week [year]`."""

import re

from .errors import InvalidSpec
from .values import shorten

_MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
_DAYS = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"]
# (name, least, greatest, names of the values from the least on). Sunday is 1.
_FIELDS: tuple[tuple[str, int, int, list[str]], ...] = (
    ("second", 0, 59, []),
    ("minute", 0, 59, []),
    ("hour", 0, 23, []),
    ("day of month", 1, 31, []),
    ("month", 1, 12, _MONTHS),
    ("day of week", 1, 7, _DAYS),
    ("year", 1970, 2100, []),
)
_SHORTHANDS = ("@yearly", "@annually", "@monthly", "@weekly", "@daily", "@hourly")
_ITEM = re.compile(r"(?:(\*|\?)|(\w+)(?:-(\w+))?)(?:/([0-9]{1,4}))?")


def check_cron(text: str, *, field: str) -> None:
    """InvalidSpec unless `text` is a cron expression; the message names the part that is wrong."""
    if text in _SHORTHANDS:
        return
    parts = text.split()
    if len(parts) not in (6, 7) or len(text) > 256:
        raise InvalidSpec(
            "must be a cron expression: second minute hour day-of-month month day-of-week [year]",
            field=field,
        )
    for part, (name, least, greatest, names) in zip(parts, _FIELDS, strict=False):
        for item in part.split(","):
            if not _fits(item, least, greatest, names):
                raise InvalidSpec(f"{shorten(item)} is no {name} of a cron expression", field=field)


def _fits(item: str, least: int, greatest: int, names: list[str]) -> bool:
    match = _ITEM.fullmatch(item)
    if match is None or match[4] == "0":
        return False
    if match[1] is not None:
        return True
    first = _value(match[2], least, names)
    last = _value(match[3], least, names) if match[3] is not None else first
    return first is not None and last is not None and least <= first <= last <= greatest


def _value(text: str, least: int, names: list[str]) -> int | None:
    if re.fullmatch(r"[0-9]{1,4}", text):
        return int(text)
    short = text.lower()[:3]
    return names.index(short) + least if short in names else None
