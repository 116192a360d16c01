"""Profiles of random specs: each compiles without a warning, allows what its spec names and denies what it does not."""

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.spec import decode_spec
from schemas.status import Gpu, Network
from worker.platform.base import Access, NetworkPolicy, PathRule, SandboxPolicy
from worker.platform.darwin.groups import GROUPS, selected
from worker.platform.darwin.rules import OLDEST_RELEASE
from worker.platform.darwin.sbpl import build_profile
from worker.platform.darwin.sbpl_paths import covers

from .sbpl_help import (
    CREDS,
    DATA,
    DOCKER,
    MARKER,
    NATS,
    READS,
    ROOT,
    RUNS,
    STATE,
    TMP,
    WRITES,
    Asked,
    ask,
    policy_of,
)

SPECS = 200
RELEASES = range(OLDEST_RELEASE, 27)
API = "/private/var/run/fleet-api.sock"

FOLDERS = ("/srv/data", "/srv/models", "/Users/w/projects/a b", '/Users/w/"odd" (allow default)', "/Volumes/Disk/ü",
           "/tmp/scratch", "/var/lib/x", "/etc/app", "/System/Volumes/Data/Users/w/pics", "/opt/thing")  # fmt: skip
SOCKETS = ("/tmp/db.sock", "/var/run/app.sock", "/Users/w/run/s")
NAMES = ("com.example.one", "com.example.two", "com.apple.metadata.mds")


def random_spec(chance: random.Random) -> dict[str, Any]:
    def some(values: tuple[Any, ...], most: int) -> list[Any]:
        return chance.sample(values, chance.randint(0, most))

    storage: list[dict[str, Any]] = []
    for index, source in enumerate(some(FOLDERS, 3)):
        inner = chance.choice(("", "/sub", "/sub/deep"))
        storage.append({"type": "bind", "source": source + inner, "target": f"/mnt/{index}",
                        "readonly": chance.random() < 0.5})  # fmt: skip
    for kind in some(("named", "anonymous", "tmpfs"), 2):
        extra = {"name": "cache", "readonly": chance.random() < 0.3} if kind == "named" else {}
        storage.append({"type": kind, "target": f"/vol/{kind}", **extra})
    ports = chance.sample(range(1024, 4000), 3)
    endpoints = [
        {"name": f"e{number}", "protocol": chance.choice(("http", "tcp", "udp")), "port": port}
        for number, port in enumerate(ports[: chance.randint(0, 2)])
    ]
    spec: dict[str, Any] = {
        "image": {"name": "app"},
        "storage": storage,
        "endpoints": endpoints,
        "network": {
            "access": chance.choice(("auto", "none", "localhost", "outbound", "full")),
            "connect_ports": ports[2:] if chance.random() < 0.5 else [],
        },
        "sandbox": {
            "read": some(FOLDERS, 2),
            "write": some(FOLDERS, 2),
            "groups": some(tuple(GROUPS), 4),
            "mach_lookup": some(NAMES, 2),
            "unix_sockets": some(SOCKETS, 2),
        },
    }
    if chance.random() < 0.5:
        spec["resources"] = {"gpu": {"vendor": "apple", "mode": chance.choice((None, "mps"))}}
    if chance.random() < 0.3:
        spec["devices"] = [{"path": "/dev/cu.usb1", "write": chance.random() < 0.5}]
    return spec


def allowed_paths(policy: SandboxPolicy) -> dict[str, str]:
    """Path → access, as an independent reading of the policy: what any rule on that very path gives."""
    found: dict[str, str] = {}
    for rule in policy.paths:
        if rule.origin != "device":
            found[rule.path] = "".join(sorted(set(found.get(rule.path, "") + rule.access)))
    return found


def check_files(profile: Asked, policy: SandboxPolicy) -> None:
    granted = allowed_paths(policy)
    for path, access in granted.items():
        inside = f"{path}/some file"
        assert all(profile.allows(operation, path=inside) for operation in READS), path
        assert {profile.allows(operation, path=inside) for operation in WRITES} == {"w" in access}, path
        assert {profile.allows(operation, path=inside) for operation in RUNS} == {"x" in access}, path
        assert profile.allows("file-read-data", path=path)
        # Neither moved away nor replaced, and the way there can be walked.
        assert not profile.allows("file-write-unlink", path=path)
        for above in (path.rpartition("/")[0], "/" + path.split("/")[1]):
            assert profile.allows("file-read-metadata", path=above or "/")
    for folder in (
        "/Users/w/.ssh",
        "/Users/other",
        "/private/var/db/x",
        "/Library/Keychains/x",
        f"{ROOT}-other",
    ):
        if any(covers(path, folder) for path in granted) or "keychain" in policy.groups:
            continue
        for operation in (*READS, *WRITES, *RUNS):
            assert not profile.allows(operation, path=f"{folder}/file"), (operation, folder)
    never = (f"{STATE}/sandbox.sb", f"{STATE}/x/y", STATE, CREDS, f"{DATA}/launcher.key", f"{DATA}/secrets/x",
             f"{DATA}/worker.db", f"{DATA}/containers/other-0/rootfs/x", f"{DATA}/images/x")  # fmt: skip
    for path in never:
        for operation in (*READS, *WRITES, *RUNS, "network-outbound", "network-bind"):
            assert not profile.allows(operation, path=path), (operation, path)
    assert profile.allows("file-read-data", path=MARKER)
    for device in policy.devices:
        assert profile.allows("file-read-data", path=device.path)
        assert profile.allows("file-write-data", path=device.path) == device.write


def check_network(profile: Asked, policy: SandboxPolicy) -> None:
    network, level = policy.network, policy.network.level
    inner, outer = level in (Network.LOCALHOST, Network.FULL), level in (Network.OUTBOUND, Network.FULL)
    for port in network.connect_ports:
        assert profile.connects(f"127.0.0.1:{port}")
        assert profile.connects(f"[::1]:{port}")
    for port in network.bind_ports:
        assert profile.serves(port)
    assert profile.connects("93.184.216.34:443") == outer
    assert profile.connects("93.184.216.34:53", "udp") == outer
    for port in (22, 9999):
        assert profile.connects(f"127.0.0.1:{port}") == (level is Network.FULL)
        assert profile.serves(port) == (level is Network.FULL)
    assert profile.connects("127.0.0.1:443") == inner
    for host in ("127.0.0.1", "[::1]", "10.0.0.1", "93.184.216.34"):
        assert not profile.connects(f"{host}:{NATS}")
        assert not profile.connects(f"{host}:{NATS}", "udp")
    assert not profile.serves(NATS)
    for path in network.unix_sockets:
        real = path if path.startswith(("/private", "/Users")) else f"/private{path}"
        assert profile.allows("network-outbound", path=real)
    assert API in network.unix_sockets
    names = {group.name for group in selected(policy.groups)}
    own = "sockets" in names
    assert profile.allows("network-bind", path=f"{TMP}/own.sock") == own
    for path in (DOCKER, "/private/tmp/ssh-agent", f"{DATA}/launcher.sock", f"{STATE}/api", f"{ROOT}/../s"):
        assert not profile.allows("network-outbound", path=path), path
        assert not profile.allows("network-bind", path=path), path
    assert profile.allows("network-outbound", path="/private/var/run/mDNSResponder") == (
        outer or "dns" in names
    )


def check_the_rest(profile: Asked, policy: SandboxPolicy) -> None:
    names = {group.name for group in selected(policy.groups)}
    for name in NAMES:
        assert profile.allows("mach-lookup", name=name) == (name in policy.mach_lookup)
    for name in ("com.apple.coreservices.launchservicesd", "com.apple.windowserver.active", "com.apple.tccd"):
        assert not profile.allows("mach-lookup", name=name)
    assert profile.allows("mach-lookup", name="com.apple.SecurityServer") == ("keychain" in names)
    gpu = policy.gpu
    assert profile.allows("iokit-open", class_="AGXDeviceUserClient") == (gpu is not Gpu.NONE)
    assert profile.allows("iokit-open", class_="IOAccelDevice") == (gpu is Gpu.METAL_COMPUTE)
    assert not profile.allows("iokit-open", class_="IOHIDLibUserClient")
    assert profile.allows("mach-lookup", name="com.apple.MTLCompilerService") == (gpu is not Gpu.NONE)
    for name in ("kern.procargs2.1", "kern.procargs2", "kern.proc.all"):
        assert not profile.allows("sysctl-read", name=name)
    for operation in ("process-info-pidinfo", "process-info-listpids", "signal", "mach-priv-task-port"):
        assert not profile.allows(operation, target="others")
    for operation in ("lsopen", "job-creation", "appleevent-send", "file-mount", "nvram-set", "file-mknod"):
        assert not profile.allows(operation, path="/x", name="x")
    assert profile.allows("ipc-posix-shm-write-create", name="/anything") == ("ipc" in names)
    assert profile.allows("user-preference-read", name="com.example") == ("preferences" in names)


@pytest.mark.parametrize("seed", range(SPECS))
def test_a_random_spec(seed: int) -> None:
    chance = random.Random(seed)
    spec = decode_spec(random_spec(chance))
    release = chance.choice(RELEASES)
    made = policy_of(
        spec, release=release, port=chance.choice((None, 31000)), run=seed, api_socket=API, api_tokens=True
    )
    profile = Asked(build_profile(made, release=release), release)
    assert profile.compiled.warnings == ()
    check_files(profile, made)
    check_network(profile, made)
    check_the_rest(profile, made)


def test_the_random_specs_cover_what_a_spec_can_say() -> None:
    made = [policy_of(random_spec(random.Random(seed)), api_socket=API) for seed in range(SPECS)]
    assert {one.network.level for one in made} == set(Network)
    assert {one.gpu for one in made} == set(Gpu)
    assert {name for one in made for name in one.groups} == set(GROUPS)
    assert {volume.kind for one in made for volume in one.volumes} == {"bind", "named", "anonymous", "tmpfs"}
    nested = [one for one in made for outer in one.paths for inner in one.paths
              if "w" in outer.access and "w" not in inner.access and covers(outer.path, inner.path)]  # fmt: skip
    assert len(nested) > 5
    assert any(one.devices for one in made)


# -- laws

STEPS = st.sampled_from(["a", "b", "c"])
PATHS = st.lists(STEPS, min_size=1, max_size=4).map(lambda steps: "/srv/" + "/".join(steps))
ACCESS: st.SearchStrategy[Access] = st.sampled_from(("r", "rx", "rw", "rwx"))
RULES = st.lists(st.tuples(PATHS, ACCESS), min_size=1, max_size=6)


def innermost(rules: list[tuple[str, Access]], path: str) -> str:
    """What the rule says that is nearest to a path; rules on one path add up."""
    covering = [rule for rule in rules if covers(rule[0], path)]
    if not covering:
        return ""
    nearest = max(len(rule[0]) for rule in covering)
    return "".join(rule[1] for rule in covering if len(rule[0]) == nearest)


@settings(max_examples=150, deadline=None)
@given(rules=RULES, path=PATHS)
def test_the_innermost_rule_decides(rules: list[tuple[str, Access]], path: str) -> None:
    profile = ask(*(PathRule(place, access, "volume") for place, access in rules))
    access = innermost(rules, f"{path}/f")
    assert profile.allows("file-read-data", path=f"{path}/f") == bool(access)
    assert profile.allows("file-write-data", path=f"{path}/f") == ("w" in access)
    assert profile.allows("process-exec", path=f"{path}/f") == ("x" in access)


@settings(max_examples=150, deadline=None)
@given(rules=RULES, source=PATHS, target=PATHS)
def test_no_renaming_makes_anything_writable(
    rules: list[tuple[str, Access]], source: str, target: str
) -> None:
    """Whatever a program may move, nothing below it was shut to it: then its new place gives it nothing."""
    profile = ask(*(PathRule(place, access, "volume") for place, access in rules))
    moved = profile.allows("file-write-unlink", path=source) and profile.allows(
        "file-write-create", path=target
    )
    if not moved or covers(source, target):
        return
    for place, access in rules:
        if covers(source, place):
            assert "w" in innermost(rules, place), (source, place, access)
    for operation in ("file-link", "file-clone"):
        if profile.allows(operation, path=source):
            assert innermost(rules, source)
    if profile.allows("file-link", path=source):
        assert "w" in innermost(rules, source)


@settings(max_examples=60, deadline=None)
@given(rules=RULES, denied=PATHS, level=st.sampled_from(Network))
def test_what_is_denied_stays_denied_under_any_grant(
    rules: list[tuple[str, Access]], denied: str, level: Network
) -> None:
    grants = [PathRule(place, access, "volume") for place, access in rules if not covers(denied, place)]
    if not grants:
        return
    profile = ask(*grants, deny=(denied,), groups=tuple(GROUPS), network=NetworkPolicy(level=level))
    for operation in (*READS, *WRITES, *RUNS, "network-outbound", "network-bind"):
        for path in (denied, f"{denied}/x"):
            assert not profile.allows(operation, path=path)
    way = denied
    while way != "/":
        for operation in ("file-write-unlink", "file-clone"):
            assert not profile.allows(operation, path=way) or not any(covers(one.path, way) for one in grants)
        way = way.rpartition("/")[0] or "/"
