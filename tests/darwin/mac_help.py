"""Sandboxed processes of this Mac, for tests: each in a throwaway folder, each killed in the end."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from schemas.status import Gpu, Network
from worker.platform.base import NetworkPolicy, PathRule, SandboxPolicy
from worker.platform.darwin.driver import DarwinDriver
from worker.platform.darwin.enforce import EnforceError, Enforcer
from worker.platform.darwin.libsystem import load
from worker.platform.darwin.seatbelt import Seatbelt

# Where this interpreter and its library stand, so that it runs in a sandbox too.
PYTHON_PLACES = tuple(
    dict.fromkeys(os.path.realpath(place) for place in (sys.prefix, sys.base_prefix, sys.exec_prefix))
)


class Box:
    """A container's folders and its policy."""

    def __init__(self, root: Path, name: str = "t-0") -> None:
        self.root = root
        self.name = name
        self.rootfs, self.tmp, self.state = root / name / "rootfs", root / name / "tmp", root / name / "state"
        for folder in (self.rootfs, self.tmp, self.state):
            folder.mkdir(parents=True)
        self.marker = str(root / name / "marker-A")

    def policy(self, *paths: PathRule, **changes: Any) -> SandboxPolicy:
        facts: dict[str, Any] = {
            "container": self.name,
            "instance": "A",
            "rootfs": str(self.rootfs),
            "tmp": str(self.tmp),
            "state_dir": str(self.state),
            "paths": (
                PathRule(str(self.rootfs), "rwx", "rootfs"),
                PathRule(str(self.tmp), "rw", "tmp"),
                *(PathRule(place, "rx", "system") for place in PYTHON_PLACES),
                *paths,
            ),
            "marker": self.marker,
            "deny": (str(self.state),),
        }
        return SandboxPolicy(**{**facts, **changes})


@contextlib.contextmanager
def a_folder() -> Iterator[Path]:
    """A short canonical folder: sockets have 104 bytes for their paths."""
    folder = Path(os.path.realpath(tempfile.mkdtemp(prefix="sf-", dir="/tmp")))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def compiles(plan: dict[str, Any]) -> str | None:
    """None when a child of ours can enter the plan's sandbox, else what the compiler said."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = ""
        try:
            Enforcer().apply({**plan, "limits": []})
        except EnforceError as failure:
            said = f"{failure.errno} {failure.detail}"
        os.write(write, said.encode(errors="replace")[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(pid, 0)
    return said or None


@contextlib.contextmanager
def confined(plan: dict[str, Any], program: Sequence[str] | None = None) -> Iterator[int]:
    """A process in the plan's sandbox: this interpreter, waiting, or a program that it becomes."""
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            Enforcer().apply({**plan, "limits": []})
            os.write(told, b"+")
            if program is not None:
                os.execv(program[0], list(program))
            while True:
                signal.pause()
        except BaseException as failure:
            os.write(told, f"-{failure}".encode(errors="replace"))
        os._exit(1)
    os.close(told)
    try:
        said = os.read(ready, 4096)
        if said[:1] != b"+":
            raise AssertionError(f"not confined: {said[1:].decode(errors='replace')}")
        yield pid
    finally:
        os.close(ready)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def run(plan: dict[str, Any], program: Sequence[str], timeout_s: float = 60) -> tuple[int, str]:
    """Exit code and output of a program in the plan's sandbox."""
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(
            [sys.executable, "-c", _RUN, os.fspath(Path(__file__).parents[2]), *program],
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        try:
            child.communicate(repr({**plan, "limits": []}).encode(), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        said.seek(0)
        return child.returncode, said.read().decode(errors="replace")


_RUN = """
import ast, os, sys
sys.path.insert(0, sys.argv[1])
from worker.platform.darwin.enforce import Enforcer
enforcer = Enforcer()
plan = ast.literal_eval(sys.stdin.read())
enforcer.apply(plan, enforcer.prepare(plan))
os.execv(sys.argv[2], sys.argv[2:])
"""


def driver() -> DarwinDriver:
    return DarwinDriver()


def seatbelt() -> Seatbelt:
    return Seatbelt(load())


def every_level() -> Iterator[tuple[str, dict[str, Any]]]:
    """A policy's changes for each level of network and GPU, by name."""
    ports: dict[str, Any] = {"bind_ports": (18080,), "connect_ports": (18080, 443), "denied_ports": (4222,)}
    for level in (Network.NONE, Network.LOCALHOST, Network.OUTBOUND, Network.FULL):
        network = NetworkPolicy(level=level, **(ports if level is not Network.NONE else {}))
        for gpu in (Gpu.NONE, Gpu.METAL_COMPUTE, Gpu.MPS_ONLY):
            yield f"{level.value}, gpu {gpu.value}", {"network": network, "gpu": gpu}
