"""The life of one container, exhaustively: commands × crashes × exits, against the promises.

The worker's own runtime, actors, ledger and rules run on a world that is data (`model_world`); `model_explore` visits
every state. SANDFLEET_MODEL=whole takes all commands at once, which is for a machine with time to spare.
"""

import asyncio
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from loguru import logger

from schemas.status import State as Life
from tests.unit.model_explore import STEPS, Explored, Explorer
from tests.unit.model_world import COMMANDS, Violation
from worker import handlers, lifecycle, runtime
from worker.ending import Ender
from worker.journal import Tx
from worker.lifecycle import TRANSITIONS, VERBS, Trigger, Verdict
from worker.reconcile import Fate, Finding
from worker.runtime import Runtime

# The commands, in groups that share states; and the least that is to be found with them.
GROUPS = {
    "run": (("run", "start", "stop", "remove"), 8, 350, 2500),
    "create": (("create-gone", "start", "kill", "remove-gently", "start-late"), 5, 280, 1700),
    "replace": (("run-replace", "restart", "stop-other"), 8, 320, 4000),
}


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    logger.disable("worker")
    yield
    logger.enable("worker")


async def explored(commands: tuple[str, ...]) -> Explored:
    explorer = Explorer(commands)
    return await explorer.explore()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("group", GROUPS)
async def test_every_state_keeps_the_promises(
    group: str, record_property: Callable[[str, object], None]
) -> None:
    commands, up, down, episodes = GROUPS[group]
    found = await explored(commands)
    record_property("explored", f"{found.up} up, {found.down} down, {found.episodes} episodes")
    # Far fewer would mean that the world does not do what it is to do any more.
    assert (found.up >= up, found.down >= down, found.episodes >= episodes) == (True, True, True), found
    assert {"commit", "ack", "start", "the answer to start", "containers", "attach"} <= found.effects
    assert {"interrupted", "conflict"} <= found.codes, "what a crash leaves unknown is said to be so"
    assert {"supervisor_lost", "node_rebooted"} <= found.reasons


@pytest.mark.timeout(3600)
@pytest.mark.skipif(os.environ.get("SANDFLEET_MODEL") != "whole", reason="SANDFLEET_MODEL=whole asks for it")
async def test_every_command_in_every_state() -> None:
    found = await explored(tuple(COMMANDS))
    # The table lets a container go from any state, but the end of its run is told first.
    unused = {(state, Life.REMOVED) for state in lifecycle.LIVE}
    assert found.steps == STEPS - unused, "every other step of the table was seen"
    assert (found.up >= 15, found.down >= 1500) == (True, True), found


# -- the model notices: each of these is a rule that somebody might get wrong


def nothing_is_lost(real: Any) -> Any:
    def wrong(*facts: Any) -> Finding:
        found = real(*facts)
        return Finding(fate=Fate.RUNS) if found.fate is Fate.LOST else found

    return wrong


def never_begun(real: Any) -> Any:
    return lambda *facts: replace(real(*facts), began=False)


def nothing_leaves(real: Any) -> Any:
    return lambda *facts: replace(real(*facts), leaves=False)


def patched_reconcile(make: Callable[[Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(runtime, "reconcile", make(runtime.reconcile))


def another_table(patch: pytest.MonkeyPatch) -> None:
    wrong = dict(TRANSITIONS) | {(Life.RUNNING, Trigger.EXIT): Life.PENDING}
    patch.setattr(lifecycle, "TRANSITIONS", wrong)


def stop_is_nothing(patch: pytest.MonkeyPatch) -> None:
    wrong = dict(VERBS) | {"stop": {**VERBS["stop"], Life.RUNNING: Verdict.OK}}
    patch.setattr(lifecycle, "VERBS", wrong)


def remove_leaves_the_process(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ender, "end_run_now", _nothing)


async def _nothing(*_: Any, **__: Any) -> None:
    return None


def recovers_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Tx, "accepted_commands", lambda tx: [])


def ledger_remembers_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Tx, "command", lambda tx, command_id: None)


def repeats_are_silent(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(handlers.CommandHandler, "_write_duplicate", lambda *_: None)


def launcher_keeps_everything(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ender, "forget", _nothing)


def ports_stay(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Runtime, "_guard_at_rest", _nothing)


def early_exits_are_dropped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ender, "apply_exit", _only_when_running(Ender.apply_exit))


def _only_when_running(real: Any) -> Any:
    async def wrong(self: Any, actor: Any, ended: Any) -> None:
        if actor.state is not Life.INITIALIZING:
            await real(self, actor, ended)

    return wrong


RUN = ("run", "stop", "remove")
GONE = ("create-gone", "start")
DEFECTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], tuple[str, ...]]] = {
    "a run is never lost": (patched_reconcile(nothing_is_lost), RUN),
    "a start that was answered to nobody is forgotten": (patched_reconcile(never_begun), RUN),
    "what was to go stays": (patched_reconcile(nothing_leaves), GONE),
    "an exit leads elsewhere": (another_table, RUN),
    "a stop does nothing": (stop_is_nothing, RUN),
    "a remove leaves the process": (remove_leaves_the_process, RUN),
    "nothing is recovered": (recovers_nothing, RUN),
    "the ledger remembers nothing": (ledger_remembers_nothing, RUN),
    "a repetition is not answered": (repeats_are_silent, RUN),
    "the launcher is never told to forget": (launcher_keeps_everything, RUN),
    "a new launcher does not hold the ports": (ports_stay, RUN),
    "an exit before the start is told is dropped": (early_exits_are_dropped, RUN),
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("defect", DEFECTS)
async def test_a_wrong_rule_is_found(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil, commands = DEFECTS[defect]
    spoil(monkeypatch)
    with pytest.raises(Violation):
        await asyncio.wait_for(explored(commands), 600)
