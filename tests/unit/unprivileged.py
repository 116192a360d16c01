"""Running a function as a user without any privilege, for tests that the CI runs as root."""

import os
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

NOBODY = 65534

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which needs root")


def as_nobody(function: Callable[[Path], None], home: Path) -> None:
    """Run it with `Path(".")` in a child that owns `home`, stands in it and is nobody; fails as it failed."""
    os.chown(home, NOBODY, NOBODY)
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            os.chdir(home)
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            function(Path())
        except BaseException:
            os.write(writing, traceback.format_exc().encode()[-60_000:])
            os._exit(1)
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        report = pipe.read().decode()
    _, status = os.waitpid(pid, 0)
    assert status == 0, report
