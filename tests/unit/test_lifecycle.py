"""The table of states and the verb table, every cell."""

import itertools

import pytest

from schemas.status import State
from worker.errors import Conflict
from worker.lifecycle import LIVE, TRANSITIONS, VERBS, Trigger, Verdict, next_state, verdict

STATES: tuple[State | None, ...] = (None, *State)


@pytest.mark.parametrize(("state", "trigger"), list(itertools.product(STATES, Trigger)))
def test_every_pair_moves_as_the_table_says_or_conflicts(state: State | None, trigger: Trigger) -> None:
    if (state, trigger) in TRANSITIONS:
        assert next_state(state, trigger) is TRANSITIONS[state, trigger]
    else:
        with pytest.raises(Conflict):
            next_state(state, trigger)


def test_removed_is_last() -> None:
    assert not [pair for pair in TRANSITIONS if pair[0] is State.REMOVED]


def test_every_state_can_be_removed() -> None:
    for state in State:
        if state is not State.REMOVED:
            assert next_state(state, Trigger.REMOVE) is State.REMOVED


def test_every_state_is_reached_from_nothing() -> None:
    seen: set[State | None] = {None}
    while True:
        more = {after for (before, _), after in TRANSITIONS.items() if before in seen} - seen
        if not more:
            break
        seen |= more
    assert seen == set(STATES)


# The contract's table, written out a second time: rows are verbs, columns the states below.
COLUMNS: tuple[State | None, ...] = (
    None,
    State.PENDING,
    State.INITIALIZING,
    State.RUNNING,
    State.STOPPING,
    State.EXITED,
    State.FAILED,
)
CONTRACT = {
    "create": "do conflict conflict conflict conflict conflict conflict",
    "run": "do conflict conflict conflict conflict conflict conflict",
    "start": "not_found do ok ok wait do do",
    "stop": "not_found do do do wait ok ok",
    "kill": "not_found conflict do do do conflict conflict",
    "restart": "not_found do do do wait do do",
    "remove": "ok do do do do do do",
}


@pytest.mark.parametrize("verb", CONTRACT)
def test_the_verb_table_is_the_contracts(verb: str) -> None:
    for state, expected in zip(COLUMNS, CONTRACT[verb].split(), strict=True):
        assert verdict(verb, state) == Verdict(expected), (verb, state)
    assert verdict(verb, State.REMOVED) == verdict(verb, None)


@pytest.mark.parametrize("state", [s for s in COLUMNS if s is not None])
def test_replace_lifts_the_conflict_of_create_and_run(state: State) -> None:
    assert verdict("create", state, replace=True) is Verdict.DO
    assert verdict("run", state, replace=True) is Verdict.DO


@pytest.mark.parametrize("state", COLUMNS)
def test_remove_without_force_spares_what_runs(state: State | None) -> None:
    found = verdict("remove", state, force=False)
    if state in LIVE:
        assert found is Verdict.CONFLICT
    else:
        assert found == verdict("remove", state)


def test_the_table_has_a_cell_for_every_verb_and_state() -> None:
    for verb, row in VERBS.items():
        assert set(row) == set(COLUMNS), verb
