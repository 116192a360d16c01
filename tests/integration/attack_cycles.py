"""Starts and stops containers of fork-happy programs over and over, and tells what is left of them.

    attack_cycles.py PROGRAM COUNT

A whole node, commanded over NATS, in a machine of its own (`attack_machine`), where every process, mount, control group
and namespace can be counted. Printed are two JSON lines: the census after each container ran once, and the one after
COUNT cycles in all.
"""

import asyncio
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from tests.acceptance.harness import Fleet, until
from tests.integration.attack_machine import PLACE

# Modes of the attack program; each gets a container in each isolation.
KINDS = ("orphans", "run_away", "deaf", "stopped", "beside", "reaper")
ENOUGH = 6
CONFIG = """
[policy]
register_roots = ["{images}"]
"""
_NAMESPACES = ("mnt", "pid", "ipc", "uts", "net", "user", "cgroup")
_CONTAINERS = ("attack", "sandfleet-shim")


async def census(fleet: Fleet) -> dict[str, Any]:
    """What there is. The launcher keeps some children ahead of need: those of before count as nothing new."""
    assert fleet.worker.process is not None
    launcher = fleet.worker.launcher_pid()
    assert launcher is not None
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    names = [_read(f"/proc/{pid}/comm").strip() for pid in pids]
    return {
        "programs": names.count("attack"),
        "shims": names.count("sandfleet-shim"),
        "processes": len(pids),
        "mounts": len(_read("/proc/self/mountinfo").splitlines()),
        "mounts of the launcher": len(_read(f"/proc/{launcher}/mountinfo").splitlines()),
        "cgroups": sum(1 for _ in os.walk("/sys/fs/cgroup")),
        "namespaces": len({name for pid in pids for name in _namespaces(pid)}),
        "descriptors of the worker": _descriptors(fleet.worker.process.pid),
        "descriptors of the launcher": _descriptors(launcher),
        "shared memory": len(_read("/proc/sysvipc/shm").splitlines()) + len(os.listdir("/dev/shm")),
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _namespaces(pid: int) -> list[str]:
    try:
        return [os.readlink(f"/proc/{pid}/ns/{name}") for name in _NAMESPACES]
    except OSError:
        return []  # it has ended, or hides


def _descriptors(pid: int) -> int:
    """-1 of a process that hides them: the launcher's are its own business but for root."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except PermissionError:
        return -1


async def settled(fleet: Fleet, wanted: dict[str, Any] | None = None) -> dict[str, Any]:
    """The census once it is that, or has stood still; for what is replaced ahead of need takes a moment."""
    last: dict[str, Any] = {}
    same = 0
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        now = await census(fleet)
        same = same + 1 if now == last else 0
        last = now
        if now == wanted or (wanted is None and same >= 10):
            break
        await asyncio.sleep(0.05)
    return last


async def cycle(fleet: Fleet, cid: str) -> None:
    await fleet.client.ok(cid, "start")
    deadline = time.monotonic() + 10
    while (await fleet.client.query("stats", container=cid)).get("processes", 0) < ENOUGH:
        assert time.monotonic() < deadline, f"{cid} does not fork"
        await asyncio.sleep(0.002)
    await fleet.client.ok(cid, "stop", timeout_s=0.02)


async def main(program: str, count: int) -> None:
    os.environ["TMPDIR"] = PLACE
    async with Fleet(CONFIG) as fleet:
        info = await fleet.client.query("info")
        folder = fleet.images / "happy"
        folder.mkdir()
        shutil.copy(program, folder / "attack")
        await fleet.client.ok(None, "register_image", image="happy", source_dir=str(folder))
        cids = []
        for isolation in info["capabilities"]["isolation"]:
            for kind in KINDS:
                cid = f"{isolation}-{kind.replace('_', '-')}-0"
                spec = {
                    "image": {"name": "happy"},
                    "command": {"entrypoint": ["/attack", "tree", kind]},
                    "network": {"access": "none"},
                    "sandbox": {"isolation": isolation},
                }
                await fleet.client.ok(cid, "create", spec=spec)
                cids.append(cid)
        for cid in cids:
            await cycle(fleet, cid)
        before = await settled(fleet)
        print(json.dumps(before), flush=True)
        begun = time.monotonic()
        for number in range(len(cids), count):
            await cycle(fleet, cids[number % len(cids)])
        took = time.monotonic() - begun
        print(json.dumps(await settled(fleet, before)), flush=True)
        for cid in cids:
            await fleet.client.ok(cid, "remove")
        left = os.listdir(fleet.worker.data / "containers")
        print(json.dumps({"seconds": took, "containers": left}), flush=True)
        launcher = fleet.worker.launcher_pid()
    await until(lambda: not Path(f"/proc/{launcher}").exists())
    names = [_read(f"/proc/{entry}/comm").strip() for entry in os.listdir("/proc") if entry.isdigit()]
    print(json.dumps({"left": [name for name in names if name in _CONTAINERS]}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
