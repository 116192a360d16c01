"""A server of an address: emptied for each test, but never of what no test has made."""

import fcntl
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import nats
import pytest

from tests.broker import MARKER, Address, clear, parse
from worker.bus.server import EmbeddedServer


@pytest.fixture
async def url(tmp_path: Path) -> AsyncIterator[str]:
    server = EmbeddedServer(store_dir=tmp_path / "nats")  # whatever the other tests use
    yield await server.start()
    await server.stop()


async def streams(url: str) -> set[str]:
    client = await nats.connect(url)
    try:
        return {info.config.name or "" for info in await client.jetstream().streams_info()}
    finally:
        await client.close()


async def add_streams(url: str, *names: str) -> None:
    client = await nats.connect(url)
    try:
        for name in names:
            await client.jetstream().add_stream(name=name, subjects=[f"{name}.>"])
    finally:
        await client.close()


async def test_it_is_emptied(url: str) -> None:
    await clear(url)
    assert await streams(url) == {MARKER}
    await add_streams(url, *(f"S{number}" for number in range(3)))
    await clear(url)
    assert await streams(url) == {MARKER}


async def test_streams_of_others_are_left_alone(url: str) -> None:
    await add_streams(url, "PRECIOUS")
    with pytest.raises(RuntimeError, match="PRECIOUS"):
        await clear(url)
    assert await streams(url) == {"PRECIOUS"}


async def test_one_claim_of_a_kind_at_a_time(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first, second = Address("a kind", parse(url)), Address("a kind", parse(url))
    await first.claim()
    await add_streams(url, "S")
    with pytest.raises(pytest.skip.Exception, match="second server"):
        await second.claim()
    await second.release()  # it has nothing
    assert "S" in await streams(url)
    await first.release()
    assert await streams(url) == {MARKER}
    await second.claim()
    await second.release()


async def test_one_process_at_a_time(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    address = Address("a kind", parse(url))
    await address.claim()
    (lock,) = tmp_path.glob("sandfleet-test-*.lock")
    assert blocked(lock)
    await address.release()


def blocked(lock: Path) -> bool:
    """Whether another process would be refused: a second descriptor is as good as one."""
    with lock.open("rb") as other:
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False
