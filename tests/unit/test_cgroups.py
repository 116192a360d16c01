"""Control groups on a folder that is laid out like theirs: no kernel keeps the limits here."""

import os
from pathlib import Path

import pytest

from worker.platform.linux import cgroups
from worker.platform.linux.cgroups import Cgroups, Delegated, delegated

MOUNTS = (
    "24 30 0:22 / /proc rw,nosuid shared:13 - proc proc rw\n"
    "25 30 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
)
FILES = ("cgroup.procs", "cgroup.subtree_control")
mkdir, rmdir = os.mkdir, os.rmdir  # as they are without a `Kernel`


class Kernel:
    """Makes the files that the kernel would, and takes folders away as it does."""

    def __init__(self, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.top = top / "sys" / "fs" / "cgroup"
        self.top.mkdir(parents=True)
        self._fill(self.top, root=True)
        monkeypatch.setattr(os, "mkdir", self._mkdir)
        monkeypatch.setattr(os, "rmdir", self._rmdir)

    def group(self, path: str) -> Path:
        at = self.top
        for name in path.strip("/").split("/"):
            at = at / name
            if not at.exists():
                self._mkdir(str(at), 0o755)
        return at

    def _mkdir(self, path: str, mode: int) -> None:
        mkdir(path, mode)
        self._fill(Path(path), root=False)

    def _fill(self, folder: Path, *, root: bool) -> None:
        for name in FILES:
            (folder / name).write_text("")
        (folder / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
        if not root:
            (folder / "cgroup.type").write_text("domain\n")
            (folder / "cgroup.events").write_text("populated 0\nfrozen 0\n")
            (folder / "memory.events").write_text("low 0\nmax 3\noom 0\noom_kill 0\n")
            for name in (
                "memory.max",
                "memory.oom.group",
                "memory.swap.max",
                "pids.max",
                "cpu.max",
                "cgroup.kill",
            ):
                (folder / name).write_text("")

    def _rmdir(self, path: str) -> None:
        folder = Path(path)
        if not folder.is_dir():
            raise FileNotFoundError(2, "No such file or directory", path)
        if "populated 1" in (folder / "cgroup.events").read_text():
            raise OSError(16, "Device or resource busy", path)
        if any(entry.is_dir() for entry in folder.iterdir()):
            raise OSError(16, "Device or resource busy", path)
        for entry in folder.iterdir():
            entry.unlink()
        rmdir(folder)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(tmp_path, monkeypatch)


@pytest.fixture
def place(kernel: Kernel, tmp_path: Path) -> Cgroups:
    return Cgroups.open(str(kernel.top), "sandfleet-1")


def writable(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """Nothing may be written but what lies in these folders themselves."""

    def access(path: str, mode: int) -> bool:
        return any(Path(path) == folder or Path(path).parent == folder for folder in folders)

    monkeypatch.setattr(os, "access", access)


def where(tmp_path: Path, own: str, mounts: str = MOUNTS) -> Delegated | None:
    return delegated(mounts, f"12:cpuset:/\n0::{own}\n", root=str(tmp_path))


def test_root_makes_them_at_the_top(kernel: Kernel, tmp_path: Path) -> None:
    kernel.group("system.slice/sandfleet.service")
    found = where(tmp_path, "/system.slice/sandfleet.service")
    assert found == Delegated(str(kernel.top), ("memory", "pids", "cpu"))


def test_a_user_makes_them_as_high_as_he_may(
    kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = kernel.group("user.slice/user@1.service/app.slice/a.service")
    writable(monkeypatch, own, own.parent, own.parent.parent)
    found = where(tmp_path, "/user.slice/user@1.service/app.slice/a.service")
    assert found is not None
    assert found.base == str(own.parent.parent)


def test_a_group_with_our_own_processes_is_no_place(
    kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = kernel.group("system.slice/sandfleet.service")
    writable(monkeypatch, own)
    assert where(tmp_path, "/system.slice/sandfleet.service") is None
    below = kernel.group("system.slice/sandfleet.service/node")
    writable(monkeypatch, own, below)
    found = where(tmp_path, "/system.slice/sandfleet.service/node")
    assert found is not None
    assert found.base == str(own)


@pytest.mark.parametrize(
    ("mounts", "cgroup"),
    [
        ("", "0::/\n"),
        (MOUNTS.replace("cgroup2", "cgroup"), "0::/\n"),
        (MOUNTS, "4:memory:/\n"),
        (MOUNTS, ""),
        ("nonsense\n - \n", "0::/\n"),
    ],
)
def test_where_there_are_none(kernel: Kernel, tmp_path: Path, mounts: str, cgroup: str) -> None:
    assert delegated(mounts, cgroup, root=str(tmp_path)) is None


def test_what_may_not_be_written_is_no_place(
    kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writable(monkeypatch)
    assert where(tmp_path, "/") is None


def test_limits_are_written(kernel: Kernel, place: Cgroups) -> None:
    assert place.controllers == ("memory", "pids", "cpu")
    group = place.make("web-0.I.1", {"memory": 1 << 20, "pids": 7, "cpu": 1.5})
    folder = kernel.top / "sandfleet-1" / "web-0.I.1"
    read = {
        name: (folder / name).read_text()
        for name in ("memory.max", "pids.max", "cpu.max", "memory.oom.group")
    }
    assert read == {
        "memory.max": "1048576",
        "pids.max": "7",
        "cpu.max": "150000 100000",
        "memory.oom.group": "1",
    }
    assert group.procs == str(folder / "cgroup.procs")
    assert place.names() == ["web-0.I.1"]
    assert place.find("web-0.I.1") is not None
    assert place.find("other") is None


def test_a_limit_that_the_kernel_refuses_leaves_no_group(kernel: Kernel, place: Cgroups) -> None:
    place.controllers = ("memory", "pids", "cpu")

    def refuse(path: str, text: str) -> None:
        raise OSError(22, "Invalid argument", path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cgroups, "_write", refuse)
        with pytest.raises(OSError, match="Invalid argument"):
            place.make("web-0.I.1", {"pids": 7})
    assert place.names() == []


def test_the_end_of_a_group(kernel: Kernel, place: Cgroups) -> None:
    group = place.make("web-0.I.1", {"memory": 1 << 20})
    folder = Path(group.path)
    assert not group.ran_out
    (folder / "memory.events").write_text("low 0\noom 1\noom_kill 4\n")
    assert group.ran_out
    (folder / "cgroup.events").write_text("populated 1\nfrozen 0\n")
    assert group.populated
    group.kill()
    assert (folder / "cgroup.kill").read_text() == "1"
    assert not group.remove()
    (folder / "cgroup.events").write_text("populated 0\nfrozen 0\n")
    kernel.group("sandfleet-1/web-0.I.1/made/by-program")
    assert group.remove()
    assert not folder.exists()
    assert group.remove()  # it is gone already
    group.kill()
    assert not group.populated
    assert not group.ran_out
