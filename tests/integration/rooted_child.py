"""Runs programs in roots of their own, for the tests: one task a line, one answer a line.

A task: {"root", "uid", "argv", "join"}; `join` is an argv for a second program, run beside the first with its
root. An answer: {"error", "numbers", "status", "said", "left"}.
"""

import json
import os
import signal
import socket
import sys


def make_packages() -> None:
    top = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    for name in ("worker", "worker.platform", "worker.platform.linux"):
        package = type(sys)(name)
        package.__path__ = [os.path.join(top, *name.split("."))]
        sys.modules[name] = package


make_packages()
from worker.platform.linux import rooted  # noqa: E402
from worker.platform.linux.libc import prctl  # noqa: E402

_SUBREAPER = 36


def run(task: dict, argv: list[str], namespaces: list[int]) -> tuple[str, list[int], int, str]:
    """(error, numbers of init and program, wait status, output); `namespaces` gets those of a new root."""
    ours, theirs = socket.socketpair()
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        ours.close()
        become(task, argv, namespaces, theirs.detach(), into)
    theirs.close()
    os.close(into)
    said, descriptors, _, _ = socket.recv_fds(ours, 4096, 8)
    with ours, ours.makefile("rb") as rest:
        failed = rest.read()
    with open(out, "rb") as pipe:
        printed = pipe.read().decode(errors="replace")
    os.waitpid(child, 0)
    if not said.startswith(b"@"):
        return said.decode(errors="replace"), [], 0, printed
    numbers = [int(word) for word in said[1:].split()]
    if failed:
        os.kill(numbers[0], signal.SIGKILL)
        for fd in descriptors:
            os.close(fd)
        return failed.decode(errors="replace"), [], 0, printed
    _, status = os.waitpid(numbers[1], 0)
    namespaces += descriptors
    return "", numbers, status, printed


def become(task: dict, argv: list[str], namespaces: list[int], tell: int, into: int) -> None:
    def take_place(init: int, program: int, namespaces: list[int]) -> None:
        sock = socket.socket(fileno=tell)
        socket.send_fds(sock, [b"@%d %d" % (init, program)], namespaces)
        sock.detach()

    try:
        if task["uid"] is not None:
            os.setgroups([])
            os.setresgid(task["uid"], task["uid"], task["uid"])
            os.setresuid(task["uid"], task["uid"], task["uid"])
        os.setsid()
        if namespaces:
            rooted.join(task["root"], namespaces, take_place)
        else:
            rooted.enter(task["root"], take_place)
        os.close(tell)
        os.dup2(into, 1)
        os.dup2(into, 2)
        os.close(into)
        os.chdir("/")
        os.execve(argv[0], argv, {"PATH": "/usr/bin:/bin"})
    except rooted.RootError as failure:
        os.write(tell, str(failure).encode())
    except BaseException as failure:
        os.write(tell, f"{type(failure).__name__}: {failure}".encode())
    os._exit(1)


def left() -> int:
    """How many children there still are after everything was reaped that had ended or was told to end."""
    count = 0
    try:
        while True:
            os.wait()
            count += 1
    except ChildProcessError:
        return count


def main() -> None:
    prctl(_SUBREAPER, 1)
    for line in sys.stdin:
        task = json.loads(line)
        namespaces: list[int] = []
        error, numbers, status, said = run(task, task["argv"], namespaces)
        joined = run(task, task["join"], namespaces) if task.get("join") and not error else None
        if numbers:
            os.kill(numbers[0], signal.SIGKILL)
        for fd in namespaces:
            os.close(fd)
        answer = {"error": error, "numbers": numbers, "status": status, "said": said, "joined": joined}
        print(json.dumps({**answer, "left": left()}), flush=True)


main()
