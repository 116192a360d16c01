"""The contract as JSON Schema and AsyncAPI 3: what other languages generate their readers from.

The documents are made from the structs alone and lie beside this file; `check` names those that are stale.
"""

import json
from pathlib import Path
from typing import Any

import msgspec

from .asyncapi import asyncapi_document
from .commands import AnyCommand
from .errors import Error, OpenEnum
from .events import AnyEvent, ImageProgress
from .jobs import Job
from .node import NodeInfo, Presence
from .queries import REPLIES, REQUESTS
from .spec import DeploymentSpec, ServiceSpec
from .spec_load import ALIASES
from .status import Stats
from .values import COMMAND_ID, NODE, SERVICE

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_DATE = {"type": "string", "format": "date-time"}
_TOGETHER: tuple[Any, ...] = (
    AnyCommand,
    AnyEvent,
    ImageProgress,
    Stats,
    NodeInfo,
    Presence,
    Error,
    Job,
    *REQUESTS.values(),
    *(kind for kinds in REPLIES.values() for kind in kinds),
    ServiceSpec,
    DeploymentSpec,
)
# Left out of a reply when there is nothing to say; every other field is always there.
_SOMETIMES = {"encoding"}
_NAMES = {
    "id": COMMAND_ID,
    "session": COMMAND_ID,
    "node": NODE,
    "pool": NODE,
    "service": SERVICE,
    "job_id": SERVICE,
}


def json_schema() -> dict[str, Any]:
    """Everything that crosses the wire as JSON, under `$defs`."""
    definitions = _definitions("#/$defs/{name}")
    return {
        "$schema": DIALECT,
        "title": "sandfleet wire contract",
        "$comment": "Readers ignore unknown fields, and keep strings that are not among x-known-values.",
        "$defs": definitions | {"Command": _one_of(AnyCommand), "Event": _one_of(AnyEvent)},
    }


def spec_schema(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """A document for one kind of file, as an editor wants it."""
    definitions = _definitions("#/$defs/{name}")
    needed: dict[str, Any] = {}
    waiting = [kind.__name__]
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed[name] = definitions[name]
            waiting += _references(definitions[name])
    own = needed.pop(kind.__name__)
    return {"$schema": DIALECT, **own, "$defs": needed}


def asyncapi() -> dict[str, Any]:
    """Every subject with what is sent on it."""
    return asyncapi_document(_definitions("#/components/schemas/{name}"))


def documents() -> dict[str, str]:
    """Text of every document by file name."""
    made = {
        "contract.schema.json": json_schema(),
        "service-spec.schema.json": spec_schema(ServiceSpec),
        "deployment.schema.json": spec_schema(DeploymentSpec),
        "asyncapi.json": asyncapi(),
    }
    return {
        name: json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        for name, document in made.items()
    }


def write(directory: Path) -> list[str]:
    """Writes every document; the names of those that changed."""
    stale = check(directory)
    made = documents()
    for name in stale:
        (directory / name).write_text(made[name], encoding="utf-8")
    return stale


def check(directory: Path) -> list[str]:
    """Names of the documents that are missing or differ from what the structs say."""
    return [name for name, text in documents().items() if _read(directory / name) != text]


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        return None


def _definitions(template: str) -> dict[str, Any]:
    _, definitions = msgspec.json.schema_components(_TOGETHER, ref_template=template)
    for known in OpenEnum.__subclasses__():
        if known.__name__ in definitions:
            definitions[known.__name__] = {
                "title": known.__name__,
                "type": "string",
                "x-known-values": [member.value for member in known],
            }
    for kind in _structs(_TOGETHER):
        _refine(kind, definitions[kind.__name__])
    properties = definitions["ServiceSpec"]["properties"]
    for alias, name in ALIASES.items():
        properties[alias] = {**properties[name], "description": f"Another name of {name}."}
    return definitions


def _refine(kind: type[msgspec.Struct], schema: dict[str, Any]) -> None:
    """What msgspec leaves out: the format of times, the rules of names, that a node sends every field."""
    properties = schema["properties"]
    for field in msgspec.structs.fields(kind):
        inner = _optional(properties[field.encode_name])
        if inner == {"type": "string"}:
            if "datetime" in str(field.type):
                inner.update(_DATE)
            elif field.encode_name in _NAMES and kind.__name__ != "InitStep":
                inner["pattern"] = f"^{_NAMES[field.encode_name].pattern}$"
    if not schema.get("additionalProperties", True):
        return
    schema["required"] = [name for name in properties if name not in _SOMETIMES]


def _optional(schema: dict[str, Any]) -> dict[str, Any]:
    """What a property holds when it is not null."""
    inner: dict[str, Any] = schema
    for choice in schema.get("anyOf", ()):
        if choice != {"type": "null"}:
            inner = choice
    return inner


def _structs(kinds: tuple[Any, ...]) -> list[type[msgspec.Struct]]:
    """Every struct that `kinds` reach."""
    found: dict[type[msgspec.Struct], None] = {}
    waiting = list(kinds)
    while waiting:
        kind = waiting.pop()
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            if kind not in found:
                found[kind] = None
                waiting += [field.type for field in msgspec.structs.fields(kind)]
        else:
            waiting += getattr(kind, "__args__", ())
    return list(found)


def _one_of(union: Any) -> dict[str, Any]:
    (schema,), _ = msgspec.json.schema_components((union,), ref_template="#/$defs/{name}")
    return schema


def _references(schema: Any) -> list[str]:
    if isinstance(schema, dict):
        own = [schema["$ref"].rpartition("/")[2]] if "$ref" in schema else []
        return own + [name for value in schema.values() for name in _references(value)]
    if isinstance(schema, list):
        return [name for value in schema for name in _references(value)]
    return []
