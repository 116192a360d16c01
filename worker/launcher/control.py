"""The launcher's socket: who may command it, and how requests become answers.

A peer must be of the same user, no process below the launcher, and show the secret of `launcher.key`. Until
then it may send one small frame, soon. The newest connection that asked for them gets the events.
"""

import os
import socket
from _operator import _compare_digest as compare_digest
from collections.abc import Callable, Sequence
from typing import Any

from worker.launcher.channel import Channel
from worker.launcher.loop import Loop
from worker.launcher.processes import System, descends
from worker.launcher.protocol import (
    INTERNAL,
    INVALID,
    MAX_FRAME,
    MAX_HELLO_FRAME,
    PROTOCOL_MAX,
    PROTOCOL_MIN,
    UNSUPPORTED,
    Refused,
)

_HELLO_S = 5.0
_MAX_STRANGERS = 16
_ACCEPTS = 16
_ACCEPT_AGAIN_S = 0.5
_PARTING_S = 5.0

Log = Callable[[str], None]


class ClientReply:
    """The answer to one request of a client that may be gone by then."""

    def __init__(self, client: "Client", number: object) -> None:
        self._client = client
        self._number = number

    def ok(self, **fields: Any) -> None:
        self._client.channel.send({"id": self._number, "ok": fields})

    def refuse(self, why: Refused) -> None:
        self._client.channel.send({"id": self._number, "error": why.to_wire()})


Op = Callable[["Client", dict[str, Any], ClientReply], None]


class Client:
    """One connection. `trusted` after a good hello."""

    def __init__(self, control: "Control", sock: socket.socket, pid: int) -> None:
        self.pid = pid
        self.trusted = False
        self._control = control
        self.channel = Channel(control.loop, sock, self._on_frame, self._on_closed, max_frame=MAX_HELLO_FRAME)
        self.deadline = control.loop.timers.after(_HELLO_S, self.drop)

    def trust(self) -> None:
        self.trusted = True
        self.deadline.cancel()
        self.channel.frames.max_frame = MAX_FRAME

    def drop(self) -> None:
        self.channel.close()
        self._on_closed("dropped")

    def _on_frame(self, message: dict[str, Any]) -> None:
        self._control.handle(self, message)

    def _on_closed(self, reason: str) -> None:
        self.deadline.cancel()
        self._control.gone(self)


class Control:
    """Accepts, checks, dispatches. `ops` maps a name to what does it."""

    def __init__(self, loop: Loop, listener: socket.socket, key_file: str, table: System, log: Log) -> None:
        self.loop = loop
        self.ops: dict[str, Op] = {}
        self.description: dict[str, Any] = {}
        self.on_subscribe: Callable[[], None] = _nothing
        self.clients: dict[Client, None] = {}
        self._listener = listener
        self._key_file = key_file
        self._table = table
        self._log = log
        self._subscriber: Client | None = None
        listener.setblocking(False)
        self._listen()

    # -- events

    @property
    def heard(self) -> bool:
        """Whether somebody gets the events."""
        return self._subscriber is not None

    def tell(self, event: dict[str, Any]) -> None:
        if self._subscriber is not None:
            self._subscriber.channel.send(event)

    # -- connections

    def _listen(self) -> None:
        if self._listener.fileno() >= 0:
            self.loop.add(self._listener.fileno(), self._accept)

    def _accept(self, mask: int) -> None:
        for _ in range(_ACCEPTS):
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as failure:
                # No descriptor is left. Asking again at once would keep the processor busy with it.
                self._log(f"a connection could not be accepted: {failure}")
                self.loop.remove(self._listener.fileno())
                self.loop.timers.after(_ACCEPT_AGAIN_S, self._listen)
                return
            try:
                pid, uid = self._table.peer(sock)
            except OSError as failure:
                self._log(f"a connection without a known peer: {failure}")
                sock.close()
                continue
            if uid != os.geteuid() or pid <= 0 or descends(self._table, pid, os.getpid()):
                self._log(f"refused a connection of process {pid}, user {uid}")
                sock.close()
                continue
            self.clients[Client(self, sock, pid)] = None
            self._limit_strangers()

    def _limit_strangers(self) -> None:
        strangers = [client for client in self.clients if not client.trusted]
        if len(strangers) > _MAX_STRANGERS:
            strangers[0].drop()

    def gone(self, client: Client) -> None:
        self.clients.pop(client, None)
        if self._subscriber is client:
            self._subscriber = None

    def drop_clients(self) -> None:
        """End every connection; whoever needs one makes another."""
        for client in list(self.clients):
            client.drop()

    def part(self) -> None:
        """Take leave of everybody: what was said is heard out, nothing more is done. Takes as long as the slowest peer,
        but not longer than `_PARTING_S`.
        """
        self.loop.remove(self._listener.fileno())
        self._listener.close()
        for client in list(self.clients):
            if client.trusted:
                client.channel.part()
            else:
                client.drop()
        self.loop.timers.after(_PARTING_S, self.drop_clients)
        while self.clients:
            self.loop.run_once()

    # -- requests

    def handle(self, client: Client, message: dict[str, Any]) -> None:
        reply = ClientReply(client, message.get("id"))
        name = message.get("op")
        try:
            if name == "hello":
                self._hello(client, message, reply)
            elif not client.trusted:
                raise Refused(INVALID, "the first request must be hello")
            else:
                op = self.ops.get(name) if isinstance(name, str) else None
                if op is None:
                    raise Refused(UNSUPPORTED, f"this launcher has no op {str(name)[:64]!r}")
                op(client, message, reply)
        except Refused as why:
            reply.refuse(why)
        except Exception as bug:
            self._log(f"op {name!r}: {type(bug).__name__}: {bug}")
            reply.refuse(Refused(INTERNAL, f"{name}: {type(bug).__name__}: {bug}"))
        if not client.trusted:
            client.drop()

    def _hello(self, client: Client, message: dict[str, Any], reply: ClientReply) -> None:
        shown = message.get("key")
        if not isinstance(shown, str) or not self._is_key(shown):
            self._log(f"refused process {client.pid}, which does not know the key")
            raise Refused(INVALID, "the key is wrong")
        low, high = _range(message.get("protocol"))
        version = min(high, PROTOCOL_MAX)
        if version < max(low, PROTOCOL_MIN):
            raise Refused(
                UNSUPPORTED,
                f"protocol versions {low} to {high}; this launcher has {PROTOCOL_MIN} to {PROTOCOL_MAX}",
            )
        client.trust()
        if message.get("events", True):
            self._subscriber = client
            self.on_subscribe()
        reply.ok(protocol=version, **self.description)

    def _is_key(self, shown: str) -> bool:
        with open(self._key_file, "rb") as file:
            key = file.read(4096).strip()
        return len(key) >= 16 and compare_digest(shown.encode(), key)


def _range(value: object) -> tuple[int, int]:
    if isinstance(value, Sequence) and len(value) == 2 and all(type(v) is int for v in value):
        return value[0], value[1]
    raise Refused(INVALID, "protocol must be the lowest and the highest version")


def _nothing() -> None:
    """Nobody wants to know."""
