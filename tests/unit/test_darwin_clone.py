"""Copying trees on macOS: the real ctypes code against the stand-in of libSystem."""

import errno
import os
import stat
from pathlib import Path

import pytest

from worker.images.trees import tree_size
from worker.platform.darwin.clone import DarwinCloner
from worker.platform.treecopy import TreeError
from worker.platform.xattrs import DarwinXattrs

from .fake_libsystem import FakeSystem, build


@pytest.fixture
def system(tmp_path_factory: pytest.TempPathFactory) -> FakeSystem:
    return FakeSystem(build(tmp_path_factory.getbasetemp()))


class TestClone:
    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        top = tmp_path / "src"
        (top / "a" / "empty").mkdir(parents=True)
        (top / "f").write_text("content")
        os.link(top / "f", top / "a" / "again")
        (top / "link").symlink_to("/nowhere")
        (top / "f").chmod(0o640)
        os.utime(top / "f", ns=(1, 1_600_000_000_000_000_001))
        if hasattr(os, "setxattr"):
            vars(os)["setxattr"](top / "f", "user.note", b"kept")
        return top

    def test_the_whole_tree_in_one_call(self, system: FakeSystem, source: Path, tmp_path: Path) -> None:
        report = DarwinCloner(system.library).clone_tree(source, tmp_path / "dst")
        assert report.method == "clonefile"
        assert (report.files, report.directories, report.bytes) == (3 - 1, 3, 14)
        assert system.texts == [b"src", b"dst"]
        assert system.called("clonefileat") == ["0x3"]
        assert (tmp_path / "dst" / "f").read_text() == "content"

    @pytest.mark.parametrize("code", [errno.ENOTSUP, errno.EXDEV])
    def test_file_by_file_where_it_cannot_be(
        self, system: FakeSystem, source: Path, tmp_path: Path, code: int
    ) -> None:
        system.fail("clonefileat", code)
        report = DarwinCloner(system.library).clone_tree(source, tmp_path / "dst")
        assert report.method == "copy"
        assert set(system.called("fcopyfile")) == {"0x8"}
        copied = tmp_path / "dst"
        assert (copied / "f").stat().st_ino == (copied / "a" / "again").stat().st_ino
        assert stat.S_IMODE((copied / "f").stat().st_mode) == 0o640
        assert (copied / "f").stat().st_mtime_ns == 1_600_000_000_000_000_001
        assert os.readlink(copied / "link") == "/nowhere"
        assert (copied / "a" / "empty").is_dir()
        assert tree_size(copied) == tree_size(source)
        assert vars(os)["getxattr"](copied / "f", "user.note") == b"kept"

    def test_a_place_that_is_taken_is_an_error(
        self, system: FakeSystem, source: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "dst").mkdir()
        with pytest.raises(FileExistsError):
            DarwinCloner(system.library).clone_tree(source, tmp_path / "dst")
        assert os.listdir(tmp_path / "dst") == []

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
    def test_other_failures_are_not_taken_for_a_lack(
        self, system: FakeSystem, source: Path, tmp_path: Path, code: int
    ) -> None:
        system.fail("clonefileat", code)
        with pytest.raises(OSError, match=os.strerror(code)) as caught:
            DarwinCloner(system.library).clone_tree(source, tmp_path / "dst")
        assert caught.value.errno == code
        assert not (tmp_path / "dst").exists()

    def test_a_copy_that_fails_names_the_file(
        self, system: FakeSystem, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cloner = DarwinCloner(system.library)
        monkeypatch.setattr(cloner, "_clone_whole", lambda *given: False)
        system.fail("fcopyfile", errno.EIO)
        with pytest.raises(TreeError, match=r"(f|a/again): Input/output error"):
            cloner.clone_tree(source, tmp_path / "dst")

    def test_no_link_on_the_way(self, system: FakeSystem, source: Path, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(source)
        for path in (tmp_path / "link", tmp_path / "link" / "a"):
            with pytest.raises(OSError, match=r"Not a directory|symbolic"):
                DarwinCloner(system.library).clone_tree(path, tmp_path / "dst")
        assert system.texts == []


class TestXattrs:
    def test_read_and_write(self, system: FakeSystem, tmp_path: Path) -> None:
        xattrs = DarwinXattrs(system.library)
        (tmp_path / "f").write_text("x")
        fd = os.open(tmp_path / "f", os.O_RDWR)
        try:
            items = [("user.a", b"1"), ("user.b", b"\0\xff" * 100), ("user.c", b"")]
            xattrs.write(fd, items)
            assert xattrs.read(fd) == items
            system.fail("flistxattr", errno.ENOTSUP)
            assert xattrs.read(fd) == []
            system.fail("flistxattr", errno.EIO)
            with pytest.raises(OSError, match="Input/output"):
                xattrs.read(fd)
            system.fail("fsetxattr", errno.ENOTSUP)
            xattrs.write(fd, items[:1])
            system.fail("fsetxattr", errno.ENOSPC)
            with pytest.raises(OSError, match="No space"):
                xattrs.write(fd, items[:1])
        finally:
            os.close(fd)
