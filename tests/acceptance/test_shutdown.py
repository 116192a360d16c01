"""A worker that is told to end: what is under way, what is sent, what becomes of containers, and being told twice."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from nats.js.errors import NoKeysError

from tests.acceptance.conftest import CONFIG
from tests.acceptance.harness import DEADLINE_S, Fleet, alive, shell, until

STOPS = CONFIG.replace("[node]", '[node]\non_shutdown = "stop"')
# Ends three quarters of a second after it was asked to.
SLOW = "trap 'sleep 0.75; exit 7' TERM; echo up; while :; do sleep 0.05; done"
DEAF = "trap '' TERM; echo up; while :; do sleep 0.05; done"


@asynccontextmanager
async def a_fleet(config: str = CONFIG) -> AsyncIterator[Fleet]:
    async with Fleet(config) as fleet:
        await fleet.register("base")
        yield fleet


async def ended(fleet: Fleet) -> int:
    """Wait for the process without holding up the loop; its exit code."""
    process = fleet.worker.process
    assert process is not None
    await until(lambda: process.poll() is not None, 20, "the worker's end")
    fleet.worker.process = None
    return process.returncode


def tell(fleet: Fleet, number: int = signal.SIGTERM) -> None:
    assert fleet.worker.process is not None
    fleet.worker.process.send_signal(number)


def boot_of(fleet: Fleet) -> str:
    return [e["boot"] for e in fleet.client.events if e["type"] == "node_changed"][-1]


def of_boot(fleet: Fleet, boot: str, kind: str) -> list[dict[str, Any]]:
    return [e for e in fleet.client.events if e["boot"] == boot and e["type"] == kind]


async def node_stopped(fleet: Fleet, boot: str) -> dict[str, Any]:
    return await fleet.client.event(
        lambda e: e["type"] == "node_changed" and e["state"] == "stopped" and e["boot"] == boot
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_what_is_under_way_is_finished_before_the_node_says_that_it_stopped(number: int) -> None:
    async with a_fleet() as fleet:
        client, boot = fleet.client, boot_of(fleet)
        await client.ok("slow-0", "run", spec=shell(SLOW))
        await client.ok("stays-0", "run", spec=shell("echo up; exec sleep 1000"))
        await client.log_seen("slow-0", b"up\n")
        pid = (await client.now("stays-0", "running"))["pid"]
        stop = await client.send("slow-0", "stop")
        await client.state("slow-0", "stopping")
        tell(fleet, number)
        assert await ended(fleet) == 0
        last = await node_stopped(fleet, boot)
        done = await client.completion(stop)
        assert (done["boot"], done["ok"], done["status"]["exit_code"]) == (boot, True, 7)
        assert done["seq"] < last["seq"]
        assert of_boot(fleet, boot, "node_changed")[-1]["state"] == "stopped"
        # Containers go on, and the line of the node is gone at once.
        assert alive(pid)
        bucket = await client.js.key_value("SANDFLEET_NODES")
        assert "n1" not in await keys(bucket)
        fleet.worker.start()
        await fleet.ready(boots=2)
        assert (await client.now("stays-0", "running"))["pid"] == pid


async def keys(bucket: Any) -> list[str]:
    try:
        return list(await bucket.keys())
    except NoKeysError:
        return []


async def test_a_command_that_takes_longer_is_left_to_the_next_worker() -> None:
    async with a_fleet() as fleet:
        client, boot = fleet.client, boot_of(fleet)
        await client.ok("deaf-0", "run", spec=shell(DEAF))
        await client.log_seen("deaf-0", b"up\n")
        stop = await client.send("deaf-0", "stop", timeout_s=300)
        await client.state("deaf-0", "stopping")
        tell(fleet)
        assert await ended(fleet) == 0
        await node_stopped(fleet, boot)
        assert "still under way, for the next worker to go on with: deaf-0" in fleet.worker.log_text()
        assert not [e for e in client.events if e["type"] == "command_completed" and e["command_id"] == stop]
        fleet.worker.start()
        await fleet.ready(boots=2)
        await client.ok("deaf-0", "kill")
        assert (await client.completion(stop))["ok"]


async def test_told_twice_it_ends_at_once() -> None:
    async with a_fleet() as fleet:
        client, boot = fleet.client, boot_of(fleet)
        await client.ok("deaf-0", "run", spec=shell(DEAF))
        await client.log_seen("deaf-0", b"up\n")
        pid = (await client.now("deaf-0", "running"))["pid"]
        stop = await client.send("deaf-0", "stop", timeout_s=300)
        await client.state("deaf-0", "stopping")
        tell(fleet)
        await until(lambda: "stopping; containers go on" in fleet.worker.log_text(), what="the first signal")
        tell(fleet)
        assert await ended(fleet) == 4
        assert "asked again: ending at once" in fleet.worker.log_text()
        assert alive(pid)
        fleet.worker.start()
        await fleet.ready(boots=2)
        assert not [e for e in of_boot(fleet, boot, "node_changed") if e["state"] == "stopped"]
        await client.ok("deaf-0", "kill")
        assert (await client.completion(stop))["ok"]


async def test_a_drain_that_waits_does_not_keep_the_worker() -> None:
    async with a_fleet() as fleet:
        client, boot = fleet.client, boot_of(fleet)
        await client.ok("web-0", "run", spec=shell("exec sleep 1000"))
        drain = await client.send(None, "drain")
        await client.event(lambda e: e["type"] == "node_changed" and e["state"] == "draining")
        tell(fleet)
        assert await ended(fleet) == 0
        await node_stopped(fleet, boot)
        assert "still under way" not in fleet.worker.log_text()
        fleet.worker.start()
        await until(lambda: any(e["boot"] != boot for e in client.events), what="the next worker")
        await client.ok("web-0", "kill")
        assert (await client.completion(drain))["ok"]


async def test_what_was_printed_is_in_the_stream_before_it_ends() -> None:
    async with a_fleet() as fleet:
        client, boot = fleet.client, boot_of(fleet)
        script = "head -c 8000000 /dev/zero | tr '\\0' x; echo; exec sleep 1000"
        await client.ok("loud-0", "run", spec=shell(script))
        state = fleet.worker.data / "containers/loud-0/state"
        await until(lambda: sum(f.stat().st_size for f in state.glob("stdout.*.log")) == 8_000_001)
        tell(fleet)
        assert await ended(fleet) == 0
        await node_stopped(fleet, boot)
        last = await client.js.get_last_msg("SANDFLEET_LOG", "sandfleet.v1.log.n1.loud-0.stdout")
        assert int(last.headers["Sandfleet-Offset"]) + len(last.data) == 8_000_001


async def test_containers_are_stopped_where_that_is_configured() -> None:
    async with a_fleet(STOPS) as fleet:
        client, boot = fleet.client, boot_of(fleet)
        launcher = fleet.worker.launcher_pid()
        assert launcher is not None
        await client.ok("slow-0", "run", spec=shell(SLOW + "; echo"))
        # It would have a minute by its spec; the node has not.
        await client.ok("deaf-0", "run", spec=shell(DEAF, stop_grace_period="60s"))
        await client.ok("made-0", "create", spec=shell("echo never"))
        for cid in ("slow-0", "deaf-0"):
            await client.log_seen(cid, b"up\n")
        pids = [(await client.now(cid, "running"))["pid"] for cid in ("slow-0", "deaf-0")]
        tell(fleet)
        assert await ended(fleet) == 0
        last = await node_stopped(fleet, boot)
        assert not any(alive(pid) for pid in (*pids, launcher))
        for cid, code in (("slow-0", 7), ("deaf-0", -9)):
            found = [e for e in of_boot(fleet, boot, "state_changed") if e["container"] == cid]
            status = found[-1]["status"]
            assert (status["state"], status["exit_code"], status["reason"]) == ("exited", code, "stopped")
            assert found[-1]["seq"] < last["seq"]
            assert (await client.log(cid)).data == b"up\n"
        fleet.worker.start()
        await fleet.ready(boots=2)
        assert (await client.query("state", container="made-0"))["state"] == "pending"
        assert (await client.ok("slow-0", "start"))["status"]["run"] == 2


async def test_a_start_that_is_under_way_does_not_slip_through() -> None:
    """Commands of every kind are sent until the worker is gone: at the end nothing runs."""
    async with a_fleet(STOPS) as fleet:
        client, boot = fleet.client, boot_of(fleet)
        going = True

        async def send(number: int) -> None:
            while going:
                with contextlib.suppress(Exception):
                    await client.send(f"c{number}-0", "run", spec=shell("exec sleep 1000"), replace=True)

        sending = [asyncio.create_task(send(number)) for number in range(4)]
        try:
            await client.event(
                lambda e: (
                    e["type"] == "state_changed" and e["container"] == "c3-0" and e["status"]["run"] == 1
                )
            )
            tell(fleet)
            code = await ended(fleet)
        finally:
            going = False
            await asyncio.gather(*sending)
        assert code == 0
        await node_stopped(fleet, boot)
        newest = {e["container"]: e["status"]["state"] for e in of_boot(fleet, boot, "state_changed")}
        assert set(newest.values()) <= {"exited", "removed", "pending", "failed"}, newest
        assert fleet.worker.launcher_pid() is None


@pytest.mark.parametrize("config", [CONFIG, STOPS], ids=["keep", "stop"])
async def test_without_a_server_it_ends_all_the_same(config: str) -> None:
    async with a_fleet(config) as fleet:
        client, boot = fleet.client, boot_of(fleet)
        await client.ok("web-0", "run", spec=shell("echo up; exec sleep 1000"))
        await client.log_seen("web-0", b"up\n")
        pid = (await client.now("web-0", "running"))["pid"]
        fleet.server.kill()
        await until(
            lambda: "broke; reconnecting" in fleet.worker.log_text(), what="the loss of the connection"
        )
        tell(fleet)
        assert await ended(fleet) == 0
        assert alive(pid) == (config == CONFIG)
        fleet.server.start()
        fleet.worker.start()
        await node_stopped(fleet, boot)
        await fleet.ready(boots=2)
        assert (await client.now("web-0", "running" if config == CONFIG else "exited"))["run"] == 1


async def test_a_worker_that_never_had_a_server_ends_and_stops_its_containers() -> None:
    async with a_fleet(STOPS) as fleet:
        client = fleet.client
        await client.ok("web-0", "run", spec=shell("exec sleep 1000"))
        pid = (await client.now("web-0", "running"))["pid"]
        fleet.worker.kill()
        fleet.server.stop()
        seen = fleet.worker.log_text().count("containers adopted")
        fleet.worker.start()
        await until(lambda: fleet.worker.log_text().count("containers adopted") > seen, what="the adoption")
        assert alive(pid)
        tell(fleet)
        assert await ended(fleet) == 0
        assert not alive(pid)
        fleet.server.start()
        fleet.worker.start()
        await fleet.ready(boots=2)
        await client.now("web-0", "exited")


async def test_dev_ends_in_order(tmp_path: Path) -> None:
    """The embedded worker is told by an event: it must not end the process that it lives in."""
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "NO_COLOR": "1"}
    program = Path(sys.executable).parent / "sandfleet"
    dev = subprocess.Popen(
        [str(program), "dev", "--data-dir", str(tmp_path / "dev"), "--node", "devnode"],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        assert dev.stdout is not None
        os.set_blocking(dev.stdout.fileno(), False)
        text = b""

        def ready() -> bool:
            nonlocal text
            text += dev.stdout.read() or b""  # type: ignore[union-attr]
            return b"is ready" in text

        await until(ready, DEADLINE_S, "dev")
        dev.send_signal(signal.SIGTERM)
        await until(lambda: dev.poll() is not None, 30, "the end of dev")
        text += dev.stdout.read() or b""
        assert dev.returncode == 0, text
    finally:
        if dev.poll() is None:
            dev.kill()
        dev.wait(10)
        if dev.stdout is not None:
            dev.stdout.close()


def test_the_setting_is_checked(tmp_path: Path) -> None:
    config = tmp_path / "node.toml"
    config.write_text('[node]\non_shutdown = "leave"\n')
    program = Path(sys.executable).parent / "sandfleet"
    run = subprocess.run(
        [str(program), "worker", "--config", str(config), "--data-dir", str(tmp_path / "data"), "--insecure"],
        capture_output=True,
        timeout=30,
    )
    assert run.returncode == 4
    assert b"node.on_shutdown: 'leave' is none of keep, stop" in run.stderr
