"""What a network of its own costs a container (isolation rootfs, level localhost): the same program there, and under
the same isolation in the host's network.

The program measures by itself, against servers of the host; a round is: connect and hang up, one byte to and fro over
a connection, a datagram to and fro, and as much as goes through one connection.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import statistics
import sys
import threading
import time
from typing import Any

from tests.acceptance.harness import Fleet

PYTHON = os.path.realpath(sys.executable)
PREFIX = os.path.realpath(sys.base_prefix)
LEVELS = {"its own network": "localhost", "the host's network": "full"}

PROGRAM = """
import json, socket, statistics, sys, time
tcp, udp, sink = map(int, sys.argv[1:4])
where = ("127.0.0.1", tcp)
def median_us(act, rounds):
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        act()
        times.append((time.perf_counter() - began) * 1e6)
    return statistics.median(times)
def connect():
    one = socket.socket()
    one.connect(where)
    one.close()
def bind():
    one = socket.socket()
    one.setsockopt(1, 2, 1)
    one.bind(("127.0.0.1", int(sys.argv[4])))
    one.listen()
    one.close()
found = {"connect": median_us(connect, 500), "listen": median_us(bind, 200)}
one = socket.socket()
one.setsockopt(6, 1, 1)
one.connect(where)
def exchange():
    one.send(b"x")
    one.recv(1)
found["exchange"] = median_us(exchange, 1000)
two = socket.socket(type=socket.SOCK_DGRAM)
two.settimeout(5)
two.connect(("127.0.0.1", udp))
def datagram():
    two.send(b"x")
    two.recv(1)
found["datagram"] = median_us(datagram, 500)
three = socket.socket()
three.connect(("127.0.0.1", sink))
block = bytes(1 << 18)
began = time.perf_counter()
for _ in range(2048):
    three.sendall(block)
three.shutdown(1)
three.recv(1)
found["gigabytes"] = len(block) * 2048 / (time.perf_counter() - began) / 1e9
print(json.dumps(found), flush=True)
"""


class Servers:
    """Of the host: an echo over TCP, one over UDP, and one that takes all and says when it has it."""

    def __init__(self) -> None:
        self.tcp, self.sink = (socket.create_server(("127.0.0.1", 0), backlog=128) for _ in range(2))
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.ports = [sock.getsockname()[1] for sock in (self.tcp, self.udp, self.sink)]
        for serve in (self._echoes, self._datagrams, self._swallows):
            threading.Thread(target=serve, daemon=True).start()

    def _echoes(self) -> None:
        while True:
            one, _ = self.tcp.accept()
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with one:
                while data := one.recv(1):
                    one.send(data)

    def _datagrams(self) -> None:
        while True:
            data, peer = self.udp.recvfrom(99)
            self.udp.sendto(data, peer)

    def _swallows(self) -> None:
        room = bytearray(1 << 20)
        while True:
            one, _ = self.sink.accept()
            with one:
                while one.recv_into(room):
                    pass
                one.send(b"x")


async def measure(fleet: Fleet, cid: str, level: str, ports: list[int]) -> dict[str, float]:
    """The figures of one program, and `start`: milliseconds from the command to `running`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        own = free.getsockname()[1]
    spec = {
        "image": {"name": "base"},
        "command": {"entrypoint": [PYTHON, "-c", PROGRAM, *map(str, (*ports, own))]},
        "sandbox": {"read": [PREFIX], "isolation": "rootfs"},
        "network": {"access": level, "connect_ports": ports},
        # A port of UDP opens UDP.
        "endpoints": [{"name": "own", "protocol": "udp", "port": own}],
    }
    await fleet.client.ok(cid, "create", spec=spec)
    began = time.perf_counter()
    await fleet.client.send(cid, "start")
    await fleet.client.state(cid, "running", run=1)
    took = (time.perf_counter() - began) * 1e3
    await fleet.client.event(
        lambda e: e["type"] == "state_changed" and e["container"] == cid and e["status"]["state"] == "exited",
        deadline_s=120,
    )
    log = await fleet.client.log(cid)
    await fleet.client.ok(cid, "remove")
    return {**json.loads(log.data), "start": took}


async def rows(fleet: Fleet, row: Any, rounds: int = 5) -> list[dict[str, Any]]:
    """The table's rows; `row` makes one."""
    info = await fleet.client.query("info")
    if "rootfs" not in info["capabilities"]["isolation"]:
        return [row("a network of its own", None, "", "there is no isolation rootfs here", None)]
    ports = Servers().ports
    found: dict[str, list[dict[str, float]]] = {name: [] for name in LEVELS}
    for turn in range(rounds):
        for name, level in LEVELS.items():
            found[name].append(await measure(fleet, f"net-{level}-{turn}", level, ports))
            await asyncio.sleep(0)
    table = []
    for key, what, unit in (
        ("start", "start, published → running seen", "ms p50"),
        ("connect", "connect to a granted port and hang up", "µs p50"),
        ("listen", "bind a granted port, listen, close", "µs p50"),
        ("exchange", "a byte to and fro over TCP", "µs p50"),
        ("datagram", "a datagram to and fro", "µs p50"),
        ("gigabytes", "through one connection", "GB/s"),
    ):
        for name in LEVELS:
            value = statistics.median(one[key] for one in found[name])
            beside = "" if name == "its own network" else "the limit"
            table.append(row(f"{what}, {name}", value, unit, beside, None))
    return table
