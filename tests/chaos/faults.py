"""Random faults. Pure: what happens when, to whom and for how long; `injector` does it."""

import random
from collections.abc import Callable, Sequence
from typing import Any

from .history import COMMANDS, EVENTS, LOGS
from .plan import Action

FIRST_S = 1.0
GAP_S = 1.3  # between two faults, on average
STREAMS = (EVENTS, LOGS, COMMANDS)

# In a cluster a whole server is killed as the leader of a stream, and there is no one store to put back.
ALONE = frozenset({"put_back", "server_kill", "server_stop"})
LEADER_GAP_S = (2.0, 4.0)

Draw = Callable[[random.Random], dict[str, Any]]


def _pause(rng: random.Random) -> dict[str, Any]:
    return {"pause_s": round(rng.choice([0.0, rng.uniform(0, 0.5), rng.uniform(0, 2)]), 3)}


def _hold(rng: random.Random) -> dict[str, Any]:
    return {"hold_s": round(rng.choice([rng.uniform(0.05, 0.5), rng.uniform(0.5, 3)]), 3)}


def _delay(rng: random.Random) -> dict[str, Any]:
    return {"delay_s": rng.choice([0.02, 0.1, 0.3]), **_hold(rng)}


def _half_open(rng: random.Random) -> dict[str, Any]:
    return {"way": rng.choice(["up", "down", "both"]), "then": rng.choice(["heal", "cut"]), **_hold(rng)}


def _throttle(rng: random.Random) -> dict[str, Any]:
    return {"bytes_per_s": rng.choice([2_000, 20_000, 200_000]), **_hold(rng)}


def _slow(rng: random.Random) -> dict[str, Any]:
    return {"commit_ms": rng.choice([20, 100, 400]), **_hold(rng)}


def _jump(rng: random.Random) -> dict[str, Any]:
    return {"by_s": rng.choice([-86_400, -3600, -30, 30, 3600, 86_400]), **_hold(rng)}


def _stream(rng: random.Random) -> dict[str, Any]:
    return {"stream": rng.choice(STREAMS)}


def _made_anew(rng: random.Random) -> dict[str, Any]:
    return {**_stream(rng), **_pause(rng)}


def _second(rng: random.Random) -> dict[str, Any]:
    return {"data": rng.choice(["same", "new", "copied"])}


def _nothing(rng: random.Random) -> dict[str, Any]:
    return {}


# kind → (weight, what else is drawn)
FAULTS: dict[str, tuple[int, Draw]] = {
    "worker_kill": (10, _pause),
    "worker_stop": (4, _hold),
    "worker_restart": (3, _pause),
    "launcher_kill": (4, _nothing),
    "launcher_stop": (3, _hold),
    "both_kill": (3, _pause),
    "server_kill": (6, _pause),
    "server_stop": (3, _hold),
    "link_cut": (6, _nothing),
    "link_delay": (3, _delay),
    "link_half_open": (4, _half_open),
    "link_throttle": (3, _throttle),
    "disk_full": (3, _hold),
    "slow_fsync": (3, _slow),
    "purge": (3, _stream),
    "make_anew": (3, _made_anew),
    "put_back": (3, _pause),
    "clock_jump": (2, _jump),
    "second_worker": (2, _second),
    "usurp": (1, _hold),
}


# What is done to the leader of a stream: weight, and what else is drawn.
LEADER_FAULTS: dict[str, tuple[int, Draw]] = {
    "leader_kill": (5, _pause),
    "leader_stop": (1, _hold),
    "step_down": (4, _nothing),
}


def plan_leaders(rng: random.Random, seconds: float) -> list[Action]:
    """Of a cluster: every few seconds the leader of a stream goes, in one way or another."""
    actions: list[Action] = []
    at_s = FIRST_S
    while at_s < seconds:
        args = {"stream": rng.choice(STREAMS)}
        kind = rng.choices(list(LEADER_FAULTS), [weight for weight, _ in LEADER_FAULTS.values()])[0]
        actions.append(Action(at_s, kind, {**args, **LEADER_FAULTS[kind][1](rng)}))
        at_s += rng.uniform(*LEADER_GAP_S)
    return actions


def plan_faults(
    rng: random.Random, seconds: float, kinds: Sequence[str] | None, *, cluster: bool = False
) -> list[Action]:
    """`put_back` comes as two: a copy of the server's store is made, later it takes the store's place."""
    chosen = list(FAULTS) if kinds is None else list(kinds)
    if cluster:
        chosen = [kind for kind in chosen if kind not in ALONE]
    actions: list[Action] = []
    if not chosen:
        return actions
    at_s = FIRST_S
    while at_s < seconds:
        kind = rng.choices(chosen, [FAULTS[name][0] for name in chosen])[0]
        args = FAULTS[kind][1](rng)
        if kind == "put_back":
            actions.append(Action(at_s, "copy", {}))
            actions.append(Action(at_s + rng.uniform(1, 4), "put_back", args))
        else:
            actions.append(Action(at_s, kind, args))
        at_s += rng.expovariate(1 / GAP_S)
    return actions
