"""A container's small parent: forked from the launcher, never exec'd, so it costs its own few pages only.

It is the subreaper of everything that the container starts, so the tree below it is exact; and where the
kernel can, it is shut in with all of that, so that one signal to everybody kills them at one stroke. It forks
the child that will be the program (ahead of need, see `spares`) and the `exec` sessions, passes signals to the
program, and when the program ends, when it is told to, or when the launcher is gone, it kills all that is
left, reaps until it has no child, tells how the program ended, and exits.

Messages (frames of `protocol`, `t` names the kind):

    launcher -> shim   plan {plan} · signal {n, signum, wake} · kill {} · exec_kill {n}
                       exec {n, program, argv, env, cwd} with three descriptors
    shim -> launcher   started {pid, at} · failed {step, errno, detail} · signalled {n, gone, refused}
                       exec_failed {n, step, errno, detail} · exec_exited {n, code}
                       ending {left} while that takes long
                       exited {code, at, cpu_usec, main_cpu_usec, max_rss, outgrew}
"""

import array
import gc
import os
import resource
import select
import signal
import socket
import time
from typing import Any, NamedTuple, NoReturn

from worker.launcher.gates import Gates
from worker.launcher.processes import Process, System
from worker.launcher.program import Birth, Failure, Inherited, read_report, run_now, run_ordered
from worker.launcher.protocol import FrameBuffer, decode_body, encode_body, frame
from worker.launcher.reaper import Step, TreeKiller, belonging, exit_code, take_processor
from worker.launcher.report import read_report_end, report_ends, taken_place
from worker.launcher.sandbox import PLAIN, Sandboxes

_EXITED = b'{"t":"exited","code":%d,"at":%d,"cpu_usec":%d,"main_cpu_usec":%d,"max_rss":%d,"outgrew":%d}'
PLAN_START = b'{"t":"plan",'

# A signal that also wakes a shim which someone of the same user has stopped.
_PARENT_DIED = signal.SIGCONT

_MAX_DESCRIPTORS = 64
_KILL_WAITS_MS = (0, 1, 2, 5, 10, 20, 50)
_EXEC_KILL_STEPS = 60
_ENDING_S = 1.0


class Spawned:
    """A program of the container: the main one (`session` None) or one of an `exec`."""

    def __init__(self, pid: int, report: int, session: int | None, held: int | None) -> None:
        self.pid = pid
        self.held = held
        self.report: int | None = report
        self.session = session
        self.said = b""
        self.status: int | None = None
        self.times: Any = None


class ShimArguments(NamedTuple):
    """All that a shim takes over from the launcher; every other descriptor is closed."""

    sock: socket.socket
    order: socket.socket
    sandboxes: Sandboxes
    stdout: int
    stderr: int
    keep: tuple[int, ...]
    launcher: int
    nursery: int
    inherited: Inherited
    table: System
    kind: bytes


def run_shim(arguments: ShimArguments) -> NoReturn:
    """The whole life of a shim, right after the fork. Never returns."""
    try:
        gc.disable()  # a collection would copy the pages shared with the launcher
        Shim(arguments).run()
    except BaseException as failure:
        # Nothing may unwind into the launcher's frames. Its programs die by PDEATHSIG, the rest by the
        # launcher.
        os.write(2, f"shim {os.getpid()}: {type(failure).__name__}: {failure}\n".encode(errors="replace"))
    os._exit(1)


class Shim:
    def __init__(self, arguments: ShimArguments) -> None:
        self._args = arguments
        self._table = arguments.table
        self._sock = arguments.sock
        self._frames = FrameBuffer()
        self._passed: list[int] = []
        self._main: Spawned | None = None
        self._execs: dict[int, Spawned] = {}
        self._reports: dict[int, Spawned] = {}
        self._sessions: list[int] = []
        self._init = 0  # what holds a container with a root of its own together
        self._namespaces: list[int] = []
        self._poll = select.poll()
        self._gates = Gates(self._poll, arguments.sandboxes)
        self._wake = -1
        self._plan = b""
        self._childless = False
        self._ending = False
        # Those of a container with a root of its own die with its process namespace.
        self._stroke = self._table.fence(arguments.launcher) if arguments.kind == PLAIN else None

    def run(self) -> None:
        args = self._args
        # Before there is anybody: a program may have forked and ended before this process gets to run again.
        self._table.adopt_orphans()
        # First, because every page that is written to later would be copied once more.
        if not self._start_main():
            os._exit(0)
        os.setpgid(0, 0)
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        os.set_blocking(wake_read, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        self._table.follow_parent(_PARENT_DIED)
        if not self._has_parent():
            os._exit(0)
        self._table.name_process("shim")
        own = {0, 1, 2, self._sock.fileno(), wake_read, wake_write, *self._reports}
        own.update(spawned.held for spawned in self._spawned() if spawned.held is not None)
        self._table.close_descriptors(own | set(args.keep))
        self._wake = wake_read
        self._serve()

    # -- the loop

    def _serve(self) -> NoReturn:
        sock, wake = self._sock.fileno(), self._wake
        self._poll.register(sock, select.POLLIN)
        self._poll.register(wake, select.POLLIN)
        self._reap()  # the program may have ended before there was a wake-up for it
        while not self._ending:
            events = self._poll.poll(self._gates.pause())
            ready = [fd for fd, _ in events]
            for fd, event in events:
                spawned = self._reports.get(fd)
                if spawned is not None:
                    self._read_report(spawned)
                else:
                    self._gates.serve(fd, event)
            if wake in ready:
                _drain(wake)
                if not self._has_parent():
                    break
                self._reap()
            if sock in ready and not self._ending and not self._read_socket():
                break
        self._end_tree()

    def _has_parent(self) -> bool:
        """Whether the launcher is alive. Without a nursery, the launcher is the parent."""
        parent = os.getppid()
        if parent == self._args.launcher:
            self._table.follow_parent(_PARENT_DIED)  # it may have become that just now
        return parent in (self._args.launcher, self._args.nursery) or not self._table.exact

    def _spawned(self) -> list[Spawned]:
        main = [] if self._main is None else [self._main]
        return [*main, *self._execs.values()]

    def _send(self, **message: Any) -> None:
        self._send_body(encode_body(message))

    def _send_body(self, body: bytes) -> None:
        try:
            self._sock.sendall(frame(body))
        except (BrokenPipeError, ConnectionResetError):
            return  # the launcher is gone; the loop notices

    # -- programs

    def _start_main(self) -> bool:
        args = self._args
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        spawned = self._fork((null, args.stdout, args.stderr), None, None)
        os.close(null)
        if isinstance(spawned, Failure):
            self._send(t="failed", **spawned._asdict())
            return False
        self._main = spawned
        return True

    def _fork(
        self, files: tuple[int, int, int], session: int | None, order: dict[str, Any] | None
    ) -> Spawned | Failure:
        """Fork a child that becomes the program of `order`, or of the order that it will get."""
        args = self._args
        report_read, report_write = report_ends(self._table.exact)
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError as failure:
            os.close(report_read)
            os.close(report_write)
            return Failure("fork", failure.errno or 0, failure.strerror or str(failure))
        if pid == 0:
            birth = Birth(files, report_write, parent, args.inherited, args.sandboxes, args.table, args.kind)
            if order is None:
                run_ordered(birth, args.order)
            run_now(birth, order)
        held = args.sandboxes.hold(pid)
        os.close(report_write)
        self._sessions.append(pid)
        self._poll.register(report_read, select.POLLIN)
        spawned = self._reports[report_read] = Spawned(pid, report_read, session, held)
        return spawned

    def _read_report(self, spawned: Spawned) -> None:
        """Read what the child says of its way to the program; the end of it is the news."""
        if spawned.report is None:
            return
        chunk, descriptors = read_report_end(spawned.report, self._table.exact)
        place = taken_place(chunk)
        if place is not None:
            self._namespaces += descriptors
            self._take_place(spawned, *place)
            return
        if descriptors:
            self._gates.add(descriptors, chunk)
            return
        if chunk:
            spawned.said += chunk
            return
        self._poll.unregister(spawned.report)
        del self._reports[spawned.report]
        os.close(spawned.report)
        spawned.report = None
        failure = read_report(spawned.said)
        if failure is None and os.geteuid() != 0:
            self._table.offer_to_oom(spawned.pid)
        if spawned.session is not None:
            if failure is not None:
                self._execs.pop(spawned.session)
                self._send(t="exec_failed", n=spawned.session, **failure._asdict())
        elif failure is None:
            # Written out: the encoder's first use would cost every shim 150 KB of copied pages.
            self._send_body(b'{"t":"started","pid":%d,"at":%d}' % (spawned.pid, _now_us()))
        else:
            self._main = None
            self._end_children()
            self._send(t="failed", **failure._asdict())
            os._exit(0)

    def _take_place(self, spawned: Spawned, init: int, program: int) -> None:
        """The child has forked its program beside itself, and ends."""
        self._init = init or self._init
        self._sessions[self._sessions.index(spawned.pid)] = program
        spawned.pid = program
        if spawned.held is not None:
            os.close(spawned.held)
            spawned.held = None

    def _reap(self) -> None:
        """Collect whoever ended. The main program is looked at first, so that its number stays ours."""
        main = self._main
        if main is not None and main.status is None and self._table.ended(main.pid):
            child = main.pid
            while main.report is not None and main.pid == child:
                self._read_report(main)  # what it said last, or the end: it has ended
            if main.pid == child:
                self._ending = True
                return
        while self._collect():
            if main is not None and main.status is not None:
                self._ending = True
                return

    def _collect(self) -> bool:
        """Reap one child; False when none is ready, and `_childless` when there is none at all."""
        try:
            pid, status, times = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            self._childless = True
            return False
        self._childless = False
        if pid == 0:
            return False
        if pid == self._init:
            self._init = 0
        for spawned in self._spawned():
            while spawned.pid == pid and spawned.report is not None:
                self._read_report(spawned)  # its end is there: nobody else holds it before exec
            if spawned.pid == pid:
                spawned.status = status
                spawned.times = times
                if spawned.held is not None:
                    os.close(spawned.held)
                    spawned.held = None
                if self._table.exact:
                    self._sessions.remove(pid)  # what is left of its session is found without it
                if spawned.session is not None and self._execs.pop(spawned.session, None) is not None:
                    self._send(t="exec_exited", n=spawned.session, code=exit_code(status))
        return True

    # -- what the launcher asks

    def _read_socket(self) -> bool:
        """False at the end of it: the launcher is gone."""
        try:
            data, ancillary, _, _ = self._sock.recvmsg(65536, socket.CMSG_SPACE(_MAX_DESCRIPTORS * 4))
        except ConnectionResetError:
            return False
        for level, kind, raw in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
                for fd in fds:
                    os.set_inheritable(fd, False)
                self._passed += fds
        if not data:
            return False
        self._frames.feed(data)
        while not self._ending:
            body = self._frames.next()
            if body is None:
                break
            if body.startswith(PLAN_START):
                self._plan = body  # taken apart only when an exec needs it
            else:
                self._obey(decode_body(body))
        return True

    def _obey(self, message: dict[str, Any]) -> None:
        kind = message["t"]
        if kind == "signal":
            self._pass_signal(message["n"], message["signum"], message["wake"])
        elif kind == "kill":
            self._ending = True
        elif kind == "exec":
            self._exec(message)
        elif kind == "exec_kill":
            self._exec_kill(message["n"])

    def _pass_signal(self, number: int, signum: int, wake: bool) -> None:
        main = self._main
        refused = ""
        gone = main is None or main.status is not None
        if main is not None and not gone:
            try:
                # Not reaped, so the number is still its own, even when it has just ended.
                os.kill(main.pid, signum)
                process = self._table.find(main.pid) if wake else None
                if process is not None and process.stopped:
                    os.kill(main.pid, signal.SIGCONT)
            except OSError as failure:
                refused = failure.strerror or str(failure)  # it has changed its user
        self._send(t="signalled", n=number, gone=gone, refused=refused)

    def _exec(self, message: dict[str, Any]) -> None:
        files = (self._passed.pop(0), self._passed.pop(0), self._passed.pop(0))
        number = message["n"]
        order = {**message, "plan": decode_body(self._plan)["plan"], "namespaces": self._namespaces}
        spawned = self._fork(files, number, order)
        for fd in files:
            os.close(fd)
        if isinstance(spawned, Failure):
            self._send(t="exec_failed", n=number, **spawned._asdict())
        else:
            self._execs[number] = spawned

    def _exec_kill(self, number: int) -> None:
        """Kill an exec session: what descends from it, and what lost its parent but stayed in its session."""
        spawned = self._execs.get(number)
        if spawned is None:
            return
        killer = TreeKiller(self._table, lambda: belonging(self._members(), spawned.pid), eager=False)
        for _ in range(_EXEC_KILL_STEPS):
            step = killer.step((spawned.pid,))
            if step is Step.NOTHING:
                break
            if step is Step.KILLED:
                time.sleep(0.001)  # the kernel ends what was killed in its own time

    def _members(self) -> list[Process]:
        marker = ""
        if self._plan and not self._table.exact:
            marker = str(decode_body(self._plan)["plan"].get("marker", ""))
        return self._table.members(os.getpid(), self._sessions, (), marker)

    # -- the end

    def _end_tree(self) -> NoReturn:
        main = self._main
        at = _now_us()
        ended = main is not None and (main.status is not None or self._table.ended(main.pid))
        outgrew = main is not None and main.status is None and self._table.outgrew_limit(main.pid)
        self._end_children()
        if main is not None and main.status is not None:
            usage = resource.getrusage(resource.RUSAGE_CHILDREN)
            # Written out, as `started` is.
            self._send_body(
                _EXITED
                % (
                    exit_code(main.status),
                    at if ended else _now_us(),
                    _cpu_usec(usage),
                    _cpu_usec(main.times),
                    usage.ru_maxrss * self._table.rss_unit,
                    outgrew,
                )
            )
        os._exit(0)

    def _end_children(self) -> None:
        """Until no child is left: kill all that there is, reap, look again."""
        killer = TreeKiller(self._table, self._members, eager=True)
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        waits = iter(_KILL_WAITS_MS)
        told = time.monotonic()
        if self._init:
            os.kill(self._init, signal.SIGKILL)  # and the kernel all that is inside
        if self._stroke is None:
            killer.kill_groups(self._leaders())
        else:
            take_processor()
        while True:
            while self._collect():
                pass
            if self._childless and self._table.exact:
                return
            step = self._kill_step(killer)
            if self._childless and step is Step.NOTHING:
                return
            if step is not Step.STOPPED:
                poll.poll(next(waits, _KILL_WAITS_MS[-1]))
                _drain(self._wake)
            if time.monotonic() - told > _ENDING_S:
                told = time.monotonic()
                self._send(t="ending", left=len(self._members()))

    def _kill_step(self, killer: TreeKiller) -> Step:
        if self._stroke is None:
            return killer.step(self._leaders())
        self._stroke()
        return Step.KILLED

    def _leaders(self) -> list[int]:
        """Leaders of sessions whose numbers cannot mean another process: they are not reaped yet."""
        return [s.pid for s in self._spawned() if s.status is None]


def _cpu_usec(usage: resource.struct_rusage) -> int:
    return round((usage.ru_utime + usage.ru_stime) * 1_000_000)


def _now_us() -> int:
    return time.time_ns() // 1000


def _drain(fd: int) -> None:
    """Empty a non-blocking pipe of wake-ups."""
    try:
        while len(os.read(fd, 512)) == 512:
            pass
    except BlockingIOError:
        return
