"""What crosses between the worker and its launcher, as the worker sees it."""

from pathlib import Path
from typing import Any, Protocol

import msgspec

from worker.errors import StartFailed
from worker.launcher.exec import OUTPUT_BYTES


class LauncherHome(Protocol):
    """What the launcher's place is: of `DataDir`, only this counts here."""

    root: Path
    key_path: Path

    @property
    def launcher_socket(self) -> Path: ...


class LaunchFailed(StartFailed):
    """A start that failed at a named step: `fork`, `setrlimit`, `sandbox` (or a step of it), `chdir`,
    `exec`, …
    """

    def __init__(self, message: str, *, step: str, errno: int, detail: str) -> None:
        super().__init__(message)
        self.step = step
        self.errno = errno
        self.detail = detail


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Of the whole tree, as far as it was reaped: CPU time, and the largest process in bytes."""

    cpu_usec: int = 0
    max_rss: int = 0


class ExitRecord(msgspec.Struct, frozen=True, kw_only=True):
    """How a run ended. `exit_code` is the program's status, or minus the number of its signal.

    `killed_by_us` names what of ours ended it, or was on its way to: `stop`, `kill_tree`, `signal` (a
    SIGKILL), `shutdown`; `escalated` that a stop's timeout had to kill. `lost`: its shim was killed from
    outside, so the code may be a guess. `cpu_limit`: RLIMIT_CPU ended it; `memory_limit`: the kernel did,
    for the memory of the program alone.
    """

    cid: str
    instance: str
    run: int
    exit_code: int
    finished_at_us: int
    started_at_us: int = 0
    cpu_limit: bool = False
    memory_limit: bool = False
    killed_by_us: str | None = None
    escalated: bool = False
    lost: bool = False
    usage: Usage = Usage()


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """A program that runs, and its shim, each by pid and start time (the platform's unit).

    `start_time` is 0 when the program has ended already.
    """

    pid: int
    start_time: int
    started_at_us: int
    shim_pid: int
    shim_start_time: int


class LaunchedContainer(msgspec.Struct, frozen=True, kw_only=True):
    """What the launcher knows of a container. `exit` is set once its run has ended, until it is forgotten.

    `pid` is None only for a start that takes unusually long. `ends` are the offsets up to which its streams
    are captured.
    """

    cid: str
    instance: str
    run: int
    pid: int | None
    start_time: int
    started_at_us: int
    shim_pid: int
    shim_start_time: int
    port: int | None = None
    exit: ExitRecord | None = None
    ends: dict[str, int] = {}


class StartRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A run to begin.

    `program` is a path, `cwd` absolute, `env` complete. `max_log_bytes` bounds what is kept of each stream,
    and `max_rate` the bytes of it that are stored per second. `cpu_time_limit_s` is only for telling why
    the program ended; the plan sets the limit.
    """

    cid: str
    instance: str
    run: int
    program: str
    argv: list[str]
    env: dict[str, str]
    cwd: str
    plan: dict[str, Any]
    state_dir: str
    max_log_bytes: int | None = None
    max_rate: int | None = None
    cpu_time_limit_s: float | None = None
    tty: bool = False


class ExecRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A program to run beside the container's own, under the sandbox that its run began with."""

    program: str
    argv: list[str]
    env: dict[str, str]
    cwd: str
    stdin: bytes = b""
    timeout_s: float = 60.0
    max_bytes: int = OUTPUT_BYTES


class ExecResult(msgspec.Struct, frozen=True, kw_only=True):
    """`truncated`: one of the outputs was longer than `max_bytes`. `timed_out`: it was killed for that."""

    exit_code: int
    stdout: bytes
    stderr: bytes
    truncated: bool = False
    timed_out: bool = False
