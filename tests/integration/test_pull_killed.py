"""A puller that is killed leaves a store that opens, is whole, and goes on from where it was."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.image_maker import layer, put_image
from tests.integration.pull_help import APP, NOW, Secrets, registry, tree_files, until, verified
from tests.registry_server import Registry
from worker.config_model import Config, PolicyConfig
from worker.images.pull import Puller
from worker.images.store import ImageStore
from worker.platform import driver

__all__ = ["registry"]  # fixture

ROOT = Path(__file__).resolve().parents[2]
CONTENT = os.urandom(2 << 20)
BIG = layer({"big": CONTENT})
SIZE = len(BIG.content)


class Child:
    def __init__(self, root: Path, image: str, stop_at: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.pull_child", str(root), image, stop_at],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def children() -> Iterator[list[Child]]:
    made: list[Child] = []
    yield made
    for child in made:
        if child.process.returncode is None:
            child.kill()


async def pull_again(root: Path, image: str) -> None:
    """The store opens as it is, is whole before and after, and the image comes."""
    store = ImageStore.open(root, driver())
    puller = Puller(store, Config(policy=PolicyConfig(images=("localhost:*/*",))), Secrets())
    try:
        assert store.list() == []
        verified(store)
        pulled = await puller.pull(image, NOW)
        assert tree_files(store, pulled.image.digest) == {**APP, "big": CONTENT}
        verified(store)
        await store.prune()
        assert len(store.list()) == 1
        assert [p.name for p in (root / "ingest").iterdir()] == []
    finally:
        await puller.close()
        store.close()


# Named, because the size is another in every process.
PLACES = {"before": 0, "after a byte": 1, "early": 70_000, "half way": SIZE // 2, "before the last": SIZE - 1}


@pytest.mark.parametrize("at", PLACES.values(), ids=PLACES)
async def test_in_the_middle_of_a_layer(
    registry: Registry, children: list[Child], tmp_path: Path, at: int
) -> None:
    put_image(registry, "app", [layer(APP), BIG], "latest")
    image, root = f"{registry.host}/app", tmp_path / "images"
    registry.fault("stall", f"blobs/{BIG.digest}", at=at, times=-1)
    child = Child(root, image, "nowhere")
    children.append(child)
    part = root / "ingest" / f"{BIG.digest.removeprefix('sha256:')}.part"
    await until(lambda: part.exists() and part.stat().st_size == at)
    child.kill()
    registry.faults.clear()
    asked = len(registry.asked(f"blobs/{BIG.digest}"))
    await pull_again(root, image)
    (again,) = registry.asked(f"blobs/{BIG.digest}")[asked:]
    assert again.headers.get("Range") == (f"bytes={at}-" if at else None)


@pytest.mark.parametrize("stop_at", ["adopting", "unpacking", "placing", "placed", "naming"])
async def test_between_two_steps(
    registry: Registry, children: list[Child], tmp_path: Path, stop_at: str
) -> None:
    put_image(registry, "app", [layer(APP), BIG], "latest")
    image, root = f"{registry.host}/app", tmp_path / "images"
    child = Child(root, image, stop_at)
    children.append(child)
    assert child.line() == "there"
    child.kill()
    asked = len(registry.asked(f"blobs/{BIG.digest}"))
    await pull_again(root, image)
    # What had come was complete, and is not asked for again.
    if stop_at != "adopting":
        assert len(registry.asked(f"blobs/{BIG.digest}")) == asked
