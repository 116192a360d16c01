"""What became of a container while no worker looked: each combination of facts, and its one answer."""

from typing import Any

import pytest

from schemas.spec import CommandSpec, ServiceSpec
from schemas.spec_life import LifecycleSpec
from schemas.spec_parts import ImageSpec
from schemas.status import ContainerStatus, Reason, State
from worker.reconcile import Fate, launcher_died, reconcile, tells_all
from worker.records import ContainerRecord
from worker.supervisor_types import ExitRecord, LaunchedContainer

NOW, BEFORE = "boot-2", "boot-1"


def record(state: State, *, run: int = 2, gone: bool = False, **fields: Any) -> ContainerRecord:
    spec = ServiceSpec(
        image=ImageSpec(name="base"), command=CommandSpec(), lifecycle=LifecycleSpec(delete_on_exit=gone)
    )
    reason = fields.pop("reason", None)
    status = ContainerStatus(
        container="a-0", service="a", replica=0, instance="I", state=state, run=run, reason=reason
    )
    return ContainerRecord(status=status, spec=spec, **({"boot_id": NOW} | fields))


def exit_of(run: int = 2, instance: str = "I") -> ExitRecord:
    return ExitRecord(cid="a-0", instance=instance, run=run, exit_code=3, finished_at_us=1)


def launched(run: int = 2, instance: str = "I", ended: bool = False) -> LaunchedContainer:
    return LaunchedContainer(
        cid="a-0",
        instance=instance,
        run=run,
        pid=5,
        start_time=1,
        started_at_us=1,
        shim_pid=4,
        shim_start_time=1,
        exit=exit_of(run, instance) if ended else None,
    )


@pytest.mark.parametrize(
    ("known", "found", "recorded", "fate", "more"),
    [
        (record(State.PENDING, run=0), None, None, Fate.AT_REST, {}),
        (record(State.EXITED), launched(ended=True), None, Fate.AT_REST, {"forget": True}),
        (record(State.EXITED), launched(), None, Fate.AT_REST, {"stranger": True}),
        (record(State.EXITED), launched(instance="J"), None, Fate.AT_REST, {"stranger": True}),
        (record(State.RUNNING), launched(), None, Fate.RUNS, {"began": False}),
        (record(State.INITIALIZING), launched(), None, Fate.RUNS, {"began": True}),
        (record(State.STOPPING), launched(), None, Fate.STOPS, {}),
        (record(State.RUNNING), launched(), exit_of(), Fate.RUNS, {}),
        (record(State.RUNNING), launched(ended=True), None, Fate.ENDED, {"exit": exit_of()}),
        (record(State.RUNNING), None, exit_of(), Fate.ENDED, {"exit": exit_of()}),
        (record(State.RUNNING, boot_id=BEFORE), None, exit_of(), Fate.ENDED, {}),
        (record(State.INITIALIZING), None, exit_of(), Fate.ENDED, {"began": True}),
        (record(State.RUNNING), None, exit_of(1), Fate.LOST, {"reason": Reason.SUPERVISOR_LOST}),
        (record(State.RUNNING), None, exit_of(2, "J"), Fate.LOST, {"reason": Reason.SUPERVISOR_LOST}),
        (record(State.RUNNING), launched(1), None, Fate.LOST, {"stranger": True}),
        (record(State.RUNNING, boot_id=BEFORE), None, None, Fate.LOST, {"reason": Reason.NODE_REBOOTED}),
        (record(State.INITIALIZING), None, None, Fate.LOST, {"reason": Reason.SUPERVISOR_LOST}),
        (record(State.INITIALIZING), launched(1, ended=True), None, Fate.LOST, {"began": False}),
    ],
)
def test_the_facts_and_what_they_come_to(
    known: ContainerRecord,
    found: LaunchedContainer | None,
    recorded: ExitRecord | None,
    fate: Fate,
    more: dict[str, object],
) -> None:
    finding = reconcile(known, found, recorded, NOW)
    assert finding.fate is fate
    assert {name: getattr(finding, name) for name in more} == more
    assert (finding.fate is Fate.LOST) == (finding.reason is not None) == (finding.message is not None)
    assert (finding.fate is Fate.ENDED) == (finding.exit is not None)


@pytest.mark.parametrize(
    ("known", "found", "words"),
    [
        (record(State.INITIALIZING), None, "before the launcher was told"),
        (record(State.INITIALIZING, shim_pid=9), launched(1, ended=True), "before the launcher was told"),
        (record(State.INITIALIZING, shim_pid=9), None, "the launcher that ran it is gone"),
        (record(State.RUNNING, shim_pid=9), None, "the launcher that ran it is gone"),
    ],
)
def test_a_loss_says_what_is_known(
    known: ContainerRecord, found: LaunchedContainer | None, words: str
) -> None:
    assert words in (reconcile(known, found, None, NOW).message or "")


@pytest.mark.parametrize(
    ("known", "leaves"),
    [
        (record(State.EXITED, gone=True), True),
        (record(State.EXITED, gone=True, run=0), False),
        (record(State.FAILED, gone=True, reason=Reason.SUPERVISOR_LOST), True),
        (record(State.FAILED, gone=True, reason=Reason.NODE_REBOOTED), True),
        (record(State.FAILED, gone=True, reason=Reason.EXEC_FAILED), False),
        (record(State.EXITED), False),
        (record(State.PENDING, gone=True, run=0), False),
    ],
)
def test_what_was_to_go_when_it_ended_goes(known: ContainerRecord, leaves: bool) -> None:
    assert reconcile(known, None, None, NOW).leaves is leaves


@pytest.mark.parametrize(
    ("known", "recorded", "fate"),
    [
        (record(State.RUNNING), exit_of(), Fate.ENDED),
        (record(State.RUNNING), exit_of(1), Fate.LOST),
        (record(State.INITIALIZING), exit_of(), Fate.LOST),
        (record(State.STOPPING), None, Fate.LOST),
        (record(State.EXITED), exit_of(), Fate.AT_REST),
    ],
)
def test_a_launcher_that_dies_under_a_workers_eyes(
    known: ContainerRecord, recorded: ExitRecord | None, fate: Fate
) -> None:
    assert launcher_died(known, recorded).fate is fate


def test_the_disk_is_asked_only_where_the_launcher_does_not_know() -> None:
    status = record(State.RUNNING).status
    assert tells_all(launched(), status)
    assert not tells_all(launched(1), status)
    assert not tells_all(launched(instance="J"), status)
    assert not tells_all(None, status)
