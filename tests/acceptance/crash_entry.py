"""A worker that ends itself with SIGKILL at a named point, to be run by `forked`.

The file that `CRASH_AT` names holds `<point> <command id> <op of the launcher>`; without the file nothing happens. The real methods are
wrapped in this process alone, so that nothing of it is in the worker.
"""

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

# In the order in which a command comes by them.
POINTS = (
    "received",  # the message is in hand, nothing is written
    "accepting",  # the acceptance is written, not committed
    "accepted",  # it is committed, and nobody heard of that
    "acknowledging",  # before the message is acknowledged
    "acknowledged",  # right after
    "begun",  # before the verb does anything beyond its first step
    "asked",  # the launcher was asked, and has not answered
    "answered",  # it has, and nothing is written of that
    "completing",  # the completion is written, not committed
    "completed",  # it is committed, and nobody heard of that
)
FULL = "full"  # nothing ends: the completion finds the disk full, as often as it is tried
# Not the worker but its launcher ends, or stands still for a while:
ADOPTING = "adopting"  # when it is asked what it runs
LAUNCHING = "launching"  # when it was asked to start a program, and has not answered
STANDING = "standing"  # when it is asked to start one, for longer than the worker waits
PATIENCE_S, STANDING_S = 0.2, 1.0
OPS = {  # what each verb asks the launcher for
    "create": "reserve_port",
    "run": "start",
    "start": "start",
    "stop": "stop",
    "kill": "signal",
    "restart": "start",
    "remove": "kill_tree",
}


def arm(path: Path, point: str, command_id: str = "-", verb: str = "create") -> None:
    path.write_text(f"{point} {command_id} {OPS[verb]}")


def disarm(path: Path) -> None:
    path.unlink(missing_ok=True)


class Crash:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.in_hand = False  # the command in question was accepted by this process or an earlier one

    def at(self, point: str, command_id: str | None = None) -> None:
        if self.is_at(point, command_id):
            os.kill(os.getpid(), signal.SIGKILL)

    def is_at(self, point: str, command_id: str | None = None) -> bool:
        wanted, wanted_id, _ = self._armed()
        return wanted == point and command_id in (None, wanted_id)

    @property
    def command_id(self) -> bytes:
        return self._armed()[1].encode()

    @property
    def op(self) -> str:
        return self._armed()[2]

    def _armed(self) -> tuple[str, str, str]:
        try:
            point, command_id, op = self._path.read_text().split()
        except FileNotFoundError:
            return "", "\0", ""
        return point, command_id, op


def wrap(crash: Crash) -> None:
    from worker.bus.delivery import Delivery
    from worker.errors import ResourceExhausted
    from worker.handlers import CommandHandler
    from worker.journal import _Owner
    from worker.journal_tx import Tx
    from worker.operations import ContainerOperations
    from worker.supervisor import Launcher

    committed: set[str] = set()  # what the transaction that is open has written

    def replace(owner: type, name: str, make: Callable[[Any], Any]) -> None:
        setattr(owner, name, make(getattr(owner, name)))

    def handle(real: Any) -> Any:
        async def wrapped(self: CommandHandler, delivery: Delivery) -> None:
            if crash.command_id in delivery.data:
                crash.at("received")
            await real(self, delivery)

        return wrapped

    def accept(real: Any) -> Any:
        def wrapped(self: Tx, entry: Any) -> None:
            real(self, entry)
            crash.at("accepting", entry.id)
            if crash.is_at("accepted", entry.id):
                committed.add("accepted")
            crash.in_hand |= entry.id.encode() == crash.command_id

        return wrapped

    def complete(real: Any) -> Any:
        def wrapped(self: Tx, command_id: str, *args: Any) -> None:
            if crash.is_at(FULL, command_id):
                raise ResourceExhausted("no space left, as this test wants it")
            real(self, command_id, *args)
            crash.at("completing", command_id)
            if crash.is_at("completed", command_id):
                committed.add("completed")

        return wrapped

    def commit(real: Any) -> Any:
        def wrapped(self: _Owner, group: Any) -> Any:
            answers = real(self, group)
            for point in committed:
                crash.at(point)
            return answers

        return wrapped

    def ack(real: Any) -> Any:
        async def wrapped(self: Delivery, **options: Any) -> None:
            ours = crash.command_id in self.data
            if ours:
                crash.at("acknowledging")
            await real(self, **options)
            if ours:
                crash.at("acknowledged")

        return wrapped

    def perform(real: Any) -> Any:
        async def wrapped(self: ContainerOperations, actor: Any, work: Any) -> Any:
            crash.at("begun", work.id)
            return await real(self, actor, work)

        return wrapped

    def ask(real: Any) -> Any:
        async def wrapped(self: Launcher, op: str, *args: Any, **fields: Any) -> Any:
            if not crash.in_hand or op != crash.op:
                return await real(self, op, *args, **fields)
            if crash.is_at(STANDING):
                disarm(crash._path)
                os.kill(self.pid, signal.SIGSTOP)
                asyncio.get_running_loop().call_later(STANDING_S, os.kill, self.pid, signal.SIGCONT)
                return await real(self, op, PATIENCE_S, **fields)
            asking = asyncio.ensure_future(real(self, op, *args, **fields))
            for _ in range(3):  # until it is on its way
                await asyncio.sleep(0)
            crash.at("asked")
            if crash.is_at(LAUNCHING):
                disarm(crash._path)
                os.kill(self.pid, signal.SIGKILL)
            try:
                return await asking
            finally:
                crash.at("answered")  # also when the answer is an error

        return wrapped

    def containers(real: Any) -> Any:
        async def wrapped(self: Launcher) -> Any:
            if crash.is_at(ADOPTING):
                disarm(crash._path)
                os.kill(self.pid, signal.SIGKILL)
            return await real(self)

        return wrapped

    replace(CommandHandler, "handle", handle)
    replace(Tx, "accept", accept)
    replace(Tx, "complete", complete)
    replace(_Owner, "_commit", commit)
    replace(Delivery, "ack", ack)
    replace(ContainerOperations, "perform", perform)
    replace(Launcher, "_ask", ask)
    replace(Launcher, "containers", containers)


def prepare() -> None:
    """Everything that a worker imports, so that a fork has it."""
    import worker.agent
    import worker.cli.app
    import worker.cli.worker_cmd  # noqa: F401


def run() -> None:
    from worker.__main__ import main

    wrap(Crash(Path(os.environ["CRASH_AT"])))
    main()
