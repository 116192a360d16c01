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


class Group(Protocol):
    """A control group of one run."""

    @property
    def procs(self) -> str:
        """The file through which a process joins."""

    @property
    def ran_out(self) -> bool:
        """Whether the kernel killed something in it for its memory."""

    def kill(self) -> None: ...

    def remove(self) -> bool:
        """False while something in it is still ending."""


class Groups(Protocol):
    """The control groups of this launcher's runs, by name. What they cannot do raises OSError."""

    controllers: tuple[str, ...]

    def make(self, name: str, limits: dict[str, Any]) -> Group: ...

    def find(self, name: str) -> Group | None: ...

    def names(self) -> list[str]: ...


class Host(NamedTuple):
    """What the launcher shares with its containers.

    `tell` sends an event to the worker; `drop` forgets a container that never ran; `groups` make control groups,
    where there are any.
    """

    loop: Loop
    table: System
    capture: Capture
    ports: Ports
    children: Children
    log: Callable[[str], None]
    tell: Callable[[dict[str, Any]], None]
    drop: Callable[[str], object]
    groups: Groups | None = None


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
    """What is known of the program itself. `status` is set only when the launcher reaped it as an orphan.

    `marker` is a plan's, which shows whose a process is where no subreaper keeps a tree together. `group` is the
    name of its control group, empty when it has none.
    """

    def __init__(self) -> None:
        self.pid: int | None = None
        self.start = 0
        self.started_at_us = 0
        self.shim_pid = 0
        self.shim_start = 0
        self.cpu_limit_s: float | None = None
        self.marker = ""
        self.group = ""
        self.taken_over = False
        self.status: int | None = None
        self.killed_by: str | None = None
        self.escalated = False
        self.record: dict[str, Any] | None = None
        self.usage: dict[str, Any] = {}
