"""The nursery: a child of the launcher that forks shims, so that the launcher itself need not.

A fork makes parent and child copy every page that either writes afterwards. The launcher writes to many, so
each shim would keep a copy of all of them alive (1.3 MB, measured), and each start would cost the launcher
as many page faults. The nursery writes to few and does nothing but fork.

The launcher sends one byte for each shim that it wants, its kind (see `sandbox`). Each answer is a record
(pid, errno) and, when errno is 0, four descriptors: the shim's socket, its program's order socket, and the
reading ends of stdout and stderr.
"""

import gc
import os
import select
import signal
import socket
import struct
from typing import NamedTuple, NoReturn

from worker.launcher.processes import System
from worker.launcher.program import Inherited
from worker.launcher.sandbox import Sandboxes
from worker.launcher.shim import ShimArguments, run_shim

ANSWER = struct.Struct("=ii")
DESCRIPTORS = 4
_MAX_WANTED = 256


class Heritage(NamedTuple):
    """What every shim gets from the launcher. `keep` are descriptors that it holds on to."""

    launcher: int
    inherited: Inherited
    keep: tuple[int, ...]
    sandboxes: Sandboxes
    table: System


def run_nursery(sock: socket.socket, heritage: Heritage) -> NoReturn:
    """The whole life of the nursery, right after its fork. Never returns."""
    try:
        _serve(sock, heritage)
    except BaseException as failure:
        # Nothing may unwind into the launcher's frames.
        os.write(2, f"nursery {os.getpid()}: {type(failure).__name__}: {failure}\n".encode(errors="replace"))
    os._exit(0)


def _serve(sock: socket.socket, heritage: Heritage) -> None:
    gc.disable()
    table = heritage.table
    table.follow_parent(signal.SIGKILL)
    if os.getppid() != heritage.launcher:
        return
    # The handlers stay those of the launcher, which do nothing, so that a shim need not set its own.
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_read, False)
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    table.name_process("fork")
    sock.setblocking(True)
    table.close_descriptors({0, 1, 2, sock.fileno(), wake_read, wake_write, *heritage.keep})
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLIN)
    poll.register(wake_read, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd == wake_read:
                os.read(wake_read, 512)
                _reap()
            else:
                wanted = sock.recv(_MAX_WANTED)
                if not wanted:
                    return
                for kind in wanted:
                    _answer(sock, heritage, bytes((kind,)))


def _reap() -> None:
    """Shims that have ended. What they had to say they have said to the launcher."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def _answer(sock: socket.socket, heritage: Heritage, kind: bytes) -> None:
    """Fork one shim and hand its descriptors over."""
    held: list[int] = []
    try:
        held += os.pipe()
        held += os.pipe()
        held += [one.detach() for one in socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)]
        held += [one.detach() for one in socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)]
        pid = os.fork()
    except OSError as failure:
        sock.sendall(ANSWER.pack(0, failure.errno or 0))
    else:
        stdout, stdout_write, stderr, stderr_write, ours, theirs, order, order_theirs = held
        if pid == 0:
            run_shim(
                ShimArguments(
                    sock=socket.socket(fileno=theirs),
                    order=socket.socket(fileno=order_theirs),
                    stdout=stdout_write,
                    stderr=stderr_write,
                    keep=heritage.keep,
                    launcher=heritage.launcher,
                    nursery=os.getppid(),
                    inherited=heritage.inherited,
                    sandboxes=heritage.sandboxes,
                    table=heritage.table,
                    kind=kind,
                )
            )
        socket.send_fds(sock, [ANSWER.pack(pid, 0)], [ours, order, stdout, stderr])
    for fd in held:
        os.close(fd)
