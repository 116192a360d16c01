"""Compiles the attack program and runs a node under attack in a machine of its own; what came of it, as data."""

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.attack_machine import CANNOT
from tests.integration.attack_table import Judge

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCES = sorted((HERE.parent / "native").glob("attack*.c"))
NOBODY = 65534
PATIENCE_S = 240.0

# Users that attacks run as. Where the tests run as root, the other one is made by dropping everything.
USERS = ("root", "ordinary user")


class Run:
    """One run of the attack program. `setting` is `ISOLATION/LEVEL`, or `control`, `bwrap` …"""

    def __init__(self, line: dict[str, Any], judge: Judge) -> None:
        self.setting: str = line["run"]
        self.layer: str | None = line.get("layer")
        self.joined: bool = line.get("joined", False)
        self.not_enforced = set(line.get("not_enforced", ()))
        self.unavailable: str | None = line.get("unavailable")
        self.told: dict[str, list[Any]] = line.get("attempts", {})
        effects = set(line.get("effects", ()))
        self.through = {name for name, told in self.told.items() if judge.through(name, *told, effects)}

    @property
    def isolation(self) -> str:
        return self.setting.partition("/")[0]

    @property
    def level(self) -> str:
        return self.setting.partition("/")[2]

    def errno_of(self, names: Iterable[str]) -> dict[str, str]:
        """What the named attempts met, in words."""
        return {name: _reason(*self.told[name]) for name in sorted(names)}


class Report:
    """All runs of one user."""

    def __init__(self, lines: list[dict[str, Any]], *, root: bool) -> None:
        head, *runs = lines
        self.root = root
        judge = Judge(head["secret"], head["shown"])
        self.runs = [Run(line, judge) for line in runs]

    def find(self, setting: str, *, layer: str | None = None, joined: bool = False) -> Run:
        """The run of a setting; skips the test where there is none, or it could not be made."""
        for run in self.runs:
            if (run.setting, run.layer, run.joined) == (setting, layer, joined):
                if run.unavailable is not None:
                    pytest.skip(f"{setting} cannot be had here: {run.unavailable}")
                return run
        pytest.skip(f"there is no {setting} here")

    @property
    def control(self) -> Run:
        return self.find("control")


def _reason(errno: int, said: str) -> str:
    return said if errno < 0 else os.strerror(errno)


def compile_program(folder: Path) -> Path:
    """The attack program; skips where there is no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler (cc) to make the attack program")
    program = folder / "attack"
    command = [compiler, "-O1", "-o", str(program), *map(str, SOURCES), "-lrt"]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-4000:]
    folder.chmod(0o755)
    return program


def skip_unless_possible(user: str) -> None:
    if user == "root" and os.geteuid() != 0:
        pytest.skip("needs root")


def run_machine(
    script: str, program: Path, folder: Path, user: str, *arguments: str, patience_s: float = PATIENCE_S
) -> list[dict[str, Any]]:
    """The JSON lines of a script in a machine of its own; skips where this one allows none inside."""
    skip_unless_possible(user)
    number = str(NOBODY) if user != "root" and os.geteuid() == 0 else "-"
    machine = [sys.executable, "-I", "-S", str(HERE / "attack_machine.py"), str(folder), secrets.token_hex(8)]
    inside = [sys.executable, str(HERE / script), str(program), *arguments]
    done = subprocess.run(
        [*machine, number, "--", *inside],
        capture_output=True,
        text=True,
        timeout=patience_s,
        check=False,
        cwd="/",
        env={
            "PYTHONPATH": str(ROOT),
            "PYTHONSAFEPATH": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PATH": os.environ["PATH"],
        },
    )
    if done.returncode == CANNOT:
        pytest.skip(f"no machine of its own can be made here: {done.stderr.strip()}")
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-4000:]}"
    return [json.loads(line) for line in done.stdout.splitlines()]
