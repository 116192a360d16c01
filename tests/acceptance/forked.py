"""Workers that begin in milliseconds: forks of a process that has imported everything and done nothing yet.

`python -m tests.acceptance.forked MODULE` imports MODULE, calls its `prepare`, and forks a child for each order on
its standard input; the child calls `run`. For tests that start a worker very often.
"""

import contextlib
import importlib
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[2]
POLL_S = 0.005


class Forker:
    """The process that forks. `close` it when its children have ended."""

    def __init__(self, module: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.acceptance.forked", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=REPO,
        )
        self._ended: dict[int, int] = {}
        assert self._process.stdout is not None
        assert self._process.stdin is not None
        self._orders, self._answers = self._process.stdin, self._process.stdout

    def start(self, argv: list[str], env: dict[str, str], log: Path) -> "Forked":
        order = {"argv": argv, "env": env, "log": str(log)}
        self._orders.write(json.dumps(order).encode() + b"\n")
        self._orders.flush()
        while "started" not in (answer := self._next()):
            pass
        return Forked(self, int(answer["started"]))

    def ended(self, pid: int) -> int | None:
        """The exit status of a child, negative for a signal; None while it runs."""
        while pid not in self._ended and select.select([self._answers], [], [], 0)[0]:
            self._next()
        return self._ended.get(pid)

    def close(self) -> None:
        self._orders.close()
        self._process.wait(10)
        self._answers.close()

    def _next(self) -> dict[str, Any]:
        line = self._answers.readline()
        assert line, "the forking process is gone"
        answer: dict[str, Any] = json.loads(line)
        if "ended" in answer:
            self._ended[answer["ended"]] = answer["status"]
        return answer


class Forked:
    """What of `subprocess.Popen` the tests use, for a child of another process."""

    def __init__(self, forker: Forker, pid: int) -> None:
        self._forker = forker
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._forker.ended(self.pid)
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked worker", timeout)
            time.sleep(POLL_S)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(15)

    def kill(self) -> None:
        self.send_signal(9)


# -- the other side


def serve(module: str) -> None:
    """One thread and no loop, so that a fork is safe. Ends when its input does."""
    made = importlib.import_module(module)
    made.prepare()
    buffer = b""
    while True:
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                _say({"ended": found[0], "status": os.waitstatus_to_exitcode(found[1])})
        if not select.select([0], [], [], POLL_S)[0]:
            continue
        data = os.read(0, 65536)
        if not data:
            return
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            order = json.loads(line)
            pid = os.fork()
            if pid == 0:
                _child(made.run, order)
            _say({"started": pid})


def _say(answer: dict[str, int]) -> None:
    os.write(1, json.dumps(answer).encode() + b"\n")


def _child(run: Any, order: dict[str, Any]) -> None:
    code = 70
    try:
        os.setsid()
        log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        null = os.open(os.devnull, os.O_RDONLY)
        for target, source in ((0, null), (1, log), (2, log)):
            os.dup2(source, target)
        os.close(log)
        os.close(null)
        os.environ.update(order["env"])
        sys.argv = order["argv"]
        run()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
