"""Everything a node says on its event subjects. Readers ignore unknown fields and skip unknown types."""

from datetime import datetime
from typing import Any

import msgspec

from .errors import Error, OpenEnum
from .node import NodeInfo, NodeState
from .status import ContainerStatus, Health, State


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """The head that every event has. `seq` counts 1, 2, 3 … within `epoch`, across restarts."""

    node: str
    epoch: str
    boot: str
    seq: int
    time: datetime
    container: str | None = None
    instance: str | None = None
    command_id: str | None = None


class StateChanged(Event, frozen=True, kw_only=True, tag="state_changed"):
    from_: State | None = msgspec.field(default=None, name="from")
    status: ContainerStatus
    repeat: bool = False


class HealthChanged(Event, frozen=True, kw_only=True, tag="health_changed"):
    health: Health
    detail: str | None
    status: ContainerStatus


class CommandAccepted(Event, frozen=True, kw_only=True, tag="command_accepted"):
    command: str
    actor: str | None = None


class CommandCompleted(Event, frozen=True, kw_only=True, tag="command_completed"):
    command: str
    ok: bool
    error: Error | None
    duplicate: bool = False
    status: ContainerStatus | None
    result: dict[str, Any] | None = None


class CommandRejected(Event, frozen=True, kw_only=True, tag="command_rejected"):
    """`size` and `sha256` (hex) are of the body, whose text is never echoed."""

    error: Error
    subject: str
    size: int
    sha256: str


class ImageAction(OpenEnum):
    PULLED = "pulled"
    LOADED = "loaded"
    REGISTERED = "registered"
    TAGGED = "tagged"
    REMOVED = "removed"
    PRUNED = "pruned"


class ImageChanged(Event, frozen=True, kw_only=True, tag="image_changed"):
    image: str
    digest: str
    action: ImageAction
    bytes: int


class NodeChanged(Event, frozen=True, kw_only=True, tag="node_changed"):
    state: NodeState
    info: NodeInfo


class JobState(OpenEnum):
    CLAIMED = "claimed"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    REQUEUED = "requeued"
    CANCELLED = "cancelled"


class JobChanged(Event, frozen=True, kw_only=True, tag="job_changed"):
    job_id: str
    pool: str
    attempt: int
    state: JobState
    status: ContainerStatus | None
    error: Error | None


class ImagePhase(OpenEnum):
    RESOLVING = "resolving"
    DOWNLOADING = "downloading"
    UNPACKING = "unpacking"
    PACKING = "packing"
    UPLOADING = "uploading"
    DONE = "done"


class LayerProgress(msgspec.Struct, frozen=True, kw_only=True):
    """One layer of an image, as the registry has it. A layer that was here already is done."""

    digest: str
    bytes_done: int
    bytes_total: int


class ImageProgress(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="image_progress"):
    """On `P.progress.<node>.image`, core NATS, without a sequence. Sizes are those of the layers as they are
    fetched; until these are known there are no layers."""

    node: str
    time: datetime
    image: str
    layers: int
    bytes_done: int
    bytes_total: int | None
    phase: ImagePhase | None = None
    by_layer: tuple[LayerProgress, ...] = ()


AnyEvent = (
    StateChanged
    | HealthChanged
    | CommandAccepted
    | CommandCompleted
    | CommandRejected
    | ImageChanged
    | NodeChanged
    | JobChanged
)
