"""The defects of the reference system's profile and of its use (S1 … S21), and that none of them is ours.

Where the reference's own profile shows the defect, the same question is put to it: a test that could not see
the defect there would prove nothing here. docs/adr/0008 says what we do instead.
"""

from typing import Any

import pytest

from schemas.status import Gpu, Network
from worker.config_model import PolicyConfig
from worker.errors import PolicyDenied
from worker.platform.base import PathRule
from worker.platform.darwin.groups_gpu import FINE_IOKIT_RELEASE
from worker.platform.darwin.rules import OLDEST_RELEASE
from worker.platform.darwin.sbpl import Sbpl

from .reference_profile import Machine, render
from .sbpl_help import (
    BOX,
    DATA,
    DOCKER,
    READS,
    ROOT,
    RUNS,
    STATE,
    WRITES,
    Asked,
    ask,
    ask_spec,
    built,
    policy_of,
)

ENDPOINT = {"name": "web", "protocol": "http", "port": 8080}
MDNS = "/private/var/run/mDNSResponder"


def reference(**machine: Any) -> Asked:
    """The reference's profile of one container, whose state directory is `BOX`."""
    return Asked(Sbpl(render(Machine(state=BOX, **machine)), {}), 26)


# -- files


def test_s1_a_path_is_data_and_canonical() -> None:
    hostile = '/Users/w/x")) (allow default) (allow file-read* (subpath "'
    assert reference(writable=(hostile,)).allows("file-write-data", path="/Users/w/.zshrc")
    profile = ask(PathRule(hostile, "rw", "volume"), PathRule("/tmp/x", "r", "volume"))
    assert not profile.allows("file-write-data", path="/Users/w/.zshrc")
    assert profile.allows("file-write-data", path=f"{hostile}/f")
    # Links of the system are written out, so a rule below them is not dead.
    assert not reference(readonly=("/tmp/x",)).allows("file-read-data", path="/private/tmp/x/f")
    assert profile.allows("file-read-data", path="/private/tmp/x/f")


@pytest.mark.parametrize(
    "path",
    ["/bin/sh", "/sbin/mount", "/usr/bin/env", "/usr/sbin/sysctl", "/usr/libexec/path_helper", "/usr/share/locale/x",
     "/private/etc/hosts", "/private/etc/resolv.conf", "/private/var/db/timezone/x", "/private/var/select/sh",
     "/System/Cryptexes/OS/usr/lib/x", "/System/Library/SubFrameworks/x"],
)  # fmt: skip
def test_s2_a_shell_can_start(path: str) -> None:
    assert not reference().allows("file-read-data", path=path)
    assert ask().allows("file-read-data", path=path)
    if path.startswith(("/bin", "/sbin", "/usr/bin", "/usr/sbin", "/usr/libexec")):
        assert all(ask().allows(operation, path=path) for operation in RUNS)


@pytest.mark.parametrize("path", [f"{DATA}/containers", DATA, "/Users/w", "/Users", "/usr", "/private/etc"])
def test_s3_the_folders_above_can_be_looked_at(path: str) -> None:
    assert not reference().allows("file-read-metadata", path=path)
    profile = ask()
    assert profile.allows("file-read-metadata", path=path, vnode="DIRECTORY")
    assert not profile.allows("file-read-data", path=path, vnode="DIRECTORY")
    # realpath(3) of C opens them; that shows their lists of names, so it is asked for and granted.
    assert ask(groups=("realpath",)).allows("file-read-data", path=path, vnode="DIRECTORY")
    assert not ask(groups=("realpath",)).allows("file-read-data", path=path, vnode="REGULAR-FILE")


@pytest.mark.parametrize("name", ["sandbox.sb", "config.json", "pid", "stdout.log", "exit.json"])
def test_s4_nothing_of_the_state_directory(name: str) -> None:
    assert reference().allows("file-write-data", path=f"{BOX}/{name}")
    everything = {"sandbox": {"write": ["/Users/w"]}}
    for profile in (ask_spec({}), ask(PathRule("/Users/w", "rwx", "sandbox.write"))):
        for operation in (*READS, *WRITES, *RUNS):
            assert not profile.allows(operation, path=f"{STATE}/{name}"), operation
    with pytest.raises(PolicyDenied, match="node itself"):
        ask_spec(everything)


def test_s5_a_volume_is_its_source_on_the_host() -> None:
    storage = [
        {"type": "bind", "source": "/Users/w/in", "target": "/Users/w/etc", "readonly": True},
        {"type": "bind", "source": "/Users/w/out", "target": "/private/etc"},
    ]
    # The reference took targets for paths of the host, and all of them for writable.
    seen = reference(writable=("/Users/w/etc", "/private/etc"))
    assert seen.allows("file-write-data", path="/private/etc/sudoers")
    assert not seen.allows("file-read-data", path="/Users/w/in/f")
    profile = ask_spec({"storage": storage})
    assert profile.allows("file-read-data", path="/Users/w/in/f")
    assert profile.allows("file-write-data", path="/Users/w/out/f")
    for operation in WRITES:
        assert not profile.allows(operation, path="/Users/w/in/f"), operation
        for target in ("/Users/w/etc/f", "/private/etc/sudoers"):
            assert not profile.allows(operation, path=target), operation


def test_s6_read_only_inside_what_is_writable() -> None:
    seen = reference(writable=("/srv",), readonly=("/srv/ro",))
    assert seen.allows("file-write-data", path="/srv/ro/f")
    spec = {
        "sandbox": {"write": ["/srv"]},
        "storage": [{"type": "bind", "source": "/srv/a/ro", "target": "/ro", "readonly": True}],
    }
    profile = ask_spec(spec)
    assert profile.allows("file-write-data", path="/srv/a/f")
    for operation in WRITES:
        assert not profile.allows(operation, path="/srv/a/ro/f"), operation
    for moved in ("/srv/a/ro", "/srv/a", "/srv"):
        assert not profile.allows("file-write-unlink", path=moved)


@pytest.mark.parametrize(
    "path",
    ["/private/etc/paths", "/usr/share/x", "/private/var/db/timezone/x", "/Users/w/bin/x", "/opt/homebrew/bin/x",
     "/dev/null", "/Applications/A.app/Contents/MacOS/A"],
)  # fmt: skip
def test_s7_only_programs_of_the_system_and_of_the_container_run(path: str) -> None:
    assert reference().allows("process-exec", path=path)
    profile = ask()
    for operation in ("process-exec", "process-exec-interpreter", "file-map-executable"):
        assert not profile.allows(operation, path=path)
        assert profile.allows(operation, path=f"{ROOT}/bin/x")
    assert not profile.allows("process-exec", path="/usr/bin/sudo")  # setuid


def test_s8_no_other_processs_arguments_and_environment() -> None:
    seen, profile = reference(), ask(groups=("clang", "dns", "jvm", "node", "python", "xcode"))
    for operation in ("process-info-pidinfo", "process-info-rusage"):
        assert seen.allows(operation, target="others")
        assert not profile.allows(operation, target="others")
        assert profile.allows(operation, target="children")
    assert seen.allows("sysctl-read", name="kern.procargs2.1")
    assert not profile.allows("sysctl-read", name="kern.procargs2.1")
    assert not profile.allows("sysctl-read", name="kern.proc.all")
    for operation in ("process-info-listpids", "process-info-codesignature", "process-info-pidfdinfo"):
        assert not profile.allows(operation, target="others")


# -- network


def test_s9_auto_stays_full_without_endpoints_and_a_node_can_cap_it() -> None:
    assert policy_of({}).network.level is Network.FULL
    assert policy_of({"endpoints": [ENDPOINT]}).network.level is Network.LOCALHOST
    cap = PolicyConfig(network=(Network.NONE, Network.LOCALHOST))
    with pytest.raises(PolicyDenied, match="full") as caught:
        policy_of({}, grants=cap)
    assert caught.value.field == "spec.network.access"


def test_s9_none_is_none_whatever_port_is_assigned() -> None:
    made = policy_of({"network": {"access": "none"}, "endpoints": [ENDPOINT]}, port=31000)
    assert made.network.level is Network.NONE
    profile = ask_spec({"network": {"access": "none"}, "endpoints": [ENDPOINT]}, port=31000)
    for port in (53, 80, 443, 8080, 31000):
        assert not profile.connects(f"127.0.0.1:{port}")
        assert not profile.serves(port)


def test_s10_localhost_reaches_other_containers_and_outbound_the_world() -> None:
    seen = reference(network="localhost")
    assert not seen.connects("93.184.216.34:443")
    assert not seen.connects("127.0.0.1:31999")
    assert not seen.allows("network-outbound", path=MDNS)
    near = ask_spec({"network": {"access": "localhost", "connect_ports": [31999]}})
    assert near.connects("127.0.0.1:31999")
    assert not near.connects("93.184.216.34:443")
    named = ask_spec({"network": {"access": "localhost"}, "sandbox": {"groups": ["dns"]}})
    assert named.allows("network-outbound", path=MDNS)
    far = ask_spec({"network": {"access": "outbound"}})
    assert far.connects("93.184.216.34:443")
    assert far.allows("network-outbound", path=MDNS)
    assert far.allows("mach-lookup", name="com.apple.SystemConfiguration.DNSConfiguration")
    assert far.allows("mach-lookup", name="com.apple.trustd.agent")


def test_s11_only_declared_ports_accept() -> None:
    assert reference(bind=(8080,)).allows("network-inbound", address="127.0.0.1:9999")
    profile = ask_spec({"endpoints": [ENDPOINT]}, port=31000)
    assert profile.serves(8080)
    assert profile.serves(31000)
    assert not profile.serves(9999)


@pytest.mark.parametrize("path", [DOCKER, "/private/tmp/ssh-agent.s", f"{DATA}/launcher.sock", f"{STATE}/s"])
def test_s12_full_opens_no_unix_socket(path: str) -> None:
    seen, profile = reference(network="full"), ask_spec({})
    for operation in ("network-outbound", "network-bind", "network-inbound"):
        assert seen.allows(operation, path=path)
        assert not profile.allows(operation, path=path)


def test_s12_full_brings_names_and_certificates() -> None:
    seen, profile = reference(network="full"), ask_spec({})
    for name in (
        "com.apple.trustd",
        "com.apple.trustd.agent",
        "com.apple.SystemConfiguration.DNSConfiguration",
    ):
        assert not seen.allows("mach-lookup", name=name)
        assert profile.allows("mach-lookup", name=name)
    for path in ("/private/etc/resolv.conf", "/private/var/run/resolv.conf", "/private/etc/hosts",
                 "/private/etc/ssl/cert.pem", "/System/Library/Keychains/SystemRootCertificates.keychain"):  # fmt: skip
        assert not seen.allows("file-read-data", path=path)
        assert profile.allows("file-read-data", path=path)
    assert profile.allows("network-outbound", path=MDNS)
    # The keychain's server would open the user's secrets.
    assert not profile.allows("mach-lookup", name="com.apple.SecurityServer")
    assert ask(groups=("keychain",)).allows("mach-lookup", name="com.apple.SecurityServer")


@pytest.mark.parametrize("access", ["none", "localhost", "outbound", "full"])
def test_s13_the_api_socket_can_be_reached(access: str) -> None:
    socket = f"{DATA}/api/api.sock"
    assert not reference(writable=(socket,)).allows("network-outbound", path=socket)
    profile = ask_spec({"network": {"access": access}}, api_socket=socket)
    assert profile.allows("network-outbound", path=socket)
    assert profile.allows("file-read-metadata", path=socket)
    assert profile.allows("file-read-metadata", path=f"{DATA}/api")
    for operation in WRITES:
        assert not profile.allows(operation, path=socket)


# -- devices, memory, services, GPU


@pytest.mark.parametrize(
    ("operation", "path"),
    [
        *((operation, f"/dev/{name}") for name in ("zero", "tty", "fd/3", "stdin", "stdout", "stderr")
          for operation in ("file-read-data", "file-write-data", "file-read-metadata")),
        ("file-read-metadata", "/dev/null"),
        ("file-read-metadata", "/dev"),
        ("file-ioctl", "/dev/tty"),
        ("file-ioctl", "/dev/dtracehelper"),
        ("file-ioctl", "/dev/ttys004"),
    ],
)  # fmt: skip
def test_s14_devices_that_shells_and_terminals_need(operation: str, path: str) -> None:
    vnode = "DIRECTORY" if path == "/dev" else "CHARACTER-DEVICE"
    assert not reference().allows(operation, path=path, vnode=vnode)
    assert ask().allows(operation, path=path, vnode=vnode)


def test_s14_the_slave_of_an_own_terminal() -> None:
    own = {"path": "/dev/ttys004", "vnode": "TTY", "extensions": ("com.apple.sandbox.pty",)}
    for operation in ("file-read-data", "file-write-data", "file-ioctl"):
        assert not reference().allows(operation, **own)
        assert ask().allows(operation, **own)
    # Another program's terminal is as much the user's, and stays shut.
    for operation in ("file-read-data", "file-write-data"):
        assert not ask().allows(operation, path="/dev/ttys004", vnode="TTY")


def test_s15_no_shared_names_but_those_that_are_asked_for() -> None:
    seen, profile = reference(), ask()
    for operation in ("ipc-posix-sem-open", "ipc-posix-shm-read-data", "ipc-posix-shm-write-data"):
        assert seen.allows(operation, name="/other-app")
        assert not profile.allows(operation, name="/other-app")
        assert ask(groups=("ipc",)).allows(operation, name="/other-app")
    assert profile.allows("ipc-posix-shm-write-create", name="/__KMP_REGISTERED_LIB_17")
    assert profile.allows("ipc-posix-shm-read-data", name="apple.shm.notification_center")
    python = ask(groups=("python",))
    assert python.allows("ipc-posix-sem-create", name="/mp-8ax_q1zz")
    assert not python.allows("ipc-posix-sem-create", name="/other-app")


@pytest.mark.parametrize("level", [Gpu.METAL_COMPUTE, Gpu.MPS_ONLY])
@pytest.mark.parametrize("release", range(OLDEST_RELEASE, 27))
def test_s16_every_release_takes_the_gpu_rules(level: Gpu, release: int) -> None:
    made = built(gpu=level, release=release)
    profile = Asked(made, release)
    assert profile.compiled.warnings == ()
    assert profile.allows("iokit-open", class_="AGXDeviceUserClient")
    assert ("iokit-open-service" in made.text) == (release >= FINE_IOKIT_RELEASE)
    # A service's class is no user client's.
    assert '(iokit-user-client-class "IOSurfaceRoot")' not in made.text
    if release >= FINE_IOKIT_RELEASE:
        assert profile.allows("iokit-open-service", class_="IOSurfaceRoot")
        assert profile.allows("iokit-open-service", class_="AGXAcceleratorG17G")


def test_s17_the_gpu_levels_say_what_they_do() -> None:
    assert "no shader compilation" not in built(gpu=Gpu.MPS_ONLY).text
    for level in (Gpu.METAL_COMPUTE, Gpu.MPS_ONLY):
        profile = ask(gpu=level)
        for kind in ("global", "xpc"):
            assert profile.allows("mach-lookup", name="com.apple.MTLCompilerService", kind=kind)
    mps = ask(gpu=Gpu.MPS_ONLY)
    for name in ("com.apple.CARenderServer", "com.apple.gpu.process", "com.apple.cvmsServ"):
        assert not mps.allows("mach-lookup", name=name)


def test_s17_the_shader_cache_is_for_those_who_may_have_it() -> None:
    """It is shared with every program of the user: what one writes there another one runs on the GPU."""
    folder = "/private/var/folders/zz/abc/C"
    plain, granted = ask(gpu=Gpu.METAL_COMPUTE), ask(gpu=Gpu.METAL_COMPUTE, groups=("shader-cache",))
    for path in (f"{folder}/com.apple.metal/1/x.data", f"{folder}/org.python.python/com.apple.metalfe/x"):
        for operation in ("file-read-data", "file-write-create"):
            assert not plain.allows(operation, path=path)
            assert granted.allows(operation, path=path)
    assert not granted.allows("file-write-create", path=f"{folder}/com.apple.Safari/x")
    with pytest.raises(PolicyDenied, match="shader-cache"):
        ask_spec({"sandbox": {"groups": ["shader-cache"]}}, grants=PolicyConfig())


@pytest.mark.parametrize(
    "name",
    ["com.apple.logd", "com.apple.system.logger", "com.apple.diagnosticd", "com.apple.system.notification_center",
     "com.apple.bsd.dirhelper", "com.apple.system.opendirectoryd.membership"],
)  # fmt: skip
def test_s21_services_of_an_ordinary_process(name: str) -> None:
    assert not reference().allows("mach-lookup", name=name)
    assert ask().allows("mach-lookup", name=name)
    assert ask(groups=("preferences",)).allows("mach-lookup", name="com.apple.cfprefsd.agent")
