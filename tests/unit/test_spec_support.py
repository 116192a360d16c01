"""What no node can honour is refused by name; what a node may lack is listed by name."""

from typing import Any

import pytest

from schemas.errors import Unsupported
from schemas.spec import (
    ALL_FEATURES,
    IMPLICIT_HEALTH,
    ServiceSpec,
    SpecFeature,
    decode_spec,
    unsupported_fields,
)
from schemas.spec_support import ACCEPTED

ENDPOINT = {"name": "http", "protocol": "http", "port": 8080}


def spec(**fields: Any) -> ServiceSpec:
    return decode_spec({"image": {"name": "base"}, **fields})


OVERLAY = {"enabled": True, "encrypted": True}
UNSUPPORTED: list[tuple[str, dict[str, Any]]] = [
    ("spec.image.source_policy", {"image": {"name": "base", "source_policy": "s3_first"}}),
    ("spec.env.A", {"env": {"A": "$S:@db/password"}}),
    *[
        (f"spec.resources.{name}", {"resources": {name: value}})
        for name, value in {
            "cpuset": "0-1",
            "memory_swap": "1Gi",
            "memory_reservation": "1Gi",
            "cpu_shares": 2,
            "memory_swappiness": 1,
            "oom_score_adj": -5,
            "oom_kill_disable": True,
            "blkio_weight": 10,
        }.items()
    ],
    ("spec.resources.gpu.vendor", {"resources": {"gpu": {}}}),
    ("spec.resources.gpu.vendor", {"resources": {"gpu": {"vendor": "amd"}}}),
    ("spec.resources.gpu.mode", {"resources": {"gpu": {"vendor": "apple", "mode": "vm"}}}),
    *[
        (f"spec.resources.gpu.{name}", {"resources": {"gpu": {"vendor": "apple", name: value}}})
        for name, value in {
            "model": "A100",
            "scheduling": "gang",
            "distributed": {},
            "sharing": "time-slice",
            "mps_pipe_dir": "/a",
            "mps_log_dir": "/a",
            "time_slicing_config_path": "/a",
            "time_slice_index": 0,
        }.items()
    ],
    ("spec.endpoints[1].host", {"endpoints": [ENDPOINT, {**ENDPOINT, "name": "b", "host": "*.a"}]}),
    (
        "spec.endpoints[0].stream",
        {"endpoints": [{**ENDPOINT, "stream": {"health_check": {"type": "tcp_connect"}}}]},
    ),
    ("spec.endpoints[0].tunnel", {"endpoints": [{**ENDPOINT, "tunnel": {"access": {"max_ttl": "1h"}}}]}),
    ("spec.endpoints[0].target_role", {"endpoints": [{**ENDPOINT, "target_role": "a"}]}),
    ("spec.network.overlays", {"network": {"overlays": {}}}),
    ("spec.network.overlays", {"network": {"overlays": {"service": {**OVERLAY, "isolated": True}}}}),
    ("spec.network.overlays", {"network": {"overlays": {"service": {}, "global": {}}}}),
    ("spec.network.join", {"network": {"join": {"mode": "open"}}}),
    ("spec.storage[0].tier", {"storage": [{"type": "anonymous", "target": "/a", "tier": "network"}]}),
    ("spec.devices[0].mknod", {"devices": [{"path": "/dev/null", "mknod": True}]}),
    ("spec.logs.destination", {"logs": {"destination": "memory"}}),
    ("spec.logs.retention_secs", {"logs": {"retention_secs": 1}}),
    ("spec.errors.on_panic.action", {"errors": {"on_panic": {"action": "isolate"}}}),
    ("spec.platform.osVersion", {"platform": {"os": "macos", "arch": "arm64", "osVersion": "15"}}),
    *[
        (f"spec.{name}", {name: value})
        for name, value in {
            "replica_groups": [{"role": "a", "count": 1}],
            "isolation": "hyperv",
            "port_mappings": [{"container_port": 80}],
            "capabilities": ["NET_ADMIN"],
            "privileged": True,
            "node_mode": "dedicated",
            "affinity": "spread",
            "service_type": "job",
            "wasm": {"x": 1},
            "hostname": "a",
            "dns": ["1.1.1.1"],
            "extra_hosts": ["a:1.1.1.1"],
            "sysctls": {"a": "1"},
            "security_opt": ["a"],
            "extra_groups": ["a"],
            "pid_mode": "host",
            "ipc_mode": "host",
            "userns_mode": "host",
            "cgroup_parent": "/a",
            "network_mode": "bridge",
            "init_container": True,
            "stdin_open": True,
            "read_only_root_fs": True,
            "expose": ["3000"],
            "overlay": {"mode": "shared"},
            "localhost_reachability": "never",
        }.items()
    ],
    ("spec.affinity", {"affinity": {"pin": "id=2"}}),
    ("spec.network_mode", {"network_mode": {"bridge": {"name": "x"}}}),
    ("spec.network_mode", {"network_mode": "container:x"}),
    ("spec.capabilities", {"cap_add": ["NET_ADMIN"]}),
    ("spec.wasm", {"wasm_http": {"a": 1}}),
]


@pytest.mark.parametrize(("field", "fields"), UNSUPPORTED)
def test_unsupported(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(Unsupported) as caught:
        spec(**fields)
    assert caught.value.field == field, caught.value.message


def test_no_rule_of_support_is_untested() -> None:
    tested = {
        field.removeprefix("spec.").replace("[0]", "[]").replace("[1]", "[]") for field, _ in UNSUPPORTED
    }
    assert set(ACCEPTED) <= tested


@pytest.mark.parametrize(
    "fields",
    [
        {"host_network": True},
        {"network_mode": "host"},
        {"cap_drop": ["ALL"]},
        {"localhost_reachability": "always"},
        {"init_container": False},
        {"replica_groups": []},
        {"resources": {"oom_kill_disable": False}},
        {"resources": {"gpu": {"vendor": "apple", "mode": "anything", "sharing": "exclusive"}}},
        {"errors": {"on_panic": {"action": "shutdown"}}},
        {"cap_add": []},
        {"wasm_http": None},
        {"scale": {"mode": "manual"}},
        {"scale": {"mode": "fixed", "replicas": 0}},
        {"depends": [{"service": "a", "timeout": None, "on_timeout": "warn", "condition": "ready"}]},
        {"rtype": "job"},
        {"command": {"args": ["bin/x", "", "line\nline"]}},
        {"command": {"entrypoint": [], "args": []}},
        {"stop_signal": "15"},
        {"stop_signal": "QUIT"},
        {"user": "1000:1000"},
        {"sandbox": {"require": ["network.localhost", "memory"]}},
        {"health": {"check": {"type": "tcp", "port": 0}}, "endpoints": [ENDPOINT]},
    ],
)
def test_accepted(fields: dict[str, Any]) -> None:
    spec(**fields)


NEEDS: list[tuple[SpecFeature, list[str], dict[str, Any]]] = [
    (SpecFeature.HEALTH, ["health"], {"health": {"check": {"type": "tcp", "port": 1}}}),
    (SpecFeature.RESTART, ["restart_policy"], {"restart_policy": {"kind": "always"}}),
    (SpecFeature.SCHEDULE, ["schedule"], {"rtype": "cron", "schedule": "@daily"}),
    (SpecFeature.ERRORS, ["errors"], {"errors": {"on_panic": {"action": "shutdown"}}}),
    (SpecFeature.DEVICES, ["devices"], {"devices": [{"path": "/dev/null"}]}),
    (SpecFeature.TTY, ["tty"], {"tty": True}),
    (SpecFeature.USER, ["user"], {"user": "root"}),
    (SpecFeature.SECRETS, ["env.A"], {"env": {"A": "$S:x", "B": "$E:HOME"}}),
    (
        SpecFeature.VOLUMES_BIND,
        ["storage[0]"],
        {"storage": [{"type": "bind", "source": "/a", "target": "/b"}]},
    ),
    (
        SpecFeature.VOLUMES_NAMED,
        ["storage[0]"],
        {"storage": [{"type": "named", "name": "a", "target": "/b"}]},
    ),
    (SpecFeature.VOLUMES_ANONYMOUS, ["storage[0]"], {"storage": [{"type": "anonymous", "target": "/b"}]}),
    (
        SpecFeature.VOLUMES_TMPFS,
        ["storage[0]"],
        {"storage": [{"type": "tmpfs", "target": "/b", "mode": 0o755}]},
    ),
    (SpecFeature.VOLUMES_S3, ["storage[0]"], {"storage": [{"type": "s3", "bucket": "b", "target": "/b"}]}),
    (SpecFeature.ISOLATION_ROOTFS, ["sandbox.isolation"], {"sandbox": {"isolation": "rootfs"}}),
    (SpecFeature.GPU, ["resources.gpu"], {"resources": {"gpu": {"vendor": "apple"}}}),
    (SpecFeature.ULIMITS, ["ulimits"], {"ulimits": {"core": {"soft": 0}}}),
    (SpecFeature.PLATFORM, ["platform"], {"platform": {"os": "linux", "arch": "amd64"}}),
    (SpecFeature.TTL_AFTER_FINISHED, ["ttl_after_finished_s"], {"ttl_after_finished_s": 0}),
    (SpecFeature.LOGS_MAX_RATE, ["logs.max_rate"], {"logs": {"max_rate": 1000}}),
    (SpecFeature.RESOURCES_CPU, ["resources.cpu"], {"resources": {"cpu": 0.5}}),
    (SpecFeature.RESOURCES_PIDS, ["resources.pids_limit"], {"resources": {"pids_limit": 5}}),
    (
        SpecFeature.INIT,
        ["init"],
        {"init": {"steps": [{"id": "a", "uses": "init.run", "with": {"command": "x"}}]}},
    ),
]


@pytest.mark.parametrize(("feature", "fields", "written"), NEEDS)
def test_a_capability_is_asked_for(feature: SpecFeature, fields: list[str], written: dict[str, Any]) -> None:
    made = spec(**written)
    assert unsupported_fields(made, frozenset()) == fields
    assert unsupported_fields(made, ALL_FEATURES - {feature}) == fields
    assert unsupported_fields(made, frozenset({feature.value})) == []


def test_s3_steps_need_more() -> None:
    step = {"id": "a", "uses": "init.s3_pull", "with": {"bucket": "b", "key": "k", "destination": "/d"}}
    made = spec(init={"steps": [step]})
    assert unsupported_fields(made, frozenset({"init"})) == ["init.steps[0].uses"]
    assert {feature for feature, _, _ in NEEDS} | {SpecFeature.INIT_S3} == set(SpecFeature)


def test_health_as_implied_needs_nothing() -> None:
    for grace in ("5s", 5, 5.0, "5000ms"):
        written = {"start_grace": grace, "retries": 3, "check": {"type": "tcp", "port": 0}}
        assert unsupported_fields(spec(health=written, endpoints=[ENDPOINT]), frozenset()) == []
    assert IMPLICIT_HEALTH.retries == 3
    other = {"check": {"type": "tcp", "port": 0}}
    assert unsupported_fields(spec(health=other, endpoints=[ENDPOINT]), frozenset()) == ["health"]
    assert unsupported_fields(spec(restart_policy={"kind": "no"}), frozenset()) == []
