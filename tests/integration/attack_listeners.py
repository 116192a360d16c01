"""Who listens outside of the sandboxes in the machine of the attacks: sockets of every kind, and terminals."""

import contextlib
import os
import pty
import select
import socket
import termios
import threading
from pathlib import Path
from typing import Any

ABSTRACT = "sandfleet-attack"
_PAUSE_S = 0.02


class Listeners:
    """Servers of every kind. What they are sent is a name on a line; and a guest for every server that is new."""

    names = frozenset(
        [
            "tcp",
            "tcp_nats",
            "mptcp",
            "smc",
            "smc_by_family",
            "smc_over_tcp",
            "tcp_by_ipv6",
            "tcp_while_sending",
            "tcp_while_sending_many",
            "tcp_while_writing",
            "udp",
            "udp_by_ipv6",
            "unix_stream",
            "unix_datagram",
            "unix_packets",
            "abstract_stream",
            "abstract_datagram",
            "unix_pair_turned",
            "type_into_terminal",
            "type_into_others_terminal",
            "write_to_others_terminal",
        ]
    )

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.heard: set[str] = set()
        self._ended = threading.Event()
        self._tcp = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
        self._udp = socket.socket(type=socket.SOCK_DGRAM)
        self._udp.bind(("127.0.0.1", 0))
        names = ("tcp", "nats", "granted", "free")
        self.ports = {name: one.getsockname()[1] for name, one in zip(names, self._tcp, strict=True)}
        self.ports["udp"] = self._udp.getsockname()[1]
        self._tcp.pop().close()  # the port `free` has nobody
        abstract = [(f"\0{ABSTRACT}", socket.SOCK_STREAM), (f"\0{ABSTRACT}.datagram", socket.SOCK_DGRAM)]
        self._abstract = [_bound(name, kind) for name, kind in abstract]
        self._paths: list[socket.socket] = []
        self.terminals: list[tuple[int, int]] = []
        self._ends: list[int] = []
        self._known = {*self.ports.values()} - {self.ports["free"]}
        self._threads = [threading.Thread(target=target) for target in (self._listen, self._visit)]
        for thread in self._threads:
            thread.start()

    def open(self) -> None:
        """Those in the folder, which was made anew; and nothing was heard yet."""
        old, kinds = self._paths, (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET)
        names = ("stream", "datagram", "packets")
        self._paths = [_bound(str(self._folder / f"{n}.sock"), k) for n, k in zip(names, kinds, strict=True)]
        for one in old:
            one.close()
        self._close_terminals()
        self.terminals = [pty.openpty() for _ in range(2)]
        for _, slave in self.terminals:
            termios.tcsetattr(slave, termios.TCSANOW, _plain(termios.tcgetattr(slave)))
        self._ends = [end for terminal in self.terminals for end in terminal]
        self.heard = set()

    def close(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(10)
        for one in (*self._tcp, self._udp, *self._abstract, *self._paths):
            one.close()
        self._close_terminals()

    def _close_terminals(self) -> None:
        self._ends = []
        for end in (end for terminal in self.terminals for end in terminal):
            os.close(end)
        self.terminals = []

    def _listen(self) -> None:
        clients: list[socket.socket] = []
        while not self._ended.is_set():
            servers = [*self._tcp, self._udp, *self._abstract, *self._paths]
            with contextlib.suppress(OSError, ValueError):  # one was closed meanwhile
                for one in select.select([*servers, *clients, *self._ends], [], [], _PAUSE_S)[0]:
                    if isinstance(one, int):
                        self._ends.remove(one)  # unless it is read, it has hung up
                        self.heard |= set(os.read(one, 4096).decode(errors="replace").split())
                        self._ends.append(one)
                    elif one in clients or one.type == socket.SOCK_DGRAM:
                        said = one.recv(4096)
                        self.heard |= set(said.decode(errors="replace").split())
                        if one in clients and not said:
                            clients.remove(one)
                            one.close()
                    else:
                        clients.append(one.accept()[0])
        for one in clients:
            one.close()

    def _visit(self) -> None:
        """Connect to every TCP server of this network that is none of ours."""
        while not self._ended.wait(_PAUSE_S):
            for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
                fields = line.split()
                address, _, port = fields[1].partition(":")
                if (
                    fields[3] == "0A"
                    and address in ("00000000", "0100007F")
                    and int(port, 16) not in self._known
                ):
                    with contextlib.suppress(OSError), socket.socket() as guest:
                        guest.settimeout(1)
                        guest.connect(("127.0.0.1", int(port, 16)))


def _bound(name: str, kind: int) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, kind)
    made.bind(name)
    if kind != socket.SOCK_DGRAM:
        made.listen()
    if not name.startswith("\0"):
        os.chmod(name, 0o777)
    return made


def _plain(attributes: list[Any]) -> list[Any]:
    """A terminal that echoes nothing: what its other end gets was written to it."""
    attributes[3] &= ~termios.ECHO
    return attributes
