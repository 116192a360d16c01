"""Whether a command that a dead worker had accepted was begun: past its deadline only what was begun goes on. Pure."""

from enum import Enum, auto

from schemas.commands import Create, Kill, Remove, Restart, Run, Start, Stop
from schemas.status import Reason, State
from worker.records import ContainerRecord
from worker.work import Work


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
