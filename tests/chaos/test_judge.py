"""The judge is tested before it is believed: a recorded run passes, and each defect put into it is found.

`recorded.json.gz` is of a real run (worker, launcher and connection were cut down in it), written by
`python -m tests.chaos --seed 7 --seconds 9 --faults worker_kill,link_cut,launcher_kill --record FILE`.
"""

import copy
import json
from pathlib import Path

import pytest

from . import defects, defects_logs
from .breaking import Defect, change, data_chunk, event, find
from .history import COMMANDS, EVENTS, LOGS, History, Loss, Published, Refusal, digest, dump, load
from .judge import judge

RECORDED = Path(__file__).with_name("recorded.json.gz")
DEFECTS = [*defects.DEFECTS, *defects_logs.DEFECTS]


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


@pytest.mark.parametrize(("defect", "name"), DEFECTS, ids=[defect.__name__ for defect, _ in DEFECTS])
def test_a_defect_is_found(history: History, defect: Defect, name: str) -> None:
    defect(history)
    assert name in names(history)


# -- what the injector did is excused, and no more


def test_what_was_read_before_a_purge_is_not_missed_in_a_copy_of_what_was_left(history: History) -> None:
    """Purged, copied, and put back from the copy: its first 40 messages are gone for good."""
    again = copy.deepcopy(history.events[40:])
    for message in again:
        message.generation = 2
    history.events += again
    history.losses = [
        Loss(what="purged", stream=EVENTS, at=1.0, generation=1, upto=40),
        Loss(what="put back", stream=EVENTS, at=2.0, generation=2, upto=60, purged=40),
    ]
    for listed in history.listed:
        listed.generation = 2
    assert names(history) <= {"state not told again"}
    history.losses[-1].purged = 39
    assert "lost event" in names(history)


def test_an_event_that_nobody_ever_read_is_missed_whatever_was_purged(history: History) -> None:
    del history.events[40:43]
    upto = history.events[40].stream_seq - 1
    history.losses.append(Loss(what="purged", stream=EVENTS, at=1.0, generation=1, upto=upto))
    assert "lost event" in names(history)


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


def test_only_commands_that_were_taken_need_no_answer(history: History) -> None:
    lost = copy.deepcopy(next(m for m in history.published if m.expect == "command"))
    lost.subject, lost.id, lost.sent_at = "sandfleet.v1.cmd.n1.a-0.start", "lost", 1.0
    lost.body, lost.stream_seq = json.dumps({"type": "start", "id": "lost"}).encode(), 4711
    history.published.append(lost)
    assert names(history) == {"no completion"}
    taken = 4711, digest(lost.subject, lost.body)
    history.losses.append(Loss(what="purged", stream=COMMANDS, at=2.0, generation=0, taken=[taken]))
    assert judge(history) == []
    history.losses[-1].at = 0.5  # before it was sent
    assert names(history) == {"no completion"}
    history.losses[-1].at, history.losses[-1].taken = 2.0, [(4712, taken[1])]  # another one
    assert names(history) == {"no completion"}


def test_a_replacing_run_may_take_its_own_instance_back_and_no_other(history: History) -> None:
    """For a wanted instance: what it made in the place of that, and was overtaken, is its own."""
    begun = find(history, "state_changed", from_=None)
    told = event(history.events[begun])
    for message in history.published:
        if message.id == told["command_id"]:
            wanted = {"if_instance": "01BX5ZZKBKACTAV9WEVGEMMVRZ", "replace": True}
            message.body = json.dumps({**json.loads(message.body), **wanted}).encode()
    assert "wrong instance" not in names(history)
    change(history.events[begun], from_="exited")
    assert "wrong instance" in names(history)


def test_log_bytes_must_have_been_read_before_they_were_purged(history: History) -> None:
    chunk = data_chunk(history)
    history.logs.remove(chunk)
    history.losses.append(Loss(what="purged", stream=LOGS, at=1.0, generation=1, upto=chunk.stream_seq))
    assert "log bytes lost" in names(history)


def test_a_chunk_that_was_read_before_is_not_missed_after_it_was_put_back(history: History) -> None:
    chunk = data_chunk(history)
    again = copy.deepcopy([message for message in history.logs if message is not chunk])
    for message in again:
        message.generation = 2
    history.logs += again
    history.losses.append(Loss(what="put back", stream=LOGS, at=1.0, generation=2, upto=chunk.stream_seq - 1))
    assert judge(history) == []
    history.losses.clear()
    assert "log bytes lost" in names(history)


def test_refused_chunks_may_come_later(history: History) -> None:
    late = data_chunk(history).stream_seq
    defects_logs.swapped_chunks(history)
    history.refusals = [Refusal(generation=1, after=late - 1)]
    assert judge(history) == []
    history.refusals[0].after = len(history.logs)  # only what came after that
    assert names(history) == {"log out of order"}


def test_a_history_survives_being_written(history: History) -> None:
    once = load(dump(history))
    assert load(dump(once)) == once


def test_what_was_taken_is_known_in_what_was_written(history: History) -> None:
    """Scripts are left out of it, and with them what a command's digest is made of."""
    lost = Published(
        subject="sandfleet.v1.cmd.n1.a-0.run",
        body=json.dumps({"type": "run", "id": "lost", "spec": {"command": {"entrypoint": ["sh"]}}}).encode(),
        expect="command",
        id="lost",
        outcome="stored",
        stream_seq=4711,
    )
    history.published.append(lost)
    assert names(load(dump(history))) == {"no completion"}
    taken = 4711, digest(lost.subject, lost.body)
    history.losses.append(Loss(what="purged", stream=COMMANDS, at=2.0, generation=0, taken=[taken]))
    assert judge(load(dump(history))) == []
