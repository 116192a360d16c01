"""The judge: from the streams alone, was every promise kept?

It knows the contract and nothing of the worker. `judge(history)` lists what was broken, each under a short
fixed name; an empty list is a pass. Where the injector robbed a stream the judge asks for less, and only
there: see `Loss`.
"""

import json
from collections.abc import Iterator
from typing import Any

from .history import EVENTS, History, Violation
from .judge_commands import check_commands
from .judge_events import Events, Place, Told, read_events, visible
from .judge_logs import check_logs
from .judge_states import check_states

__all__ = ["judge"]


def judge(history: History) -> list[Violation]:
    events = read_events(history)
    return [
        *events.violations,
        *(violation for journal in _journals(history, events) for violation in check_states(journal)),
        *check_commands(history, events),
        *check_logs(history, events),
        *_check_lists(history, events),
        *(Violation("left behind", what) for what in history.left),
        *(Violation("fault", what) for what in history.faults),
    ]


def _journals(history: History, events: Events) -> list[list[Told]]:
    """The events of each journal: the node's own goes on after a takeover, a doomed one ends with its epoch."""
    found: dict[str, list[Told]] = {}
    for told in events.told:
        epoch = told.place.epoch
        found.setdefault(epoch if epoch in history.doomed else "", []).append(told)
    return list(found.values())


def _check_lists(history: History, events: Events) -> Iterator[Violation]:
    """Whoever folds what stands in the stream now knows what the node knows."""
    for listed in history.listed:
        folded = _fold(history, listed.generation, listed.last)
        answered = {status["container"]: status for status in listed.containers}
        for cid in sorted(folded.keys() | answered.keys()):
            told, place = folded.get(cid, (None, None))
            if told is None:
                name = "state not told again" if history.lost(EVENTS) else "wrong fold"
                yield Violation(name, f"{cid} is {answered[cid]['state']}, the stream does not tell of it")
            elif cid not in answered:
                if told["state"] != "removed" and place is not None and place.epoch not in history.doomed:
                    yield Violation("wrong fold", f"{cid} is {told['state']} ({place}), the node has none")
            elif told != answered[cid]:
                yield Violation("wrong fold", f"{cid} ({place}): {_difference(told, answered[cid])}")
    if not history.listed:
        yield Violation("fault", "the node was never asked for its list")
    elif history.listed[-1].containers:
        yield Violation("left behind", f"{len(history.listed[-1].containers)} containers")


def _fold(history: History, generation: int, last: int) -> dict[str, tuple[dict[str, Any], Place]]:
    found: dict[str, tuple[dict[str, Any], Place]] = {}
    for message in visible(history, generation, last):
        event = json.loads(message.data)
        status = event.get("status")
        if status is None or event.get("container") is None:
            continue
        place = Place(event["epoch"], event["seq"])
        known = found.get(event["container"])
        if known is None or known[1] < place:
            found[event["container"]] = status, place
    return found


def _difference(told: dict[str, Any], answered: dict[str, Any]) -> str:
    names = sorted(name for name in told.keys() | answered.keys() if told.get(name) != answered.get(name))
    return ", ".join(f"{name} told {told.get(name)!r}, answered {answered.get(name)!r}" for name in names)
