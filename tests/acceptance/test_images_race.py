"""Pulls, prunes, registrations and creates racing while the worker is killed again and again.

A few seconds by default; SANDFLEET_RACE_S=60 is what the store is promised to bear.
"""

import asyncio
import json
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.harness import DEADLINE_S, Fleet
from tests.image_maker import layer, put_image
from tests.registry_server import running

RACE_S = float(os.environ.get("SANDFLEET_RACE_S", "5"))
CREATES = 20
CONFIG = """
[policy]
register_roots = ["{images}"]
images = ["*", "localhost:*/*"]
[images]
max_bytes = "3Mi"
"""
SHARED = {f"shared/{n}": bytes([n]) * 50_000 for n in range(10)}
# What a command may end in here: its image was taken away, or it was overtaken.
ENDS = ("command_completed", "command_rejected")
# A pull begins again with each new worker.
PATIENCE_S = 60.0
EXPECTED = {"not_found", "conflict", "interrupted"}

pytestmark = pytest.mark.timeout(RACE_S + 120)


class Race:
    def __init__(self, fleet: Fleet, images: list[str], chance: random.Random) -> None:
        self.fleet = fleet
        self.images = images
        self.chance = chance
        self.end = time.monotonic() + RACE_S
        self.outcomes: Counter[str] = Counter()
        self.boots = 1

    @property
    def on(self) -> bool:
        return time.monotonic() < self.end

    async def do(self, cid: str | None, verb: str, **fields: Any) -> bool:
        command = await self.fleet.client.send(cid, verb, **fields)
        done = await self.fleet.client.event(
            lambda e: e["type"] in ENDS and e["command_id"] == command, deadline_s=PATIENCE_S
        )
        assert done["type"] == "command_completed", done
        code = None if done["ok"] else done["error"]["code"]
        self.outcomes[f"{verb} {code or 'ok'}"] += 1
        assert code is None or code in EXPECTED, (verb, fields, done["error"])
        return code is None

    async def create(self, number: int) -> None:
        """Make a container, look at it, replace it, remove it."""
        cid = f"race-{number}"
        while self.on:
            image = self.chance.choice(self.images)
            if await self.do(cid, "create", spec={"image": {"name": image}}, replace=True):
                self.check_root(cid)
            if self.chance.random() < 0.5:
                await self.do(cid, "remove")

    def check_root(self, cid: str) -> None:
        root = self.fleet.folder / "node/data/containers" / cid / "rootfs"
        found = {path: (root / path).read_bytes() for path in SHARED}
        assert found == SHARED, cid

    async def pull(self) -> None:
        while self.on:
            await self.do(None, "pull_image", image=self.chance.choice(self.images), policy="always")

    async def prune(self, folder: str) -> None:
        while self.on:
            await self.do(None, "register_image", image="own", source_dir=folder)
            await self.do(None, "prune_images", keep_bytes=self.chance.choice([0, 1 << 20, 1 << 30]))
            image = self.chance.choice([*self.images, "own"])
            await self.do(None, "remove_image", image=image, force=self.chance.random() < 0.5)

    async def kill(self) -> None:
        """kill -9 of the worker, at any moment; a new one finishes what was begun."""
        while self.on:
            await asyncio.sleep(self.chance.uniform(0.3, 3.0))
            self.fleet.worker.kill()
            self.fleet.worker.start()
            self.boots += 1
            await self.fleet.ready(self.boots)


async def test_a_verified_store_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(os.environ.get("SANDFLEET_RACE_SEED", "1"))
    with running() as registry:
        async with Fleet(CONFIG) as fleet:
            images = []
            for number in range(4):
                own = layer({"own": os.urandom(300_000)})
                put_image(registry, f"app-{number}", [layer(SHARED), own], "latest")
                images.append(f"{registry.host}/app-{number}")
            folder = fleet.image("own", {"f": "x" * 100_000})
            race = Race(fleet, images, chance)
            async with asyncio.TaskGroup() as tasks:
                for number in range(CREATES):
                    tasks.create_task(race.create(number))
                tasks.create_task(race.pull())
                tasks.create_task(race.prune(folder))
                tasks.create_task(race.kill())
            assert race.outcomes["create ok"] >= CREATES
            assert race.outcomes["pull_image ok"] > 0
            await verified(fleet)
            await emptied(fleet)
    with capsys.disabled():
        print(f" [{race.boots} workers: {dict(sorted(race.outcomes.items()))}]", end="")


async def verified(fleet: Fleet) -> None:
    """Everything is as it was taken in, and every container that is there has all of its files."""
    done = await fleet.client.ok(None, "verify_images")
    assert done["result"]["damaged"] == []
    containers = (await fleet.client.query("list"))["containers"]
    kept = {one["image_digest"] for one in containers}
    blobs = fleet.folder / "node/data/images/blobs/sha256"
    assert all((blobs / digest.removeprefix("sha256:")).exists() for digest in kept)
    on_disk = {path.name for path in (fleet.folder / "node/data/containers").iterdir()}
    assert on_disk == {one["container"] for one in containers}


async def emptied(fleet: Fleet) -> None:
    """With the containers gone nothing is left that a prune does not find."""
    for one in (await fleet.client.query("list"))["containers"]:
        await fleet.client.ok(one["container"], "remove")
    await fleet.client.ok(None, "prune_images", keep_bytes=0)
    root = fleet.folder / "node/data/images"
    deadline = time.monotonic() + DEADLINE_S
    while left := [
        str(path) for folder in ("blobs/sha256", "rootfs", "staging") for path in _files(root / folder)
    ]:
        assert time.monotonic() < deadline, left
        await asyncio.sleep(0.05)
    assert json.loads((root / "index.json").read_bytes())["manifests"] == []


def _files(folder: Path) -> list[Path]:
    return list(folder.iterdir())
