"""Pulling one image of 500 MB in 6 layers over loopback, beside skopeo: time and peak memory, each in a process of its own.

skopeo copies an image into an OCI layout and stops there; a node unpacks it too, so that containers can start. The first
is compared, both are shown.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

LAYERS = 6
LAYER_BYTES = 500_000_000 // LAYERS
ROUNDS = 3
_COUNTS = (
    "layers",
    "entries",
    "files",
    "directories",
    "symlinks",
    "hard_links",
    "whiteouts",
    "bytes",
    "skipped",
)


class Cost(NamedTuple):
    seconds: float
    peak_mib: float


def rows(row: Any) -> list[dict[str, Any]]:
    """The table's rows; `row` makes one."""
    skopeo = shutil.which("skopeo")
    costs: dict[str, list[Cost]] = {}
    with tempfile.TemporaryDirectory(prefix="sandfleet-bench-") as folder, _registry() as host:
        for number in range(ROUNDS):
            for kind in ("fetch", "whole"):
                target = f"{folder}/{kind}-{number}"
                argv = [sys.executable, "-m", "tests.bench.pulls", kind, host, target]
                costs.setdefault(kind, []).append(_run(argv, target))
            if skopeo is not None:
                target = f"{folder}/skopeo-{number}"
                source = f"docker://{host}/bench/app:1"
                argv = [skopeo, "copy", "-q", "--src-tls-verify=false", source, f"oci:{target}:1"]
                costs.setdefault("skopeo", []).append(_run(argv, target))
    seconds = {kind: statistics.median(cost.seconds for cost in found) for kind, found in costs.items()}
    peak = {kind: max(cost.peak_mib for cost in found) for kind, found in costs.items()}
    table = []
    if skopeo is not None:
        table.append(row("skopeo copy to an OCI layout", seconds["skopeo"], "s p50", "the rival", None))
        table.append(row("skopeo's memory", peak["skopeo"], "MiB peak", "for scale", None))
    else:
        table.append(row("skopeo copy to an OCI layout", None, "s p50", "skopeo is not installed", None))
    table.append(row("fetched, verified, stored", seconds["fetch"], "s p50", "", None))
    if skopeo is not None:
        ratio = seconds["fetch"] / seconds["skopeo"]
        table.append(row("fetched ÷ skopeo", ratio, "", "0.8 or less", ratio <= 0.8))
    table.append(row("pulled and unpacked", seconds["whole"], "s p50", "", None))
    table.append(row("memory of the whole process", peak["whole"], "MiB peak", "", None))
    return table


def _run(argv: list[str], target: str) -> Cost:
    """What a process took, its start left out where it says how long it was at it."""
    began = time.perf_counter()
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    took = time.perf_counter() - began
    if process.returncode != 0:
        raise RuntimeError(f"{argv[0]} ended with {process.returncode}")
    shutil.rmtree(target)
    return Cost(float(said) if said else took, usage.ru_maxrss / 1024)


@contextmanager
def _registry() -> Iterator[str]:
    """A registry with the image, in a process of its own; gives its host and port."""
    argv = [sys.executable, "-m", "tests.bench.pulls", "registry"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()
            process.wait(30)


def serve() -> None:
    """The registry's process: until its input ends."""
    from tests.image_maker import layer, put_image
    from tests.registry_server import running

    with running() as registry:
        # Half of it compresses, as programs and libraries do.
        layers = [layer({f"layer-{n}": _content(LAYER_BYTES)}) for n in range(LAYERS)]
        put_image(registry, "bench/app", layers, "1")
        print(registry.host, flush=True)
        sys.stdin.read()


def _content(size: int) -> bytes:
    block = os.urandom(64 * 1024) + bytes(64 * 1024)
    return b"".join(block if n % 8 else os.urandom(128 * 1024) for n in range(size // len(block)))


async def pull(kind: str, host: str, target: str) -> float:
    """Seconds of one pull into an empty store; for `fetch` nothing is unpacked."""
    from loguru import logger

    from schemas.spec import PullPolicy
    from worker.config_model import Config, ImagesConfig, PolicyConfig
    from worker.images.pull import Puller
    from worker.images.store import ImageStore
    from worker.images.unpack import unpack_layers
    from worker.images.unpack_model import UnpackReport
    from worker.platform import driver
    from worker.secret_files import SecretFiles

    logger.remove()
    store = ImageStore.open(Path(target), driver())
    config = Config(images=ImagesConfig(), policy=PolicyConfig(images=("*", f"{host}/*")))

    def left_packed(*_: Any, **__: Any) -> UnpackReport:
        counts = dict.fromkeys(_COUNTS, 0)
        return UnpackReport(**counts, notes=(), diff_ids=())

    puller = Puller(
        store,
        config,
        SecretFiles(Path(target)),
        unpack=left_packed if kind == "fetch" else unpack_layers,
    )
    began = time.perf_counter()
    await puller.pull(f"{host}/bench/app:1", PullPolicy.ALWAYS)
    took = time.perf_counter() - began
    await puller.close()
    store.close()
    return took


def main(arguments: list[str]) -> None:
    if arguments == ["registry"]:
        serve()
    else:
        kind, host, target = arguments
        print(json.dumps(asyncio.run(pull(kind, host, target))))


if __name__ == "__main__":
    main(sys.argv[1:])
