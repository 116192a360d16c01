"""Runs `/usr/bin/log show` for the refusals of one container. One reading at a time, bounded in time and size.

Nothing of a container's reaches the command: the predicate holds the instance's tag, checked, and numbers.

Sources: log(1); the predicate of openai/codex (debug_sandbox/seatbelt.rs) and, for macOS 14 and 26, those of
buckle and lycaon. What an ordinary user or a sandboxed process is told: "Could not open local log store:
Operation not permitted", "Cannot run while sandboxed", exit 64.
"""

import asyncio
import contextlib
import math
import os
import re
import signal
import subprocess
from collections.abc import Collection
from typing import NamedTuple

from worker.errors import DeadlineExceeded, Internal, Unavailable

from .denials import TAG_PREFIX

PROGRAM = "/usr/bin/log"  # by its path: `log` alone is a builtin of zsh
TIME_LIMIT_S = 30.0
MAX_BYTES = 8 * 1024 * 1024
# Processes named in the predicate; the newest ones. A tag finds the rest.
MAX_PIDS = 64

_STDERR_BYTES = 4096
_INSTANCE = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NOT_PLAIN = re.compile(r"[^ -~]+")


class LogOutput(NamedTuple):
    """`cut`: older records did not fit and were dropped."""

    raw: bytes
    cut: bool


class UnifiedLog:
    def __init__(
        self, program: str = PROGRAM, *, time_limit_s: float = TIME_LIMIT_S, max_bytes: int = MAX_BYTES
    ) -> None:
        self._program = program
        self._time_limit_s = time_limit_s
        self._max_bytes = max_bytes
        self._turn = asyncio.Lock()

    async def read(self, instance: str, *, pids: Collection[int], last_s: float) -> LogOutput:
        """The records of the last `last_s` seconds that bear the instance's tag or name one of `pids`.

        Unavailable when the log cannot be read, DeadlineExceeded when that takes too long, waiting for other
        readings included.
        """
        arguments = show_arguments(instance, pids=pids, last_s=last_s)
        try:
            async with asyncio.timeout(self._time_limit_s), self._turn:
                return await self._run(arguments)
        except TimeoutError:
            raise DeadlineExceeded(
                f"{self._program} had not read the log within {self._time_limit_s:g} s: ask for a shorter time",
                field="since_s",
            ) from None

    async def _run(self, arguments: list[str]) -> LogOutput:
        loop = asyncio.get_running_loop()
        try:
            transport, reading = await loop.subprocess_exec(
                lambda: _Reading(loop, self._max_bytes),
                self._program,
                *arguments,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd="/",
                env={"PATH": "/usr/bin:/bin", "LANG": "C", "LC_ALL": "C"},
                start_new_session=True,
            )
        except OSError as failure:
            raise Unavailable(f"{self._program} cannot be run: {failure.strerror}") from failure
        try:
            await asyncio.shield(reading.ended)
        finally:
            if transport.get_returncode() is None:
                with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                    os.killpg(transport.get_pid(), signal.SIGKILL)
            # Our ends of the pipes too: something that left its group may hold the others.
            transport.close()
            await reading.ended
        code = transport.get_returncode()
        if code != 0:
            raise Unavailable(f"the log of macOS cannot be read: {_reason(reading.said.text(), code)}")
        return LogOutput(reading.output.text(), reading.output.cut)


class _Tail:
    """The last `limit` bytes of a stream, from the start of a line when it was longer."""

    def __init__(self, limit: int) -> None:
        self.cut = False
        self._limit = limit
        self._kept = bytearray()

    def add(self, data: bytes) -> None:
        self._kept += data
        if len(self._kept) > 2 * self._limit:
            self._drop()

    def text(self) -> bytes:
        if len(self._kept) > self._limit:
            self._drop()
        if not self.cut:
            return bytes(self._kept)
        return bytes(self._kept).partition(b"\n")[2]

    def _drop(self) -> None:
        del self._kept[: -self._limit]
        self.cut = True


class _Reading(asyncio.SubprocessProtocol):
    """`ended` is done when the process has ended and both pipes are closed."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: int) -> None:
        self.output = _Tail(limit)
        self.said = _Tail(_STDERR_BYTES)
        self.ended: asyncio.Future[None] = loop.create_future()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        (self.output if fd == 1 else self.said).add(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


def show_arguments(instance: str, *, pids: Collection[int], last_s: float) -> list[str]:
    """The arguments of `log`. Internal for a tag that does not come from us."""
    if _INSTANCE.fullmatch(instance) is None:
        raise Internal(f"{instance!r} cannot stand in a predicate")
    named = [f'eventMessage CONTAINS "{TAG_PREFIX}{instance}"']
    named += [f'eventMessage CONTAINS "({pid:d}) deny("' for pid in sorted(pids)[-MAX_PIDS:]]
    sandbox = (
        '(processID == 0 AND (senderImagePath CONTAINS "/Sandbox" OR '
        'subsystem == "com.apple.sandbox.reporting")) OR process == "sandboxd"'
    )
    predicate = f"({sandbox}) AND ({' OR '.join(named)})"
    seconds = max(1, math.ceil(last_s))
    return ["show", "--style", "ndjson", "--last", f"{seconds}s", "--predicate", predicate]


def _reason(said: bytes, code: int | None) -> str:
    """The last line of what the tool complained about, printable."""
    lines = said.decode(errors="replace").split("\n")
    text = next((line.strip() for line in reversed(lines) if line.strip()), "")
    text = _NOT_PLAIN.sub("?", text)[:200]
    hint = ""
    if "log store" in text:
        hint = "; only an administrator may read it, so the worker's user must be one"
    return f"{text or 'it ended'} (exit {code}){hint}"
