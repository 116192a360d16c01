"""The schedule is a function of the seed, and the way to the server is as bad as it is told to be."""

import asyncio
import socket
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest

from .faults import ALONE, FAULTS, LEADER_FAULTS, LEADER_GAP_S, STREAMS
from .injector import Injector
from .link import Link
from .plan import plan
from .run import COMMAND_KINDS
from .scheduler import KINDS


def test_a_seed_gives_the_same_schedule_again() -> None:
    assert plan(7, 30) == plan(7, 30)
    assert plan(7, 30) != plan(8, 30)
    times = [action.at_s for action in plan(7, 30)]
    assert times == sorted(times)


def test_commands_do_not_depend_on_the_faults() -> None:
    def commands(faults: list[str] | None) -> list[str]:
        return [str(action) for action in plan(7, 30, faults) if action.kind in COMMAND_KINDS]

    assert commands(None) == commands(["purge"]) == commands([])


def test_every_kind_of_command_and_fault_comes_up() -> None:
    seen = Counter(
        action.args["verb"] if action.kind == "send" else action.kind
        for seed in range(30)
        for action in plan(seed, 30)
    )
    missing = {*FAULTS, *KINDS} - {"node"} - seen.keys()
    assert not missing
    assert seen["tag_image"]


def test_in_a_cluster_a_leader_goes_every_few_seconds() -> None:
    actions = plan(7, 90, cluster=True)
    leaders = [action for action in actions if action.kind in LEADER_FAULTS]
    assert {action.kind for action in leaders} == set(LEADER_FAULTS)
    assert {action.args["stream"] for action in leaders} == set(STREAMS)
    assert max(later.at_s - at.at_s for at, later in pairwise(leaders)) <= LEADER_GAP_S[1]
    assert not ALONE & {action.kind for action in actions}
    assert set(LEADER_FAULTS).isdisjoint(action.kind for action in plan(7, 90))


@pytest.mark.parametrize("fault", sorted({*FAULTS, *LEADER_FAULTS, "copy"}))
def test_every_fault_can_be_done(fault: str) -> None:
    assert callable(getattr(Injector, f"do_{fault}"))


# -- the link


@asynccontextmanager
async def echo() -> AsyncIterator[int]:
    """A server that says everything again; gives its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@asynccontextmanager
async def linked() -> AsyncIterator[tuple[Link, asyncio.StreamReader, asyncio.StreamWriter]]:
    async with echo() as port, Link(port) as link:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(link.url.rsplit(":", 1)[1]))
        try:
            yield link, reader, writer
        finally:
            writer.close()


async def comes(reader: asyncio.StreamReader, count: int, within_s: float = 5.0) -> bytes:
    async with asyncio.timeout(within_s):
        return await reader.readexactly(count)


async def test_a_link_passes_everything_on() -> None:
    async with linked() as (_, reader, writer):
        data = bytes(range(256)) * 2000
        writer.write(data)
        assert await comes(reader, len(data)) == data


@pytest.mark.parametrize("way", ["up", "down"])
async def test_a_held_way_is_silent_until_it_is_healed(way: str) -> None:
    async with linked() as (link, reader, writer):
        link.hold(way)
        writer.write(b"held")
        with pytest.raises(TimeoutError):
            await comes(reader, 4, within_s=0.1)
        link.heal()
        assert await comes(reader, 4) == b"held"


async def test_a_delay_holds_for_each_way() -> None:
    async with linked() as (link, reader, writer):
        link.delay_s = 0.05
        loop = asyncio.get_running_loop()
        began = loop.time()
        writer.write(b"late")
        assert await comes(reader, 4) == b"late"
        assert loop.time() - began >= 0.1


async def test_a_cut_ends_what_is_open_and_takes_new_connections() -> None:
    async with linked() as (link, reader, writer):
        writer.write(b"one")
        assert await comes(reader, 3) == b"one"
        await link.cut()
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await comes(reader, 1)
        again, other = await asyncio.open_connection("127.0.0.1", int(link.url.rsplit(":", 1)[1]))
        other.write(b"two")
        assert await comes(again, 3) == b"two"
        other.close()


async def test_a_throttle_lets_little_through() -> None:
    async with linked() as (link, reader, writer):
        link.bytes_per_s = 10_000
        loop = asyncio.get_running_loop()
        began = loop.time()
        writer.write(bytes(2_000))
        await comes(reader, 2_000)
        assert loop.time() - began >= 0.2


async def test_a_link_whose_server_is_gone_closes() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        async with Link(unused.getsockname()[1]) as link:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(link.url.rsplit(":", 1)[1]))
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await comes(reader, 1)
            writer.close()
