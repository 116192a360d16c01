"""A TCP proxy that can lose what the server says, delay both ways, or break: for answers that never arrive.

The delay is a line, not a brake: what was read is held for `delay_s` and then passed on, however much stands in it.

    python -m tests.integration.proxy PORT DELAY_S      one in a process of its own; it prints its port
"""

import asyncio
import contextlib
import sys
from collections import deque
from typing import Self

READ_BYTES = 256 * 1024


class Proxy:
    """`async with Proxy(port) as proxy`: connect to `proxy.url`. `delay_s` holds for each way, and for open
    connections from the next byte on.
    """

    def __init__(self, port: int, *, delay_s: float = 0.0) -> None:
        self._port = port
        self.delay_s = delay_s
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.url = ""
        self.deaf = False  # what the server says is thrown away
        self.closed = False  # new connections are ended at once
        self.bytes_per_s = 0  # each way; 0: as fast as it goes
        self.lost_bytes = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=READ_BYTES)
        self.url = f"nats://127.0.0.1:{self.port}"
        return self

    @property
    def port(self) -> int:
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

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
        if self.closed:
            writer.transport.abort()
            return
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: writer.close())  # also of one that was cancelled before it began

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = [writer]
        try:
            server_reader, server_writer = await asyncio.open_connection(
                "127.0.0.1", self._port, limit=READ_BYTES
            )
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
        line: deque[tuple[float, bytes]] = deque()
        arrived = asyncio.Event()

        async def deliver() -> None:
            while True:
                while not line:
                    arrived.clear()
                    await arrived.wait()
                due, data = line[0]
                if (wait_s := due - loop.time()) > 0:
                    await asyncio.sleep(wait_s)
                line.popleft()
                if can_lose and self.deaf:
                    self.lost_bytes += len(data)
                    continue
                if self.bytes_per_s:
                    await asyncio.sleep(len(data) / self.bytes_per_s)
                writer.write(data)
                await writer.drain()

        delivering = asyncio.ensure_future(deliver())
        try:
            while data := await reader.read(self._piece()):
                line.append((loop.time() + self.delay_s, data))
                arrived.set()
            raise ConnectionResetError
        finally:
            delivering.cancel()
            await asyncio.gather(delivering, return_exceptions=True)

    def _piece(self) -> int:
        """A slow way is fed in small pieces, so that it is slow and not jerky."""
        return min(READ_BYTES, max(1024, self.bytes_per_s // 50)) if self.bytes_per_s else READ_BYTES


async def serve(port: int, delay_s: float) -> None:
    async with Proxy(port, delay_s=delay_s) as proxy:
        sys.stdout.write(f"{proxy.port}\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


if __name__ == "__main__":
    import uvloop

    uvloop.run(serve(int(sys.argv[1]), float(sys.argv[2])))
