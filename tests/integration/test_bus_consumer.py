"""The node's command consumer on a real server: order, redelivery, loss of everything it depends on."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from schemas.subjects import Subjects
from tests.integration.conftest import Connect, ServerFactory, until
from worker.bus.connection import Bus
from worker.bus.consumer import MAX_HELD_BYTES, MAX_PULL_BYTES, CommandConsumer, Delivery
from worker.bus.failures import JetStreamError, NoAnswer
from worker.bus.server import EmbeddedServer
from worker.bus.streams import setup_streams
from worker.errors import Fenced

SUBJECTS = Subjects()
STREAM = "SANDFLEET_CMD"


class Taker:
    """Handles deliveries: notes their bodies, acknowledges unless told otherwise."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []
        self.held: list[Delivery] = []
        self.hold = False

    async def handle(self, delivery: Delivery) -> None:
        self.seen.append(delivery.data)
        if self.hold:
            self.held.append(delivery)
        else:
            await delivery.ack()


async def no_fence() -> None:
    return


@asynccontextmanager
async def consuming(bus: Bus, taker: Taker, **options: Any) -> AsyncIterator[CommandConsumer]:
    assert bus.node is not None
    options = {"check_fence": no_fence, **options}
    consumer = CommandConsumer(bus, node=bus.node, subjects=SUBJECTS, **options)
    task = asyncio.create_task(consumer.run(taker.handle))
    try:
        ready = asyncio.create_task(consumer.ready.wait())
        await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED, timeout=10)
        ready.cancel()
        yield consumer
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
async def admin(nats_server: EmbeddedServer, connect: Connect) -> Bus:
    bus = await connect(nats_server)
    await setup_streams(bus)
    await bus.js.api(f"STREAM.PURGE.{STREAM}")
    return bus


async def send(bus: Bus, node: str, *bodies: bytes) -> list[int]:
    # Few messages fit under one subject.
    subject = SUBJECTS.command
    return [
        (await bus.js.publish(subject(node, f"c-{number}", "start"), body)).seq
        for number, body in enumerate(bodies)
    ]


def numbers(*of: int) -> list[bytes]:
    return [b"%d" % number for number in of]


async def left(bus: Bus) -> int:
    return (await bus.js.stream_info(STREAM)).messages


async def until_left(bus: Bus, count: int) -> None:
    async with asyncio.timeout(10):
        while await left(bus) != count:
            await asyncio.sleep(0.01)


async def test_commands_arrive_in_order_and_go_when_acknowledged(
    nats_server: EmbeddedServer, admin: Bus, connect: Connect
) -> None:
    bus, taker = await connect(nats_server, node="n1"), Taker()
    await send(admin, "n1", *numbers(*range(50)))
    await send(admin, "other", b"not mine")
    async with consuming(bus, taker) as consumer:
        await until(lambda: len(taker.seen) == 50)
        await send(admin, "n1", *numbers(*range(50, 600)))
        await until(lambda: len(taker.seen) == 600)
        assert taker.seen == numbers(*range(600))
        await until_left(admin, 1)
        assert consumer.rebuilds == 1


async def test_large_commands_are_held_up_to_a_bound(
    nats_server: EmbeddedServer, admin: Bus, connect: Connect
) -> None:
    """What is asked for stops where the bytes do, and goes on once they are dealt with; nothing is made anew for it."""
    bus, taker = await connect(nats_server, node="n1"), Taker()
    bodies = [b"%03d" % number + bytes(256 * 1024) for number in range(120)]
    await send(admin, "n1", *bodies)
    taker.hold = True
    async with consuming(bus, taker) as consumer:
        await until(lambda: consumer.held_bytes >= MAX_HELD_BYTES)
        # A question whose answer comes behind everything that was asked for.
        await bus.js.stream_info(STREAM)
        while taker.seen != bodies:
            assert consumer.held_bytes < MAX_HELD_BYTES + 2 * MAX_PULL_BYTES
            for delivery in taker.held[:8]:
                await delivery.ack()
            del taker.held[:8]
            count = len(taker.seen)
            await until(lambda count=count: len(taker.seen) > count or taker.held)
        for delivery in taker.held:
            await delivery.ack()
        await until_left(admin, 0)
        assert consumer.held_bytes == 0
        assert consumer.rebuilds == 1


async def test_what_a_delivery_says(nats_server: EmbeddedServer, admin: Bus, connect: Connect) -> None:
    bus, taker = await connect(nats_server, node="n1"), Taker()
    taker.hold = True
    async with consuming(bus, taker):
        ack = await admin.js.publish(
            SUBJECTS.command("n1", "web-0", "run"), b"{}", {"traceparent": "00-a-b-01"}
        )
        await until(lambda: taker.held)
        delivery = taker.held[0]
        assert delivery.subject == SUBJECTS.command("n1", "web-0", "run")
        assert delivery.headers["traceparent"] == "00-a-b-01"
        assert (delivery.data, delivery.stream_seq, delivery.redelivered) == (b"{}", ack.seq, False)
        info = await admin.js.stream_info(STREAM)
        assert info.messages == 1
        await delivery.in_progress()
        await delivery.ack(wait=True)
        assert await left(admin) == 0
        await delivery.ack()
        await delivery.term()


async def test_a_message_that_looks_like_a_status_is_a_message(
    nats_server: EmbeddedServer, admin: Bus, connect: Connect
) -> None:
    bus, taker = await connect(nats_server, node="n1"), Taker()
    async with consuming(bus, taker) as consumer:
        subject = SUBJECTS.command("n1", "web-0", "run")
        await admin.js.publish(subject, b"", {"Status": "409", "Description": "Consumer Deleted"})
        await until(lambda: taker.seen == [b""])
        assert consumer.rebuilds == 1


async def test_term_ends_a_message(nats_server: EmbeddedServer, admin: Bus, connect: Connect) -> None:
    bus, taker = await connect(nats_server, node="n1"), Taker()
    taker.hold = True
    async with consuming(bus, taker):
        await send(admin, "n1", b"\xff")
        await until(lambda: taker.held)
        await taker.held[0].term()
        await until_left(admin, 0)


async def test_a_new_worker_gets_at_once_what_a_dead_one_held(
    nats_server: EmbeddedServer, admin: Bus, connect: Connect
) -> None:
    dead, taker = await connect(nats_server, node="n1"), Taker()
    taker.hold = True
    async with consuming(dead, taker):
        await send(admin, "n1", *numbers(0, 1, 2))
        await until(lambda: len(taker.held) == 3)
    await dead.close()
    await send(admin, "n1", *numbers(3, 4))
    bus, again = await connect(nats_server, node="n1"), Taker()
    async with consuming(bus, again):
        await until(lambda: len(again.seen) == 5, 2)
        assert again.seen == numbers(0, 1, 2, 3, 4)


async def test_no_more_is_under_way_than_allowed(
    nats_server: EmbeddedServer, admin: Bus, connect: Connect
) -> None:
    bus, taker = await connect(nats_server, node="n1"), Taker()
    taker.hold = True
    await send(admin, "n1", *numbers(*range(40)))
    async with consuming(bus, taker, max_in_flight=8):
        for _ in range(5):
            await until(lambda: len(taker.held) >= 4)
            assert len(taker.held) <= 8
            for delivery in taker.held:
                await delivery.ack()
            taker.held.clear()
        taker.hold = False
        for delivery in taker.held:
            await delivery.ack()
        await until(lambda: taker.seen == numbers(*range(40)))


async def test_what_is_held_long_is_not_delivered_twice(
    nats_server: EmbeddedServer, admin: Bus, connect: Connect
) -> None:
    bus, taker = await connect(nats_server, node="n1"), Taker()
    taker.hold = True
    async with consuming(bus, taker, ack_wait_s=0.3):
        await send(admin, "n1", b"slow")
        await until(lambda: taker.held)
        info = {}
        for _ in range(20):  # five times the acknowledgement wait
            await asyncio.sleep(0.08)
            info = await admin.js.api(f"CONSUMER.INFO.{STREAM}.n1")
        assert info["num_redelivered"] == 0
        assert info["num_ack_pending"] == 1
        await taker.held[0].ack()
        await until_left(admin, 0)
        assert taker.seen == [b"slow"]


async def test_nak_gives_it_and_all_after_it_again_in_order(
    nats_server: EmbeddedServer, admin: Bus, connect: Connect
) -> None:
    bus = await connect(nats_server, node="n1")
    seen: list[bytes] = []
    refused = False

    async def handle(delivery: Delivery) -> None:
        nonlocal refused
        if delivery.data == b"1" and not refused:
            refused = True
            await delivery.nak(0.05)
            return
        seen.append(delivery.data)
        await delivery.ack()

    taker = Taker()
    taker.handle = handle  # type: ignore[method-assign]
    await send(admin, "n1", *numbers(*range(20)))
    async with consuming(bus, taker):
        await until(lambda: len(seen) >= 20)
        await until_left(admin, 0)
    assert seen == numbers(*range(20))


async def test_the_consumer_is_deleted_under_way(
    nats_server: EmbeddedServer, admin: Bus, connect: Connect
) -> None:
    bus, taker = await connect(nats_server, node="n1"), Taker()
    asked = 0

    async def check_fence() -> None:
        nonlocal asked
        asked += 1

    async with consuming(bus, taker, check_fence=check_fence) as consumer:
        await send(admin, "n1", b"0")
        await until(lambda: taker.seen == [b"0"])
        await admin.js.api(f"CONSUMER.DELETE.{STREAM}.n1")
        await send(admin, "n1", b"1")
        await until(lambda: taker.seen == [b"0", b"1"])
        assert (asked, consumer.rebuilds) == (1, 2)


async def test_a_fenced_worker_does_not_take_its_consumer_back(
    nats_server: EmbeddedServer, admin: Bus, connect: Connect
) -> None:
    bus, taker = await connect(nats_server, node="n1"), Taker()

    async def check_fence() -> None:
        raise Fenced("another one")

    consumer = CommandConsumer(bus, node="n1", subjects=SUBJECTS, check_fence=check_fence)
    task = asyncio.create_task(consumer.run(taker.handle))
    await consumer.ready.wait()
    other, second = await connect(nats_server, node="n1"), Taker()
    async with consuming(other, second) as taken:
        with pytest.raises(Fenced):
            await asyncio.wait_for(task, 5)
        await send(admin, "n1", b"to the second")
        await until(lambda: second.seen == [b"to the second"])
        assert taken.rebuilds == 1


async def test_the_stream_is_deleted_and_made_again(start_server: ServerFactory, connect: Connect) -> None:
    server = await start_server()
    admin = await connect(server)
    await setup_streams(admin)
    bus, taker = await connect(server, node="n1"), Taker()
    async with consuming(bus, taker):
        await send(admin, "n1", b"0")
        await until(lambda: taker.seen == [b"0"])
        await admin.js.api(f"STREAM.DELETE.{STREAM}")
        with pytest.raises(JetStreamError):
            await admin.js.stream_info(STREAM)
        await setup_streams(admin)
        await send(admin, "n1", b"1")
        await until(lambda: taker.seen == [b"0", b"1"])


@pytest.mark.parametrize("kill", [False, True], ids=["in order", "killed"])
async def test_the_server_restarts(start_server: ServerFactory, connect: Connect, kill: bool) -> None:
    server = await start_server()
    admin = await connect(server)
    await setup_streams(admin)
    bus, taker = await connect(server, node="n1"), Taker()
    async with consuming(bus, taker):
        await send(admin, "n1", *numbers(0, 1, 2))
        await until(lambda: len(taker.seen) == 3)
        taker.hold = True
        await send(admin, "n1", *numbers(3, 4))
        await until(lambda: len(taker.held) == 2)
        await server.restart(kill=kill)
        await admin.wait_connected()
        taker.hold = False
        await send(admin, "n1", *numbers(5, 6))
        await until(lambda: len(taker.seen) >= 7)
        # Not handed out again while it is held, whatever the server thinks.
        assert taker.seen == numbers(0, 1, 2, 3, 4, 5, 6)
        for delivery in taker.held:
            await delivery.ack()
        await until_left(admin, 0)


async def test_the_server_loses_its_store(start_server: ServerFactory, connect: Connect) -> None:
    server = await start_server()
    admin = await connect(server)
    await setup_streams(admin)
    bus, taker = await connect(server, node="n1"), Taker()
    async with consuming(bus, taker):
        await send(admin, "n1", b"0")
        await until(lambda: taker.seen == [b"0"])
        await server.stop()
        shutil.rmtree(server.store_dir)
        await server.start()
        await admin.wait_connected()
        await setup_streams(admin)
        await send(admin, "n1", b"1")
        await until(lambda: taker.seen == [b"0", b"1"])


async def test_it_waits_for_a_stream_that_is_not_there_yet(
    start_server: ServerFactory, connect: Connect
) -> None:
    server = await start_server()
    admin, bus, taker = await connect(server), await connect(server, node="n1"), Taker()
    consumer = CommandConsumer(bus, node="n1", subjects=SUBJECTS, check_fence=no_fence)
    task = asyncio.create_task(consumer.run(taker.handle))
    await asyncio.sleep(0.2)
    assert not consumer.ready.is_set()
    await setup_streams(admin)
    await asyncio.wait_for(consumer.ready.wait(), 10)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("done", [True, False], ids=["done all the same", "not done"])
async def test_no_answer_to_its_creation(
    nats_server: EmbeddedServer, admin: Bus, connect: Connect, monkeypatch: pytest.MonkeyPatch, done: bool
) -> None:
    """Deleting what a slow cluster has just created would go on for ever."""
    bus, taker = await connect(nats_server, node="n1"), Taker()
    calls: list[str] = []
    api = bus.js.api

    async def impatient(call: str, request: Any = None, **options: Any) -> dict[str, Any]:
        calls.append(call.split(".")[1])
        if calls[-1] == "CREATE" and calls.count("CREATE") == 1:
            if done:
                await api(call, request, **options)
            raise NoAnswer("too late")
        return await api(call, request, **options)

    monkeypatch.setattr(bus.js, "api", impatient)
    await send(admin, "n1", *numbers(0, 1))
    async with consuming(bus, taker):
        await until(lambda: taker.seen == numbers(0, 1))
        await send(admin, "n1", *numbers(2))
        await until(lambda: taker.seen == numbers(0, 1, 2))
    again = [] if done else ["DELETE", "CREATE"]
    assert calls == ["DELETE", "CREATE", "INFO", *again]


async def test_a_handler_that_fails_ends_it(
    nats_server: EmbeddedServer, admin: Bus, connect: Connect
) -> None:
    bus = await connect(nats_server, node="n1")

    async def handle(delivery: Delivery) -> None:
        raise ZeroDivisionError

    consumer = CommandConsumer(bus, node="n1", subjects=SUBJECTS, check_fence=no_fence)
    await send(admin, "n1", b"0")
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(consumer.run(handle), 5)


async def test_latency_of_a_waiting_consumer(
    nats_server: EmbeddedServer, admin: Bus, connect: Connect
) -> None:
    """A request stands open, so a command needs no round trip to be asked for."""
    bus, taker = await connect(nats_server, node="n1"), Taker()
    loop = asyncio.get_running_loop()
    took: list[float] = []
    arrived = asyncio.Event()

    async def handle(delivery: Delivery) -> None:
        arrived.set()
        await delivery.ack()

    taker.handle = handle  # type: ignore[method-assign]
    async with consuming(bus, taker):
        for number in range(100):
            arrived.clear()
            began = loop.time()
            await admin.publish(SUBJECTS.command("n1", f"c-{number}", "start"), b"{}")
            await asyncio.wait_for(arrived.wait(), 5)
            took.append(loop.time() - began)
    assert sorted(took)[50] < 0.01
