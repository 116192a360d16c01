"""The schedule of a run: a pure function of its seed and length, printed before anything happens."""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple


class Action(NamedTuple):
    """`kind` at `at_s` seconds after the beginning. What depends on the run stands in `args` by a symbol."""

    at_s: float
    kind: str
    args: dict[str, Any]

    def __str__(self) -> str:
        told = " ".join(f"{name}={_short(value)}" for name, value in self.args.items())
        return f"{self.at_s:7.3f} {self.kind} {told}".rstrip()


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 90 else f"{text[:60]}…({len(text)})"


def plan(
    seed: int, seconds: float, faults: Sequence[str] | None = None, *, cluster: bool = False
) -> list[Action]:
    """All actions in order of time. `faults` limits the kinds of fault; without any there are none. In a cluster
    the leaders are changed and killed besides, every few seconds.
    """
    from .faults import plan_faults, plan_leaders
    from .scheduler import plan_commands

    # Two generators, so that leaving out a fault leaves the commands as they are.
    actions = plan_commands(random.Random(f"commands {seed}"), seconds)
    actions += plan_faults(random.Random(f"faults {seed}"), seconds, faults, cluster=cluster)
    if cluster:
        actions += plan_leaders(random.Random(f"leaders {seed}"), seconds)
    return sorted(actions, key=lambda action: action.at_s)
