"""The macOS driver's C boundary: the real ctypes code against a library that stands in for libSystem."""

import ctypes
import errno
import json
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from schemas.node import Capabilities, Feature
from schemas.status import Gpu, Network
from worker.errors import Unavailable
from worker.images.trees import tree_size
from worker.platform.base import Driver, Limits, NetworkPolicy, PathRule, SandboxPolicy
from worker.platform.darwin import enforce, proc
from worker.platform.darwin.clone import DarwinCloner
from worker.platform.darwin.driver import DarwinDriver
from worker.platform.darwin.enforce import EnforceError
from worker.platform.darwin.proc import BsdInfo, DarwinProcessTable, LibProc, Rusage, TaskInfo
from worker.platform.darwin.seatbelt import Seatbelt
from worker.platform.treecopy import TreeError
from worker.platform.xattrs import DarwinXattrs

from .fake_libsystem import FakeSystem, build

ROOT = "/Users/w/data/containers/web-0/rootfs"


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("native"))


@pytest.fixture
def system(library: Path) -> FakeSystem:
    return FakeSystem(library)


@pytest.fixture
def driver(system: FakeSystem) -> DarwinDriver:
    return DarwinDriver(system.library, release=15)


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


class TestEnter:
    def plan(self, driver: DarwinDriver, **changes: Any) -> dict[str, Any]:
        plan: dict[str, Any] = json.loads(json.dumps(driver.plan(policy(**changes))))
        return plan

    def test_profile_and_parameters_arrive_whole(self, driver: DarwinDriver, system: FakeSystem) -> None:
        odd = '/Users/w/ü "quoted" \\ (allow default) \udcff'
        plan = self.plan(driver, paths=(PathRule(ROOT, "rwx", "rootfs"), PathRule(odd, "r", "volume")))
        enforce.enter(enforce.prepare(plan, str(system.path)))
        profile, *params = system.texts
        assert profile == plan["profile"].encode()
        assert [os.fsdecode(one) for one in params] == plan["params"]
        # The walk over the array in C ended at our NULL.
        assert len(params) % 2 == 0
        pairs = dict(zip(params[::2], params[1::2], strict=True))
        assert os.fsencode(odd) in pairs.values()
        assert system.flags == 0
        assert system.library.fake_outstanding_errors() == 0

    def test_no_parameters_is_an_empty_array(self, system: FakeSystem) -> None:
        plan = {"version": 1, "platform": "darwin", "limits": [], "profile": "(version 1)", "params": []}
        enforce.apply(plan, enforce.prepare(plan, str(system.path)))
        assert system.texts == [b"(version 1)"]

    def test_a_refused_profile_tells_why_and_frees_its_message(
        self, driver: DarwinDriver, system: FakeSystem
    ) -> None:
        prepared = enforce.prepare(self.plan(driver), str(system.path))
        system.fail("sandbox_init_with_parameters", errno.EINVAL, "line 3: unbound variable: file-raed*")
        with pytest.raises(EnforceError) as caught:
            enforce.enter(prepared)
        assert caught.value.step == "sandbox"
        assert caught.value.errno == errno.EINVAL
        assert caught.value.detail == "line 3: unbound variable: file-raed*"
        assert system.library.fake_outstanding_errors() == 0

    def test_a_second_sandbox_without_a_message(self, driver: DarwinDriver, system: FakeSystem) -> None:
        prepared = enforce.prepare(self.plan(driver), str(system.path))
        system.fail("sandbox_init_with_parameters", errno.EPERM)
        with pytest.raises(EnforceError, match="refused") as caught:
            enforce.enter(prepared)
        assert caught.value.errno == errno.EPERM
        assert system.library.fake_outstanding_errors() == 0

    def test_one_preparation_serves_many(self, driver: DarwinDriver, system: FakeSystem) -> None:
        prepared = enforce.prepare(self.plan(driver), str(system.path))
        for _ in range(10):
            enforce.enter(prepared)
        count = len(system.texts) // 10
        assert system.texts == system.texts[:count] * 10

    @pytest.mark.parametrize(
        "change",
        [
            {"version": 2},
            {"params": ["ODD"]},
            {"params": ["KEY", "a\0b"]},
            {"profile": "(version 1)\0(allow default)"},
        ],
    )
    def test_a_plan_that_cannot_be_carried_out(
        self, driver: DarwinDriver, system: FakeSystem, change: dict[str, Any]
    ) -> None:
        with pytest.raises(EnforceError) as caught:
            enforce.prepare({**self.plan(driver), **change}, str(system.path))
        assert caught.value.step == "plan"
        assert system.texts == []

    def test_a_library_that_is_not_there(self, driver: DarwinDriver, tmp_path: Path) -> None:
        with pytest.raises(EnforceError) as caught:
            enforce.prepare(self.plan(driver), str(tmp_path / "none.dylib"))
        assert caught.value.step == "sandbox"

    def test_limits_come_before_the_sandbox(
        self, driver: DarwinDriver, system: FakeSystem, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        order: list[Any] = []
        monkeypatch.setattr(resource, "setrlimit", lambda number, pair: order.append((number, pair)))
        monkeypatch.setattr(enforce, "enter", lambda ready: order.append("sandbox"))
        limits = Limits(max_files=100, cpu_time_limit_s=7, ulimits={"stack": (-1, -1), "nofile": (50, -1)})
        plan = self.plan(driver, limits=limits)
        enforce.apply(plan, enforce.prepare(plan, str(system.path)))
        assert order == [
            (resource.RLIMIT_CORE, (0, 0)),
            (resource.RLIMIT_NOFILE, (50, 10240)),
            (resource.RLIMIT_CPU, (7, 8)),
            (resource.RLIMIT_STACK, (-1, -1)),
            "sandbox",
        ]

    def test_only_our_own_wish_is_lowered(
        self, driver: DarwinDriver, system: FakeSystem, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[tuple[int, int]] = []

        def setrlimit(number: int, pair: tuple[int, int]) -> None:
            if number == resource.RLIMIT_NOFILE:
                asked.append(pair)
                if pair[1] > 1000:
                    raise ValueError("not allowed to raise maximum limit")

        monkeypatch.setattr(resource, "setrlimit", setrlimit)
        monkeypatch.setattr(resource, "getrlimit", lambda number: (256, 1000))
        plan = self.plan(driver, limits=Limits(max_files=4096))
        enforce.apply(plan, enforce.prepare(plan, str(system.path)))
        assert asked == [(4096, 4096), (1000, 1000)]
        plan = self.plan(driver, limits=Limits(ulimits={"nofile": (4096, 4096)}))
        with pytest.raises(EnforceError, match="nofile 4096:4096") as caught:
            enforce.apply(plan, enforce.prepare(plan, str(system.path)))
        assert caught.value.step == "rlimits"

    def test_it_runs_without_anything_but_the_standard_library(
        self, driver: DarwinDriver, system: FakeSystem, tmp_path: Path
    ) -> None:
        """As in the launcher: a bare interpreter that sees no installed package."""
        (tmp_path / "plan.json").write_text(json.dumps(self.plan(driver)))
        script = (
            "import importlib.util, json, sys\n"
            f"spec = importlib.util.spec_from_file_location('enforce', {str(Path(enforce.__file__))!r})\n"
            "module = importlib.util.module_from_spec(spec)\n"
            "spec.loader.exec_module(module)\n"
            f"plan = json.load(open({str(tmp_path / 'plan.json')!r}))\n"
            f"module.apply(plan, module.prepare(plan, {str(system.path)!r}))\n"
            "print(module.resource.getrlimit(module.resource.RLIMIT_CORE))\n"
        )
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=True, timeout=30
        )
        assert done.stdout == "(0, 0)\n"


class TestQuestions:
    def test_confined(self, system: FakeSystem) -> None:
        seatbelt = Seatbelt(system.library)
        system.library.fake_confine(42, b"/state/marker")
        assert seatbelt.confined(42)
        assert not seatbelt.confined(43)
        assert system.library.fake_last_filter() == 0
        assert system.library.fake_last_pid() == 43

    def test_the_marker_reaches_the_variadic_argument(self, system: FakeSystem) -> None:
        seatbelt = Seatbelt(system.library)
        marker = "/private/ü \udcff/marker"
        system.library.fake_confine(42, os.fsencode(marker))
        assert seatbelt.holds_marker(42, marker)
        assert system.texts[-1] == os.fsencode(marker)
        assert system.library.fake_last_operation() == b"file-read-data"
        assert system.library.fake_last_filter() == 0x40000000 | 1
        assert not seatbelt.holds_marker(42, "/other")
        # Without any sandbox everything may be read, the marker too.
        assert not seatbelt.holds_marker(7, marker)

    def test_a_process_that_is_gone(self, system: FakeSystem) -> None:
        system.fail("sandbox_check", errno.ESRCH)
        with pytest.raises(ProcessLookupError):
            Seatbelt(system.library).confined(42)

    def test_only_the_named_arguments_are_declared(self, system: FakeSystem) -> None:
        Seatbelt(system.library)
        assert len(system.library.sandbox_check.argtypes) == 3


class TestProcesses:
    @pytest.mark.parametrize(
        ("name", "mine"),
        [
            ("rusage_info_v4", ctypes.sizeof(Rusage)),
            ("rusage_info_v4.ri_user_time", Rusage.ri_user_time),
            ("rusage_info_v4.ri_phys_footprint", Rusage.ri_phys_footprint),
            ("rusage_info_v4.ri_diskio_byteswritten", Rusage.ri_diskio_byteswritten),
            ("rusage_info_v4.ri_runnable_time", Rusage.ri_runnable_time),  # type: ignore[attr-defined]
            ("proc_bsdinfo", ctypes.sizeof(BsdInfo)),
            ("proc_bsdinfo.pbi_status", BsdInfo.pbi_status),
            ("proc_bsdinfo.pbi_ppid", BsdInfo.pbi_ppid),
            ("proc_bsdinfo.pbi_start_tvsec", BsdInfo.pbi_start_tvsec),
            ("proc_bsdinfo.pbi_start_tvusec", BsdInfo.pbi_start_tvusec),
            ("proc_taskinfo", ctypes.sizeof(TaskInfo)),
            ("proc_taskinfo.pti_threadnum", TaskInfo.pti_threadnum),
            ("proc_fdinfo", proc._FD_BYTES),
            ("mach_timebase_info", ctypes.sizeof(proc.Timebase)),
        ],
    )
    def test_layouts_are_the_compilers(self, system: FakeSystem, name: str, mine: Any) -> None:
        assert system.layout(name) == getattr(mine, "offset", mine)

    def table(self, system: FakeSystem) -> DarwinProcessTable:
        return DarwinProcessTable(LibProc(system.library))

    def grow(self, system: FakeSystem) -> None:
        system.add(10, 1)
        system.add(11, 10, user=24_000_000, system=24_000_000, footprint=1000, threads=3, files=5)
        system.add(12, 11, user=240, system=0, footprint=200, bytes_read=7, bytes_written=9, files=100)
        system.add(13, 11, footprint=30)
        system.add(99, 1, footprint=5000)

    def test_sums_over_the_tree_without_its_root(self, system: FakeSystem) -> None:
        self.grow(system)
        sample = self.table(system).tree(10)
        assert sample is not None
        # 48,000,000 ticks of 125/3 ns are two seconds.
        assert sample.cpu_usec == 2_000_000 + 10
        assert sample.memory_bytes == 1230
        assert (sample.processes, sample.threads, sample.open_files) == (3, 5, 105)
        assert (sample.read_bytes, sample.write_bytes) == (7, 9)
        assert self.table(system).memory(10) == 1230
        assert self.table(system).memory(10, 5) == 1230
        assert set(self.table(system).members(10)) == {11, 12, 13}

    def test_the_time_base_of_intel(self, system: FakeSystem) -> None:
        system.library.fake_timebase(1, 1)
        assert LibProc(system.library).microseconds(5_000_999) == 5_000

    def test_a_time_base_that_is_not_told(self, system: FakeSystem) -> None:
        system.library.fake_timebase(0, 0)
        with pytest.raises(OSError, match="time base"):
            LibProc(system.library)

    def test_more_children_than_the_estimate_said(self, system: FakeSystem) -> None:
        system.add(10, 1)
        for pid in range(100, 300):
            system.add(pid, 10)
        assert len(self.table(system).members(10)) == 200

    def test_gone_and_dead(self, system: FakeSystem) -> None:
        system.add(10, 1, status=5)
        for pid in (10, 11):
            assert self.table(system).tree(pid) is None
            assert self.table(system).memory(pid) is None
        system.add(20, 1)
        empty = self.table(system).tree(20)
        assert empty is not None
        assert empty.processes == 0

    def test_one_that_ends_meanwhile_is_left_out(self, system: FakeSystem) -> None:
        self.grow(system)
        system.fail("proc_pid_rusage", errno.ESRCH)
        sample = self.table(system).tree(10)
        assert sample is not None
        assert sample.processes == 2

    def test_alive_means_the_same_one(self, system: FakeSystem) -> None:
        system.add(10, 1, start_sec=1_700_000_000, start_usec=123_456)
        system.add(11, 1, start_sec=1_700_000_000, start_usec=123_456, status=5)
        table = self.table(system)
        assert table.alive(10, 1_700_000_000_123_456)
        assert not table.alive(10, 1_700_000_000_123_457)
        assert not table.alive(11, 1_700_000_000_123_456)
        assert not table.alive(12, 1_700_000_000_123_456)


class TestClone:
    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        top = tmp_path / "src"
        (top / "a" / "empty").mkdir(parents=True)
        (top / "f").write_text("content")
        os.link(top / "f", top / "a" / "again")
        (top / "link").symlink_to("/nowhere")
        (top / "f").chmod(0o640)
        os.utime(top / "f", ns=(1, 1_600_000_000_000_000_001))
        if hasattr(os, "setxattr"):
            os.setxattr(top / "f", "user.note", b"kept")
        return top

    def test_the_whole_tree_in_one_call(self, system: FakeSystem, source: Path, tmp_path: Path) -> None:
        report = DarwinCloner(system.library).clone_tree(source, tmp_path / "dst")
        assert report.method == "clonefile"
        assert (report.files, report.directories, report.bytes) == (3 - 1, 3, 14)
        assert system.texts == [b"src", b"dst"]
        assert system.flags == 3
        assert (tmp_path / "dst" / "f").read_text() == "content"

    @pytest.mark.parametrize("code", [errno.ENOTSUP, errno.EXDEV])
    def test_file_by_file_where_it_cannot_be(
        self, system: FakeSystem, source: Path, tmp_path: Path, code: int
    ) -> None:
        system.fail("clonefileat", code)
        report = DarwinCloner(system.library).clone_tree(source, tmp_path / "dst")
        assert report.method == "copy"
        assert system.flags == 1 << 3
        copied = tmp_path / "dst"
        assert (copied / "f").stat().st_ino == (copied / "a" / "again").stat().st_ino
        assert stat.S_IMODE((copied / "f").stat().st_mode) == 0o640
        assert (copied / "f").stat().st_mtime_ns == 1_600_000_000_000_000_001
        assert os.readlink(copied / "link") == "/nowhere"
        assert (copied / "a" / "empty").is_dir()
        assert tree_size(copied) == tree_size(source)
        assert os.getxattr(copied / "f", "user.note") == b"kept"

    def test_a_place_that_is_taken_is_an_error(
        self, system: FakeSystem, source: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "dst").mkdir()
        with pytest.raises(FileExistsError):
            DarwinCloner(system.library).clone_tree(source, tmp_path / "dst")
        assert os.listdir(tmp_path / "dst") == []

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
    def test_other_failures_are_not_taken_for_a_lack(
        self, system: FakeSystem, source: Path, tmp_path: Path, code: int
    ) -> None:
        system.fail("clonefileat", code)
        with pytest.raises(OSError, match=os.strerror(code)) as caught:
            DarwinCloner(system.library).clone_tree(source, tmp_path / "dst")
        assert caught.value.errno == code
        assert not (tmp_path / "dst").exists()

    def test_a_copy_that_fails_names_the_file(
        self, system: FakeSystem, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cloner = DarwinCloner(system.library)
        monkeypatch.setattr(cloner, "_clone_whole", lambda *given: False)
        system.fail("fcopyfile", errno.EIO)
        with pytest.raises(TreeError, match=r"(f|a/again): Input/output error"):
            cloner.clone_tree(source, tmp_path / "dst")

    def test_no_link_on_the_way(self, system: FakeSystem, source: Path, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(source)
        for path in (tmp_path / "link", tmp_path / "link" / "a"):
            with pytest.raises(OSError, match=r"Not a directory|symbolic"):
                DarwinCloner(system.library).clone_tree(path, tmp_path / "dst")
        assert system.texts == []


class TestXattrs:
    def test_read_and_write(self, system: FakeSystem, tmp_path: Path) -> None:
        xattrs = DarwinXattrs(system.library)
        (tmp_path / "f").write_text("x")
        fd = os.open(tmp_path / "f", os.O_RDWR)
        try:
            items = [("user.a", b"1"), ("user.b", b"\0\xff" * 100), ("user.c", b"")]
            xattrs.write(fd, items)
            assert xattrs.read(fd) == items
            system.fail("flistxattr", errno.ENOTSUP)
            assert xattrs.read(fd) == []
            system.fail("flistxattr", errno.EIO)
            with pytest.raises(OSError, match="Input/output"):
                xattrs.read(fd)
            system.fail("fsetxattr", errno.ENOTSUP)
            xattrs.write(fd, items[:1])
            system.fail("fsetxattr", errno.ENOSPC)
            with pytest.raises(OSError, match="No space"):
                xattrs.write(fd, items[:1])
        finally:
            os.close(fd)


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
        json.dumps(plan)

    def test_the_release_decides(self, system: FakeSystem) -> None:
        old, new = (DarwinDriver(system.library, release=release) for release in (14, 26))
        gpu = policy(gpu=Gpu.METAL_COMPUTE)
        assert "iokit-open-service" not in old.describe(gpu).text
        assert "iokit-open-service" in new.describe(gpu).text

    def test_a_worker_in_a_sandbox_says_so(self, system: FakeSystem) -> None:
        system.library.fake_confine(os.getpid(), b"/")
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


def test_sizes_of_the_public_headers() -> None:
    """As <sys/proc_info.h> says them: PROC_PIDTBSDINFO_SIZE and PROC_PIDTASKINFO_SIZE."""
    assert ctypes.sizeof(BsdInfo) == 136
    assert ctypes.sizeof(TaskInfo) == 96
