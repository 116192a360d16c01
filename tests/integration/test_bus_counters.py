"""What is counted of a connection on a real server: redeliveries of commands, and what a service's STATS tell."""

import json
from typing import Any

import pytest

from tests.integration.conftest import Connect, ServerFactory, until
from tests.integration.test_bus_consumer import Taker, consuming, numbers, send
from worker.bus.connection import Bus
from worker.bus.consumer import Delivery
from worker.bus.messages import Headers
from worker.bus.rpc import serve_queries
from worker.bus.server import EmbeddedServer
from worker.bus.streams import setup_streams


class GivesBack(Taker):
    """Gives one message back when it comes first."""

    def __init__(self, body: bytes) -> None:
        super().__init__()
        self._body: bytes | None = body

    async def handle(self, delivery: Delivery) -> None:
        if delivery.data == self._body:
            self._body = None
            await delivery.nak(0.05)
        else:
            await super().handle(delivery)


@pytest.fixture
async def admin(nats_server: EmbeddedServer, connect: Connect) -> Bus:
    bus = await connect(nats_server)
    await setup_streams(bus)
    await bus.js.api("STREAM.PURGE.SANDFLEET_CMD")
    return bus


async def test_what_was_given_back_is_counted_once_each(
    nats_server: EmbeddedServer, admin: Bus, connect: Connect
) -> None:
    bus = await connect(nats_server, node="again")
    taker = GivesBack(b"1")
    await send(admin, "again", *numbers(0, 1, 2))
    async with consuming(bus, taker) as consumer:
        await until(lambda: taker.seen == numbers(0, 1, 2))
        assert 1 <= consumer.redelivered <= 2  # the third may have arrived before the second was given back


async def test_a_first_delivery_is_none_also_from_a_stream_that_was_made_anew(
    start_server: ServerFactory, connect: Connect
) -> None:
    server = await start_server()
    admin = await connect(server)
    await setup_streams(admin)
    bus = await connect(server, node="anew")
    taker = Taker()
    async with consuming(bus, taker) as consumer:
        await send(admin, "anew", *numbers(0, 1, 2, 3))
        await until(lambda: len(taker.seen) == 4)
        await admin.js.api("STREAM.DELETE.SANDFLEET_CMD")
        await setup_streams(admin)
        await send(admin, "anew", *numbers(4, 5))
        await until(lambda: taker.seen[4:] == numbers(4, 5), 30)
        assert consumer.redelivered == 0


async def test_stats_tell_what_a_verb_has_to_tell(nats_server: EmbeddedServer, connect: Connect) -> None:
    bus, client = await connect(nats_server, node="n1"), await connect(nats_server)

    async def echo(body: bytes, headers: Headers) -> bytes:
        return body

    async def data() -> dict[str, Any]:
        return {"info": {"waiting": 3}}

    service = await serve_queries(bus, "n1", {"info": echo, "echo": echo}, "1.2.3", data=data)
    await bus.flush()
    reply = await client.request(f"$SRV.STATS.sandfleet.{service.id}", b"")
    by_name = {one["name"]: one for one in json.loads(reply.data)["endpoints"]}
    assert by_name["info"]["data"] == {"waiting": 3}
    assert "data" not in by_name["echo"]
    await service.stop()
