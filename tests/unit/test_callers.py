"""Looking into a process: into this one, and a thread of it."""

import ctypes
import errno
import os
import socket
import threading

import pytest

from worker.platform.linux import callers
from worker.platform.linux.callers import Caller

pytestmark = pytest.mark.skipif(bool(callers.try_out()), reason="no descriptor of a process can be had")

# The flag for threads, and one that no kernel knows, as those before 6.9 do not know that for threads.
FLAGS = [callers._PIDFD_THREAD, 1 << 20]


@pytest.mark.parametrize("flag", FLAGS)
def test_a_thread_has_the_descriptors_of_its_process(flag: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callers, "_PIDFD_THREAD", flag)
    ready, go = threading.Event(), threading.Event()
    found: list[int] = []

    def run() -> None:
        found.append(threading.get_native_id())
        ready.set()
        go.wait(10)

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait(10)
    try:
        with socket.socket() as one, Caller(found[0]) as caller:
            copy = caller.descriptor(one.fileno())
            assert os.fstat(copy).st_ino == os.fstat(one.fileno()).st_ino
            assert copy != one.fileno()
            os.close(copy)
            with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
                caller.descriptor(1 << 20)
    finally:
        go.set()
        thread.join()


def test_flags_and_memory() -> None:
    text = ctypes.create_string_buffer(b"of this process")
    with socket.socket() as one, Caller(os.getpid()) as caller:
        for closes in (True, False):
            os.set_inheritable(one.fileno(), not closes)
            assert caller.closes_on_exec(one.fileno()) is closes
        assert caller.memory(ctypes.addressof(text), 7) == b"of this"
        for address in (0, 1 << 63, (1 << 64) - 1):
            with pytest.raises(OSError, match="no such memory"):
                caller.memory(address, 16)


@pytest.mark.parametrize("flag", FLAGS)
def test_one_that_is_gone(flag: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callers, "_PIDFD_THREAD", flag)
    child = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(child, 0)
    with pytest.raises((ProcessLookupError, FileNotFoundError)):
        Caller(child)
