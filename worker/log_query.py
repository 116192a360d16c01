"""The query `logs`: lines from the node's own capture files, by pages."""

import asyncio
import base64
import heapq
import re
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import msgspec

from schemas.queries import BASE64, LogLine
from worker.capture_files import STREAMS
from worker.clock import from_us, to_us
from worker.errors import InvalidCommand, Unavailable
from worker.log_lines import Line, LineReader, since_start, stream_end, tail_start

PAGE_LINES = 1000
PAGE_BYTES = 512 * 1024
BOTH = "both"

_CURSOR = re.compile(r"1\.([0-9]{1,18})\.([0-9]{1,18})\.([0-9A-Za-z]{0,64})")
_NO_END = 1 << 62

_encode = msgspec.json.Encoder().encode


class Cursor(NamedTuple):
    """The next byte of stdout and of stderr, and of which instance, if the caller said so."""

    stdout: int
    stderr: int
    instance: str

    @classmethod
    def parse(cls, text: str) -> "Cursor":
        match = _CURSOR.fullmatch(text)
        if match is None:
            raise InvalidCommand("this is no cursor that the query gave", field="cursor")
        return cls(int(match[1]), int(match[2]), match[3])

    def text(self) -> str:
        return f"1.{self.stdout}.{self.stderr}.{self.instance}"


async def read_lines(
    state_dir: Path,
    *,
    stream: str = BOTH,
    tail: int = 0,
    since: datetime | None = None,
    cursor: str | None = None,
    instance: str = "",
    max_lines: int = PAGE_LINES,
    max_bytes: int = PAGE_BYTES,
) -> tuple[list[LogLine], str | None]:
    """A page of lines and the cursor behind them; the streams are merged by time.

    Without `cursor`: the last `tail` lines, or with 0 all from the oldest on; then on from the cursor, for which
    `tail` does not count. None from before `since`. A page holds at most `max_lines`, and `max_bytes` of JSON. The
    cursor is null when there was nothing (more): a caller that goes on later keeps the one it has. One of
    another `instance` begins anew. InvalidCommand for what is no cursor; Unavailable when a file cannot be read.
    """
    names = STREAMS if stream == BOTH else (stream,)
    since_us = 0 if since is None else to_us(since)
    at = None if cursor is None else Cursor.parse(cursor)
    if at is not None and at.instance != instance:
        at = None
    query = _Query(state_dir, names, since_us, instance)
    try:
        return await asyncio.to_thread(query.page, at, tail, max_lines, max_bytes)
    except OSError as failure:
        raise Unavailable(
            f"the log in {state_dir} cannot be read: {failure.strerror or failure}"
        ) from failure


class _Query:
    def __init__(self, folder: Path, names: tuple[str, ...], since_us: int, instance: str) -> None:
        self._folder = folder
        self._names = names
        self._since_us = since_us
        self._instance = instance
        self._now_us = time.time_ns() // 1000

    def page(
        self, at: Cursor | None, tail: int, max_lines: int, max_bytes: int
    ) -> tuple[list[LogLine], str | None]:
        starts = {"stdout": 0, "stderr": 0} if at is None else {"stdout": at.stdout, "stderr": at.stderr}
        ends = dict.fromkeys(self._names, _NO_END)
        skip = 0
        if at is None:
            if self._since_us:
                starts |= {name: since_start(self._folder, name, self._since_us) for name in self._names}
            if tail:
                # What is written from now on is not counted among the last lines, and left to the cursor.
                ends = {name: stream_end(self._folder, name) for name in self._names}
                for name, end in ends.items():
                    starts[name] = max(starts[name], tail_start(self._folder, name, tail, end))
                skip = max(0, sum(1 for _ in self._merged(starts, ends)) - tail)
        lines: list[LogLine] = []
        used = 0
        for number, (name, line) in enumerate(self._merged(dict(starts), ends)):
            if number < skip:
                starts[name] = line.stop
                continue
            if len(lines) == max_lines:
                break
            row = _row(name, line)
            used += len(_encode(row)) + 1
            if used > max_bytes and lines:
                break
            lines.append(row)
            starts[name] = line.stop
        cursor = Cursor(starts["stdout"], starts["stderr"], self._instance)
        return lines, cursor.text() if lines else None

    def _merged(self, starts: dict[str, int], ends: dict[str, int]) -> Iterator[tuple[str, Line]]:
        streams = [self._timed(name, starts[name], ends[name]) for name in self._names]
        for _, name, line in heapq.merge(*streams):
            yield name, line

    def _timed(self, name: str, start: int, end: int) -> Iterator[tuple[int, str, Line]]:
        """The clock may step back; the order of a stream stays."""
        latest = 0
        for line in LineReader(self._folder, name, start, end, self._now_us):
            latest = max(latest, line.time_us)
            if line.time_us >= self._since_us:
                yield latest, name, line


def _row(name: str, line: Line) -> LogLine:
    moment = from_us(line.time_us)
    try:
        return LogLine(time=moment, stream=name, text=line.data.decode())
    except UnicodeDecodeError:
        text = base64.b64encode(line.data).decode()
        return LogLine(time=moment, stream=name, text=text, encoding=BASE64)
