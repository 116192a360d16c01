"""Chunks that wait for the first connection keep their order, also towards those that come when it is there."""

import asyncio
from typing import Any

from worker.late import LateSink


class Publisher:
    def __init__(self) -> None:
        self.got: list[bytes] = []

    async def publish(self, subject: str, data: bytes, headers: dict[str, str]) -> None:
        self.got.append(data)

    async def last(self, subject: str) -> None:
        return None

    async def publish_stats(self, subject: str, data: bytes) -> bool:
        return True


def send(sink: LateSink, *names: bytes) -> list[asyncio.Task[Any]]:
    return [asyncio.create_task(sink.publish("s", name, {})) for name in names]


async def test_nobody_overtakes_those_who_waited() -> None:
    sink, publisher = LateSink(), Publisher()
    waiting = send(sink, b"1", b"2", b"3")
    await asyncio.sleep(0)
    coming = send(sink, b"4", b"5")  # they run first after it was opened
    sink.open(publisher)
    await asyncio.gather(*waiting, *coming)
    assert publisher.got == [b"1", b"2", b"3", b"4", b"5"]
    await sink.publish("s", b"6", {})
    assert publisher.got[-1] == b"6"
    assert await sink.last("s") is None


async def test_those_who_give_up_block_nobody() -> None:
    sink, publisher = LateSink(), Publisher()
    first, second, third = send(sink, b"1", b"2", b"3")
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.sleep(0)
    sink.open(publisher)
    first.cancel()  # its turn has come and it has not run yet
    await asyncio.gather(first, second, third, return_exceptions=True)
    assert publisher.got == [b"3"]
