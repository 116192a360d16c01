"""Telling the service manager how the worker is: sd_notify(3) and its watchdog, in plain datagrams.

Ready is whoever looks after the containers, also without a server: a node whose server is away is not to be
restarted. A ping is sent only after the journal's thread has answered, so that a worker whose loop or journal hangs
is replaced; its containers go on.
"""

import asyncio
import os
import socket
import time
from collections.abc import Awaitable, Callable, MutableMapping

from loguru import logger

SOCKET, WATCHDOG_USEC, WATCHDOG_PID = "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"
SEND_TIMEOUT_S = 1.0
MAX_STATUS = 200


class Notifier:
    """Without an address, every call does nothing."""

    def __init__(self, address: str | None = None, watchdog_s: float | None = None) -> None:
        """`address`: a path, or a name of the abstract space after a NUL. `watchdog_s`: a ping is expected so often."""
        self.watchdog_s = watchdog_s
        self._address = address
        self._status = ""
        self._ready = False

    @classmethod
    def take(cls, environment: MutableMapping[str, str]) -> "Notifier":
        """What the service manager said, which is taken away: it is for nobody whom this process starts."""
        name = environment.pop(SOCKET, "")
        usec, pid = environment.pop(WATCHDOG_USEC, ""), environment.pop(WATCHDOG_PID, "")
        if not name:
            return cls()
        if name[0] not in "/@" or len(name) < 2:
            logger.warning("{} is no path and no abstract name: the service manager is told nothing", SOCKET)
            return cls()
        ours = not pid or pid == str(os.getpid())
        watchdog_s = int(usec) / 1e6 if ours and usec.isdecimal() and int(usec) > 0 else None
        return cls("\0" + name[1:] if name[0] == "@" else name, watchdog_s)

    def ready(self) -> None:
        self._ready = True
        self._send("READY=1")

    def status(self, text: str) -> None:
        """One line for `systemctl status`; sent when it is another one than before."""
        text = " ".join(text.split())[:MAX_STATUS]
        if text != self._status:
            self._status = text
            self._send(f"STATUS={text}")

    def reloading(self) -> None:
        """Until `ready` is called again; the time must be that of this very message."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def ping(self) -> None:
        self._send("WATCHDOG=1")

    def _send(self, message: str) -> None:
        if self._address is None:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.settimeout(SEND_TIMEOUT_S)
                sender.sendto(message.encode(), self._address)
        except OSError as failure:
            what = message.partition("\n")[0]
            logger.warning("the service manager was not told {}: {}", what, failure.strerror or failure)


async def watch(notifier: Notifier, probe: Callable[[], Awaitable[object]]) -> None:
    """Ping at half of the watchdog's time, each time after `probe` has returned; a probe that hangs ends the pings."""
    if notifier.watchdog_s is None:
        return
    loop = asyncio.get_running_loop()
    due = loop.time()
    while True:
        await probe()
        notifier.ping()
        due = max(due + notifier.watchdog_s / 2, loop.time())
        await asyncio.sleep(due - loop.time())
