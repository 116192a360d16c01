"""Whole documents: their own rules, and that an error of a service names the service."""

import json
from typing import Any

import pytest

from schemas.errors import ContractError, InvalidSpec, Unsupported
from schemas.spec import decode_deployment


def deployment(**changes: Any) -> dict[str, Any]:
    web = {"image": {"name": "web"}}
    return {"version": "v1", "deployment": "shop", "services": {"web": web, "db": web}, **changes}


def test_a_deployment() -> None:
    made = decode_deployment(deployment())
    assert list(made.services) == ["web", "db"]
    assert decode_deployment({"version": "v1", "deployment": "shop"}).services == {}
    full = deployment(
        externals={},
        tunnels={},
        api={"enabled": True, "bind": "0.0.0.0:3669", "jwt_secret": None, "swagger": True},
    )
    assert decode_deployment(json.dumps(full).encode()).deployment == "shop"


def depending(**on: list[str]) -> dict[str, Any]:
    return {
        name: {"image": {"name": "a"}, "depends": [{"service": other} for other in others]}
        for name, others in on.items()
    }


@pytest.mark.parametrize(
    ("kind", "field", "changes"),
    [
        (InvalidSpec, "version", {"version": "v2"}),
        (InvalidSpec, "deployment", {"deployment": "-shop"}),
        (InvalidSpec, "deployment", {"deployment": "ab"}),
        (InvalidSpec, "colour", {"colour": 1}),
        (InvalidSpec, "services.Web", {"services": {"Web": {"image": {"name": "a"}}}}),
        (InvalidSpec, "services.b.image", {"services": {"a": {"image": {"name": "a"}}, "b": {}}}),
        (InvalidSpec, "services.b.tyt", {"services": {"a": {"image": {"name": "a"}}, "b": {"tyt": 1}}}),
        (
            InvalidSpec,
            "services.b.env.X",
            {"services": {"b": {"image": {"name": "a"}, "env": {"W": "", "X": 1}}}},
        ),
        (
            InvalidSpec,
            "services.a.cap_add",
            {"services": {"a": {"image": {"name": "a"}, "cap_add": [], "capabilities": []}}},
        ),
        (InvalidSpec, "services.a.depends[0].service", {"services": depending(a=["z"])}),
        (InvalidSpec, "services.a.depends[0].service", {"services": depending(a=["a"])}),
        (InvalidSpec, "services.c.depends[0].service", {"services": depending(a=["b"], b=["c"], c=["a"])}),
        (
            Unsupported,
            "services.a.privileged",
            {"services": {"a": {"image": {"name": "a"}, "privileged": True}}},
        ),
        (Unsupported, "externals", {"externals": {"x": {"backends": ["http://a"]}}}),
        (InvalidSpec, "externals.x.backends", {"externals": {"x": {"backends": []}}}),
        (
            Unsupported,
            "tunnels",
            {"tunnels": {"x": {"from": "a", "to": "b", "local_port": 1, "remote_port": 1}}},
        ),
        (Unsupported, "api", {"api": {"enabled": False}}),
    ],
)
def test_a_broken_deployment(kind: type[ContractError], field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(kind) as caught:
        decode_deployment(deployment(**changes))
    assert caught.value.field == field, caught.value.message


def test_a_long_chain_of_dependencies_is_no_circle() -> None:
    names = [f"s{n}" for n in range(50)]
    chain = {name: [names[at + 1]] if at + 1 < len(names) else [] for at, name in enumerate(names)}
    decode_deployment(deployment(services=depending(**chain)))


def test_everybody_on_everybody_before_is_decided_quickly() -> None:
    names = [f"s{n}" for n in range(120)]
    dense = {name: names[:at] for at, name in enumerate(names)}
    decode_deployment(deployment(services=depending(**dense)))
    dense["s0"] = ["s119"]
    with pytest.raises(InvalidSpec, match="circle"):
        decode_deployment(deployment(services=depending(**dense)))
