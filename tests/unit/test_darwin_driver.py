"""The macOS driver, and what it does beside sandboxes: the real code against the stand-in of libSystem."""

import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from schemas.node import Capabilities, Feature
from schemas.status import Gpu, Network
from worker.errors import Unavailable
from worker.platform.base import Driver, Limits, NetworkPolicy, PathRule, SandboxPolicy
from worker.platform.darwin import driver as module
from worker.platform.darwin.driver import DarwinDriver
from worker.platform.darwin.jetsam import MIB
from worker.platform.darwin.kqueue import ProcessWatch, system_names
from worker.platform.darwin.libproc import LibProc
from worker.platform.darwin.priority import set_background
from worker.platform.darwin.seatbelt import Seatbelt
from worker.platform.darwin.sweep import Sweeper

from .fake_kqueue import FakeKqueue, names
from .fake_libsystem import FakeSystem, build

ROOT = "/Users/w/data/containers/web-0/rootfs"
MARKER = "/Users/w/data/marker-A"


@pytest.fixture
def system(tmp_path_factory: pytest.TempPathFactory) -> FakeSystem:
    return FakeSystem(build(tmp_path_factory.getbasetemp()))


@pytest.fixture
def driver(system: FakeSystem) -> DarwinDriver:
    return DarwinDriver(system.library, release=15, kqueue=names)


def policy(**changes: Any) -> SandboxPolicy:
    facts: dict[str, Any] = {
        "container": "web-0",
        "instance": "01J9ZZZZZZZZZZZZZZZZZZZZZZ",
        "rootfs": ROOT,
        "tmp": "/Users/w/data/containers/web-0/tmp",
        "state_dir": "/Users/w/data/containers/web-0/state",
        "paths": (PathRule(ROOT, "rwx", "rootfs"),),
    }
    return SandboxPolicy(**{**facts, **changes})


class TestDriver:
    def test_it_is_a_driver(self, driver: DarwinDriver) -> None:
        contract: Driver = driver
        assert contract.name == "darwin"
        assert contract.allocated_bytes() is None
        assert "/bin" in contract.default_path().split(":")
        assert set(contract.search_dirs()) >= {"/bin", "/usr/bin"}
        assert "dns" in contract.groups()

    def test_capabilities_cross_the_wire(self, driver: DarwinDriver) -> None:
        found = driver.capabilities()
        assert msgspec.json.decode(msgspec.json.encode(found), type=Capabilities) == found
        assert found.sandbox == "seatbelt"
        assert found.network == ["none", "localhost", "outbound", "full"]
        assert found.gpu == ["none", "metal_compute", "mps_only"]
        assert {entry.feature for entry in found.not_enforced} >= {Feature.MEMORY, Feature.NETWORK_LOCALHOST}

    def test_what_is_not_enforced_depends_on_the_policy(self, driver: DarwinDriver) -> None:
        def features(**changes: Any) -> set[str]:
            return {entry.feature.value for entry in driver.not_enforced(policy(**changes))}

        assert "network.localhost" not in features()
        assert "network.localhost" in features(network=NetworkPolicy(level=Network.LOCALHOST))
        assert "network.outbound" not in features(network=NetworkPolicy(level=Network.LOCALHOST))
        for ports in ((), (8080,)):
            told = driver.not_enforced(
                policy(network=NetworkPolicy(level=Network.OUTBOUND, bind_ports=ports))
            )
            reasons = {entry.feature: entry.reason for entry in told}
            assert "::ffff:127.0.0.1" in reasons[Feature.NETWORK_OUTBOUND]
            assert ("from the network" in reasons[Feature.NETWORK_OUTBOUND]) == bool(ports)
        assert "gpu" in features(gpu=Gpu.MPS_ONLY)
        assert "ipc" in features(groups=("ipc",))
        assert features() <= features(gpu=Gpu.METAL_COMPUTE)
        reported = {entry.feature.value for entry in driver.capabilities().not_enforced}
        assert features(gpu=Gpu.METAL_COMPUTE, groups=("ipc",)) <= reported

    def test_describe_is_what_is_planned(self, driver: DarwinDriver) -> None:
        profile, plan = driver.describe(policy()), driver.plan(policy())
        assert profile.language == "sbpl"
        assert profile.text == plan["profile"]
        assert [text for pair in profile.params.items() for text in pair] == plan["params"]
        assert profile.policy["container"] == "web-0"
        assert plan["marker"] == ""
        json.dumps(plan)

    def test_the_plan_names_the_marker_as_the_kernel_does(self, driver: DarwinDriver) -> None:
        plan = driver.plan(policy(marker="/tmp/data/marker-A"))
        assert plan["marker"] == "/private/tmp/data/marker-A"
        assert plan["marker"] in plan["params"]

    @pytest.mark.parametrize(
        ("limit", "mebibytes"), [(None, None), (1, 1), (512 * MIB, 512), (512 * MIB + 1, 513)]
    )
    def test_the_memory_of_one_process(
        self, driver: DarwinDriver, limit: int | None, mebibytes: int | None
    ) -> None:
        assert driver.plan(policy(limits=Limits(memory_bytes=limit)))["memory_mib"] == mebibytes

    def test_a_system_that_limits_no_process(
        self, system: FakeSystem, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "available", lambda library: False)
        plan = DarwinDriver(system.library, release=15).plan(policy(limits=Limits(memory_bytes=MIB)))
        assert plan["memory_mib"] is None

    def test_the_release_decides(self, system: FakeSystem) -> None:
        old, new = (DarwinDriver(system.library, release=release) for release in (14, 26))
        gpu = policy(gpu=Gpu.METAL_COMPUTE)
        assert "iokit-open-service" not in old.describe(gpu).text
        assert "iokit-open-service" in new.describe(gpu).text

    def test_a_worker_in_a_sandbox_says_so(self, system: FakeSystem) -> None:
        system.confine(os.getpid(), b"/")
        nested = DarwinDriver(system.library, release=15)
        assert nested.capabilities().sandbox == "none"
        with pytest.raises(Unavailable, match="sandbox of its own"):
            nested.plan(policy())

    def test_processes_and_clones_use_the_same_library(
        self, driver: DarwinDriver, system: FakeSystem, tmp_path: Path
    ) -> None:
        system.add(10, 1)
        assert driver.processes().tree(10) is not None
        (tmp_path / "src").mkdir()
        assert driver.clone_tree(tmp_path / "src", tmp_path / "dst").method == "clonefile"


class TestPriority:
    def test_into_the_background_and_back(self, system: FakeSystem) -> None:
        set_background(system.library, 42, True)
        set_background(system.library, 0, False)
        # PRIO_DARWIN_PROCESS, PRIO_DARWIN_BG.
        assert system.called("setpriority") == ["4 42 0x1000", "4 0 0"]

    @pytest.mark.parametrize(
        ("number", "kind"), [(errno.ESRCH, ProcessLookupError), (errno.EPERM, PermissionError)]
    )
    def test_refusals(self, system: FakeSystem, number: int, kind: type[OSError]) -> None:
        system.fail("setpriority", number)
        with pytest.raises(kind, match="process 42"):
            set_background(system.library, 42, True)


class TestWatch:
    """Against a queue made of process descriptors."""

    @pytest.fixture
    def program(self) -> Iterator[subprocess.Popen[bytes]]:
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as program:
            yield program
            program.kill()

    def test_the_end_of_a_process(self, program: subprocess.Popen[bytes]) -> None:
        made: list[FakeKqueue] = []
        watch = ProcessWatch(names(made))
        assert watch.wait(0) == set(), "nobody is watched: at once"
        assert watch.add(program.pid)
        assert watch.wait(0) == set()
        program.kill()
        assert watch.wait(10) == {program.pid}
        assert watch.wait(10) == set(), "told once"
        watch.close()
        assert made[0].closed

    def test_one_that_is_gone_already(self) -> None:
        watch = ProcessWatch(names())
        assert not watch.add(1 << 22)
        watch.close()

    def test_a_system_without_it(self) -> None:
        if os.uname().sysname != "Linux":
            pytest.skip("this system has kqueue")
        with pytest.raises(KeyError):
            system_names()


class TestSweep:
    """Ending what holds a marker; signals go to the stand-in's processes."""

    @pytest.fixture
    def sent(self, system: FakeSystem, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
        sent: list[tuple[int, int]] = []

        def kill(pid: int, signum: int) -> None:
            sent.append((pid, signum))
            if signum == signal.SIGKILL:
                system.remove(pid)

        monkeypatch.setattr(os, "kill", kill)
        return sent

    def add(self, system: FakeSystem, pid: int, ppid: int, **facts: int) -> None:
        system.add(pid, ppid, uid=os.getuid(), **{"unique": (1 << 30) + pid, **facts})

    def test_all_that_hold_it_and_nobody_else(
        self, system: FakeSystem, driver: DarwinDriver, sent: list[tuple[int, int]]
    ) -> None:
        base = 1 << 22  # no process has these numbers
        self.add(system, base, 1)
        self.add(system, base + 1, base)
        self.add(system, base + 2, 1, parent_unique=(1 << 30) + base + 1)
        self.add(system, base + 3, 1)
        system.confine(base, MARKER.encode())
        assert driver.end_leftovers(MARKER, 10)
        stopped = {pid for pid, signum in sent if signum == signal.SIGSTOP}
        killed = {pid for pid, signum in sent if signum == signal.SIGKILL}
        assert stopped == killed == {base, base + 1, base + 2}
        assert driver.end_leftovers(MARKER, 10)

    def test_a_number_that_is_given_away_meanwhile(
        self, system: FakeSystem, sent: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pid = 1 << 22
        self.add(system, pid, 1)
        system.confine(pid, MARKER.encode())
        proc = LibProc(system.library)
        entries = proc.entries

        def then_another() -> Any:
            found = entries()
            system.remove(pid)
            self.add(system, pid, 1, unique=7)
            system.confine(-1, b"-")
            monkeypatch.setattr(proc, "entries", entries)
            return found

        monkeypatch.setattr(proc, "entries", then_another)
        sweeper = Sweeper(proc, Seatbelt(system.library), lambda: ProcessWatch(names()))
        assert sweeper.end(MARKER, 10)
        assert sent == []

    def test_one_that_will_not_end(
        self, system: FakeSystem, driver: DarwinDriver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(pid: int, signum: int) -> None:
            raise PermissionError

        monkeypatch.setattr(os, "kill", refuse)
        self.add(system, 1 << 22, 1)
        system.confine(1 << 22, MARKER.encode())
        began = time.monotonic()
        assert not driver.end_leftovers(MARKER, 0.05)
        assert time.monotonic() - began >= 0.05
