"""The launcher's one thread: control first, then timers, then output, in every pass."""

import os
import signal
import time
from collections.abc import Callable

from worker.launcher.capture import Capture
from worker.launcher.mux import Mux
from worker.launcher.timers import Timers

Handler = Callable[[int], None]


class Loop:
    """Calls the handler of each descriptor that is ready, with the mask of events.

    A handler that raises is a bug of ours: it is told to `on_bug` and loses its descriptor's event, not the
    launcher. `after_pass` runs at the end of each pass.
    """

    def __init__(self, mux: Mux, capture: Capture, on_bug: Callable[[Exception, int], None]) -> None:
        self.timers = Timers()
        self.after_pass: Callable[[], None] = _nothing
        self.stopped = False
        self._mux = mux
        self._capture = capture
        self._on_bug = on_bug
        self._handlers: dict[int, Handler] = {}

    def add(self, fd: int, handler: Handler, *, write: bool = False) -> None:
        self._handlers[fd] = handler
        self._mux.watch(fd, write=write)

    def want_write(self, fd: int, wanted: bool) -> None:
        self._mux.watch(fd, write=wanted)

    def remove(self, fd: int) -> None:
        if self._handlers.pop(fd, None) is not None:
            self._mux.unwatch(fd)

    def run(self) -> None:
        while not self.stopped:
            self.run_once()

    def run_once(self) -> None:
        muted_s = self._capture.muted_for()
        events, output = self._mux.wait(self._timeout(muted_s), output=not muted_s)
        for fd, mask in events:
            handler = self._handlers.get(fd)
            if handler is None:
                continue  # an earlier handler of this pass removed it
            try:
                handler(mask)
            except Exception as bug:
                self._on_bug(bug, fd)
        try:
            self.timers.run_due()
            if output:
                self._capture.read_ready()
            self.after_pass()
        except Exception as bug:
            self._on_bug(bug, -1)

    def _timeout(self, muted_s: float) -> float | None:
        due = self.timers.next_due()
        timeout = muted_s or None
        if due is not None:
            until = max(due - time.monotonic(), 0.0)
            timeout = until if timeout is None else min(timeout, until)
        return timeout


def _nothing() -> None:
    """Nothing to do after a pass."""


class Signals:
    """Turns SIGCHLD and SIGTERM into a readable descriptor."""

    IGNORED = (
        signal.SIGHUP,
        signal.SIGINT,
        signal.SIGQUIT,
        signal.SIGPIPE,
        signal.SIGALRM,
        signal.SIGUSR1,
        signal.SIGUSR2,
        signal.SIGTSTP,
        signal.SIGTTIN,
        signal.SIGTTOU,
        signal.SIGXFSZ,
    )

    def __init__(self) -> None:
        self.fd, self._write = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(self._write, False)
        for number in self.IGNORED:
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _noted)
        signal.signal(signal.SIGTERM, _noted)
        signal.signal(signal.SIGCONT, _noted)  # for shims, which inherit it: see there
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # what waited for a handler has one now

    def take(self) -> set[int]:
        """The signals that came since the last call; SIGCHLD is always among them when there were too many."""
        try:
            return set(os.read(self.fd, 4096))
        except BlockingIOError:
            return set()


def _noted(number: int, frame: object) -> None:
    """The wake-up descriptor has the news already."""


def handled_signals() -> tuple[int, ...]:
    """The signals whose disposition is not the default one here, which a program must not inherit."""
    return tuple(
        int(number) for number in signal.valid_signals() if signal.getsignal(number) is not signal.SIG_DFL
    )
