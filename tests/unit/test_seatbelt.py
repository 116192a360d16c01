"""Entering sandboxes and asking about them: the real ctypes code against the stand-in of libSystem."""

import ctypes
import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import worker.launcher
from worker.platform.base import Limits, PathRule, SandboxPolicy
from worker.platform.darwin import enforce
from worker.platform.darwin.driver import DarwinDriver
from worker.platform.darwin.enforce import EnforceError, Enforcer
from worker.platform.darwin.libsystem import declare, failure, load
from worker.platform.darwin.seatbelt import Filter, SandboxEntry, SandboxRefused, Seatbelt, parameters

from .fake_libsystem import FakeSystem, build

ROOT = "/Users/w/data/containers/web-0/rootfs"
QUIET = 0x40000000


@pytest.fixture
def system(tmp_path_factory: pytest.TempPathFactory) -> FakeSystem:
    return FakeSystem(build(tmp_path_factory.getbasetemp()))


@pytest.fixture
def driver(system: FakeSystem) -> DarwinDriver:
    return DarwinDriver(system.library, release=15)


@pytest.fixture
def enforcer(system: FakeSystem) -> Enforcer:
    return Enforcer(str(system.path))


def plan_of(driver: DarwinDriver, **changes: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "container": "web-0",
        "instance": "01J9ZZZZZZZZZZZZZZZZZZZZZZ",
        "rootfs": ROOT,
        "tmp": "/Users/w/data/containers/web-0/tmp",
        "state_dir": "/Users/w/data/containers/web-0/state",
        "paths": (PathRule(ROOT, "rwx", "rootfs"),),
    }
    plan: dict[str, Any] = json.loads(json.dumps(driver.plan(SandboxPolicy(**{**facts, **changes}))))
    return plan


class TestLibrary:
    def test_a_function_that_is_missing(self, system: FakeSystem) -> None:
        with pytest.raises(OSError, match="no sandbox_fly") as caught:
            declare(system.library, "sandbox_fly", ctypes.c_int)
        assert caught.value.errno == errno.ENOSYS

    def test_a_library_that_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(OSError, match=r"none\.dylib"):
            load(str(tmp_path / "none.dylib"))

    def test_errors_are_typed_and_say_what(self) -> None:
        ctypes.set_errno(errno.ESRCH)
        found = failure("process 7")
        assert isinstance(found, ProcessLookupError)
        assert str(found) == f"[Errno {errno.ESRCH}] process 7: {os.strerror(errno.ESRCH)}"
        assert isinstance(failure("x", errno.EPERM), PermissionError)


class TestEnter:
    def test_profile_and_parameters_arrive_whole(
        self, driver: DarwinDriver, enforcer: Enforcer, system: FakeSystem
    ) -> None:
        odd = '/Users/w/ü "quoted" \\ (allow default) \udcff'
        plan = plan_of(driver, paths=(PathRule(ROOT, "rwx", "rootfs"), PathRule(odd, "r", "volume")))
        enforcer.apply({**plan, "limits": []})
        profile, *params = system.texts
        assert profile == plan["profile"].encode()
        assert [os.fsdecode(one) for one in params] == plan["params"]
        # The walk over the array in C ended at our NULL; flags 0 means the text itself.
        assert system.called("sandbox_init_with_parameters") == [f"{len(profile)} 0 {len(params)}"]
        pairs = dict(zip(params[::2], params[1::2], strict=True))
        assert os.fsencode(odd) in pairs.values()
        system.assert_no_leaks()

    def test_no_parameters_is_an_empty_array(self, system: FakeSystem) -> None:
        SandboxEntry(system.library).enter(b"(version 1)", parameters([]))
        assert system.called("sandbox_init_with_parameters") == ["11 0 0"]

    @pytest.mark.parametrize(
        ("number", "said", "detail"),
        [
            (errno.EINVAL, "line 3: unbound variable: file-raed*", "line 3: unbound variable: file-raed*"),
            (errno.EPERM, "", "the profile was refused"),
            (errno.EINVAL, "ü" * 200, "ü" * 200),
        ],
    )
    def test_a_refusal_tells_why_and_frees_its_message(
        self,
        enforcer: Enforcer,
        driver: DarwinDriver,
        system: FakeSystem,
        number: int,
        said: str,
        detail: str,
    ) -> None:
        plan = plan_of(driver)
        prepared = enforcer.prepare(plan)
        system.fail("sandbox_init_with_parameters", number, said, times=3)
        for _ in range(3):
            with pytest.raises(EnforceError) as caught:
                enforcer.apply({**plan, "limits": []}, prepared)
            assert (caught.value.step, caught.value.errno, caught.value.detail) == ("sandbox", number, detail)
        system.assert_no_leaks()

    def test_a_warning_with_success_is_freed_too(self, system: FakeSystem) -> None:
        system.fail("none", 0, "deprecated", times=0)
        SandboxEntry(system.library).enter(b"(version 1)", parameters([]))
        system.assert_no_leaks()

    def test_an_error_that_is_no_utf8(self, system: FakeSystem) -> None:
        system.library.fake_fail(b"sandbox_init_with_parameters", errno.EINVAL, b"bad \xff", 1)
        with pytest.raises(SandboxRefused) as caught:
            SandboxEntry(system.library).enter(b"x", parameters([]))
        assert caught.value.message == "bad \udcff"

    def test_one_preparation_serves_many(
        self, driver: DarwinDriver, enforcer: Enforcer, system: FakeSystem
    ) -> None:
        plan = {**plan_of(driver), "limits": []}
        prepared = enforcer.prepare(plan)
        for _ in range(10):
            enforcer.apply(plan, prepared)
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
        self, driver: DarwinDriver, enforcer: Enforcer, system: FakeSystem, change: dict[str, Any]
    ) -> None:
        with pytest.raises(EnforceError) as caught:
            enforcer.apply({**plan_of(driver), **change})
        assert caught.value.step == "plan"
        assert system.texts == []

    def test_a_library_that_is_not_there(self, driver: DarwinDriver, tmp_path: Path) -> None:
        with pytest.raises(EnforceError) as caught:
            Enforcer(str(tmp_path / "none.dylib")).prepare(plan_of(driver))
        assert caught.value.step == "sandbox"

    def test_it_runs_without_anything_but_the_standard_library(
        self, driver: DarwinDriver, system: FakeSystem, tmp_path: Path
    ) -> None:
        """As in the launcher: a bare interpreter that sees no installed package."""
        (tmp_path / "plan.json").write_text(json.dumps(plan_of(driver)))
        program = Path(worker.launcher.__file__).parent / "__main__.py"
        script = (
            "import json, resource, runpy\n"
            f"runpy.run_path({str(program)!r}, run_name='launcher')['make_packages']()\n"
            "from worker.platform.darwin.enforce import Enforcer\n"
            "import worker.launcher.darwin\n"
            f"Enforcer({str(system.path)!r}).apply(json.load(open({str(tmp_path / 'plan.json')!r})))\n"
            "print(resource.getrlimit(resource.RLIMIT_CORE))\n"
        )
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=True, timeout=30
        )
        assert done.stdout == "(0, 0)\n"


class TestLimits:
    def test_they_come_before_the_sandbox(
        self,
        driver: DarwinDriver,
        enforcer: Enforcer,
        system: FakeSystem,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        order: list[Any] = []
        monkeypatch.setattr(resource, "setrlimit", lambda number, pair: order.append((number, pair)))
        monkeypatch.setattr(SandboxEntry, "enter", lambda *given: order.append("sandbox"))
        limits = Limits(max_files=100, cpu_time_limit_s=7, ulimits={"stack": (-1, -1), "nofile": (50, -1)})
        enforcer.apply(plan_of(driver, limits=limits))
        assert order == [
            (resource.RLIMIT_CORE, (0, 0)),
            (resource.RLIMIT_NOFILE, (50, 10240)),
            (resource.RLIMIT_CPU, (7, 8)),
            (resource.RLIMIT_STACK, (-1, -1)),
            "sandbox",
        ]

    def test_only_our_own_wish_is_lowered(
        self, driver: DarwinDriver, enforcer: Enforcer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[tuple[int, int]] = []

        def setrlimit(number: int, pair: tuple[int, int]) -> None:
            if number == resource.RLIMIT_NOFILE:
                asked.append(pair)
                if pair[1] > 1000:
                    raise ValueError("not allowed to raise maximum limit")

        monkeypatch.setattr(resource, "setrlimit", setrlimit)
        monkeypatch.setattr(resource, "getrlimit", lambda number: (256, 1000))
        enforcer.apply(plan_of(driver, limits=Limits(max_files=4096)))
        assert asked == [(4096, 4096), (1000, 1000)]
        with pytest.raises(EnforceError, match="nofile 4096:4096") as caught:
            enforcer.apply(plan_of(driver, limits=Limits(ulimits={"nofile": (4096, 4096)})))
        assert caught.value.step == "rlimits"


class TestBecome:
    """The last step. The stand-in records the spawn and gives an error, so that we come back."""

    def test_with_a_memory_limit(
        self, enforcer: Enforcer, system: FakeSystem, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        executed: list[Any] = []
        monkeypatch.setattr(os, "execve", lambda *given: executed.append(given))
        environment = {"A": "1", "ü": "\udcff"}
        enforcer.become({"memory_mib": 512}, "/bin/ü", ["ü", "", "b c"], environment)
        # SETEXEC; both limits fatal and set; no priority; both in MiB.
        assert system.called("posix_spawn") == ["0x40 0x800c -1 512 512"]
        assert system.texts == [
            "/bin/ü".encode(),
            "ü".encode(),
            b"",
            b"b c",
            b"A=1",
            "ü=".encode() + b"\xff",
        ]
        # It came back: the program is run without the limit, which nobody promised.
        assert executed == [("/bin/ü", ["ü", "", "b c"], environment)]
        system.assert_no_leaks()

    @pytest.mark.parametrize(
        "function", ["posix_spawnattr_init", "posix_spawnattr_setjetsam_ext", "posix_spawnattr_setflags"]
    )
    def test_a_limit_that_is_not_granted(
        self, enforcer: Enforcer, system: FakeSystem, monkeypatch: pytest.MonkeyPatch, function: str
    ) -> None:
        executed: list[str] = []
        monkeypatch.setattr(os, "execve", lambda program, *given: executed.append(program))
        system.fail(function, errno.EPERM)
        enforcer.become({"memory_mib": 512}, "/bin/sh", ["sh"], {})
        assert executed == ["/bin/sh"]
        assert system.called("posix_spawn") == []
        system.assert_no_leaks()

    def test_without_one(
        self, enforcer: Enforcer, system: FakeSystem, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        executed: list[str] = []
        monkeypatch.setattr(os, "execve", lambda program, *given: executed.append(program))
        enforcer.become({}, "/bin/sh", ["sh"], {})
        enforcer.become({"memory_mib": None}, "/bin/sh", ["sh"], {})
        assert executed == ["/bin/sh"] * 2
        assert system.calls == []


class TestQuestions:
    def test_confined(self, system: FakeSystem) -> None:
        seatbelt = Seatbelt(system.library)
        system.confine(42, b"/state/marker")
        assert seatbelt.confined(42)
        assert not seatbelt.confined(43)
        assert system.called("sandbox_check") == ["42 - 0", "43 - 0"]

    def test_the_value_reaches_the_variadic_argument(self, system: FakeSystem) -> None:
        seatbelt = Seatbelt(system.library)
        marker = "/private/ü \udcff/marker"
        system.confine(42, os.fsencode(marker))
        assert seatbelt.may(42, "file-read-data", marker)
        assert not seatbelt.may(42, "mach-lookup", "com.apple.x", Filter.GLOBAL_NAME)
        assert not seatbelt.may(42, "process-fork")
        assert system.texts == [os.fsencode(marker), b"com.apple.x"]
        assert system.called("sandbox_check") == [
            f"42 file-read-data {QUIET | 1:#x}",
            f"42 mach-lookup {QUIET | 2:#x}",
            f"42 process-fork {QUIET:#x}",
        ]

    def test_the_marker_and_no_other(self, system: FakeSystem) -> None:
        seatbelt = Seatbelt(system.library)
        system.confine(42, b"/state/marker")
        assert seatbelt.holds_marker(42, "/state/marker")
        assert not seatbelt.holds_marker(42, "/state/other")
        # Without any sandbox everything may be read, the marker too.
        assert not seatbelt.holds_marker(7, "/state/marker")

    def test_a_sandbox_of_others_that_allows_everything(self, system: FakeSystem) -> None:
        system.confine(42, b"")
        seatbelt = Seatbelt(system.library)
        assert seatbelt.may(42, "file-read-data", "/state/marker")
        assert not seatbelt.holds_marker(42, "/state/marker")

    def test_a_process_that_is_gone(self, system: FakeSystem) -> None:
        system.fail("sandbox_check", errno.ESRCH, times=2)
        with pytest.raises(ProcessLookupError, match="process 42"):
            Seatbelt(system.library).confined(42)
        assert not Seatbelt(system.library).holds_marker(42, "/m")
        system.fail("sandbox_check", errno.EPERM)
        with pytest.raises(PermissionError):
            Seatbelt(system.library).holds_marker(42, "/m")

    def test_only_the_named_arguments_are_declared(self, system: FakeSystem) -> None:
        """More would be given as if the function had no `...`, and be garbage on arm64."""
        Seatbelt(system.library)
        assert len(system.library.sandbox_check.argtypes) == 3


def test_the_launcher_finds_it_by_these_names() -> None:
    assert {"prepare", "apply", "become"} <= set(vars(enforce))
