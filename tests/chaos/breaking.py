"""Tools with which a recorded history is broken, to see whether the judge notices."""

import copy
import json
from collections.abc import Callable
from typing import Any

from .history import History, Message

Defect = Callable[[History], None]


def event(message: Message) -> dict[str, Any]:
    return dict(json.loads(message.data))


def change(message: Message, **fields: Any) -> None:
    """`status__state` is the field `state` of the status, `from_` is `from`."""
    told = event(message)
    for name, value in fields.items():
        place, (*path, last) = told, name.removesuffix("_").split("__")
        for part in path:
            place = place[part]
        place[last] = value
    message.data = json.dumps(told).encode()


def find(history: History, kind: str, number: int = 0, **wanted: Any) -> int:
    """The place of the n-th event of a type with these fields (`state` looks into the status)."""

    def fits(told: dict[str, Any]) -> bool:
        state = wanted.get("state")
        return (
            told["type"] == kind
            and (state is None or (told["status"] or {}).get("state") == state)
            and all(told.get(k.removesuffix("_")) == v for k, v in wanted.items() if k != "state")
        )

    return [i for i, message in enumerate(history.events) if fits(event(message))][number]


def renumber(history: History) -> None:
    """Close every gap: only what the events say can tell now."""
    for seq, message in enumerate(history.events, 1):
        message.stream_seq = seq
        change(message, seq=seq)
    for listed in history.listed:
        listed.last = len(history.events)


def drop(history: History, at: int) -> None:
    del history.events[at]
    renumber(history)


def insert(history: History, at: int, source: int, **fields: Any) -> None:
    """A copy of an event in another place."""
    made = copy.deepcopy(history.events[source])
    change(made, **fields)
    history.events.insert(at, made)
    renumber(history)


def data_chunk(history: History, *, last: bool = False, stream: str = "stdout") -> Message:
    """A chunk with lines in it: of a stream that has several, or the last one of a run."""
    by_instance: dict[str, list[Message]] = {}
    for chunk in history.logs:
        if chunk.data and chunk.subject.endswith(stream):
            by_instance.setdefault(chunk.headers["Sandfleet-Instance"], []).append(chunk)
    several = next(chunks for chunks in by_instance.values() if len(chunks) > 3)
    return several[-1] if last else several[1]


def rename(chunk: Message) -> None:
    """The id that belongs to what the chunk holds now."""
    stream = chunk.subject.rsplit(".", 1)[1]
    instance, offset = chunk.headers["Sandfleet-Instance"], chunk.headers["Sandfleet-Offset"]
    chunk.headers["Nats-Msg-Id"] = f"{instance}/{stream}/{offset}+{len(chunk.data)}"
