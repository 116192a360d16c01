"""What folders take up: counted once, without leaving them, while others write."""

import os
from pathlib import Path

import pytest

from worker.disk_use import KEPT_S, DiskMeter, tree_bytes
from worker.images.keeping import Use

BLOCKS = 1 << 20
NO_IMAGES = Use(images=2, bytes=30, reclaimable=10)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for folder in (
        "containers/web-0/rootfs",
        "containers/web-0/state",
        "volumes/v",
        "volumes/.about",
        "spool",
    ):
        (tmp_path / folder).mkdir(parents=True)
    return tmp_path


def fill(path: Path, size: int = BLOCKS) -> Path:
    path.write_bytes(b"x" * size)
    return path


def test_a_tree(tmp_path: Path) -> None:
    top = tmp_path / "top"
    (top / "deep" / "er").mkdir(parents=True)
    empty = tree_bytes(top)
    fill(top / "deep" / "er" / "file")
    os.link(top / "deep" / "er" / "file", top / "same")
    with (top / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    outside = tmp_path / "outside"
    outside.mkdir()
    fill(outside / "big", 8 * BLOCKS)
    (top / "link").symlink_to(outside)
    (top / "deep" / "link").symlink_to("/")
    assert BLOCKS <= tree_bytes(top) - empty < 2 * BLOCKS


def test_what_is_not_there_takes_nothing(tmp_path: Path) -> None:
    assert tree_bytes(tmp_path / "missing") == 0
    (tmp_path / "link").symlink_to(tmp_path)
    assert tree_bytes(tmp_path / "link") == 0
    fill(tmp_path / "file")
    assert tree_bytes(tmp_path / "file") == 0


def test_what_goes_meanwhile_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        fill(tmp_path / name / "f")
    scandir = os.scandir

    def vanishing(fd: int):  # type: ignore[no-untyped-def]
        found = scandir(fd)
        for name in ("a", "b"):
            if (tmp_path / name / "f").exists():
                (tmp_path / name / "f").unlink()
                (tmp_path / name).rmdir()
        return found

    monkeypatch.setattr("worker.disk_use.os.scandir", vanishing)
    assert BLOCKS <= tree_bytes(tmp_path) < 2 * BLOCKS


def test_everything_by_its_kind(data: Path) -> None:
    meter = DiskMeter(data)
    before = meter.measure(NO_IMAGES, ["web-0"], "copy", refresh=False)
    fill(data / "containers/web-0/rootfs/f")
    fill(data / "containers/web-0/state/stdout", 2 * BLOCKS)
    fill(data / "volumes/v/f", 3 * BLOCKS)
    fill(data / "volumes/.about/v", 4 * BLOCKS)
    after = meter.measure(NO_IMAGES, ["web-0"], "copy", refresh=True)
    assert (after.images.count, after.images.bytes, after.images.reclaimable) == (2, 30, 10)
    grown = [
        getattr(after, kind).bytes - getattr(before, kind).bytes for kind in ("containers", "logs", "volumes")
    ]
    assert [size // BLOCKS for size in grown] == [1, 2, 3]
    assert (after.containers.count, after.volumes.count) == (1, 1)
    assert after.clone == "copy"
    assert after.free <= after.total


def test_what_was_counted_is_kept_for_a_while(data: Path) -> None:
    now = 0.0
    meter = DiskMeter(data, monotonic=lambda: now)
    first = meter.measure(NO_IMAGES, ["web-0"], "copy", refresh=False)
    fill(data / "containers/web-0/rootfs/f")
    now = KEPT_S
    kept = meter.measure(NO_IMAGES, ["web-0"], "copy", refresh=False)
    assert (kept.containers.bytes, kept.measured_at) == (first.containers.bytes, first.measured_at)
    now = KEPT_S + 1
    assert (
        meter.measure(NO_IMAGES, ["web-0"], "copy", refresh=False).containers.bytes > first.containers.bytes
    )
    # A container that is gone is forgotten, and counted anew when there is one of its name again.
    meter.measure(NO_IMAGES, [], "copy", refresh=False)
    fill(data / "containers/web-0/rootfs/g")
    assert (
        meter.measure(NO_IMAGES, ["web-0"], "copy", refresh=False).containers.bytes
        > kept.containers.bytes + BLOCKS
    )
