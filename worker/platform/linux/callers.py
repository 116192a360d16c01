"""Looking into a process whose system call waits for an answer (see `notify`). Standard library only.

What is read is a copy: the program can change its memory and its descriptors in the same moment, so whoever judges by
a copy must also act on that copy, and on a duplicate of the descriptor. Allowed as ptrace is (ptrace(2), access
mode checking): the shim is an ancestor of the program, of the same user or root, and owns its user namespace.
"""

import errno
import os

from .libc import syscall

_PIDFD_OPEN, _PIDFD_GETFD = 434, 438
_PIDFD_THREAD = os.O_EXCL  # Linux 6.9


class Caller:
    """A thread that waits. Opened first, then `Listener.waits` must say that it still does; then it may be used."""

    def __init__(self, pid: int) -> None:
        """OSError when it is gone, or may not be looked into."""
        self.pid = pid
        self._pidfd = _open(pid)

    def __enter__(self) -> "Caller":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._pidfd)

    def memory(self, address: int, length: int) -> bytes:
        """OSError: EFAULT where nothing is."""
        memory = os.open(f"/proc/{self.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(memory, length, address)
        except (OSError, OverflowError) as failure:
            raise OSError(errno.EFAULT, "no such memory") from failure
        finally:
            os.close(memory)

    def descriptor(self, number: int) -> int:
        """A duplicate of one of its descriptors: the same open file. OSError: EBADF when it has none such."""
        return syscall(_PIDFD_GETFD, self._pidfd, number, 0)

    def closes_on_exec(self, number: int) -> bool:
        info = os.open(f"/proc/{self.pid}/fdinfo/{number}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            flags = os.read(info, 256).partition(b"flags:")[2].split(maxsplit=1)[0]
        finally:
            os.close(info)
        return bool(int(flags, 8) & os.O_CLOEXEC)


def _open(pid: int) -> int:
    try:
        return syscall(_PIDFD_OPEN, pid, _PIDFD_THREAD)
    except OSError as failure:
        if failure.errno != errno.EINVAL:
            raise
    # An older kernel opens whole processes. Their threads share their descriptors, all but always.
    with open(f"/proc/{pid}/status", "rb") as status:
        for line in status:
            if line.startswith(b"Tgid:"):
                return syscall(_PIDFD_OPEN, int(line[5:]), 0)
    raise ProcessLookupError(errno.ESRCH, "it has ended")


def try_out() -> str:
    """Look into a child once: "" when it works, else why not. For a process of one thread."""
    told, tell = os.pipe()
    ready, go = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(go)
        os.read(ready, 1)
        os._exit(0)
    try:
        with Caller(child) as caller:
            os.close(caller.descriptor(tell))
            caller.closes_on_exec(tell)
    except OSError as failure:
        return f"no descriptor of a child can be had: {failure}"
    finally:
        for fd in (told, tell, ready, go):
            os.close(fd)
        os.waitpid(child, 0)
    return ""
