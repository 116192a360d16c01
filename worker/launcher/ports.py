"""Port guards: a port that a container was given is held, bound but not listening, until its program starts.

Numbers stay assigned while the program runs, so that no other container gets the same one; after the exit the
guard is taken again.
"""

import errno
import socket
from typing import Any

from worker.launcher.protocol import EXHAUSTED, UNAVAILABLE, Refused
from worker.launcher.timers import Timers

_HOST = "127.0.0.1"
_ATTEMPTS = 64
_RETAKE_S = 1.0


class Guard:
    """`sock` is None while the port is lent to the container's program, or taken by someone else."""

    __slots__ = ("lent", "port", "sock")

    def __init__(self, port: int, sock: socket.socket | None) -> None:
        self.port = port
        self.sock = sock
        self.lent = False


class Ports:
    def __init__(self, timers: Timers) -> None:
        self._timers = timers
        self._guards: dict[str, Guard] = {}
        self._cids: dict[int, str] = {}

    def get(self, cid: str) -> int | None:
        guard = self._guards.get(cid)
        return None if guard is None else guard.port

    def all(self) -> dict[str, int]:
        return {cid: guard.port for cid, guard in self._guards.items()}

    def reserve(self, cid: str, port: int | None) -> int:
        """Hold `port`, or one that the kernel chooses, for a container; the same again for the same
        container.

        Refused `unavailable` when the port is someone else's, `resource_exhausted` when there is none.
        """
        held = self._guards.get(cid)
        if held is not None and port in (None, held.port):
            return held.port
        if port is None:
            sock = self._choose()
        else:
            owner = self._cids.get(port)
            if owner is not None:
                raise Refused(UNAVAILABLE, f"port {port} is assigned to {owner}")
            try:
                sock = _bind(port)
            except OSError as failure:
                raise Refused(UNAVAILABLE, f"port {port} cannot be held: {failure.strerror}") from failure
        self.release(cid)
        port = sock.getsockname()[1]
        self.put(cid, port, sock)
        return port

    def put(self, cid: str, port: int, sock: socket.socket | None, *, lent: bool = False) -> None:
        guard = self._guards[cid] = Guard(port, sock)
        guard.lent = lent
        self._cids[port] = cid

    def state(self) -> list[dict[str, Any]]:
        """Every guard, for `put` in a launcher that takes over."""
        return [
            {
                "cid": cid,
                "port": guard.port,
                "lent": guard.lent,
                "fd": -1 if guard.sock is None else guard.sock.fileno(),
            }
            for cid, guard in self._guards.items()
        ]

    def release(self, cid: str) -> bool:
        guard = self._guards.pop(cid, None)
        if guard is None:
            return False
        del self._cids[guard.port]
        if guard.sock is not None:
            guard.sock.close()
        return True

    def lend(self, cid: str) -> None:
        """Let the container's program bind its port."""
        guard = self._guards.get(cid)
        if guard is not None:
            guard.lent = True
            if guard.sock is not None:
                guard.sock.close()
                guard.sock = None

    def retake(self, cid: str) -> None:
        """Hold the port again after the program's end; tried on while someone else has it."""
        guard = self._guards.get(cid)
        if guard is None or guard.sock is not None:
            return
        guard.lent = False
        try:
            guard.sock = _bind(guard.port)
        except OSError:
            self._timers.after(_RETAKE_S, lambda: self._retake_later(cid, guard))

    def _retake_later(self, cid: str, guard: Guard) -> None:
        if self._guards.get(cid) is guard and not guard.lent:
            self.retake(cid)

    def _choose(self) -> socket.socket:
        """A port of the kernel's choice that is not assigned to a running container either."""
        passed: list[socket.socket] = []
        try:
            for _ in range(_ATTEMPTS):
                try:
                    sock = _bind(0)
                except OSError as failure:
                    message = f"no port is left: {failure.strerror}"
                    raise Refused(EXHAUSTED, message, errno=failure.errno) from failure
                if sock.getsockname()[1] not in self._cids:
                    return sock
                passed.append(sock)
        finally:
            for sock in passed:
                sock.close()
        raise Refused(EXHAUSTED, "no port is left that is not assigned already")


def _bind(port: int) -> socket.socket:
    """A bound socket that keeps every other one from the port, even when connections of its last user
    linger.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        try:
            sock.bind((_HOST, port))
        except OSError as failure:
            if failure.errno != errno.EADDRINUSE or not port:
                raise
            # Connections in TIME_WAIT forbid a plain bind. Without the option again, nobody can join.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((_HOST, port))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    except OSError:
        sock.close()
        raise
    return sock
