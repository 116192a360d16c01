"""What the store keeps and lets go: containers, age, size, the limit, and many at once."""

import asyncio
import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from worker.errors import Conflict, NotFound
from worker.images.store import ImageInfo, ImageStore
from worker.platform.base import CloneReport

pytestmark = pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="clones with the Linux driver")


class Cloner:
    def clone_tree(self, src: Path, dst: Path) -> CloneReport:
        from worker.platform.linux.clone import clone_tree

        return clone_tree(src, dst)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., ImageStore]]:
    with ExitStack() as stack:

        def open_store(**options: Any) -> ImageStore:
            store = ImageStore.open(tmp_path / "images", Cloner(), **options)
            stack.callback(store.close)
            return store

        yield open_store


@pytest.fixture
def store(opened: Callable[..., ImageStore]) -> ImageStore:
    return opened()


async def make(
    store: ImageStore, folder: Path, name: str, size: int = 1000, *, age_s: float = 0
) -> ImageInfo:
    """An image of so many bytes, last used so long ago."""
    source = folder / f"source-{name}"
    source.mkdir()
    (source / "data").write_bytes(os.urandom(size))
    info = await store.register(name, source)
    use(store, info, age_s)
    return info


def use(store: ImageStore, info: ImageInfo, age_s: float) -> None:
    at = (datetime.now(UTC) - timedelta(seconds=age_s)).timestamp()
    os.utime(store.layout.blob_path(info.digest), (at, at))


def names(store: ImageStore) -> list[str]:
    return [entry.name for entry in store.list()]


async def test_prune_by_age(store: ImageStore, tmp_path: Path) -> None:
    old = await make(store, tmp_path, "old", age_s=1000)
    await make(store, tmp_path, "new", age_s=10)
    assert (await store.prune()).images == ()
    pruned = await store.prune(older_than_s=100)
    assert [(image.name, image.digest, image.bytes) for image in pruned.images] == [("old", old.digest, 1000)]
    assert pruned.bytes > 1000
    assert names(store) == ["new"]
    with pytest.raises(NotFound):
        store.resolve("old")


async def test_all_names_of_an_image_go_together(store: ImageStore, tmp_path: Path) -> None:
    old = await make(store, tmp_path, "old")
    await store.tag("old", "older")
    use(store, old, 1000)
    pruned = await store.prune(older_than_s=100)
    assert [(image.name, image.bytes) for image in pruned.images] == [("old", 1000), ("older", 0)]
    assert names(store) == []


async def test_prune_to_a_size(store: ImageStore, tmp_path: Path) -> None:
    for number, name in enumerate(("c", "a", "b")):
        await make(store, tmp_path, name, 100_000, age_s=100 - number)
    await store.prune(keep_bytes=220_000)
    assert names(store) == ["a", "b"]
    await store.prune(keep_bytes=0)
    assert names(store) == []


async def test_a_container_keeps_its_image_and_its_use_counts(store: ImageStore, tmp_path: Path) -> None:
    used = await make(store, tmp_path, "used", age_s=1000)
    await store.clone(used.digest, tmp_path / "root", container="web-0")
    (entry,) = store.list()
    assert entry.containers == 1
    assert entry.last_used_at is not None
    assert (datetime.now(UTC) - entry.last_used_at).total_seconds() < 500
    use(store, used, 1000)
    await store.prune(older_than_s=1, keep_bytes=0)
    assert names(store) == ["used"]
    with pytest.raises(Conflict):
        await store.remove("used")
    # When the container goes, the image was used until now.
    store.let_go("web-0")
    store.let_go("web-0")
    assert (await store.prune(older_than_s=100)).images == ()
    use(store, used, 1000)
    assert len((await store.prune(older_than_s=100)).images) == 1


async def test_the_last_use_outlives_the_worker(opened: Callable[..., ImageStore], tmp_path: Path) -> None:
    first = opened()
    await make(first, tmp_path, "old", age_s=1000)
    first.close()
    second = opened()
    (entry,) = second.list()
    assert entry.last_used_at is not None
    assert 900 < (datetime.now(UTC) - entry.last_used_at).total_seconds() < 1500
    second.keep_for("web-0", entry.digest)
    assert (await second.prune(older_than_s=1)).images == ()


async def test_a_clone_that_fails_leaves_no_claim(store: ImageStore, tmp_path: Path) -> None:
    info = await make(store, tmp_path, "app")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(Exception, match="cannot clone"):
        await store.clone(info.digest, tmp_path / "taken", container="web-0")
    assert store.list()[0].containers == 0
    await store.remove("app")


async def test_the_limit(opened: Callable[..., ImageStore], tmp_path: Path) -> None:
    store = opened(max_bytes=250_000)
    for number, name in enumerate(("a", "b", "c")):
        await make(store, tmp_path, name, 100_000, age_s=100 - number)
    fresh = store.resolve("c").digest
    pruned = await store.evict(spare=fresh)
    assert [image.name for image in pruned.images] == ["a"]
    assert (await store.evict()).images == ()
    # Used ones and the one that has just come stay, whatever the limit.
    big = await make(store, tmp_path, "big", 400_000, age_s=1000)
    await store.clone(store.resolve("b").digest, tmp_path / "root", container="web-0")
    pruned = await store.evict(spare=big.digest)
    assert [image.name for image in pruned.images] == ["c"]
    assert names(store) == ["b", "big"]
    use_now = await store.use()
    assert use_now.images == 2
    assert use_now.bytes > 500_000
    assert 400_000 <= use_now.reclaimable < 450_000


async def test_without_a_limit_nothing_goes(store: ImageStore, tmp_path: Path) -> None:
    await make(store, tmp_path, "a", age_s=1e6)
    assert (await store.evict()).images == ()


async def test_creates_prunes_and_registrations_race(
    opened: Callable[..., ImageStore], tmp_path: Path
) -> None:
    """Whatever the order: no container loses its image, no clone is half of one, and the store is sound after."""
    store = opened(max_bytes=400_000)
    chance = random.Random(7)
    sources = []
    for number in range(4):
        source = tmp_path / f"s{number}"
        source.mkdir()
        for part in range(5):
            (source / f"f{part}").write_bytes(bytes([number]) * 20_000)
        sources.append(source)
    roots = tmp_path / "roots"
    roots.mkdir()
    made = 0
    turn = asyncio.Event()

    async def register(seed: int) -> None:
        for step in range(3):
            number = (seed + step) % 4
            image = await store.register(f"app-{number}", sources[number])
            turn.set()
            turn.clear()
            # Another may have removed it meanwhile.
            await store.evict(spare=image.digest if chance.random() < 0.5 else None)

    async def create(seed: int) -> None:
        nonlocal made
        for step in range(25):
            cid = f"c{seed}-{step}"
            try:
                digest = store.resolve(f"app-{chance.randrange(4)}").digest
                await store.clone(digest, roots / cid, container=cid)
            except NotFound:
                await turn.wait()  # for the next registration
                continue
            made += 1
            files = [(roots / cid / f"f{part}").read_bytes() for part in range(5)]
            assert len({*files}) == 1
            assert len(files[0]) == 20_000
            # Its image is there for as long as it is.
            assert store.config(digest) is not None
            assert store.layout.tree_path(store.layout.tree_of(digest).digest).is_dir()
            if chance.random() < 0.7:
                store.let_go(cid)

    async def prune() -> None:
        for _ in range(20):
            await store.prune(older_than_s=0, keep_bytes=chance.choice([0, 100_000, 10**9]))
            with suppress(NotFound, Conflict):
                await store.remove(f"app-{chance.randrange(4)}", force=chance.random() < 0.3)

    async with asyncio.TaskGroup() as tasks:
        creating = [tasks.create_task(create(seed)) for seed in range(4)]
        tasks.create_task(prune())
        while not all(task.done() for task in creating):
            await asyncio.gather(*(register(seed) for seed in range(2)))
    assert made > 10
    found = await store.verify()
    assert found.damaged == ()
    for cid in [f"c{seed}-{step}" for seed in range(4) for step in range(25)]:
        store.let_go(cid)
    await store.prune(keep_bytes=0)
    root = tmp_path / "images"
    assert [os.listdir(root / folder) for folder in ("rootfs", "blobs/sha256", "staging")] == [[], [], []]
