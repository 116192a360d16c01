"""The judge is tested before it is believed: a recorded run passes, and each defect put into it is found.

`recorded.json.gz` is of a real run (worker, launcher and connection were cut down in it), written by
`python -m tests.chaos --seed 7 --seconds 6 --faults worker_kill,link_cut,launcher_kill --record FILE`.
"""

import copy
import json
from pathlib import Path

import pytest

from . import defects, defects_logs
from .breaking import Defect, data_chunk
from .history import COMMANDS, EVENTS, LOGS, History, Loss, dump, load
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


def test_a_copy_has_the_gaps_of_the_stream_it_was_made_of(history: History) -> None:
    """Put back from before a chunk, which is lost, and later put back from a copy of that."""
    chunk = data_chunk(history)
    logs = [message for message in history.logs if message is not chunk]
    for generation, upto in ((2, chunk.stream_seq - 1), (3, logs[-1].stream_seq)):
        again = copy.deepcopy(logs)
        for message in again:
            message.generation = generation
        history.logs += again
        history.losses.append(Loss(what="put back", stream=LOGS, at=1.0, generation=generation, upto=upto))
    assert judge(history) == []
    del history.losses[0]
    assert "log bytes lost" in names(history)


def test_refused_chunks_may_come_later(history: History) -> None:
    defects_logs.swapped_chunks(history)
    history.refusals = 1
    assert judge(history) == []


def test_a_history_survives_being_written(history: History) -> None:
    once = load(dump(history))
    assert load(dump(once)) == once
