"""The reference's own profile under the evaluator: it compiles, and every request of the matrix is answered.

What it decides by category is the left column of the comparison in the docs.
"""

from typing import Any

import pytest

from worker.platform.darwin.evaluate import Argument, compile_profile, evaluate

from .reference_profile import Machine, render
from .test_evaluate import ROWS

LEVELS = ("none", "metal", "mps")
NETWORKS = ("full", "localhost", "none")
PLAIN = Machine()
STATE, ROOT = PLAIN.state, PLAIN.rootfs
SOCKET = "/private/var/run/api.sock"


def decision(machine: Machine, operation: str, **argument: Any) -> str:
    return evaluate(render(machine), {}, operation, Argument(**argument)).decision


@pytest.mark.parametrize("gpu", LEVELS)
@pytest.mark.parametrize("network", NETWORKS)
def test_it_compiles_and_answers_every_row(gpu: str, network: str) -> None:
    machine = Machine(gpu=gpu, network=network, writable=(SOCKET,), readonly=("/private/models",))
    profile = compile_profile(render(machine), {}, release=26)
    asked = {
        (operation, tuple(sorted(argument.items()))) for _, _, asks in ROWS for operation, argument, _ in asks
    }
    assert len(asked) > 60
    for operation, argument in asked:
        found = profile.decide(operation, Argument(**dict(argument)))
        assert found.decision in ("allow", "deny", "unknown"), found
        assert found.reason
    assert profile.warnings == ()


@pytest.mark.parametrize("gpu", ["metal", "mps"])
def test_an_older_mac_refuses_its_gpu_rules(gpu: str) -> None:
    """Defect S16."""
    found = evaluate(render(Machine(gpu=gpu)), {}, "process-fork", release=15)
    assert found.decision == "reject"
    assert "iokit-open-service is unknown before macOS 26" in found.reason
    assert evaluate(render(Machine()), {}, "process-fork", release=15).decision == "allow"


@pytest.mark.parametrize(
    ("row", "operation", "argument", "expected"),
    [
        (65, "file-read-data", {"path": "/bin/sh"}, "deny"),
        (65, "file-read-data", {"path": "/private/etc/hosts"}, "deny"),
        (66, "file-write-data", {"path": f"{STATE}/sandbox.sb"}, "allow"),
        (67, "file-read-metadata", {"path": "/private/var/w"}, "deny"),
        (68, "network-outbound", {"path": SOCKET}, "deny"),
    ],
)
def test_rows_65_to_68(row: int, operation: str, argument: dict[str, Any], expected: str) -> None:
    machine = Machine(network="localhost", writable=(SOCKET,) if row == 68 else ())
    assert decision(machine, operation, **argument) == expected


@pytest.mark.parametrize(
    ("defect", "operation", "argument", "expected"),
    [
        ("S2", "process-exec", {"path": "/bin/sh"}, "allow"),
        ("S2", "file-read-data", {"path": "/bin/sh"}, "deny"),
        ("S4", "file-write-unlink", {"path": f"{STATE}/stdout.log"}, "allow"),
        ("S7", "process-exec", {"path": f"{ROOT}/written/by/itself"}, "allow"),
        ("S8", "process-info-pidinfo", {"target": "others"}, "allow"),
        ("S8", "sysctl-read", {"name": "kern.procargs2.1"}, "allow"),
        ("S10", "network-outbound", {"address": "93.184.216.34:443"}, "deny"),
        ("S10", "network-outbound", {"path": "/private/var/run/mDNSResponder"}, "deny"),
        ("S11", "network-inbound", {"address": "127.0.0.1:9999"}, "allow"),
        ("S11", "network-inbound", {"address": "192.168.1.5:9999"}, "unknown"),
        ("S14", "file-read-data", {"path": "/dev/zero"}, "deny"),
        ("S14", "file-read-data", {"path": "/dev/null", "vnode": "CHARACTER-DEVICE"}, "allow"),
        ("S14", "file-read-metadata", {"path": "/dev/null", "vnode": "CHARACTER-DEVICE"}, "deny"),
        ("S15", "ipc-posix-shm-read-data", {"name": "/of another"}, "allow"),
        ("S21", "mach-lookup", {"name": "com.apple.logd"}, "deny"),
        ("", "file-read-data", {"path": f"{ROOT}/x"}, "allow"),
        ("", "file-map-executable", {"path": f"{ROOT}/x"}, "allow"),
        ("", "file-read-data", {"path": "/Users/w/.ssh/id_ed25519"}, "deny"),
        ("", "mach-lookup", {"name": "com.apple.system.opendirectoryd.libinfo"}, "allow"),
        ("", "iokit-open-user-client", {"class_": "AGXDeviceUserClient"}, "deny"),
    ],
)
def test_what_it_decides(defect: str, operation: str, argument: dict[str, Any], expected: str) -> None:
    assert decision(PLAIN, operation, **argument) == expected, defect


def test_full_network_is_every_unix_socket_too() -> None:
    """Defect S12."""
    full = Machine(network="full")
    assert decision(full, "network-outbound", path="/private/var/run/docker.sock") == "allow"
    assert decision(full, "network-outbound", address="93.184.216.34:443") == "allow"


def test_a_read_only_folder_in_a_writable_one_stays_writable() -> None:
    """Defect S6."""
    machine = Machine(readonly=(f"{ROOT}/models",))
    assert decision(machine, "file-write-data", path=f"{ROOT}/models/m") == "allow"


def test_a_name_in_a_path_is_read_as_rules() -> None:
    """Defect S1."""
    machine = Machine(writable=('/x"))(allow default)(allow file-read* (subpath "/y',))
    assert decision(machine, "file-write-data", path="/private/etc/hosts") == "allow"


@pytest.mark.parametrize("gpu", ["metal", "mps"])
def test_the_gpu(gpu: str) -> None:
    machine = Machine(gpu=gpu)
    assert decision(machine, "iokit-open-user-client", class_="AGXDeviceUserClient") == "allow"
    assert decision(machine, "iokit-open-service", class_="AGXAcceleratorG17G") == "allow"
    assert decision(machine, "iokit-open-service", class_="IOSurfaceRoot") == "allow"
    assert decision(machine, "mach-lookup", name="com.apple.MTLCompilerService", kind="xpc") == "allow"
    prefixed = decision(machine, "mach-lookup", name="com.apple.AGXCompilerService-S2A8", kind="xpc")
    assert prefixed == ("allow" if gpu == "metal" else "deny")
    assert decision(machine, "user-preference-read", name="com.apple.Metal") == "allow"
    assert decision(machine, "iokit-get-properties", name="gpu-core-count") == "allow"
