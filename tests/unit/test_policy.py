"""From a spec to a sandbox policy, within the operator's grants."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import ContractError, InvalidSpec, Unsupported
from schemas.node import Capabilities, Feature, NotEnforced
from schemas.spec import ServiceSpec, decode_spec
from schemas.status import Gpu, Network
from worker.config import Config
from worker.config_model import PolicyConfig
from worker.datadir import ContainerDirs
from worker.errors import PolicyDenied
from worker.platform.base import PathRule, RuleGroup, SandboxPolicy
from worker.policy import HostFacts, make_policy
from worker.policy_paths import (
    Forbidden,
    Missing,
    NotGranted,
    below,
    granted_path,
    granted_socket,
    overlap,
    real_path,
)

NATS_PORT = 4222


class FakeDriver:
    """A platform that has everything, with the gaps it is told."""

    name = "darwin"

    def __init__(
        self, *gaps: NotEnforced, gpu: tuple[str, ...] = ("none", "metal_compute", "mps_only")
    ) -> None:
        self._gaps = list(gaps)
        self._gpu = list(gpu)

    def capabilities(self) -> Capabilities:
        return Capabilities(
            sandbox="fake",
            network=[],
            gpu=self._gpu,
            isolation=["process"],
            clone="copy",
            limits=[],
            not_enforced=[],
        )

    def groups(self) -> dict[str, RuleGroup]:
        return {
            "calm": RuleGroup(name="calm", harmless=True, text=""),
            "wild": RuleGroup(name="wild", harmless=False, text=""),
        }

    def not_enforced(self, policy: SandboxPolicy) -> list[NotEnforced]:
        return self._gaps


class Node:
    """A data directory and a folder of the host, with what the operator grants."""

    def __init__(self, top: Path) -> None:
        self.data = top / "data"
        self.host = top / "host"
        self.dirs = ContainerDirs(self.data / "containers" / "web-0")
        self.dirs.rootfs.mkdir(parents=True)
        (self.host / "granted" / "deep").mkdir(parents=True)
        (self.host / "other").mkdir()
        self.granted = str(self.host / "granted")

    def policy(
        self,
        spec: dict[str, Any] | None = None,
        *,
        driver: Any = None,
        port: int | None = 30000,
        **grants: Any,
    ) -> SandboxPolicy:
        decoded: ServiceSpec = decode_spec({"image": {"name": "app"}, **(spec or {})})
        return make_policy(
            decoded,
            config=Config(policy=PolicyConfig(**grants), source="node.toml"),
            dirs=self.dirs,
            cid="web-0",
            instance="0" * 26,
            port=port,
            host=HostFacts(
                data_root=str(self.data), protected=(str(self.host / "other"),), nats_ports=(NATS_PORT,)
            ),
            driver=driver or FakeDriver(),
        )

    def refused(self, error: type[ContractError], spec: dict[str, Any], **grants: Any) -> tuple[str, str]:
        """(field, message) of the refusal."""
        with pytest.raises(error) as caught:
            self.policy(spec, **grants)
        assert caught.value.field is not None
        return caught.value.field, caught.value.message


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


# -- the default


def test_a_bare_spec_gets_its_rootfs_and_tmp_and_the_whole_network(node: Node) -> None:
    policy = node.policy()
    assert policy.paths == (
        PathRule(str(node.dirs.rootfs), "rwx", "rootfs"),
        PathRule(str(node.dirs.tmp), "rwx", "tmp"),
    )
    assert policy.network.level is Network.FULL
    assert policy.network.udp
    assert policy.gpu is Gpu.NONE
    assert policy.limits.max_files == 4096
    assert policy.limits.memory_bytes is None
    assert (policy.groups, policy.mach_lookup, policy.volumes, policy.devices) == ((), (), (), ())
    assert policy.instance in policy.marker


def test_the_nodes_own_files_are_never_reachable(node: Node) -> None:
    denied = node.policy().deny
    for name in ("worker.db", "launcher.key", "secrets", "node.json"):
        assert str(node.data / name) in denied
    assert str(node.dirs.state) in denied
    assert str(node.host / "other") in denied
    assert not any(overlap(path, str(node.dirs.rootfs)) for path in denied)


# -- network


@pytest.mark.parametrize(
    ("spec", "level"),
    [
        ({}, Network.FULL),
        ({"endpoints": [{"name": "a", "protocol": "tcp", "port": 80}]}, Network.LOCALHOST),
        ({"network": {"access": "none"}}, Network.NONE),
        ({"network": {"access": "outbound"}}, Network.OUTBOUND),
    ],
)
def test_levels(node: Node, spec: dict[str, Any], level: Network) -> None:
    assert node.policy(spec).network.level is level


def test_localhost_opens_the_named_ports_and_no_more(node: Node) -> None:
    endpoints = [
        {"name": "a", "protocol": "http", "port": 80, "target_port": 9000},
        {"name": "b", "protocol": "tcp", "port": 6379},
    ]
    network = node.policy({"endpoints": endpoints, "network": {"connect_ports": [5432]}}).network
    assert network.bind_ports == (6379, 9000, 30000)
    assert network.connect_ports == (53, 80, 443, 5432, 6379, 9000, 30000)
    assert network.denied_ports == (NATS_PORT,)
    assert not network.udp


def test_outbound_keeps_loopback_to_connect_ports(node: Node) -> None:
    network = node.policy({"network": {"access": "outbound", "connect_ports": [5432]}}).network
    assert network.connect_ports == (5432,)
    assert network.bind_ports == (30000,)
    assert network.udp


def test_udp_under_localhost_is_for_udp_endpoints(node: Node) -> None:
    assert node.policy({"endpoints": [{"name": "dns", "protocol": "udp", "port": 53}]}).network.udp


def test_none_opens_nothing(node: Node) -> None:
    spec = {"network": {"access": "none"}, "endpoints": [{"name": "a", "protocol": "tcp", "port": 80}]}
    network = node.policy(spec).network
    assert (network.bind_ports, network.connect_ports, network.udp) == ((), (), False)


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        (
            {"network": {"access": "localhost", "connect_ports": [80, NATS_PORT]}},
            "spec.network.connect_ports[1]",
        ),
        ({"endpoints": [{"name": "a", "protocol": "tcp", "port": NATS_PORT}]}, "spec.endpoints[0].port"),
        (
            {"endpoints": [{"name": "a", "protocol": "tcp", "port": 80, "target_port": NATS_PORT}]},
            "spec.endpoints[0].target_port",
        ),
    ],
)
def test_the_port_of_the_nats_server_is_nobodys(node: Node, spec: dict[str, Any], field: str) -> None:
    assert node.refused(PolicyDenied, spec)[0] == field


def test_a_well_known_port_that_is_the_nats_servers_is_left_out(node: Node) -> None:
    decoded = decode_spec({"image": {"name": "app"}, "network": {"access": "localhost"}})
    host = HostFacts(data_root=str(node.data), nats_ports=(443,))
    made = make_policy(
        decoded,
        config=Config(),
        dirs=node.dirs,
        cid="web-0",
        instance="0" * 26,
        port=None,
        host=host,
        driver=FakeDriver(),  # type: ignore[arg-type]
    )
    assert made.network.connect_ports == (53, 80)


def test_a_level_that_the_node_has_not(node: Node) -> None:
    field, message = node.refused(PolicyDenied, {}, network=(Network.NONE, Network.LOCALHOST))
    assert field == "spec.network.access"
    assert "full" in message
    assert "node.toml" in message


# -- paths


@pytest.mark.parametrize(
    ("spec", "field", "key"),
    [
        (lambda p: {"sandbox": {"read": [p]}}, "spec.sandbox.read[0]", "read"),
        (lambda p: {"sandbox": {"write": [p]}}, "spec.sandbox.write[0]", "write"),
        (lambda p: {"sandbox": {"unix_sockets": [p]}}, "spec.sandbox.unix_sockets[0]", "unix_sockets"),
        (
            lambda p: {"storage": [{"type": "bind", "source": p, "target": "/x"}]},
            "spec.storage[0].source",
            "bind_sources",
        ),
        (lambda p: {"devices": [{"path": p}]}, "spec.devices[0].path", "write"),
        (lambda p: {"devices": [{"path": p, "write": False}]}, "spec.devices[0].path", "read"),
    ],
)
def test_every_host_path_needs_its_grant(
    node: Node, spec: Callable[[str], dict[str, Any]], field: str, key: str
) -> None:
    deep = f"{node.granted}/deep"
    assert node.policy(spec(deep), **{key: (node.granted,)}).paths[2:] or key == "unix_sockets"
    denied, message = node.refused(PolicyDenied, spec(deep))
    assert denied == field
    assert f'add "{deep}" to {key}' in message
    assert "node.toml" in message


def test_access_of_grants(node: Node) -> None:
    deep, top = f"{node.granted}/deep", node.granted
    policy = node.policy(
        {
            "sandbox": {"read": [deep], "write": [deep]},
            "storage": [
                {"type": "bind", "source": deep, "target": "a/b/", "readonly": True},
                {"type": "named", "name": "cache", "target": "/cache", "size": "1Gi"},
                {"type": "tmpfs", "target": "/scratch", "mode": 448},
                {"type": "anonymous", "target": "/anon"},
            ],
            "devices": [{"path": deep, "write": False}],
        },
        read=(top,),
        write=(top,),
        bind_sources=(top,),
    )
    own = f"{node.dirs.root}/volumes"
    assert [(rule.path, rule.access, rule.origin) for rule in policy.paths[2:]] == [
        (deep, "rx", "volume"),
        (f"{node.data}/volumes/cache", "rwx", "volume"),
        (f"{own}/2", "rwx", "volume"),
        (f"{own}/3", "rwx", "volume"),
        (deep, "rx", "sandbox.read"),
        (deep, "rwx", "sandbox.write"),
        (deep, "r", "device"),
    ]
    assert [(v.kind, v.target) for v in policy.volumes] == [
        ("bind", "/a/b"),
        ("named", "/cache"),
        ("tmpfs", "/scratch"),
        ("anonymous", "/anon"),
    ]
    assert policy.volumes[1].size_bytes == 1 << 30
    assert policy.volumes[2].mode == 448


def test_a_write_grant_lets_read(node: Node) -> None:
    assert node.policy({"sandbox": {"read": [node.granted]}}, write=(node.granted,))


def test_a_volume_inside_another(node: Node) -> None:
    storage = [{"type": "anonymous", "target": "/a"}, {"type": "anonymous", "target": "/a/b"}]
    assert node.refused(Unsupported, {"storage": storage})[0] == "spec.storage[1].target"


def test_the_data_directory_cannot_be_granted(node: Node) -> None:
    """Neither itself, nor what is in it, nor what it is in."""
    for path in (node.data, node.data / "containers", node.data.parent):
        field, message = node.refused(PolicyDenied, {"sandbox": {"write": [str(path)]}}, write=("/",))
        assert field == "spec.sandbox.write[0]"
        assert "node itself" in message
    node.refused(PolicyDenied, {"sandbox": {"read": [str(node.host / "other")]}}, read=("/",))


def test_a_link_that_leads_out_of_a_grant(node: Node) -> None:
    link = Path(node.granted) / "link"
    link.symlink_to("/usr")
    _, message = node.refused(PolicyDenied, {"sandbox": {"read": [str(link)]}}, read=(node.granted,))
    assert "leads out" in message
    # Where it leads is granted too: then it is that folder.
    assert (
        node.policy({"sandbox": {"read": [str(link)]}}, read=(node.granted, "/usr")).paths[2].path == "/usr"
    )


def test_what_is_not_granted_is_not_explored(node: Node) -> None:
    """A path that is there and one that is not get the same answer."""
    messages = {
        node.refused(PolicyDenied, {"sandbox": {"read": [path]}}, read=(node.granted,))[1].replace(path, "P")
        for path in ("/etc/passwd", "/etc/no-such-file")
    }
    assert len(messages) == 1


def test_a_granted_path_that_is_missing(node: Node) -> None:
    missing = f"{node.granted}/missing"
    field, message = node.refused(InvalidSpec, {"sandbox": {"read": [missing]}}, read=(node.granted,))
    assert field == "spec.sandbox.read[0]"
    assert "No such file" in message


# -- the rest


def test_groups(node: Node) -> None:
    assert node.policy({"sandbox": {"groups": ["calm"]}}).groups == ("calm",)
    assert node.policy({"sandbox": {"groups": ["wild"]}}, groups=("wild",)).groups == ("wild",)
    assert (
        node.refused(PolicyDenied, {"sandbox": {"groups": ["calm", "wild"]}})[0] == "spec.sandbox.groups[1]"
    )
    assert node.refused(Unsupported, {"sandbox": {"groups": ["odd"]}})[0] == "spec.sandbox.groups[0]"


def test_mach_services_are_those_of_a_mac(node: Node) -> None:
    spec = {"sandbox": {"mach_lookup": ["com.apple.logd"]}}
    assert node.policy(spec, mach_lookup=("com.apple.*",)).mach_lookup == ("com.apple.logd",)
    assert node.refused(PolicyDenied, spec)[0] == "spec.sandbox.mach_lookup[0]"
    other = FakeDriver()
    other.name = "linux"
    assert node.refused(Unsupported, spec, driver=other)[0] == "spec.sandbox.mach_lookup[0]"


@pytest.mark.parametrize(("mode", "level"), [(None, Gpu.METAL_COMPUTE), ("mps", Gpu.MPS_ONLY)])
def test_gpu(node: Node, mode: str | None, level: Gpu) -> None:
    spec = {"resources": {"gpu": {"vendor": "apple", "mode": mode}}}
    assert node.policy(spec, gpu=True).gpu is level
    assert node.refused(PolicyDenied, spec)[0] == "spec.resources.gpu"
    assert (
        node.refused(Unsupported, spec, gpu=True, driver=FakeDriver(gpu=("none",)))[0] == "spec.resources.gpu"
    )


def test_limits(node: Node) -> None:
    spec = {
        "resources": {
            "memory": "512Mi",
            "cpu_time_limit": "1500ms",
            "max_files": 100,
            "pids_limit": 7,
            "cpu": 1.5,
        },
        "ulimits": {"stack": {"soft": 1024}},
    }
    limits = node.policy(spec).limits
    assert limits.memory_bytes == 512 << 20
    assert limits.cpu_time_limit_s == 2
    assert (limits.max_files, limits.pids, limits.cpu) == (100, 7, 1.5)
    assert limits.ulimits == {"stack": (1024, 1024)}


def test_the_nodes_most_memory(node: Node) -> None:
    assert node.policy(max_memory="1Gi").limits.memory_bytes == 1 << 30
    assert node.policy({"resources": {"memory": "1Mi"}}, max_memory="1Gi").limits.memory_bytes == 1 << 20
    assert (
        node.refused(PolicyDenied, {"resources": {"memory": "2Gi"}}, max_memory="1Gi")[0]
        == "spec.resources.memory"
    )


def test_isolation(node: Node) -> None:
    assert node.policy({"sandbox": {"isolation": "process"}}).isolation == "process"
    assert node.refused(Unsupported, {"sandbox": {"isolation": "rootfs"}})[0] == "spec.sandbox.isolation"
    assert node.refused(PolicyDenied, {}, isolation=("rootfs",))[0] == "spec.sandbox.isolation"


def test_images(node: Node) -> None:
    field, message = node.refused(PolicyDenied, {}, images=("ghcr.io/acme/*",))
    assert field == "spec.image.name"
    assert 'add "app" to images' in message


def test_require_refuses_what_is_not_enforced(node: Node) -> None:
    driver = FakeDriver(NotEnforced(feature=Feature.MEMORY, isolation=None, reason="only watched"))
    spec = {"sandbox": {"require": ["signals", "memory"]}}
    field, message = node.refused(Unsupported, spec, driver=driver)
    assert field == "spec.sandbox.require[1]"
    assert "only watched" in message
    assert node.policy({"sandbox": {"require": ["signals"]}}, driver=driver).require == ("signals",)


# -- paths alone

NAMES = st.sampled_from(["a", "b", "link", "out", "..", ".", "", "data"])


@given(parts=st.lists(NAMES, max_size=6))
def test_no_path_escapes(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    top = tmp_path_factory.getbasetemp() / "escape"
    if not top.exists():
        (top / "root" / "a" / "b").mkdir(parents=True)
        (top / "root" / "data").mkdir()
        (top / "root" / "a" / "out").symlink_to("/usr")
        (top / "root" / "a" / "link").symlink_to("../../root/a/b")
    root, data = str(top / "root"), str(top / "root" / "data")
    try:
        real = granted_path("/".join([root, *parts]), [root], [data], real_path)
    except (NotGranted, Forbidden, Missing):
        return
    assert below(real, root)
    assert not overlap(real, data)
    assert real_path(real) == real


def test_a_socket_may_be_made_later_but_its_folder_must_exist(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    grants = [str(tmp_path / "run")]
    assert granted_socket(f"{tmp_path}/run/s", grants, [], real_path) == f"{tmp_path}/run/s"
    with pytest.raises(Missing):
        granted_socket(f"{tmp_path}/run/no/s", grants, [], real_path)
    with pytest.raises(NotGranted):
        granted_socket(f"{tmp_path}/s", grants, [], real_path)
    # The very socket may be what is granted.
    assert granted_socket(f"{tmp_path}/s", [f"{tmp_path}/s"], [], real_path) == f"{tmp_path}/s"


def test_a_grant_that_does_not_exist_grants_nothing(tmp_path: Path) -> None:
    with pytest.raises(NotGranted):
        granted_path(f"{tmp_path}/gone/x", [f"{tmp_path}/gone"], [], real_path)


def test_a_grant_may_be_written_through_a_link_of_the_operator(tmp_path: Path) -> None:
    (tmp_path / "real" / "x").mkdir(parents=True)
    (tmp_path / "alias").symlink_to("real")
    for written in ("alias", "real"):
        granted = granted_path(f"{tmp_path}/{written}/x", [f"{tmp_path}/alias"], [], real_path)
        assert granted == f"{tmp_path}/real/x"
