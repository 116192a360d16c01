"""The gate to the host API's socket, between a confined child and the parent that answers it.

As a container's shim does, the parent is an ancestor of the child and not confined itself. The child makes itself
readable to it again, as an exec would.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from schemas.status import Network
from tests.integration.sandbox_help import Outcome, Place, attempt, make_helper, make_place, needs_sandbox
from worker.platform.base import NetworkPolicy
from worker.platform.linux import notify

__all__ = ["make_helper", "make_place"]

pytestmark = [
    needs_sandbox,
    pytest.mark.skipif(not notify.supported(), reason="this kernel hands no system calls over"),
]

# Runs `CHILD` confined, and answers its gate until it has ended; `say` is what the child printed.
STAGE = """
import _thread, errno, fcntl, os, select, signal, socket, time
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
said, saying = os.pipe()
child = os.fork()
if child == 0:
    try:
        ours.close()
        listener = enforce.apply(PLAN)
        socket.send_fds(theirs, [b"x"], [listener])
        os.close(listener)
        ctypes.CDLL(None).prctl(4, READABLE, 0, 0, 0)
        def attempt(what, *arguments):
            try:
                what(*arguments)
            except OSError as failure:
                return errno.errorcode[failure.errno]
            return "done"
        def say(*words):
            os.write(saying, (" ".join(map(str, words)) + chr(10)).encode())
        exec(CHILD, globals())
    except BaseException as failure:
        os.write(saying, repr(failure).encode())
    finally:
        os._exit(0)
theirs.close()
os.close(saying)
_, listeners, _, _ = socket.recv_fds(ours, 1, 1)
if not listeners:
    raise OSError(os.read(said, 4096).decode())
answering = enforce.open_gate(listeners, os.fsencode(API))
poll = select.poll()
poll.register(listeners[0], select.POLLIN)
ended = False
while not ended:
    for _, event in poll.poll(answering.retry()):
        if event & select.POLLIN:
            answering.serve()
        else:
            ended = True
answering.close()
os.waitpid(child, 0)
print_all = b""
while chunk := os.read(said, 65536):
    print_all += chunk
"""


class Peer:
    """A server outside that answers each connection with its name."""

    def __init__(self, path: Path, *, backlog: int = 16) -> None:
        self.path = str(path)
        self.served = 0
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(self.path)
        os.chmod(self.path, 0o777)
        self._server.listen(backlog)
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def start(self) -> "Peer":
        self._thread.start()
        return self

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            self.served += 1
            with connection, contextlib.suppress(BrokenPipeError):
                connection.sendall(b"welcome")

    def close(self) -> None:
        if self._thread.is_alive():
            self._server.shutdown(socket.SHUT_RDWR)
            self._thread.join(5)
        self._server.close()


@pytest.fixture
def api(place: Place) -> Iterator[Peer]:
    peer = Peer(place.outside / "api.sock").start()
    yield peer
    peer.close()


@pytest.fixture
def stranger(place: Place) -> Iterator[Peer]:
    peer = Peer(place.outside / "stranger.sock").start()
    yield peer
    peer.close()


def inside(
    place: Place,
    code: str,
    path: str,
    before: str = "",
    *,
    level: Network = Network.NONE,
    readable: bool = True,
    **names: Any,
) -> list[str]:
    """What confined code said, line by line."""
    policy = place.policy(network=NetworkPolicy(level=level, unix_sockets=(path,), api_socket=path))
    driver = place.driver()
    assert driver.plan(policy)["gate"] == path
    names = {"API": path, "CHILD": code, "PLAN": driver.plan(policy), "READABLE": int(readable), **names}
    setup = "".join(f"{name} = {value!r}\n" for name, value in names.items()) + before + STAGE
    told: Outcome = attempt(place, "say(print_all.decode())", None, setup=setup)
    assert told.errno == 0, told
    return told.said.strip().split("\n")


def test_the_api_and_nothing_else(place: Place, api: Peer, stranger: Peer) -> None:
    code = """
one = socket.socket(socket.AF_UNIX)
say(attempt(one.connect, OTHER), attempt(one.connect, API), one.recv(99).decode(), attempt(one.connect, OTHER))
say(attempt(socket.socket(socket.AF_UNIX).connect, OTHER))
say(attempt(socket.socket(socket.AF_UNIX).connect, chr(0) + OTHER))
say(attempt(one.bind, "x"), attempt(one.listen))
"""
    said = inside(place, code, api.path, OTHER=stranger.path)
    assert said[0] == "EACCES done welcome EISCONN"
    assert said[1:3] == ["EACCES", "EACCES"]
    assert "done" not in said[3]
    assert stranger.served == 0


def test_a_path_is_compared_and_not_its_spelling(place: Place, api: Peer) -> None:
    code = """
folder, name = os.path.split(API)
for path in (folder + "//./" + name, folder + "/x/../" + name, name, folder, ""):
    say(attempt(socket.socket(socket.AF_UNIX).connect, path))
"""
    assert inside(place, code, api.path) == ["done", "done", "EACCES", "EACCES", "EACCES"]


def test_flags_of_the_socket_are_kept(place: Place, api: Peer) -> None:
    code = """
for flags in (0, socket.SOCK_NONBLOCK, socket.SOCK_CLOEXEC, socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC):
    fd = call((41, 198), 1, 1 | flags, 0)
    blocks, closes = os.get_blocking(fd), fcntl.fcntl(fd, fcntl.F_GETFD)
    one = socket.socket(fileno=fd)
    say(blocks, closes, attempt(one.connect, API))
say(attempt(call, (41, 198), 1, 1, 7))
"""
    assert inside(place, code, api.path) == [
        "True 0 done",
        "False 0 done",
        "True 1 done",
        "False 1 done",
        "EPROTONOSUPPORT",
    ]


def test_an_api_that_is_not_there(place: Place) -> None:
    path = place.outside / "api.sock"
    code = "one = socket.socket(socket.AF_UNIX); say(attempt(one.connect, API), attempt(one.connect, API))"
    assert inside(place, code, str(path)) == ["ENOENT ENOENT"]
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    os.chmod(path, 0o777)
    assert inside(place, code, str(path)) == ["ECONNREFUSED ECONNREFUSED"]


def test_a_full_queue_is_waited_for_as_the_kernel_would(place: Place) -> None:
    busy = Peer(place.outside / "busy.sock", backlog=1)
    asked = place.rootfs / "asked"

    def accept_later() -> None:
        while not asked.exists():
            time.sleep(0.005)
        busy.start()

    later = threading.Thread(target=accept_later)
    later.start()
    try:
        code = """
kept = [socket.socket(socket.AF_UNIX) for _ in range(2)]
say(*(attempt(one.connect, API) for one in kept))
hasty = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
say(attempt(hasty.connect, API))
open(ASKED, "w").close()
patient = [socket.socket(socket.AF_UNIX) for _ in range(3)]
say(*(attempt(one.connect, API) for one in patient), patient[2].recv(99))
"""
        said = inside(place, code, busy.path, ASKED=str(asked))
        assert said == ["done done", "EAGAIN", "done done done b'welcome'"]
    finally:
        asked.touch()
        later.join(10)
        busy.close()


def test_a_queue_that_stays_full_refuses_in_the_end(place: Place) -> None:
    busy = Peer(place.outside / "busy.sock", backlog=1)
    try:
        code = """
kept = [socket.socket(socket.AF_UNIX) for _ in range(4)]
say(*(attempt(one.connect, API) for one in kept))
"""
        patience = "import worker.platform.linux.gate as impatient\nimpatient._PATIENCE_S = 0.05\n"
        assert inside(place, code, busy.path, patience) == ["done done ECONNREFUSED ECONNREFUSED"]
    finally:
        busy.close()


def test_a_program_without_descriptors_is_told(place: Place, api: Peer) -> None:
    code = """
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
say(attempt(socket.socket, socket.AF_UNIX))
"""
    assert inside(place, code, api.path) == ["EMFILE"]


def test_tcp_goes_on_in_the_kernel(place: Place, api: Peer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = "say(attempt(lambda: socket.socket().connect(ADDRESS)))"
        address = ("127.0.0.1", server.getsockname()[1])
        assert inside(place, code, api.path, level=Network.FULL, ADDRESS=address) == ["done"]
        assert inside(place, code, api.path, level=Network.LOCALHOST, ADDRESS=address) == ["EACCES"]
        assert inside(place, code, api.path, level=Network.NONE, ADDRESS=address) == ["EACCES"]


def test_signals_break_no_connection(place: Place, api: Peer) -> None:
    """A signal can meet a call before the shim has heard of it; then it is made again, as after any signal."""
    code = """
signal.signal(signal.SIGALRM, lambda *_: None)
signal.siginterrupt(signal.SIGALRM, False)
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
results = {attempt(lambda: socket.socket(socket.AF_UNIX).connect(API)) for _ in range(300)}
signal.setitimer(signal.ITIMER_REAL, 0)
say(sorted(results))
"""
    assert inside(place, code, api.path) == ["['done']"]


def test_a_caller_that_is_killed_leaves_the_others_served(place: Place, api: Peer) -> None:
    code = """
for _ in range(20):
    pid = os.fork()
    if pid == 0:
        while True: attempt(socket.socket(socket.AF_UNIX).connect, API)
    attempt(socket.socket(socket.AF_UNIX).connect, API)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
say(attempt(socket.socket(socket.AF_UNIX).connect, API))
"""
    assert inside(place, code, api.path)[-1] == "done"


def test_a_program_that_hides_its_memory(place: Place, api: Peer, stranger: Peer) -> None:
    """It cannot be told apart what it means, but it still gets nowhere else."""
    code = """
say(attempt(socket.socket(socket.AF_UNIX).connect, API))
say(attempt(socket.socket(socket.AF_UNIX).connect, OTHER))
"""
    said = inside(place, code, api.path, readable=False, OTHER=stranger.path)
    assert said in (["done", "EACCES"], ["EISCONN", "EISCONN"])
    assert stranger.served == 0


def test_no_second_listener_overrules_the_first(place: Place, api: Peer) -> None:
    code = """
ask = ctypes.create_string_buffer(struct.pack("=HBBI", 6, 0, 0, 0x7FC00000), 8)
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", 1, ctypes.addressof(ask)), 16)
say(attempt(call, (317, 277), 1, 8, program))
say(attempt(socket.socket(socket.AF_UNIX).connect, API))
"""
    assert inside(place, code, api.path) == ["EPERM", "done"]


def test_many_threads(place: Place, api: Peer) -> None:
    code = """
results = []
def calls():
    for _ in range(50):
        one = socket.socket(socket.AF_UNIX)
        results.append((attempt(one.connect, API), one.recv(99)))
        one.close()
for _ in range(4): _thread.start_new_thread(calls, ())
while len(results) < 200: time.sleep(0.005)
say(len(results), set(results))
"""
    assert inside(place, code, api.path) == ["200 {('done', b'welcome')}"]
    assert api.served == 200
