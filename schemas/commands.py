"""Every command. A body is decoded strictly: an unknown field or verb is an error that names it."""

from datetime import datetime

import msgspec

from .spec import PullPolicy, ServiceSpec


class Command(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    tag_field="type",
    forbid_unknown_fields=True,
    omit_defaults=True,
):
    """The head of every command. Past `deadline` it is not begun; `if_instance` guards against a newer one."""

    id: str
    deadline: datetime | None = None
    actor: str | None = None
    if_instance: str | None = None


class Create(Command, frozen=True, kw_only=True, tag="create"):
    spec: ServiceSpec
    replace: bool = False


class Start(Command, frozen=True, kw_only=True, tag="start"):
    pass


class Run(Command, frozen=True, kw_only=True, tag="run"):
    spec: ServiceSpec
    replace: bool = False


class Stop(Command, frozen=True, kw_only=True, tag="stop"):
    timeout_s: float | None = None


class Kill(Command, frozen=True, kw_only=True, tag="kill"):
    signal: str = "SIGKILL"


class Restart(Command, frozen=True, kw_only=True, tag="restart"):
    timeout_s: float | None = None


class Remove(Command, frozen=True, kw_only=True, tag="remove"):
    force: bool = True


class PullImage(Command, frozen=True, kw_only=True, tag="pull_image"):
    image: str
    policy: PullPolicy = PullPolicy.IF_NOT_PRESENT
    auth: str | None = None


class RegisterImage(Command, frozen=True, kw_only=True, tag="register_image"):
    image: str
    source_dir: str


class TagImage(Command, frozen=True, kw_only=True, tag="tag_image"):
    source: str
    target: str


class RemoveImage(Command, frozen=True, kw_only=True, tag="remove_image"):
    image: str
    force: bool = False


class PruneImages(Command, frozen=True, kw_only=True, tag="prune_images"):
    pass


class Drain(Command, frozen=True, kw_only=True, tag="drain"):
    timeout_s: float | None = None
    stop_containers: bool = False


class Resume(Command, frozen=True, kw_only=True, tag="resume"):
    pass


ContainerCommand = Create | Start | Run | Stop | Kill | Restart | Remove
NodeCommand = PullImage | RegisterImage | TagImage | RemoveImage | PruneImages | Drain | Resume
AnyCommand = ContainerCommand | NodeCommand

CONTAINER_VERBS = ("create", "start", "run", "stop", "kill", "restart", "remove")
NODE_VERBS = (
    "pull_image",
    "register_image",
    "tag_image",
    "remove_image",
    "prune_images",
    "drain",
    "resume",
)
RESERVED_VERBS = ("update", "pause", "unpause", "copy_in", "copy_out", "pull_artifact")
