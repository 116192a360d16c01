"""The exported documents: complete, deterministic, in step with the structs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import schemas
from schemas import export
from schemas.commands import AnyCommand
from schemas.errors import OpenEnum
from schemas.events import AnyEvent
from schemas.queries import REPLIES, REQUESTS
from schemas.spec import DeploymentSpec, ServiceSpec
from schemas.streams import stream_specs
from schemas.subjects import Kind, Subjects

CONTRACT = export.json_schema()
ASYNC = export.asyncapi()


def references(node: Any) -> set[str]:
    if isinstance(node, dict):
        own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return own.union(*(references(value) for value in node.values()))
    if isinstance(node, list):
        return set().union(*(references(value) for value in node))
    return set()


def resolves(document: Any, reference: str) -> bool:
    node = document
    for step in reference.removeprefix("#/").split("/"):
        if step not in node:
            return False
        node = node[step]
    return True


@pytest.mark.parametrize("name", sorted(export.documents()))
def test_every_reference_leads_somewhere(name: str) -> None:
    document = json.loads(export.documents()[name])
    found = references(document)
    assert found
    assert [ref for ref in found if not resolves(document, ref)] == []


def test_the_committed_documents_are_in_step() -> None:
    assert schemas.__file__ is not None
    assert export.check(Path(schemas.__file__).parent) == []


def test_write_and_check(tmp_path: Path) -> None:
    names = sorted(export.documents())
    assert sorted(export.check(tmp_path)) == names
    assert sorted(export.write(tmp_path)) == names
    assert export.check(tmp_path) == []
    assert export.write(tmp_path) == []
    (tmp_path / "asyncapi.json").write_text("{}")
    assert export.check(tmp_path) == ["asyncapi.json"]
    (tmp_path / "asyncapi.json").write_bytes(b"\xff")
    assert export.write(tmp_path) == ["asyncapi.json"]


def test_everything_that_crosses_the_wire_is_there() -> None:
    names = {kind.__name__ for kind in (*AnyCommand.__args__, *AnyEvent.__args__, *REQUESTS.values())}
    names |= {kind.__name__ for kinds in REPLIES.values() for kind in kinds}
    names |= {
        "ServiceSpec",
        "DeploymentSpec",
        "Stats",
        "NodeInfo",
        "Presence",
        "Error",
        "Job",
        "ImageProgress",
    }
    assert names <= CONTRACT["$defs"].keys()


def test_what_readers_read_is_open() -> None:
    for kind in OpenEnum.__subclasses__():
        schema = CONTRACT["$defs"].get(kind.__name__)
        if schema is not None:
            assert schema["type"] == "string"
            assert "enum" not in schema
            assert schema["x-known-values"] == [member.value for member in kind]
    assert "additionalProperties" not in CONTRACT["$defs"]["ContainerStatus"]


def test_what_users_write_is_closed() -> None:
    definitions = CONTRACT["$defs"]
    for name in ("ServiceSpec", "ResourcesSpec", "Create", "ListRequest", "Job", "DeploymentSpec"):
        assert definitions[name]["additionalProperties"] is False
    assert definitions["PullPolicy"]["enum"] == ["always", "if_not_present", "never", "newer"]
    assert definitions["ServiceSpec"]["required"] == ["image"]
    assert {"cap_add", "wasm_http"} <= definitions["ServiceSpec"]["properties"].keys()
    assert definitions["EndpointSpec"]["properties"]["port"] == {
        "type": "integer",
        "minimum": 1,
        "maximum": 65535,
    }


def test_a_node_sends_every_field() -> None:
    definitions = CONTRACT["$defs"]
    for name in ("ContainerStatus", "StateChanged", "CommandCompleted", "Stats", "NodeInfo", "LogsReply"):
        assert sorted(definitions[name]["required"]) == sorted(definitions[name]["properties"])
    assert "encoding" not in definitions["LogLine"]["required"]


def test_times_and_names_have_their_form() -> None:
    definitions = CONTRACT["$defs"]
    assert definitions["StateChanged"]["properties"]["time"] == {"type": "string", "format": "date-time"}
    assert {"type": "string", "format": "date-time"} in definitions["Start"]["properties"]["deadline"][
        "anyOf"
    ]
    assert definitions["Start"]["properties"]["id"]["pattern"] == "^[A-Za-z0-9_-]{1,64}$"


@pytest.mark.parametrize("kind", [ServiceSpec, DeploymentSpec])
def test_a_document_for_editors(kind: type[Any]) -> None:
    document = export.spec_schema(kind)
    assert document["title"] == kind.__name__
    assert "Create" not in document["$defs"]


def test_channels_have_the_addresses_of_the_contract() -> None:
    parsed: dict[str, set[Kind]] = {}
    values = {
        "node": "n",
        "pool": "p",
        "container": "web-0",
        "job_id": "j",
        "session": "s",
        "stream": "stdout",
    }
    for name, channel in ASYNC["channels"].items():
        address = channel["address"]
        if address is None or name == "presence":
            continue
        assert set(re.findall(r"{(\w+)}", address)) == set(channel["parameters"])
        found = Subjects().parse(address.format(**values))
        parsed.setdefault(found.kind, set()).add(found.kind)
        assert channel["messages"]
    assert set(parsed) == set(Kind)
    verbs = {name.removeprefix("command.") for name in ASYNC["channels"] if name.startswith("command.")}
    assert verbs == {str(kind.__struct_config__.tag) for kind in AnyCommand.__args__}
    for verb in REQUESTS:
        assert f"query.{verb}Reply" in ASYNC["channels"]
    assert ASYNC["channels"]["presence"]["address"] == "$KV.SANDFLEET_NODES.{node}"


def test_operations_and_messages() -> None:
    assert ASYNC["asyncapi"] == "3.0.0"
    named = {channel for channel in ASYNC["channels"] if not channel.endswith("Reply")}
    assert set(ASYNC["operations"]) == named
    for name, operation in ASYNC["operations"].items():
        received = name.startswith(("command.", "query.")) or name in ("job", "exec.in")
        assert operation["action"] == ("receive" if received else "send"), name
        assert ("reply" in operation) == name.startswith("query.")
    sent = {ref.rpartition("/")[2] for ref in references(ASYNC["channels"])}
    assert sent == set(ASYNC["components"]["messages"])
    headers = ASYNC["components"]["messages"]["LogChunk"]["headers"]
    assert "Sandfleet-Offset" in headers["required"]
    assert {"Sandfleet-Lost", "Sandfleet-Eof", "Sandfleet-Incomplete"} <= headers["properties"].keys()


def test_channels_name_their_streams() -> None:
    by_name = {spec.name: spec for spec in stream_specs()}
    described = {
        channel["x-jetstream"]["name"] for channel in ASYNC["channels"].values() if "x-jetstream" in channel
    }
    assert described == set(by_name)


def test_documents_fit_the_dialect() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    for name, text in export.documents().items():
        if name != "asyncapi.json":
            jsonschema.Draft202012Validator.check_schema(json.loads(text))
