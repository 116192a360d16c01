import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loguru import logger

from worker import datadir, node_file
from worker.datadir import DataDir
from worker.errors import Configuration, CreateFailed, InvalidCommand
from worker.ids import new_ulid

HERE = "a" * 32
THERE = "b" * 32


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    lines: list[str] = []
    number = logger.add(lambda message: lines.append(message.record["message"]), level="WARNING")
    yield lines
    logger.remove(number)


def open_dir(root: Path, node: str | None = "node-1", machine: str | None = HERE, **options: Any) -> DataDir:
    return DataDir.open(root, node=node, machine=lambda: machine, **options)


def refused(root: Path, **options: Any) -> str:
    with pytest.raises(Configuration) as caught:
        open_dir(root, **options)
    assert "\n" not in caught.value.message
    return caught.value.message


def modes(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): stat.S_IMODE(path.lstat().st_mode) for path in root.rglob("*")}


# -- layout


def test_the_layout(root: Path) -> None:
    old = os.umask(0)
    try:
        with open_dir(root) as data:
            assert (data.node, data.machine_id, data.epoch) == ("node-1", HERE, None)
            assert data.journal_path == root / "worker.db"
    finally:
        os.umask(old)
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    folders = dict.fromkeys(("images", "volumes", "mirrors", "containers", "spool", "secrets"), 0o700)
    files = dict.fromkeys(("worker.lock", "node.json", "launcher.key"), 0o600)
    assert modes(root) == folders | files


def test_opening_again_changes_nothing(root: Path) -> None:
    open_dir(root).close()
    before = {
        path: path.read_bytes() for path in root.iterdir() if path.is_file() and path.name != "worker.lock"
    }
    with open_dir(root, node=None) as data:
        assert data.node == "node-1"
    assert {path: path.read_bytes() for path in before} == before


def test_it_makes_the_folders_above(tmp_path: Path) -> None:
    open_dir(tmp_path / "a" / "b" / "c").close()


def test_a_link_to_it_is_the_operators(root: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    root.symlink_to(tmp_path / "disk")
    with open_dir(root) as data:
        assert data.root == tmp_path / "disk"


def test_the_key_is_random_and_stays(root: Path, tmp_path: Path) -> None:
    with open_dir(root) as data:
        key = data.key_path.read_text()
        assert re.fullmatch("[0-9a-f]{64}", key)
    with open_dir(root) as data:
        assert data.key_path.read_text() == key
    with open_dir(tmp_path / "other") as data:
        assert data.key_path.read_text() != key


def test_a_key_that_is_none(root: Path) -> None:
    open_dir(root).close()
    (root / "launcher.key").write_text("")
    assert "holds no key" in refused(root)


def test_containers(root: Path) -> None:
    with open_dir(root) as data:
        dirs = data.container("web-0")
        dirs.make()
        assert dirs.root == root / "containers" / "web-0"
        assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in dirs.root.iterdir()} == {
            "tmp": 0o700,
            "state": 0o700,
        }
        assert dirs.rootfs == dirs.root / "rootfs"
        with pytest.raises(CreateFailed, match="File exists"):
            dirs.make()


@pytest.mark.parametrize(
    "cid", ["..", "../web-0", "web", "web-0/..", "web-01", "", "web-0\0", "WEB-0", "/web-0"]
)
def test_no_name_leads_out(root: Path, cid: str) -> None:
    with open_dir(root) as data, pytest.raises(InvalidCommand):
        data.container(cid)


# -- one worker


def test_a_second_worker_is_told_who_holds_it(root: Path) -> None:
    with open_dir(root):
        assert f"another worker (pid {os.getpid()}) uses {root}" in refused(root)
    open_dir(root).close()


def test_the_lock_goes_with_the_process(root: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from worker.datadir import DataDir;"
        "DataDir.open(Path(sys.argv[1]), node='node-1', machine=lambda: 'a' * 32);"
        "print('open', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        assert f"(pid {child.pid})" in refused(root)
    finally:
        child.kill()
        child.communicate()
    open_dir(root).close()


def test_a_refused_opening_gives_the_lock_back(root: Path) -> None:
    open_dir(root).close()
    refused(root, node="other")
    open_dir(root).close()


def test_a_program_started_by_the_worker_does_not_keep_the_lock(root: Path) -> None:
    data = open_dir(root)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    try:
        data.close()
        open_dir(root).close()
    finally:
        child.communicate(b"\n")


# -- binding


def test_another_name(root: Path) -> None:
    open_dir(root).close()
    message = refused(root, node="other")
    assert "belongs to node 'node-1', not to 'other'" in message
    assert "--takeover" in message
    with open_dir(root, node="other", takeover=True) as data:
        assert data.node == "other"
    with open_dir(root, node=None) as data:
        assert data.node == "other"


def test_another_machine(root: Path) -> None:
    open_dir(root).close()
    message = refused(root, machine=THERE)
    assert "was made on another machine" in message
    assert "--takeover" in message
    open_dir(root, machine=THERE, takeover=True).close()
    open_dir(root, machine=THERE).close()
    assert "another machine" in refused(root, machine=HERE)


def test_a_machine_without_an_id_gets_one_that_stays(root: Path) -> None:
    with open_dir(root, machine=None) as data:
        made = data.machine_id
        assert made.startswith("made-")
    with open_dir(root, machine=None) as data:
        assert data.machine_id == made
    with open_dir(root, machine=HERE) as data:  # it has got one now
        assert data.machine_id == HERE
    open_dir(root, machine=None).close()
    assert "another machine" in refused(root, machine=THERE)


def test_the_epoch_is_remembered(root: Path) -> None:
    epoch = new_ulid()
    with open_dir(root) as data:
        data.bind_epoch(epoch)
        assert data.epoch == epoch
    with open_dir(root) as data:
        assert data.epoch == epoch
        node_json = root / "node.json"
        before = node_json.stat().st_ino
        data.bind_epoch(epoch)
        assert node_json.stat().st_ino == before


def test_the_host_gives_the_name(root: Path, tmp_path: Path) -> None:
    with open_dir(root, node=None, hostname="mac.local") as data:
        assert data.node == "mac"
    with open_dir(root, node=None, hostname="renamed") as data:
        assert data.node == "mac"
    with open_dir(tmp_path / "other", node=None, machine=None, hostname="localhost") as data:
        assert re.fullmatch("node-[0-9a-f]{8}", data.node)


@pytest.mark.parametrize("name", ["", "a b", "a.b", "x" * 65, "a\n"])
def test_a_name_that_is_none(root: Path, name: str) -> None:
    assert "is no node name" in refused(root, node=name)
    assert not root.exists()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"name": 1, "machine_id": "x"}', b'{"name": "a"}', b"\xff"]
)
def test_a_node_file_that_cannot_be_understood(root: Path, content: bytes) -> None:
    open_dir(root).close()
    (root / "node.json").write_bytes(content)
    message = refused(root)
    assert "cannot be understood" in message
    assert str(root / "node.json") in message


def test_a_node_file_of_a_newer_worker(root: Path) -> None:
    open_dir(root).close()
    path = root / "node.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    assert "newer worker" in refused(root)


def test_a_journal_without_its_node_file(root: Path) -> None:
    open_dir(root).close()
    (root / "node.json").unlink()
    (root / "worker.db").write_bytes(b"")
    assert "holds a journal but no node.json" in refused(root)
    open_dir(root, takeover=True).close()


# -- what is not ours


def test_a_folder_of_someone_elses_things_is_left_alone(root: Path) -> None:
    root.mkdir(mode=0o755)
    (root / "thesis.txt").write_text("words")
    assert "it holds 'thesis.txt' and no node.json" in refused(root)
    assert modes(root) == {"thesis.txt": 0o644}
    assert stat.S_IMODE(root.stat().st_mode) == 0o755


def test_what_a_crash_of_the_first_start_left_is_taken_up(root: Path) -> None:
    root.mkdir()
    for name in ("worker.lock", "node.json.new", "probe.new", "launcher.key.new"):
        (root / name).write_text("")
    (root / "secrets").mkdir()
    (root / "lost+found").mkdir()
    open_dir(root).close()
    assert not [path for path in root.iterdir() if path.name.endswith(".new")]


def test_a_file_in_its_place(root: Path) -> None:
    root.write_text("")
    assert "is no directory" in refused(root)
    assert "Not a directory" in refused(root / "below")


def test_a_link_inside_is_not_followed(root: Path, tmp_path: Path) -> None:
    open_dir(root).close()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o755)
    (root / "volumes").rmdir()
    (root / "volumes").symlink_to(elsewhere)
    assert f"{root / 'volumes'} is a link" in refused(root)
    (root / "volumes").unlink()
    (root / "images").rmdir()
    (root / "images").write_text("")
    assert "is no directory" in refused(root)
    assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o755


@pytest.mark.parametrize("name", ["worker.lock", "launcher.key", "node.json", "worker.db"])
def test_a_file_that_is_a_link(root: Path, tmp_path: Path, name: str) -> None:
    open_dir(root).close()
    (root / name).unlink(missing_ok=True)
    (root / name).symlink_to(tmp_path / "target")
    assert str(root / name) in refused(root)
    assert not (tmp_path / "target").exists()


def test_loose_modes_are_tightened(root: Path, warnings: list[str]) -> None:
    open_dir(root).close()
    root.chmod(0o755)
    (root / "images").chmod(0o777)
    (root / "node.json").chmod(0o644)
    open_dir(root).close()
    assert (stat.S_IMODE(root.stat().st_mode), modes(root)["images"], modes(root)["node.json"]) == (
        0o700,
        0o700,
        0o600,
    )
    assert len(warnings) == 3
    assert warnings[0] == f"{root} was open to others (mode 0755), now 0700"


def test_a_key_that_others_could_read_is_made_anew(root: Path) -> None:
    open_dir(root).close()
    key = root / "launcher.key"
    old = key.read_text()
    key.chmod(0o640)
    open_dir(root).close()
    assert key.read_text() != old
    assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_another_users_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_dir(root).close()
    owner = root.stat().st_uid
    monkeypatch.setattr(datadir.os, "geteuid", lambda: owner + 1)
    message = refused(root)
    assert f"belongs to uid {owner}, the worker runs as uid {owner + 1}" in message


# -- disks


def test_too_little_space(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datadir, "MIN_FREE_BYTES", 1 << 60)
    assert "make space" in refused(root)


def test_a_disk_that_fills_up(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(node_file.os, "fsync", full)
    assert f"the disk of {root} is full: make space, or use another --data-dir" in refused(root)
    monkeypatch.undo()
    open_dir(root).close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        assert f"uid {os.geteuid()} may not write" in refused(tmp_path / "data")
    finally:
        tmp_path.chmod(0o700)


def mount(*arguments: str) -> int:
    return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir(mode=0o700)
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root")
    if mount("-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs", str(place)) != 0:
        pytest.skip("may not mount here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.root
def test_a_disk_that_is_small_full_or_read_only(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"{small_disk} has 0 MiB free, a worker needs 16: make space" in refused(small_disk)
    monkeypatch.setattr(datadir, "MIN_FREE_BYTES", 0)
    open_dir(small_disk).close()
    with (small_disk / "images" / "filler").open("wb", buffering=0) as filler:
        while os.statvfs(small_disk).f_bavail:
            filler.write(bytes(4096))
    assert f"the disk of {small_disk} is full" in refused(small_disk)
    (small_disk / "images" / "filler").unlink()
    assert mount("-o", "remount,ro", str(small_disk)) == 0
    assert "is on a read-only disk: make it writable, or use another --data-dir" in refused(small_disk)


# -- sockets


def deep(tmp_path: Path) -> Path:
    return tmp_path / ("d" * 60) / ("e" * 60)


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as name:
        yield Path(name)


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def test_a_short_path_keeps_its_socket(runtime_dir: Path) -> None:
    with open_dir(runtime_dir / "data") as data:
        assert data.launcher_socket == runtime_dir / "data" / "launcher.sock"
        bind(data.launcher_socket)


def test_a_long_path_moves_its_socket(tmp_path: Path, runtime_dir: Path) -> None:
    env = {"XDG_RUNTIME_DIR": str(runtime_dir)}
    with open_dir(deep(tmp_path), env=env) as data:
        path = data.launcher_socket
        assert path.parent.parent == runtime_dir
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        bind(path)
        assert json.loads((data.root / "node.json").read_text())["socket_dir"] == str(path.parent)
    with open_dir(deep(tmp_path), env={}) as data:  # found again although the environment differs
        assert data.launcher_socket == path
        path.unlink()
    assert not path.parent.exists()
    with open_dir(deep(tmp_path), env=env) as data:
        assert data.launcher_socket == path
        assert path.parent.is_dir()


def test_without_a_runtime_dir_it_is_tmp(tmp_path: Path) -> None:
    with open_dir(deep(tmp_path), env={"XDG_RUNTIME_DIR": "relative"}) as data:
        assert data.launcher_socket.parent.parent == Path("/tmp")
    assert not data.launcher_socket.parent.exists() or not list(data.launcher_socket.parent.iterdir())
    shutil.rmtree(data.launcher_socket.parent)


def test_two_directories_have_two_places(tmp_path: Path, runtime_dir: Path) -> None:
    env = {"XDG_RUNTIME_DIR": str(runtime_dir)}
    with open_dir(deep(tmp_path / "1"), env=env) as one, open_dir(deep(tmp_path / "2"), env=env) as two:
        assert one.launcher_socket != two.launcher_socket


@pytest.mark.parametrize("trick", ["link", "open", "file"])
def test_a_place_prepared_by_someone_else_is_passed_over(
    tmp_path: Path, runtime_dir: Path, trick: str
) -> None:
    env = {"XDG_RUNTIME_DIR": str(runtime_dir)}
    with open_dir(deep(tmp_path), env=env) as data:
        place = data.launcher_socket.parent
    target = tmp_path / "target"
    target.mkdir(mode=0o700)
    if trick == "link":
        place.symlink_to(target)
    elif trick == "open":
        place.mkdir()
        place.chmod(0o755)
    else:
        place.write_text("")
    with open_dir(deep(tmp_path), env=env) as data:
        found = data.launcher_socket.parent
        assert found != place
        assert stat.S_IMODE(found.lstat().st_mode) == 0o700
        assert data.launcher_socket.parent == found


def test_a_runtime_dir_that_others_can_change_is_passed_over(tmp_path: Path, runtime_dir: Path) -> None:
    runtime_dir.chmod(0o777)
    with open_dir(deep(tmp_path), env={"XDG_RUNTIME_DIR": str(runtime_dir)}) as data:
        assert data.launcher_socket.parent.parent == Path("/tmp")
