"""A node far from its server: order and completeness, whatever the distance. How fast it is: `make bench`, `far`."""

import asyncio
from collections import defaultdict
from typing import Any

import pytest

from tests.acceptance.distance import distant_fleet
from tests.acceptance.harness import Client, shell
from tests.acceptance.test_survival import check_sequence

CONTAINERS, ROUNDS = 6, 4
LINES = 60_000
PRINTER = f"seq 1 {LINES}"
PRINTED = b"".join(b"%d\n" % n for n in range(1, LINES + 1))


async def created(client: Client, script: str) -> None:
    """All at once; a `stop` would overtake a `create` that is still working."""
    for number in range(CONTAINERS):
        await client.send(f"c{number}-0", "create", spec=shell(script))
    for number in range(CONTAINERS):
        await client.state(f"c{number}-0", "pending", message="ready")


async def commanded(client: Client, verbs: tuple[str, ...]) -> dict[str, list[str]]:
    """Send commands that overtake nothing to all containers by turns, without waiting; gives the ids in the order of
    each container.
    """
    sent: dict[str, list[str]] = defaultdict(list)
    for n in range(ROUNDS):
        for number in range(CONTAINERS):
            cid = f"c{number}-0"
            sent[cid].append(await client.send(cid, verbs[n % len(verbs)]))
    return sent


async def completed(client: Client, sent: dict[str, list[str]]) -> dict[str, list[dict[str, Any]]]:
    """The completions of the commands in the order of the stream, by container."""
    for ids in sent.values():
        await client.completion(ids[-1])
        for command_id in ids:
            await client.completion(command_id)
    wanted = {command_id for ids in sent.values() for command_id in ids}
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in client.events:
        if event["type"] == "command_completed" and event["command_id"] in wanted and not event["duplicate"]:
            found[event["container"]].append(event)
    return found


@pytest.mark.parametrize("round_trip_ms", [20, 100, 300])
async def test_all_in_order_and_complete_though_the_way_breaks_and_the_worker_is_killed(
    round_trip_ms: int,
) -> None:
    """Each while commands, events and output are under way."""
    async with distant_fleet(delay_s=round_trip_ms / 2000) as (fleet, proxy):
        client, worker = fleet.client, fleet.worker
        await created(client, "exec sleep 600")
        await client.send("talk-0", "run", spec=shell(f"{PRINTER}; sleep 0.5; {PRINTER}"))
        sent = await commanded(client, ("start", "restart"))
        await client.completion(sent["c0-0"][0])
        await proxy.break_all()
        more = await commanded(client, ("start", "restart"))
        await client.completion(sent["c0-0"][-1])
        worker.kill()
        worker.start()
        await fleet.ready(boots=2)
        for cid, ids in more.items():
            sent[cid] += ids
        for cid, events in (await completed(client, sent)).items():
            assert [event["command_id"] for event in events] == sent[cid]
            assert {(event["error"] or {}).get("code") for event in events} <= {None, "interrupted"}
            assert (await client.now(cid, "running"))["run"] <= 1 + ROUNDS
        log = await client.log("talk-0")
        assert bytes(log.data) == PRINTED * 2
        assert log.lost == 0
        check_sequence(client.events)


async def test_containers_far_away_are_asked_and_followed() -> None:
    """Queries and a live line, with a third of a second between question and answer."""
    async with distant_fleet(delay_s=0.15) as (fleet, _):
        client = fleet.client
        lines: asyncio.Queue[bytes] = asyncio.Queue()

        async def on(message: Any) -> None:
            lines.put_nowait(message.data)

        await client.nc.subscribe(f"sandfleet.v1.log.{client.node}.talk-0.stdout", cb=on)
        await client.ok("talk-0", "run", spec=shell("echo here; exec sleep 600"))
        assert await asyncio.wait_for(lines.get(), 15) == b"here\n"
        assert (await client.query("state", container="talk-0"))["state"] == "running"
        ran = await client.query("exec", container="talk-0", argv=["/bin/echo", "there"])
        assert ran["stdout"] == "there\n"
        await client.ok("talk-0", "remove")
