"""A fleet whose worker reaches its server through a proxy of the test's own; the client goes straight to the server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.acceptance.harness import DEADLINE_S, Client, Fleet, P
from tests.integration.proxy import Proxy

CONFIG = '[policy]\nregister_roots = ["{images}"]\n'
CHUNK_TIMEOUT_S = 1.0


@asynccontextmanager
async def distant_fleet(*, delay_s: float = 0.0) -> AsyncIterator[tuple[Fleet, Proxy]]:
    """With an image `base`. `delay_s` for each way."""
    fleet = Fleet(CONFIG)
    async with Proxy(fleet.server.port, delay_s=delay_s) as proxy:
        fleet.worker.server = proxy  # type: ignore[assignment]
        async with fleet:
            await fleet.register("base")
            yield fleet, proxy


async def change_stream(client: Client, name: str, **changes: Any) -> dict[str, Any]:
    """Change a stream's settings; gives what they were."""
    info = await call(client, f"STREAM.INFO.{name}")
    before: dict[str, Any] = info["config"]
    await call(client, f"STREAM.UPDATE.{name}", {**before, **changes})
    return before


async def call(client: Client, verb: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = b"" if body is None else json.dumps(body).encode()
    answer: dict[str, Any] = json.loads((await client.nc.request(f"$JS.API.{verb}", data, timeout=10)).data)
    assert "error" not in answer, answer
    return answer


async def messages_in(client: Client, stream: str, subject: str = ">") -> int:
    state = (await call(client, f"STREAM.INFO.{stream}", {"subjects_filter": subject}))["state"]
    return sum((state.get("subjects") or {}).values())


async def chunks(
    client: Client, cid: str, *, run: int = 1, deadline_s: float = 4 * DEADLINE_S
) -> list[Chunk]:
    """The log messages of a container's standard output in the order of the stream, once the end of `run` is there."""
    subject = f"{P}.log.{client.node}.{cid}.stdout"
    found: list[Chunk] = []
    async with asyncio.timeout(deadline_s):
        sub = await client.js.subscribe(subject, stream="SANDFLEET_LOG", ordered_consumer=True)
        while not any(chunk.eof == run for chunk in found):
            try:
                message = await sub.next_msg(timeout=CHUNK_TIMEOUT_S)
            except TimeoutError:
                continue
            found.append(Chunk(message.metadata.sequence.stream, message.headers, message.data))
        await sub.unsubscribe()
    return found


class Chunk:
    """One message: its place in the stream, and what it says of the container's output."""

    def __init__(self, sequence: int, headers: dict[str, str], data: bytes) -> None:
        self.sequence = sequence
        self.data = data
        self.offset = int(headers["Sandfleet-Offset"])
        self.lost = int(headers.get("Sandfleet-Lost", 0))
        self.reason = headers.get("Sandfleet-Lost-Reason")
        self.eof = int(headers.get("Sandfleet-Eof", 0))
        assert not (self.lost and data)


def placed(found: list[Chunk]) -> tuple[bytes, int]:
    """The bytes by their offsets, and how many are marked as lost: each is there once, or covered by a marker once."""
    data, expected, lost = bytearray(), 0, 0
    for chunk in sorted(found, key=lambda one: (one.offset, one.sequence)):
        assert chunk.offset == expected, f"{chunk.offset} follows {expected}"
        expected += len(chunk.data) + chunk.lost
        lost += chunk.lost
        data += chunk.data
    return bytes(data), lost


def peak_bytes(pid: int) -> int:
    """The most memory that was ever resident."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")
