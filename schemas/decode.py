"""Commands from bytes that anybody may have sent. Nothing but a ContractError leaves these functions."""

import math
from datetime import UTC, datetime
from functools import cache
from typing import Any, TypeVar, cast

import msgspec

from .commands import (
    CONTAINER_VERBS,
    NODE_VERBS,
    RESERVED_VERBS,
    AnyCommand,
    Command,
    Create,
    CreateVolume,
    Drain,
    Kill,
    LoadImage,
    PruneImages,
    PullImage,
    PushImage,
    RegisterImage,
    RemoveImage,
    RemoveVolume,
    Restart,
    Run,
    Stop,
    TagImage,
    VerifyImages,
)
from .errors import ContractError, InvalidCommand, Unsupported
from .events import AnyEvent
from .spec_load import plain_names
from .spec_model import ServiceSpec
from .spec_rules import validate_spec
from .strict import MAX_COMMAND_BYTES, strict_json, to_struct
from .values import (
    MAX_DURATION_S,
    check_id,
    check_image,
    check_path,
    check_service,
    check_text,
    normalize_signal,
    parse_memory,
    shorten,
    signal_number,
)

__all__ = [
    "COMMANDS",
    "MAX_ACTOR",
    "MAX_COMMAND_BYTES",
    "canonical",
    "check_actor",
    "check_seconds",
    "decode_command",
    "decode_event",
    "normalize_signal",
    "signal_number",
    "strict_decode",
    "strict_json",
    "utc",
]

MAX_ACTOR = 128
T = TypeVar("T")

COMMANDS: dict[str, type[Command]] = {
    str(kind.__struct_config__.tag): kind for kind in cast("tuple[type[Command], ...]", AnyCommand.__args__)
}
_EVENT = msgspec.json.Decoder(AnyEvent)


def decode_command(verb: str, body: bytes, *, known: frozenset[str] | None = None) -> AnyCommand:
    """The command in `body`, whose subject ends in `verb`.

    Unsupported for a reserved verb, or one that is not in `known`; InvalidSpec for what stands under `spec`;
    else InvalidCommand. The signal of a kill comes back with its SIG, the deadline in UTC.
    """
    value = strict_json(body, MAX_COMMAND_BYTES)
    if not isinstance(value, dict):
        raise InvalidCommand("a command must be an object")
    kind = value.get("type")
    if not isinstance(kind, str):
        raise InvalidCommand("missing, or not a text", field="type")
    if kind != verb:
        raise InvalidCommand(f"{shorten(kind)} differs from {shorten(verb)} of the subject", field="type")
    if verb in RESERVED_VERBS or (known is not None and verb in COMMANDS and verb not in known):
        raise Unsupported(f"{verb} is not supported here", field="type")
    if verb not in COMMANDS:
        raise InvalidCommand(
            f"{shorten(verb)} is none of {' '.join((*CONTAINER_VERBS, *NODE_VERBS))}", field="type"
        )
    if "spec" in value:
        value["spec"] = plain_names(value["spec"], "spec")
    return _checked(cast("AnyCommand", to_struct(value, COMMANDS[verb])))


def strict_decode(
    body: bytes,
    kind: type[T],
    *,
    max_bytes: int = MAX_COMMAND_BYTES,
    error: type[ContractError] | None = None,
) -> T:
    """Any struct from bytes, as strictly as a command, without rules of its own. No bytes at all are `{}`.

    What stands under `spec` is checked as a spec.
    """
    value = strict_json(body or b"{}", max_bytes, error=error)
    if isinstance(value, dict) and "spec" in value:
        value["spec"] = plain_names(value["spec"], "spec")
    made = to_struct(value, kind, error=error)
    spec = getattr(made, "spec", None)
    if isinstance(spec, ServiceSpec):
        validate_spec(spec)
    return made


def decode_event(body: bytes) -> AnyEvent | None:
    """An event as a reader takes it: unknown fields are ignored, an event of unknown type is null."""
    try:
        return cast("AnyEvent", _EVENT.decode(body))
    except msgspec.ValidationError as failure:
        if str(failure).endswith("at `$.type`"):
            return None
        raise InvalidCommand(f"not an event: {failure}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as failure:
        raise InvalidCommand(f"not an event: {failure}") from None


def canonical(command: msgspec.Struct) -> bytes:
    """Bytes that are equal exactly when the decoded commands are: defaults left out, keys in order."""
    return msgspec.json.encode(_reduced(command), order="deterministic")


def check_actor(value: str | None, *, field: str = "actor") -> None:
    if value is not None:
        check_text(value, field=field, limit=MAX_ACTOR, empty=True, error=InvalidCommand)


def check_seconds(value: float | None, *, field: str, limit: float = MAX_DURATION_S) -> None:
    if value is not None and not (math.isfinite(value) and 0 <= value <= limit):
        raise InvalidCommand(f"must be between 0 and {limit:.0f} seconds", field=field)


def utc(value: datetime | None, *, field: str) -> datetime | None:
    """The same moment in UTC. A time without a zone names no moment."""
    if value is None:
        return None
    if value.tzinfo is None:
        raise InvalidCommand("a time needs its zone, as in 2026-11-24T03:31:39Z", field=field)
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise InvalidCommand("out of range", field=field) from None


def _checked(command: AnyCommand) -> AnyCommand:
    check_id(command.id)
    check_actor(command.actor)
    if command.if_instance is not None:
        check_text(command.if_instance, field="if_instance", limit=64, error=InvalidCommand)
    changes: dict[str, Any] = {}
    if command.deadline is not None:
        changes["deadline"] = utc(command.deadline, field="deadline")
    match command:
        case Create(spec=spec) | Run(spec=spec):
            validate_spec(spec)
        case Stop(timeout_s=timeout_s) | Restart(timeout_s=timeout_s) | Drain(timeout_s=timeout_s):
            check_seconds(timeout_s, field="timeout_s")
        case Kill(signal=name):
            changes["signal"] = normalize_signal(name)
        case RegisterImage(image=image, source_dir=source_dir):
            check_image(image, field="image")
            check_path(source_dir, field="source_dir", absolute=True, error=InvalidCommand)
        case PullImage(image=image, auth=auth):
            check_image(image, field="image")
            if auth is not None:
                check_text(auth, field="auth", limit=256, error=InvalidCommand)
        case LoadImage(source_file=source_file, image=image):
            check_path(source_file, field="source_file", absolute=True, error=InvalidCommand)
            if image is not None:
                check_image(image, field="image")
        case PushImage(image=image, target=target, auth=auth):
            check_image(image, field="image")
            check_image(target, field="target")
            if auth is not None:
                check_text(auth, field="auth", limit=256, error=InvalidCommand)
        case RemoveImage(image=image):
            check_image(image, field="image")
        case PruneImages(older_than_s=older_than_s):
            check_seconds(older_than_s, field="older_than_s")
        case VerifyImages(image=image) if image is not None:
            check_image(image, field="image")
        case CreateVolume(name=name, size=size):
            check_service(name, field="name")
            if size is not None:
                parse_memory(size, field="size", error=InvalidCommand)
        case RemoveVolume(name=name):
            check_service(name, field="name")
        case TagImage(source=source, target=target):
            check_image(source, field="source")
            check_image(target, field="target")
    return msgspec.structs.replace(command, **changes) if changes else command


def _reduced(value: Any) -> Any:
    """Structs as maps without the fields that hold their default: msgspec's own way compares by identity."""
    if isinstance(value, msgspec.Struct):
        made: dict[str, Any] = {}
        config = value.__struct_config__
        if config.tag_field is not None:
            made[config.tag_field] = config.tag
        for name, wire, default in _fields(type(value)):
            held = getattr(value, name)
            if held is not default and held != default:
                made[wire] = _reduced(held)
        return made
    if isinstance(value, list):
        return [_reduced(item) for item in value]
    if isinstance(value, dict):
        return {key: _reduced(item) for key, item in value.items()}
    return value


@cache
def _fields(kind: type[msgspec.Struct]) -> tuple[tuple[str, str, Any], ...]:
    """(name, name on the wire, default) of every field; NODEFAULT equals nothing."""
    return tuple(
        (
            field.name,
            field.encode_name,
            field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory(),
        )
        for field in msgspec.structs.fields(kind)
    )
