"""Every command that the stream took is answered once, and as the contract says."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

from .history import COMMANDS, History, Published, Violation, digest
from .judge_events import Events, Told

CODES = frozenset(
    {
        "invalid_command", "invalid_spec", "not_found", "conflict", "create_failed", "start_failed",
        "pull_failed", "policy_denied", "unsupported", "resource_exhausted", "deadline_exceeded",
        "interrupted", "unavailable", "configuration", "internal",
    }
)  # fmt: skip
RAN = frozenset({"running", "stopping", "exited"})
# The state in which a command that went well may leave its container ("removed" stands for none at all).
AFTER = {
    "create": frozenset({"pending"}),
    "start": RAN,
    "run": RAN,
    "restart": RAN,
    "stop": frozenset({"exited", "failed", "removed"}),  # none: it overtook a create, which left nothing
    "remove": frozenset({"removed"}),
}
STOPPED_S = 10.0  # a process of the node may have stood still so long between looking at the clock and acting


def check_commands(history: History, events: Events) -> Iterator[Violation]:
    by_id: dict[str, list[Told]] = defaultdict(list)
    rejected: Counter[tuple[str, str]] = Counter()
    for told in events.told:
        if told.event["type"] == "command_rejected":
            rejected[told.event["subject"], told.event["sha256"]] += 1
        if told.event["type"].startswith("command_") and told.event.get("command_id") is not None:
            by_id[told.event["command_id"]].append(told)
    sent: dict[str, list[Published]] = defaultdict(list)
    for message in history.published:
        if message.expect == "command" and message.id is not None:
            sent[message.id].append(message)
    yield from _check_rejections(history, rejected, sent)
    for command_id, messages in sent.items():
        yield from _check_id(history, command_id, messages, by_id.get(command_id, []), events)
    malformed = {message.id for message in history.published if message.expect == "rejection"}
    for command_id in by_id.keys() - sent.keys() - malformed:
        yield Violation("answer to nothing", f"{by_id[command_id][0]} to {command_id}, which nobody sent")
    for told in events.told:
        if told.event["type"] == "command_completed":
            yield from _check_completion(told)
    yield from _check_effects(sent, events)
    yield from _check_once(history, events)
    yield from _check_order(history, sent, by_id)


def _must_answer(history: History, message: Published) -> bool:
    """The stream took it, and was not robbed of it before the node had it."""
    if message.outcome != "stored":
        return False
    place = message.stream_seq, digest(message.subject, message.body)
    return not any(place in loss.taken for loss in history.lost(COMMANDS) if loss.at >= message.sent_at)


def _check_rejections(
    history: History,
    rejected: Counter[tuple[str, str]],
    sent: dict[str, list[Published]],
) -> Iterator[Violation]:
    """One rejection for each message that can only be rejected, none for nothing."""
    least: Counter[tuple[str, str]] = Counter()
    most: Counter[tuple[str, str]] = Counter()
    for message in history.published:
        key = message.subject[:1024], hashlib.sha256(message.body).hexdigest()
        if message.expect == "rejection":
            least[key] += _must_answer(history, message)
            most[key] += message.outcome != "refused"
        elif len({m.variant for m in sent[message.id or ""]}) > 1:
            most[key] += message.outcome != "refused"  # one of two bodies under one id: see `_check_id`
    for key in rejected.keys() | least.keys():
        if rejected[key] < least[key]:
            yield Violation("no rejection", f"{rejected[key]} for {least[key]} messages on {key[0]}")
        if rejected[key] > most[key]:
            yield Violation("rejected without reason", f"{rejected[key]} for {most[key]} on {key[0]}")


def _check_id(
    history: History, command_id: str, messages: list[Published], told: list[Told], events: Events
) -> Iterator[Violation]:
    accepted = [t for t in told if t.event["type"] == "command_accepted"]
    completed = [t for t in told if t.event["type"] == "command_completed" and not t.event["duplicate"]]
    duplicates = [t for t in told if t.event["type"] == "command_completed" and t.event["duplicate"]]
    refusals = Counter(t.event["sha256"] for t in told if t.event["type"] == "command_rejected")
    verb = messages[0].subject.rsplit(".", 1)[1]
    name = f"{verb} {command_id}"
    taken = [message for message in messages if message.outcome != "refused"]
    certain = [message for message in taken if _must_answer(history, message)]
    yield from _check_pair(history, name, accepted, completed, bool(certain))
    if accepted and not taken:
        yield Violation("answer to nothing", f"{name} was refused by the stream and accepted all the same")
    if duplicates:
        if len(taken) < 2:
            yield Violation("duplicate of nothing", f"{name} was sent once")
        for told_again in duplicates:
            yield from _check_duplicate(name, told_again, completed)
    if any(t.place.epoch in history.doomed for t in told):
        certain = []  # each of two journals had a first one of its own, and neither knew of the other's
    yield from _check_refusals(name, taken, certain, refusals)


def _check_pair(
    history: History,
    name: str,
    accepted: list[Told],
    completed: list[Told],
    certain: bool,
) -> Iterator[Violation]:
    """One acceptance and one completion, in this order. A journal that was destroyed keeps no promise."""
    kept_accepted = [t for t in accepted if t.place.epoch not in history.doomed]
    kept_completed = [t for t in completed if t.place.epoch not in history.doomed]
    answered = bool(kept_accepted) or (certain and not accepted)
    if len(kept_accepted) > 1:
        yield Violation("accepted twice", name)
    if len(kept_completed) > 1:
        yield Violation("completed twice", f"{name}: {[str(t) for t in kept_completed]}")
    if not answered and not completed:
        return
    if answered and not kept_completed:
        yield Violation("no completion", f"{name} ({'accepted' if accepted else 'not even accepted'})")
    if completed and not accepted:
        yield Violation("completed without acceptance", name)
    if kept_completed and kept_accepted and kept_completed[0].place < kept_accepted[0].place:
        yield Violation("completed before acceptance", name)


def _check_duplicate(name: str, told: Told, completed: list[Told]) -> Iterator[Violation]:
    if told.status is not None:
        yield Violation("duplicate differs", f"{name}: it carries a status")
    if completed and not any(_answer(told.event) == _answer(first.event) for first in completed):
        yield Violation("duplicate differs", f"{name}: {_answer(told.event)}")


def _answer(event: dict[str, Any]) -> tuple[Any, ...]:
    return event["ok"], event["error"], event["result"], event["command"]


def _check_refusals(
    name: str, taken: list[Published], certain: list[Published], refusals: Counter[str]
) -> Iterator[Violation]:
    """Of several bodies under one id one is the command, every other message is rejected."""
    variants = {message.variant for message in taken}
    if len(variants) < 2:
        if refusals:
            yield Violation("rejected and accepted", f"{name} has one body and {refusals.total()} rejections")
        return
    for winner in variants:
        least = Counter(_digest(m) for m in certain if m.variant != winner)
        most = Counter(_digest(m) for m in taken if m.variant != winner)
        if least <= refusals <= most:
            return
    yield Violation("wrong rejections", f"{name}: {len(variants)} bodies, rejected: {dict(refusals)}")


def _digest(message: Published) -> str:
    return hashlib.sha256(message.body).hexdigest()


def _check_completion(told: Told) -> Iterator[Violation]:
    """What a completion owes itself."""
    event, status = told.event, told.status
    ok, error, verb = event["ok"], event["error"], event["command"]
    if ok is (error is not None):
        yield Violation("wrong completion", f"{told}: ok {ok}, error {error}")
    if error is not None and error.get("code") not in CODES:
        yield Violation("unknown error code", f"{told}: {error}")
    if error is not None and error.get("code") == "internal":
        yield Violation("internal error", f"{told}: {error['message']}")
    if not ok or event["duplicate"]:
        return
    if verb in ("create", "run") and event["result"] != {"instance": event.get("instance")}:
        yield Violation("wrong completion", f"{told}: result {event['result']}")
    allowed = AFTER.get(verb)
    state = "removed" if status is None else status["state"]
    if allowed is not None and state not in allowed:
        yield Violation("wrong completion", f"{told}: {verb} went well and the container is {state}")


def _check_effects(sent: dict[str, list[Published]], events: Events) -> Iterator[Violation]:
    """`if_instance` and `deadline`: what a command may not have touched or begun."""
    begun: set[str] = set()
    made: set[tuple[str, str]] = set()  # command and the instance that it made in the place of the wanted one
    for told in events.told:
        event, status = told.event, told.status
        if event["type"] != "state_changed" or event.get("command_id") not in sent or status is None:
            continue
        command_id = event["command_id"]
        body = _body(sent[command_id])
        wanted = body.get("if_instance")
        own = command_id, status["instance"]
        if body.get("replace") and event["from"] is None:
            made.add(own)
        if wanted is not None and status["instance"] != wanted and own not in made:
            yield Violation("wrong instance", f"{told} by {command_id}, which is for {wanted}")
        if command_id not in begun and body.get("deadline") is not None:
            deadline = datetime.fromisoformat(body["deadline"])
            if datetime.fromisoformat(event["time"]) > deadline + timedelta(seconds=STOPPED_S):
                yield Violation("begun too late", f"{told} by {command_id}, deadline {body['deadline']}")
        begun.add(command_id)


def _check_once(history: History, events: Events) -> Iterator[Violation]:
    """No command makes or starts its container twice. A journal that was destroyed knows nothing of the other."""
    done: set[tuple[str, str, str, str]] = set()
    for told in events.told:
        event, status = told.event, told.status
        command_id = event.get("command_id")
        if event["type"] != "state_changed" or command_id is None or status is None:
            continue
        begins = status["state"] in ("pending", "initializing") and event["from"] != status["state"]
        journal = told.place.epoch if told.place.epoch in history.doomed else ""
        step = journal, command_id, status["container"], status["state"]
        if begins and step in done:
            yield Violation("executed twice", f"{told} by {command_id}")
        if begins:
            done.add(step)


def _check_order(
    history: History, sent: dict[str, list[Published]], by_id: dict[str, list[Told]]
) -> Iterator[Violation]:
    """Of one container: what was stored before another one was sent has its effect before it, or ends in an error."""
    lines: dict[str, list[tuple[Published, Told, Told]]] = defaultdict(list)
    for command_id, (message, *more) in sent.items():
        told = by_id.get(command_id, [])
        ends = [t for t in told if t.event["type"] == "command_completed" and t.event["ok"]]
        if more or len(told) != 2 or len(ends) != 1 or not _must_answer(history, message):
            continue
        if not any(t.place.epoch in history.doomed for t in told):
            lines[message.subject.rsplit(".", 1)[0]].append((message, told[0], ends[0]))
    for line in lines.values():
        for message, accepted, _ in line:
            for other, _, end in line:
                if end.place < accepted.place and message.stored_at < other.sent_at:
                    yield Violation("commands out of order", f"{accepted}: {end} was sent after it")


def _body(messages: list[Published]) -> dict[str, Any]:
    """The command, where all of its messages agree."""
    if len({message.variant for message in messages}) > 1:
        return {}
    body = json.loads(messages[0].body)
    return body if isinstance(body, dict) else {}
