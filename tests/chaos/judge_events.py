"""The event stream: its order and its numbers.

The injector takes nothing away that was not read before. So whatever it did, every event was read at some time,
and all of them together are without a gap.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from .history import EVENTS, History, Loss, Message, Violation

MAX_EVENT_BYTES = 64 * 1024
KINDS = {
    "state_changed": "state",
    "health_changed": "health",
    "command_accepted": "command",
    "command_completed": "command",
    "command_rejected": "command",
    "image_changed": "image",
    "node_changed": "node",
    "job_changed": "job",
}
HEAD = ("type", "node", "epoch", "boot", "seq", "time")


class Place(NamedTuple):
    epoch: str
    seq: int


class Told(NamedTuple):
    """One event, wherever and however often it was read."""

    place: Place
    event: dict[str, Any]
    subject: str

    @property
    def status(self) -> dict[str, Any] | None:
        return self.event.get("status")

    def __str__(self) -> str:
        who = self.event.get("container") or "the node"
        return f"{self.event['type']} of {who} ({self.place.epoch[-4:]}/{self.place.seq})"


class Events(NamedTuple):
    """All events of the run by (epoch, seq)."""

    told: list[Told]
    violations: list[Violation]


def read_events(history: History) -> Events:
    found: list[Violation] = []
    known: dict[Place, tuple[dict[str, Any], str]] = {}
    by_generation: dict[int, list[Message]] = defaultdict(list)
    for message in history.events:
        by_generation[message.generation].append(message)
    last: Place | None = None
    for generation, messages in sorted(by_generation.items()):
        parsed = [(message, *_parse(history, message, found)) for message in messages]
        good = [(message, place, event) for message, place, event in parsed if place is not None]
        found += _check_order(history, generation, [(m, p) for m, p, _ in good])
        for message, place, event in good:
            before = known.setdefault(place, (event, message.subject))
            if before != (event, message.subject):
                found.append(Violation("an event changed", f"{place} was told in two ways"))
        last = good[-1][1] if good else None
    newest = max((place for place in known if place.epoch not in history.doomed), default=None)
    if newest is not None and (last is None or last < newest) and not _all_purged(history, by_generation):
        found.append(Violation("lost event", f"the stream ends with {last}, it had {newest}"))
    found += _check_epochs(history, known)
    found += _check_numbers(known)
    told = [Told(place, *known[place]) for place in sorted(known)]
    return Events(told, found)


def visible(history: History, generation: int, last: int) -> list[Message]:
    """What a reader who comes now finds in the stream, up to the sequence `last`."""
    purged = max((loss.upto for loss in _purges(history, generation)), default=0)
    return [m for m in history.events if m.generation == generation and purged < m.stream_seq <= last]


def _purges(history: History, generation: int) -> list[Loss]:
    return [x for x in history.lost(EVENTS) if x.what == "purged" and x.generation == generation]


def _all_purged(history: History, by_generation: dict[int, list[Message]]) -> bool:
    newest = max(by_generation)
    return not visible(history, newest, by_generation[newest][-1].stream_seq)


def _parse(history: History, message: Message, found: list[Violation]) -> tuple[Place | None, dict[str, Any]]:
    """The event in a message, with what its head and subject owe each other."""
    where = f"message {message.stream_seq} on {message.subject}"
    try:
        event = json.loads(message.data)
        place = Place(str(event["epoch"]), int(event["seq"]))
        missing = [name for name in HEAD if name not in event]
    except (ValueError, KeyError, TypeError):
        found.append(Violation("no event", f"{where} cannot be read"))
        return None, {}
    if missing or event["node"] != history.node:
        found.append(Violation("wrong head", f"{where}: {missing or event['node']}"))
    if len(message.data) > MAX_EVENT_BYTES:
        found.append(Violation("event too large", f"{where}: {len(message.data)} bytes"))
    kind = KINDS.get(event["type"])
    subject = f"{history.prefix}.evt.{history.node}.{event.get('container') or '_'}.{kind}"
    if kind is not None and message.subject != subject:
        found.append(Violation("wrong subject", f"{where}: {event['type']} belongs on {subject}"))
    return place, event


def _check_order(
    history: History, generation: int, messages: list[tuple[Message, Place]]
) -> Iterator[Violation]:
    """Within one generation the events are consecutive, but for what was purged. What was purged before it was
    acknowledged is told again.
    """
    purges = [loss.upto for loss in _purges(history, generation)]
    gone = max((x.purged for x in history.lost(EVENTS) if x.generation == generation), default=0)
    seen: set[Place] = set()
    before, before_seq = Place("", 0), 0
    for message, place in messages:
        purged = any(before_seq <= upto < message.stream_seq for upto in purges)
        if purged:
            seen.clear()
        # So many messages stood before this one in the copy's own past.
        unseen = message.stream_seq - before_seq - 1 if message.stream_seq - 1 <= gone else 0
        expected = before.seq + 1 if place.epoch == before.epoch else 1
        if place in seen:
            yield Violation("event twice", f"{place} stands in the stream again at {message.stream_seq}")
        elif place <= before and purged:
            before = place
        elif place < before:
            yield Violation("events out of order", f"{place} stands behind {before}")
        elif place.seq != expected and (
            not unseen or (place.epoch == before.epoch and place.seq - expected != unseen)
        ):
            yield Violation(
                "lost event", f"{place.seq - expected} events before {place} are not in the stream"
            )
        seen.add(place)
        before, before_seq = max(before, place), message.stream_seq


def _check_numbers(known: Iterable[Place]) -> Iterator[Violation]:
    """All that was ever read, together: 1, 2, 3 … of each epoch."""
    before = Place("", 0)
    for place in sorted(known):
        expected = before.seq + 1 if place.epoch == before.epoch else 1
        if place.seq != expected:
            yield Violation("lost event", f"nobody ever read {expected} to {place.seq - 1} before {place}")
        before = place


def _check_epochs(history: History, known: dict[Place, tuple[dict[str, Any], str]]) -> Iterator[Violation]:
    epochs = Counter(place.epoch for place in known)
    if len(epochs) > 1 + history.takeovers:
        yield Violation("foreign epoch", f"{dict(epochs)} after {history.takeovers} takeovers")
    boot: dict[str, str] = {}
    for place in sorted(known):
        now = str(known[place][0].get("boot"))
        if now < boot.get(place.epoch, ""):
            yield Violation("boots out of order", f"{now} at {place} follows {boot[place.epoch]}")
        boot[place.epoch] = now
