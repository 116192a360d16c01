"""The AsyncAPI 3 document: every subject of the contract as a channel, seen from the worker."""

from typing import Any

import msgspec

from .commands import AnyCommand, ContainerCommand, NodeCommand
from .events import AnyEvent, CommandAccepted, CommandCompleted, CommandRejected
from .queries import ERROR_STATUS, REPLIES, REQUESTS
from .streams import StreamSpec, bucket_spec, stream_specs
from .subjects import DEFAULT_PREFIX

CONTRACT_VERSION = "1.0.0"
FRAMES_IN = ("stdin", "eof", "resize", "signal", "ack", "ping")
FRAMES_OUT = ("stdout", "stderr", "exit")

_PARAMETERS: dict[str, dict[str, Any]] = {
    "node": {"description": "Name of a node: [A-Za-z0-9_-]{1,64}."},
    "pool": {"description": "Name of a pool: [A-Za-z0-9_-]{1,64}."},
    "container": {"description": "{service}-{replica}, the replica in canonical decimal below 2^32."},
    "job_id": {"description": "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"},
    "session": {"description": "Chosen by the client: [A-Za-z0-9_-]{1,64}."},
    "stream": {"description": "What the container wrote to.", "enum": ["stdout", "stderr"]},
}
_TEXT = {"type": "string"}
_DIGITS = {"type": "string", "pattern": "^[0-9]+$"}
_TRACE = {
    "type": "object",
    "properties": {
        "traceparent": {**_TEXT, "description": "W3C trace context, copied from command to events."}
    },
}


def _headers(required: dict[str, Any], optional: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": required | optional, "required": list(required)}


_LOG_HEADERS = _headers(
    {
        "Sandfleet-Instance": _TEXT,
        "Sandfleet-Run": _DIGITS,
        "Sandfleet-Offset": {**_DIGITS, "description": "Of the first byte, in the instance's stream."},
        "Nats-Msg-Id": {
            **_TEXT,
            "description": "<instance>/<stream>/<offset>+<length>; gap: …+lost<n>; empty end: …+eof<run>.",
        },
    },
    {
        "Sandfleet-Times": {**_TEXT, "description": "Comma-separated relative-offset:unix-µs, at most 64."},
        "Sandfleet-Lost": {**_DIGITS, "description": "Bytes discarded at this offset; the payload is empty."},
        "Sandfleet-Lost-Reason": {**_TEXT, "x-known-values": ["size", "rate", "disk"]},
        "Sandfleet-Eof": {**_DIGITS, "description": "The run whose last chunk this is."},
        "Sandfleet-Incomplete": {**_TEXT, "x-known-values": ["supervisor_lost"]},
    },
)
_ERROR_HEADERS = _headers(
    {
        "Nats-Service-Error": _TEXT,
        "Nats-Service-Error-Code": {
            **_TEXT,
            "enum": [str(code) for code in sorted(set(ERROR_STATUS.values()))],
        },
    },
    {},
)


def asyncapi_document(schemas: dict[str, Any]) -> dict[str, Any]:
    """The whole document; `schemas` are the components that its messages refer to."""
    streams = {spec.name.rpartition("_")[2]: spec for spec in stream_specs()}
    channels: dict[str, Any] = {}
    operations: dict[str, Any] = {}
    messages = _messages()

    def channel(
        name: str,
        address: str,
        action: str,
        sent: list[str],
        about: str,
        stream: StreamSpec | None = None,
        reply: list[str] | None = None,
    ) -> None:
        channels[name] = {
            "address": address,
            "description": about,
            "messages": {message: {"$ref": f"#/components/messages/{message}"} for message in sent},
        }
        if parameters := {key: value for key, value in _PARAMETERS.items() if f"{{{key}}}" in address}:
            channels[name]["parameters"] = parameters
        if stream is not None:
            channels[name]["x-jetstream"] = msgspec.to_builtins(stream)
        operations[name] = {
            "action": action,
            "channel": {"$ref": f"#/channels/{name}"},
            "messages": [{"$ref": f"#/channels/{name}/messages/{message}"} for message in sent],
        }
        if reply is not None:
            channels[f"{name}Reply"] = {
                "address": None,
                "description": "The reply subject of the request.",
                "messages": {message: {"$ref": f"#/components/messages/{message}"} for message in reply},
            }
            operations[name]["reply"] = {
                "channel": {"$ref": f"#/channels/{name}Reply"},
                "messages": [{"$ref": f"#/channels/{name}Reply/messages/{message}"} for message in reply],
            }

    p = DEFAULT_PREFIX
    for union, place, owner in ((ContainerCommand, "{container}", "container"), (NodeCommand, "_", "node")):
        for kind in union.__args__:
            verb = str(kind.__struct_config__.tag)
            channel(
                f"command.{verb}",
                f"{p}.cmd.{{node}}.{place}.{verb}",
                "receive",
                [kind.__name__],
                f"The command {verb} to a {owner}.",
                streams["CMD"],
            )
    channel("job", f"{p}.job.{{pool}}.{{job_id}}", "receive", ["Job"], "Work for a pool.", streams["JOB"])
    answers = [kind.__name__ for kind in (CommandAccepted, CommandCompleted, CommandRejected)]
    for owner, place, what, sent in (
        ("container", "{container}", "state", ["StateChanged"]),
        ("container", "{container}", "health", ["HealthChanged"]),
        ("container", "{container}", "command", answers),
        ("container", "{container}", "job", ["JobChanged"]),
        ("node", "_", "node", ["NodeChanged"]),
        ("node", "_", "command", answers),
        ("node", "_", "image", ["ImageChanged"]),
    ):
        channel(
            f"event.{owner}.{what}",
            f"{p}.evt.{{node}}.{place}.{what}",
            "send",
            sent,
            f"Events of a {owner}, in order of (epoch, seq) among all of the node.",
            streams["EVT"],
        )
    channel(
        "log",
        f"{p}.log.{{node}}.{{container}}.{{stream}}",
        "send",
        ["LogChunk"],
        "Raw output.",
        streams["LOG"],
    )
    channel("stat", f"{p}.stat.{{node}}.{{container}}", "send", ["Stats"], "Samples.", streams["STAT"])
    channel("progress", f"{p}.progress.{{node}}.image", "send", ["ImageProgress"], "Progress of a pull.")
    for verb, request in REQUESTS.items():
        channel(
            f"query.{verb}",
            f"{p}.rpc.{{node}}.{verb}",
            "receive",
            [request.__name__],
            f"The query {verb}; no responder means that the node is not there.",
            reply=[*(kind.__name__ for kind in REPLIES[verb]), "QueryError"],
        )
    channel(
        "exec.in", f"{p}.exec.{{node}}.{{session}}.in", "receive", ["ExecFrameIn"], "Frames to a session."
    )
    channel(
        "exec.out", f"{p}.exec.{{node}}.{{session}}.out", "send", ["ExecFrameOut"], "Frames of a session."
    )
    bucket = bucket_spec()
    channel(
        "presence",
        f"$KV.{bucket.name}.{{node}}",
        "send",
        ["Presence"],
        f"Key-value bucket, renewed every 5 s, gone after {bucket.ttl_s:.0f} s.",
    )
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "sandfleet worker",
            "version": CONTRACT_VERSION,
            "description": f"The prefix is {p} by default. Readers ignore what they do not know.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "channels": channels,
        "operations": operations,
        "components": {"messages": messages, "schemas": _without_discriminators(schemas)},
    }


def _without_discriminators(schema: Any) -> Any:
    """AsyncAPI knows a discriminator as a string only; the constant tag in each variant says the same."""
    if isinstance(schema, dict):
        return {
            key: _without_discriminators(value) for key, value in schema.items() if key != "discriminator"
        }
    if isinstance(schema, list):
        return [_without_discriminators(item) for item in schema]
    return schema


def _messages() -> dict[str, Any]:
    made: dict[str, Any] = {}
    for kind in (*AnyCommand.__args__, *AnyEvent.__args__):
        made[kind.__name__] = {**_json(kind.__name__), "headers": _TRACE}
    made["Job"] = {**_json("Job"), "headers": _TRACE}
    for name in ("Stats", "ImageProgress", "Presence"):
        made[name] = _json(name)
    for verb, request in REQUESTS.items():
        made[request.__name__] = _json(request.__name__)
        for reply in REPLIES[verb]:
            made[reply.__name__] = _json(reply.__name__)
    made["QueryError"] = {**_json("Error"), "name": "QueryError", "headers": _ERROR_HEADERS}
    made["LogChunk"] = {**_raw("LogChunk"), "headers": _LOG_HEADERS}
    for name, frames in (("ExecFrameIn", FRAMES_IN), ("ExecFrameOut", FRAMES_OUT)):
        made[name] = {
            **_raw(name),
            "headers": _headers(
                {"Sandfleet-Frame": {**_TEXT, "enum": list(frames)}, "Sandfleet-Seq": _DIGITS}, {}
            ),
        }
    return made


def _json(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "contentType": "application/json",
        "payload": {"$ref": f"#/components/schemas/{name}"},
    }


def _raw(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "contentType": "application/octet-stream",
        "payload": {"type": "string", "format": "binary"},
    }
