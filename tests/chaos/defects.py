"""Deliberate defects of events, commands, states and lists, each with the name under which it must be found."""

import copy
import json

from .breaking import Defect, change, drop, event, find, insert, renumber
from .history import EVENTS, History, Loss


def lost_event(history: History) -> None:
    del history.events[40]


def lost_event_whose_stream_sequence_is_closed(history: History) -> None:
    del history.events[40]
    for seq, message in enumerate(history.events, 1):
        message.stream_seq = seq


def more_lost_than_was_purged(history: History) -> None:
    """A purge took two messages, three are missing."""
    del history.events[40:43]
    for message in history.events[40:]:
        message.stream_seq -= 1
    upto = history.events[40].stream_seq - 1
    history.losses.append(Loss(what="purged", stream=EVENTS, at=1.0, generation=1, upto=upto))


def lost_first_event(history: History) -> None:
    del history.events[0]


def lost_last_event_of_a_new_stream(history: History) -> None:
    """Made anew, everything was sent again, but for the newest."""
    again = copy.deepcopy(history.events[:-1])
    for message in again:
        message.generation = 2
    history.events += again
    history.losses.append(Loss(what="made anew", stream=EVENTS, at=1.0, generation=2))
    history.listed = history.listed[:0]


def event_twice(history: History) -> None:
    made = copy.deepcopy(history.events[40])
    history.events.insert(41, made)
    for seq, message in enumerate(history.events, 1):
        message.stream_seq = seq


def duplicate_seq(history: History) -> None:
    change(history.events[41], seq=event(history.events[40])["seq"])


def swapped_events(history: History) -> None:
    first, second = history.events[40], history.events[41]
    first.data, second.data = second.data, first.data
    first.subject, second.subject = second.subject, first.subject


def event_told_in_two_ways(history: History) -> None:
    again = copy.deepcopy(history.events)
    for message in again:
        message.generation = 2
    change(again[find(history, "state_changed")], time="2020-01-01T00:00:00Z")
    history.events += again
    history.losses.append(Loss(what="made anew", stream=EVENTS, at=1.0, generation=2))


def foreign_epoch(history: History) -> None:
    insert(history, len(history.events), 0)
    change(history.events[-1], epoch="7" + "Z" * 25, seq=1)


def boots_out_of_order(history: History) -> None:
    change(history.events[40], boot="0" * 26)


def wrong_subject(history: History) -> None:
    message = history.events[find(history, "state_changed")]
    message.subject = message.subject.replace(".state", ".command")


def no_completion(history: History) -> None:
    drop(history, find(history, "command_completed", ok=True, command="remove", state="removed"))


def accepted_and_never_answered_and_no_more(history: History) -> None:
    at = find(history, "command_completed", command="kill")
    drop(history, at)


def completed_twice(history: History) -> None:
    at = find(history, "command_completed", command="tag_image")
    insert(history, at + 1, at)


def accepted_twice(history: History) -> None:
    at = find(history, "command_accepted", command="tag_image")
    insert(history, at + 1, at)


def completed_before_accepted(history: History) -> None:
    accepted = find(history, "command_accepted", command="tag_image")
    completed = find(history, "command_completed", command="tag_image")
    moved = history.events.pop(completed)
    history.events.insert(accepted, moved)
    renumber(history)


def answer_to_nothing(history: History) -> None:
    change(history.events[find(history, "command_accepted")], command_id="nobody-sent-this")


def malformed_without_rejection(history: History) -> None:
    rejected = [event(m)["sha256"] for m in history.events if event(m)["type"] == "command_rejected"]
    drop(history, find(history, "command_rejected", error_code=None, sha256=rejected[0]))


def rejected_twice(history: History) -> None:
    at = find(history, "command_rejected")
    insert(history, at + 1, at)


def rejected_and_completed(history: History) -> None:
    at = find(history, "command_completed", command="tag_image")
    done = event(history.events[at])
    rejection = event(history.events[find(history, "command_rejected")])
    insert(history, at + 1, at)
    told = {**rejection, "command_id": done["command_id"], "container": None, "seq": at + 2}
    history.events[at + 1].data = json.dumps(told).encode()
    renumber(history)


def duplicate_with_another_result(history: History) -> None:
    change(history.events[find(history, "command_completed", duplicate=True)], ok=True, error=None, result={})


def duplicate_of_what_was_sent_once(history: History) -> None:
    at = find(history, "command_completed", command="tag_image")
    insert(history, at + 1, at, duplicate=True)


def error_and_ok(history: History) -> None:
    at = find(history, "command_completed", command="tag_image")
    change(history.events[at], error={"code": "conflict", "message": "", "field": None})


def went_well_and_did_not(history: History) -> None:
    """A stop that says ok, and the container runs."""
    at = find(history, "command_completed", command="run", ok=True)
    told = event(history.events[at])
    for message in history.published:
        if message.id == told["command_id"]:
            message.subject = message.subject.replace(".run", ".stop")
    change(history.events[at], command="stop", result=None)


def acted_on_another_instance(history: History) -> None:
    at = find(history, "state_changed", state="stopping")
    command_id = event(history.events[at])["command_id"]
    for message in history.published:
        if message.id == command_id:
            body = {**json.loads(message.body), "if_instance": "01BX5ZZKBKACTAV9WEVGEMMVRZ"}
            message.body = json.dumps(body).encode()


def begun_after_its_deadline(history: History) -> None:
    at = find(history, "state_changed", state="stopping")
    command_id = event(history.events[at])["command_id"]
    for message in history.published:
        if message.id == command_id:
            body = {**json.loads(message.body), "deadline": "2020-01-01T00:00:00Z"}
            message.body = json.dumps(body).encode()


def executed_twice(history: History) -> None:
    """One command that begins its container a second time."""
    begun: dict[str, str] = {}
    for message in history.events:
        told = event(message)
        if told["type"] == "state_changed" and told["status"]["state"] == "initializing":
            first = begun.setdefault(told["container"], told["command_id"])
            if first != told["command_id"]:
                change(message, command_id=first)
                return
    raise AssertionError("no container was begun twice")


def commands_out_of_order(history: History) -> None:
    """What was stored long before another one is accepted after that was done."""
    pairs = [event(m) for m in history.events if event(m)["type"] == "command_completed" and event(m)["ok"]]
    for message in history.published:
        message.sent_at += 1000.0 * any(told["command_id"] == message.id for told in pairs[:10])


def impossible_transition(history: History) -> None:
    change(history.events[find(history, "state_changed", state="running")], from_="exited")


def skipped_transition(history: History) -> None:
    drop(history, find(history, "state_changed", state="initializing"))


def event_of_a_removed_instance(history: History) -> None:
    gone = find(history, "state_changed", state="removed", from_="exited")
    insert(history, gone + 1, gone - 1 - _state_before(history, gone), from_="exited")


def _state_before(history: History, at: int) -> int:
    """How far back the event of the same container's former state is."""
    cid = event(history.events[at])["container"]
    for back in range(1, at):
        told = event(history.events[at - 1 - back])
        if told["type"] == "state_changed" and told["container"] == cid:
            return back
    raise AssertionError("it has no history")


def wrong_run(history: History) -> None:
    change(history.events[find(history, "state_changed", state="running")], status__run=5)


def wrong_exit_code(history: History) -> None:
    change(
        history.events[find(history, "state_changed", state="exited", from_="running")], status__exit_code=99
    )


def exit_code_of_what_runs(history: History) -> None:
    change(history.events[find(history, "state_changed", state="running")], status__exit_code=0)


def pid_of_what_ended(history: History) -> None:
    change(history.events[find(history, "state_changed", state="exited")], status__pid=4711)


def field_left_out(history: History) -> None:
    message = history.events[find(history, "state_changed", state="running")]
    told = event(message)
    del told["status"]["port"]
    message.data = json.dumps(told).encode()


def stale_status_in_a_completion(history: History) -> None:
    at = find(history, "command_completed", command="run", ok=True)
    change(history.events[at], status__pid=1)


def other_instance_under_one_name(history: History) -> None:
    at = find(history, "state_changed", state="running")
    change(
        history.events[at],
        instance="01BX5ZZKBKACTAV9WEVGEMMVRZ",
        status__instance="01BX5ZZKBKACTAV9WEVGEMMVRZ",
    )


def listed_otherwise(history: History) -> None:
    history.listed[0].containers[0]["pid"] = 4711


def listed_and_never_told(history: History) -> None:
    history.listed[0].containers.append({**history.listed[0].containers[0], "container": "ghost-0"})


def told_and_not_listed(history: History) -> None:
    del history.listed[0].containers[0]


def not_told_again_after_a_purge(history: History) -> None:
    last = history.listed[0].last
    history.losses.append(Loss(what="purged", stream=EVENTS, at=1.0, generation=1, upto=last))


def process_left(history: History) -> None:
    history.left.append("process 4711")


DEFECTS: list[tuple[Defect, str]] = [
    (lost_event, "lost event"),
    (lost_event_whose_stream_sequence_is_closed, "lost event"),
    (more_lost_than_was_purged, "lost event"),
    (lost_first_event, "lost event"),
    (lost_last_event_of_a_new_stream, "lost event"),
    (event_twice, "event twice"),
    (duplicate_seq, "event twice"),
    (swapped_events, "events out of order"),
    (event_told_in_two_ways, "an event changed"),
    (foreign_epoch, "foreign epoch"),
    (boots_out_of_order, "boots out of order"),
    (wrong_subject, "wrong subject"),
    (no_completion, "no completion"),
    (accepted_and_never_answered_and_no_more, "no completion"),
    (completed_twice, "completed twice"),
    (accepted_twice, "accepted twice"),
    (completed_before_accepted, "completed before acceptance"),
    (answer_to_nothing, "answer to nothing"),
    (malformed_without_rejection, "no rejection"),
    (rejected_twice, "rejected without reason"),
    (rejected_and_completed, "rejected and accepted"),
    (duplicate_with_another_result, "duplicate differs"),
    (duplicate_of_what_was_sent_once, "duplicate of nothing"),
    (error_and_ok, "wrong completion"),
    (went_well_and_did_not, "wrong completion"),
    (acted_on_another_instance, "wrong instance"),
    (begun_after_its_deadline, "begun too late"),
    (executed_twice, "executed twice"),
    (commands_out_of_order, "commands out of order"),
    (impossible_transition, "impossible transition"),
    (skipped_transition, "impossible transition"),
    (event_of_a_removed_instance, "event of a removed instance"),
    (wrong_run, "wrong run"),
    (wrong_exit_code, "wrong exit code"),
    (exit_code_of_what_runs, "wrong exit code"),
    (pid_of_what_ended, "pid of nobody"),
    (field_left_out, "incomplete status"),
    (stale_status_in_a_completion, "status differs"),
    (other_instance_under_one_name, "wrong instance"),
    (listed_otherwise, "wrong fold"),
    (listed_and_never_told, "wrong fold"),
    (told_and_not_listed, "wrong fold"),
    (not_told_again_after_a_purge, "state not told again"),
    (process_left, "left behind"),
]
