"""The ops that the worker may ask for, and what is done between passes.

    op             fields                                     answer
    hello          key, protocol [low, high], events          protocol, build, pid, start_time, started_at_us
    containers                                                containers, ports
    reserve_port   cid, port                                  port
    release_port   cid                                        released
    start          cid, instance, run, program, argv, env,    pid, start_time, started_at_us, shim_pid,
                   cwd, plan, state_dir, limits               shim_start_time
    signal         cid, instance, run, signum                 empty, when it was sent
    stop           cid, instance, run, signum, timeout_s      record, when the tree has ended
    kill_tree      cid, instance, run                         record, when the tree has ended
    exec           cid, program, argv, env, cwd, timeout_s,   exit_code, stdout, stderr (base64), truncated,
                   stdin (base64), max_output                 timed_out
    ack_output     cid, stream, offset                        none
    forget         cid, instance                              forgotten
    reexec         python, program, build                     empty, just before it happens
    shutdown       kill                                       empty, when nothing runs any more

A record is null when the program was never reached.
"""

import base64
import binascii
import signal
import time
from collections.abc import Callable
from typing import Any

from worker.launcher import requests
from worker.launcher.container import Container
from worker.launcher.control import Client, ClientReply, Control
from worker.launcher.exec import OUTPUT_BYTES, ExecSession
from worker.launcher.loop import Signals
from worker.launcher.protocol import (
    CONFLICT,
    EXHAUSTED,
    INVALID,
    NOT_FOUND,
    START_FAILED,
    STREAMS,
    Refused,
)
from worker.launcher.records import SHUTDOWN
from worker.launcher.reexec import Replacement
from worker.launcher.room import PER_RUN, require_descriptors
from worker.launcher.run import Host, Identity, Phase
from worker.launcher.sandbox import Sandboxes, kind_of
from worker.launcher.segments import SegmentWriter
from worker.launcher.spares import Spares

_MAX_EXECS = 64
_MAX_EXEC_OUTPUT = 1024 * 1024
_ABANDONED_S = 30.0
_LISTING_S = 2.0

Message = dict[str, Any]


class StartReply:
    """The answer to a start; after it there is time to make another spare."""

    def __init__(self, reply: ClientReply, spares: Spares) -> None:
        self._reply = reply
        self._spares = spares

    def ok(self, **fields: Any) -> None:
        self._reply.ok(**fields)
        self._spares.refill()

    def refuse(self, why: Refused) -> None:
        self._reply.refuse(why)
        self._spares.refill()


class Launcher:
    """The ops, and what is done between passes. `abandoned` tells that the data directory is no longer
    ours.
    """

    def __init__(
        self,
        host: Host,
        control: Control,
        signals: Signals,
        sandboxes: Sandboxes,
        spares: Spares,
        containers: dict[str, Container],
        replacement: Replacement,
        description: dict[str, Any],
        abandoned: Callable[[], bool],
    ) -> None:
        self.containers = containers
        self._replacement = replacement
        self._host = host
        self._loop = host.loop
        self._control = control
        self._signals = signals
        self._sandboxes = sandboxes
        self._spares = spares
        self._abandoned = abandoned
        self._shutdown: list[ClientReply] | None = None
        self._exec_numbers = 0
        self._listings: list[tuple[float, ClientReply]] = []
        control.description = description
        control.on_subscribe = self._subscribed
        control.ops = {
            "containers": self._op_containers,
            "reserve_port": self._op_reserve_port,
            "release_port": self._op_release_port,
            "start": self._op_start,
            "signal": self._op_signal,
            "stop": self._op_stop,
            "kill_tree": self._op_kill_tree,
            "exec": self._op_exec,
            "ack_output": self._op_ack_output,
            "forget": self._op_forget,
            "reexec": self._op_reexec,
            "shutdown": self._op_shutdown,
        }
        self._loop.after_pass = self._after_pass
        self._loop.add(signals.fd, self._on_signals)
        self._loop.timers.after(_ABANDONED_S, self._check_abandoned)

    # -- the loop

    def _on_signals(self, mask: int) -> None:
        came = self._signals.take()
        if signal.SIGCHLD in came:
            self._host.children.reap()
        if signal.SIGTERM in came:
            self._begin_shutdown()

    def _after_pass(self) -> None:
        self._answer_listings()
        if self._control.heard:
            items = self._host.capture.take_notices()
            if items:
                self._control.tell({"event": "output", "items": items})
        if self._shutdown is not None and not self._live():
            waiting, self._shutdown = self._shutdown, []
            for reply in waiting:
                reply.ok()
            self._loop.stopped = True

    def _live(self) -> list[Container]:
        return [container for container in self.containers.values() if container.live]

    def _subscribed(self) -> None:
        for container in self.containers.values():
            for stream in container.streams.values():
                self._host.capture.rearm(stream)

    def _check_abandoned(self) -> None:
        """A launcher whose data directory was deleted can be found by nobody; it ends when nothing runs."""
        if self._loop.stopped:
            return
        if self._abandoned() and not self._live():
            self._host.log("the data directory is gone; nothing runs; ending")
            self._loop.stopped = True
        self._loop.timers.after(_ABANDONED_S, self._check_abandoned)

    def _require_room(self, wanted: int) -> None:
        """Refused when there are too few descriptors for `wanted` more beside those already promised."""
        live = len(self._live())
        files = self._host.capture.files
        promised = min(live * len(STREAMS), files.limit) * 2 - files.open * 2
        require_descriptors(wanted + max(promised, 0) + self._spares.waiting * PER_RUN)

    # -- which container

    def _find(self, message: Message) -> Container:
        """The container of exactly this run."""
        cid, instance = requests.text(message, "cid"), requests.text(message, "instance")
        run = requests.whole(message, "run", 1, 1 << 62)
        container = self.containers.get(cid)
        if container is None or (container.identity.instance, container.identity.run) != (instance, run):
            raise Refused(NOT_FOUND, f"run {run} of {cid} ({instance}) is not known here")
        return container

    # -- ops

    def _op_containers(self, client: Client, message: Message, reply: ClientReply) -> None:
        # A start that is under way is waited for: a new worker shall find it running, or not at all.
        self._listings.append((time.monotonic() + _LISTING_S, reply))
        self._answer_listings()
        if self._listings:
            self._loop.timers.after(_LISTING_S, self._answer_listings)

    def _answer_listings(self) -> None:
        if not self._listings:
            return
        busy = any(c.phase is Phase.STARTING for c in self.containers.values())
        now = time.monotonic()
        due = [reply for until, reply in self._listings if not busy or until <= now]
        self._listings = [waiting for waiting in self._listings if waiting[1] not in due]
        for reply in due:
            reply.ok(containers=[c.to_wire() for c in self.containers.values()], ports=self._host.ports.all())

    def _op_reserve_port(self, client: Client, message: Message, reply: ClientReply) -> None:
        port = requests.optional_whole(message, "port", 1, 65535)
        self._require_room(1)
        reply.ok(port=self._host.ports.reserve(requests.text(message, "cid"), port))

    def _op_release_port(self, client: Client, message: Message, reply: ClientReply) -> None:
        reply.ok(released=self._host.ports.release(requests.text(message, "cid")))

    def _op_start(self, client: Client, message: Message, reply: ClientReply) -> None:
        identity = requests.identity(message)
        command = requests.command(message)
        plan = requests.plan(message)
        self._sandboxes.check(plan)
        if self._shutdown is not None:
            raise Refused(CONFLICT, "the launcher is shutting down")
        old = self.containers.get(identity.cid)
        if old is not None:
            same = (old.identity.instance, old.identity.run) == (identity.instance, identity.run)
            if same and old.phase is Phase.RUNNING:
                reply.ok(**old.started_wire())
                return
            if same or old.live:
                raise Refused(CONFLICT, f"run {old.identity.run} of {identity.cid} is {old.phase.value}")
            _check_written(old)
        self._require_room(PER_RUN)
        container = Container(self._host, identity, self._writers(identity, old))
        if old is not None:
            old.dispose()
        self.containers[identity.cid] = container
        self._spares.take(
            kind_of(plan),
            lambda shim: container.start(shim, command, plan, StartReply(reply, self._spares)),
            lambda failure: container.not_started("fork", failure, reply),
        )

    def _writers(self, identity: Identity, old: Container | None) -> dict[str, SegmentWriter]:
        """Those of the run before, which know where its streams ended and what of them is lost; or new ones."""
        if old is not None:
            before = old.identity
            if (before.instance, before.state_dir) == (identity.instance, identity.state_dir):
                return old.writers
        capture = self._host.capture
        return {name: capture.writer(identity.state_dir, name, identity.max_log_bytes) for name in STREAMS}

    def _op_signal(self, client: Client, message: Message, reply: ClientReply) -> None:
        container = self._find(message)
        if container.phase is not Phase.RUNNING:
            raise Refused(NOT_FOUND, f"{container.cid} does not run; it is {container.phase.value}")
        container.ending.signal(requests.signum(message), reply)

    def _op_stop(self, client: Client, message: Message, reply: ClientReply) -> None:
        container = self._find(message)
        if not container.live:
            reply.ok(record=container.run.record)
            return
        signum = requests.signum(message)
        container.ending.stop(signum, requests.seconds(message, "timeout_s"), reply)

    def _op_kill_tree(self, client: Client, message: Message, reply: ClientReply) -> None:
        container = self._find(message)
        if not container.live:
            reply.ok(record=container.run.record)
            return
        container.ending.kill_tree(reply)

    def _op_exec(self, client: Client, message: Message, reply: ClientReply) -> None:
        container = self.containers.get(requests.text(message, "cid"))
        command = requests.command(message)
        timeout_s = requests.seconds(message, "timeout_s")
        limit = requests.optional_whole(message, "max_output", 0, _MAX_EXEC_OUTPUT)
        try:
            stdin = base64.b64decode(message.get("stdin") or "", validate=True)
        except (ValueError, TypeError, binascii.Error) as failure:
            raise Refused(INVALID, f"stdin must be base64: {failure}") from failure
        if container is None or container.phase is not Phase.RUNNING:
            raise Refused(CONFLICT, "the container does not run")
        if len(container.execs) >= _MAX_EXECS:
            raise Refused(EXHAUSTED, f"{_MAX_EXECS} programs are being executed in the container already")
        self._require_room(len(STREAMS) + 1)
        self._exec_numbers += 1
        number = self._exec_numbers
        try:
            session = ExecSession(
                self._loop,
                reply,
                stdin=stdin,
                timeout_s=timeout_s,
                limit=OUTPUT_BYTES if limit is None else limit,
                send_kill=lambda: container.tell_shim({"t": "exec_kill", "n": number}),
            )
        except OSError as failure:
            detail = failure.strerror or str(failure)
            raise Refused(
                START_FAILED,
                f"descriptors: {detail}",
                step="descriptors",
                errno=failure.errno or 0,
                detail=detail,
            ) from failure
        container.execs[number] = session
        container.tell_shim(
            {"t": "exec", "n": number, **command._asdict(), **container.joins()}, session.passed
        )

    def _op_ack_output(self, client: Client, message: Message, reply: ClientReply) -> None:
        container = self.containers.get(requests.text(message, "cid"))
        stream = None if container is None else container.streams.get(requests.text(message, "stream"))
        if stream is not None:
            self._host.capture.acknowledge(stream, requests.whole(message, "offset", 0, 1 << 62))

    def _op_forget(self, client: Client, message: Message, reply: ClientReply) -> None:
        cid, instance = requests.text(message, "cid"), requests.text(message, "instance")
        container = self.containers.get(cid)
        if container is None or container.identity.instance != instance:
            reply.ok(forgotten=False)
            return
        if container.live:
            raise Refused(CONFLICT, f"{cid} is {container.phase.value}")
        _check_written(container)
        del self.containers[cid]
        container.dispose()
        reply.ok(forgotten=True)

    def _op_reexec(self, client: Client, message: Message, reply: ClientReply) -> None:
        if self._shutdown is not None:
            raise Refused(CONFLICT, "the launcher is shutting down")
        python, program = requests.text(message, "python"), requests.text(message, "program")
        build = requests.text(message, "build") if "build" in message else ""
        self._replacement.begin(python, program, build, reply)

    def _op_shutdown(self, client: Client, message: Message, reply: ClientReply) -> None:
        live = self._live()
        if live and not message.get("kill"):
            raise Refused(CONFLICT, f"{len(live)} containers run")
        self._begin_shutdown(reply)

    def _begin_shutdown(self, reply: ClientReply | None = None) -> None:
        if self._shutdown is None:
            self._shutdown = []
            self._spares.close()
            for container in self._live():
                container.ending.kill_tree(None, SHUTDOWN)
        if reply is not None:
            self._shutdown.append(reply)


def _check_written(container: Container) -> None:
    """It is tried again all the time; who forgets the run meanwhile would leave its output without an end."""
    if container.unwritten is not None:
        raise Refused(EXHAUSTED, f"the end of the output of {container.cid} is not written: the disk is full")
