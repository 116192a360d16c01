"""ServiceSpec: what loads, what is refused, and that each refusal names its field."""

import json
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import ContractError, InvalidSpec
from schemas.spec import (
    AdaptiveScale,
    ServiceSpec,
    decode_spec,
    unsupported_fields,
    validate_spec,
)

ENDPOINT = {"name": "http", "protocol": "http", "port": 8080}
DEFAULTS_WRITTEN_OUT: dict[str, Any] = {
    "rtype": "service",
    "schedule": None,
    "image": {"name": "base", "pull_policy": "if_not_present", "source_policy": "local_first"},
    "resources": {
        "cpu": None,
        "memory": None,
        "pids_limit": None,
        "gpu": None,
        "cpuset": None,
        "memory_swap": None,
        "memory_reservation": None,
        "cpu_shares": None,
        "memory_swappiness": None,
        "oom_score_adj": None,
        "oom_kill_disable": None,
        "blkio_weight": None,
        "cpu_time_limit": None,
        "max_files": 4096,
    },
    "env": {},
    "command": {"entrypoint": None, "args": None, "workdir": None},
    "network": {
        "access": "auto",
        "connect_ports": [],
        "overlays": {
            "service": {"enabled": True, "encrypted": True, "isolated": True},
            "global": {"enabled": True, "encrypted": True, "isolated": False},
        },
        "join": {"mode": "token", "scope": "service"},
    },
    "endpoints": [
        {
            **ENDPOINT,
            "target_port": None,
            "path": None,
            "host": None,
            "expose": "internal",
            "stream": None,
            "target_role": None,
            "tunnel": None,
        }
    ],
    "scale": {"mode": "adaptive", "min": 1, "max": 10, "cooldown": "30s", "targets": {"cpu": None}},
    "replica_groups": None,
    "depends": [],
    "health": {"start_grace": "5s", "retries": 3, "check": {"type": "tcp", "port": 0}},
    "init": {"steps": []},
    "errors": {"on_init_failure": {"action": "fail"}, "on_panic": {"action": "restart"}},
    "lifecycle": {"delete_on_exit": False},
    "isolation": "auto",
    "devices": [],
    "storage": [],
    "port_mappings": [],
    "capabilities": [],
    "cap_drop": [],
    "privileged": False,
    "node_mode": "shared",
    "node_selector": None,
    "affinity": None,
    "platform": None,
    "service_type": "standard",
    "wasm": None,
    "logs": None,
    "host_network": False,
    "hostname": None,
    "dns": [],
    "extra_hosts": [],
    "restart_policy": None,
    "labels": {},
    "user": None,
    "stop_signal": None,
    "stop_grace_period": None,
    "ulimits": {},
    "sysctls": {},
    "security_opt": [],
    "extra_groups": [],
    "pid_mode": None,
    "ipc_mode": None,
    "userns_mode": None,
    "cgroup_parent": None,
    "network_mode": "default",
    "init_container": None,
    "tty": False,
    "stdin_open": False,
    "read_only_root_fs": False,
    "expose": [],
    "overlay": {"mode": "auto", "parent": None},
    "localhost_reachability": "auto",
    "sandbox": {
        "isolation": "auto",
        "groups": [],
        "read": [],
        "write": [],
        "mach_lookup": [],
        "unix_sockets": [],
        "require": [],
    },
    "ttl_after_finished_s": None,
}


def spec(**fields: Any) -> ServiceSpec:
    return decode_spec({"image": {"name": "base"}, **fields})


def refused(kind: type[ContractError], field: str, **fields: Any) -> ContractError:
    with pytest.raises(kind) as caught:
        spec(**fields)
    assert type(caught.value) is kind, caught.value
    assert caught.value.field == field, caught.value.message
    caught.value.message.encode()
    return caught.value


def test_every_default_written_out_is_accepted_and_needs_nothing() -> None:
    made = decode_spec(DEFAULTS_WRITTEN_OUT)
    assert unsupported_fields(made, frozenset()) == []
    assert set(DEFAULTS_WRITTEN_OUT) == {field.encode_name for field in msgspec.structs.fields(ServiceSpec)}
    assert made == decode_spec(
        {
            "image": {"name": "base", "source_policy": "local_first"},
            "endpoints": [ENDPOINT],
            "isolation": "auto",
            "health": DEFAULTS_WRITTEN_OUT["health"],
            "host_network": False,
            "overlay": {},
        }
    )


def test_the_shortest_spec() -> None:
    made = spec()
    assert made.image.name == "base"
    assert made.stop_grace_s == 10
    assert made.resources.memory_bytes is None
    assert made.resources.max_files == 4096
    assert made.scale == AdaptiveScale(min=1, max=10, cooldown="30s")
    assert made.health is None
    assert msgspec.json.encode(made) == b'{"image":{"name":"base"}}'


def test_numbers_of_what_is_written() -> None:
    made = spec(
        resources={"memory": "2Gi", "cpu_time_limit": "1m30s", "pids_limit": 10},
        stop_grace_period="2m",
        health={"interval": "1s", "check": {"type": "command", "command": "true"}},
        logs={"max_size_bytes": 5, "max_rate": "1Mi"},
        ulimits={"nofile": {"soft": 5}, "core": {}, "nproc": {"soft": 1, "hard": -1}},
        endpoints=[ENDPOINT, {**ENDPOINT, "name": "b", "target_port": 9000}],
        storage=[{"type": "named", "name": "a", "target": "/a", "size": "1Ki"}],
        init={"steps": [{"id": "a", "uses": "init.run", "with": {"command": "true"}}]},
        restart_policy={"kind": "always", "delay": "250ms"},
    )
    assert made.resources.memory_bytes == 2**31
    assert made.resources.cpu_time_limit_s == 90
    assert made.resources.pids == 10
    assert made.stop_grace_s == 120
    assert made.health is not None
    assert (made.health.interval_s, made.health.timeout_s, made.health.start_grace_s) == (1, 5, 5)
    assert made.logs is not None
    assert (made.logs.kept_bytes, made.logs.max_rate_bytes) == (5, 2**20)
    assert [limit.pair for limit in made.ulimits.values()] == [(5, 5), (0, 0), (1, -1)]
    assert [endpoint.listen_port for endpoint in made.endpoints] == [8080, 9000]
    assert made.storage[0].size_bytes == 1024  # type: ignore[union-attr]
    assert made.init.steps[0].timeout_s == 300
    assert made.restart_policy is not None
    assert made.restart_policy.delay_s == 0.25
    assert spec(resources={"pids_limit": -1}).resources.pids is None
    assert spec(logs={}).logs.kept_bytes == 64 * 2**20  # type: ignore[union-attr]


def test_written_again_it_is_the_same() -> None:
    made = decode_spec(DEFAULTS_WRITTEN_OUT)
    assert decode_spec(msgspec.json.encode(made)) == made
    assert decode_spec(json.dumps(DEFAULTS_WRITTEN_OUT).encode()) == made


BROKEN: list[tuple[str, dict[str, Any]]] = [
    ("spec.colour", {"colour": 1}),
    ("spec.image", {"image": "base"}),
    ("spec.image.name", {"image": {}}),
    ("spec.image.name", {"image": {"name": "A b"}}),
    ("spec.image.tag", {"image": {"name": "base", "tag": "x"}}),
    ("spec.image.pull_policy", {"image": {"name": "base", "pull_policy": "sometimes"}}),
    ("spec.rtype", {"rtype": "daemon"}),
    ("spec.schedule", {"rtype": "cron"}),
    ("spec.schedule", {"schedule": "0 0 0 * * *"}),
    ("spec.schedule", {"rtype": "cron", "schedule": "* * * * *"}),
    ("spec.command.entrypoint", {"command": {"entrypoint": "sh"}}),
    ("spec.command.entrypoint[0]", {"command": {"entrypoint": ["a\0"]}}),
    ("spec.command.entrypoint[0]", {"command": {"entrypoint": [""]}}),
    ("spec.command.entrypoint[0]", {"command": {"entrypoint": ["../sh"]}}),
    ("spec.command.entrypoint[1]", {"command": {"entrypoint": ["sh", 5]}}),
    ("spec.command.args[0]", {"command": {"args": ["a\nb"]}}),
    ("spec.command.args[1]", {"command": {"entrypoint": ["sh"], "args": ["ok", "\x07"]}}),
    ("spec.command.workdir", {"command": {"workdir": "/a/../b"}}),
    ("spec.command.workdir", {"command": {"workdir": ""}}),
    ("spec.env.PORT", {"env": {"A": "1", "PORT": 80, "Z": "1"}}),
    ("spec.env.A=B", {"env": {"A=B": "1"}}),
    ("spec.env", {"env": {"": "1"}}),
    ("spec.env.A", {"env": {"A": "x\0"}}),
    ("spec.env.A", {"env": {"A": "$S:1x"}}),
    ("spec.env.A", {"env": {"A": "$S:"}}),
    ("spec.env.A", {"env": {"A": "$S:@a b/c"}}),
    ("spec.env.A", {"env": {"A": "$E:"}}),
    ("spec.env", {"env": None}),
    ("spec.resources.cpu", {"resources": {"cpu": 0}}),
    ("spec.resources.cpu", {"resources": {"cpu": -1.5}}),
    ("spec.resources.cpu", {"resources": {"cpu": math.nan}}),
    ("spec.resources.cpu", {"resources": {"cpu": math.inf}}),
    ("spec.resources.cpu", {"resources": {"cpu": 10**400}}),
    ("spec.resources.memory", {"resources": {"memory": "512MB"}}),
    ("spec.resources.memory", {"resources": {"memory": 0}}),
    ("spec.resources.memory", {"resources": {"memory": 1.5}}),
    ("spec.resources.memory", {"resources": {"memory": True}}),
    ("spec.resources.max_files", {"resources": {"max_files": 0}}),
    ("spec.resources.max_files", {"resources": {"max_files": "many"}}),
    ("spec.resources.pids_limit", {"resources": {"pids_limit": -2}}),
    ("spec.resources.cpu_time_limit", {"resources": {"cpu_time_limit": 0}}),
    ("spec.resources.cpu_time_limit", {"resources": {"cpu_time_limit": "soon"}}),
    ("spec.resources.cpu_shares", {"resources": {"cpu_shares": 2**32}}),
    ("spec.resources.gpu.count", {"resources": {"gpu": {"count": -1}}}),
    ("spec.resources.gpu.scheduling", {"resources": {"gpu": {"scheduling": "best_effort"}}}),
    ("spec.endpoints[0].name", {"endpoints": [{**ENDPOINT, "name": ""}]}),
    ("spec.endpoints[1].name", {"endpoints": [ENDPOINT, ENDPOINT]}),
    ("spec.endpoints[0].port", {"endpoints": [{**ENDPOINT, "port": 0}]}),
    ("spec.endpoints[0].port", {"endpoints": [{**ENDPOINT, "port": 65536}]}),
    ("spec.endpoints[0].target_port", {"endpoints": [{**ENDPOINT, "target_port": 0}]}),
    ("spec.endpoints[0].protocol", {"endpoints": [{**ENDPOINT, "protocol": "quic"}]}),
    ("spec.network.access", {"network": {"access": "wan"}}),
    ("spec.network.connect_ports[1]", {"network": {"connect_ports": [80, 0]}}),
    ("spec.storage[0].type", {"storage": [{"type": "nfs", "target": "/a"}]}),
    ("spec.storage[0].type", {"storage": [{"target": "/a"}]}),
    ("spec.storage[0].source", {"storage": [{"type": "bind", "source": "a", "target": "/a"}]}),
    ("spec.storage[0].source", {"storage": [{"type": "bind", "source": "/a/..", "target": "/a"}]}),
    ("spec.storage[0].target", {"storage": [{"type": "anonymous", "target": "/a/../b"}]}),
    ("spec.storage[0].target", {"storage": [{"type": "anonymous", "target": "/"}]}),
    ("spec.storage[0].target", {"storage": [{"type": "anonymous", "target": "/a\0"}]}),
    (
        "spec.storage[1].target",
        {"storage": [{"type": "anonymous", "target": "/a/b"}, {"type": "tmpfs", "target": "a//./b/"}]},
    ),
    ("spec.storage[0].name", {"storage": [{"type": "named", "name": "A_b", "target": "/a"}]}),
    ("spec.storage[0].size", {"storage": [{"type": "tmpfs", "target": "/a", "size": "1G"}]}),
    ("spec.storage[0].mode", {"storage": [{"type": "tmpfs", "target": "/a", "mode": "0755"}]}),
    ("spec.storage[0].mode", {"storage": [{"type": "tmpfs", "target": "/a", "mode": 0o10000}]}),
    ("spec.storage[0].bucket", {"storage": [{"type": "s3", "bucket": "", "target": "/a"}]}),
    ("spec.health.check", {"health": {}}),
    ("spec.health.check.port", {"health": {"check": {"type": "tcp"}}}),
    ("spec.health.check.port", {"health": {"check": {"type": "tcp", "port": 0}}}),
    (
        "spec.health.check.port",
        {"health": {"check": {"type": "tcp", "port": 0}}, "endpoints": [{**ENDPOINT, "protocol": "udp"}]},
    ),
    ("spec.health.check.url", {"health": {"check": {"type": "http", "url": "ftp://a"}}}),
    ("spec.health.check.url", {"health": {"check": {"type": "http", "url": "http://"}}}),
    ("spec.health.check.url", {"health": {"check": {"type": "http", "url": "http://a:99999/"}}}),
    ("spec.health.check.url", {"health": {"check": {"type": "http", "url": "http://[a/"}}}),
    (
        "spec.health.check.expect_status",
        {"health": {"check": {"type": "http", "url": "http://a", "expect_status": 99}}},
    ),
    ("spec.health.check.command", {"health": {"check": {"type": "command", "command": " "}}}),
    ("spec.health.retries", {"health": {"retries": 0, "check": {"type": "tcp", "port": 1}}}),
    ("spec.health.interval", {"health": {"interval": "0s", "check": {"type": "tcp", "port": 1}}}),
    ("spec.health.start_grace", {"health": {"start_grace": "x", "check": {"type": "tcp", "port": 1}}}),
    ("spec.health.check.grace", {"health": {"check": {"type": "tcp", "port": 1, "grace": 1}}}),
    ("spec.init.steps[0].uses", {"init": {"steps": [{"id": "a", "uses": "init.sleep"}]}}),
    ("spec.init.steps[0].id", {"init": {"steps": [{"id": "", "uses": "init.run"}]}}),
    ("spec.init.steps[0].with.command", {"init": {"steps": [{"id": "a", "uses": "init.run"}]}}),
    (
        "spec.init.steps[0].with.port",
        {"init": {"steps": [{"id": "a", "uses": "init.wait_tcp", "with": {"host": "h", "port": "80"}}]}},
    ),
    (
        "spec.init.steps[0].with.shell",
        {"init": {"steps": [{"id": "a", "uses": "init.run", "with": {"command": "x", "shell": "y"}}]}},
    ),
    (
        "spec.init.steps[0].with.url",
        {"init": {"steps": [{"id": "a", "uses": "init.wait_http", "with": {"url": "x"}}]}},
    ),
    (
        "spec.init.steps[0].with.command.a[0]",
        {"init": {"steps": [{"id": "a", "uses": "init.run", "with": {"command": {"a": [math.nan]}}}]}},
    ),
    (
        "spec.init.steps[1].id",
        {"init": {"steps": [{"id": "a", "uses": "init.run", "with": {"command": "x"}}] * 2}},
    ),
    ("spec.restart_policy.kind", {"restart_policy": {}}),
    ("spec.restart_policy.kind", {"restart_policy": {"kind": False}}),
    ("spec.restart_policy.delay", {"restart_policy": {"kind": "always", "delay": "x"}}),
    ("spec.sandbox.isolation", {"sandbox": {"isolation": "vm"}}),
    ("spec.sandbox.read[0]", {"sandbox": {"read": ["etc"]}}),
    ("spec.sandbox.write[1]", {"sandbox": {"write": ["/a", "/a/../b"]}}),
    ("spec.sandbox.groups[0]", {"sandbox": {"groups": ["A B"]}}),
    ("spec.sandbox.mach_lookup[0]", {"sandbox": {"mach_lookup": ['com."x"']}}),
    ("spec.sandbox.unix_sockets[0]", {"sandbox": {"unix_sockets": ["/a\n"]}}),
    ("spec.sandbox.require[0]", {"sandbox": {"require": ["magic"]}}),
    ("spec.stop_signal", {"stop_signal": "SIGNOPE"}),
    ("spec.stop_signal", {"stop_signal": 15}),
    ("spec.stop_grace_period", {"stop_grace_period": -1}),
    ("spec.user", {"user": "a b"}),
    ("spec.user", {"user": ""}),
    ("spec.labels", {"labels": {str(n): "" for n in range(65)}}),
    ("spec.labels", {"labels": {str(n): "x" * 200 for n in range(60)}}),
    ("spec.labels.a", {"labels": {"a": "x\n"}}),
    ("spec.labels.a", {"labels": {"a": 1}}),
    ("spec.platform.os", {"platform": {"os": "darwin", "arch": "arm64"}}),
    ("spec.platform.arch", {"platform": {"os": "macos"}}),
    ("spec.ulimits.files", {"ulimits": {"files": {"soft": 1}}}),
    ("spec.ulimits.nofile", {"ulimits": {"core": {}, "nofile": {"soft": 5, "hard": 4}}}),
    ("spec.ulimits.nofile", {"ulimits": {"nofile": {"soft": -1, "hard": 4}}}),
    ("spec.ulimits.nofile.soft", {"ulimits": {"core": {}, "nofile": {"soft": "5"}, "data": {"soft": 1}}}),
    ("spec.ulimits.nofile.medium", {"ulimits": {"core": {}, "nofile": {"medium": 5}}}),
    ("spec.ulimits.nofile", {"ulimits": {"core": {}, "nofile": 4096}}),
    ("spec.devices[0].path", {"devices": [{"path": ""}]}),
    ("spec.devices[0].path", {"devices": [{"path": "dev/null"}]}),
    ("spec.logs.max_size_bytes", {"logs": {"max_size_bytes": 0}}),
    ("spec.logs.max_rate", {"logs": {"max_rate": "fast"}}),
    ("spec.ttl_after_finished_s", {"ttl_after_finished_s": -1}),
    ("spec.scale.mode", {"scale": {"mode": "wild"}}),
    ("spec.scale.replicas", {"scale": {"mode": "fixed"}}),
    ("spec.scale.min", {"scale": {"mode": "adaptive", "min": 2, "max": 1}}),
    ("spec.scale.targets.cpu", {"scale": {"mode": "adaptive", "min": 1, "max": 1, "targets": {"cpu": 101}}}),
    ("spec.scale.cooldown", {"scale": {"mode": "adaptive", "min": 1, "max": 1, "cooldown": "x"}}),
    ("spec.depends[0].service", {"depends": [{"service": "A"}]}),
    ("spec.depends[0].timeout", {"depends": [{"service": "a", "timeout": "x"}]}),
    ("spec.node_selector.labels.a", {"node_selector": {"labels": {"a": "\0"}}}),
    ("spec.network_mode", {"network_mode": "wild"}),
    ("spec.network_mode", {"network_mode": "container:"}),
    ("spec.network_mode", {"network_mode": {"bridge": {}, "container": {"id": "a"}}}),
    ("spec.network_mode", {"network_mode": {}}),
    ("spec.network_mode.moat", {"network_mode": {"moat": {}}}),
    ("spec.affinity", {"affinity": "near"}),
    ("spec.cap_add", {"cap_add": [], "capabilities": []}),
    ("spec.wasm_http", {"wasm_http": None, "wasm": None}),
]


@pytest.mark.parametrize(("field", "fields"), BROKEN)
def test_broken(field: str, fields: dict[str, Any]) -> None:
    refused(InvalidSpec, field, **fields)


def test_the_prefix_of_fields_is_the_caller_s() -> None:
    for field, expected in (("", "colour"), ("services.web", "services.web.colour")):
        with pytest.raises(InvalidSpec) as caught:
            decode_spec({"image": {"name": "a"}, "colour": 1}, field=field)
        assert caught.value.field == expected
    with pytest.raises(InvalidSpec) as caught:
        validate_spec(spec_with_bad_memory(), field="x")
    assert caught.value.field == "x.resources.memory"


def spec_with_bad_memory() -> ServiceSpec:
    return msgspec.convert({"image": {"name": "a"}, "resources": {"memory": "1G"}}, ServiceSpec)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


def check_answer(failure: ContractError) -> None:
    """The error is small and can be written whatever the input held."""
    assert failure.field is not None
    assert failure.field.startswith("spec")
    assert len(failure.field) <= 256
    assert len(msgspec.json.encode(failure.to_error())) < 30_000


@given(st.sampled_from(sorted(DEFAULTS_WRITTEN_OUT)), json_values)
def test_no_value_of_a_field_crashes(name: str, value: Any) -> None:
    try:
        made = decode_spec({"image": {"name": "base"}, name: value})
    except ContractError as failure:
        check_answer(failure)
        return
    assert decode_spec(msgspec.json.encode(made)) == made
