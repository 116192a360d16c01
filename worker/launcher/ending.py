"""Ending a run: signals, deadlines, and what is done when the shim does not manage."""

import signal
import time
from collections.abc import Callable
from typing import Any

from worker.launcher.protocol import NOT_FOUND, UNAVAILABLE, Refused
from worker.launcher.reaper import Step, TreeKiller
from worker.launcher.records import KILL_TREE, SIGNAL, STOP
from worker.launcher.run import Host, Reply, Run
from worker.launcher.timers import Timer

_SILENCE_S = 10.0
_STEP_S = 0.01


class Ending:
    """Everything that is on its way to end one run. `send` reaches the shim, `kill_shim` ends it, `kill_group`
    at one stroke all that is in the run's control group, if it has one.
    """

    def __init__(
        self,
        host: Host,
        cid: str,
        run: Run,
        send: Callable[[dict[str, Any]], None],
        kill_shim: Callable[[], None],
        kill_group: Callable[[], None],
    ) -> None:
        self._host = host
        self._cid = cid
        self._run = run
        self._kill_shim = kill_shim
        self._kill_group = kill_group
        self._send = send
        self._waiters: list[Reply] = []
        self._signals: dict[int, Reply] = {}
        self._numbers = 0
        self._sent: set[int] = set()
        self._deadline: Timer | None = None
        self._watch: Timer | None = None

    # -- asked for

    def signal(self, signum: int, reply: Reply) -> None:
        """Pass a signal to the main program; answered when the shim has sent it."""
        if signum == signal.SIGKILL and self._run.killed_by is None:
            self._run.killed_by = SIGNAL
        self._pass(signum, reply, wake=False)

    def stop(self, signum: int, timeout_s: float, reply: Reply) -> None:
        """The stop signal, once, then the end of the tree after `timeout_s`; of two deadlines the earlier."""
        if self._run.killed_by in (None, SIGNAL):
            self._run.killed_by = STOP
        self._waiters.append(reply)
        if signum not in self._sent and timeout_s > 0:
            self._sent.add(signum)
            self._pass(signum, None, wake=True)
        self._kill_at(time.monotonic() + timeout_s)

    def kill_tree(self, reply: Reply | None, why: str = KILL_TREE) -> None:
        if reply is not None:
            self._waiters.append(reply)
        self._run.killed_by = why
        self._kill()

    def _kill_at(self, due: float) -> None:
        if self._deadline is None or due < self._deadline.due:
            if self._deadline is not None:
                self._deadline.cancel()
            self._deadline = self._host.loop.timers.after(due - time.monotonic(), self._escalate)

    def _pass(self, signum: int, reply: Reply | None, *, wake: bool) -> None:
        self._numbers += 1
        if reply is not None:
            self._signals[self._numbers] = reply
        self._send({"t": "signal", "n": self._numbers, "signum": signum, "wake": wake})

    def _escalate(self) -> None:
        self._run.escalated = True
        self._kill()

    def _kill(self) -> None:
        self._send({"t": "kill"})
        self._kill_group()
        if self._watch is None:
            self.alive()

    def alive(self) -> None:
        """The shim is at work on its tree, or should be: if it stays silent, we do it."""
        if self._watch is not None:
            self._watch.cancel()
        self._watch = self._host.loop.timers.after(_SILENCE_S, self._take_over)

    def _take_over(self) -> None:
        """Kill the shim's tree from here, then the shim, so that what is left of it comes to us."""
        self._host.log(f"{self._cid}: the shim is silent; ending its tree")
        self._run.taken_over = True
        table, shim, marker = self._host.table, self._run.shim_pid, self._run.marker
        killer = TreeKiller(table, lambda: table.members(shim, (), (), marker), eager=False)
        self._kill_step(killer)

    def _kill_step(self, killer: TreeKiller) -> None:
        step = killer.step()
        if step is Step.NOTHING:
            self._kill_shim()
            return
        wait_s = 0 if step is Step.STOPPED else _STEP_S
        self._watch = self._host.loop.timers.after(wait_s, lambda: self._kill_step(killer))

    # -- kept over a change of the launcher

    def state(self) -> dict[str, Any]:
        due = None if self._deadline is None else self._deadline.due
        return {"sent": sorted(self._sent), "due": due, "killing": self._watch is not None}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with the same deadline; the clock is the system's and the same for every process."""
        self._sent = set(state["sent"])
        if state["killing"]:
            self._kill()
        elif state["due"] is not None:
            self._kill_at(state["due"])

    # -- reached

    def signalled(self, number: int, *, gone: bool, refused: str) -> None:
        """The shim has passed a signal on, or found the program ended, or was not allowed to."""
        reply = self._signals.pop(number, None)
        if reply is None:
            return
        if gone:
            reply.refuse(_just_ended(self._cid))
        elif refused:
            reply.refuse(Refused(UNAVAILABLE, f"the program of {self._cid} cannot be signalled: {refused}"))
        else:
            reply.ok()

    def over(self, record: dict[str, Any] | None) -> None:
        """Answer whoever waits. `record` is None when the program was never reached."""
        for timer in (self._deadline, self._watch):
            if timer is not None:
                timer.cancel()
        waiters, self._waiters = self._waiters, []
        for reply in waiters:
            reply.ok(record=record)
        signals, self._signals = self._signals, {}
        for reply in signals.values():
            reply.refuse(_just_ended(self._cid))


def _just_ended(cid: str) -> Refused:
    return Refused(NOT_FOUND, f"the program of {cid} has just ended")
