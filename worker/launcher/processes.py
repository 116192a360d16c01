"""What the launcher needs of an operating system about processes: one table of functions per system.

`system()` picks by `os.uname()`, once. Linux is exact: orphans come to the nearest subreaper, a parent's
death is signalled, a process is named by a descriptor. macOS has none of the three; there a tree is what
descends from the root, now or by the unique ids of its first parents, and whoever lives in its sandbox.
"""

import os
import socket
from collections.abc import Callable, Collection
from typing import NamedTuple, Protocol

ROLES = ("main", "fork", "shim")


class Process(NamedTuple):
    """One process as the system shows it.

    `start` identifies it together with `pid`: clock ticks since boot on Linux (field 22 of /proc/<pid>/stat),
    the unique id on macOS.
    """

    pid: int
    ppid: int
    session: int
    start: int
    alive: bool
    stopped: bool


class System(Protocol):
    """`exact` says that every orphan below a subreaper shows up as its child; `rss_unit` is that of
    `ru_maxrss`.
    """

    exact: bool
    rss_unit: int

    def adopt_orphans(self) -> None:
        """Make this process the parent of every descendant that loses its own."""

    def fence(self, outsider: int) -> Callable[[], None] | None:
        """Shut this process in with all that it will start: none of them can signal anybody else any more.

        Gives what then kills all of them but itself at one stroke, wherever they are by now; None where the
        kernel cannot. `outsider` is a process of the same user: only when it cannot be signalled from in here,
        and could be before, is the fence believed in.
        """

    def heed_hidden_signals(self) -> None:
        """Undo an ignoring of signals that the language cannot name and every program would inherit: GNU make
        starts its commands with such.
        """

    def follow_parent(self, signum: int) -> None:
        """Have `signum` sent to this process when its parent dies."""

    def offer_to_oom(self, pid: int = 0) -> None:
        """Let this process, or that one of the same user, end before ours when the machine's memory runs out.

        A process that hides its memory can do it only when it is root.
        """

    def hide_memory(self) -> None:
        """Keep other processes of the same user from reading this one's memory."""

    def name_process(self, role: str) -> None:
        """Show one of ROLES in lists of processes."""

    def close_descriptors(self, keep: Collection[int]) -> None:
        """Close every descriptor but those of `keep`."""

    def find(self, pid: int) -> Process | None: ...

    def ended(self, pid: int) -> bool:
        """True for a child of this process that has ended and is not reaped yet."""

    def outgrew_limit(self, pid: int) -> bool:
        """True when the kernel ended this child, which is not reaped yet, for its memory limit."""

    def members(
        self, root: int, sessions: Collection[int], spare: Collection[int], marker: str = ""
    ) -> list[Process]:
        """The processes below `root`, without `root` and without `spare` and what is below these.

        Where `exact` is false, whoever holds `marker` counts too, or without one who is in `sessions`, which
        descendants of `root` began; and `root` is 0 when it is gone.
        """

    def signal(self, process: Process, signum: int) -> bool:
        """Signal exactly this process; False when it is gone, or its number means another one now."""

    def peer(self, sock: socket.socket) -> tuple[int, int]:
        """(pid, uid) of the process that connected; pid 0 when it is not known."""

    def cpu_limit_s(self, pid: int) -> int | None:
        """The soft RLIMIT_CPU of a process, None without one or where it cannot be asked."""

    def grow_pipe(self, fd: int, size: int) -> int:
        """Try to enlarge a pipe; gives its size."""

    def descriptor_limit(self) -> int:
        """The greatest soft RLIMIT_NOFILE that this process may set."""


def system() -> System:
    """The table of this machine."""
    if os.uname().sysname == "Darwin":
        from worker.launcher.darwin import DarwinSystem

        return DarwinSystem()
    from worker.launcher.linux import LinuxSystem

    return LinuxSystem()


def descends(table: System, pid: int, ancestor: int) -> bool:
    """True when `pid` is `ancestor` or below it, or when that cannot be ruled out."""
    for _ in range(4096):
        if pid == ancestor:
            return True
        if pid <= 1:
            return False
        process = table.find(pid)
        if process is None:
            return True
        pid = process.ppid
    return True
