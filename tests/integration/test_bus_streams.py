"""Creating, judging and awaiting the contract's streams."""

import asyncio

import pytest

from schemas.subjects import Subjects
from tests.integration.conftest import Connect, ServerFactory
from worker.bus.connection import Bus
from worker.bus.failures import JetStreamError, NoAnswer
from worker.bus.streams import check_streams, setup_streams, wait_for_streams, wanted
from worker.errors import Configuration

NANOS = 1_000_000_000
DAY = 86400 * NANOS


async def config_of(bus: Bus, name: str) -> dict[str, object]:
    return (await bus.js.stream_info(name)).config


async def test_setup_makes_what_the_contract_says(start_server: ServerFactory, connect: Connect) -> None:
    bus = await connect(await start_server())
    made = await setup_streams(bus, pools=["build", "gpu"])
    names = ["CMD", "JOB", "EVT", "LOG", "STAT"]
    assert list(made.made) == [
        *(f"SANDFLEET_{name}" for name in names),
        "KV_SANDFLEET_NODES",
        "SANDFLEET_JOB/build",
        "SANDFLEET_JOB/gpu",
    ]
    assert made.kept == ()
    again = await setup_streams(bus, pools=["build", "gpu"])
    assert (again.made, again.kept) == ((), made.made)
    assert await check_streams(bus) == []

    cmd = await config_of(bus, "SANDFLEET_CMD")
    assert (cmd["retention"], cmd["discard"], cmd["max_age"]) == ("workqueue", "new", 7 * DAY)
    assert (cmd["max_bytes"], cmd["max_msgs_per_subject"]) == (2 << 30, 64)
    assert (cmd["discard_new_per_subject"], cmd["max_consumers"]) == (True, 100_000)
    assert cmd["allow_msg_ttl"]
    job = await config_of(bus, "SANDFLEET_JOB")
    assert (job["max_msgs_per_subject"], job["discard_new_per_subject"]) == (1, True)
    evt = await config_of(bus, "SANDFLEET_EVT")
    assert evt["deny_delete"]
    assert evt["allow_direct"]
    assert evt["allow_atomic"]
    assert (evt["max_age"], evt["max_bytes"], evt["max_consumers"]) == (30 * DAY, 8 << 30, 10_000)
    log = await config_of(bus, "SANDFLEET_LOG")
    assert (log["compression"], log["duplicate_window"]) == ("s2", 120 * NANOS)
    stat = await config_of(bus, "SANDFLEET_STAT")
    assert (stat["max_age"], stat["max_msgs_per_subject"]) == (3600 * NANOS, 360)
    nodes = await config_of(bus, "KV_SANDFLEET_NODES")
    assert (nodes["max_age"], nodes["subject_delete_marker_ttl"]) == (15 * NANOS, 60 * NANOS)

    pool = (await bus.js.api("CONSUMER.INFO.SANDFLEET_JOB.build"))["config"]
    assert (pool["ack_wait"], pool["filter_subject"]) == (60 * NANOS, Subjects().jobs_of("build"))
    # A second job queued under the same id is refused.
    await bus.js.publish(Subjects().job("build", "j1"), b"{}")
    with pytest.raises(JetStreamError):
        await bus.js.publish(Subjects().job("build", "j1"), b"{}")


async def test_what_exists_keeps_its_settings(start_server: ServerFactory, connect: Connect) -> None:
    bus = await connect(await start_server())
    own = {
        "name": "SANDFLEET_EVT",
        "subjects": ["sandfleet.v1.evt.>"],
        "storage": "memory",
        "allow_direct": True,
    }
    await bus.js.api("STREAM.CREATE.SANDFLEET_EVT", own)
    made = await setup_streams(bus)
    assert made.kept == ("SANDFLEET_EVT",)
    assert (await config_of(bus, "SANDFLEET_EVT"))["storage"] == "memory"
    problems = {finding.problem for finding in await check_streams(bus)}
    assert problems == {"has no allow_atomic", "has no deny_delete", "is in memory"}


async def test_what_is_missing(start_server: ServerFactory, connect: Connect) -> None:
    bus = await connect(await start_server())
    findings = await check_streams(bus)
    assert len(findings) == 6
    assert all(finding.fatal and finding.problem == "is missing" for finding in findings)


async def test_another_stream_has_our_subjects(start_server: ServerFactory, connect: Connect) -> None:
    bus = await connect(await start_server())
    await bus.js.api("STREAM.CREATE.ALL", {"name": "ALL", "subjects": ["sandfleet.>"]})
    with pytest.raises(Configuration, match="another stream"):
        await setup_streams(bus)


async def test_replicas_without_a_cluster(start_server: ServerFactory, connect: Connect) -> None:
    bus = await connect(await start_server(), replicas=3)
    with pytest.raises(JetStreamError, match="replicas"):
        await setup_streams(bus)


async def test_jetstream_is_off(start_server: ServerFactory, connect: Connect) -> None:
    bus = await connect(await start_server(jetstream=False), node="n1")
    with pytest.raises(Configuration, match="JetStream is off"):
        await setup_streams(bus)
    findings = await check_streams(bus)
    assert [finding.stream for finding in findings] == ["JetStream"]


async def test_own_names_and_a_domain(start_server: ServerFactory, connect: Connect) -> None:
    server = await start_server(domain="site")
    bus = await connect(server, stream_prefix="ACME", domain="site")
    subjects = Subjects("acme.fleet")
    made = await setup_streams(bus, subjects=subjects)
    assert "ACME_CMD" in made.made
    assert "KV_ACME_NODES" in made.made
    assert wanted(bus)[0]["name"] == "ACME_CMD"
    assert await check_streams(bus, subjects=subjects) == []
    assert (await config_of(bus, "ACME_CMD"))["subjects"] == ["acme.fleet.cmd.>"]
    elsewhere = await connect(server, domain="elsewhere")
    with pytest.raises((NoAnswer, Configuration)):
        await setup_streams(elsewhere)


async def test_a_worker_waits_for_the_streams(start_server: ServerFactory, connect: Connect) -> None:
    server = await start_server()
    admin, bus = await connect(server), await connect(server, node="n1")
    waiting = asyncio.create_task(wait_for_streams(bus))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    await setup_streams(admin)
    await asyncio.wait_for(waiting, 5)
