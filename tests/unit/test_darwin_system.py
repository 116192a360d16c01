"""The launcher's table of processes on macOS: the real ctypes code against the stand-in of libSystem."""

import os
import signal
import socket
import struct
from typing import Any

import pytest

from worker.launcher.darwin import DarwinSystem
from worker.launcher.processes import Process

from .fake_libsystem import FakeSystem, build

STOPPED, ZOMBIE = 4, 5


@pytest.fixture
def system(tmp_path_factory: pytest.TempPathFactory) -> FakeSystem:
    return FakeSystem(build(tmp_path_factory.getbasetemp()))


class TestLauncherTable:
    @pytest.fixture
    def sent(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
        """Signals that would have been sent."""
        sent: list[tuple[int, int]] = []
        monkeypatch.setattr(os, "kill", lambda pid, signum: sent.append((pid, signum)))
        monkeypatch.setattr(os, "getsid", lambda pid: {13: 11}.get(pid, pid))
        return sent

    def add(self, system: FakeSystem, pid: int, ppid: int, **facts: int) -> None:
        system.add(pid, ppid, uid=os.getuid(), **facts)

    def test_find(self, system: FakeSystem, sent: object) -> None:
        self.add(system, 10, 1, unique=500)
        self.add(system, 12, 11, status=ZOMBIE)
        self.add(system, 13, 1, status=STOPPED)
        table = DarwinSystem(system.library)
        assert table.find(10) == Process(10, 1, 10, 500, True, False)
        assert table.find(12) == Process(12, 11, 12, 12, False, False)
        assert table.find(13) == Process(13, 1, 11, 13, True, True)
        assert table.find(77) is None
        assert table.ended(12)
        assert not table.ended(10)
        assert not table.ended(77)

    def members(self, table: DarwinSystem, *given: Any, **more: Any) -> set[int]:
        return {process.pid for process in table.members(*given, **more)}

    def test_members(self, system: FakeSystem, sent: object) -> None:
        self.add(system, 10, 1)
        self.add(system, 11, 10)
        self.add(system, 12, 11)
        self.add(system, 13, 1, parent_unique=77)
        self.add(system, 14, 13)
        self.add(system, 99, 1, parent_unique=1)
        table = DarwinSystem(system.library)
        assert self.members(table, 10, (), ()) == {11, 12}
        assert self.members(table, 10, (), (11,)) == set()
        assert self.members(table, 0, (), ()) == set()
        assert self.members(DarwinSystem(system.library), 10, (11,), ()) == {11, 12, 13, 14}
        system.confine(13, b"/m")
        assert self.members(table, 10, (), (), marker="/m") == {11, 12, 13, 14}
        assert self.members(table, 10, (99,), (), marker="/other") == {11, 12}, "sessions are used again"

    def test_whom_a_dead_member_left(self, system: FakeSystem, sent: object) -> None:
        """It was seen, it ended, and its child, adopted by launchd, still names it."""
        self.add(system, 10, 1)
        self.add(system, 11, 10)
        table = DarwinSystem(system.library)
        assert self.members(table, 10, (), ()) == {11}
        system.remove(11)
        self.add(system, 12, 1, parent_unique=11)
        assert self.members(table, 10, (), ()) == {12}
        system.remove(12)
        assert self.members(table, 10, (), ()) == set()

    def test_only_the_very_process_is_signalled(
        self, system: FakeSystem, sent: list[tuple[int, int]]
    ) -> None:
        self.add(system, 11, 1, unique=500)
        table = DarwinSystem(system.library)
        process = table.find(11)
        assert process is not None
        assert table.signal(process, signal.SIGKILL)
        system.remove(11)
        self.add(system, 11, 1, unique=501)
        assert not table.signal(process, signal.SIGKILL)
        system.remove(11)
        assert not table.signal(process, signal.SIGKILL)
        assert sent == [(11, signal.SIGKILL)]

    def test_small_things(self, system: FakeSystem) -> None:
        table = DarwinSystem(system.library)
        table.hide_memory()
        assert system.called("ptrace") == ["31 0 1 0"]
        assert table.cpu_limit_s(11) is None
        assert table.grow_pipe(0, 1 << 20) == 65536
        assert table.descriptor_limit() <= 10240
        system.add(9, 1, status=ZOMBIE)
        assert table.outgrew_limit(9)

    def test_the_peer_of_a_socket(self, system: FakeSystem) -> None:
        """LOCAL_PEERPID and LOCAL_PEERCRED of <sys/un.h>, at level 0."""

        class Stub(socket.socket):
            def getsockopt(self, level: int, option: int, size: int) -> bytes:  # type: ignore[override]
                assert level == 0
                if option == 2:
                    return struct.pack("=i", 4711)
                assert (option, size) == (1, system.layout("xucred"))
                raw = bytearray(size)
                struct.pack_into("=I", raw, system.layout("xucred.cr_uid"), 501)
                return bytes(raw)

        with Stub() as sock:
            assert DarwinSystem(system.library).peer(sock) == (4711, 501)

    def test_closing_descriptors(self, system: FakeSystem) -> None:
        read, write = os.pipe()
        table = DarwinSystem(system.library)
        pid = os.fork()
        if pid == 0:
            table.close_descriptors({0, 1, 2, write})
            os.write(write, ",".join(sorted(os.listdir("/dev/fd"), key=int)).encode())
            os._exit(0)
        os.close(write)
        listed = {int(fd) for fd in os.read(read, 1000).decode().split(",")}
        assert len(listed - {0, 1, 2, write}) <= 1, "the listing's own"
        os.waitpid(pid, 0)
        os.close(read)
