"""Copying trees: what is kept, what is refused, and that no way of copying differs from another."""

import errno
import fcntl
import os
import stat
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from worker.images.trees import remove_tree, tree_size
from worker.platform.treecopy import TreeError

from .test_trees import deep, open_descriptors, roomy

__all__ = ["roomy"]

if not hasattr(os, "copy_file_range"):
    pytest.skip("clones with the Linux driver", allow_module_level=True)

from worker.platform.linux import clone
from worker.platform.linux.clone import LinuxCopier, clone_tree, measure


def facts(top: Path) -> dict[str, tuple[Any, ...]]:
    found: dict[str, tuple[Any, ...]] = {}
    inodes: dict[int, str] = {}
    paths = sorted([top, *top.rglob("*")])
    for path in paths:
        info = path.lstat()
        entry: tuple[Any, ...] = (oct(info.st_mode), info.st_mtime_ns)
        if stat.S_ISREG(info.st_mode):
            first = inodes.setdefault(info.st_ino, str(path.relative_to(top)))
            attributes = {name: os.getxattr(path, name) for name in os.listxattr(path)}
            entry += (path.read_bytes(), first, attributes)
        elif stat.S_ISLNK(info.st_mode):
            entry += (os.readlink(path),)
        found[str(path.relative_to(top))] = entry
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    top = tmp_path / "src"
    (top / "a" / "b").mkdir(parents=True)
    (top / "empty").mkdir(mode=0o711)
    (top / "small").write_text("small")
    (top / "zero").touch()
    (top / "large").write_bytes(os.urandom(3 << 20))
    (top / "a" / "b" / "mode").write_text("x")
    (top / "a" / "b" / "mode").chmod(0o640)
    os.link(top / "large", top / "a" / "b" / "again")
    os.link(top / "large", top / "z-again")
    (top / "up").symlink_to("../../..")
    (top / "absolute").symlink_to("/etc/passwd")
    os.setxattr(top / "small", "user.note", b"\0kept")
    os.setxattr(top / "a", "user.note", b"too")
    with (top / "sparse").open("wb") as file:
        file.seek(5 << 20)
        file.write(b"end")
        file.truncate(20 << 20)
    for number, path in enumerate(sorted(top.rglob("*"), reverse=True)):
        os.utime(path, ns=(1, 1_000_000_000_000_000_000 + number), follow_symlinks=False)
    (top / "a" / "b").chmod(0o555)
    return top


@pytest.mark.parametrize(
    "copier",
    [LinuxCopier(), LinuxCopier(reflink=False), LinuxCopier(reflink=False, ranges=False)],
    ids=["best", "ranges", "by hand"],
)
def test_every_way_gives_the_same(source: Path, tmp_path: Path, copier: LinuxCopier) -> None:
    before = facts(source)
    descriptors = open_descriptors()
    report = clone_tree(source, tmp_path / "dst", copier=copier)
    assert facts(tmp_path / "dst") == before
    assert facts(source) == before
    assert (report.files, report.directories) == (5, 4)
    assert report.bytes == tree_size(source).bytes
    assert open_descriptors() == descriptors


def test_holes_stay_holes(source: Path, tmp_path: Path) -> None:
    clone_tree(source, tmp_path / "dst", copier=LinuxCopier(reflink=False))
    assert (tmp_path / "dst" / "sparse").stat().st_blocks * 512 < 1 << 20


def test_a_hole_at_the_end_and_nothing_but_a_hole(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    with (tmp_path / "src" / "hole").open("wb") as file:
        file.truncate(10 << 20)
    clone_tree(tmp_path / "src", tmp_path / "dst", copier=LinuxCopier(reflink=False))
    assert (tmp_path / "dst" / "hole").stat().st_size == 10 << 20
    assert (tmp_path / "dst" / "hole").stat().st_blocks == 0


def test_setuid_is_dropped_and_sticky_kept(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "su").write_text("x")
    (tmp_path / "src" / "su").chmod(0o6755)
    (tmp_path / "src" / "tmp").mkdir()
    (tmp_path / "src" / "tmp").chmod(0o3777)
    clone_tree(tmp_path / "src", tmp_path / "dst")
    assert stat.S_IMODE((tmp_path / "dst" / "su").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "dst" / "tmp").stat().st_mode) == 0o1777


def test_the_umask_does_not_matter(source: Path, tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        clone_tree(source, tmp_path / "dst")
    finally:
        os.umask(old)
    assert facts(tmp_path / "dst") == facts(source)


def test_a_copy_shares_no_inode(source: Path, tmp_path: Path) -> None:
    clone_tree(source, tmp_path / "dst")
    assert {p.lstat().st_ino for p in source.rglob("*")}.isdisjoint(
        p.lstat().st_ino for p in (tmp_path / "dst").rglob("*")
    )
    with (tmp_path / "dst" / "large").open("r+b") as file:
        file.write(b"changed")
    assert (tmp_path / "dst" / "z-again").read_bytes()[:7] == b"changed"
    assert (source / "large").read_bytes()[:7] != b"changed"


def test_a_hard_link_to_the_outside_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("x")
    (tmp_path / "src").mkdir()
    os.link(tmp_path / "outside", tmp_path / "src" / "f")
    clone_tree(tmp_path / "src", tmp_path / "dst")
    assert (tmp_path / "dst" / "f").stat().st_nlink == 1


def test_deeper_than_any_path(roomy: Path) -> None:
    deep(roomy / "src", 2_500)
    report = clone_tree(roomy / "src", roomy / "dst")
    assert report.directories == 2_501
    assert tree_size(roomy / "dst") == tree_size(roomy / "src")
    remove_tree(roomy / "src")
    remove_tree(roomy / "dst")


def test_the_target_must_not_exist(source: Path, tmp_path: Path) -> None:
    (tmp_path / "dst").mkdir()
    with pytest.raises(FileExistsError):
        clone_tree(source, tmp_path / "dst")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        clone_tree(source, tmp_path / "link")
    assert not (tmp_path / "nowhere").exists()


def test_the_source_must_be_a_directory_without_links_on_the_way(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    for path in (tmp_path / "link", tmp_path / "link" / "a", source / "small", tmp_path / "missing"):
        with pytest.raises(OSError, match=r"Not a directory|symbolic|No such"):
            clone_tree(path, tmp_path / "dst")
        assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.mknod(path, stat.S_IFSOCK | 0o600)])
def test_special_files_are_named(source: Path, tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(source / "a" / "odd")
    with pytest.raises(TreeError, match=r"a/odd: a (fifo|socket) cannot be part of an image"):
        clone_tree(source, tmp_path / "dst")


def test_a_fifo_in_a_files_place_does_not_block(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory entry said file; what is opened is a fifo, without a writer."""
    real = os.open

    def swapped(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if path == "small" and not flags & os.O_CREAT and (source / "small").is_file():
            (source / "small").unlink()
            os.mkfifo(source / "small")
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", swapped)
    with pytest.raises(TreeError, match="small: a fifo"):
        clone_tree(source, tmp_path / "dst")


def test_a_file_that_shrinks_is_noticed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Shrinking(LinuxCopier):
        def copy(self, source_fd: int, target: int, size: int) -> None:
            super().copy(source_fd, target, size + 1)

    with pytest.raises(TreeError, match="became shorter"):
        clone_tree(source, tmp_path / "dst", copier=Shrinking(reflink=False))


def test_it_can_be_called_off(source: Path, tmp_path: Path) -> None:
    calls = 0

    def stop() -> bool:
        nonlocal calls
        calls += 1
        return calls == 3

    with pytest.raises(TreeError, match="called off") as caught:
        clone_tree(source, tmp_path / "dst", stop=stop)
    assert caught.value.errno == errno.ECANCELED
    assert calls == 3


def test_what_the_file_system_refuses_is_not_asked_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"clone": 0, "range": 0}

    def ioctl(fd: int, request: int, argument: int) -> int:
        asked["clone"] += 1
        raise OSError(errno.EOPNOTSUPP, "no")

    def ranges(source: int, target: int, count: int) -> int:
        asked["range"] += 1
        raise OSError(errno.EXDEV, "no")

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    monkeypatch.setattr(clone, "_copy_file_range", ranges)
    report = clone_tree(source, tmp_path / "dst")
    assert facts(tmp_path / "dst") == facts(source)
    assert asked == {"clone": 1, "range": 1}
    assert report.method == "copy"


def test_one_file_that_cannot_share_does_not_stop_the_rest(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def ioctl(target: int, request: int, source_fd: int) -> int:
        size = os.fstat(source_fd).st_size
        asked.append(size)
        if size == len("small"):
            raise OSError(errno.EINVAL, "inline")
        os.write(target, os.pread(source_fd, size, 0))
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    for name in ("large", "z-again", "sparse", "a"):
        if name == "a":
            (source / "a" / "b").chmod(0o755)
            (source / "a" / "b" / "again").unlink()
        else:
            (source / name).unlink()
    for number in range(3):
        (source / f"other{number}").write_text("other than small")
    report = clone_tree(source, tmp_path / "dst")
    assert facts(tmp_path / "dst") == facts(source)
    if asked[0] == len("small"):
        assert report.method == "copy"
    else:
        assert report.method == "reflink+copy"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_is_not_taken_for_a_missing_feature(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def ioctl(fd: int, request: int, argument: int) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    with pytest.raises(TreeError, match=os.strerror(code)) as caught:
        clone_tree(source, tmp_path / "dst")
    assert caught.value.errno == code


def test_several_at_once(source: Path, tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            clone_tree(source, tmp_path / f"dst{number}")
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert all(facts(tmp_path / f"dst{number}") == facts(source) for number in range(6))


def test_the_ways_are_measured(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("images", "containers")]
    for folder in folders:
        folder.mkdir()
    choice = measure(*folders)
    assert choice.method in {"reflink", "copy"}
    assert (choice.shared_from is None) == (choice.method == "copy")
    assert "copy 1048576" in choice.usec
    assert [os.listdir(folder) for folder in folders] == [[], []]


def test_as_cp_does(source: Path, tmp_path: Path) -> None:
    clone_tree(source, tmp_path / "ours")
    subprocess.run(["cp", "-a", str(source), str(tmp_path / "theirs")], check=True)
    assert facts(tmp_path / "ours") == facts(tmp_path / "theirs")
