"""What the Linux driver says a kernel can do, and the plans it makes for it."""

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from schemas.node import Capabilities, Feature
from schemas.status import Network
from worker.errors import Configuration
from worker.platform import driver
from worker.platform.base import Driver, Limits, NetworkPolicy, PathRule, SandboxPolicy, VolumeMount
from worker.platform.linux import enforce, seccomp, system
from worker.platform.linux.driver import LinuxDriver


def made(**given: Any) -> LinuxDriver:
    """A driver of another machine; without control groups and isolation `rootfs` unless given."""
    return LinuxDriver(**{"rooted": False, "controllers": (), **given})


NEW = made(abi=7, filter=True, root=False)
BARE = made(abi=0, filter=False, root=False)


def policy(**changes: Any) -> SandboxPolicy:
    defaults: dict[str, Any] = {
        "container": "web-0",
        "instance": "0" * 26,
        "rootfs": "/data/containers/web-0/rootfs",
        "tmp": "/data/containers/web-0/tmp",
        "state_dir": "/data/containers/web-0/state",
        "paths": (PathRule("/data/containers/web-0/rootfs", "rwx", "rootfs"),),
    }
    return SandboxPolicy(**{**defaults, **changes})


def network(level: Network, **changes: Any) -> NetworkPolicy:
    return NetworkPolicy(level=level, udp=level in (Network.OUTBOUND, Network.FULL), **changes)


def steps(plan: dict[str, Any]) -> dict[str, Any]:
    return dict(plan["steps"])


def features(made: LinuxDriver, **changes: Any) -> set[str]:
    return {gap.feature.value for gap in made.not_enforced(policy(**changes))}


def test_this_machine_has_a_driver() -> None:
    chosen: Driver = driver()
    assert chosen.name in ("linux", "darwin")


def test_capabilities_are_those_of_the_contract() -> None:
    found = NEW.capabilities()
    assert found.sandbox == "landlock:7"
    assert found.network == ["none", "localhost", "outbound", "full"]
    assert found.gpu == ["none"]
    assert found.isolation == ["process"]
    assert msgspec.json.decode(msgspec.json.encode(found), type=Capabilities) == found


@pytest.mark.parametrize(
    ("abi", "has_filter", "sandbox", "levels"),
    [
        (7, True, "landlock:7", ["none", "localhost", "outbound", "full"]),
        (4, False, "landlock:4", ["localhost", "outbound", "full"]),
        (3, True, "landlock:3", ["none", "full"]),
        (0, True, "seccomp", ["none", "full"]),
        (0, False, "none", ["full"]),
    ],
)
def test_what_older_kernels_lack_is_told(abi: int, has_filter: bool, sandbox: str, levels: list[str]) -> None:
    found = made(abi=abi, filter=has_filter).capabilities()
    assert found.sandbox == sandbox
    assert found.network == levels


@pytest.mark.parametrize("abi", range(8))
@pytest.mark.parametrize("has_filter", [True, False])
def test_each_gap_is_told_once_with_a_reason(abi: int, has_filter: bool) -> None:
    other = made(abi=abi, filter=has_filter)
    told = other.capabilities().not_enforced
    assert len({gap.feature for gap in told}) == len(told)
    assert all(gap.reason and gap.isolation == "process" for gap in told)
    # Whatever falls short for some policy, the node says beforehand.
    for level in ("none", "localhost", "outbound", "full"):
        some = policy(
            network=network(Network(level), unix_sockets=("/run/s",)), groups=("ipc", "shm", "proc")
        )
        assert {gap.feature for gap in other.not_enforced(some)} <= {gap.feature for gap in told}


@pytest.mark.parametrize("abi", range(8))
@pytest.mark.parametrize("has_filter", [True, False])
def test_a_root_of_its_own_ends_most_gaps(abi: int, has_filter: bool) -> None:
    other = made(abi=abi, filter=has_filter, rooted=True)
    assert other.capabilities().isolation == ["process", "rootfs"]
    told = {gap.feature for gap in other.capabilities().not_enforced if gap.isolation == "rootfs"}
    for level in ("none", "localhost", "outbound", "full"):
        for sockets in ((), ("/run/s",)):
            some = policy(
                isolation="rootfs",
                network=network(Network(level), unix_sockets=sockets),
                groups=("ipc", "shm", "proc"),
            )
            gaps = other.not_enforced(some)
            assert {gap.isolation for gap in gaps} == {"rootfs"}
            assert {gap.feature for gap in gaps} <= told
    closed = {gap.feature.value for gap in other.not_enforced(policy(isolation="rootfs"))}
    without = set() if has_filter else {"network.none", "ipc"}  # sockets and keys that are in no namespace
    assert closed == {"memory", "cpu", "pids", "volume_size"} | without


def test_control_groups_end_the_gaps_of_limits() -> None:
    other = made(abi=7, filter=True, controllers=("memory", "pids", "cpu"))
    assert {"pids", "cpu"} <= set(other.capabilities().limits)
    assert {"memory", "cpu", "pids"} & features(other) == set()
    assert "cgroup" not in other.plan(policy())
    limits = Limits(memory_bytes=1 << 20, pids=10)
    assert other.plan(policy(limits=limits))["cgroup"] == {"memory": 1 << 20, "pids": 10}
    assert "cgroup" not in NEW.plan(policy(limits=limits))


def test_the_plan_of_a_root() -> None:
    other = made(abi=7, filter=True, root=False, rooted=True)
    volumes = (
        VolumeMount(kind="named", source="/data/volumes/kept", target="/kept"),
        VolumeMount(kind="bind", source="/srv/in", target="/in", readonly=True),
        VolumeMount(kind="tmpfs", source="/x", target="/kept/fast", size_bytes=4096, mode=0o700),
    )
    plan = other.plan(
        policy(isolation="rootfs", volumes=volumes, paths=(PathRule("/opt/tool", "rx", "sandbox.read"),))
    )
    assert json.loads(json.dumps(plan)) == plan
    root = plan["root"]
    assert root["user"] == [os.getuid(), os.getgid()]
    assert root["net"] is True
    assert root["path"] == policy().rootfs
    mounts = root["mounts"]
    assert ["bind", "/opt/tool", "/opt/tool", "ro"] in mounts
    assert ["bind", "/in", "/srv/in", "ro"] in mounts
    assert mounts.index(["bind", "/kept", "/data/volumes/kept", "rw"]) < mounts.index(
        ["tmpfs", "/kept/fast", 4096, 0o700, "exec"]
    )
    assert dict(plan["steps"])["landlock"]["paths"] == [["/", "rwxsi"]]
    text = other.describe(policy(isolation="rootfs", volumes=volumes)).text
    assert "[namespaces]" in text
    assert "bind /in /srv/in ro" in text
    shared = other.plan(policy(isolation="rootfs", network=network(Network.FULL)))
    assert shared["root"]["net"] is False
    assert "root" not in NEW.plan(policy())


def test_gaps_of_a_policy() -> None:
    always = {"file_metadata", "processes", "memory", "cpu", "pids", "volume_size"}
    assert features(NEW) == always
    assert features(NEW, network=network(Network.FULL)) == always
    assert features(NEW, network=network(Network.LOCALHOST)) == always | {"network.localhost"}
    assert features(NEW, network=NetworkPolicy(level=Network.LOCALHOST, udp=True)) == always | {
        "network.localhost",
        "network.udp",
    }
    assert features(NEW, network=network(Network.OUTBOUND)) == always | {"network.outbound", "network.udp"}
    assert features(NEW, network=network(Network.NONE, unix_sockets=("/s",))) == always | {"unix_sockets"}
    assert features(NEW, groups=("shm",)) == always | {"ipc"}
    assert {"signals"} == features(made(abi=5, filter=True)) - always
    assert {
        "network.none",
        "network.udp",
        "unix_sockets",
        "abstract_sockets",
        "ipc",
        "signals",
        "gpu",
        "files",
    } == (features(BARE) - always)


def test_a_plan_is_json_and_its_steps_are_known() -> None:
    plan = NEW.plan(policy(network=network(Network.FULL)))
    assert json.loads(json.dumps(plan)) == plan
    assert (plan["version"], plan["platform"]) == (enforce.PLAN_VERSION, "linux")
    assert [name for name, _ in plan["steps"]] == [
        "rlimits",
        "capabilities",
        "no_new_privs",
        "dumpable",
        "landlock",
        "seccomp",
    ]
    as_root = made(abi=7, filter=True, root=True).plan(policy())
    assert [name for name, _ in as_root["steps"]][:3] == ["rlimits", "groups", "capabilities"]
    assert [name for name, _ in BARE.plan(policy())["steps"]] == [
        "rlimits",
        "keyring",
        "capabilities",
        "no_new_privs",
        "dumpable",
    ]


@pytest.mark.parametrize(
    ("level", "net", "ports", "inet"),
    [
        (Network.NONE, "bc", [], "none"),
        (Network.LOCALHOST, "bc", [[80, "c"], [8080, "bc"]], "tcp"),
        (Network.OUTBOUND, "b", [[8080, "b"]], "udp"),
        (Network.FULL, "", [], "any"),
    ],
)
def test_network_levels(level: Network, net: str, ports: list[list[Any]], inet: str) -> None:
    asked = network(level, bind_ports=(8080,), connect_ports=(80, 4222, 8080), denied_ports=(4222,))
    plan = steps(NEW.plan(policy(network=asked)))
    assert plan["landlock"]["net"] == net
    assert plan["landlock"]["ports"] == ports
    assert plan["seccomp"]["inet"] == inet
    assert plan["seccomp"]["fastopen"] is ("c" not in net)
    assert plan["seccomp"]["unix"] is False


def test_an_older_landlock_restricts_no_ports_and_the_filter_closes_truncate() -> None:
    plan = steps(made(abi=2, filter=True).plan(policy(network=network(Network.LOCALHOST))))
    assert plan["landlock"]["net"] == ""
    assert plan["seccomp"]["truncate"] is False
    assert steps(NEW.plan(policy()))["seccomp"]["truncate"] is True


def test_paths_become_letters() -> None:
    paths = (
        PathRule("/a", "rx", "sandbox.read"),
        PathRule("/b", "rwx", "rootfs"),
        PathRule("/dev/kvm", "rw", "device"),
    )
    plain = steps(NEW.plan(policy(paths=paths)))["landlock"]["paths"]
    assert plain == [["/a", "rx"], ["/b", "rwx"], ["/dev/kvm", "rwi"]]
    sockets = network(Network.NONE, unix_sockets=("/run/s",))
    granted = steps(NEW.plan(policy(paths=paths, network=sockets)))
    assert granted["landlock"]["paths"] == [["/a", "rx"], ["/b", "rwxs"], ["/dev/kvm", "rwi"]]
    assert granted["seccomp"]["unix"] is True


def test_groups_open_what_they_name() -> None:
    assert set(system._GROUP_PATHS) | {"ipc"} == set(NEW.groups())
    with_ipc = steps(NEW.plan(policy(groups=("ipc",))))
    assert with_ipc["seccomp"]["ipc"] is True
    paths = dict(steps(NEW.plan(policy(groups=("proc",))))["landlock"]["system"])
    assert paths["/proc"] == "r"
    assert "/proc/meminfo" not in paths
    assert "/proc" not in dict(steps(NEW.plan(policy()))["landlock"]["system"])


def test_system_paths_are_canonical_and_no_secrets() -> None:
    found = system.system().rules
    paths = [rule.path for rule in found]
    assert len(set(paths)) == len(paths)
    for path in (
        "/etc",
        "/etc/shadow",
        "/root",
        "/home",
        "/tmp",
        "/proc",
        "/dev",
        "/dev/shm",
        "/run",
        "/var",
        "/",
    ):
        assert path not in paths
    assert {rule.access for rule in found if rule.path.startswith("/usr")} == {"rx"}
    for rule in found:
        assert "w" not in rule.access or rule.path.startswith("/dev/")


def test_only_public_files_are_handed_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that is root could read more than everybody may."""
    monkeypatch.setattr(system, "_known", {})
    monkeypatch.setattr(system, "SYSTEM", (system.SystemPath(f"{tmp_path}/conf*", "r", "settings"),))
    for name, mode in (("conf-open", 0o644), ("conf-closed", 0o600)):
        (tmp_path / name).touch(mode)
    assert [rule.path for rule in system.system().rules] == [os.path.realpath(tmp_path / "conf-open")]


def test_the_system_is_looked_at_again_when_a_folder_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "_known", {})
    monkeypatch.setattr(system, "SYSTEM", (system.SystemPath(f"{tmp_path}/conf*", "r", "settings"),))
    (tmp_path / "conf-1").touch(0o644)
    monkeypatch.setattr(system, "_GOOD_FOR_S", 60.0)
    first = system.system()
    assert system.system() is first
    assert not first.stale()
    os.utime(tmp_path, ns=(1, 1))
    assert first.stale()
    (tmp_path / "conf-2").touch(0o644)
    assert system.system() is first  # a look is good for a moment
    monkeypatch.setattr(system, "_GOOD_FOR_S", 0.0)
    assert len(system.system().rules) == 2


def test_a_rule_below_another_is_left_out_unless_it_gives_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = os.path.realpath(tmp_path)
    os.chmod(top, 0o755)
    for name in ("inner", "wider"):
        (tmp_path / name).mkdir(mode=0o755)
    wanted = [(top, "rx"), (f"{top}/inner", "r"), (f"{top}/wider", "rw"), (f"{top}/inner", "x")]
    monkeypatch.setattr(system, "_known", {})
    monkeypatch.setattr(system, "SYSTEM", tuple(system.SystemPath(p, a, "") for p, a in wanted))
    assert {rule.path: rule.access for rule in system.system().rules} == {top: "rx", f"{top}/wider": "rw"}


def test_a_data_directory_below_a_system_folder_is_refused() -> None:
    with pytest.raises(Configuration, match=r"/usr/local/sandfleet/worker\.db lies below /usr"):
        NEW.plan(policy(deny=("/usr/local/sandfleet/worker.db",)))


def test_limits() -> None:
    limits = Limits(max_files=100, cpu_time_limit_s=5, ulimits={"stack": (1, 2), "cpu": (9, 9)})
    assert steps(NEW.plan(policy(limits=limits)))["rlimits"] == [
        ["core", 0, 0, False],
        ["nofile", 100, 100, True],
        ["stack", 1, 2, False],
        ["cpu", 5, 6, False],
    ]
    asked = Limits(ulimits={"nofile": (8, 9)})
    assert ["nofile", 8, 9, False] in steps(NEW.plan(policy(limits=asked)))["rlimits"]


@pytest.mark.parametrize("made", [NEW, made(abi=0, filter=True), made(abi=4, filter=False), BARE])
def test_a_profile_tells_every_step(made: LinuxDriver) -> None:
    asked = policy(
        network=network(Network.LOCALHOST, bind_ports=(8080,), connect_ports=(443,), denied_ports=(4222,)),
        limits=Limits(memory_bytes=1 << 20, ulimits={"stack": (-1, -1)}),
        volumes=(VolumeMount(kind="tmpfs", source="/x", target="/y"),),
    )
    profile = made.describe(asked)
    assert profile.language == "landlock+seccomp"
    assert msgspec.json.encode(profile)
    assert profile.policy["network"]["level"] == "localhost"
    for heading in ("[limits]", "[privileges]", "[files]", "[network]", "[not enforced]"):
        assert heading in profile.text
    assert "stack    infinity infinity" in profile.text
    for gap in profile.not_enforced:
        assert gap.reason in profile.text


def test_a_profile_shows_ports_paths_and_calls() -> None:
    asked = policy(network=network(Network.LOCALHOST, bind_ports=(8080,), connect_ports=(443, 8080)))
    lines = NEW.describe(asked).text.splitlines()
    assert "bind     tcp 8080" in lines
    assert "connect  tcp 443 8080" in lines
    assert "rwx   /data/containers/web-0/rootfs  # rootfs" in lines
    assert any(line.startswith("EPERM       clone if (arg0 & 0x7e020000) != 0x0") for line in lines)
    assert "connect  tcp any port" in NEW.describe(policy(network=network(Network.FULL))).text


def test_host_folders_for_programs() -> None:
    folders = NEW.search_dirs()
    assert "/usr" in folders
    assert all(folder.startswith("/") for folder in folders)
    assert NEW.default_path().split(":")[0].startswith("/")


# -- the plan in the launcher


def test_an_unknown_version_or_step_is_refused() -> None:
    with pytest.raises(enforce.EnforceError, match="version 2"):
        enforce.prepare({"version": 2, "platform": "linux", "steps": []})
    with pytest.raises(enforce.EnforceError) as caught:
        enforce.prepare({"version": 1, "platform": "linux", "steps": [["odd", None]]})
    assert caught.value.step == "odd"
    with pytest.raises(enforce.EnforceError, match="no limit named odd"):
        enforce.prepare({"version": 1, "platform": "linux", "steps": [["rlimits", [["odd", 1, 1, False]]]]})


@pytest.mark.skipif(not seccomp.supported(), reason="this kernel takes no filter")
def test_prepare_leaves_nothing_open_but_the_ruleset() -> None:
    if LinuxDriver().capabilities().sandbox == "seccomp":
        pytest.skip("this kernel has no Landlock")
    plan = LinuxDriver().plan(policy(paths=()))
    enforce.prepare(plan).close()  # the descriptors held for /proc stay
    before = len(os.listdir("/proc/self/fd"))
    prepared = enforce.prepare(plan)
    assert len(os.listdir("/proc/self/fd")) == before + len(prepared.rulesets)
    prepared.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_feature_names_are_the_contracts_but_one() -> None:
    known = {feature.value for feature in Feature}
    for made in (NEW, BARE):
        assert {gap.feature.value for gap in made.capabilities().not_enforced} - known <= {"files"}
