"""Every command. A body is decoded strictly: an unknown field or verb is an error that names it."""

from datetime import datetime
from typing import Annotated

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


class LoadImage(Command, frozen=True, kw_only=True, tag="load_image"):
    """Take in the images of an archive. `image` names the one of an archive that holds one, whatever it says."""

    source_file: str
    image: str | None = None


class PushImage(Command, frozen=True, kw_only=True, tag="push_image"):
    """Send an image of the store to a registry, as `target`. `auth` is the name of a secret of the node."""

    image: str
    target: str
    auth: str | None = None


class TagImage(Command, frozen=True, kw_only=True, tag="tag_image"):
    source: str
    target: str


class RemoveImage(Command, frozen=True, kw_only=True, tag="remove_image"):
    image: str
    force: bool = False


class PruneImages(Command, frozen=True, kw_only=True, tag="prune_images"):
    """Images without a name and a container go; with these also named ones that no container was made of.

    `older_than_s`: those that were not used for so long; `keep_bytes`: the least recently used, until the store has
    no more than that. With both, of the former as many as the latter needs.
    """

    older_than_s: float | None = None
    keep_bytes: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] | None = None


class VerifyImages(Command, frozen=True, kw_only=True, tag="verify_images"):
    """Read every byte of `image`, or of all. `repair`: pull what was damaged again, by the name it has."""

    image: str | None = None
    repair: bool = False


class CreateVolume(Command, frozen=True, kw_only=True, tag="create_volume"):
    name: str
    size: str | int | None = None


class RemoveVolume(Command, frozen=True, kw_only=True, tag="remove_volume"):
    """`force`: also the mirror of an s3 volume that holds what is not in its bucket yet."""

    name: str
    force: bool = False


class Drain(Command, frozen=True, kw_only=True, tag="drain"):
    timeout_s: float | None = None
    stop_containers: bool = False


class Resume(Command, frozen=True, kw_only=True, tag="resume"):
    pass


ContainerCommand = Create | Start | Run | Stop | Kill | Restart | Remove
VolumeCommand = CreateVolume | RemoveVolume
NodeCommand = (
    PullImage
    | RegisterImage
    | LoadImage
    | PushImage
    | TagImage
    | RemoveImage
    | PruneImages
    | VerifyImages
    | CreateVolume
    | RemoveVolume
    | Drain
    | Resume
)
AnyCommand = ContainerCommand | NodeCommand

CONTAINER_VERBS = ("create", "start", "run", "stop", "kill", "restart", "remove")
NODE_VERBS = (
    "pull_image",
    "register_image",
    "load_image",
    "push_image",
    "tag_image",
    "remove_image",
    "prune_images",
    "verify_images",
    "create_volume",
    "remove_volume",
    "drain",
    "resume",
)
RESERVED_VERBS = ("update", "pause", "unpause", "copy_in", "copy_out", "pull_artifact")
