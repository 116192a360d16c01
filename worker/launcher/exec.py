"""One-shot `exec`: a second program in a running container, fed and listened to by the launcher.

It is a child of the container's shim, under the same sandbox. Its output is kept in memory up to a limit.
"""

import base64
import os
from collections.abc import Callable
from functools import partial

from worker.launcher.loop import Loop
from worker.launcher.mux import WRITE
from worker.launcher.protocol import CONFLICT, START_FAILED, STREAMS, Refused
from worker.launcher.run import Reply
from worker.launcher.timers import Timer

OUTPUT_BYTES = 256 * 1024
_READ_BYTES = 64 * 1024
_DRAIN_BYTES = 1024 * 1024
_KILL_AGAIN_S = 1.0


class _Output:
    def __init__(self, fd: int, limit: int) -> None:
        self.fd = fd
        self.limit = limit
        self.data = bytearray()
        self.truncated = False


class ExecSession:
    """Owns its ends of the three pipes. `send_kill` asks the shim to kill the session's processes."""

    def __init__(
        self,
        loop: Loop,
        reply: Reply,
        *,
        stdin: bytes,
        timeout_s: float,
        limit: int,
        send_kill: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._reply = reply
        self._send_kill = send_kill
        self._stdin = memoryview(stdin)
        self._timed_out = False
        self._done = False
        stdin_read, self._stdin_fd = os.pipe()
        outputs = [os.pipe() for _ in STREAMS]
        self.passed = (stdin_read, *(write for _, write in outputs))
        self._outputs = [_Output(read, limit) for read, _ in outputs]
        os.set_blocking(self._stdin_fd, False)
        for output in self._outputs:
            os.set_blocking(output.fd, False)
            loop.add(output.fd, partial(self._readable, output))
        loop.add(self._stdin_fd, self._writable, write=True)
        self._timer: Timer = loop.timers.after(timeout_s, self._time_out)

    # -- its end

    def exited(self, code: int) -> None:
        """The program ended; what it wrote is in the pipes, whoever else still holds them."""
        for output in self._outputs:
            left = _DRAIN_BYTES
            while output.fd >= 0 and left > 0 and (length := self._read(output)) > 0:
                left -= length
        self._close()
        stdout, stderr = self._outputs
        self._reply.ok(
            exit_code=code,
            stdout=base64.b64encode(stdout.data).decode(),
            stderr=base64.b64encode(stderr.data).decode(),
            truncated=stdout.truncated or stderr.truncated,
            timed_out=self._timed_out,
        )

    def failed(self, step: str, number: int, detail: str) -> None:
        self._close()
        self._reply.refuse(Refused(START_FAILED, f"{step}: {detail}", step=step, errno=number, detail=detail))

    def container_ended(self) -> None:
        """The container ended under it, before its own end was told."""
        if not self._done:
            self._close()
            self._reply.refuse(Refused(CONFLICT, "the container ended while the program ran in it"))

    def _time_out(self) -> None:
        self._timed_out = True
        self._send_kill()
        # What it starts in the same moment can be missed once.
        self._timer = self._loop.timers.after(_KILL_AGAIN_S, self._time_out)

    def _close(self) -> None:
        self._done = True
        self._timer.cancel()
        self._close_stdin()
        for output in self._outputs:
            self._close_output(output)

    # -- its pipes

    def _readable(self, output: _Output, mask: int) -> None:
        self._read(output)

    def _read(self, output: _Output) -> int:
        """One read; 0 at the end, -1 when nothing is there."""
        try:
            data = os.read(output.fd, _READ_BYTES)
        except BlockingIOError:
            return -1
        if not data:
            self._close_output(output)
            return 0
        room = output.limit - len(output.data)
        output.data += data[:room]
        output.truncated = output.truncated or len(data) > room
        return len(data)

    def _close_output(self, output: _Output) -> None:
        if output.fd >= 0:
            self._loop.remove(output.fd)
            os.close(output.fd)
            output.fd = -1

    def _writable(self, mask: int) -> None:
        try:
            while self._stdin:
                self._stdin = self._stdin[os.write(self._stdin_fd, self._stdin) :]
        except BlockingIOError:
            if mask & ~WRITE:
                self._close_stdin()
            return
        except BrokenPipeError:
            self._stdin = memoryview(b"")  # it does not want to read it
        self._close_stdin()

    def _close_stdin(self) -> None:
        if self._stdin_fd >= 0:
            self._loop.remove(self._stdin_fd)
            os.close(self._stdin_fd)
            self._stdin_fd = -1
