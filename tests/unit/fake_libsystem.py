"""Compiles and loads the stand-in for libSystem (tests/native/fake_libsystem.c)."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "native" / "fake_libsystem.c"


class FakeProcess(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in ("pid", "ppid", "status", "threads", "files")),
        *(
            (name, ctypes.c_uint64)
            for name in (
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
    """The path of the library; skips the test where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler for the stand-in of libSystem")
    library = folder / "libfakesystem.so"
    done = subprocess.run(
        [compiler, "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-O1", "-o", str(library), str(SOURCE)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return library


class FakeSystem:
    """The library, and what it was asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path), use_errno=True)
        for name in ("fake_text", "fake_last_operation"):
            getattr(self.library, name).restype = ctypes.c_char_p
        self.library.fake_last_flags.restype = ctypes.c_uint64
        self.library.fake_layout.argtypes = [ctypes.c_char_p]
        self.library.fake_reset()
        self.library.fake_clear_processes()
        self.library.fake_timebase(125, 3)

    @property
    def texts(self) -> list[bytes]:
        return [self.library.fake_text(index) for index in range(self.library.fake_text_count())]

    @property
    def flags(self) -> int:
        return int(self.library.fake_last_flags())

    def fail(self, function: str, number: int, message: str = "") -> None:
        self.library.fake_fail(function.encode(), number, message.encode())

    def add(self, pid: int, ppid: int, **facts: int) -> None:
        process = FakeProcess(pid=pid, ppid=ppid, **{"status": 2, "threads": 1, **facts})
        self.library.fake_add_process(ctypes.byref(process))

    def layout(self, name: str) -> int:
        found = int(self.library.fake_layout(name.encode()))
        assert found >= 0, name
        return found
