"""Processes on macOS: layouts, libproc's calls, the clock, whose a process is, what a tree uses."""

import ctypes
import errno
import os
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.launcher.darwin import _XUCRED
from worker.platform.darwin import libproc
from worker.platform.darwin.libproc import (
    BsdInfo,
    BsdUniqueInfo,
    Entry,
    ExitReason,
    LibProc,
    Rusage,
    TaskInfo,
    UniqueInfo,
)
from worker.platform.darwin.proc import DarwinProcessTable, Markers
from worker.platform.darwin.seatbelt import Seatbelt
from worker.platform.darwin.timebase import Timebase, TimebaseInfo
from worker.platform.darwin.tree import belonging

from .fake_libsystem import SOURCES, FakeSystem, build

ZOMBIE = 5


@pytest.fixture
def system(tmp_path_factory: pytest.TempPathFactory) -> FakeSystem:
    return FakeSystem(build(tmp_path_factory.getbasetemp()))


def compiled_layout(name: str, members: list[str]) -> list[tuple[int, int]]:
    """(offset, size) of each member, by a program that a C compiler makes of the declarations."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler is not None
    headers = '#include "declarations.h"\n#include <stddef.h>\n#include <stdio.h>\n'
    lines = [
        f'printf("%zu %zu\\n", offsetof(struct {name}, {member}), sizeof ((struct {name} *)0)->{member});'
        for member in members
    ]
    source = f"{headers}int main(void) {{ {' '.join(lines)} }}"
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "layout"
        command = [compiler, "-xc", "-", f"-I{SOURCES}", "-Wall", "-Werror", "-o", str(program)]
        subprocess.run(command, input=source, text=True, check=True, capture_output=True, timeout=60)
        said = subprocess.run([program], text=True, check=True, capture_output=True, timeout=10).stdout
    return [(int(offset), int(size)) for offset, size in (line.split() for line in said.splitlines())]


class TestLayouts:
    """Against what a C compiler makes of the headers' declarations."""

    STRUCTS: ClassVar[dict[str, type[ctypes.Structure]]] = {
        "proc_bsdinfo": BsdInfo,
        "proc_uniqidentifierinfo": UniqueInfo,
        "proc_bsdinfowithuniqid": BsdUniqueInfo,
        "proc_taskinfo": TaskInfo,
        "proc_exitreasonbasicinfo": ExitReason,
        "rusage_info_v4": Rusage,
        "mach_timebase_info": TimebaseInfo,
    }

    @pytest.mark.parametrize("name", STRUCTS)
    def test_sizes(self, system: FakeSystem, name: str) -> None:
        assert ctypes.sizeof(self.STRUCTS[name]) == system.layout(name)

    @pytest.mark.parametrize("name", STRUCTS)
    def test_every_member(self, system: FakeSystem, name: str) -> None:
        """Place and size of each, in this order; and the declaration has none beside them."""
        struct_ = self.STRUCTS[name]
        members = [member for member, *_ in struct_._fields_]
        ours = [(getattr(struct_, member).offset, getattr(struct_, member).size) for member in members]
        assert compiled_layout(name, members) == ours
        ends = [offset + size for offset, size in ours]
        assert [*ends[:-1], system.layout(name)] == [*(offset for offset, _ in ours[1:]), ends[-1]], "no gap"

    def test_what_is_not_a_structure_here(self, system: FakeSystem) -> None:
        assert system.layout("proc_fdinfo") == libproc.FD_BYTES
        assert system.layout("xucred") == _XUCRED.size
        assert system.layout("xucred.cr_uid") == struct.calcsize("=I")
        assert system.layout("xucred.cr_groups") == struct.calcsize("=IIh2x")

    def test_sizes_that_xnu_asserts(self) -> None:
        """PROC_PIDTBSDINFO_SIZE, PROC_PIDTASKINFO_SIZE and the assertion in proc_info_private.h."""
        assert ctypes.sizeof(BsdInfo) == 136
        assert ctypes.sizeof(TaskInfo) == 96
        assert ctypes.sizeof(UniqueInfo) == 56


class TestLibProc:
    def test_an_entry(self, system: FakeSystem) -> None:
        system.add(10, 7, unique=1 << 40, parent_unique=99, start_sec=1_700_000_000, start_usec=5)
        found = LibProc(system.library).entry(10)
        assert found == Entry(10, 7, 1 << 40, 99, 2, 1_700_000_000_000_005)
        assert LibProc(system.library).entry(11) is None

    def test_zombies_are_seen(self, system: FakeSystem) -> None:
        system.add(10, 1, status=ZOMBIE)
        entry = LibProc(system.library).entry(10)
        assert entry is not None
        assert not entry.alive

    def test_a_record_of_another_size_is_no_answer(self, system: FakeSystem) -> None:
        system.add(10, 1)
        system.fail("proc_pidinfo", errno.EPERM)
        assert LibProc(system.library).entry(10) is None

    @pytest.mark.parametrize("count", [0, 1, 35, 36, 37, 200])
    def test_every_process_of_the_user(self, system: FakeSystem, count: int) -> None:
        for pid in range(100, 100 + count):
            system.add(pid, 1, uid=os.getuid())
        system.add(90, 1, uid=os.getuid() + 1)
        found = {entry.pid for entry in LibProc(system.library).entries()}
        # Root asks for everybody's.
        assert found == {*range(100, 100 + count), *(() if os.getuid() else (90,))}

    @pytest.mark.parametrize("count", [0, 15, 16, 17, 18, 19, 100])
    def test_files_beyond_an_estimate(self, system: FakeSystem, count: int) -> None:
        system.add(10, 1, files=count)
        lib = LibProc(system.library)
        assert lib.open_files(10) == (count or None)
        assert lib.open_files(11) is None

    def test_why_a_child_ended(self, system: FakeSystem) -> None:
        system.add(10, 1, status=ZOMBIE)
        system.add(11, 1)
        lib = LibProc(system.library)
        assert lib.outgrew_limit(10)
        assert not lib.outgrew_limit(11)
        assert not lib.outgrew_limit(12)

    def test_usage_of_one_that_is_gone(self, system: FakeSystem) -> None:
        lib = LibProc(system.library)
        assert lib.rusage(10) is None
        assert lib.task_info(10) is None


class TestTimebase:
    def test_apple_silicon_and_intel(self, system: FakeSystem) -> None:
        assert Timebase(system.library).microseconds(24_000_000) == 1_000_000
        system.library.fake_timebase(1, 1)
        assert Timebase(system.library).microseconds(5_000_999) == 5_000

    def test_under_rosetta(self, system: FakeSystem) -> None:
        """The time base that a translated program is told is 1/1, and wrong by the factor 41.7."""
        system.library.fake_timebase(1, 1)
        system.library.fake_sysctl(b"sysctl.proc_translated", 1, b"hw.tbfrequency", 24_000_000)
        base = Timebase(system.library)
        assert base.translated
        assert base.microseconds(24_000_000) == 1_000_000

    def test_apple_silicon_itself_is_not_translated(self, system: FakeSystem) -> None:
        system.library.fake_sysctl(b"sysctl.proc_translated", 0, b"hw.tbfrequency", 24_000_000)
        base = Timebase(system.library)
        assert not base.translated
        assert base.microseconds(24_000_000) == 1_000_000

    @pytest.mark.parametrize(("numer", "denom"), [(0, 1), (1, 0)])
    def test_one_that_cannot_be(self, system: FakeSystem, numer: int, denom: int) -> None:
        system.library.fake_timebase(numer, denom)
        with pytest.raises(OSError, match="time base"):
            Timebase(system.library)

    def test_one_that_is_not_told(self, system: FakeSystem) -> None:
        system.fail("mach_timebase_info", errno.EINVAL)
        with pytest.raises(OSError, match="time base"):
            Timebase(system.library)
        system.fail("sysctlbyname", errno.EPERM)
        with pytest.raises(PermissionError, match=r"sysctl\.proc_translated"):
            Timebase(system.library)


def entry(pid: int, ppid: int, *, unique: int = 0, parent: int = 0) -> Entry:
    return Entry(pid, ppid, unique or pid, parent or ppid, 2, 0)


def nobody(_: Entry) -> bool:
    return False


def pids(found: list[Entry]) -> set[int]:
    return {one.pid for one in found}


class TestBelonging:
    def test_descent_without_the_top(self) -> None:
        known = [entry(10, 1), entry(11, 10), entry(12, 11), entry(20, 1)]
        assert pids(belonging(known, top=known[0], is_ours=nobody)) == {11, 12}

    def test_an_orphan_by_its_first_parent(self) -> None:
        known = [entry(10, 1), entry(12, 1, parent=10), entry(13, 12), entry(20, 1)]
        assert pids(belonging(known, top=known[0], is_ours=nobody)) == {12, 13}

    def test_an_orphan_whose_parent_was_seen_once(self) -> None:
        known = [entry(10, 1), entry(12, 1, parent=11), entry(20, 1)]
        assert pids(belonging(known, top=known[0], is_ours=nobody)) == set()
        assert pids(belonging(known, top=known[0], lineage={11}, is_ours=nobody)) == {12}

    def test_the_marker_and_what_is_below(self) -> None:
        known = [entry(10, 1), entry(30, 1), entry(31, 30), entry(20, 1)]
        asked: list[int] = []

        def is_ours(one: Entry) -> bool:
            asked.append(one.pid)
            return one.pid == 30

        assert pids(belonging(known, top=None, is_ours=is_ours)) == {30, 31}
        assert pids(belonging(known, top=known[0], is_ours=is_ours)) == {30, 31}
        assert asked.count(10) == 1, "the top is never asked for"

    def test_a_number_that_was_given_away(self) -> None:
        """Another process has the pid of the first parent: its children are its own."""
        known = [entry(10, 1, unique=1000), entry(11, 10, unique=1001, parent=1000)]
        assert pids(belonging(known, top=None, lineage={10}, is_ours=nobody)) == set()

    def test_what_is_spared_is_spared_with_all_below(self) -> None:
        known = [entry(10, 1), entry(11, 10), entry(12, 11), entry(13, 10), entry(14, 1, parent=12)]
        found = belonging(known, top=known[0], spare={11}, is_ours=lambda one: one.pid == 14)
        assert pids(found) == {13}

    @given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12)), max_size=20))
    def test_laws(self, rows: list[tuple[int, int, int]]) -> None:
        """Any table, loops included: it ends, never shows the top, and closes under both kinds of parents."""
        known = list({pid: entry(pid, ppid, parent=parent) for pid, ppid, parent in rows}.values())
        top = known[0] if known else None
        found = pids(belonging(known, top=top, is_ours=lambda one: one.pid == 5))
        roots = found | ({top.pid} if top else set())
        assert top is None or top.pid not in found
        for one in known:
            if one.pid not in roots:
                assert one.ppid not in roots
                assert one.parent_unique not in roots
                assert one.pid != 5


class TestTable:
    def table(self, system: FakeSystem) -> DarwinProcessTable:
        lib = system.library
        return DarwinProcessTable(LibProc(lib), Timebase(lib), Markers(Seatbelt(lib)))

    def grow(self, system: FakeSystem) -> None:
        mine = {"uid": os.getuid()}
        system.add(10, 2, **mine)
        system.add(11, 10, user=24_000_000, system=24_000_000, footprint=1000, threads=3, files=5, **mine)
        system.add(12, 11, user=240, footprint=200, bytes_read=7, bytes_written=9, files=100, **mine)
        system.add(13, 11, footprint=30, **mine)
        system.add(14, 1, footprint=7000, parent_unique=77, **mine)
        system.add(15, 14, footprint=70_000, **mine)
        system.add(99, 1, parent_unique=1, footprint=5000, **mine)

    def test_sums_over_the_tree_without_its_root(self, system: FakeSystem) -> None:
        self.grow(system)
        table = self.table(system)
        sample = table.tree(10)
        assert sample is not None
        # 48,000,000 ticks of 125/3 ns are two seconds.
        assert sample.cpu_usec == 2_000_000 + 10
        assert sample.memory_bytes == 1230
        assert (sample.processes, sample.threads, sample.open_files) == (3, 5, 105)
        assert (sample.read_bytes, sample.write_bytes) == (7, 9)
        assert table.memory(10) == 1230
        assert table.memory(10, 5) == 1230
        assert set(table.members(10)) == {11, 12, 13}

    def test_the_marker_brings_orphans_back(self, system: FakeSystem) -> None:
        self.grow(system)
        system.confine(14, b"/data/marker-A")
        table = self.table(system)
        assert set(table.members(10, "/data/marker-A")) == {11, 12, 13, 14, 15}
        assert table.memory(10, None, "/data/marker-A") == 78_230
        assert table.memory(10, None, "/data/marker-B") == 1230
        sample = table.tree(10, "/data/marker-A")
        assert sample is not None
        assert sample.processes == 5

    def test_nobody_is_asked_twice_for_a_marker(self, system: FakeSystem) -> None:
        self.grow(system)
        lib = system.library
        proc, base, markers = LibProc(lib), Timebase(lib), Markers(Seatbelt(lib))
        for _ in range(5):
            DarwinProcessTable(proc, base, markers).members(10, "/data/marker-A")
        assert len(system.called("sandbox_check")) == 2, "one for each orphan"
        # The same number, another process.
        system.remove(99)
        system.add(99, 1, unique=1234, parent_unique=1, uid=os.getuid())
        DarwinProcessTable(proc, base, markers).members(10, "/data/marker-A")
        assert len(system.called("sandbox_check")) == 3

    def test_roots_that_are_gone_or_alone(self, system: FakeSystem) -> None:
        system.add(9, 1, status=ZOMBIE)
        for pid in (8, 9):
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
        system.add(10, 1, unique=5000)
        system.add(11, 1, unique=5001, status=ZOMBIE)
        table = self.table(system)
        assert table.alive(10, 5000)
        assert not table.alive(10, 5001)
        assert not table.alive(11, 5001)
        assert not table.alive(12, 5000)
