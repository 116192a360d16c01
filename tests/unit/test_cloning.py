"""The way of copying is measured once for each pair of file systems, and kept."""

import json
from pathlib import Path

import pytest

from worker.errors import ResourceExhausted
from worker.images.cloning import NAME, MeasuredCloner, file_systems
from worker.images.space import Space
from worker.platform.base import CloneChoice, CloneReport

REFLINK = CloneChoice(method="reflink", shared_from=64 << 10, usec={"copy 4096": 30.0})


class Platform:
    def __init__(self, choice: CloneChoice = REFLINK, failure: OSError | None = None) -> None:
        self.choice = choice
        self.failure = failure
        self.measured: list[tuple[Path, Path]] = []
        self.cloned_by: list[CloneChoice | None] = []

    def measure_clone(self, source: Path, target: Path) -> CloneChoice:
        self.measured.append((source, target))
        if self.failure is not None:
            raise self.failure
        return self.choice

    def clone_tree(self, src: Path, dst: Path, choice: CloneChoice | None = None) -> CloneReport:
        self.cloned_by.append(choice)
        return CloneReport(method="copy", files=0, directories=1, bytes=0)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    made = tmp_path / "images", tmp_path / "containers"
    for folder in made:
        folder.mkdir()
    return made


def test_it_is_measured_once(folders: tuple[Path, Path]) -> None:
    platform = Platform()
    cloner = MeasuredCloner(platform, *folders)
    assert cloner.told() == "not measured yet"
    cloner.clone_tree(Path("a"), Path("b"))
    assert cloner.choose() == REFLINK
    assert cloner.choose() == REFLINK
    assert cloner.told() == "reflink from 64 KiB, copy below"
    cloner.clone_tree(Path("a"), Path("b"))
    assert platform.cloned_by == [None, REFLINK]
    later = MeasuredCloner(platform, *folders)
    assert later.choose() == REFLINK
    assert platform.measured == [folders]


@pytest.mark.parametrize(
    "kept",
    [
        b"",
        b"[",
        b"[" * 100_000,
        b'{"where": "elsewhere", "choice": {"method": "clonefile"}}',
        b'{"where": "WHERE", "choice": {"method": "teleport"}}',
    ],
)
def test_it_is_measured_again(folders: tuple[Path, Path], kept: bytes) -> None:
    (folders[0] / NAME).write_bytes(kept.replace(b"WHERE", file_systems(*folders).encode()))
    platform = Platform()
    assert MeasuredCloner(platform, *folders).choose() == REFLINK
    assert len(platform.measured) == 1
    assert json.loads((folders[0] / NAME).read_bytes())["where"] == file_systems(*folders)


def test_another_file_system_is_another_place(folders: tuple[Path, Path]) -> None:
    assert file_systems(*folders) == file_systems(*folders)
    assert file_systems(*folders) != file_systems(folders[0], Path("/proc"))


def test_what_cannot_be_measured_is_left_to_the_platform(folders: tuple[Path, Path]) -> None:
    platform = Platform(failure=OSError(30, "read-only"))
    cloner = MeasuredCloner(platform, *folders)
    assert cloner.choose() is None
    cloner.clone_tree(Path("a"), Path("b"))
    assert platform.cloned_by == [None]


def test_shared_blocks_need_no_room(tmp_path: Path) -> None:
    space = Space(reserve_bytes=0)
    huge = 1 << 62
    with pytest.raises(ResourceExhausted):
        space.check(tmp_path, huge, 10, "a tree")
    report = CloneReport(method="reflink", files=1, directories=1, bytes=1, shared_from=4096)
    space.learn(report)
    space.check(tmp_path, huge, 10, "a tree")
    with pytest.raises(ResourceExhausted):
        space.check(tmp_path, huge, 1 << 50, "a tree of too many files")
