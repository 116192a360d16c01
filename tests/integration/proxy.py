"""A TCP proxy that can lose what the server says, delay both ways, or break: for answers that never arrive."""

import asyncio
import contextlib
from typing import Self


class Proxy:
    """`async with Proxy(port) as proxy`: connect to `proxy.url`."""

    def __init__(self, port: int, *, delay_s: float = 0.0) -> None:
        self._port = port
        self._delay_s = delay_s
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.url = ""
        self.deaf = False  # what the server says is thrown away
        self.lost_bytes = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"nats://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()
        await self.break_all()

    async def break_all(self) -> None:
        """End every connection; new ones are taken."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: writer.close())  # also of one that was cancelled before it began

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = [writer]
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._port)
            ends.append(server_writer)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._copy(reader, server_writer, can_lose=False))
                group.create_task(self._copy(server_reader, writer, can_lose=True))
        except* OSError:
            pass
        finally:
            for end in ends:
                end.close()
            for end in ends:
                with contextlib.suppress(OSError):
                    await end.wait_closed()

    async def _copy(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, can_lose: bool
    ) -> None:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while True:
                due, data = await queue.get()
                await asyncio.sleep(max(0.0, due - loop.time()))
                if can_lose and self.deaf:
                    self.lost_bytes += len(data)
                else:
                    writer.write(data)
                    await writer.drain()

        delivering = asyncio.ensure_future(deliver())
        try:
            while data := await reader.read(65536):
                queue.put_nowait((loop.time() + self._delay_s, data))
            raise ConnectionResetError
        finally:
            delivering.cancel()
            await asyncio.gather(delivering, return_exceptions=True)
