"""Starts the programs of `sandbox`, as the launcher does: bare packages, a settled process, children made ahead."""

import json
import os
import socket
import subprocess
import sys
import time


def make_packages() -> None:
    top = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    for name in ("worker", "worker.launcher", "worker.platform", "worker.platform.linux"):
        package = type(sys)(name)
        package.__path__ = [os.path.join(top, *name.split("."))]
        sys.modules[name] = package


make_packages()
from worker.launcher.sandbox import Sandboxes, kind_of  # noqa: E402
from worker.platform.linux.libc import prctl  # noqa: E402

_SUBREAPER = 36
_IDLE_S = 0.03  # for the child to get ready: what it does then is not on anybody's way


def sandboxed(sandboxes: Sandboxes, plan: dict, argv: list[str]) -> float:
    """Milliseconds from the order to the end of the program."""
    ours, theirs = socket.socketpair()
    go, order = os.pipe()
    child = os.fork()
    if child == 0:
        ours.close()
        become(sandboxes, plan, argv, theirs, go)
    theirs.close()
    ours.settimeout(10)
    init = 0
    waited = child
    if kind_of(plan) != b"+":
        said, fds, _, _ = socket.recv_fds(ours, 100, 8)
        for fd in fds:
            os.close(fd)
        init, waited = map(int, said.split())
        os.waitpid(child, 0)
    assert ours.recv(1) == b"R", "the child did not get ready"
    time.sleep(_IDLE_S)
    began = time.perf_counter()
    os.write(order, b"+")
    _, status = os.waitpid(waited, 0)
    took = (time.perf_counter() - began) * 1e3
    assert status == 0, status
    if init:
        os.kill(init, 9)
        os.waitpid(init, 0)
    for fd in (go, order):
        os.close(fd)
    ours.close()
    return took


def become(sandboxes: Sandboxes, plan: dict, argv: list[str], theirs: socket.socket, go: int) -> None:
    def told(init: int, program: int, namespaces: list[int]) -> None:
        socket.send_fds(theirs, [b"%d %d" % (init, program)], namespaces)

    try:
        os.setsid()
        sandboxes.ahead(kind_of(plan), told)
        theirs.send(b"R")
        os.read(go, 1)
        sandboxes.enter(plan, (), told)
        sandboxes.apply(plan)
        os.chdir("/")
        os.execve(argv[0], argv, {})
    except BaseException as failure:
        os.write(2, repr(failure).encode())
    os._exit(1)


def bare(argv: list[str]) -> float:
    began = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.execve(argv[0], argv, {})
    os.waitpid(child, 0)
    return (time.perf_counter() - began) * 1e3


def rival(argv: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - began) * 1e3


def main() -> None:
    task = json.load(sys.stdin)
    prctl(_SUBREAPER, 1)
    sandboxes = Sandboxes()
    sandboxes.load()
    times: dict[str, list[float]] = {}
    for _ in range(task["rounds"]):
        times.setdefault("bare", []).append(bare(task["argv"]))
        for name, plan in task["plans"].items():
            times.setdefault(name, []).append(sandboxed(sandboxes, plan, task["argv"]))
        if task["rival"]:
            times.setdefault("rival", []).append(rival(task["rival"]))
    print(json.dumps(times))


main()
