"""What became of a container while no worker looked, and what a new one does about it. Pure.

The facts: the journal's record, what the launcher has under that name, and the exit record on the disk, which a
launcher writes before it tells anyone. What the launcher runs outweighs the disk, and both outweigh the record.
"""

from dataclasses import dataclass
from enum import Enum, auto

from schemas.status import ContainerStatus, Reason, State
from worker.lifecycle import LIVE
from worker.records import ContainerRecord
from worker.supervisor_types import ExitRecord, LaunchedContainer


class Fate(Enum):
    """What the run came to, and so what is to be done."""

    AT_REST = auto()  # nothing ran
    RUNS = auto()
    STOPS = auto()  # it runs, and a stop of it goes on
    ENDED = auto()  # `exit` tells how
    LOST = auto()  # nobody can tell how; `reason` and `message` say why


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """`began`: the program was reached, which the journal does not know yet. `stranger`: what the launcher runs is none
    of this record's. `forget`: the launcher keeps an exit that the journal has. `leaves`: it was to go when it ended.
    """

    fate: Fate
    began: bool = False
    exit: ExitRecord | None = None
    reason: Reason | None = None
    message: str | None = None
    stranger: bool = False
    forget: bool = False
    leaves: bool = False


def reconcile(
    record: ContainerRecord, found: LaunchedContainer | None, recorded: ExitRecord | None, boot_id: str
) -> Finding:
    """`recorded` counts only where the launcher has nothing of its own to tell; `boot_id` is the machine's of now."""
    status = record.status
    stranger = found is not None and _is_stranger(found, status)
    ours = None if stranger else found
    if status.state not in LIVE:
        return Finding(
            fate=Fate.AT_REST, stranger=stranger, forget=ours is not None, leaves=_is_to_leave(record)
        )
    began = status.state is State.INITIALIZING
    if ours is not None and ours.exit is None:
        fate = Fate.STOPS if status.state is State.STOPPING else Fate.RUNS
        return Finding(fate=fate, began=began)
    ended = recorded if ours is None else ours.exit
    if ended is not None and is_of(ended, status):
        return Finding(fate=Fate.ENDED, began=began, exit=ended, stranger=stranger)
    if record.boot_id is not None and record.boot_id != boot_id:
        reason, message = Reason.NODE_REBOOTED, "the machine was restarted while it ran"
    elif began and (ours is not None or record.shim_pid is None):
        # An older exit that a launcher still has was of the same launcher: it would know of this run.
        reason, message = Reason.SUPERVISOR_LOST, "the worker died before the launcher was told to start it"
    else:
        reason, message = Reason.SUPERVISOR_LOST, "the launcher that ran it is gone"
    return Finding(fate=Fate.LOST, reason=reason, message=message, stranger=stranger)


def launcher_died(record: ContainerRecord, recorded: ExitRecord | None) -> Finding:
    """The same when the launcher dies under a worker's eyes. A start that is under way answers for itself."""
    status = record.status
    if status.state not in LIVE:
        return Finding(fate=Fate.AT_REST)
    if recorded is not None and is_of(recorded, status) and status.state is not State.INITIALIZING:
        return Finding(fate=Fate.ENDED, exit=recorded)
    return Finding(fate=Fate.LOST, reason=Reason.SUPERVISOR_LOST, message="the launcher died while it ran")


def tells_all(found: LaunchedContainer | None, status: ContainerStatus) -> bool:
    """Whether the launcher knows this very run, so that nothing on the disk is asked."""
    return found is not None and (found.instance, found.run) == (status.instance, status.run)


def is_of(ended: ExitRecord, status: ContainerStatus) -> bool:
    return (ended.instance, ended.run) == (status.instance, status.run)


def _is_stranger(found: LaunchedContainer, status: ContainerStatus) -> bool:
    """Whether it is another instance than the journal's, or a run that the journal does not know to be alive."""
    if found.instance != status.instance:
        return True
    return found.exit is None and (status.state not in LIVE or found.run != status.run)


def _is_to_leave(record: ContainerRecord) -> bool:
    """Whether a run of it has ended, and it was to go then: a dead worker may have been about to remove it."""
    status = record.status
    ended = status.state is State.EXITED or status.reason in (Reason.SUPERVISOR_LOST, Reason.NODE_REBOOTED)
    return record.spec.lifecycle.delete_on_exit and status.run > 0 and ended
