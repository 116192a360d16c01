"""Publishes what was planned, and notes what the stream said to it."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import nats.errors

from .history import History, Published
from .plan import Action
from .reader import Reader

PATIENCE_S = 3.0
POLL_S = 0.005


class Publisher:
    """`paths` are what the symbols `{witness}` and `{image}` of a body stand for."""

    def __init__(self, nc: Any, history: History, reader: Reader, paths: dict[str, str]) -> None:
        self._nc = nc
        self._history = history
        self._reader = reader
        self._paths = paths
        self._sent: dict[str, Published] = {}
        self._began = asyncio.get_running_loop().time()
        self._open = asyncio.Event()
        self._open.set()
        self._under_way = 0

    def now(self) -> float:
        return asyncio.get_running_loop().time() - self._began

    @contextlib.asynccontextmanager
    async def silence(self) -> AsyncIterator[None]:
        """Inside, nothing is published, and all that was has its answer or never gets one."""
        self._open.clear()
        try:
            while self._under_way:
                await asyncio.sleep(POLL_S)
            yield
        finally:
            self._open.set()

    async def do(self, action: Action) -> None:
        args = action.args
        match action.kind:
            case "send":
                await self.send(args["cid"], args["verb"], args["body"])
            case "malformed":
                subject = f"{self._subject()}.{args['end']}"
                await self._publish(
                    Published(
                        subject=subject,
                        body=args["body"].encode("latin-1"),
                        expect="rejection",
                        id=args["id"],
                    )
                )
            case "again" if first := self._sent.get(args["id"]):
                body = first.body
                if args["reorder"]:
                    body = json.dumps(dict(reversed(json.loads(body).items())), indent=1).encode()
                await self._publish(
                    Published(subject=first.subject, body=body, expect="command", id=first.id)
                )
            case "other" if first := self._sent.get(args["id"]):
                changed = {**json.loads(first.body), "actor": "somebody else"}
                await self._publish(
                    Published(
                        subject=first.subject,
                        body=json.dumps(changed).encode(),
                        expect="command",
                        id=first.id,
                        variant=1,
                    )
                )

    async def send(self, cid: str | None, verb: str, body: dict[str, Any]) -> Published:
        resolved = self._resolve(cid, body)
        message = Published(
            subject=f"{self._subject()}.{cid or '_'}.{verb}",
            body=json.dumps(resolved).encode(),
            expect="command",
            id=body["id"],
        )
        self._sent[body["id"]] = message
        await self._publish(message)
        return message

    def _subject(self) -> str:
        return f"{self._history.prefix}.cmd.{self._history.node}"

    def _resolve(self, cid: str | None, body: dict[str, Any]) -> dict[str, Any]:
        resolved = dict(body)
        wanted = resolved.get("if_instance", "")
        if wanted.startswith("@"):
            known = self._reader.instances.get(cid or "", [])
            former = wanted == "@former" and len(known) > 1
            resolved["if_instance"] = known[-2 if former else -1] if known else "0" * 26
        deadline = resolved.get("deadline", "")
        if deadline.startswith("@now"):
            moment = datetime.now(UTC) + timedelta(seconds=float(deadline.removeprefix("@now")))
            resolved["deadline"] = moment.isoformat()
        text = json.dumps(resolved)
        for name, path in self._paths.items():
            text = text.replace(f"{{{name}}}", path)
        return dict(json.loads(text))

    async def _publish(self, message: Published) -> None:
        """One attempt: whether a message without an answer was stored is not known."""
        while not self._open.is_set():
            await self._open.wait()
        self._under_way += 1
        try:
            message.sent_at = self.now()
            self._history.published.append(message)
            with contextlib.suppress(nats.errors.TimeoutError, nats.errors.ConnectionClosedError):
                await self._ask(message)
        finally:
            self._under_way -= 1

    async def _ask(self, message: Published) -> None:
        try:
            raw = await self._nc.request(message.subject, message.body, timeout=PATIENCE_S)
        except nats.errors.NoRespondersError:
            message.outcome = "refused"
            return
        answer = json.loads(raw.data)
        message.outcome = "refused" if "error" in answer else "stored"
        message.stream_seq, message.stored_at = answer.get("seq", 0), self.now()
