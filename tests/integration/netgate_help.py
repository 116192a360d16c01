"""Containers with a network of their own, for the tests of their ports."""

import contextlib
import errno
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from schemas.status import Network
from worker.platform.base import NetworkPolicy, SandboxPolicy
from worker.platform.linux import landlock, notify
from worker.platform.linux.able import Able
from worker.platform.linux.driver import LinuxDriver

CHILD = Path(__file__).with_name("netgate_child.py")
NOBODY = 65534


def _why_not() -> str:
    able = Able()
    if able.reason or able.blind:
        return able.reason or able.blind
    return "" if notify.supported() and landlock.abi() >= 4 else "needs Linux 6.7"


WHY_NOT = _why_not()


class Box:
    """A container. What it is granted are attributes, free ports of the host unless a test says otherwise."""

    def __init__(self, top: Path, uid: int | None, child: "subprocess.Popen[str]") -> None:
        self.top = top
        self.uid = uid
        self.rootfs, self.tmp = top / "rootfs", top / "tmp"
        for folder in (self.rootfs, self.tmp):
            folder.mkdir()
        self._child = child
        self.bind: tuple[int, ...] = ()
        self.connect: tuple[int, ...] = ()
        self.udp: tuple[int, ...] = ()
        self.landlock = True

    def plan(self) -> dict[str, Any]:
        network = NetworkPolicy(
            level=Network.LOCALHOST,
            bind_ports=(*self.bind, *self.udp),
            udp_ports=self.udp,
            connect_ports=(53, *self.connect, *self.bind, *self.udp),
            udp=bool(self.udp),
        )
        policy = SandboxPolicy(
            container="box-0", instance="0" * 26, isolation="rootfs", rootfs=str(self.rootfs), tmp=str(self.tmp),
            state_dir=str(self.top / "state"), network=network,
        )  # fmt: skip
        ordinary = self.uid is not None or os.geteuid() != 0
        plan = LinuxDriver(root=not ordinary, rooted=True, ports=True).plan(policy)
        if ordinary:
            plan["root"]["user"] = [self.uid or os.getuid(), self.uid or os.getgid()]
        if not self.landlock:
            dict(plan["steps"])["landlock"]["net"] = ""
        return plan

    def start(
        self, code: str, *, argv: list[str] | None = None, join: str = "", free: bool = False, **names: Any
    ) -> None:
        """Begin; `free` is without any sandbox, to prove an attempt alive."""
        if self.uid is not None:
            for path in (self.top, *self.top.rglob("*")):
                os.chown(path, self.uid, self.uid, follow_symlinks=False)
        task = {"plan": None if free else self.plan(), "uid": self.uid, "names": names, "code": code}
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps({**task, "argv": argv, "join": join}) + "\n")
        self._child.stdin.flush()

    def answer(self) -> tuple[list[str], list[str]]:
        """What the program said, and the one that joined it, line by line, once they have ended."""
        assert self._child.stdout is not None
        answer = json.loads(self._child.stdout.readline())
        assert answer["error"] == "", answer
        return answer["said"].splitlines(), answer["joined"].splitlines()

    def run(self, code: str, **more: Any) -> list[str]:
        self.start(code, **more)
        return self.answer()[0]


@pytest.fixture(name="child")
def make_child() -> Iterator["subprocess.Popen[str]"]:
    """One that a failed test has left with a program is killed, and the kernel ends all below it."""
    command = [sys.executable, "-I", "-S", str(CHILD)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        yield child
        assert child.stdin is not None
        child.stdin.close()
        try:
            child.wait(1)
        except subprocess.TimeoutExpired:
            child.kill()


@pytest.fixture(name="box", params=["as this user", "as nobody"])
def make_box(request: pytest.FixtureRequest, child: "subprocess.Popen[str]") -> Iterator[Box]:
    uid = None
    if request.param == "as nobody":
        if os.geteuid() != 0:
            pytest.skip("becoming another user needs root")
        uid = NOBODY
    top = Path(os.path.realpath(tempfile.mkdtemp(prefix="sandfleet-test-")))
    yield Box(top, uid, child)
    shutil.rmtree(top)


Listening = Callable[..., socket.socket]


@pytest.fixture(name="listening")
def make_listening() -> Iterator[Listening]:
    """Servers of the host, on 127.0.0.1 unless told, closed in the end."""
    made = []

    def listen(kind: int = socket.SOCK_STREAM, host: str = "127.0.0.1", port: int = 0) -> socket.socket:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        one = socket.socket(family, kind)
        made.append(one)
        one.settimeout(30)
        one.bind((host, port))
        if kind == socket.SOCK_STREAM:
            one.listen()
        return one

    yield listen
    for one in made:
        one.close()


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    """Below those that the kernel picks by itself: until a container has bound it, and each time that it closes it to
    bind it again, one of these could go to whoever asks for any port.
    """
    lowest, _ = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    while True:
        port = random.randrange(min(10_000, int(lowest) // 2), int(lowest))
        with socket.socket(socket.AF_INET, kind) as any_socket, contextlib.suppress(OSError):
            any_socket.bind(("", port))
            return port


def port_of(sock: socket.socket) -> int:
    port: int = sock.getsockname()[1]
    return port


class Echo:
    """A TCP server of the host that sends back what it gets, and counts who came."""

    def __init__(self, server: socket.socket) -> None:
        self.port = port_of(server)
        self.served = 0
        self._server = server
        server.settimeout(None)
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            self.served += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(ConnectionError):
            while data := connection.recv(65536):
                connection.sendall(data)

    def has_served(self, count: int) -> None:
        """Wait until it has come round to all that connected."""
        deadline = time.monotonic() + 30
        while self.served < count:
            assert time.monotonic() < deadline, self.served
            time.sleep(0.005)

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)


@pytest.fixture(name="echo")
def make_echo(listening: Listening) -> Iterator[Echo]:
    made = Echo(listening())
    yield made
    made.close()


@pytest.fixture(name="stranger")
def make_stranger(listening: Listening) -> Iterator[Echo]:
    """One that nobody is granted."""
    made = Echo(listening())
    yield made
    made.close()


def own_address() -> str | None:
    """An address of this machine that is not loopback; None when it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            any_socket.connect(("192.0.2.1", 9))
        except OSError:
            return None
        host: str = any_socket.getsockname()[0]
        return None if host.startswith("127.") else host


def connected(port: int, host: str = "127.0.0.1") -> socket.socket:
    """To a server that may not be there yet."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return socket.create_connection((host, port), timeout=30)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.005)


def refused(port: int, host: str = "127.0.0.1", kind: int = socket.SOCK_STREAM) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind) as one:
        one.settimeout(30)
        return one.connect_ex((host, port)) == errno.ECONNREFUSED


def appears(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.005)
