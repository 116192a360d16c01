"""Profiles: what they allow, what they never do, and that nothing from outside becomes text."""

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.status import Gpu, Network
from worker.errors import CreateFailed, Internal, InvalidSpec
from worker.platform.base import Device, NetworkPolicy, PathRule, SandboxPolicy
from worker.platform.darwin.groups import GPU_LEVELS, GROUPS
from worker.platform.darwin.sbpl import MAX_RULE_BYTES, Sbpl, build_profile, canonical

from .sbpl_reader import Reader, parse

DATA = "/Users/w/data"
BOX = f"{DATA}/containers/web-0"
ROOT, TMP, STATE = f"{BOX}/rootfs", f"{BOX}/tmp", f"{BOX}/state"


def policy(*paths: PathRule, **changes: Any) -> SandboxPolicy:
    facts: dict[str, Any] = {
        "container": "web-0",
        "instance": "01J9ZZZZZZZZZZZZZZZZZZZZZZ",
        "rootfs": ROOT,
        "tmp": TMP,
        "state_dir": STATE,
        "paths": (PathRule(ROOT, "rwx", "rootfs"), PathRule(TMP, "rw", "tmp"), *paths),
        "marker": f"{STATE}/marker-01J9",
        "deny": (STATE, f"{DATA}/secrets", f"{DATA}/launcher.key"),
    }
    return SandboxPolicy(**{**facts, **changes})


def built(*paths: PathRule, release: int = 15, **changes: Any) -> Sbpl:
    return build_profile(policy(*paths, **changes), release=release)


def read(*paths: PathRule, release: int = 15, **changes: Any) -> Reader:
    return Reader(built(*paths, release=release, **changes))


def network(level: Network, **changes: Any) -> Reader:
    return read(network=NetworkPolicy(level=level, **changes))


class TestFiles:
    def test_the_containers_own(self) -> None:
        profile = read()
        for operation in ("file-read-data", "file-write-create", "process-exec", "file-map-executable"):
            assert profile.allows(operation, path=f"{ROOT}/bin/run"), operation
        assert profile.allows("file-write-data", path=f"{TMP}/x")
        assert not profile.allows("process-exec", path=f"{TMP}/x")

    @pytest.mark.parametrize(
        "path",
        [
            "/bin/sh",
            "/usr/bin/env",
            "/usr/lib/dyld",
            "/System/Cryptexes/OS/usr/lib/libSystem.dylib",
            "/System/Volumes/Preboot/Cryptexes/OS/x",
            "/usr/share/zoneinfo/UTC",
            "/private/etc/passwd",
            "/private/var/select/sh",
            "/dev/null",
            "/dev/urandom",
            "/",
        ],
    )
    def test_what_every_program_reads(self, path: str) -> None:
        assert read().allows("file-read-data", path=path)
        assert read().allows("file-read-metadata", path=path)

    @pytest.mark.parametrize("path", ["/bin/sh", "/usr/bin/python3", "/usr/libexec/x"])
    def test_what_every_program_runs(self, path: str) -> None:
        assert read().allows("process-exec", path=path)

    @pytest.mark.parametrize(
        "path",
        [
            "/Users/w/.ssh/id_ed25519",
            "/Users",
            DATA,
            f"{DATA}/worker.db",
            f"{DATA}/containers/other-0/rootfs/x",
            f"{ROOT}x",
            "/private/etc/master.passwd",
            "/private/etc/hosts",
            "/private/tmp/x",
            "/private/var/folders/ab/T/x",
            "/Applications/Xcode.app/x",
            "/opt/homebrew/bin/git",
            "/dev/disk0",
            "/dev/ttys001",
        ],
    )
    def test_what_none_reads(self, path: str) -> None:
        for operation in ("file-read-data", "file-write-data", "process-exec", "file-map-executable"):
            assert not read().allows(operation, path=path), operation

    @pytest.mark.parametrize(
        "path", [BOX, f"{DATA}/containers", DATA, "/Users/w", "/Users", "/tmp", "/var", "/etc", "/dev"]
    )
    def test_the_way_there_can_be_walked(self, path: str) -> None:
        assert read().allows("file-read-metadata", path=path)
        assert not read().allows("file-read-data", path=path)

    @pytest.mark.parametrize(
        "path", [STATE, f"{STATE}/sandbox.sb", f"{DATA}/secrets/x", f"{DATA}/launcher.key"]
    )
    @pytest.mark.parametrize(
        "operation",
        ["file-read-data", "file-read-metadata", "file-write-data", "file-write-create", "file-write-unlink",
         "process-exec", "file-map-executable", "network-outbound"],
    )  # fmt: skip
    def test_what_is_never_reached(self, path: str, operation: str) -> None:
        assert not read().allows(operation, path=path)

    def test_denied_files_inside_a_grant(self) -> None:
        profile = read(PathRule(DATA, "rwx", "sandbox.write"))
        assert profile.allows("file-write-data", path=f"{DATA}/x")
        for operation in ("file-read-data", "file-read-metadata", "file-write-data", "file-write-create"):
            assert not profile.allows(operation, path=f"{STATE}/sandbox.sb"), operation

    def test_a_deny_around_a_grant_is_a_contradiction(self) -> None:
        for denied in (BOX, ROOT, f"{BOX}/"):
            with pytest.raises(Internal, match="denies"):
                built(deny=(denied,))
        with pytest.raises(Internal, match="cover everything"):
            built(PathRule("/", "r", "sandbox.read"))

    def test_a_read_only_mount_in_the_root(self) -> None:
        profile = read(
            PathRule(f"{ROOT}/app/ro", "r", "volume"), PathRule(f"{ROOT}/app/ro/rw", "rw", "volume")
        )
        inside, writable = f"{ROOT}/app/ro/f", f"{ROOT}/app/ro/rw/f"
        assert profile.allows("file-read-data", path=inside)
        for operation in (
            "file-write-data",
            "file-write-create",
            "file-write-unlink",
            "file-write-mode",
            "process-exec",
            "file-map-executable",
        ):
            assert not profile.allows(operation, path=inside), operation
        assert profile.allows("file-write-data", path=writable)
        assert not profile.allows("process-exec", path=writable)
        assert profile.allows("file-write-data", path=f"{ROOT}/app/f")
        # Moving the folder above it would take the files out of the rule.
        for held in (f"{ROOT}/app/ro", f"{ROOT}/app", ROOT):
            assert not profile.allows("file-write-unlink", path=held)
        assert profile.allows("file-write-unlink", path=f"{ROOT}/app/other")

    def test_a_mount_of_the_host(self) -> None:
        profile = read(PathRule("/Users/w/models", "r", "volume"), PathRule("/Users/w/out", "rw", "volume"))
        assert profile.allows("file-read-data", path="/Users/w/models/m.bin")
        assert not profile.allows("file-write-data", path="/Users/w/models/m.bin")
        assert profile.allows("file-write-create", path="/Users/w/out/x")
        assert not profile.allows("file-read-data", path="/Users/w/other")

    def test_two_rules_on_one_path_add_up(self) -> None:
        profile = read(PathRule("/Users/w/x", "r", "volume"), PathRule("/Users/w/x/", "rw", "sandbox.write"))
        assert profile.allows("file-write-data", path="/Users/w/x/f")

    def test_nobody_sets_the_user_bit(self) -> None:
        assert not read().allows("file-write-setugid", path=f"{ROOT}/x")
        assert read().allows("file-write-mode", path=f"{ROOT}/x")

    def test_the_marker_and_nothing_beside_it(self) -> None:
        profile = read()
        assert profile.allows("file-read-data", path=f"{STATE}/marker-01J9")
        assert not profile.allows("file-read-metadata", path=f"{STATE}/marker-01J9")
        assert not profile.allows("file-write-data", path=f"{STATE}/marker-01J9")
        assert not profile.allows("file-read-data", path=f"{STATE}/marker-01J8")

    def test_devices(self) -> None:
        profile = read(devices=(Device(path="/dev/cu.usb"), Device(path="/dev/rdisk9", write=False)))
        assert profile.allows("file-write-data", path="/dev/cu.usb")
        assert profile.allows("file-ioctl", path="/dev/cu.usb")
        assert profile.allows("file-read-data", path="/dev/rdisk9")
        assert not profile.allows("file-write-data", path="/dev/rdisk9")
        listed = read(PathRule("/dev/cu.usb", "rw", "device"), devices=(Device(path="/dev/cu.usb"),))
        assert listed.allows("file-ioctl", path="/dev/cu.usb")


class TestProcesses:
    def test_only_its_own(self) -> None:
        profile = read()
        assert profile.allows("process-fork")
        for operation in ("process-info-pidinfo", "process-info-rusage", "signal"):
            assert profile.allows(operation, target="same-sandbox")
            assert not profile.allows(operation, target="others")

    def test_nobodys_arguments_and_environment(self) -> None:
        profile = read()
        assert profile.allows("sysctl-read", kind="sysctl-name", name="hw.ncpu")
        assert profile.allows("sysctl-read", kind="sysctl-name", name="hw.optional.arm.FEAT_X")
        for name in ("kern.procargs2.1", "kern.proc.pid.1", "kern.proc.all", "net.inet.tcp.pcblist"):
            assert not profile.allows("sysctl-read", kind="sysctl-name", name=name)

    @pytest.mark.parametrize(
        "operation",
        ["lsopen", "job-creation", "appleevent-send", "nvram-set", "system-privilege", "file-mount",
         "mach-register", "iokit-open", "iokit-get-properties", "ipc-posix-sem", "mach-priv-task-port"],
    )  # fmt: skip
    def test_ways_out_stay_shut(self, operation: str) -> None:
        assert not read().allows(operation, name="x", path="/x")

    def test_services(self) -> None:
        profile = read(mach_lookup=("com.example.one",))
        assert profile.allows("mach-lookup", kind="global-name", name="com.example.one")
        assert profile.allows("mach-lookup", kind="global-name", name="com.apple.system.logger")
        for name in (
            "com.apple.SecurityServer",
            "com.apple.coreservices.launchservicesd",
            "com.apple.trustd",
        ):
            assert not profile.allows("mach-lookup", kind="global-name", name=name)
            assert not profile.allows("mach-lookup", kind="xpc-service-name", name=name)

    @pytest.mark.parametrize("name", ["a\nb", "a\0b", "\ud800"])
    def test_a_service_that_has_no_name(self, name: str) -> None:
        with pytest.raises(InvalidSpec):
            built(mach_lookup=(name,))


class TestNetwork:
    def test_none(self) -> None:
        profile = network(Network.NONE)
        assert not profile.allows("network-outbound", remote=("tcp", "localhost", 80))
        assert not profile.allows("network-bind", local=("tcp", "localhost", 80))
        assert not profile.allows("network-outbound", path="/private/var/run/mDNSResponder")

    def test_localhost(self) -> None:
        profile = network(Network.LOCALHOST, bind_ports=(8080,), connect_ports=(53, 443))
        assert profile.allows("network-outbound", remote=("tcp", "localhost", 443))
        assert not profile.allows("network-outbound", remote=("tcp", "localhost", 8081))
        assert not profile.allows("network-outbound", remote=("tcp", "10.0.0.1", 443))
        assert not profile.allows("network-outbound", remote=("udp", "localhost", 53))
        for operation in ("network-bind", "network-inbound"):
            assert profile.allows(operation, local=("tcp", "localhost", 8080))
            assert not profile.allows(operation, local=("tcp", "localhost", 8081))

    def test_localhost_with_udp(self) -> None:
        profile = network(Network.LOCALHOST, bind_ports=(5353,), connect_ports=(53,), udp=True)
        assert profile.allows("network-outbound", remote=("udp", "localhost", 53))
        assert profile.allows("network-bind", local=("udp", "localhost", 5353))

    def test_outbound(self) -> None:
        profile = network(Network.OUTBOUND, bind_ports=(8080,), connect_ports=(5432,), udp=True)
        assert profile.allows("network-outbound", remote=("tcp", "1.1.1.1", 443))
        assert profile.allows("network-outbound", remote=("udp", "1.1.1.1", 53))
        assert profile.allows("network-outbound", remote=("tcp", "localhost", 5432))
        assert not profile.allows("network-outbound", remote=("tcp", "localhost", 22))
        assert profile.allows("network-bind", local=("tcp", "localhost", 8080))
        assert not profile.allows("network-bind", local=("tcp", "localhost", 8081))
        assert profile.allows("network-outbound", path="/private/var/run/mDNSResponder")
        assert profile.allows("mach-lookup", kind="global-name", name="com.apple.trustd")

    def test_full_but_for_sockets_that_were_not_granted(self) -> None:
        profile = network(Network.FULL)
        assert profile.allows("network-outbound", remote=("tcp", "localhost", 22))
        assert profile.allows("network-inbound", local=("tcp", "localhost", 9999))
        for path in ("/private/var/run/docker.sock", f"{STATE}/api.sock", "/private/tmp/ssh-agent"):
            assert not profile.allows("network-outbound", path=path)

    def test_unix_sockets(self) -> None:
        profile = network(Network.NONE, unix_sockets=("/var/run/api.sock",))
        assert profile.allows("network-outbound", path="/private/var/run/api.sock")
        assert profile.allows("file-read-metadata", path="/private/var/run/api.sock")
        assert profile.allows("file-read-metadata", path="/private/var/run")
        assert not profile.allows("network-outbound", path="/private/var/run/other.sock")
        assert not profile.allows("file-write-data", path="/private/var/run/api.sock")

    @pytest.mark.parametrize("level", list(Network))
    def test_the_servers_port_is_denied(self, level: Network) -> None:
        profile = network(level, denied_ports=(4222,), bind_ports=(80,), connect_ports=(4222,), udp=True)
        for host in ("localhost", "10.0.0.1"):
            assert not profile.allows("network-outbound", remote=("tcp", host, 4222))
            assert not profile.allows("network-bind", local=("tcp", host, 4222))

    @pytest.mark.parametrize("level", list(Network))
    def test_no_local_filter_on_outbound(self, level: Network) -> None:
        profile = built(
            network=NetworkPolicy(level=level, bind_ports=(1,), connect_ports=(2,), denied_ports=(3,))
        )
        for action, *rest in parse(profile.text)[1:]:
            if action == "allow" and "network-outbound" in rest:
                assert not any(one[0] == "local" for one in rest if isinstance(one, list))

    def test_a_port_that_is_none(self) -> None:
        for port in (0, 65536, -1):
            with pytest.raises(Internal):
                network(Network.LOCALHOST, bind_ports=(port,))


class TestGroupsAndGpu:
    @pytest.mark.parametrize("name", sorted(GROUPS))
    def test_every_group_reads_back(self, name: str) -> None:
        text = built(groups=(name,)).text
        assert f"; --- group: {name}\n" in text
        Reader(built(groups=(name,)))

    def test_an_unknown_group_is_named(self) -> None:
        with pytest.raises(InvalidSpec, match="'nope'") as caught:
            built(groups=("nope",))
        assert caught.value.field == "spec.sandbox.groups"

    def test_dns(self) -> None:
        assert not read().allows("file-read-data", path="/private/etc/resolv.conf")
        assert read(groups=("dns",)).allows("file-read-data", path="/private/etc/resolv.conf")
        assert not GROUPS["dns"].harmless

    def test_no_gpu(self) -> None:
        profile = read(gpu=Gpu.NONE)
        assert not profile.allows("iokit-open", kind="iokit-user-client-class", name="AGXDeviceUserClient")
        assert not profile.allows("mach-lookup", kind="global-name", name="com.apple.MTLCompilerService")

    @pytest.mark.parametrize("level", [Gpu.METAL_COMPUTE, Gpu.MPS_ONLY])
    def test_gpu(self, level: Gpu) -> None:
        profile = read(gpu=level)
        assert profile.allows("iokit-open", kind="iokit-user-client-class", name="AGXDeviceUserClient")
        assert profile.allows("iokit-get-properties", kind="iokit-property", name="MetalPluginName")
        for kind in ("global-name", "xpc-service-name"):
            assert profile.allows("mach-lookup", kind=kind, name="com.apple.MTLCompilerService")
        compute = level is Gpu.METAL_COMPUTE
        assert compute == profile.allows(
            "mach-lookup", kind="xpc-service-name", name="com.apple.AGXCompilerService-S2A8"
        )
        assert compute == profile.allows("iokit-open", kind="iokit-user-client-class", name="IOAccelDevice")
        assert not profile.allows("iokit-open", kind="iokit-user-client-class", name="IOHIDLibUserClient")

    def test_less_for_mps(self) -> None:
        metal, mps = GPU_LEVELS[Gpu.METAL_COMPUTE], GPU_LEVELS[Gpu.MPS_ONLY]
        for part in ("clients", "fine_clients", "properties", "services", "frameworks"):
            assert set(getattr(mps, part)) < set(getattr(metal, part)), part

    @pytest.mark.parametrize("level", [Gpu.METAL_COMPUTE, Gpu.MPS_ONLY])
    def test_new_names_only_where_they_are_known(self, level: Gpu) -> None:
        for release in (12, 13, 15):
            assert "iokit-open-service" not in built(gpu=level, release=release).text
            assert "iokit-open-user-client" not in built(gpu=level, release=release).text
        assert "(allow iokit-open-service" in built(gpu=level, release=26).text


class TestText:
    def test_it_starts_as_it_must(self) -> None:
        lines = built().text.splitlines()
        assert lines[0] == "(version 1)"
        assert lines[1] == '(deny default (with message "sandfleet:01J9ZZZZZZZZZZZZZZZZZZZZZZ"))'

    def test_denials_of_what_the_default_misses_come_before_any_allow(self) -> None:
        text = built().text
        for name in ("process-info*", "nvram*", "sysctl*", "iokit-get-properties"):
            assert text.index(f"(deny {name})") < text.index("(allow ")

    def test_it_is_deterministic_and_in_any_order_the_same(self) -> None:
        rules = [PathRule(f"/Users/w/{name}", "r", "volume") for name in "dbca"]
        assert built(*rules) == built(*rules)
        assert built(*rules).text == built(*reversed(rules)).text
        assert built(*rules).params == built(*reversed(rules)).params

    def test_no_path_of_the_policy_stands_in_the_text(self) -> None:
        profile = built(
            PathRule("/Users/w/volume", "rw", "volume"),
            network=NetworkPolicy(level=Network.FULL, unix_sockets=("/Users/w/s.sock",)),
            mach_lookup=("com.example.secret",),
            devices=(Device(path="/dev/odd"),),
        )
        for value in ("/Users", "com.example", "/dev/odd"):
            assert value not in profile.text
        assert set(re.findall(r'\(param "([A-Z_0-9]+)"\)', profile.text)) == set(profile.params)

    def test_a_rule_never_grows_too_long(self) -> None:
        rules = [PathRule(f"/Users/w/{'x' * 200}/{number:04}", "r", "volume") for number in range(200)]
        profile = built(*rules)
        sizes = []
        for form in parse(profile.text):
            used = [one[1][1] for one in form if isinstance(one, list) and one[-1][:1] == ["param"]]
            sizes.append(sum(len(profile.params[name]) for name in used))
        assert max(sizes) <= MAX_RULE_BYTES
        reader = Reader(profile)
        assert all(reader.allows("file-read-data", path=f"{rule.path}/f") for rule in rules)
        assert reader.allows("file-read-metadata", path=f"/Users/w/{'x' * 200}")

    def test_a_profile_that_is_too_long_is_refused(self) -> None:
        rules = [PathRule(f"/Users/w/{number}", "r", "volume") for number in range(2000)]
        with pytest.raises(CreateFailed, match="bytes"):
            built(*rules)

    def test_an_instance_that_is_no_tag(self) -> None:
        for instance in ('x"))(allow default)', "", "a b"):
            with pytest.raises(Internal):
                built(instance=instance)

    def test_an_origin_cannot_leave_its_comment(self) -> None:
        text = built(PathRule("/Users/w/x", "r", "volume\n(allow default)")).text
        assert "(allow default)" not in text
        assert ["allow", "default"] not in parse(text)


class TestCanonical:
    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ("/tmp", "/private/tmp"),
            ("/tmp/x", "/private/tmp/x"),
            ("/var/folders/x", "/private/var/folders/x"),
            ("/etc/hosts", "/private/etc/hosts"),
            ("/tmpx", "/tmpx"),
            ("/private/tmp/x", "/private/tmp/x"),
            ("/a//b/./c/", "/a/b/c"),
            ("//a", "/a"),
            ("/ü b", "/ü b"),
        ],
    )
    def test_paths(self, given: str, expected: str) -> None:
        assert canonical(given) == expected

    @pytest.mark.parametrize(
        "path", ["", "a", "./a", "/a/../b", "/..", "/a\nb", "/a\0", "/\x7f", "/\x1b[0m", "/\ud800"]
    )
    def test_no_paths(self, path: str) -> None:
        with pytest.raises(InvalidSpec):
            canonical(path)


hostile = st.one_of(
    st.text(
        st.characters(min_codepoint=32, exclude_characters="\x7f/", codec="utf-8"), min_size=1, max_size=40
    ),
    st.sampled_from(
        [
            'x") (allow default) ("',
            "a\\",
            'a\\"b',
            "#|",
            "|#",
            "; x",
            "(param",
            '"',
            "')",
            "#t",
            '#"raw"',
            "...",
        ]
    ),
).filter(lambda name: name not in (".", ".."))


@settings(max_examples=150, deadline=None)
@given(names=st.lists(hostile, min_size=1, max_size=4, unique=True), service=hostile)
def test_nothing_from_outside_is_read_as_text(names: list[str], service: str) -> None:
    rules = [PathRule(f"/Users/w/{name}", "rw", "volume") for name in names]
    changes: dict[str, Any] = {
        "mach_lookup": (service,),
        "network": NetworkPolicy(level=Network.NONE, unix_sockets=tuple(f"/s/{name}" for name in names)),
        "devices": tuple(Device(path=f"/dev/x/{name}") for name in names),
    }
    profile = built(*rules, **changes)
    plain = built(
        *(PathRule(f"/Users/w/plain{number}", "rw", "volume") for number in range(len(names))),
        mach_lookup=("plain",),
        network=NetworkPolicy(
            level=Network.NONE, unix_sockets=tuple(f"/s/plain{n}" for n in range(len(names)))
        ),
        devices=tuple(Device(path=f"/dev/x/plain{n}") for n in range(len(names))),
    )
    assert profile.text == plain.text
    reader = Reader(profile)
    assert all(reader.allows("file-write-data", path=f"/Users/w/{name}/f") for name in names)
    assert not reader.allows("file-read-data", path="/Users/w/elsewhere of all/f")
