"""Clones of 10,000 small files for a container, beside `cp -a`: on the disk that is there, and on file systems that
share blocks, made in files and mounted for the while, where this is root and has their mkfs.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.acceptance.harness import Fleet
from tests.file_systems import mounted, temporary_in

Row = Callable[[str, float | None, str, str, bool | None], dict[str, Any]]

CONFIG = '[policy]\nregister_roots = ["{images}"]\n'
FOLDERS, FILES, SIZE = 100, 100, 1000
ROUNDS = 3
PATIENCE_S = 120.0
# mkfs with its options, and the share of cp's time that a create may take.
SHARING = {"xfs": (["mkfs.xfs", "-q", "-m", "reflink=1"], 1.5), "btrfs": (["mkfs.btrfs", "-q"], 1.5)}


async def measure(fleet: Fleet, row: Row) -> list[dict[str, Any]]:
    rows = await _beside_cp(fleet, "the disk", 2.0, row)
    for kind, (mkfs, limit) in SHARING.items():
        if os.geteuid() != 0 or shutil.which(mkfs[0]) is None:
            rows.append(row(f"create ÷ cp on {kind}", None, "", f"needs root and {mkfs[0]}", None))
            continue
        with mounted(mkfs) as place:
            if place is None:
                rows.append(row(f"create ÷ cp on {kind}", None, "", "cannot be mounted here", None))
                continue
            with temporary_in(place):
                other = Fleet(CONFIG)
            async with other:
                rows += await _beside_cp(other, kind, limit, row)
    return rows


async def _beside_cp(fleet: Fleet, where: str, limit: float, row: Row) -> list[dict[str, Any]]:
    folder = fleet.images / "many"
    for n in range(FOLDERS):
        (folder / f"d{n}").mkdir(parents=True)
        for m in range(FILES):
            (folder / f"d{n}" / f"f{m}").write_bytes(b"x" * SIZE)
    await _done(fleet, None, "register_image", image="many", source_dir=str(folder))
    ours, theirs = [], []
    for n in range(ROUNDS):
        began = time.perf_counter()
        await _done(fleet, f"many-{n}", "create", spec={"image": {"name": "many"}})
        ours.append(time.perf_counter() - began)
        await _done(fleet, f"many-{n}", "remove")
        copy = Path(tempfile.mkdtemp(dir=fleet.folder))
        began = time.perf_counter()
        await asyncio.to_thread(
            subprocess.run, ["cp", "-a", "--reflink=auto", str(folder), str(copy)], check=True
        )
        theirs.append(time.perf_counter() - began)
        await asyncio.to_thread(shutil.rmtree, copy)
    method = (await fleet.client.query("df"))["clone"]
    ratio = min(ours) / min(theirs)
    return [
        row(f"cp -a --reflink=auto of 10,000 files on {where}", min(theirs), "s", "the rival", None),
        row(f"`create` of as many there, by {method}", min(ours), "s", "", None),
        row(f"create ÷ cp on {where}", ratio, "", f"{limit:g} or less", ratio <= limit),
    ]


async def _done(fleet: Fleet, cid: str | None, verb: str, **fields: Any) -> None:
    """As `ok` of the client, on a disk that is slow."""
    command = await fleet.client.send(cid, verb, **fields)
    done = await fleet.client.event(
        lambda e: e["type"] == "command_completed" and e["command_id"] == command, deadline_s=PATIENCE_S
    )
    assert done["ok"], done["error"]
