"""The launcher takes its own place: newer code, the same process, and no container notices.

The new code is tried first in a child (`--self-test`) with the tables of this moment, because after the exec there
is no way back: should it not run, the launcher would die, and its containers with it. Then the tables go to a file
without a name, clients are dropped (they come again), spares end, and exec does the rest: pid, children, descriptors,
locks and the lists of orphans stay what they are.
"""

import json
import os
import signal
from collections.abc import Callable
from typing import Any, NamedTuple

from worker.launcher.children import Children
from worker.launcher.container import Container
from worker.launcher.control import ClientReply, Control
from worker.launcher.ports import Ports
from worker.launcher.protocol import CONFLICT, EXHAUSTED, UNSUPPORTED, Refused
from worker.launcher.spares import Spares
from worker.launcher.state import STATE_VERSION, container_state, descriptors
from worker.launcher.timers import Timers

BUILD = "--build"
_SELF_TEST_S = 20.0
ENVIRONMENT = {"LC_ALL": "C.UTF-8"}


class Parts(NamedTuple):
    """What of the launcher goes into the state, or stands in its way. `arguments` are those it was started
    with.
    """

    containers: dict[str, Container]
    ports: Ports
    children: Children
    control: Control
    spares: Spares
    timers: Timers
    arguments: list[str]
    facts: dict[str, Any]
    held: dict[str, int]
    unnamed_file: Callable[[], int]
    log: Callable[[str], None]


class Replacement:
    """At most one attempt at a time."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._testing = False

    def begin(self, python: str, program: str, build: str, reply: ClientReply) -> None:
        """Try the new code, then become it. The answer is sent just before."""
        if self._testing:
            raise Refused(CONFLICT, "the launcher is about to be replaced already")
        command = [python, "-I", "-S", program]
        file = self._written(self._tables())  # whatever is in the way now is told at once
        try:
            pid = os.posix_spawn(
                python,
                [*command, "--self-test", str(STATE_VERSION)],
                ENVIRONMENT,
                file_actions=[(os.POSIX_SPAWN_DUP2, file, 0)],
            )
        except OSError as failure:
            raise Refused(UNSUPPORTED, f"{python} cannot be run: {failure.strerror}") from failure
        finally:
            os.close(file)
        self._testing = True
        timer = self._parts.timers.after(_SELF_TEST_S, lambda: os.kill(pid, signal.SIGKILL))

        def tested(status: int) -> None:
            timer.cancel()
            self._testing = False
            try:
                self._replace(command, build, status, reply)
            except Refused as why:
                reply.refuse(why)

        self._parts.children.add(pid, tested)

    def _replace(self, command: list[str], build: str, status: int, reply: ClientReply) -> None:
        if status:
            raise Refused(UNSUPPORTED, f"the new launcher's self-test failed: {command[-1]}")
        parts = self._parts
        tables = self._tables()
        file = self._written(tables)
        fds = [*descriptors(tables), file]
        arguments = [*_without_build(parts.arguments), *([BUILD, build] if build else [])]
        reply.ok()
        parts.control.drop_clients()
        parts.spares.close()
        # A SIGTERM of the next moments waits until there is a handler again.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
        for fd in fds:
            os.set_inheritable(fd, True)
        try:
            os.execve(command[0], [*command, *arguments, "--resume", str(file)], ENVIRONMENT)
        except OSError as failure:
            # As good as impossible after the self-test. Go on as we are.
            parts.log(f"exec of {command[0]} failed: {failure}")
            for fd in fds:
                os.set_inheritable(fd, False)
            os.close(file)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))
            parts.spares.reopen()

    def _written(self, tables: dict[str, Any]) -> int:
        """The descriptor of a file without a name that holds them. Refused when there is no room."""
        file = -1
        try:
            file = self._parts.unnamed_file()
            _write_all(file, json.dumps(tables).encode())
        except OSError as failure:
            if file >= 0:
                os.close(file)
            raise Refused(EXHAUSTED, f"no room for the launcher's tables: {failure}") from failure
        return file

    def _tables(self) -> dict[str, Any]:
        """Refused while something is under way that they cannot hold."""
        parts = self._parts
        return {
            "version": STATE_VERSION,
            "facts": parts.facts,
            "held": parts.held,
            "ports": parts.ports.state(),
            "containers": [container_state(container) for container in parts.containers.values()],
        }


def _without_build(arguments: list[str]) -> list[str]:
    """What this launcher was started with, but for the name of its code."""
    if BUILD not in arguments:
        return arguments
    at = arguments.index(BUILD)
    return [*arguments[:at], *arguments[at + 2 :]]


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def read_tables(fd: int) -> dict[str, Any]:
    """The tables that the launcher before us left in this descriptor, which is closed."""
    os.lseek(fd, 0, os.SEEK_SET)
    data = b""
    while chunk := os.read(fd, 1 << 20):
        data += chunk
    os.close(fd)
    tables: dict[str, Any] = json.loads(data)
    return tables
