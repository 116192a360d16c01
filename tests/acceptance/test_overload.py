"""More than can be sent, stored or read: containers go on, memory stays bounded, what is lost is marked, the rest comes.

Sizes are small here; 1 GB and the figures: `make bench`, `overload`.
"""

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import nats
import pytest

from tests.acceptance.distance import (
    call,
    change_stream,
    chunks,
    distant_fleet,
    messages_in,
    peak_bytes,
    placed,
)
from tests.acceptance.harness import Client, Fleet, P, new_id, shell, until
from tests.acceptance.test_survival import check_sequence
from tests.integration.proxy import Proxy

MIB = 1024 * 1024
MOST_BYTES = 200_000_000


def printer(mebibytes: int, *, keep: int, then: str = "true") -> dict[str, Any]:
    """A container that prints so much, of which its files keep `keep` bytes."""
    script = f"head -c {mebibytes * MIB // 100 * 100} /dev/zero | tr '\\0' x | fold -w 99; echo; {then}"
    return shell(script, logs={"max_size_bytes": keep})


def exit_code(fleet: Fleet, cid: str) -> int | None:
    """Of an ended container, from the launcher's own record: no server is needed to see it."""
    record = fleet.worker.data / "containers" / cid / "state" / "exit.json"
    try:
        return int(json.loads(record.read_text())["exit_code"])
    except FileNotFoundError:
        return None


def assert_small(fleet: Fleet) -> None:
    """Worker and launcher never held more than the promise says."""
    process, launcher = fleet.worker.process, fleet.worker.launcher_pid()
    assert process is not None
    assert launcher is not None
    assert peak_bytes(process.pid) < MOST_BYTES
    assert peak_bytes(launcher) < MOST_BYTES


async def cut(proxy: Proxy, fleet: Fleet) -> None:
    """No way to the server any more, and the worker has noticed."""
    proxy.closed = True
    await proxy.break_all()
    await until(lambda: "broke; reconnecting" in fleet.worker.log_text(), what="the worker noticed")


async def test_output_without_a_connection() -> None:
    """Eight containers print 16 MiB each into files of 2 MiB; then a way that takes seconds for what is left."""
    async with distant_fleet() as (fleet, proxy):
        client, cids = fleet.client, [f"loud{n}-0" for n in range(8)]
        await client.ok(
            "quiet-0", "run", spec=shell("trap 'echo fresh' USR1; echo up; while :; do sleep 0.05; done")
        )
        await client.log_seen("quiet-0", b"up\n")
        spec = printer(16, keep=2 * MIB, then="echo the end")
        for cid in cids:
            await client.ok(cid, "create", spec=spec)
        for cid in cids:
            await client.ok(cid, "start")
        await cut(proxy, fleet)
        await until(lambda: all(exit_code(fleet, cid) == 0 for cid in cids), 60, "all have printed")
        assert_small(fleet)

        proxy.bytes_per_s = 6 * MIB
        proxy.closed = False
        # Fresh events and lines do not wait for the backlog.
        await client.ok("quiet-0", "kill", signal="SIGUSR1")
        await client.log_seen("quiet-0", b"fresh\n")
        fresh = (await client.js.get_last_msg("SANDFLEET_LOG", f"{P}.log.{client.node}.quiet-0.stdout")).seq
        proxy.bytes_per_s = 0

        ends = []
        for cid in cids:
            found = await chunks(client, cid)
            data, lost = placed(found)
            assert [c.offset for c in found] == sorted(c.offset for c in found), "oldest first"
            assert {c.reason for c in found if c.lost} == {"size"}
            assert lost > 0
            assert data.endswith(b"x\nthe end\n")
            assert len(data) + lost == printed_bytes(16) + len(b"the end\n")
            ends.append(found[-1].sequence)
            assert (await client.state(cid, "exited"))["exit_code"] == 0
        assert fresh < max(ends)
        assert_small(fleet)
        check_sequence(client.events)


def printed_bytes(mebibytes: int) -> int:
    """Of `printer`: `fold` ends each line but the last one, `echo` that."""
    count = mebibytes * MIB // 100 * 100
    return count + -(-count // 99)


@pytest.mark.parametrize("step_bytes", [20_000, 1 << 30])
async def test_a_full_event_stream(step_bytes: int) -> None:
    """Commands are taken and done, containers run; the events come as far as there is room, in order."""
    async with distant_fleet() as (fleet, _):
        client = fleet.client
        await client.ok("a-0", "create", spec=shell("exec sleep 600"))
        room = (await call(client, "STREAM.INFO.SANDFLEET_EVT"))["state"]["bytes"] + 40_000
        await change_stream(client, "SANDFLEET_EVT", max_bytes=room, discard="new")
        ids = [await client.send("a-0", verb) for verb in ("start", "stop") * 60]
        await drained(client, "SANDFLEET_CMD")
        assert unanswered(client, ids)
        log = fleet.worker.log_text
        await until(lambda: "maximum bytes exceeded" in log(), what="the worker says why events wait")
        async with asyncio.timeout(60):
            while unanswered(client, ids):
                # Room for some events at a time is less than a batch may have.
                if (await call(client, "STREAM.INFO.SANDFLEET_EVT"))["state"]["bytes"] > room - step_bytes:
                    room += step_bytes
                    await change_stream(client, "SANDFLEET_EVT", max_bytes=room)
                await asyncio.sleep(0.05)
        done = [await client.completion(command_id) for command_id in ids]
        assert [e["seq"] for e in done] == sorted(e["seq"] for e in done)
        check_sequence(client.events)


def unanswered(client: Client, ids: list[str]) -> set[str]:
    return set(ids) - {e["command_id"] for e in client.events if e["type"] == "command_completed"}


async def drained(client: Client, stream: str) -> None:
    async with asyncio.timeout(30):
        while await messages_in(client, stream):
            await asyncio.sleep(0.05)


async def test_a_full_log_stream() -> None:
    """The container ends in its own time; each byte is stored once, as soon as there is room."""
    async with distant_fleet() as (fleet, _):
        client = fleet.client
        await change_stream(client, "SANDFLEET_LOG", max_bytes=MIB, discard="new", compression="none")
        await client.ok("loud-0", "run", spec=printer(8, keep=64 * MIB))
        assert (await client.state("loud-0", "exited"))["exit_code"] == 0
        await until(
            lambda: "maximum bytes exceeded" in fleet.worker.log_text(), what="the worker says why logs wait"
        )
        assert await messages_in(client, "SANDFLEET_LOG") > 0
        await client.ok("other-0", "run", spec=shell("true"))  # and commands are done meanwhile
        await change_stream(client, "SANDFLEET_LOG", max_bytes=-1)
        data, lost = placed(await chunks(client, "loud-0"))
        assert lost == 0
        assert len(data) == printed_bytes(8)
        assert_small(fleet)


async def test_a_server_that_answers_after_seconds() -> None:
    """Longer than a worker waits for one at first: it must not ask for the same again and again."""
    async with distant_fleet() as (fleet, proxy):
        client = fleet.client
        await client.ok("a-0", "create", spec=shell("exec sleep 600"))
        proxy.delay_s = 1.5
        ids = [await client.send("a-0", verb) for verb in ("start", "stop") * 2]
        await client.send("loud-0", "run", spec=printer(4, keep=64 * MIB))
        for command_id in ids:
            await client.event(
                lambda e, i=command_id: e["type"] == "command_completed" and e["command_id"] == i,
                deadline_s=60,
            )
        data, lost = placed(await chunks(client, "loud-0"))
        assert (len(data), lost) == (printed_bytes(4), 0)
        proxy.delay_s = 0.0
        await client.ok("a-0", "remove")
        check_sequence(client.events)


async def test_commands_of_a_node_that_is_not_there_fill_the_stream() -> None:
    """Those of the others are done as before; a new one is refused at once, until somebody clears up."""
    async with distant_fleet() as (fleet, _):
        client = fleet.client
        await client.ok("a-0", "create", spec=shell("exec sleep 600"))
        await change_stream(client, "SANDFLEET_CMD", max_bytes=512 * 1024)
        await fill(client, "tpyo")
        waiting = await messages_in(client, "SANDFLEET_CMD")
        assert waiting > 500
        with pytest.raises(nats.js.errors.APIError, match="maximum bytes"):
            await client.js.publish(f"{P}.cmd.{client.node}.a-0.start", body("start"))
        assert (await client.query("state", container="a-0"))["state"] == "pending"
        await call(client, "STREAM.PURGE.SANDFLEET_CMD", {"filter": f"{P}.cmd.tpyo.>", "keep": waiting // 2})
        # Beside what still waits for nobody, commands are done.
        await client.ok("a-0", "start")
        await client.ok("a-0", "remove")
        assert await messages_in(client, "SANDFLEET_CMD") == waiting // 2
        check_sequence(client.events)


def body(verb: str) -> bytes:
    return json.dumps({"type": verb, "id": new_id()}).encode()


async def fill(client: Client, node: str) -> None:
    """Commands for `node` until the stream takes no more."""
    refused, inbox, left = asyncio.Event(), client.nc.new_inbox(), asyncio.Semaphore(200)

    async def on(message: Any) -> None:
        left.release()
        if b'"error"' in message.data:
            refused.set()

    acks = await client.nc.subscribe(inbox, cb=on)
    for n in range(20_000):
        await left.acquire()
        if refused.is_set():
            break
        await client.nc.publish(f"{P}.cmd.{node}.web-{n}.start", body("start"), reply=inbox)
    await acks.unsubscribe()
    assert refused.is_set()


async def test_readers_that_do_not_read() -> None:
    """Somebody subscribes to everything and never takes any of it."""
    async with distant_fleet() as (fleet, _):
        client = fleet.client
        with socket.create_connection(("127.0.0.1", fleet.server.port)) as deaf:
            deaf.sendall(b'CONNECT {"verbose":false}\r\nSUB sandfleet.v1.> 1\r\nPING\r\n')
            for n in range(3):
                await client.ok(f"loud{n}-0", "run", spec=printer(8, keep=64 * MIB))
            for n in range(3):
                assert (await client.state(f"loud{n}-0", "exited"))["exit_code"] == 0
                data, lost = placed(await chunks(client, f"loud{n}-0"))
                assert (len(data), lost) == (printed_bytes(8), 0)
        assert_small(fleet)
        check_sequence(client.events)


async def test_more_commands_than_a_busy_container_can_do() -> None:
    """They wait in the worker, up to a bound; the others do not wait, and what ends the wait is let in."""
    async with distant_fleet() as (fleet, _):
        client = fleet.client
        await client.ok("busy-0", "run", spec=shell("trap '' TERM; echo up; while :; do sleep 0.02; done"))
        await client.log_seen("busy-0", b"up\n")
        stopping = await client.send("busy-0", "stop", timeout_s=600)
        await client.state("busy-0", "stopping")
        numbers, ids = iter(range(1100)), []

        async def send() -> None:
            for _ in numbers:
                ids.append(await client.send("busy-0", "start"))

        await asyncio.gather(*(send() for _ in range(16)))
        await drained(client, "SANDFLEET_CMD")
        await client.ok("other-0", "run", spec=shell("true"))
        refused = [e for e in client.events if e["type"] == "command_completed" and e["command_id"] in ids]
        assert len(refused) == 100
        assert {e["error"]["code"] for e in refused} == {"resource_exhausted"}
        hastening = await client.send("busy-0", "stop", timeout_s=0)
        assert (await client.completion(stopping))["ok"]
        assert (await client.completion(hastening))["ok"]
        done = [await client.completion(command_id) for command_id in ids]
        assert {(e["error"] or {}).get("code") for e in done} <= {None, "conflict", "resource_exhausted"}
        assert_small(fleet)
        check_sequence(client.events)


async def test_waiting_commands_of_all_containers_are_bounded_together() -> None:
    """Large ones, none of whose containers has more than it may: refused, and so answered, before memory is gone."""
    async with distant_fleet() as (fleet, _):
        client = fleet.client
        busy = [f"busy{n}-0" for n in range(3)]
        stopping = []
        for cid in busy:
            await client.ok(cid, "run", spec=shell("trap '' TERM; echo up; while :; do sleep 0.02; done"))
            await client.log_seen(cid, b"up\n")
            stopping.append(await client.send(cid, "stop", timeout_s=600))
            await client.state(cid, "stopping")
        large = {"image": {"name": "base"}, "command": {"entrypoint": ["/bin/true", *["ab"] * 40_000]}}
        ids = [await client.send(cid, "run", spec=large, replace=True) for cid in busy for _ in range(12)]
        await drained(client, "SANDFLEET_CMD")
        await client.ok("other-0", "run", spec=shell("true"))
        refused = [e for e in client.events if e["type"] == "command_completed" and e["command_id"] in ids]
        assert 0 < len(refused) < len(ids)
        errors = {(e["error"]["code"], e["error"]["message"]) for e in refused}
        assert errors == {("resource_exhausted", "too many commands wait on this node already")}
        for cid in busy:
            await client.ok(cid, "remove")
        for command_id in stopping:
            assert (await client.completion(command_id))["ok"]
        done = [await client.completion(command_id) for command_id in ids]
        assert {e["error"]["code"] for e in done} == {"conflict", "resource_exhausted"}
        assert_small(fleet)
        check_sequence(client.events)


def test_what_the_printer_prints(tmp_path: Path) -> None:
    import subprocess

    script = printer(1, keep=MIB)["command"]["entrypoint"][-1]
    out = subprocess.run(["/bin/sh", "-c", script], capture_output=True, check=True, cwd=tmp_path).stdout
    assert len(out) == printed_bytes(1)
