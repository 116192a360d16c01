"""Whether a command may begin: past its deadline only what was begun goes on."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from schemas.commands import ContainerCommand, Create, Kill, Remove, Restart, Run, Start, Stop
from schemas.spec import CommandSpec, ServiceSpec
from schemas.spec_parts import ImageSpec
from schemas.status import ContainerStatus, Reason, State
from worker.admission import Begun, admit, begun_before
from worker.errors import DeadlineExceeded, Interrupted
from worker.records import ContainerRecord
from worker.work import Work

SPEC = ServiceSpec(image=ImageSpec(name="base"), command=CommandSpec())
YES, NO, UNKNOWN = Begun.YES, Begun.NO, Begun.UNKNOWN


def record(state: State, **fields: Any) -> ContainerRecord:
    status = ContainerStatus(container="a-0", service="a", replica=0, instance="I", state=state)
    return ContainerRecord(status=status, spec=SPEC, **fields)


NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


def work_of(command: ContainerCommand, *, recovered: bool = True, time: datetime = NOW) -> Work:
    verb = str(type(command).__struct_config__.tag)
    return Work(command=command, verb=verb, container="a-0", seq=1, time=time, recovered=recovered)


def judge(command: ContainerCommand, found: ContainerRecord | None, *, leaving: bool = False) -> Begun:
    return begun_before(work_of(command), found, leaving=leaving)


RUNNING = record(State.RUNNING, created_by="other", started_by="other")


@pytest.mark.parametrize(
    ("command", "found", "expected"),
    [
        (Create(id="c", spec=SPEC), None, NO),
        (Create(id="c", spec=SPEC), record(State.PENDING, created_by="c"), YES),
        (Create(id="c", spec=SPEC), RUNNING, NO),
        (Run(id="c", spec=SPEC, replace=True), None, UNKNOWN),
        (Run(id="c", spec=SPEC, replace=True), RUNNING, NO),
        (Run(id="c", spec=SPEC, replace=True), record(State.RUNNING, intent=Reason.KILLED), YES),
        (Start(id="c"), record(State.EXITED, started_by="other"), NO),
        (Start(id="c"), record(State.INITIALIZING, started_by="c"), YES),
        (Stop(id="c"), RUNNING, NO),
        (Stop(id="c"), record(State.STOPPING, intent=Reason.STOPPED), YES),
        (Stop(id="c"), record(State.EXITED), YES),
        (Restart(id="c"), RUNNING, NO),
        (Restart(id="c"), record(State.EXITED), NO),
        (Restart(id="c"), record(State.EXITED, intent=Reason.STOPPED), YES),
        (Restart(id="c"), record(State.RUNNING, started_by="c"), YES),
        (Kill(id="c"), RUNNING, UNKNOWN),
        (Kill(id="c"), record(State.EXITED), NO),
        (Remove(id="c"), RUNNING, NO),
        (Remove(id="c"), None, NO),
        (Remove(id="c"), record(State.EXITED, intent=Reason.KILLED), YES),
    ],
)
def test_what_the_record_tells(
    command: ContainerCommand, found: ContainerRecord | None, expected: Begun
) -> None:
    assert judge(command, found) is expected


def test_a_directory_that_is_going_tells_of_a_remove() -> None:
    assert judge(Remove(id="c"), record(State.EXITED)) is NO
    assert judge(Remove(id="c"), record(State.EXITED), leaving=True) is YES


DAY = timedelta(days=1)


@pytest.mark.parametrize(
    ("work", "late"),
    [
        (work_of(Stop(id="c"), recovered=False, time=NOW - DAY), False),
        (work_of(Stop(id="c"), recovered=False, time=NOW - DAY - timedelta(microseconds=1)), True),
        (work_of(Stop(id="c", deadline=NOW), recovered=False, time=NOW - 3 * DAY), False),
        (work_of(Stop(id="c", deadline=NOW - timedelta(microseconds=1)), recovered=False), True),
    ],
    ids=["a day", "longer", "its own deadline", "its own deadline, passed"],
)
def test_a_deadline_is_a_day_after_it_was_stored_unless_it_says_otherwise(work: Work, late: bool) -> None:
    if late:
        with pytest.raises(DeadlineExceeded):
            admit(work, "a-0", RUNNING, NOW, leaving=lambda: False)
    else:
        admit(work, "a-0", RUNNING, NOW, leaving=lambda: False)


def test_what_a_dead_worker_left_is_late_or_interrupted_or_goes_on() -> None:
    late = NOW + 2 * DAY
    with pytest.raises(DeadlineExceeded):
        admit(work_of(Stop(id="c")), "a-0", RUNNING, late, leaving=lambda: False)
    with pytest.raises(Interrupted):
        admit(work_of(Kill(id="c")), "a-0", RUNNING, late, leaving=lambda: False)
    stopping = record(State.STOPPING, intent=Reason.STOPPED)
    admit(work_of(Stop(id="c")), "a-0", stopping, late, leaving=lambda: False)
