"""One run of a container as the launcher sees it: its shim, its output, its end.

starting --started--> running --exited--> ended
    '--failed--> (answered, and gone)
either --the shim died--> lost: what it left is killed, then ended
"""

import errno
import signal
import time
from collections.abc import Callable
from typing import Any

from worker.launcher.capture import StreamCapture
from worker.launcher.ending import Ending
from worker.launcher.exec import ExecSession
from worker.launcher.program import Command
from worker.launcher.protocol import START_FAILED, STREAMS, Refused
from worker.launcher.reaper import exit_code
from worker.launcher.records import SIGNAL, is_cpu_limit, write_record
from worker.launcher.run import Group, Host, Identity, Phase, Reply, Run
from worker.launcher.segments import SegmentWriter
from worker.launcher.spares import Shim
from worker.launcher.timers import Timers

_RECORD_RETRY_S = 1.0
_GROUP_RETRY_S = 0.05
_SWEEP_AGAIN_S = 0.001


class Container:
    """`shim` is None while the container waits for one, and after its end."""

    def __init__(self, host: Host, identity: Identity, writers: dict[str, SegmentWriter]) -> None:
        self.host = host
        self.identity = identity
        self.writers = writers
        self.shim: Shim | None = None
        self.phase = Phase.STARTING
        self.run = Run()
        self.streams: dict[str, StreamCapture] = {}
        self.execs: dict[int, ExecSession] = {}
        self.ending = Ending(host, identity.cid, self.run, self.tell_shim, self._kill_shim, self._kill_group)
        self._early: list[dict[str, Any]] = []
        self._start_reply: Reply | None = None
        self.unwritten: list[str] | None = None  # streams whose end is not marked yet; None: all is on disk
        self._forgotten = False

    @property
    def cid(self) -> str:
        return self.identity.cid

    @property
    def live(self) -> bool:
        return self.phase is not Phase.ENDED

    # -- start

    def start(self, shim: Shim, command: Command, plan: dict[str, Any], reply: Reply) -> None:
        """Give the shim's waiting child its order.

        The answer comes when the program is reached, or when a step on the way failed.
        """
        self._start_reply = reply
        self.run.marker = str(plan.get("marker", ""))
        try:
            self._make_group(plan)
        except OSError as failure:
            self.host.children.shims.pop(shim.pid, None)
            shim.close()
            self._failed("cgroup", failure.errno or 0, failure.strerror or str(failure))
            return
        self.host.ports.lend(self.cid)
        order, shim.order = shim.order, None
        if order is not None:
            order.send_last({**command._asdict(), "plan": plan, **self.joins()})
        self.attach(shim)
        self.tell_shim({"t": "plan", "plan": plan})
        for message in self._early:
            self.tell_shim(message)

    def _make_group(self, plan: dict[str, Any]) -> None:
        """The run's control group, where the plan wants one. OSError."""
        limits = plan.get("cgroup")
        if limits is None:
            return
        if self.host.groups is None:
            raise OSError(errno.EOPNOTSUPP, "this launcher may make no control groups")
        name = f"{self.cid}.{self.identity.instance}.{self.identity.run}"
        self.host.groups.make(name, limits)
        self.run.group = name

    @property
    def group(self) -> Group | None:
        return self.host.groups.find(self.run.group) if self.host.groups and self.run.group else None

    def joins(self) -> dict[str, str]:
        """The word of an order that makes a program join the control group."""
        group = self.group
        return {} if group is None else {"cgroup": group.procs}

    def not_started(self, step: str, failure: OSError, reply: Reply) -> None:
        """There is no shim to be had."""
        self._start_reply = reply
        self._failed(step, failure.errno or 0, failure.strerror or str(failure))

    def attach(self, shim: Shim) -> None:
        """Take over a shim's messages and its program's output."""
        identity = self.identity
        self.shim = shim
        self.run.shim_pid, self.run.shim_start = shim.pid, shim.start
        shim.channel.on_frame = self._on_message
        shim.channel.on_closed = self._shim_gone
        pipes, shim.pipes = shim.pipes, ()
        for name, fd in zip(STREAMS, pipes, strict=True):
            self.streams[name] = self.host.capture.open(
                identity.cid, name, fd, self.writers[name], identity.max_rate
            )
        if self.run.pid is not None:
            self.host.children.expect(self.run.pid, self._main_reaped)

    # -- the shim

    def tell_shim(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        if self.shim is None:
            self._early.append(message)
            return
        self.shim.channel.send(message, fds)
        self.shim.signal(signal.SIGCONT)  # something of the same user may have stopped it

    def _kill_group(self) -> None:
        group = self.group
        if group is not None:
            group.kill()

    def _kill_shim(self) -> None:
        if self.shim is not None:
            self.shim.signal(signal.SIGKILL)

    def _on_message(self, message: dict[str, Any]) -> None:
        kind = message["t"]
        if kind == "started":
            self._started(message)
        elif kind == "failed":
            self._failed(message["step"], message["errno"], message["detail"])
        elif kind == "exited":
            self.run.usage = message
            self._end(message["code"], message["at"])
        elif kind == "signalled":
            self.ending.signalled(message["n"], gone=message["gone"], refused=message.get("refused", ""))
        elif kind == "ending":
            self.ending.alive()
        elif kind == "exec_failed":
            session = self.execs.pop(message["n"], None)
            if session is not None:
                session.failed(message["step"], message["errno"], message["detail"])
        elif kind == "exec_exited":
            session = self.execs.pop(message["n"], None)
            if session is not None:
                session.exited(message["code"])

    def _started(self, message: dict[str, Any]) -> None:
        run = self.run
        run.pid, run.started_at_us = message["pid"], message["at"]
        process = self.host.table.find(message["pid"])
        run.start = 0 if process is None else process.start
        run.cpu_limit_s = self.identity.cpu_limit_s or self.host.table.cpu_limit_s(message["pid"])
        self.phase = Phase.RUNNING
        self.host.children.expect(message["pid"], self._main_reaped)
        reply, self._start_reply = self._start_reply, None
        if reply is not None:
            reply.ok(**self.started_wire())

    def _failed(self, step: str, number: int, detail: str) -> None:
        """The program was never reached; nothing of it is left."""
        self.phase = Phase.ENDED
        self._dismiss()
        self.dispose()
        self._drop_group()
        self.host.ports.retake(self.cid)
        self.host.drop(self.cid)
        reply, self._start_reply = self._start_reply, None
        if reply is not None:
            message = f"{step}: {detail}"
            reply.refuse(Refused(START_FAILED, message, step=step, errno=number, detail=detail))
        self.ending.over(None)

    def _main_reaped(self, status: int) -> None:
        """The program came to us as an orphan, so its own end is known even though the shim is gone."""
        self.run.status = status

    def _shim_gone(self, reason: str) -> None:
        if self.live:
            self.host.log(f"{self.cid}: the shim is gone ({reason}); killing what it left")
            self.phase = Phase.LOST
            self.host.children.shims.pop(self.run.shim_pid, None)
            self._kill_shim()
            self._kill_group()
            self._sweep()

    def _sweep(self) -> None:
        self.host.children.sweep(self._swept, self.run.marker)

    def _swept(self) -> None:
        if self.shim is not None and self.shim.alive:
            # It holds its tree until it is dead itself.
            self.host.loop.timers.after(_SWEEP_AGAIN_S, self._sweep)
        elif self.run.pid is None:
            self._failed("shim", 0, "the container's parent process died before it reached the program")
        else:
            code = -signal.SIGKILL if self.run.status is None else exit_code(self.run.status)
            self._end(code, time.time_ns() // 1000)

    # -- the end

    def _end(self, code: int, at_us: int) -> None:
        """No process of the run is left: keep its last bytes, write its record, then tell."""
        lost = self.phase is Phase.LOST and not self.run.taken_over
        self.phase = Phase.ENDED
        self._dismiss()
        for stream in self.streams.values():
            self.host.capture.drain(stream)
        self.run.record = self._record(code, at_us, lost=lost)
        self._drop_group()
        self.resume_writing(list(STREAMS))
        self.host.ports.retake(self.cid)
        for session in self.execs.values():
            session.container_ended()
        self.execs.clear()
        self.host.tell({"event": "exit", "record": self.run.record})
        self.ending.over(self.run.record)

    def _record(self, code: int, at_us: int, *, lost: bool) -> dict[str, Any]:
        run, usage = self.run, self.run.usage
        by_us = run.killed_by is not None
        cpu_limit = is_cpu_limit(code, usage.get("main_cpu_usec", 0), run.cpu_limit_s, by_us=by_us)
        if run.killed_by == SIGNAL and code != -signal.SIGKILL:
            run.killed_by = None  # it ended by itself, before the signal came
        return {
            "cid": self.cid,
            "instance": self.identity.instance,
            "run": self.identity.run,
            "exit_code": code,
            "cpu_limit": cpu_limit,
            "memory_limit": (bool(usage.get("outgrew")) or self._ran_out()) and not by_us,
            "killed_by_us": run.killed_by,
            "escalated": run.escalated,
            "started_at_us": run.started_at_us,
            "finished_at_us": max(at_us, run.started_at_us),  # two processes read the clock
            "lost": lost,
            "usage": {"cpu_usec": usage.get("cpu_usec", 0), "max_rss": usage.get("max_rss", 0)},
        }

    def _ran_out(self) -> bool:
        group = self.group
        return group is not None and group.ran_out

    def _drop_group(self) -> None:
        group = self.group
        self.run.group = ""
        if group is not None:
            group.kill()
            remove_group(group, self.host.loop.timers, self.host.log)

    def resume_writing(self, unwritten: list[str] | None) -> None:
        """Write the ends of these streams and the record; again until the disk takes them."""
        self.unwritten = unwritten
        if unwritten is None or self._forgotten:
            return
        now_us = time.time_ns() // 1000
        left = [name for name in unwritten if not self.writers[name].finish_run(self.identity.run, now_us)]
        try:
            write_record(self.identity.state_dir, self.run.record or {})
            self.unwritten = left or None
        except OSError as failure:
            self.host.log(f"{self.cid}: the exit record cannot be written: {failure}")
            self.unwritten = left
        for stream in self.streams.values():
            self.host.capture.announce(stream)
        if self.unwritten is not None:
            self.host.loop.timers.after(_RECORD_RETRY_S, lambda: self.resume_writing(self.unwritten))

    def _dismiss(self) -> None:
        """The shim has said all that it will."""
        if self.shim is not None:
            self.shim.close()
            self.host.children.shims.pop(self.shim.pid, None)
            self.shim = None
        if self.run.pid is not None:
            self.host.children.forget(self.run.pid)

    def dispose(self) -> None:
        """Let go of everything, once the run is over and forgotten."""
        self._forgotten = True
        for stream in self.streams.values():
            self.host.capture.dispose(stream)

    # -- on the wire

    def started_wire(self) -> dict[str, Any]:
        run = self.run
        return {
            "pid": run.pid,
            "start_time": run.start,
            "started_at_us": run.started_at_us,
            "shim_pid": run.shim_pid,
            "shim_start_time": run.shim_start,
        }

    def to_wire(self) -> dict[str, Any]:
        return {
            "cid": self.cid,
            "instance": self.identity.instance,
            "run": self.identity.run,
            **self.started_wire(),
            "port": self.host.ports.get(self.cid),
            "exit": self.run.record,
            "ends": {name: writer.end for name, writer in self.writers.items()},
        }


def remove_group(group: Group, timers: Timers, log: Callable[[str], None]) -> None:
    """Take a control group away; again, while what was killed in it is still ending."""
    try:
        if not group.remove():
            timers.after(_GROUP_RETRY_S, lambda: remove_group(group, timers, log))
    except OSError as failure:
        log(f"the control group of {group.procs} stays: {failure}")
