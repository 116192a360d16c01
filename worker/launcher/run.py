"""What the launcher knows of one run of a container, and what all runs share."""

from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple, Protocol

from worker.launcher.capture import Capture
from worker.launcher.children import Children
from worker.launcher.loop import Loop
from worker.launcher.ports import Ports
from worker.launcher.processes import System
from worker.launcher.protocol import Refused


class Reply(Protocol):
    """The answer to one request, given once."""

    def ok(self, **fields: Any) -> None: ...

    def refuse(self, why: Refused) -> None: ...


class Phase(Enum):
    STARTING = "starting"
    RUNNING = "running"
    LOST = "lost"
    ENDED = "ended"


class Host(NamedTuple):
    """What the launcher shares with its containers.

    `tell` sends an event to the worker; `drop` forgets a container that never ran.
    """

    loop: Loop
    table: System
    capture: Capture
    ports: Ports
    children: Children
    log: Callable[[str], None]
    tell: Callable[[dict[str, Any]], None]
    drop: Callable[[str], object]


class Identity(NamedTuple):
    """Which run it is, and what was asked for it."""

    cid: str
    instance: str
    run: int
    state_dir: str
    max_log_bytes: int | None = None
    max_rate: int | None = None
    cpu_limit_s: float | None = None


class Run:
    """What is known of the program itself. `status` is set only when the launcher reaped it as an orphan."""

    def __init__(self) -> None:
        self.pid: int | None = None
        self.start = 0
        self.started_at_us = 0
        self.shim_pid = 0
        self.shim_start = 0
        self.cpu_limit_s: float | None = None
        self.taken_over = False
        self.status: int | None = None
        self.killed_by: str | None = None
        self.escalated = False
        self.record: dict[str, Any] | None = None
        self.usage: dict[str, Any] = {}
