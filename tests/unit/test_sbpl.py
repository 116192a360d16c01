"""Profiles: what they allow and what they never do."""

import pytest

from schemas.status import Network
from worker.errors import Internal, InvalidSpec
from worker.platform.base import Device, NetworkPolicy, PathRule

from .sbpl_help import (
    BOX,
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
    ask,
    built,
    network,
)

ALL_FILE_OPERATIONS = (*READS, *WRITES, *RUNS)


class TestFiles:
    def test_the_containers_own(self) -> None:
        profile = ask()
        for operation in ALL_FILE_OPERATIONS:
            assert profile.allows(operation, path=f"{ROOT}/bin/run"), operation
        assert profile.allows("file-write-data", path=f"{TMP}/x")
        assert not profile.allows("process-exec", path=f"{TMP}/x")

    @pytest.mark.parametrize(
        "path",
        [
            "/",
            "/bin/sh",
            "/usr/bin/env",
            "/usr/lib/dyld",
            "/System/Cryptexes/OS/usr/lib/libSystem.dylib",
            "/System/Volumes/Preboot/Cryptexes/OS/x",
            "/usr/share/zoneinfo/UTC",
            "/private/etc/passwd",
            "/private/etc/hosts",
            "/private/etc/ssl/cert.pem",
            "/private/var/select/sh",
            "/private/var/db/timezone/zoneinfo/UTC",
            "/dev/null",
            "/dev/urandom",
        ],
    )
    def test_what_every_program_reads(self, path: str) -> None:
        assert ask().allows("file-read-data", path=path)
        assert ask().allows("file-read-metadata", path=path)

    @pytest.mark.parametrize("path", ["/bin/sh", "/usr/bin/python3", "/usr/libexec/x"])
    def test_what_every_program_runs(self, path: str) -> None:
        for operation in (*RUNS, "process-exec-interpreter"):
            assert ask().allows(operation, path=path)

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
            "/private/etc/sudoers",
            "/private/tmp/x",
            "/private/var/folders/ab/T/x",
            "/Applications/Xcode.app/x",
            "/opt/homebrew/bin/git",
            "/dev/disk0",
            "/dev/ttys001",
        ],
    )
    def test_what_none_reads(self, path: str) -> None:
        for operation in ("file-read-data", "file-write-data", "file-clone", "file-link", *RUNS):
            assert not ask().allows(operation, path=path), operation

    @pytest.mark.parametrize(
        "path",
        [BOX, f"{DATA}/containers", DATA, "/Users/w", "/Users", "/tmp", "/var", "/etc", "/dev", "/usr", "/private/etc",
         "/System/Library", "/Library/Apple", "/private/var/db"],
    )  # fmt: skip
    def test_the_way_there_can_be_walked(self, path: str) -> None:
        vnode = "SYMLINK" if path in ("/tmp", "/var", "/etc") else "DIRECTORY"
        for operation in ("file-read-metadata", "file-test-existence"):
            assert ask().allows(operation, path=path, vnode=vnode)
        assert not ask().allows("file-read-data", path=path, vnode=vnode)

    @pytest.mark.parametrize(
        "path", [STATE, f"{STATE}/sandbox.sb", f"{DATA}/secrets/x", f"{DATA}/launcher.key"]
    )
    @pytest.mark.parametrize("operation", [*ALL_FILE_OPERATIONS, "network-outbound", "network-bind"])
    def test_what_is_never_reached(self, path: str, operation: str) -> None:
        assert not ask().allows(operation, path=path)

    def test_denied_files_inside_a_grant(self) -> None:
        profile = ask(PathRule(DATA, "rwx", "sandbox.write"))
        assert profile.allows("file-write-data", path=f"{DATA}/x")
        for operation in ALL_FILE_OPERATIONS:
            assert not profile.allows(operation, path=f"{STATE}/sandbox.sb"), operation
        # Neither moved out of the rule with a folder above it, nor cloned with one.
        for above in (STATE, BOX, f"{DATA}/containers", DATA):
            for operation in ("file-write-unlink", "file-clone"):
                assert not profile.allows(operation, path=above), (operation, above)

    def test_a_deny_around_a_grant_is_a_contradiction(self) -> None:
        for denied in (BOX, ROOT, f"{BOX}/", MARKER):
            with pytest.raises(Internal, match="denies"):
                built(deny=(denied,))
        with pytest.raises(Internal, match="denies"):
            built(network=NetworkPolicy(unix_sockets=("/tmp/s",)), deny=("/tmp",))
        with pytest.raises(Internal, match="cover everything"):
            built(PathRule("/", "r", "sandbox.read"))

    def test_a_read_only_mount_in_the_root(self) -> None:
        profile = ask(
            PathRule(f"{ROOT}/app/ro", "r", "volume"), PathRule(f"{ROOT}/app/ro/rw", "rw", "volume")
        )
        inside, writable = f"{ROOT}/app/ro/f", f"{ROOT}/app/ro/rw/f"
        assert profile.allows("file-read-data", path=inside)
        for operation in (*WRITES, *RUNS):
            assert not profile.allows(operation, path=inside), operation
        assert profile.allows("file-write-data", path=writable)
        assert not profile.allows("process-exec", path=writable)
        assert profile.allows("file-write-data", path=f"{ROOT}/app/f")
        # Moving the folder above it would take the files out of the rule.
        for held in (f"{ROOT}/app/ro", f"{ROOT}/app", ROOT):
            assert not profile.allows("file-write-unlink", path=held)
        assert profile.allows("file-write-unlink", path=f"{ROOT}/app/other")

    def test_the_roots_of_what_is_writable_stay_where_they_are(self) -> None:
        """Else a link could be put in the place of the rootfs, and the worker would follow it."""
        profile = ask(PathRule("/Users/w/out", "rw", "volume"))
        for path in (ROOT, TMP, "/Users/w/out"):
            assert not profile.allows("file-write-unlink", path=path)
            assert profile.allows("file-write-unlink", path=f"{path}/x")

    def test_a_mount_of_the_host(self) -> None:
        profile = ask(PathRule("/Users/w/models", "r", "volume"), PathRule("/Users/w/out", "rw", "volume"))
        assert profile.allows("file-read-data", path="/Users/w/models/m.bin")
        assert not profile.allows("file-write-data", path="/Users/w/models/m.bin")
        assert profile.allows("file-write-create", path="/Users/w/out/x")
        assert not profile.allows("file-read-data", path="/Users/w/other")

    def test_two_rules_on_one_path_add_up(self) -> None:
        profile = ask(PathRule("/Users/w/x", "r", "volume"), PathRule("/Users/w/x/", "rw", "sandbox.write"))
        assert profile.allows("file-write-data", path="/Users/w/x/f")

    def test_nobody_sets_the_user_bit(self) -> None:
        assert not ask().allows("file-write-setugid", path=f"{ROOT}/x")
        assert ask().allows("file-write-mode", path=f"{ROOT}/x")

    def test_the_marker_and_nothing_beside_it(self) -> None:
        profile = ask()
        assert profile.allows("file-read-data", path=MARKER)
        assert not profile.allows("file-read-metadata", path=MARKER)
        assert not profile.allows("file-write-data", path=MARKER)
        assert not profile.allows("file-read-data", path=MARKER[:-1] + "0")

    def test_devices(self) -> None:
        profile = ask(
            PathRule("/dev/cu.usb", "rw", "device"),
            devices=(
                Device(path="/dev/cu.usb"),
                Device(path="/dev/rdisk9", write=False),
                Device(path="/dev/lp0", read=False),
            ),
        )
        for path in ("/dev/cu.usb", "/dev/rdisk9", "/dev/lp0"):
            assert profile.allows("file-ioctl", path=path)
            assert profile.allows("file-read-metadata", path=path)
            for operation in ("file-write-unlink", "file-write-mode", "process-exec"):
                assert not profile.allows(operation, path=path)
        assert profile.allows("file-write-data", path="/dev/cu.usb")
        assert profile.allows("file-read-data", path="/dev/rdisk9")
        assert not profile.allows("file-write-data", path="/dev/rdisk9")
        assert profile.allows("file-write-data", path="/dev/lp0")
        assert not profile.allows("file-read-data", path="/dev/lp0")


class TestProcesses:
    def test_only_its_own(self) -> None:
        profile = ask()
        assert profile.allows("process-fork")
        for operation in (
            "process-info-pidinfo",
            "process-info-rusage",
            "process-info-codesignature",
            "signal",
        ):
            for target in ("self", "same-sandbox", "children"):
                assert profile.allows(operation, target=target)
            assert not profile.allows(operation, target="others")

    def test_nobodys_arguments_and_environment(self) -> None:
        profile = ask()
        assert profile.allows("sysctl-read", name="hw.ncpu")
        assert profile.allows("sysctl-read", name="hw.optional.arm.FEAT_X")
        for name in ("kern.procargs2.1", "kern.proc.pid.1", "kern.proc.all", "net.inet.tcp.pcblist"):
            assert not profile.allows("sysctl-read", name=name)

    @pytest.mark.parametrize(
        "operation",
        ["lsopen", "job-creation", "appleevent-send", "nvram-set", "system-privilege", "file-mount", "file-mknod",
         "file-chroot", "file-issue-extension", "mach-register", "iokit-open", "iokit-get-properties", "ipc-posix-sem",
         "ipc-sysv-shm", "mach-priv-task-port", "mach-cross-domain-lookup", "sysctl-write", "system-socket"],
    )  # fmt: skip
    def test_ways_out_stay_shut(self, operation: str) -> None:
        assert not ask().allows(operation, name="x", path="/x", class_="X", domain="AF_ROUTE")

    def test_services(self) -> None:
        profile = ask(mach_lookup=("com.example.one",))
        assert profile.allows("mach-lookup", name="com.example.one")
        assert not profile.allows("mach-lookup", name="com.example.one", kind="xpc")
        assert profile.allows("mach-lookup", name="com.apple.system.logger")
        for name in (
            "com.apple.SecurityServer",
            "com.apple.coreservices.launchservicesd",
            "com.apple.trustd",
        ):
            for kind in ("global", "local", "xpc"):
                assert not profile.allows("mach-lookup", kind=kind, name=name)

    @pytest.mark.parametrize("name", ["a\nb", "a\0b", "\ud800"])
    def test_a_service_that_has_no_name(self, name: str) -> None:
        with pytest.raises(InvalidSpec):
            built(mach_lookup=(name,))


class TestNetwork:
    def test_none(self) -> None:
        profile = network(Network.NONE)
        assert not profile.connects("127.0.0.1:80")
        assert not profile.connects("1.1.1.1:443")
        assert not profile.serves(80)
        assert not profile.allows("network-outbound", path="/private/var/run/mDNSResponder")

    def test_localhost(self) -> None:
        profile = network(Network.LOCALHOST, bind_ports=(8080,), connect_ports=(53, 443))
        for host in ("127.0.0.1", "[::1]"):
            assert profile.connects(f"{host}:443")
            assert profile.connects(f"{host}:53")
            assert profile.connects(f"{host}:53", "udp")  # names are asked for over UDP
            assert not profile.connects(f"{host}:8081")
            assert not profile.connects(f"{host}:443", "udp")
        assert not profile.connects("93.184.216.34:443")
        assert not profile.allows("network-outbound", path="/private/var/run/mDNSResponder")
        assert profile.serves(8080)
        assert not profile.serves(8080, "udp")
        assert not profile.serves(8081)

    def test_localhost_with_udp(self) -> None:
        profile = network(Network.LOCALHOST, bind_ports=(5353,), connect_ports=(53, 443), udp=True)
        assert profile.connects("127.0.0.1:443", "udp")
        assert profile.serves(5353, "udp")

    def test_outbound(self) -> None:
        profile = network(Network.OUTBOUND, bind_ports=(8080,), connect_ports=(5432,), udp=True)
        assert profile.connects("1.1.1.1:443")
        assert profile.connects("1.1.1.1:53", "udp")
        assert profile.connects("127.0.0.1:5432")
        assert not profile.connects("127.0.0.1:22")
        assert not profile.connects("[::1]:22")
        assert profile.connects("[::ffff:127.0.0.1]:22")  # told in `not_enforced`, as no filter takes it
        assert profile.serves(8080)
        assert not profile.serves(8081)
        assert profile.allows("network-outbound", path="/private/var/run/mDNSResponder")
        assert profile.allows("mach-lookup", name="com.apple.trustd")

    def test_full_but_for_sockets_that_were_not_granted(self) -> None:
        profile = network(Network.FULL)
        assert profile.connects("127.0.0.1:22")
        assert profile.serves(9999)
        assert profile.serves(9999, "udp")
        for path in (DOCKER, f"{STATE}/api.sock", f"{DATA}/launcher.sock", "/private/tmp/ssh-agent"):
            for operation in ("network-outbound", "network-bind", "network-inbound"):
                assert not profile.allows(operation, path=path)

    @pytest.mark.parametrize("level", list(Network))
    def test_unix_sockets(self, level: Network) -> None:
        profile = network(level, unix_sockets=("/var/run/api.sock",))
        assert profile.allows("network-outbound", path="/private/var/run/api.sock")
        assert profile.allows("file-read-metadata", path="/private/var/run/api.sock")
        assert profile.allows("file-read-metadata", path="/private/var/run")
        assert not profile.allows("network-outbound", path="/private/var/run/other.sock")
        assert not profile.allows("network-outbound", path="/private/var/run/api.sock/x")
        assert not profile.allows("file-write-data", path="/private/var/run/api.sock")

    @pytest.mark.parametrize("level", list(Network))
    def test_the_servers_port_is_denied(self, level: Network) -> None:
        profile = network(level, denied_ports=(NATS,), bind_ports=(80,), connect_ports=(NATS,), udp=True)
        for host in ("127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "10.0.0.1", "93.184.216.34"):
            assert not profile.connects(f"{host}:{NATS}")
        assert not profile.serves(NATS)

    @pytest.mark.parametrize("level", list(Network))
    def test_no_local_filter_on_outbound(self, level: Network) -> None:
        profile = network(level, bind_ports=(1,), connect_ports=(2,), denied_ports=(3,))
        for rule in profile.compiled.rules:
            if rule.action == "allow" and rule.operation in ("network-outbound", "network*"):
                assert "(local" not in rule.text

    def test_a_port_that_is_none(self) -> None:
        for port in (0, 65536, -1):
            with pytest.raises(Internal):
                network(Network.LOCALHOST, bind_ports=(port,))
