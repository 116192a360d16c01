"""Deleting and measuring hostile trees."""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from worker.images.trees import remove_tree, tree_size
from worker.platform.descent import Descent, Moved, open_directory
from worker.platform.treecopy import TreeError, printable

from .unprivileged import as_nobody, needs_root


def deep(top: Path, levels: int) -> None:
    """A chain of directories far longer than any path may be."""
    top.mkdir()
    fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(levels):
        os.mkdir("d", dir_fd=fd)
        deeper = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = deeper
    os.close(os.open("leaf", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(fd)


@pytest.fixture
def roomy(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: making many entries is not what is tested."""
    if not os.access("/dev/shm", os.W_OK | os.X_OK):
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        yield folder
    finally:
        for left in folder.iterdir():
            remove_tree(left)
        folder.rmdir()


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


class TestRemove:
    def test_nothing_there_is_fine(self, tmp_path: Path) -> None:
        remove_tree(tmp_path / "missing")
        remove_tree(tmp_path / "no" / "such" / "parent")

    def test_a_file_and_a_link_themselves(self, tmp_path: Path) -> None:
        kept = tmp_path / "kept"
        kept.mkdir()
        (kept / "f").write_text("stays")
        (tmp_path / "link").symlink_to(kept)
        (tmp_path / "file").write_text("goes")
        remove_tree(tmp_path / "link")
        remove_tree(tmp_path / "file")
        assert sorted(os.listdir(tmp_path)) == ["kept"]
        assert (kept / "f").read_text() == "stays"

    def test_links_inside_are_not_followed(self, tmp_path: Path) -> None:
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "f").write_text("stays")
        top = tmp_path / "top"
        (top / "a").mkdir(parents=True)
        (top / "a" / "dir").symlink_to(outside)
        (top / "a" / "up").symlink_to("../..")
        (top / "loop").symlink_to("loop")
        os.link(outside / "f", top / "hard")
        remove_tree(top)
        assert not top.exists()
        assert (outside / "f").read_text() == "stays"

    def test_strange_names_and_types(self, tmp_path: Path) -> None:
        top = tmp_path / "top"
        top.mkdir()
        for name in (b"\xff\xfe", b"new\nline", b"-rf", b"*", b"\x01", "ü".encode(), b"x" * 255):
            (Path(os.fsdecode(os.path.join(os.fsencode(top), name)))).mkdir()
        os.mkfifo(top / "fifo")
        remove_tree(top)
        assert not top.exists()

    def test_ten_thousand_levels(self, roomy: Path) -> None:
        top = roomy / "deep"
        deep(top, 10_000)
        before = open_descriptors()
        remove_tree(top)
        assert not top.exists()
        assert open_descriptors() == before

    def test_a_wide_directory(self, roomy: Path) -> None:
        top = roomy / "wide"
        top.mkdir()
        for number in range(20_000):
            os.close(os.open(top / str(number), os.O_CREAT | os.O_WRONLY))
        remove_tree(top)
        assert not top.exists()

    @needs_root
    def test_modes_that_shut_out_their_owner(self, tmp_path: Path) -> None:
        def run(home: Path) -> None:
            top = home / "top"
            (top / "closed" / "inner").mkdir(parents=True)
            (top / "closed" / "inner" / "f").write_text("x")
            (top / "readonly").mkdir()
            (top / "readonly" / "f").write_text("x")
            (top / "blind").mkdir()
            (top / "blind" / "f").write_text("x")
            (top / "closed" / "inner").chmod(0o000)
            (top / "closed").chmod(0o000)
            (top / "readonly").chmod(0o555)
            (top / "blind").chmod(0o311)
            top.chmod(0o000)
            remove_tree(top)
            assert not top.exists()

        as_nobody(run, tmp_path)

    @needs_root
    def test_another_users_files_are_named(self, tmp_path: Path) -> None:
        (tmp_path / "top" / "mine").mkdir(parents=True)
        (tmp_path / "top" / "mine" / "f").write_text("x")

        def run(home: Path) -> None:
            with pytest.raises(PermissionError, match="top"):
                remove_tree(home / "top")

        as_nobody(run, tmp_path)
        assert (tmp_path / "top" / "mine" / "f").exists()

    @pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
    @pytest.mark.skipif(shutil.which("mount") is None, reason="no mount program")
    def test_a_mount_point_is_not_crossed(self, tmp_path: Path) -> None:
        kept = tmp_path / "kept"
        kept.mkdir()
        (kept / "f").write_text("stays")
        top = tmp_path / "top"
        (top / "a" / "mnt").mkdir(parents=True)
        (top / "b").mkdir()
        (top / "b" / "f").write_text("goes")
        mounted = subprocess.run(
            ["mount", "--bind", str(kept), str(top / "a" / "mnt")], capture_output=True, check=False
        )
        if mounted.returncode != 0:
            pytest.skip("bind mounts are refused here")
        try:
            with pytest.raises(OSError, match="mount point") as caught:
                remove_tree(top)
            assert str(top / "a" / "mnt") in str(caught.value)
            with pytest.raises(OSError, match="mount point"):
                remove_tree(top / "a" / "mnt")
            assert (kept / "f").read_text() == "stays"
            assert sorted(os.listdir(top)) == ["a"]
        finally:
            subprocess.run(["umount", str(top / "a" / "mnt")], check=True)
        remove_tree(top)
        assert not top.exists()

    def test_a_process_that_keeps_writing(self, tmp_path: Path) -> None:
        top = tmp_path / "top"
        top.mkdir()
        script = (
            "import os, sys, itertools\n"
            "for n in itertools.count():\n"
            "    try:\n"
            "        os.makedirs(f'{sys.argv[1]}/d{n % 7}/e{n % 3}', exist_ok=True)\n"
            "        open(f'{sys.argv[1]}/d{n % 7}/e{n % 3}/f{n % 50}', 'w').close()\n"
            "    except OSError:\n"
            "        if n > 2000 and not os.path.isdir(sys.argv[1]): break\n"
            "    if n == 500: print('busy', flush=True)\n"
        )
        with subprocess.Popen([sys.executable, "-c", script, str(top)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"busy\n"
            timer = threading.Timer(0.3, writer.kill)
            timer.start()
            try:
                remove_tree(top)
            finally:
                timer.join()
                writer.kill()
                writer.wait()
        remove_tree(top)
        assert not top.exists()

    def test_patience_ends(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        top = tmp_path / "top"
        (top / "a").mkdir(parents=True)
        real = os.rmdir

        def refilled(name: str, *, dir_fd: int) -> None:
            raise OSError(39, "Directory not empty", name)

        monkeypatch.setattr(os, "rmdir", refilled)
        with pytest.raises(OSError, match="keeps being filled") as caught:
            remove_tree(top, patience_s=0.05)
        assert str(top) in str(caught.value)
        monkeypatch.setattr(os, "rmdir", real)

    def test_directories_swapped_for_links_meanwhile(self, tmp_path: Path) -> None:
        """A racer turns a directory into a link to a victim and back; the victim must survive."""
        victim = tmp_path / "victim"
        victim.mkdir()
        for number in range(50):
            (victim / f"f{number}").write_text("stays")
        done = threading.Event()
        top = tmp_path / "top"

        def race() -> None:
            while not done.is_set():
                try:
                    os.makedirs(top / "a" / "b", exist_ok=True)
                    os.rename(top / "a", top / "c")
                    os.symlink(victim, top / "a")
                    os.unlink(top / "a")
                    os.rename(top / "c", top / "a")
                except OSError:
                    pass

        racer = threading.Thread(target=race)
        racer.start()
        deadline = time.monotonic() + 0.5
        try:
            while time.monotonic() < deadline:
                with suppress(OSError):
                    remove_tree(top, patience_s=0.1)
        finally:
            done.set()
            racer.join()
        remove_tree(top)
        assert len(os.listdir(victim)) == 50

    def test_what_fails_is_named_and_the_rest_goes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        top = tmp_path / "top"
        for folder in ("a", "b", "c"):
            (top / folder).mkdir(parents=True)
            (top / folder / "f").write_text("x")
        (top / "b" / "held").write_text("x")
        real = os.unlink

        def unlink(name: str, *, dir_fd: int) -> None:
            if name == "held":
                raise PermissionError(1, "Operation not permitted", name)
            real(name, dir_fd=dir_fd)

        monkeypatch.setattr(os, "unlink", unlink)
        with pytest.raises(PermissionError) as caught:
            remove_tree(top)
        assert caught.value.filename == str(top / "b" / "held")
        assert sorted(os.listdir(top)) == ["b"]
        assert os.listdir(top / "b") == ["held"]


class TestSize:
    def test_counts_each_file_once_and_no_link(self, tmp_path: Path) -> None:
        (tmp_path / "sub").mkdir()
        (tmp_path / "f").write_bytes(b"x" * 1000)
        os.link(tmp_path / "f", tmp_path / "sub" / "again")
        (tmp_path / "sub" / "link").symlink_to("/")
        size = tree_size(tmp_path)
        assert size.bytes == 1000
        assert size.entries == 4

    def test_a_hole_takes_no_room(self, tmp_path: Path) -> None:
        with (tmp_path / "sparse").open("wb") as file:
            file.truncate(1 << 30)
        size = tree_size(tmp_path)
        assert size.bytes == 1 << 30
        assert size.disk_bytes < 1 << 20

    def test_any_depth(self, roomy: Path) -> None:
        deep(roomy / "deep", 3_000)
        assert tree_size(roomy / "deep").entries == 3_001
        remove_tree(roomy / "deep")

    def test_a_link_is_not_measured(self, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to("/")
        with pytest.raises(OSError, match=r"Not a directory|symbolic"):
            tree_size(tmp_path / "link")

    def test_an_unreadable_directory_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "a").mkdir()
        real = os.open

        def refuse(path: object, *args: object, **kwargs: object) -> int:
            if path == "a":
                raise PermissionError(13, "Permission denied", "a")
            return real(path, *args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(TreeError, match="a: Permission denied"):
            tree_size(tmp_path)


def climb(walk: Descent, levels: int) -> None:
    for _ in range(levels):
        walk.up()


class TestDescent:
    def test_a_moved_directory_is_noticed(self, tmp_path: Path) -> None:
        deep(tmp_path / "deep", 100)
        walk = Descent(os.open(tmp_path / "deep", os.O_RDONLY | os.O_DIRECTORY))
        try:
            for _ in range(100):
                walk.down("d")
            inner = tmp_path / "deep" / "/".join("d" * 40)
            inner.rename(tmp_path / "elsewhere")
            with pytest.raises(Moved):
                climb(walk, 100)
        finally:
            walk.close()

    def test_few_descriptors_for_any_depth(self, tmp_path: Path) -> None:
        deep(tmp_path / "deep", 500)
        before = open_descriptors()
        walk = Descent(os.open(tmp_path / "deep", os.O_RDONLY | os.O_DIRECTORY))
        try:
            for _ in range(500):
                walk.down("d")
            assert open_descriptors() - before <= 34
            for _ in range(500):
                assert walk.up() == "d"
            assert walk.path() == ""
        finally:
            walk.close()
        assert open_descriptors() == before

    def test_no_link_anywhere_in_a_path(self, tmp_path: Path) -> None:
        (tmp_path / "real" / "x").mkdir(parents=True)
        (tmp_path / "link").symlink_to("real")
        os.close(open_directory(tmp_path / "real" / "x"))
        with pytest.raises(OSError, match=r"Not a directory|symbolic"):
            open_directory(tmp_path / "link" / "x")
        with pytest.raises(OSError, match=r"Not a directory|symbolic"):
            open_directory(tmp_path / "link")
        with pytest.raises(ValueError, match="absolute"):
            open_directory(Path("relative"))
        os.close(open_directory(Path("/")))


def test_names_in_messages_are_printable() -> None:
    assert printable("plain/ü") == "plain/ü"
    assert printable(os.fsdecode(b"\xff")) == "\\xff"
    assert printable("a\n\x1b[31m") == "a\\n\\x1b[31m"
