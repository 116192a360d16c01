"""Compiles and loads the stand-in for libSystem (tests/unit/libsystem)."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parent / "libsystem"


class FakeProcess(ctypes.Structure):
    """struct fake_process of fake.h."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("pid", "ppid", "status", "threads", "files", "uid")),
        *(
            (name, ctypes.c_uint64)
            for name in (
                "unique",
                "parent_unique",
                "user",
                "system",
                "footprint",
                "bytes_read",
                "bytes_written",
                "start_sec",
                "start_usec",
            )
        ),
    )


def build(folder: Path) -> Path:
    """The path of the library, made once in each folder; skips the test where it cannot be made."""
    library = folder / "libfakesystem.so"
    if library.exists():
        return library
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler for the stand-in of libSystem")
    if not Path("/proc/self/stat").exists():
        pytest.skip("the stand-in of libSystem is made of Linux's means")
    sources = sorted(str(source) for source in SOURCES.glob("*.c"))
    flags = ["-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-O1"]
    done = subprocess.run(
        [compiler, *flags, "-o", str(library), *sources], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return library


class FakeSystem:
    """The library, what it shall answer, and what it was asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path), use_errno=True)
        for name in ("fake_text", "fake_call"):
            getattr(self.library, name).restype = ctypes.c_char_p
        self.library.fake_sysctl.argtypes = [ctypes.c_char_p, ctypes.c_uint64] * 2
        self.library.fake_reset()
        self.library.fake_clear_processes()
        self.library.fake_timebase(125, 3)
        self.library.fake_sysctl(b"", 0, b"", 0)
        self.library.fake_confine(-1, b"-")

    @property
    def texts(self) -> list[bytes]:
        """Every text that was given, byte for byte."""
        return [self.library.fake_text(index) for index in range(self.library.fake_text_count())]

    @property
    def calls(self) -> list[str]:
        """Every call, with its numbers."""
        count = self.library.fake_call_count()
        return [self.library.fake_call(index).decode() for index in range(count)]

    def called(self, function: str) -> list[str]:
        return [call.partition(" ")[2] for call in self.calls if call.startswith(f"{function} ")]

    def fail(self, function: str, number: int, message: str = "", *, times: int = 1) -> None:
        self.library.fake_fail(function.encode(), number, message.encode(), times)

    def add(self, pid: int, ppid: int, **facts: int) -> None:
        """A process. Its unique id is its pid, and its first parent its parent, unless said otherwise."""
        given = {"status": 2, "threads": 1, "unique": pid, "parent_unique": ppid, **facts}
        process = FakeProcess(pid=pid, ppid=ppid, **given)
        self.library.fake_add_process(ctypes.byref(process))

    def remove(self, pid: int) -> None:
        self.library.fake_remove_process(pid)

    def confine(self, pid: int, marker: bytes) -> None:
        """This process has a sandbox that lets it read `marker`, or with b"" everything."""
        self.library.fake_confine(pid, marker)

    def layout(self, name: str) -> int:
        found = int(self.library.fake_layout(name.encode()))
        assert found >= 0, name
        return found

    def assert_no_leaks(self) -> None:
        """Every error text and set of attributes that was handed out was given back, once."""
        assert self.library.fake_outstanding_errors() == 0
        assert self.library.fake_outstanding_attributes() == 0
        assert self.library.fake_wrong_frees() == 0
