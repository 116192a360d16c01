"""How far the log stream is behind what containers wrote, and what was lost on the way, as the shipper tells it."""

from pathlib import Path

import pytest

from tests.unit.test_logs import Node, finish, until
from worker.capture_files import captured_end
from worker.errors import Unavailable

INSTANCE = "01JD00000000000000000000A1"
OTHER = "01JD00000000000000000000A2"


@pytest.fixture
async def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


async def test_lag_is_what_is_captured_and_not_stored(node: Node) -> None:
    writer = node.writer()
    writer.write(b"x" * 1000)
    node.sink.failures = [Unavailable("no server")] * 10_000
    async with node.worker() as shipper:
        shipper.attach("web-0", INSTANCE, node.state(), 1)
        assert [tuple(one) for one in shipper.backlog()] == [("web-0", INSTANCE, 1000, 0)]
        writer.write(b"y" * 500)
        shipper.notify([("web-0", "stdout", 1500)])
        assert shipper.backlog()[0].lag == 1500
        node.sink.failures.clear()
        await until(lambda: shipper.backlog()[0].lag == 0, "all is stored")
        assert shipper.lost_bytes == 0


async def test_the_next_worker_knows_what_was_stored_before_it_looks(node: Node) -> None:
    writer = node.writer()
    writer.write(b"x" * 1000)
    async with node.worker() as shipper:
        shipper.attach("web-0", INSTANCE, node.state(), 1)
        await until(lambda: shipper.backlog()[0].lag == 0, "all is stored")
    writer.write(b"y" * 70)
    node.sink.failures = [Unavailable("no server")] * 10_000
    async with node.worker() as shipper:
        shipper.attach("web-0", INSTANCE, node.state(), 1)
        await until(lambda: shipper.backlog()[0].lag == 70, "only what is new")


async def test_bytes_that_were_not_captured_whole_are_no_lag(node: Node) -> None:
    """The machine stopped between the bytes and their mark: nothing of them is ever sent."""
    writer = node.writer()
    writer.write(b"whole")
    writer.write(b"torn", marked=False)
    async with node.worker() as shipper:
        shipper.attach("web-0", INSTANCE, node.state(), 1)
        await until(lambda: shipper.backlog()[0].lag == 0, "no lag is left")


@pytest.mark.parametrize("reason", ["rate", "disk"])
async def test_what_was_lost_is_counted_also_when_its_container_is_gone(node: Node, reason: str) -> None:
    writer = node.writer()
    writer.write(b"before")
    writer.lose(4000, reason)
    writer.rotate()
    writer.write(b"after")
    finish(node, writer)
    async with node.worker() as shipper:
        shipper.attach("web-0", INSTANCE, node.state(), 1)
        assert await shipper.drained("web-0", INSTANCE, 1, 10)
        assert [tuple(one) for one in shipper.backlog()] == [("web-0", INSTANCE, 0, 4000)]
        await shipper.spool("web-0", INSTANCE, node.state())
        await until(lambda: not shipper.backlog(), "the source is finished")
        assert shipper.lost_bytes == 4000


async def test_a_range_that_was_deleted_unsent_is_lost(node: Node) -> None:
    writer = node.writer()
    writer.write(b"x" * 300)
    writer.rotate()
    writer.write(b"y" * 50)
    writer.delete_oldest()
    async with node.worker() as shipper:
        shipper.attach("web-0", INSTANCE, node.state(), 1)
        assert shipper.backlog()[0].lag == 350
        await until(lambda: shipper.backlog()[0].lag == 0, "all is stored")
        assert shipper.backlog()[0].lost == 300


async def test_catching_up_ends_where_the_output_stood(node: Node) -> None:
    writer, other = node.writer(), node.writer("db-0")
    writer.write(b"x" * 300_000)
    async with node.worker() as shipper:
        shipper.attach("web-0", INSTANCE, node.state(), 1)
        shipper.attach("db-0", OTHER, node.state("db-0"), 1)
        await shipper.caught_up()
        assert len(
            b"".join(m.data for m in node.sink.servers["sandfleet.v1.log.n.web-0.stdout"].messages)
        ) == (300_000)
        other.write(b"late")  # nobody told of it: that is the next worker's
        await shipper.caught_up()


def test_where_the_output_ends(node: Node) -> None:
    assert captured_end(node.state(), "stdout") == 0
    writer = node.writer()
    writer.write(b"x" * 10)
    writer.rotate()
    writer.write(b"y" * 7)
    assert captured_end(node.state(), "stdout") == 17
    assert captured_end(node.state(), "stderr") == 0
    assert captured_end(node.root / "none", "stdout") == 0
