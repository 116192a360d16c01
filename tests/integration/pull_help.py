"""What the tests of pulling share: a quick patience, a store, pullers that are closed, and its law."""

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from schemas.spec import PullPolicy
from tests.registry_server import Registry, running
from worker.config_model import Config, ImagesConfig, PolicyConfig
from worker.errors import StartFailed
from worker.images.pull import Puller
from worker.images.registry.patience import Patience
from worker.images.store import ImageStore
from worker.platform import driver

NOW = PullPolicy.ALWAYS
QUICK = Patience(
    connect_s=5,
    headers_s=5,
    idle_s=0.5,
    slow_bytes=1024,
    slow_s=5,
    attempts=4,
    absent_attempts=2,
    backoff_s=0.01,
    max_backoff_s=0.05,
)
APP = {"app/run": b"#!/bin/sh\necho hello\n", "app/data": bytes(range(256)) * 400}
DEADLINE_S = 20.0

Make = Callable[..., Puller]


class Secrets:
    def __init__(self, **values: str) -> None:
        self.values = values

    def read(self, name: str) -> str:
        if name not in self.values:
            raise StartFailed(f"this node has no secret {name}")
        return self.values[name]


@pytest.fixture
def registry() -> Iterator[Registry]:
    with running() as made:
        yield made


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ImageStore]:
    made = ImageStore.open(tmp_path / "images", driver())
    yield made
    made.close()


@pytest.fixture
async def pullers(store: ImageStore) -> AsyncIterator[Make]:
    """Makes pullers for the store. `images` and `policy` are settings, the rest goes to Puller."""
    made: list[Puller] = []

    def make(*, images: dict[str, Any] | None = None, policy: Any = None, **more: Any) -> Puller:
        policy = {"images": ("*", "localhost:*/*"), **(policy or {})}
        config = Config(images=ImagesConfig(**(images or {})), policy=PolicyConfig(**policy))
        secrets = more.pop("secrets", Secrets())
        puller = Puller(store, config, secrets, **{"patience": QUICK, **more})
        made.append(puller)
        return puller

    yield make
    for puller in made:
        await puller.close()


async def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "the condition did not come about"
        await asyncio.sleep(0.01)


def part_of(store: ImageStore, digest: str) -> Path:
    """Where a blob is while it comes."""
    return store.layout.root / "ingest" / f"{digest.removeprefix('sha256:')}.part"


def tree_files(store: ImageStore, digest: str) -> dict[str, bytes]:
    root = store.layout.tree_path(store.layout.tree_of(digest).digest)
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def verified(store: ImageStore) -> None:
    """Every blob is what its name says, and everything that a name reaches is there."""
    root = store.layout.root
    for path in (root / "blobs" / "sha256").iterdir():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    index = json.loads((root / "index.json").read_bytes())
    for entry in index["manifests"]:
        document = json.loads(store.layout.blob_path(entry["digest"]).read_bytes())
        for blob in (document["config"], *document["layers"]):
            assert store.layout.blob_path(blob["digest"]).stat().st_size == blob["size"]
        assert store.layout.tree_path(store.layout.tree_of(entry["digest"]).digest).is_dir()
    assert not list((root / "staging").iterdir())
