"""Runs programs in networks of their own, for the tests: one task a line, one answer a line.

A task: {plan, uid, names, code, argv, join}. A process of the user `uid` is the shim: it starts the program, which
enters the plan's root and sandbox and then executes `code`, or `argv`; and answers its gate as the launcher's shims
do. `join` is code for a second program, which joins the first one's container once that has ended.
An answer: {error, said, joined}; `say` and what a program prints is `said`.
"""

import ctypes
import json
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def make_packages() -> None:
    for name in ("worker", "worker.launcher", "worker.platform", "worker.platform.linux"):
        package = type(sys)(name)
        package.__path__ = [str(ROOT.joinpath(*name.split(".")))]
        sys.modules[name] = package


make_packages()
# What programs use: they find no library of this interpreter where they are.
import _thread  # noqa: E402
import asyncio  # noqa: E402
import errno  # noqa: E402
import functools  # noqa: E402
import http.client  # noqa: E402
import http.server  # noqa: E402
import struct  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402

from worker.launcher import report  # noqa: E402
from worker.launcher.gates import Gates  # noqa: E402
from worker.launcher.sandbox import Sandboxes, SandboxFailed  # noqa: E402
from worker.platform.linux.libc import prctl  # noqa: E402

_PDEATHSIG, _DUMPABLE, _SUBREAPER = 1, 4, 36
_MODULES = (_thread, asyncio, ctypes, errno, functools, os, select, signal, socket, struct, threading, time)
sandboxes = Sandboxes()
sandboxes.load()


def attempt(what: Callable[..., object], *arguments: object) -> str:
    try:
        what(*arguments)
    except OSError as failure:
        return errno.errorcode[failure.errno] if failure.errno else type(failure).__name__
    return "done"


class Programs:
    """The shim's part: one container, whose programs run one after the other."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.task = task
        self.poll = select.poll()
        self.gates = Gates(self.poll, sandboxes)
        self.namespaces: list[int] = []
        self.init = 0

    def run(self, code: str, argv: list[str] | None) -> tuple[str, str]:
        """(error, what it said), once it has ended."""
        ours, theirs = report.report_ends(True)
        said, saying = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(ours)
            become(self.task, code, argv, self.namespaces, theirs, saying)
        os.close(theirs)
        os.close(saying)
        self.poll.register(ours, select.POLLIN)
        self.poll.register(said, select.POLLIN)
        error, text = b"", b""
        open_ends = {ours, said}
        while open_ends:
            for fd, event in self.poll.poll(self.gates.pause()):
                if fd == ours:
                    chunk, descriptors = report.read_report_end(ours, True)
                    place = report.taken_place(chunk)
                    if place is not None:
                        self.namespaces += descriptors
                        self.init, pid = place[0] or self.init, place[1]
                    elif descriptors:
                        self.gates.add(descriptors, chunk)
                    else:
                        error += chunk
                        if not chunk:
                            open_ends.remove(fd)
                            self.poll.unregister(fd)
                elif fd == said:
                    chunk = os.read(said, 65536)
                    text += chunk
                    if not chunk:
                        open_ends.remove(fd)
                        self.poll.unregister(fd)
                else:
                    self.gates.serve(fd, event)
        os.close(ours)
        os.close(said)
        return error.decode(), text.decode(errors="replace")


def become(
    task: dict[str, Any], code: str, argv: list[str] | None, namespaces: list[int], tell: int, saying: int
) -> None:
    try:
        plan = task["plan"]
        os.setsid()
        if plan is not None:
            sandboxes.enter(plan, namespaces, lambda *told: report.give_place(tell, *told))
            descriptors, words = sandboxes.questions(plan, joined=bool(namespaces))
            listener = sandboxes.apply(plan)
            assert listener is not None
            report.hand_over(tell, [listener, *descriptors], words)
            os.chdir("/")
            ctypes.CDLL(None).prctl(_DUMPABLE, 1, 0, 0, 0)  # as an exec would
        os.dup2(saying, 1)
        os.dup2(saying, 2)
        for fd in range(3, 64):
            if fd != tell:
                try:
                    os.close(fd)
                except OSError:
                    continue
        os.set_inheritable(tell, False)
        if argv:
            os.execve(argv[0], argv, {"PATH": "/usr/bin:/bin"})
        os.close(tell)
        names = {module.__name__: module for module in _MODULES} | {"http": http, **task["names"]}
        names |= {
            "attempt": attempt,
            "say": lambda *words: os.write(1, (" ".join(map(str, words)) + "\n").encode()),
        }
        exec(code, names)
    except SandboxFailed as failure:
        os.write(tell, f"{failure.step}: {failure}".encode())
    except BaseException:
        os.write(1, traceback.format_exc().encode())
    os._exit(0)


def stage(task: dict[str, Any], writing: int) -> None:
    """One task, in a process of its own whose user can be changed."""
    answer = {"error": "", "said": "", "joined": ""}
    try:
        prctl(_SUBREAPER, 1)
        parent = os.getppid()
        if task["uid"] is not None:
            os.setgroups([])
            os.setresgid(task["uid"], task["uid"], task["uid"])
            os.setresuid(task["uid"], task["uid"], task["uid"])
            prctl(_DUMPABLE, 1)  # which the change of user cleared
        prctl(_PDEATHSIG, signal.SIGKILL)  # and with this process all of its container
        if os.getppid() != parent:
            os._exit(1)
        programs = Programs(task)
        answer["error"], answer["said"] = programs.run(task["code"], task["argv"])
        if task["join"]:
            error, answer["joined"] = programs.run(task["join"], None)
            answer["error"] += error
        if programs.init:
            os.kill(programs.init, signal.SIGKILL)
        try:
            while True:
                os.wait()
        except ChildProcessError:
            pass
    except BaseException:
        answer["error"] += traceback.format_exc()
    finally:
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)


def main() -> None:
    for line in sys.stdin.buffer:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            stage(json.loads(line), writing)
        os.close(writing)
        with open(reading, "rb") as pipe:
            answer = pipe.read()
        _, status = os.waitpid(pid, 0)
        if not answer:
            answer = json.dumps({"error": f"ended with {status}", "said": "", "joined": ""}).encode()
        sys.stdout.buffer.write(answer + b"\n")
        sys.stdout.buffer.flush()


main()
