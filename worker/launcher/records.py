"""Exit records: on disk, beside the container's other state, before anyone is told."""

import errno
import json
import os
import signal
from typing import Any

NAME = "exit.json"
_NEW = ".exit.json.new"

_CPU_SHARE = 0.9  # the kernel counts the limit by ticks, the usage exactly

STOP, KILL_TREE, SIGNAL, SHUTDOWN = "stop", "kill_tree", "signal", "shutdown"


def write_record(state_dir: str, record: dict[str, Any]) -> None:
    """Write and rename, so that a reader sees the old record or the new one. Raises OSError."""
    no_link = os.O_NOFOLLOW | os.O_CLOEXEC
    directory = os.open(state_dir, os.O_RDONLY | os.O_DIRECTORY | no_link)
    try:
        fd = os.open(_NEW, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | no_link, 0o600, dir_fd=directory)
        try:
            data = json.dumps(record, separators=(",", ":")).encode()
            if os.write(fd, data) != len(data):
                raise OSError(errno.ENOSPC, "no room for the exit record")
        finally:
            os.close(fd)
        os.rename(_NEW, NAME, src_dir_fd=directory, dst_dir_fd=directory)
    finally:
        os.close(directory)


def is_cpu_limit(code: int, cpu_usec: int, limit_s: float | None, *, by_us: bool) -> bool:
    """Whether RLIMIT_CPU ended the program: its signal, or the SIGKILL of the hard limit."""
    if code == -signal.SIGXCPU:
        return True
    if code != -signal.SIGKILL or by_us or limit_s is None:
        return False
    return cpu_usec >= limit_s * _CPU_SHARE * 1_000_000
