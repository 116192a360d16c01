"""What the Linux sandbox decides, worked out from the policy and the plan."""

import pytest

from schemas.errors import InvalidCommand
from schemas.spec import decode_spec
from worker.answers import LinuxSandbox, sandbox_of
from worker.platform.linux import landlock, seccomp
from worker.platform.linux.driver import LinuxDriver
from worker.profiles import Place, canonical_on, make
from worker.questions import parse_question

from .profile_help import asked, made, question, sandbox

ROOT = "/var/lib/sandfleet/containers/app-0"
WEB = {"endpoints": [{"name": "h", "protocol": "http", "port": 8080}], "network": {"connect_ports": [5432]}}


@pytest.mark.parametrize(
    ("operation", "argument", "decision", "rule"),
    [
        ("read", f"{ROOT}/rootfs/etc/app.conf", "allow", "rootfs"),
        ("write", f"{ROOT}/rootfs/x", "allow", "rootfs"),
        ("exec", f"{ROOT}/tmp/x", "allow", "tmp"),
        ("read", f"{ROOT}/state/config.json", "deny", "[files]"),
        ("read", f"{ROOT}x/rootfs", "deny", "[files]"),
        ("read", "/var/lib/sandfleet/worker.db", "deny", "[files]"),
        ("read", "/usr/lib/x.so", "allow", "programs and libraries"),
        ("exec", "/bin/sh", "allow", "programs"),
        ("write", "/usr/lib/x.so", "deny", "programs and libraries"),
        ("write", "/dev/null", "allow", "harmless devices"),
        ("read", "/etc/shadow", "deny", "[files]"),
        ("read", "/etc/java-17/security", "allow", "/etc/java-*"),
        ("read", "/etc/javascript/x", "deny", "[files]"),
        ("read", "/proc/self/status", "allow", "/proc/self"),
        ("read", "/proc/1/environ", "deny", "[files]"),
        ("connect", "localhost:5432", "allow", "connect  tcp"),
        ("connect", "10.0.0.1:5432", "allow", "connect  tcp"),
        ("connect", "localhost:5433", "deny", "connect  tcp"),
        ("connect", "localhost:4222", "deny", "connect  tcp"),
        ("connect", "localhost:53/udp", "deny", "no other socket"),
        ("connect", "example.com:443", "deny", "no other socket"),
        ("connect", "/run/docker.sock", "deny", "no other socket"),
        ("bind", "8080", "allow", "bind     tcp"),
        ("bind", "8081", "deny", "bind     tcp"),
        ("bind", "/tmp/x.sock", "deny", "no other socket"),
        ("lookup", "com.apple.trustd", "deny", None),
        ("gpu", None, "deny", "[files]"),
        ("syscall", "ptrace", "deny", "ptrace"),
        ("syscall", "ioctl", "unknown", "TIOCSTI"),
        ("syscall", "clone3", "deny", "clone3"),
        ("syscall", "truncate", "allow", None),
        ("syscall", "nonsense", "unknown", None),
        ("socket", "inet/stream", "allow", "TCP"),
        ("socket", "inet/raw", "deny", "no other socket"),
        ("socket", "unix/stream", "deny", "no other socket"),
        ("make_sock", f"{ROOT}/rootfs/x", "deny", "rootfs"),
        ("make_char", f"{ROOT}/rootfs/x", "deny", "rootfs"),
        ("connect_tcp", "5432", "allow", "connect  tcp"),
        ("bind_tcp", "5432", "deny", "bind     tcp"),
        ("signal", None, "deny", None),
        ("abstract_unix", None, "deny", "no other socket"),
    ],
)  # fmt: skip
def test_a_web_server(operation: str, argument: str | None, decision: str, rule: str | None) -> None:
    answer = asked("linux", operation, argument, **WEB)
    assert answer.decision == decision, answer
    if rule is None:
        assert answer.rule is None
    else:
        assert rule in (answer.rule or ""), answer


@pytest.mark.parametrize("operation", [("read", "/usr/x"), ("connect", "localhost:80"), ("syscall", "mount")])
def test_the_rule_stands_at_its_line(operation: tuple[str, str]) -> None:
    profile = made("linux", **WEB).profile
    answer = sandbox_of(profile).ask(question("linux", *operation))
    assert answer.rule is not None
    assert answer.line is not None
    assert profile.text.split("\n")[answer.line - 1] == answer.rule


@pytest.mark.parametrize(
    ("access", "remote", "loopback", "bind", "udp", "name"),
    [
        ("none", "deny", "deny", "deny", "deny", "deny"),
        ("localhost", "deny", "deny", "deny", "deny", "deny"),
        # Landlock tells no addresses apart: loopback is open too.
        ("outbound", "allow", "allow", "deny", "allow", "allow"),
        ("full", "allow", "allow", "allow", "allow", "allow"),
    ],
)
def test_network_levels(access: str, remote: str, loopback: str, bind: str, udp: str, name: str) -> None:
    box = sandbox("linux", network={"access": access})
    asked_for = {
        "10.0.0.1:9000": remote,
        "localhost:9000": loopback,
        "10.0.0.1:9000/udp": udp,
        "example.com:9000": name,
    }
    for argument, decision in asked_for.items():
        assert box.ask(question("linux", "connect", argument)).decision == decision, argument
    assert box.ask(question("linux", "bind", "9000")).decision == bind


def test_a_read_only_folder_in_a_writable_one_is_writable() -> None:
    storage = [{"type": "bind", "source": "/srv/data/ro", "target": "/x", "readonly": True}]
    alone = asked("linux", "write", "/srv/data/ro/f", storage=storage)
    inside = asked("linux", "write", "/srv/data/ro/f", storage=storage, sandbox={"write": ["/srv/data"]})
    assert (alone.decision, inside.decision) == ("deny", "allow")
    assert "/srv/data " in (inside.rule or "")


def test_one_socket_opens_all() -> None:
    answer = asked("linux", "connect", "/run/other.sock", sandbox={"unix_sockets": ["/run/this.sock"]})
    assert answer.decision == "allow"
    assert "cannot tell paths apart" in answer.reason


def test_a_volume_is_found_where_the_rootfs_has_it() -> None:
    storage = [{"type": "named", "name": "data", "target": "/data", "readonly": True}]
    answer = asked("linux", "read", f"{ROOT}/rootfs/data/x", storage=storage)
    assert answer.rule is not None
    assert "/volumes/data" in answer.rule
    assert asked("linux", "write", f"{ROOT}/rootfs/data/x", storage=storage).decision == "deny"


def test_a_low_port_is_told() -> None:
    answer = asked("linux", "bind", "80", endpoints=[{"name": "h", "protocol": "tcp", "port": 80}])
    assert answer.decision == "allow"
    assert "1024" in answer.reason


@pytest.mark.parametrize("abi", range(8))
def test_older_kernels(abi: int) -> None:
    spec = decode_spec({"image": {"name": "a"}, "network": {"access": "localhost"}})
    place = Place(platform="linux", landlock=abi)
    box = sandbox_of(make(spec, place).profile)

    def decision(operation: str, argument: str | None = None) -> str:
        return box.ask(parse_question(operation, argument, canonical_on("linux"))).decision

    assert decision("read", "/etc/shadow") == ("deny" if abi else "allow")
    assert decision("connect", "localhost:9000") == ("deny" if abi >= 4 else "allow")
    assert decision("signal") == ("deny" if abi >= 6 else "allow")
    assert decision("refer", f"{ROOT}/rootfs/x") == {0: "allow", 1: "deny"}.get(abi, "allow")
    assert decision("truncate", "/etc/shadow") == ("deny" if abi >= 3 else "allow")
    assert decision("syscall", "truncate") == ("deny" if abi < 3 else "allow")


def test_without_a_filter_sockets_are_open() -> None:
    driver = LinuxDriver(abi=7, filter=False, root=False, listed=True, gate=False, rooted=True)
    box = sandbox_of(driver.describe(made("linux", network={"access": "none"}).policy))
    assert box.ask(question("linux", "connect", "/run/x.sock")).decision == "allow"
    assert box.ask(question("linux", "connect", "localhost:80")).decision == "deny"
    assert box.ask(question("linux", "connect", "localhost:80/udp")).decision == "allow"
    assert box.ask(question("linux", "syscall", "ptrace")).decision == "allow"


@pytest.mark.parametrize("argument", ["/a", "", "inet", "inet/tcp", "x/stream"])
def test_a_raw_question_needs_its_argument(argument: str) -> None:
    with pytest.raises(InvalidCommand) as caught:
        asked("linux", "socket", argument)
    assert caught.value.field == "argument"


@pytest.mark.parametrize("operation", ["read_file", "connect_tcp", "syscall"])
def test_a_raw_question_without_argument(operation: str) -> None:
    with pytest.raises(InvalidCommand) as caught:
        asked("linux", operation)
    assert caught.value.field == "argument"


def test_operations_of_the_other_platform_are_none() -> None:
    with pytest.raises(InvalidCommand, match="read_file") as caught:
        asked("linux", "file-read-data", "/x")
    assert caught.value.field == "operation"
    with pytest.raises(InvalidCommand, match="Seatbelt") as caught:
        asked("darwin", "read_file", "/x")
    assert caught.value.field == "operation"


def test_every_right_and_rule_of_the_kernel_can_be_asked() -> None:
    box = sandbox("linux", sandbox={"write": ["/srv/w"]})
    assert isinstance(box, LinuxSandbox)
    for right in landlock.FS_RIGHTS:
        answer = box.ask(question("linux", right, "/srv/w/x"))
        granted = right not in ("make_char", "make_block", "make_sock", "ioctl_dev")
        assert answer.decision == ("allow" if granted else "deny"), right
    for rule in seccomp.rules(seccomp.Options(inet="any", fastopen=True)):
        for call in rule.calls.split():
            answer = box.ask(question("linux", "syscall", call))
            assert answer.decision in ("deny", "unknown"), call
            assert answer.line is not None, call


# -- the host API's socket, behind its gate


def test_only_the_host_apis_socket_comes_through_its_gate() -> None:
    one = made("linux", place={"api_socket": "/run/api.sock"}, network={"access": "none"})
    box = sandbox_of(one.profile)
    answer = box.ask(question("linux", "connect", "/run/api.sock"))
    assert answer.decision == "allow"
    assert answer.line is not None
    for other in (("connect", "/run/other.sock"), ("bind", "/run/api.sock"), ("abstract_unix", None)):
        assert box.ask(question("linux", *other)).decision == "deny", other
    assert box.ask(question("linux", "socket", "unix/stream")).decision == "unknown"


# -- isolation rootfs: a root of its own

ROOTED = {"isolation": "rootfs", "read": ["/opt/ro"], "write": ["/opt/rw"], "unix_sockets": ["/run/db.sock"]}


@pytest.mark.parametrize(
    ("operation", "argument", "decision"),
    [
        ("read", "/etc/shadow", "allow"),
        ("write", "/etc/app.conf", "allow"),
        ("exec", "/app/run", "allow"),
        ("read", "/opt/ro/x", "allow"),
        ("exec", "/opt/ro/x", "allow"),
        ("write", "/opt/ro/x", "deny"),
        ("remove_file", "/opt/ro/x", "deny"),
        ("write", "/opt/rw/x", "allow"),
        ("write", "/data/x", "deny"),
        ("read", "/data/x", "allow"),
        ("exec", "/scratch/x", "allow"),
        ("write", "/tmp/x", "allow"),
        ("write", "/dev/null", "allow"),
        ("exec", "/dev/null", "deny"),
        ("write", "/dev/shm/x", "allow"),
        ("exec", "/dev/shm/x", "deny"),
        ("write", "/dev/pts/0", "allow"),
        ("exec", "/dev/pts/0", "deny"),
        ("make_char", "/x", "deny"),
        ("read", "/proc/1/environ", "allow"),
        ("write", "/proc/sys/kernel/core_pattern", "unknown"),
        ("read", "/usr/share/x", "allow"),
        ("write", "/usr/share/x", "unknown"),
        ("connect", "/run/db.sock", "allow"),
        ("connect", "/run/docker.sock", "deny"),
        ("bind", "/run/own.sock", "allow"),
        ("signal", None, "deny"),
        ("connect", "localhost:80", "deny"),
    ],
)
def test_a_root_of_its_own(operation: str, argument: str | None, decision: str) -> None:
    storage = [
        {"type": "named", "name": "data", "target": "/data", "readonly": True},
        {"type": "tmpfs", "target": "/scratch"},
    ]
    one = made("linux", sandbox=ROOTED, storage=storage, network={"access": "none"})
    answer = sandbox_of(one.profile).ask(question("linux", operation, argument))
    assert answer.decision == decision, answer
    assert answer.rule is None or one.profile.text.split("\n")[(answer.line or 0) - 1] == answer.rule
