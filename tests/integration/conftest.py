"""Real servers for the tests: a nats-server per module on a free port with connections to it, and a launcher in a
folder of its own. Nothing here needs Docker or root, unless SANDFLEET_TEST_NATS says otherwise (tests/broker.py).
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from worker.bus.connection import Bus
from worker.bus.server import EmbeddedServer
from worker.supervisor import Launcher

from .brokers import end_server, make_server
from .launcher_help import Hearing, Home, data_directory


@dataclass
class TlsFiles:
    ca: str | None = None
    cert: str | None = None
    key: str | None = None


@dataclass
class NatsSettings:
    """The `[nats]` settings of a test, as the bus reads them."""

    url: str
    creds: str | None = None
    nkey: str | None = None
    token_file: str | None = None
    tls: TlsFiles = field(default_factory=TlsFiles)
    insecure: bool = True
    domain: str | None = None
    replicas: int = 1
    stream_prefix: str = "SANDFLEET"


async def until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Wait for a condition, with a deadline."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


ServerFactory = Callable[..., Coroutine[Any, Any, EmbeddedServer]]
Connect = Callable[..., Coroutine[Any, Any, Bus]]


@pytest.fixture(scope="module")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """One server for the module, with JetStream in a temporary folder and no credentials."""
    server = make_server(store_dir=tmp_path_factory.mktemp("nats"), purpose="module")
    asyncio.run(server.start())
    yield server
    asyncio.run(end_server(server))


@pytest.fixture
async def start_server(tmp_path: Path) -> AsyncIterator[ServerFactory]:
    """Start servers of this one test: `await start_server(config="…", token=…, port=…)`."""
    servers: list[EmbeddedServer] = []

    async def start(
        *, config: str | None = None, store: Path | None = None, **options: Any
    ) -> EmbeddedServer:
        number = len(servers)
        if config is not None:
            path = tmp_path / f"nats-{number}.conf"
            path.write_text(config)
            options["config"] = path
        server = make_server(store_dir=store or tmp_path / f"nats-{number}", **options)
        servers.append(server)
        await server.start()
        return server

    yield start
    for server in servers:
        await end_server(server)


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Connect to a URL or server: `await connect(server, node="n1", token_file=…)`; closed after the test."""
    buses: list[Bus] = []

    async def open_bus(
        server: EmbeddedServer | str, *, node: str | None = None, retry: bool = False, **settings: object
    ) -> Bus:
        url = server if isinstance(server, str) else server.url
        cfg = NatsSettings(url=url, **settings)  # type: ignore[arg-type]
        bus = await Bus.connect(cfg, node=node, name="test", retry=retry)
        buses.append(bus)
        return bus

    yield open_bus
    for bus in buses:
        await bus.close()


@pytest.fixture
async def home() -> AsyncIterator[Home]:
    """A data directory; a launcher that runs there in the end is killed with all that it runs."""
    async with data_directory() as home:
        yield home


@pytest.fixture
async def launcher(home: Home) -> AsyncIterator[Launcher]:
    """A real launcher of that directory, which also takes plans without a sandbox."""
    launcher = await Launcher.attach(home, unsandboxed=True)
    yield launcher
    await launcher.close()


@pytest.fixture
def heard(launcher: Launcher) -> Hearing:
    """What that launcher tells on its own; output is acknowledged."""
    return Hearing(launcher)
