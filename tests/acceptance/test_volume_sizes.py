"""Sizes of volumes, where the file system can hold them: on a btrfs of its own, with quotas switched on."""

import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.acceptance.harness import Fleet, shell
from tests.acceptance.test_volumes import CONFIG, ISOLATIONS, named, printed, volumes
from tests.file_systems import mounted, temporary_in
from worker.images.trees import remove_tree
from worker.platform.linux.sizes import Projects, Subvolumes, find_limits

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(
        os.geteuid() != 0 or not shutil.which("mkfs.btrfs") or not shutil.which("btrfs"),
        reason="needs root and btrfs-progs",
    ),
]

MIB = 1 << 20
FILL = 'dd if=/dev/zero of="$SANDFLEET_VOLUME_{name}/much" bs=64k count=64 2>&1'


@pytest.fixture(scope="module")
def disk() -> Iterator[Path]:
    with mounted(["mkfs.btrfs", "-q"]) as place:
        if place is None:
            pytest.skip("no btrfs can be mounted here")
        yield place


@pytest.fixture(scope="module")
def without(disk: Path) -> None:
    """What is found while quotas are off, and then they are on."""
    assert find_limits(disk / "tried") is None
    assert not (disk / "tried").exists()
    subprocess.run(["btrfs", "quota", "enable", str(disk)], check=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(disk: Path, without: None) -> AsyncIterator[Fleet]:
    with temporary_in(disk):
        made = Fleet(CONFIG)
    async with made:
        await made.register("base")
        yield made


@pytest.mark.parametrize("isolation", ISOLATIONS)
async def test_a_named_volume_takes_its_size_and_no_more(fleet: Fleet, cid: str, isolation: str) -> None:
    name = f"small-{isolation}"
    script = f"exec 2>&1; {FILL.format(name=name.upper().replace('-', '_'))}"
    sandbox = {"isolation": isolation, "require": ["volume_size"]}
    wanted = shell(script, storage=[named(name, "/small", size=f"{MIB}")], sandbox=sandbox)
    await fleet.client.ok(cid, "run", spec=wanted)
    told = (await fleet.client.log(cid)).data.decode()
    await fleet.client.state(cid, "exited", run=1)
    assert "quota exceeded" in told.lower()
    found = (await volumes(fleet))[name]
    assert 0.8 * MIB < found["bytes"] <= MIB
    await fleet.client.ok(cid, "remove")
    await fleet.client.ok(None, "remove_volume", name=name)
    assert not (fleet.worker.data / "volumes" / name).exists()


async def test_a_tmpfs_that_is_a_folder_takes_its_size_each_time(fleet: Fleet, cid: str) -> None:
    scratch = [{"type": "tmpfs", "target": "/scratch", "size": f"{MIB}"}]
    told = await printed(fleet, cid, FILL.format(name="SCRATCH"), "process", scratch)
    assert "quota exceeded" in told.lower()
    await fleet.client.ok(cid, "start")
    await fleet.client.state(cid, "exited", run=2)
    log = (await fleet.client.log(cid, run=2)).data.decode()
    assert log.count("15+0 records out") == 2  # of 64 KiB, with what the folder itself takes: twice as much
    await fleet.client.ok(cid, "remove")
    assert not (fleet.worker.data / "containers" / cid).exists()


async def test_one_that_is_not_held_is_no_substitute(fleet: Fleet, cid: str) -> None:
    await fleet.client.ok(None, "create_volume", name="loose")
    await fleet.client.ok(None, "create_volume", name="held", size="1Mi")
    for name, size in (("loose", MIB), ("held", 2 * MIB)):
        error = (await fleet.client.do(None, "create_volume", name=name, size=f"{size}"))["error"]
        assert (error["code"], error["field"]) == ("conflict", "size")
    await fleet.client.ok(None, "create_volume", name="held", size="1Mi")


async def test_the_node_tells_that_it_holds_them(fleet: Fleet) -> None:
    gaps = (await fleet.client.query("info"))["capabilities"]["not_enforced"]
    assert "volume_size" not in {gap["feature"] for gap in gaps}
    assert gaps


async def test_subvolumes_that_a_program_made_go_with_its_files(disk: Path, without: None) -> None:
    (disk / "tree/below").mkdir(parents=True)
    Subvolumes().make(disk / "tree/below/one", MIB, 0o700)
    (disk / "tree/below/one/file").write_bytes(b"x")
    with pytest.raises(FileExistsError):
        Subvolumes().make(disk / "tree/below/one", MIB, 0o700)
    remove_tree(disk / "tree")
    assert not (disk / "tree").exists()


async def test_projects_are_not_of_this_file_system(disk: Path) -> None:
    with pytest.raises(OSError, match=r"not supported|Function not implemented|Inappropriate"):
        Projects().make(disk / "project", MIB, 0o700)
    assert not (disk / "project").exists()
