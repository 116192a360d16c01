"""Queries of `P.rpc.<node>.<verb>`: what is asked, strictly; what is answered, tolerantly.

A node sends every field of a reply, null where it does not apply; only `encoding` is left out of text.
"""

from datetime import datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated, Any, cast

import msgspec

from .decode import check_seconds, strict_decode, utc
from .errors import ErrorCode, InvalidCommand, InvalidSpec, OpenEnum, Unsupported
from .events import CommandCompleted, JobState
from .node import NodeInfo, NotEnforced
from .spec_model import ServiceSpec
from .spec_rules import check_env, check_labels
from .status import ContainerStatus, State, Stats
from .strict import MAX_COMMAND_BYTES
from .subjects import MAX_REPLICA, build_cid, parse_cid
from .values import check_argument, check_id, check_image, check_path, check_service, check_text, shorten

MAX_WAIT_S = 600.0
MAX_EXEC_S = 86400.0
MAX_SINCE_S = 7 * 86400.0
MAX_OUTPUT_BYTES = 256 * 1024
MAX_SAVED = 100
PIECE_BYTES = 256 * 1024
BASE64 = "base64"

# HTTP-like codes of the micro error headers.
ERROR_STATUS: dict[ErrorCode, int] = {
    ErrorCode.NOT_FOUND: 404,
    ErrorCode.CONFLICT: 409,
    ErrorCode.INVALID_COMMAND: 422,
    ErrorCode.INVALID_SPEC: 422,
    ErrorCode.POLICY_DENIED: 422,
    ErrorCode.UNSUPPORTED: 501,
    ErrorCode.UNAVAILABLE: 503,
    ErrorCode.DEADLINE_EXCEEDED: 503,
    ErrorCode.RESOURCE_EXHAUSTED: 503,
    ErrorCode.INTERRUPTED: 503,
    ErrorCode.CREATE_FAILED: 500,
    ErrorCode.START_FAILED: 500,
    ErrorCode.PULL_FAILED: 500,
    ErrorCode.CONFIGURATION: 500,
    ErrorCode.INTERNAL: 500,
}

Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Cells = Annotated[int, msgspec.Meta(ge=1, le=65535)]


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What all requests share: an unknown field is an error."""


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """What all replies share: unknown fields are ignored."""


class InfoRequest(Request, frozen=True, kw_only=True):
    pass


class ListRequest(Request, frozen=True, kw_only=True):
    """`labels`: all must match. `cursor` is that of the page before."""

    state: State | None = None
    labels: dict[str, str] | None = None
    cursor: str | None = None


class ListReply(Reply, frozen=True, kw_only=True):
    containers: list[ContainerStatus]
    cursor: str | None = None


class StateRequest(Request, frozen=True, kw_only=True):
    """`spec`: give the container's spec beside its status, as a further field `spec`."""

    container: str
    spec: bool = False


class CommandRequest(Request, frozen=True, kw_only=True):
    id: str


class CommandState(OpenEnum):
    ACCEPTED = "accepted"
    COMPLETED = "completed"


class CommandReply(Reply, frozen=True, kw_only=True):
    """`command` is its verb; `container` null for a command to the node."""

    id: str
    command: str
    container: str | None
    state: CommandState
    result: CommandCompleted | None = None


class StatsRequest(Request, frozen=True, kw_only=True):
    container: str


class LogStream(StrEnum):
    STDOUT = "stdout"
    STDERR = "stderr"
    BOTH = "both"


class LogsRequest(Request, frozen=True, kw_only=True):
    """The last `tail` lines (0: all from the first on), or those after `cursor`; none from before `since`."""

    container: str
    stream: LogStream = LogStream.BOTH
    tail: Count = 0
    since: datetime | None = None
    cursor: str | None = None


class LogLine(Reply, frozen=True, kw_only=True):
    time: datetime
    stream: str
    text: str
    encoding: str | msgspec.UnsetType | None = msgspec.UNSET


class LogsReply(Reply, frozen=True, kw_only=True):
    lines: list[LogLine]
    cursor: str | None


class WaitUntil(StrEnum):
    EXIT = "exit"
    FINAL = "final"


class WaitRequest(Request, frozen=True, kw_only=True):
    """`final`: exited and no restart is due."""

    container: str
    until: WaitUntil = WaitUntil.EXIT
    timeout_s: float = MAX_WAIT_S


class ExecRequest(Request, frozen=True, kw_only=True):
    """One shot, or with `stream` a session of frames. `encoding` "base64" says how `stdin` is written."""

    container: str
    argv: list[str]
    env: dict[str, str] | None = None
    workdir: str | None = None
    timeout_s: float = 60.0
    stdin: str | None = None
    encoding: str | None = None
    stream: bool = False
    session: str | None = None
    tty: bool = False
    rows: Cells | None = None
    cols: Cells | None = None


class ExecReply(Reply, frozen=True, kw_only=True):
    exit_code: int
    stdout: str
    stderr: str
    truncated: bool
    encoding: str | msgspec.UnsetType | None = msgspec.UNSET


class ExecSession(Reply, frozen=True, kw_only=True):
    """The reply to an exec with `stream`."""

    session: str


class ProfileRequest(Request, frozen=True, kw_only=True):
    """A container that is there, or what `spec` would give."""

    container: str | None = None
    service: str | None = None
    replica: Annotated[int, msgspec.Meta(ge=0, le=MAX_REPLICA)] = 0
    spec: ServiceSpec | None = None


class ProfileReply(Reply, frozen=True, kw_only=True):
    language: str
    text: str
    params: dict[str, str]
    policy: dict[str, Any]
    not_enforced: list[NotEnforced]


class CheckRequest(ProfileRequest, frozen=True, kw_only=True):
    """`operation` is read, write or exec of a path, connect to host:port, bind of a port, lookup of a
    service, gpu, or one of the platform's own.
    """

    operation: str
    argument: str | None = None


class Decision(OpenEnum):
    ALLOW = "allow"
    DENY = "deny"
    UNKNOWN = "unknown"


class CheckReply(Reply, frozen=True, kw_only=True):
    """`rule` is the deciding line of the profile's text, the `line`th from 1.

    `would_allow`, after a denial, are changes of the spec that were tried and would allow it.
    """

    decision: Decision
    rule: str | None
    line: int | None = None
    reason: str | None = None
    would_allow: list[str] | None = None


class ImagesRequest(Request, frozen=True, kw_only=True):
    pass


class ImageEntry(Reply, frozen=True, kw_only=True):
    """`containers` counts those made from it; `last_used_at`: a container was made of it then, or ended."""

    name: str
    digest: str
    bytes: int
    created_at: datetime
    containers: int
    last_used_at: datetime | None = None


class ImagesReply(Reply, frozen=True, kw_only=True):
    images: list[ImageEntry]


class VolumesRequest(Request, frozen=True, kw_only=True):
    """All volumes that have a name, or one. NotFound when there is no such."""

    name: str | None = None


class VolumeState(OpenEnum):
    """Of the mirror of an s3 volume: its container runs, it waits to be written back, all of it is in the bucket."""

    MIRRORING = "mirroring"
    WAITING = "waiting"
    WRITTEN_BACK = "written_back"


class VolumeEntry(Reply, frozen=True, kw_only=True):
    """`kind` is `named` or `s3`. `bytes` is what the files take up on disk; not `complete`: at least. `containers`
    are those that use it. `size_bytes` is the size it was made with. From `source` on: of an s3 volume only; `notes`
    are names that are left alone, and why."""

    name: str
    kind: str
    bytes: int
    files: int
    complete: bool
    created_at: datetime
    containers: list[str]
    size_bytes: int | None = None
    source: str | None = None
    target: str | None = None
    state: VolumeState | None = None
    error: str | None = None
    notes: dict[str, str] | None = None


class VolumesReply(Reply, frozen=True, kw_only=True):
    volumes: list[VolumeEntry]


class ImageRequest(Request, frozen=True, kw_only=True):
    """`image` is a name, `name@digest` or a digest."""

    image: str


class ImageReply(Reply, frozen=True, kw_only=True):
    """Everything about one image. `config` is its own: entry point, variables, user, labels, exposed ports …

    `registered`: it was made of a folder of the node, and no registry has it.
    """

    name: str
    digest: str
    names: list[str]
    bytes: int
    created_at: datetime
    last_used_at: datetime | None
    containers: list[str]
    registered: bool
    os: str
    architecture: str
    config: dict[str, Any]


class ExportRequest(Request, frozen=True, kw_only=True):
    """The next piece of a container's files as a tar archive. `session` is the client's choice and begins with
    `offset` 0; every request names the same container. What lies before `acked` has arrived and is forgotten.
    """

    session: str
    container: str
    offset: Annotated[int, msgspec.Meta(ge=0, le=2**62)] = 0
    acked: Annotated[int, msgspec.Meta(ge=0, le=2**62)] = 0


class SaveRequest(Request, frozen=True, kw_only=True):
    """The next piece of an archive of these images; the rest is as for `export`."""

    session: str
    images: list[str]
    offset: Annotated[int, msgspec.Meta(ge=0, le=2**62)] = 0
    acked: Annotated[int, msgspec.Meta(ge=0, le=2**62)] = 0


class PieceReply(Reply, frozen=True, kw_only=True):
    """`data` (base64) stands at `offset`. Without `ready` it is still being made: ask again. With `eof` it is the
    last, the whole has `total` bytes of the digest `sha256` (hex), and `notes` say what is not as it was."""

    offset: int
    data: bytes
    ready: bool
    eof: bool
    total: int | None
    sha256: str | None
    notes: list[str]


class DfRequest(Request, frozen=True, kw_only=True):
    """`refresh`: measure now, also what was measured a moment ago."""

    refresh: bool = False


class DiskUse(Reply, frozen=True, kw_only=True):
    """`bytes` are those taken up on the disk; of files that share blocks each counts whole."""

    count: int
    bytes: int


class ImagesUse(DiskUse, frozen=True, kw_only=True):
    """`reclaimable` is what only images need that no container was made of."""

    reclaimable: int


class DfReply(Reply, frozen=True, kw_only=True):
    """What takes room in the node's data directory, and what is `free` there of `total`.

    `clone` says how containers get their files, `measured_at` when the oldest of these numbers was taken.
    """

    images: ImagesUse
    containers: DiskUse
    volumes: DiskUse
    logs: DiskUse
    free: int
    total: int
    clone: str
    measured_at: datetime


class DenialsRequest(Request, frozen=True, kw_only=True):
    """What the sandbox refused in the last `since_s` seconds."""

    container: str
    since_s: float = 3600.0


class DenialEntry(Reply, frozen=True, kw_only=True):
    """One refusal, `count` times; `pid` is the newest process. `allow` says what would allow it, in words."""

    time_first: datetime
    time_last: datetime
    count: int
    process: str
    pid: int
    operation: str
    argument: str | None
    allow: str | None


class DenialsReply(Reply, frozen=True, kw_only=True):
    """The newest first. Not `complete`: some are known to be missing; `note` says what is, and why."""

    denials: list[DenialEntry]
    complete: bool
    note: str


class CancelRequest(Request, frozen=True, kw_only=True):
    job_id: str


class CancelReply(Reply, frozen=True, kw_only=True):
    state: JobState


REQUESTS: MappingProxyType[str, type[Request]] = MappingProxyType(
    {
        "info": InfoRequest,
        "list": ListRequest,
        "state": StateRequest,
        "command": CommandRequest,
        "stats": StatsRequest,
        "logs": LogsRequest,
        "wait": WaitRequest,
        "exec": ExecRequest,
        "profile": ProfileRequest,
        "check": CheckRequest,
        "images": ImagesRequest,
        "image": ImageRequest,
        "export": ExportRequest,
        "save": SaveRequest,
        "df": DfRequest,
        "volumes": VolumesRequest,
        "denials": DenialsRequest,
        "cancel": CancelRequest,
    }
)
REPLIES: MappingProxyType[str, tuple[type[msgspec.Struct], ...]] = MappingProxyType(
    {
        "info": (NodeInfo,),
        "list": (ListReply,),
        "state": (ContainerStatus,),
        "command": (CommandReply,),
        "stats": (Stats,),
        "logs": (LogsReply,),
        "wait": (ContainerStatus,),
        "exec": (ExecReply, ExecSession),
        "profile": (ProfileReply,),
        "check": (CheckReply,),
        "images": (ImagesReply,),
        "image": (ImageReply,),
        "export": (PieceReply,),
        "save": (PieceReply,),
        "df": (DfReply,),
        "volumes": (VolumesReply,),
        "denials": (DenialsReply,),
        "cancel": (CancelReply,),
    }
)
QUERY_VERBS = tuple(REQUESTS)


def decode_request(verb: str, body: bytes, *, known: frozenset[str] | None = None) -> Request:
    """The request in `body`, checked; no bytes at all are `{}`.

    Unsupported for a verb that is none or not in `known`; InvalidSpec for a spec and for what exec is to run;
    else InvalidCommand.
    """
    if verb not in REQUESTS or (known is not None and verb not in known):
        raise Unsupported(f"there is no query {shorten(verb)} here", field="verb")
    request = strict_decode(
        body, REQUESTS[verb], max_bytes=4 * MAX_COMMAND_BYTES if verb == "exec" else MAX_COMMAND_BYTES
    )
    return check_request(request)


def check_request(request: Request) -> Request:
    """The same request, with times in UTC, when it keeps the rules that its types do not say."""
    container = getattr(request, "container", None)
    if container is not None:
        parse_cid(container)
    match request:
        case ListRequest(state=state, labels=labels):
            if state is not None and state not in list(State):
                raise InvalidCommand(f"{shorten(state)} is no state", field="state")
            check_labels(labels or {}, "labels")
        case CommandRequest(id=command_id):
            check_id(command_id)
        case LogsRequest(since=since) if since is not None:
            return cast("Request", msgspec.structs.replace(request, since=utc(since, field="since")))
        case WaitRequest(timeout_s=timeout_s):
            check_seconds(timeout_s, field="timeout_s", limit=MAX_WAIT_S)
        case ExecRequest():
            _check_exec(request)
        case ProfileRequest():
            _check_profile(request)
        case VolumesRequest(name=name) if name is not None:
            check_service(name, field="name")
        case ExportRequest(session=session):
            check_id(session, field="session")
        case SaveRequest(session=session, images=images):
            check_id(session, field="session")
            if not 0 < len(images) <= MAX_SAVED:
                raise InvalidCommand(f"give 1 to {MAX_SAVED} images", field="images")
            for place, image in enumerate(images):
                check_image(image, field=f"images[{place}]")
        case DenialsRequest(since_s=since_s):
            check_seconds(since_s, field="since_s", limit=MAX_SINCE_S)
        case CancelRequest(job_id=job_id):
            check_service(job_id, field="job_id")
    return request


def _check_exec(request: ExecRequest) -> None:
    if not request.argv:
        raise InvalidSpec("must name a program", field="argv")
    for index, word in enumerate(request.argv):
        check_argument(word, field=f"argv[{index}]")
    if not request.argv[0]:
        raise InvalidSpec("must name a program", field="argv[0]")
    check_env(request.env or {}, "env")
    if request.workdir is not None:
        check_path(request.workdir, field="workdir")
    check_seconds(request.timeout_s, field="timeout_s", limit=MAX_EXEC_S)
    if request.encoding not in (None, BASE64):
        raise InvalidCommand(f"must be {BASE64} or null", field="encoding")
    if request.session is not None:
        check_id(request.session, field="session")
    if request.stream and request.session is None:
        raise InvalidCommand("missing: a session of frames needs its name", field="session")


def _check_profile(request: ProfileRequest) -> None:
    if request.container is not None:
        if request.spec is not None or request.service is not None:
            raise InvalidCommand("give a container, or a service and a spec", field="container")
    elif request.service is None or request.spec is None:
        raise InvalidCommand(
            "missing: give a container, or a service and a spec",
            field="container"
            if request.service is None and request.spec is None
            else ("service" if request.service is None else "spec"),
        )
    else:
        build_cid(request.service, request.replica)
    if isinstance(request, CheckRequest):
        check_text(request.operation, field="operation", limit=64, error=InvalidCommand)
        if request.argument is not None:
            check_text(request.argument, field="argument", limit=4096, empty=True, error=InvalidCommand)
