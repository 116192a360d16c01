"""The answer to one question about a Linux sandbox."""

from typing import Literal, NamedTuple

Decision = Literal["allow", "deny", "unknown"]


class Ruling(NamedTuple):
    """`rule` is the deciding line of the profile's text, None where no line says it."""

    decision: Decision
    rule: str | None
    reason: str
