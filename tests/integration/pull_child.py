"""A process that pulls one image and stops at a named place until it is killed."""

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any

from tests.integration.pull_help import QUICK, Secrets
from worker.config_model import Config, PolicyConfig
from worker.images import pulled
from worker.images.layout import Layout
from worker.images.pull import Puller
from worker.images.store import ImageStore
from worker.images.unpack import unpack_layers
from worker.platform import driver


def wait_for_the_end() -> None:
    print("there", flush=True)
    time.sleep(600)


def unpack_half(layers: Any, dest: Path, **more: Any) -> Any:
    unpack_layers(layers[:1], dest, **more)
    wait_for_the_end()


def stop_before(owner: type, name: str) -> None:
    def stopped(*args: Any, **more: Any) -> None:
        wait_for_the_end()

    setattr(owner, name, stopped)


async def main(root: str, image: str, stop_at: str) -> None:
    store = ImageStore.open(Path(root), driver())
    config = Config(policy=PolicyConfig(images=("localhost:*/*",)))
    puller = Puller(
        store,
        config,
        Secrets(),
        patience=QUICK,
        unpack=unpack_half if stop_at == "unpacking" else unpack_layers,
    )
    match stop_at:
        case "adopting":
            stop_before(Layout, "adopt_blob")
        case "placing":
            stop_before(Layout, "put_tree")
        case "placed":
            stop_before(pulled.TakeIn, "publish")
        case "naming":
            stop_before(ImageStore, "give_name")
    await puller.pull(image, "always")
    print("done", flush=True)
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
