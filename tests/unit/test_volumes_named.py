"""Named volumes on disk, how full a folder is, what a container is told, and places inside of volumes."""

import os
import threading
from pathlib import Path

import pytest

from worker.errors import Conflict, CreateFailed, NotFound
from worker.platform.base import VolumeMount
from worker.volumes import make_places
from worker.volumes_env import volume_variables
from worker.volumes_named import (
    about_named,
    create_named,
    list_named,
    make_named,
    sweep_gone,
    take_away,
    usage,
)


def test_made_once_and_remembered(tmp_path: Path) -> None:
    assert create_named(tmp_path, "data", 1024)
    assert not create_named(tmp_path, "data", None)
    assert not create_named(tmp_path, "data", 1024)
    with pytest.raises(Conflict, match="1024") as caught:
        create_named(tmp_path, "data", 2048)
    assert caught.value.field == "size"
    assert make_named(tmp_path / "plain", None)
    assert [(v.name, v.size_bytes) for v in list_named(tmp_path)] == [("data", 1024), ("plain", None)]
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700


def test_one_of_an_older_worker_is_one_too(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / ".about").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / ".about/damaged").write_text("{")
    assert [v.name for v in list_named(tmp_path)] == ["damaged", "old"]
    assert about_named(tmp_path, "old").size_bytes is None


def test_what_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link", "nothing"):
        with pytest.raises(NotFound):
            about_named(tmp_path, name)
    for name in ("file", "link"):
        with pytest.raises(CreateFailed, match="no directory"):
            make_named(tmp_path / name, None)


def test_taken_away_at_one_stroke(tmp_path: Path) -> None:
    create_named(tmp_path, "data", 1)
    (tmp_path / "data/file").write_text("x")
    gone = take_away(tmp_path, "data")
    assert (gone / "file").exists()
    assert list_named(tmp_path) == []
    with pytest.raises(NotFound):
        take_away(tmp_path, "data")
    assert create_named(tmp_path, "data", 2)  # nothing of the first is left
    sweep_gone(tmp_path)
    assert not gone.exists()
    assert (tmp_path / "data").is_dir()


def test_many_make_one(tmp_path: Path) -> None:
    made: list[bool] = []
    threads = [
        threading.Thread(target=lambda: made.append(make_named(tmp_path / "x", None))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made.count(True) == 1


def test_how_full_it_is(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(bytes(1 << 20))
    folder = tmp_path / "v"
    (folder / "deep/er").mkdir(parents=True)
    (folder / "deep/er/a").write_bytes(bytes(100_000))
    os.link(folder / "deep/er/a", folder / "b")
    (folder / "link").symlink_to(outside)
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "fifo")
    found = usage(folder, 10.0)
    assert found.complete
    assert found.files == 4  # a and b are one
    assert 100_000 <= found.bytes < 200_000


def test_no_time_to_count(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    assert not usage(tmp_path, -1.0).complete
    assert not usage(tmp_path / "nothing", 1.0).complete


def volume(kind: str, source: Path | str, target: str, **fields: object) -> VolumeMount:
    return VolumeMount(kind=kind, source=str(source), target=target, **fields)  # type: ignore[arg-type]


def test_names_of_variables() -> None:
    mounts = [
        volume("named", "/v/my-data", "/a", name="my-data"),
        volume("bind", "/srv/x", "/b/my.data"),
        volume("tmpfs", "/c/0", "/b/ünï"),
        volume("s3", "/m/files", "/MY_DATA"),
    ]
    assert volume_variables(mounts, rooted=True) == {
        "SANDFLEET_VOLUME_MY_DATA": "/a",
        "SANDFLEET_VOLUME_MY_DATA_2": "/b/my.data",
        "SANDFLEET_VOLUME__N_": "/b/ünï",
        "SANDFLEET_VOLUME_MY_DATA_3": "/MY_DATA",
    }
    assert list(volume_variables(mounts, rooted=False).values()) == [
        "/v/my-data",
        "/srv/x",
        "/c/0",
        "/m/files",
    ]


def test_places_inside_of_volumes(tmp_path: Path) -> None:
    outer, hosts = tmp_path / "outer", tmp_path / "hosts"
    for folder in (outer, hosts):
        folder.mkdir()
    (outer / "there").mkdir()
    (outer / "there/file").write_text("x")
    (outer / "out").symlink_to(tmp_path)
    make_places(
        [
            volume("named", tmp_path / "i1", "/data/deep/er", name="i1"),
            volume("named", outer, "/data", name="outer", readonly=True),
            volume("named", tmp_path / "i2", "/data/there", name="i2"),
            volume("named", tmp_path / "i3", "/data/out/planted", name="i3"),
            volume("bind", hosts, "/hosts"),
            volume("anonymous", tmp_path / "i4", "/hosts/inside"),
        ]
    )
    assert (outer / "deep/er").is_dir()
    assert (outer / "there/file").exists()
    assert os.listdir(hosts) == []
    assert not (tmp_path / "planted").exists()
