"""What `doctor` says of the launcher of a data directory: whether it runs, and which code."""

from collections.abc import Iterator
from pathlib import Path

import msgspec

from worker.cli.doctor_checks import Finding, lack, ok
from worker.supervisor_wire import is_alive, launcher_build


class _Facts(msgspec.Struct):
    """Of launcher.json."""

    pid: int
    start_time: int
    build: str | int = ""


def launcher_checks(root: Path) -> Iterator[Finding]:
    """Nothing while none runs: the next worker starts one."""
    try:
        facts = msgspec.json.decode((root / "launcher.json").read_bytes(), type=_Facts)
    except (OSError, msgspec.DecodeError):
        return
    if not is_alive(facts.pid, facts.start_time):
        return
    if facts.build == launcher_build():
        yield ok("launcher", f"pid {facts.pid}, of this version")
        return
    yield lack(
        "warn",
        "launcher",
        f"pid {facts.pid} runs the code of another version",
        "what this version changes in starting and ending containers is not in effect",
        "restart the worker with this version: it has the launcher replace itself, and containers go on; if it"
        " cannot, its log says why",
    )
