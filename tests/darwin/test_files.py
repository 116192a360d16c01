"""clonefile and setrlimit on a real Mac."""

import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker.images.trees import tree_size
from worker.platform.base import Limits
from worker.platform.darwin.enforce import Enforcer

from .conftest import Note
from .mac_help import Box, a_folder, driver

pytestmark = pytest.mark.darwin


@pytest.fixture
def folder() -> Iterator[Path]:
    with a_folder() as folder:
        yield folder


def test_a_tree_is_cloned_in_one_call(folder: Path, note: Note) -> None:
    source = folder / "src"
    (source / "a" / "empty").mkdir(parents=True)
    (source / "big").write_bytes(os.urandom(1 << 20) * 64)
    (source / "link").symlink_to("/nowhere")
    os.link(source / "big", source / "a" / "again")
    subprocess.run(["/usr/bin/xattr", "-w", "dev.sandfleet.test", "kept", str(source / "big")], check=True)
    report = driver().clone_tree(source, folder / "dst")
    note("clone", {"method": report.method, "files": report.files, "bytes": report.bytes})
    assert report.method == "clonefile"
    assert tree_size(folder / "dst") == tree_size(source)
    assert (folder / "dst" / "big").read_bytes() == (source / "big").read_bytes()
    assert os.readlink(folder / "dst" / "link") == "/nowhere"
    kept = subprocess.run(
        ["/usr/bin/xattr", "-p", "dev.sandfleet.test", str(folder / "dst" / "big")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert kept.stdout.strip() == "kept"
    # A write to one side stays there.
    (folder / "dst" / "big").write_bytes(b"new")
    assert (source / "big").stat().st_size == 64 << 20


def test_a_place_that_is_taken(folder: Path) -> None:
    (folder / "src").mkdir()
    (folder / "dst").mkdir()
    with pytest.raises(FileExistsError):
        driver().clone_tree(folder / "src", folder / "dst")


def test_limits_hold_in_the_child(folder: Path) -> None:
    limits = Limits(max_files=100, cpu_time_limit_s=7, ulimits={"stack": (1 << 20, 1 << 22)})
    plan = driver().plan(Box(folder).policy(limits=limits))
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        Enforcer().apply(plan)
        names = ("RLIMIT_NOFILE", "RLIMIT_CPU", "RLIMIT_STACK", "RLIMIT_CORE")
        os.write(write, repr([resource.getrlimit(getattr(resource, name)) for name in names]).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    assert said == repr([(100, 100), (7, 8), (1 << 20, 1 << 22), (0, 0)])
