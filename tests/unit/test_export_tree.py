"""A tree as a tar archive, while somebody writes to it and whatever is in it."""

import io
import os
import socket
import subprocess
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from worker.images import export_tree
from worker.images.export_tree import tree_pieces
from worker.images.unpack import LayerFile, unpack_layers
from worker.images.unpack_model import Notes
from worker.platform.xattrs import system_xattrs

from .pack_help import SAMPLE, plant
from .unpack_help import snapshot
from .unprivileged import as_nobody, needs_root

MIB = 1 << 20


def export(top: Path, during: Callable[[int], object] = lambda number: None) -> tuple[bytes, tuple[str, ...]]:
    notes = Notes()
    fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    out = bytearray()
    try:
        for number, piece in enumerate(tree_pieces(fd, system_xattrs(), notes)):
            out += piece
            during(number)
    finally:
        os.close(fd)
    return bytes(out), notes.all()


def members(archive: bytes) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        return {member.name: member for member in opened}


def unpacked(home: Path, archive: bytes) -> Path:
    """By our own reader, which is strict."""
    (home / "layer.tar").write_bytes(archive)
    dest = home / "dest"
    dest.mkdir()
    media_type = "application/vnd.oci.image.layer.v1.tar"
    unpack_layers([LayerFile(path=home / "layer.tar", media_type=media_type)], dest)
    return dest


def test_a_tree_comes_back_as_it_was(tmp_path: Path) -> None:
    plant(tmp_path / "tree", SAMPLE)
    archive, notes = export(tmp_path / "tree")
    assert notes == ()
    tree, theirs = snapshot(tmp_path / "tree"), snapshot(unpacked(tmp_path, archive))
    del tree[""], theirs[""]
    assert theirs == tree
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        opened.extractall(tmp_path / "python", filter="fully_trusted")
    assert (tmp_path / "python/bin/tool").read_bytes() == SAMPLE["bin/tool"][1]


def test_what_is_no_file_is_left_out(tmp_path: Path) -> None:
    plant(tmp_path / "tree", {"file": b"1"})
    os.mkfifo(tmp_path / "tree/pipe")
    with socket.socket(socket.AF_UNIX) as made:
        here = os.open(tmp_path / "tree", os.O_RDONLY)
        made.bind(f"/proc/self/fd/{here}/socket")
        os.close(here)
    archive, notes = export(tmp_path / "tree")
    assert list(members(archive)) == ["file"]
    assert notes == (
        "pipe: a socket, fifo or device, left out",
        "socket: a socket, fifo or device, left out",
    )


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_bytes(b"secret")
    plant(tmp_path / "tree", {"dir": str(tmp_path / "outside"), "file": "/etc/passwd", "loop": "loop"})
    archive, _ = export(tmp_path / "tree")
    assert {m.type for m in members(archive).values()} == {tarfile.SYMTYPE}
    assert b"secret\0" not in archive


def test_holes_take_no_room(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    size = 1 << 40
    with (tmp_path / "tree/huge").open("wb") as file:
        for at in (0, 5 * MIB, size - 4096):
            file.seek(at)
            file.write(b"data" * 1024)
    with (tmp_path / "tree/hole").open("wb") as file:
        file.truncate(size)
    archive, _ = export(tmp_path / "tree")
    assert len(archive) < MIB
    found = members(archive)
    assert {name: (member.size, member.issparse()) for name, member in found.items()} == {
        "hole": (size, True),
        "huge": (size, True),
    }
    # GNU tar and our own reader agree.
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        content = opened.extractfile("huge")
        assert content is not None
        for at in (0, 5 * MIB, size - 4096):
            content.seek(at)
            assert content.read(4096) == b"data" * 1024
            content.seek(max(at - 4096, 0))
            assert content.read(4096) in (bytes(4096), b"data" * 1024)
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "-x", "-C", tmp_path / "out"], input=archive, check=True)
    assert (tmp_path / "out/huge").stat().st_size == size


@pytest.mark.parametrize("holes", [1, 5])
def test_a_sparse_file_comes_back(tmp_path: Path, holes: int) -> None:
    (tmp_path / "tree").mkdir()
    with (tmp_path / "tree/sparse").open("wb") as file:
        for number in range(holes):
            file.seek((number + 1) * MIB)
            file.write(os.urandom(5000))
        file.truncate((holes + 2) * MIB)
    archive, _ = export(tmp_path / "tree")
    dest = unpacked(tmp_path, archive)
    assert (dest / "sparse").read_bytes() == (tmp_path / "tree/sparse").read_bytes()
    assert (dest / "sparse").stat().st_blocks * 512 < (holes + 1) * MIB


def test_there_are_so_many_holes_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_tree, "_MAX_SEGMENTS", 2)
    (tmp_path / "tree").mkdir()
    with (tmp_path / "tree/sparse").open("wb") as file:
        for number in range(6):
            file.seek(number * MIB)
            file.write(b"x")
    archive, _ = export(tmp_path / "tree")
    assert (unpacked(tmp_path, archive) / "sparse").read_bytes() == (tmp_path / "tree/sparse").read_bytes()


# -- somebody writes


def test_a_file_that_shrinks_is_filled_up(tmp_path: Path) -> None:
    plant(tmp_path / "tree", {"a": os.urandom(3 * MIB), "b": b"after"})

    def shrink(number: int) -> None:
        if number == 2:
            os.truncate(tmp_path / "tree/a", 600_000)

    archive, notes = export(tmp_path / "tree", shrink)
    assert notes == ("a: changed while it was read",)
    dest = unpacked(tmp_path, archive)
    kept = (dest / "a").read_bytes()
    assert len(kept) == 3 * MIB
    assert kept[:600_000] == (tmp_path / "tree/a").read_bytes()
    assert (dest / "b").read_bytes() == b"after"


def test_a_file_that_grows_is_cut(tmp_path: Path) -> None:
    plant(tmp_path / "tree", {"a": b"x" * MIB, "b": b"after"})

    def grow(number: int) -> None:
        with (tmp_path / "tree/a").open("ab") as file:
            file.write(b"y" * 1000)

    archive, notes = export(tmp_path / "tree", grow)
    assert notes == ()
    assert (unpacked(tmp_path, archive) / "a").read_bytes() == b"x" * MIB


def test_what_vanishes_is_left_out(tmp_path: Path) -> None:
    tree = {f"d{number}/f{other}": b"1" for number in range(5) for other in range(5)}
    plant(tmp_path / "tree", tree)

    def remove(number: int) -> None:
        if number == 4:
            for path in ("d0/f4", "d3/f0", "d4/f0", "d4/f1", "d4/f2", "d4/f3", "d4/f4"):
                (tmp_path / "tree" / path).unlink()
            (tmp_path / "tree/d4").rmdir()
            (tmp_path / "tree/d3/f0").symlink_to("/etc")
            os.rename(tmp_path / "tree/d2", tmp_path / "tree/moved")

    archive, _ = export(tmp_path / "tree", remove)
    found = members(archive)
    assert {"d0/f0", "d1/f4", "d3/f1"} <= set(found)
    assert not {"d4", "d4/f0", "d2"} & set(found)
    assert found["d3/f0"].type == tarfile.SYMTYPE


def test_a_busy_writer_does_no_harm(tmp_path: Path) -> None:
    """Every kind of change at once, for as long as it lasts; the archive is whole each time."""
    top = tmp_path / "tree"
    plant(top, {f"d/{number}": os.urandom(20_000) for number in range(200)})
    over = threading.Event()

    def write() -> None:
        number = 0
        while not over.is_set():
            number = (number + 1) % 200
            path = top / "d" / str(number)
            path.unlink(missing_ok=True)
            kind = number % 4
            if kind == 0:
                path.symlink_to("/etc/passwd")
            elif kind == 1:
                path.write_bytes(b"x" * (number * 300))
            elif kind == 2:
                os.mkfifo(path)
            else:
                path.write_bytes(b"y" * 30_000)
                os.truncate(path, number)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for number in range(5):
            archive, _ = export(top)
            (tmp_path / str(number)).mkdir()
            unpacked(tmp_path / str(number), archive)
            assert "root:" not in archive.decode("latin-1")
    finally:
        over.set()
        writer.join()


@needs_root
def test_what_may_not_be_read_is_told(tmp_path: Path) -> None:
    def look(home: Path) -> None:
        plant(home / "tree", {"closed/in": b"1", "open/in": b"2", "file": b"3"})
        (home / "tree/closed").chmod(0)
        (home / "tree/file").chmod(0)
        archive, notes = export(home / "tree")
        (home / "tree/closed").chmod(0o700)
        assert list(members(archive)) == ["open", "open/in"]
        assert notes == ("file: cannot be read, left out", "closed: cannot be read, left out")

    as_nobody(look, tmp_path)


def test_a_deep_tree(tmp_path: Path) -> None:
    top = tmp_path / "tree"
    top.mkdir()
    here = os.open(top, os.O_RDONLY)
    for _ in range(300):
        os.mkdir("d" * 20, dir_fd=here)
        deeper = os.open("d" * 20, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
    os.close(here)
    archive, _ = export(top)
    assert len(members(archive)) == 300
