"""What the sandbox itself costs: one program from the order to its end, children made ahead of need as the launcher has
them, beside the bare fork and beside bubblewrap, in turn. And how long the end of the hardest fork bomb takes.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from schemas.status import Network
from tests.integration.attack_help import USERS, compile_program, run_machine
from worker.platform.base import NetworkPolicy, PathRule, SandboxPolicy
from worker.platform.linux.driver import LinuxDriver

CHILD = Path(__file__).with_name("sandbox_child.py")
ROUNDS = 60
STORM_LIMIT_S = 2.0


def measure(rival: list[str], argv: list[str]) -> dict[str, list[float]]:
    """Milliseconds of each round by what was started; `rival` is left out when it is empty."""
    driver = LinuxDriver()
    with tempfile.TemporaryDirectory(prefix="sandfleet-bench-") as folder:
        top = os.path.realpath(folder)
        for name in ("rootfs", "tmp"):
            os.mkdir(f"{top}/{name}")
        plans: dict[str, Any] = {"process": driver.plan(_policy(top, "process"))}
        if "rootfs" in driver.capabilities().isolation:
            plans["rootfs"] = driver.plan(_policy(top, "rootfs"))
        task = {"plans": plans, "argv": argv, "rival": rival, "rounds": ROUNDS}
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(CHILD)],
            input=json.dumps(task),
            capture_output=True,
            text=True,
            check=True,
        )
    found: dict[str, list[float]] = json.loads(done.stdout)
    return found


def _policy(top: str, isolation: str) -> SandboxPolicy:
    own = tuple(PathRule(f"{top}/{name}", "rwx", name) for name in ("rootfs", "tmp"))
    return SandboxPolicy(
        container="bench-0",
        instance="0" * 26,
        isolation=isolation,
        rootfs=f"{top}/rootfs",
        tmp=f"{top}/tmp",
        state_dir=f"{top}/state",
        paths=own,
        network=NetworkPolicy(level=Network.NONE),
    )


def rows(row: Any, rival: list[str] | None, argv: list[str]) -> list[dict[str, Any]]:
    """The table's rows; `row` makes one."""
    times = measure(rival or [], argv)
    p50 = {name: statistics.median(values) for name, values in times.items()}
    table = [row("fork, exec, reap of a bare interpreter's child", p50["bare"], "ms p50", "for scale", None)]
    if rival:
        table.append(row("bwrap --unshare-all … true", p50["rival"], "ms p50", "the rival", None))
    ratio = p50["process"] / p50["bare"]
    table.append(row("isolation process", p50["process"], "ms p50", "", None))
    table.append(row("isolation process ÷ bare fork", ratio, "", "2 or less", ratio <= 2))
    if "rootfs" in p50:
        table.append(row("isolation rootfs", p50["rootfs"], "ms p50", "", None))
        if rival:
            ratio = p50["rootfs"] / p50["rival"]
            table.append(row("isolation rootfs ÷ bwrap", ratio, "", "0.6 or less", ratio <= 0.6))
    return [*table, *storms(row)]


def storms(row: Any) -> list[dict[str, Any]]:
    """Five hundred processes that fork without a pause, stopped while they keep every processor busy; in a machine of
    their own, by the users that can be had here. Empty where there is no C compiler, or no such machine.
    """
    table = []
    with tempfile.TemporaryDirectory(prefix="sandfleet-bench-") as folder:
        for user in USERS:
            place = Path(folder) / user.replace(" ", "-")
            place.mkdir()
            with contextlib.suppress(pytest.skip.Exception):
                program = compile_program(Path(folder))
                for told in run_machine("attack_node.py", program, place, user, "storms")[1:]:
                    name = f"a fork bomb's end, isolation {told['isolation']}, {user}"
                    seconds = told["seconds"]
                    met = seconds <= STORM_LIMIT_S and not told["left"]
                    table.append(row(name, seconds, "s", f"{STORM_LIMIT_S:g} or less", met))
    return table
