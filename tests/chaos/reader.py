"""Reads the event and log streams by a cursor of its own, whatever happens to the server, and notes all of it."""

import asyncio
import contextlib
import json
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any

import nats
import nats.errors

from .history import EVENTS, LOGS, History, Message

BATCH = 500
BATCH_BYTES = 4 * 1024 * 1024
PATIENCE_S = 1.5
LOOK_EVERY_S = 0.03
OURS = ("Nats-Stream", "Nats-Sequence", "Nats-Time-Stamp", "Nats-Subject", "Nats-Num-Pending",
        "Nats-Last-Sequence", "Nats-UpTo-Sequence")  # fmt: skip


class ReadFailed(Exception):
    """The server did not answer, or not to the end."""


async def connect(url: str) -> Any:
    async def quiet(_: Exception) -> None:
        return None  # the server is killed on purpose

    return await nats.connect(
        url.split(","),
        max_reconnect_attempts=-1,
        reconnect_time_wait=0.05,
        error_cb=quiet,
        allow_reconnect=True,
    )


class Reader:
    """`async with Reader(url, history)`. Events that were read are also kept decoded in `events`."""

    def __init__(self, url: str, history: History) -> None:
        self._url = url
        self._history = history
        self._nc: Any = None
        self._inbox = ""
        self._answers: asyncio.Queue[Any] = asyncio.Queue()
        self._asked = 0
        self._next = {EVENTS: 1, LOGS: 1}
        self._lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self.generation = {EVENTS: 1, LOGS: 1}
        self.events: list[dict[str, Any]] = []
        self.answered: set[str] = set()  # ids of commands that have a result
        self.instances: dict[str, list[str]] = defaultdict(list)

    async def __aenter__(self) -> "Reader":
        self._nc = await connect(self._url)
        self._inbox = self._nc.new_inbox()

        async def arrived(message: Any) -> None:
            self._answers.put_nowait(message)

        await self._nc.subscribe(f"{self._inbox}.*", cb=arrived)
        self._task = asyncio.create_task(self._run(), name="reader")
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._nc.close()

    def check(self) -> None:
        """Raises what ended the reading, if anything did."""
        if self._task is not None and self._task.done():
            self._task.result()

    async def _run(self) -> None:
        while True:
            for stream in self._next:
                with contextlib.suppress(ReadFailed):
                    await self.catch_up(stream)
            await asyncio.sleep(LOOK_EVERY_S)

    async def catch_up(self, stream: str) -> None:
        """Read what the stream holds now. ReadFailed when it cannot be read."""
        async with self._lock:
            while await self._batch(stream):
                pass

    @contextlib.asynccontextmanager
    async def new_generation(self, *streams: str) -> AsyncIterator[None]:
        """Meanwhile nothing is read; after it from the first message on."""
        async with self._lock:
            try:
                yield
            finally:
                for stream in streams:
                    self.generation[stream] += 1
                    self._next[stream] = 1

    async def _batch(self, stream: str) -> bool:
        """True when there is more. Direct gets of many messages: ADR-31 of NATS."""
        while not self._answers.empty():
            self._answers.get_nowait()
        subject = f"{self._history.prefix}.{'evt' if stream == EVENTS else 'log'}.{self._history.node}.>"
        request = {
            "seq": self._next[stream],
            "batch": BATCH,
            "max_bytes": BATCH_BYTES,
            "next_by_subj": subject,
        }
        self._asked += 1
        token = f"{self._inbox}.{self._asked}"
        try:
            await self._nc.publish(f"$JS.API.DIRECT.GET.{stream}", json.dumps(request).encode(), reply=token)
        except nats.errors.Error as failure:
            raise ReadFailed from failure
        while True:
            try:
                async with asyncio.timeout(PATIENCE_S):
                    answer = await self._answers.get()
            except TimeoutError:
                raise ReadFailed from None
            if answer.subject != token:
                continue  # the rest of an answer that was given up
            headers = dict(answer.headers or {})
            match headers.get("Status"):
                case "204":
                    return bool(headers.get("Nats-Num-Pending", "0") != "0")
                case "404":
                    return False
                case str():
                    raise ReadFailed
            self._take(stream, headers, answer.data)

    def _take(self, stream: str, headers: dict[str, str], data: bytes) -> None:
        seq = int(headers["Nats-Sequence"])
        if seq < self._next[stream]:
            raise AssertionError(f"{stream} gave {seq}, asked for {self._next[stream]}")
        self._next[stream] = seq + 1
        message = Message(
            generation=self.generation[stream],
            stream_seq=seq,
            subject=headers["Nats-Subject"],
            data=data,
            headers={name: value for name, value in headers.items() if name not in OURS},
        )
        if stream == LOGS:
            self._history.logs.append(message)
            return
        self._history.events.append(message)
        event = json.loads(data)
        self.events.append(event)
        if event["type"] in ("command_completed", "command_rejected"):
            self.answered.add(event.get("command_id") or event.get("sha256"))
        status = event.get("status")
        if status and status["instance"] not in self.instances[status["container"]]:
            self.instances[status["container"]].append(status["instance"])

    def last(self, stream: str) -> int:
        """The highest sequence that was read."""
        return self._next[stream] - 1
