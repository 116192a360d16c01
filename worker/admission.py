"""Whether a command of a container may begin: its deadline, its instance, the verb table. Pure.

Past its deadline only what was begun goes on; of a command that a dead worker had accepted, the container's record
tells whether it was.
"""

from collections.abc import Callable
from datetime import datetime
from enum import Enum, auto

from schemas.commands import Create, Kill, Remove, Restart, Run, Start, Stop
from schemas.status import Reason, State
from worker.errors import Conflict, DeadlineExceeded, Interrupted, NotFound
from worker.lifecycle import Verdict, verdict
from worker.records import ContainerRecord
from worker.work import STARTS, Work


def admit(
    work: Work, cid: str, record: ContainerRecord | None, now: datetime, *, leaving: Callable[[], bool]
) -> Verdict:
    """What the verb does now. Raises the error that the command ends in.

    `leaving` tells whether some of the container's directory is gone already; it is asked only when that counts.
    """
    if work.is_late(now):
        _refuse_late(work, record, leaving)
    wanted = work.command.if_instance
    if wanted is not None and record is not None and record.status.instance != wanted:
        raise Conflict(f"{cid} is instance {record.status.instance}, not {wanted}", field="if_instance")
    if wanted is not None and record is None and work.verb in {"create", "run"}:
        raise Conflict(f"{cid} has no instance {wanted}", field="if_instance")
    state = None if record is None else record.status.state
    found = verdict(
        work.verb,
        state,
        replace=getattr(work.command, "replace", False),
        force=getattr(work.command, "force", True),
    )
    if found is Verdict.NOT_FOUND and not work.overtook:
        raise NotFound(f"there is no container {cid}", field="container")
    if found is Verdict.CONFLICT and not work.overtook and not _continues(work, record):
        raise Conflict(f"{work.verb} is not possible: {cid} is {state}")
    return found


def _continues(work: Work, record: ContainerRecord | None) -> bool:
    """A create that a dead worker had begun finds the container it made itself, a kill the one that it may have
    ended.
    """
    if not work.recovered or record is None:
        return False
    if isinstance(work.command, Kill):
        return record.status.state in (State.EXITED, State.FAILED)
    return record.created_by == work.id


def was_dropped(work: Work, record: ContainerRecord | None, *, waited: bool) -> bool:
    """Whether a recovered command that a later one may overtake was dropped by it: one that was applied since.

    `waited`: an earlier command of the container has not ended, so this one cannot have begun.
    """
    return work.verb in STARTS and (waited or begun_before(work, record, leaving=False) is Begun.NO)


def _refuse_late(work: Work, record: ContainerRecord | None, leaving: Callable[[], bool]) -> None:
    begun = begun_before(work, record, leaving=leaving()) if work.recovered else Begun.NO
    if begun is Begun.NO:
        raise DeadlineExceeded(f"the deadline {work.deadline.isoformat()} passed before {work.verb} began")
    if begun is Begun.UNKNOWN:
        raise Interrupted(
            f"the worker died before it knew whether {work.verb} was begun, and its deadline has passed since"
        )


class Begun(Enum):
    YES = auto()
    NO = auto()
    UNKNOWN = auto()


def begun_before(work: Work, record: ContainerRecord | None, *, leaving: bool) -> Begun:
    """What the record of its container tells of a recovered command.

    `leaving`: some of the container's directory is gone already. A command with a first step of its own is begun in
    the very transaction that accepts it, unless it had to wait.
    """
    command = work.command
    if record is None:
        replaced = isinstance(command, Create | Run) and command.replace
        return Begun.UNKNOWN if replaced else Begun.NO
    if work.id in (record.created_by, record.started_by):
        return Begun.YES
    state = record.status.state
    ending = record.intent is not None or state is State.STOPPING
    if isinstance(command, Create | Run):
        return Begun.YES if command.replace and (ending or leaving) else Begun.NO
    if isinstance(command, Stop):
        return Begun.YES if ending or state in (State.EXITED, State.FAILED) else Begun.NO
    if isinstance(command, Restart):
        stopped = record.intent is Reason.STOPPED
        return Begun.YES if stopped or state is State.STOPPING else Begun.NO
    if isinstance(command, Remove):
        return Begun.YES if leaving or record.intent is Reason.KILLED else Begun.NO
    if isinstance(command, Kill):
        return Begun.UNKNOWN if state in (State.RUNNING, State.STOPPING) else Begun.NO
    return Begun.NO if isinstance(command, Start) else Begun.UNKNOWN
