"""From the launcher's own writer of capture files to the stream of a real server, through kills of either side."""

import asyncio
import hashlib
import random
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.conftest import Connect, ServerFactory, until
from worker.bus.connection import Bus
from worker.bus.messages import StreamMessage
from worker.bus.reader import StreamReader
from worker.bus.server import EmbeddedServer
from worker.bus.streams import setup_streams
from worker.capture_files import STREAMS
from worker.launcher.segments import OpenFiles, SegmentWriter
from worker.log_chunks import EOF, LOST, LOST_REASON, OFFSET

INSTANCE = "01JD00000000000000000000A1"


class Program:
    """Writes lines through the launcher's writer, and knows what it wrote."""

    def __init__(self, folder: Path, max_bytes: int | None = None) -> None:
        (folder / "state").mkdir()
        (folder / "spool").mkdir()
        files = OpenFiles(16)
        self.writers = {
            stream: SegmentWriter(str(folder / "state"), stream, max_bytes, files, pytest.fail)
            for stream in STREAMS
        }
        self.written = {stream: bytearray() for stream in STREAMS}
        self._number = 0

    def write(self, lines: int) -> None:
        for stream in STREAMS:
            text = b"".join(b"%s %d\n" % (stream.encode(), self._number + n) for n in range(lines))
            self.writers[stream].append(memoryview(text), time.time_ns() // 1000)
            self.written[stream] += text
        self._number += lines

    def end(self) -> None:
        for writer in self.writers.values():
            assert writer.finish_run(1, time.time_ns() // 1000)
            writer.close()


class Worker:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, server: EmbeddedServer) -> None:
        with (self._folder / "worker.err").open("ab") as errors:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.integration.log_child"),
                *(str(self._folder), server.url, INSTANCE),
                stderr=errors,
            )

    async def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[Worker]:
    found = Worker(tmp_path)
    yield found
    await found.kill()


async def stored(bus: Bus, stream: str) -> list[StreamMessage]:
    subject = f"sandfleet.v1.log.n1.web-0.{stream}"
    async with StreamReader(bus, "SANDFLEET_LOG", [subject], follow=False) as reader:
        return [message async for message in reader]


async def ended(bus: Bus, stream: str) -> bool:
    last = await bus.js.last_message("SANDFLEET_LOG", f"sandfleet.v1.log.n1.web-0.{stream}")
    return last is not None and EOF in last.headers


async def until_ended(bus: Bus) -> None:
    for stream in STREAMS:
        async with asyncio.timeout(40):
            while not await ended(bus, stream):
                await asyncio.sleep(0.02)


async def messages_stored(bus: Bus) -> int:
    return (await bus.js.stream_info("SANDFLEET_LOG")).messages


async def test_no_byte_is_lost_or_doubled_by_kills_of_the_worker(
    start_server: ServerFactory, connect: Connect, worker: Worker, tmp_path: Path
) -> None:
    server = await start_server()
    bus = await connect(server)
    await setup_streams(bus)
    program = Program(tmp_path)
    chance = random.Random(7)
    for _ in range(5):
        await worker.start(server)
        before = await messages_stored(bus)
        async with asyncio.timeout(20):
            # Kill it while it is busy, a little later each time.
            while await messages_stored(bus) < before + chance.randint(1, 12):
                program.write(chance.randint(1, 1500))
                await asyncio.sleep(0.005)
        await worker.kill()
    program.end()
    await worker.start(server)
    await until_ended(bus)
    await worker.kill()
    for stream in STREAMS:
        found = await stored(bus, stream)
        at = 0
        for message in found:
            assert int(message.headers[OFFSET]) == at
            at += len(message.data)
        data = b"".join(message.data for message in found)
        assert hashlib.sha256(data).digest() == hashlib.sha256(program.written[stream]).digest()
        assert sum(EOF in message.headers for message in found) == 1


async def test_kills_of_the_server_and_rotation_meanwhile(
    start_server: ServerFactory, connect: Connect, worker: Worker, tmp_path: Path
) -> None:
    server = await start_server()
    bus = await connect(server, retry=True)
    await setup_streams(bus)
    program = Program(tmp_path, max_bytes=1024 * 1024)
    await worker.start(server)
    for _ in range(3):
        before = await messages_stored(bus)
        async with asyncio.timeout(20):
            while await messages_stored(bus) < before + 3:
                program.write(200)
                await asyncio.sleep(0.005)
        await server.stop(kill=True)
        program.write(100_000)  # more than is kept while nobody takes it
        await server.start()
        await until(lambda: bus.connected)
    program.end()
    await until_ended(bus)
    await worker.kill()
    for stream in STREAMS:
        at = 0
        reasons = set()
        for message in await stored(bus, stream):
            assert int(message.headers[OFFSET]) == at
            assert message.data == program.written[stream][at : at + len(message.data)]
            at += len(message.data) + int(message.headers.get(LOST, "0"))
            reasons.add(message.headers.get(LOST_REASON))
        assert at == len(program.written[stream])
        assert reasons <= {None, "size"}
