"""One accepted command on its way to its completion, and what is written of it."""

import asyncio
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum, auto
from typing import Any, NamedTuple

import msgspec

from schemas.commands import AnyCommand
from schemas.errors import ContractError
from schemas.events import CommandCompleted, ImageAction, ImageChanged, StateChanged
from schemas.status import ContainerStatus, State
from schemas.subjects import Subjects
from worker.errors import Conflict
from worker.images.model import ImageInfo
from worker.journal import EventHead, Tx
from worker.platform.base import SandboxPolicy
from worker.records import ContainerRecord, encode_record
from worker.supervisor_types import StartRequest

DEFAULT_DEADLINE = timedelta(hours=24)
STARTS = frozenset({"create", "run", "start", "restart"})
OVERTAKERS = frozenset({"stop", "kill", "remove"})
ENDING = OVERTAKERS | {"resume"}  # what may end the wait of others

_encoder = msgspec.json.Encoder()


class Phase(Enum):
    """How far a running command is, which decides what may overtake it."""

    WAITING = auto()
    CREATING = auto()
    STARTING = auto()
    STOPPING = auto()
    OTHER = auto()


class PreparedStart(NamedTuple):
    """A run of an instance, and what the launcher is asked for it."""

    instance: str
    run: int
    policy: SandboxPolicy
    request: StartRequest


@dataclass(slots=True, eq=False)
class Work:
    """An accepted command. `seq` and `time` are its place in the command stream.

    `recovered` is one that a dead worker had accepted, `internal` one of our own that no ledger knows. `size`: of its
    body, in bytes; `weight`: in memory, at most. `prepared`: the start that it leads to, made while the journal was
    writing.
    """

    command: AnyCommand
    verb: str
    container: str | None
    seq: int
    time: datetime
    headers: dict[str, str] | None = None
    size: int = 0
    weight: int = 0
    recovered: bool = False
    internal: bool = False
    phase: Phase = Phase.WAITING
    overtaken_by: str | None = None
    overtook: bool = False
    completed: bool = False
    prepared: PreparedStart | None = None
    overtaken: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def id(self) -> str:
        return self.command.id

    @property
    def deadline(self) -> datetime:
        return self.command.deadline or self.time + DEFAULT_DEADLINE

    def is_late(self, now: datetime) -> bool:
        return now > self.deadline

    def overtake(self, by: "Work") -> None:
        self.overtaken_by = by.verb
        by.overtook = True
        self.overtaken.set()

    def refuse_if_overtaken(self) -> None:
        """Raises the Conflict in which an overtaken command ends."""
        if self.overtaken_by is not None:
            raise Conflict(f"overtaken by a later {self.overtaken_by}")

    def precedes(self, other: "Work") -> bool:
        """True when this command stands before `other` in the stream.

        Both sequence and time must say so: a stream that was made anew counts from 1 again.
        """
        return self.seq < other.seq and self.time <= other.time


def now_utc() -> datetime:
    return datetime.now(UTC)


def write_completion(
    tx: Tx,
    subjects: Subjects,
    work: Work,
    *,
    error: ContractError | None,
    status: ContainerStatus | None,
    result: dict[str, Any] | None = None,
) -> None:
    """Write the one `command_completed` of a command and its result into the ledger."""
    if work.internal:
        return

    def make(head: EventHead) -> CommandCompleted:
        return CommandCompleted(
            node=head.node,
            epoch=head.epoch,
            boot=head.boot,
            seq=head.seq,
            time=head.time,
            container=work.container,
            instance=None if status is None else status.instance,
            command_id=work.id,
            command=work.verb,
            ok=error is None,
            error=None if error is None else error.to_error(),
            status=status,
            result=result,
        )

    event = tx.event(subjects.command_event(tx.node, work.container), make, headers=work.headers)
    tx.complete(work.id, _encoder.encode(event), event.time)


def write_image(tx: Tx, subjects: Subjects, work: Work | None, image: ImageInfo, action: ImageAction) -> None:
    """Write an `image_changed`; without `work` the node did it by itself."""

    def make(head: EventHead) -> ImageChanged:
        return ImageChanged(
            node=head.node,
            epoch=head.epoch,
            boot=head.boot,
            seq=head.seq,
            time=head.time,
            command_id=None if work is None or work.internal else work.id,
            image=image.name,
            digest=image.digest,
            action=action,
            bytes=image.bytes,
        )

    tx.event(subjects.image_event(tx.node), make, headers=None if work is None else work.headers)


def write_state(
    tx: Tx,
    subjects: Subjects,
    before: State | None,
    record: ContainerRecord,
    work: Work | None,
    *,
    repeat: bool = False,
) -> None:
    """Write a `state_changed` and keep the record it tells of; a removed container's record goes."""
    status = record.status

    def make(head: EventHead) -> StateChanged:
        return StateChanged(
            node=head.node,
            epoch=head.epoch,
            boot=head.boot,
            seq=head.seq,
            time=head.time,
            container=status.container,
            instance=status.instance,
            command_id=None if work is None or work.internal else work.id,
            from_=before,
            status=status,
            repeat=repeat,
        )

    tx.event(subjects.state(tx.node, status.container), make, headers=None if work is None else work.headers)
    if status.state is State.REMOVED:
        tx.delete_container(status.container)
    else:
        tx.put_container(status.container, status.instance, encode_record(record))
