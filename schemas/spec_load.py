"""From bytes or plain objects to a checked ServiceSpec."""

from typing import Any

from .errors import InvalidSpec
from .spec_model import DeploymentSpec, ServiceSpec
from .spec_rules import validate_deployment, validate_spec
from .strict import MAX_COMMAND_BYTES, join, key_name, strict_json, to_struct

MAX_DOCUMENT_BYTES = 2**20
ALIASES = {"cap_add": "capabilities", "wasm_http": "wasm"}


def decode_spec(source: Any, *, field: str = "spec") -> ServiceSpec:
    """The spec that JSON bytes or a plain object say, checked; InvalidSpec and Unsupported name the field."""
    if isinstance(source, bytes):
        source = strict_json(source, MAX_COMMAND_BYTES, error=InvalidSpec)
    source = plain_names(source, field)
    spec = to_struct(source, ServiceSpec, field=field, error=InvalidSpec)
    validate_spec(spec, field=field)
    return spec


def decode_deployment(source: Any) -> DeploymentSpec:
    """The same for a whole document `version, deployment, services`."""
    if isinstance(source, bytes):
        source = strict_json(source, MAX_DOCUMENT_BYTES, error=InvalidSpec)
    if isinstance(source, dict) and isinstance(source.get("services"), dict):
        services = {
            name: plain_names(spec, f"services.{key_name(str(name))}")
            for name, spec in source["services"].items()
        }
        source = {**source, "services": services}
    deployment = to_struct(source, DeploymentSpec, error=InvalidSpec)
    validate_deployment(deployment)
    return deployment


def plain_names(spec: Any, field: str) -> Any:
    """The two fields that have a second name under their first one."""
    if not isinstance(spec, dict) or ALIASES.keys().isdisjoint(spec):
        return spec
    renamed = dict(spec)
    for alias, name in ALIASES.items():
        if alias in renamed:
            if name in renamed:
                raise InvalidSpec(f"stands there twice: {alias} is {name}", field=join(field, alias))
            renamed[name] = renamed.pop(alias)
    return renamed
