"""The files of a container of another user: all of them are its own, it can reach them, and nothing else opens."""

import os
from pathlib import Path

import pytest

from worker.datadir import DataDir
from worker.errors import CreateFailed
from worker.owners import first_closed, give_tree, hand_over, let_pass
from worker.platform.base import RunAs, SandboxPolicy, VolumeMount

from .unprivileged import needs_root

pytestmark = needs_root

USER = RunAs(uid=4711, gid=4712)


@pytest.fixture
def data(tmp_path: Path):  # type: ignore[no-untyped-def]
    # pytest's own folders are closed to others.
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o001 == 0:
            folder.chmod(folder.stat().st_mode | 0o011)
    with DataDir.open(tmp_path / "data", node="n1") as made:
        yield made


def policy(data: DataDir, isolation: str = "process", *volumes: VolumeMount) -> SandboxPolicy:
    dirs = data.container("web-0")
    dirs.make()
    dirs.rootfs.mkdir(mode=0o700)
    for volume in volumes:
        Path(volume.source).mkdir(parents=True, exist_ok=True)
    return SandboxPolicy(
        container="web-0",
        instance="i",
        isolation=isolation,
        user=USER,
        rootfs=str(dirs.rootfs),
        tmp=str(dirs.tmp),
        state_dir=str(dirs.state),
        volumes=volumes,
    )


def owner(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_uid, found.st_gid


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_tree(tmp_path: Path) -> None:
    top, outside = tmp_path / "top", tmp_path / "outside"
    (top / "a" / "b").mkdir(parents=True)
    outside.mkdir()
    (outside / "f").write_text("x")
    (top / "a" / "f").write_text("x")
    (top / "a" / "b").chmod(0)
    (top / "out").symlink_to(outside)
    (top / "file-out").symlink_to(outside / "f")
    give_tree(top, USER)
    for path in (top, top / "a", top / "a" / "b", top / "a" / "f", top / "out", top / "file-out"):
        assert owner(path) == (4711, 4712), path
    for path in (outside, outside / "f"):
        assert owner(path) == (0, 0), path


def test_what_is_opened_and_what_is_not(data: DataDir) -> None:
    made = policy(data)
    dirs = data.container("web-0")
    hand_over(made, dirs, data)
    assert [mode(path) for path in (data.root, data.containers, data.volumes)] == [0o711] * 3
    assert (mode(dirs.root), owner(dirs.root)) == (0o710, (0, 4712))
    assert (mode(dirs.tmp), owner(dirs.tmp)) == (0o700, (4711, 4712))
    assert (mode(dirs.rootfs), owner(dirs.rootfs)) == (0o700, (4711, 4712))
    for closed in (dirs.state, data.images, data.spool, data.secrets):
        assert (mode(closed), owner(closed)) == (0o700, (0, 0))


def test_a_root_of_its_own_needs_no_way(data: DataDir) -> None:
    dirs = data.container("web-0")
    hand_over(policy(data, "rootfs"), dirs, data)
    assert [mode(path) for path in (data.root, data.containers, dirs.root)] == [0o700] * 3
    assert owner(dirs.rootfs) == (4711, 4712)


def test_nothing_happens_without_a_user(data: DataDir) -> None:
    made = policy(data)
    hand_over(SandboxPolicy(container="web-0", instance="i", rootfs=made.rootfs, tmp=made.tmp, state_dir=""),
              data.container("web-0"), data)  # fmt: skip
    assert mode(data.root) == 0o700
    assert owner(Path(made.rootfs)) == (0, 0)


def test_volumes_are_given_while_they_are_empty(data: DataDir, tmp_path: Path) -> None:
    own = data.container("web-0").root / "volumes"
    kinds = {
        "bind": tmp_path / "host",
        "named": data.volumes / "fresh",
        "anonymous": own / "0",
        "tmpfs": own / "1",
    }
    mounts = [VolumeMount(kind=kind, source=str(path), target=f"/{kind}") for kind, path in kinds.items()]  # type: ignore[arg-type]
    full = data.volumes / "full"
    full.mkdir()
    (full / "kept").write_text("x")
    mounts.append(VolumeMount(kind="named", source=str(full), target="/full"))
    hand_over(policy(data, "process", *mounts), data.container("web-0"), data)
    assert owner(kinds["bind"]) == (0, 0)
    assert owner(full) == (0, 0)
    for kind in ("named", "anonymous", "tmpfs"):
        assert owner(kinds[kind]) == (4711, 4712), kind


def test_a_closed_folder_above_is_told(data: DataDir) -> None:
    closed = data.root.parent
    made = policy(data)
    closed.chmod(0o700)
    with pytest.raises(CreateFailed, match="cannot pass") as failure:
        hand_over(made, data.container("web-0"), data)
    assert failure.value.field == "spec.user"
    assert str(closed) in failure.value.message


def test_who_passes_where(tmp_path: Path) -> None:
    place = tmp_path / "place"
    (place / "below").mkdir(parents=True)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o001 == 0:
            folder.chmod(folder.stat().st_mode | 0o011)
    os.chown(place, 4711, 4712)
    for bits, uid, gid, closed in (
        (0o700, 4711, 1, False),
        (0o077, 4711, 4712, True),
        (0o070, 1, 4712, False),
        (0o707, 1, 4712, True),
        (0o001, 1, 1, False),
        (0o770, 1, 1, True),
    ):
        place.chmod(bits)
        found = first_closed(place / "below", RunAs(uid=uid, gid=gid))
        assert found == (place if closed else None), oct(bits)


def test_a_new_worker_leaves_the_way_open(data: DataDir) -> None:
    hand_over(policy(data), data.container("web-0"), data)
    data.close()
    data.images.chmod(0o711)
    with DataDir.open(data.root, node="n1") as again:
        assert [mode(path) for path in (again.root, again.containers, again.volumes)] == [0o711] * 3
        # What no container passes through is tightened as ever, and listing always is.
        assert mode(again.images) == 0o700
    data.containers.chmod(0o755)
    with DataDir.open(data.root, node="n1") as again:
        assert mode(again.containers) == 0o700
        let_pass(again)
        assert mode(again.containers) == 0o711
