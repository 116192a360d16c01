"""Shims forked ahead of need, each with a child that waits to become a program.

Two forks of an interpreter, and the pages that they copy, are most of what a start costs; a spare has them
behind it. It belongs to nobody until it is taken. In a burst, those who want one wait for the nursery in
turn.

There are kinds of spares (see `sandbox`): plain ones always, others for a while after one was wanted.
"""

import errno
import gc
import itertools
import math
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable

from worker.launcher.channel import Channel
from worker.launcher.children import Children
from worker.launcher.loop import Loop
from worker.launcher.nursery import ANSWER, DESCRIPTORS, Heritage, run_nursery
from worker.launcher.sandbox import PLAIN

SPARES = 2
_KEPT_S = 300.0
_ASK_AGAIN_S = 0.02
_REVIVE_S = 1.0
_ATTEMPTS = 3


class Shim:
    """The launcher's side of one shim. `pipes` are the reading ends of its program's stdout and stderr."""

    def __init__(self, heritage: Heritage, pid: int, channel: Channel, order: Channel | None) -> None:
        self.pid = pid
        self.channel = channel
        self.order = order
        self.pipes: tuple[int, ...] = ()
        self._table = heritage.table
        self._process = heritage.table.find(pid)

    @property
    def start(self) -> int:
        return 0 if self._process is None else self._process.start

    @property
    def alive(self) -> bool:
        now = self._table.find(self.pid)
        return now is not None and now.alive and now.start == self.start

    def signal(self, signum: int) -> None:
        if self._process is not None:
            self._table.signal(self._process, signum)

    def close(self) -> None:
        """Let go of it; it ends what it has, and itself, when its sockets close."""
        self.channel.close()
        if self.order is not None:
            self.order.close()
            self.order = None
        for fd in self.pipes:
            os.close(fd)
        self.pipes = ()


OnShim = Callable[[Shim], None]
OnFailure = Callable[[OSError], None]


class Spares:
    """Owns the nursery. `shims` are the pids of all shims whose sockets are open, taken or not."""

    def __init__(
        self, loop: Loop, children: Children, heritage: Heritage, log: Callable[[str], None]
    ) -> None:
        self._loop = loop
        self._children = children
        self._heritage = heritage
        self._log = log
        self._sock: socket.socket | None = None
        self._spares: dict[bytes, list[Shim]] = {PLAIN: []}
        self._waiting: dict[bytes, list[tuple[OnShim, OnFailure]]] = {}
        self._wanted_at = {PLAIN: math.inf}
        self._asked: deque[bytes] = deque()
        self._failures = 0
        self._closed = False
        loop.timers.after(0, self._revive)  # whoever waits for the launcher need not wait for this

    @property
    def waiting(self) -> int:
        """How many shims are wanted and not there yet."""
        return sum(len(waiting) for waiting in self._waiting.values())

    def take(self, kind: bytes, on_shim: OnShim, on_failure: OnFailure) -> None:
        """Give a spare to `on_shim`, at once or when the nursery has made one. Call `refill` afterwards."""
        self._wanted_at[kind] = max(self._wanted_at.get(kind, 0.0), time.monotonic())
        spares = self._spares.setdefault(kind, [])
        while spares:
            shim = spares.pop(0)
            if not shim.channel.closed and shim.alive:
                on_shim(shim)
                return
        self._waiting.setdefault(kind, []).append((on_shim, on_failure))
        self._ask(kind)

    def close(self) -> None:
        """Let the nursery and every spare end, and make no more."""
        self._closed = True
        self._drop_nursery()
        for kind in self._spares:
            self._let_go(kind)
        self._fail(OSError(0, "the launcher is ending"))

    def reopen(self) -> None:
        """Make some again after all."""
        self._closed = False
        self._revive()

    # -- the nursery

    def _revive(self) -> None:
        if self._closed or self._sock is not None:
            return
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            gc.collect()
            gc.freeze()  # so that no collection, here or there, copies the pages that both share
            pid = os.fork()
        except OSError as failure:
            self._log(f"no nursery: {failure}")
            self._fail(failure)
            self._loop.timers.after(_REVIVE_S, self._revive)
            return
        if pid == 0:
            run_nursery(theirs, self._heritage)
        theirs.close()
        ours.setblocking(False)
        self._sock = ours
        self._asked.clear()
        self._children.add(pid, lambda status: None)
        self._loop.add(ours.fileno(), self._readable)
        for kind in self._wanted_at:
            self._ask(kind, SPARES)

    def _drop_nursery(self) -> None:
        if self._sock is not None:
            self._loop.remove(self._sock.fileno())
            self._sock.close()
            self._sock = None

    def refill(self) -> None:
        """A start is over: make up for it. Not earlier, or the fork would take the start's processor."""
        if self.waiting:
            return
        for kind, wanted_at in list(self._wanted_at.items()):
            if time.monotonic() - wanted_at > _KEPT_S:
                self._let_go(kind)
                del self._wanted_at[kind]
                continue
            spares = self._spares[kind] = [s for s in self._spares.get(kind, ()) if not s.channel.closed]
            self._ask(kind, SPARES - len(spares))

    def _let_go(self, kind: bytes) -> None:
        while self._spares[kind]:
            shim = self._spares[kind].pop()
            self._children.shims.pop(shim.pid, None)
            shim.close()

    def _ask(self, kind: bytes, spares: int = 0) -> None:
        """Want a shim for each who waits, and `spares` more."""
        wanted = len(self._waiting.get(kind, ())) + spares - self._asked.count(kind)
        if self._sock is None or wanted <= 0:
            return
        try:
            self._asked.extend([kind] * self._sock.send(kind * wanted))
        except BlockingIOError:
            self._loop.timers.after(_ASK_AGAIN_S, lambda: self._ask(kind))
        except OSError as failure:
            self._log(f"the nursery does not listen: {failure}")  # reading from it tells its end

    def _readable(self, mask: int) -> None:
        while self._sock is not None:
            try:
                data, fds, _, _ = socket.recv_fds(self._sock, ANSWER.size, DESCRIPTORS)
            except BlockingIOError:
                return
            except OSError as failure:
                self._gone(str(failure))
                return
            if len(data) < ANSWER.size:
                self._gone("end of stream")
                return
            kind = self._asked.popleft()
            pid, number = ANSWER.unpack(data)
            if not number and len(fds) < DESCRIPTORS:
                # Ours are used up. The shim ends when its sockets close.
                for fd in fds:
                    os.close(fd)
                number = errno.EMFILE
            if number:
                self._failed(kind, OSError(number, os.strerror(number)))
            else:
                self._born(kind, pid, fds)

    def _gone(self, reason: str) -> None:
        self._log(f"the nursery is gone: {reason}")
        self._drop_nursery()
        self._failures += 1
        if self._failures > _ATTEMPTS:
            self._fail(OSError(0, "the process that forks containers cannot be kept alive"))
            self._loop.timers.after(_REVIVE_S, self._revive)
        else:
            self._revive()

    def _failed(self, kind: bytes, failure: OSError) -> None:
        if self._waiting.get(kind):
            self._waiting[kind].pop(0)[1](failure)
        else:
            self._log(f"no spare shim: {failure}")

    def _fail(self, failure: OSError) -> None:
        waiting, self._waiting = self._waiting, {}
        for _, on_failure in itertools.chain.from_iterable(waiting.values()):
            on_failure(failure)

    def _born(self, kind: bytes, pid: int, fds: list[int]) -> None:
        self._failures = 0
        for fd in fds:
            os.set_inheritable(fd, False)
        sock, order = socket.socket(fileno=fds[0]), socket.socket(fileno=fds[1])
        shim = Shim(
            self._heritage,
            pid,
            Channel(self._loop, sock, lambda message: None, lambda reason: self._spare_gone(shim, reason)),
            Channel(self._loop, order, lambda message: None, lambda reason: None),
        )
        shim.pipes = tuple(fds[2:])
        self._children.shims[pid] = None
        if self._waiting.get(kind):
            self._waiting[kind].pop(0)[0](shim)
        else:
            self._spares.setdefault(kind, []).append(shim)

    def _spare_gone(self, shim: Shim, reason: str) -> None:
        """An idle spare ended, as after a signal from outside; another is made with the next start."""
        self._log(f"the spare shim {shim.pid} is gone: {reason}")
        self._children.shims.pop(shim.pid, None)
        shim.close()
        shim.signal(signal.SIGKILL)
