"""Volumes as links in a rootfs that somebody else filled."""

import os
from pathlib import Path

import pytest

from worker.errors import CreateFailed, Unsupported
from worker.platform.base import VolumeMount
from worker.volumes import empty_tmpfs, mount_volumes


def bind(source: Path, target: str) -> VolumeMount:
    return VolumeMount(kind="bind", source=str(source), target=target)


def test_a_target_is_made_and_leads_to_the_source(tmp_path: Path) -> None:
    rootfs, source = tmp_path / "rootfs", tmp_path / "source"
    rootfs.mkdir()
    source.mkdir()
    (source / "x").write_text("1")
    mount_volumes([bind(source, "/var/lib/data")], rootfs)
    assert (rootfs / "var/lib/data/x").read_text() == "1"


def test_what_the_image_has_there_is_covered(tmp_path: Path) -> None:
    rootfs, source = tmp_path / "rootfs", tmp_path / "source"
    (rootfs / "data/sub").mkdir(parents=True)
    (rootfs / "data/sub/old").write_text("old")
    source.mkdir()
    mount_volumes([bind(source, "/data")], rootfs)
    assert os.listdir(rootfs / "data") == []


def test_a_link_of_the_image_leads_nowhere_outside(tmp_path: Path) -> None:
    rootfs, source, outside = tmp_path / "rootfs", tmp_path / "source", tmp_path / "outside"
    for folder in (rootfs, source, outside):
        folder.mkdir()
    (rootfs / "var").symlink_to(outside)
    (rootfs / "up").symlink_to("../../../../..")
    (rootfs / "abs").symlink_to("/etc")
    mount_volumes([bind(source, "/var/data"), bind(source, "/up/data"), bind(source, "/abs/data")], rootfs)
    assert os.listdir(outside) == []
    assert not Path("/etc/data").exists()
    assert (rootfs / "etc/data").is_symlink() or (rootfs / "abs/data").exists()


def test_nested_targets_are_refused_by_name(tmp_path: Path) -> None:
    rootfs = tmp_path / "rootfs"
    rootfs.mkdir()
    with pytest.raises(Unsupported, match="/a/b"):
        mount_volumes([bind(tmp_path, "/a/b"), bind(tmp_path, "/a")], rootfs)


def test_the_root_itself_cannot_be_covered(tmp_path: Path) -> None:
    with pytest.raises(CreateFailed):
        mount_volumes([bind(tmp_path, "/")], tmp_path)


def test_own_sources_are_made_and_a_tmpfs_begins_empty(tmp_path: Path) -> None:
    rootfs = tmp_path / "rootfs"
    rootfs.mkdir()
    kept = VolumeMount(kind="named", source=str(tmp_path / "v/named"), target="/keep")
    scratch = VolumeMount(kind="tmpfs", source=str(tmp_path / "v/0"), target="/scratch", mode=0o750)
    mount_volumes([kept, scratch], rootfs)
    assert (tmp_path / "v/0").stat().st_mode & 0o777 == 0o750
    for name in ("keep", "scratch"):
        (rootfs / name / "file").write_text("x")
    empty_tmpfs([kept, scratch])
    assert (rootfs / "keep/file").exists()
    assert not (rootfs / "scratch/file").exists()
