"""The worker's way to its server, as bad as wanted: cut, late, slow, or open at one end only."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator
from typing import Self

CHUNK = 16384
IN_FLIGHT = 256  # pieces read and not yet passed on, per way


class Link:
    """`async with Link(port, …) as link`: connect to `link.url`, an address for each port. What is set concerns
    open connections too.

    `delay_s` holds for each way, `bytes_per_s` too (0: no limit). A way in `held` passes nothing on, and
    neither end is told.
    """

    def __init__(self, *ports: int) -> None:
        self._ports = ports
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self.url = ""
        self.delay_s = 0.0
        self.bytes_per_s = 0
        self.held: frozenset[str] = frozenset()
        self.shut = False  # both ways are held, whatever `held` says

    async def __aenter__(self) -> Self:
        for port in self._ports:
            accept = functools.partial(self._accept, port)
            self._servers.append(await asyncio.start_server(accept, "127.0.0.1", 0))
        ours = [server.sockets[0].getsockname()[1] for server in self._servers]
        self.url = ",".join(f"nats://127.0.0.1:{port}" for port in ours)
        return self

    async def __aexit__(self, *exc: object) -> None:
        for server in self._servers:
            server.close()
        await self.cut()

    async def cut(self) -> None:
        """End every connection; new ones are taken."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def hold(self, *ways: str) -> None:
        """`up`: what the worker says, `down`: what it would hear. None: both go on."""
        self.held = frozenset(ways)
        self._tell()

    @contextlib.asynccontextmanager
    async def away(self) -> AsyncIterator[None]:
        """Inside, nothing passes; all connections that were open are gone, and those of meanwhile after it."""
        self.shut = True
        try:
            await self.cut()
            yield
        finally:
            await self.cut()
            self.shut = False
            self._tell()

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def heal(self) -> None:
        self.delay_s, self.bytes_per_s = 0.0, 0
        self.hold()

    def _accept(self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(port, reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: writer.close())

    async def _serve(self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = [writer]
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", port)
            ends.append(server_writer)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._copy(reader, server_writer, "up"))
                group.create_task(self._copy(server_reader, writer, "down"))
        except* OSError:
            pass  # one end is gone: so is the other
        finally:
            for end in ends:
                end.transport.abort()  # a peer that stands still would never take the rest
            for end in ends:
                with contextlib.suppress(OSError):
                    await end.wait_closed()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(IN_FLIGHT)

        async def deliver() -> None:
            while True:
                due, data = await queue.get()
                await asyncio.sleep(max(0.0, due - loop.time()))
                while self.shut or way in self.held:
                    await self._changed.wait()
                if self.bytes_per_s:
                    await asyncio.sleep(len(data) / self.bytes_per_s)
                writer.write(data)
                await writer.drain()

        async def read() -> None:
            while data := await reader.read(CHUNK):
                await queue.put((loop.time() + self.delay_s, data))
            raise ConnectionResetError

        async with asyncio.TaskGroup() as group:
            group.create_task(deliver())
            group.create_task(read())
