"""Fetching in pieces over a connection that loses, repeats and delays; what does not add up is refused."""

import asyncio
import hashlib
import random
from typing import Any

import pytest

from schemas.queries import PIECE_BYTES, ExportRequest, PieceReply
from worker import client_downloads
from worker.bus.failures import NoAnswer, NoResponders
from worker.client_downloads import Download
from worker.errors import Internal, NotFound, Unavailable


class Node:
    """What a node answers, and the ways in which an answer may not arrive."""

    def __init__(self, content: bytes, *, lose: float = 0.0, prepare: int = 0, **wrong: Any) -> None:
        self.content = content
        self.lose = lose
        self.prepare = prepare
        self.wrong = wrong
        self.asked: list[ExportRequest] = []
        self.failure: Exception | None = None
        self.random = random.Random(1)

    async def query(self, node: str, verb: str, request: Any, reply: Any, *, timeout_s: float) -> PieceReply:
        assert (node, verb, reply) == ("n1", "export", PieceReply)
        self.asked.append(request)
        assert request.acked <= request.offset
        await asyncio.sleep(self.random.random() / 1000)
        if self.failure is not None:
            raise self.failure
        if self.random.random() < self.lose:
            raise (NoAnswer if self.random.random() < 0.5 else NoResponders)("lost")
        if self.prepare:
            self.prepare -= 1
            return self._reply(request.offset, b"", ready=False, eof=False)
        data = self.content[request.offset : request.offset + PIECE_BYTES]
        return self._reply(
            request.offset,
            data,
            ready=True,
            eof=request.offset + len(data) >= len(self.content) and len(data) < PIECE_BYTES,
        )

    def _reply(self, offset: int, data: bytes, *, ready: bool, eof: bool) -> PieceReply:
        fields = {
            "offset": offset,
            "data": data,
            "ready": ready,
            "eof": eof,
            "total": len(self.content) if eof else None,
            "sha256": hashlib.sha256(self.content).hexdigest() if eof else None,
            "notes": ["a note"] if eof else [],
            **(self.wrong if eof else {}),
        }
        return PieceReply(**fields)


async def fetch(node: Node) -> tuple[bytes, Download]:
    download = Download(
        node,  # type: ignore[arg-type]
        "n1",
        "export",
        lambda session, offset, acked: ExportRequest(
            session=session, container="web-0", offset=offset, acked=acked
        ),
    )
    found = b""
    async for piece in download.pieces():
        found += piece
    return found, download


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_downloads, "_RETRY_S", 0.001)


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 7 * PIECE_BYTES + 5])
@pytest.mark.parametrize("lose", [0.0, 0.4])
async def test_everything_arrives(size: int, lose: float) -> None:
    content = random.Random(size).randbytes(size)
    found, download = await fetch(Node(content, lose=lose))
    assert found == content
    assert (download.total, download.notes) == (size, ["a note"])


async def test_what_is_not_ready_is_waited_for_alone() -> None:
    node = Node(b"x" * PIECE_BYTES * 3, prepare=5)
    found, _ = await fetch(node)
    assert found == node.content
    assert [request.offset for request in node.asked[:6]] == [0] * 6


async def test_what_has_arrived_is_told() -> None:
    node = Node(b"x" * PIECE_BYTES * 40)
    await fetch(node)
    for request in node.asked:
        assert request.offset - request.acked <= client_downloads.AHEAD * PIECE_BYTES
    assert (node.asked[-1].offset, node.asked[-1].acked) == (len(node.content), len(node.content))


@pytest.mark.parametrize("wrong", [{"sha256": "00"}, {"total": 1}])
async def test_what_does_not_add_up_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(Internal, match="something was lost"):
        await fetch(Node(b"x" * 1000, **wrong))


async def test_another_piece_than_asked_for_is_refused() -> None:
    with pytest.raises(Internal, match="another piece"):
        await fetch(Node(b"x" * 1000, offset=5))


async def test_a_node_that_lost_the_session_ends_it() -> None:
    node = Node(b"x" * PIECE_BYTES * 3)
    node.failure = NotFound("this session has ended")
    with pytest.raises(NotFound):
        await fetch(node)


async def test_a_node_that_is_gone_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_downloads, "PATIENCE_S", 0.05)
    node = Node(b"x")
    node.failure = NoResponders("nobody there")
    with pytest.raises(Unavailable, match="not all of it"):
        await fetch(node)
