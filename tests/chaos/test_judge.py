"""The judge is tested before it is believed: a recorded run passes, and each defect put into it is found.

`recorded.json.gz` is of a real run (worker, launcher and connection were cut down in it), written by
`python -m tests.chaos --seed 7 --seconds 6 --faults worker_kill,link_cut,launcher_kill --record FILE`.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from .history import COMMANDS, EVENTS, LOGS, History, Loss, Message, load
from .judge import judge

RECORDED = Path(__file__).with_name("recorded.json.gz")
Defect = Callable[[History], None]


@pytest.fixture(scope="module")
def recorded() -> History:
    return load(RECORDED.read_bytes())


@pytest.fixture
def history(recorded: History) -> History:
    return copy.deepcopy(recorded)


def names(history: History) -> set[str]:
    return {violation.name for violation in judge(history)}


def test_a_real_run_passes(history: History) -> None:
    assert judge(history) == []


# -- tools to break a history with


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


# -- the defects, by the name under which each must be found


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


def lost_log_byte(history: History) -> None:
    chunk = data_chunk(history)
    chunk.data = chunk.data[:-1]
    rename(chunk)


def lost_chunk(history: History) -> None:
    history.logs.remove(data_chunk(history))


def lost_end_of_a_log(history: History) -> None:
    """The last line is missing, and the end of the run says nothing of it."""
    chunk = data_chunk(history, last=True)
    chunk.data = chunk.data[: chunk.data.rstrip(b"\n").rfind(b"\n") + 1]
    rename(chunk)
    after = [
        m
        for m in history.logs
        if m.headers["Sandfleet-Instance"] == chunk.headers["Sandfleet-Instance"]
        and m.subject == chunk.subject
        and m.stream_seq > chunk.stream_seq
    ]
    assert not after, "the end of the run must stand in this chunk"


def too_small_a_gap_marker(history: History) -> None:
    chunk = data_chunk(history)
    lost = len(chunk.data) - 1
    chunk.data = b""
    chunk.headers |= {"Sandfleet-Lost": str(lost), "Sandfleet-Lost-Reason": "size"}
    head = chunk.headers["Nats-Msg-Id"].rpartition("+")[0]
    chunk.headers["Nats-Msg-Id"] = f"{head}+lost{lost}"


def duplicated_chunk(history: History) -> None:
    chunk = data_chunk(history)
    history.logs.insert(history.logs.index(chunk) + 1, copy.deepcopy(chunk))


def swapped_chunks(history: History) -> None:
    chunk = data_chunk(history)
    following = next(
        m
        for m in history.logs
        if m.subject == chunk.subject
        and m.stream_seq > chunk.stream_seq
        and m.headers["Sandfleet-Instance"] == chunk.headers["Sandfleet-Instance"]
    )
    here, there = history.logs.index(chunk), history.logs.index(following)
    history.logs[here], history.logs[there] = following, chunk


def another_log_byte(history: History) -> None:
    chunk = data_chunk(history)
    chunk.data = b"?" + chunk.data[1:]


def log_of_another_container(history: History) -> None:
    chunk = data_chunk(history)
    other = next(
        m
        for m in history.logs
        if m.data and m.headers["Sandfleet-Instance"] != chunk.headers["Sandfleet-Instance"]
    )
    chunk.data = (other.data * 100)[: len(chunk.data)]


def line_that_was_never_printed(history: History) -> None:
    for witness in history.witnesses:
        witness.stdout = max(0, witness.stdout - 2)


def no_eof(history: History) -> None:
    at = next(i for i, m in enumerate(history.logs) if "Sandfleet-Eof" in m.headers and not m.data)
    del history.logs[at]


def eof_twice(history: History) -> None:
    at = next(i for i, m in enumerate(history.logs) if "Sandfleet-Eof" in m.headers and not m.data)
    history.logs.insert(at + 1, copy.deepcopy(history.logs[at]))


def incomplete_without_a_cause(history: History) -> None:
    codes = {
        (s["instance"], s["run"]): s["reason"]
        for m in history.events
        if (s := event(m).get("status")) is not None and s["state"] in ("exited", "failed")
    }
    chunk = next(
        m
        for m in history.logs
        if "Sandfleet-Eof" in m.headers
        and codes[m.headers["Sandfleet-Instance"], int(m.headers["Sandfleet-Run"])] is None
    )
    chunk.headers["Sandfleet-Incomplete"] = "supervisor_lost"


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
    (lost_log_byte, "log bytes lost"),
    (lost_chunk, "log bytes lost"),
    (lost_end_of_a_log, "log bytes lost"),
    (too_small_a_gap_marker, "log bytes lost"),
    (duplicated_chunk, "log bytes twice"),
    (swapped_chunks, "log out of order"),
    (another_log_byte, "wrong log bytes"),
    (log_of_another_container, "wrong log bytes"),
    (line_that_was_never_printed, "log bytes invented"),
    (no_eof, "no eof"),
    (eof_twice, "eof twice"),
    (incomplete_without_a_cause, "incomplete without a cause"),
    (process_left, "left behind"),
]


@pytest.mark.parametrize(("defect", "name"), DEFECTS, ids=[defect.__name__ for defect, _ in DEFECTS])
def test_a_defect_is_found(history: History, defect: Defect, name: str) -> None:
    defect(history)
    assert name in names(history)


# -- what the injector did is excused, and no more


def test_a_purge_that_nobody_could_read_before_is_excused(history: History) -> None:
    del history.events[40:43]
    upto = history.events[40].stream_seq - 1
    history.losses.append(Loss(what="purged", stream=EVENTS, at=1.0, generation=1, upto=upto))
    history.ledger = {message.id: "completed" for message in history.published if message.id is not None}
    assert names(history) <= {"state not told again"}


def test_events_that_were_purged_before_they_were_acknowledged_are_told_again(history: History) -> None:
    again = copy.deepcopy(history.events[38:41])
    history.events[41:41] = again
    for seq, message in enumerate(history.events, 1):
        message.stream_seq = seq
    assert "event twice" in names(history)
    history.losses.append(Loss(what="purged", stream=EVENTS, at=1.0, generation=1, upto=41))
    history.listed = [history.listed[-1]]
    history.listed[0].last += 3
    assert judge(history) == []


def test_a_stream_that_was_made_anew_and_sent_again_passes(history: History) -> None:
    again = copy.deepcopy(history.events)
    for message in again:
        message.generation = 2
    del history.events[60:]
    history.events += again
    history.losses.append(Loss(what="made anew", stream=EVENTS, at=1.0, generation=2))
    for listed in history.listed:
        listed.generation = 2
    assert judge(history) == []


def test_commands_that_were_purged_need_no_answer(history: History) -> None:
    lost = copy.deepcopy(next(m for m in history.published if m.expect == "command"))
    lost.subject, lost.id, lost.sent_at = "sandfleet.v1.cmd.n1.a-0.start", "lost", 1.0
    lost.body = json.dumps({"type": "start", "id": "lost"}).encode()
    history.published.append(lost)
    assert names(history) == {"no completion"}
    history.losses.append(Loss(what="purged", stream=COMMANDS, at=2.0, generation=1))
    assert judge(history) == []
    history.losses[-1].at = 0.5  # before it was sent
    assert names(history) == {"no completion"}


def test_log_bytes_that_were_purged_unread_are_excused(history: History) -> None:
    chunk = data_chunk(history)
    history.logs.remove(chunk)
    history.losses.append(Loss(what="purged", stream=LOGS, at=1.0, generation=1, upto=chunk.stream_seq))
    assert judge(history) == []
    history.losses[-1].upto = chunk.stream_seq - 1
    assert "log bytes lost" in names(history)


def test_refused_chunks_may_come_later(history: History) -> None:
    swapped_chunks(history)
    history.refusals = 1
    assert judge(history) == []


def test_a_history_survives_being_written(history: History) -> None:
    assert load(_dumped(history)) == load(_dumped(load(_dumped(history))))


def _dumped(history: History) -> bytes:
    from .history import dump

    return dump(msgspec.structs.replace(history))
