"""What an operator sees of a node whose events and logs do not arrive: in `info`, in STATS, and on the command line."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nats.errors import NoRespondersError
from nats.js.api import DiscardPolicy

from tests.acceptance.conftest import CONFIG
from tests.acceptance.harness import DEADLINE_S, Fleet, shell, until

PROGRAM = str(Path(sys.executable).parent / "sandfleet")
TALK = "i=0; while :; do i=$((i+1)); echo line $i of many; sleep 0.01; done"


async def delivery(fleet: Fleet, wanted: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
    """Ask until the answer is as wanted."""
    deadline = time.monotonic() + DEADLINE_S
    found: dict[str, Any] = {}
    while True:
        # A worker whose connection was made again subscribes a moment later.
        with contextlib.suppress(NoRespondersError):
            found = (await fleet.client.query("info"))["delivery"]
            if wanted(found):
                return found
        assert time.monotonic() < deadline, f"never {what}: {found}"
        await asyncio.sleep(0.05)


def still(found: dict[str, Any]) -> bool:
    """Nothing waits."""
    return found["outbox_events"] == 0 and found["log_lag_bytes"] == 0


async def say(fleet: Fleet, *words: str) -> tuple[int, str]:
    """The command line as an operator has it."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("SANDFLEET_")}
    run = await asyncio.to_thread(
        subprocess.run,
        [PROGRAM, *words, "--nats", fleet.server.url],
        capture_output=True,
        timeout=60,
        env={**env, "NO_COLOR": "1", "COLUMNS": "160", "XDG_RUNTIME_DIR": str(fleet.folder)},
    )
    return run.returncode, run.stdout.decode() + run.stderr.decode()


async def stats_of(fleet: Fleet) -> dict[str, Any]:
    reply = await fleet.client.nc.request("$SRV.STATS.sandfleet", b"", timeout=5)
    return {endpoint["name"]: endpoint for endpoint in json.loads(reply.data)["endpoints"]}


async def test_events_and_logs_that_do_not_arrive() -> None:
    async with Fleet(CONFIG) as fleet:
        client = fleet.client
        await fleet.register("base")
        spec = shell(TALK, logs={"max_size_bytes": 65536})
        await client.ok("web-0", "run", spec=spec)
        instance = (await client.now("web-0", "running"))["instance"]
        calm = await delivery(fleet, still, "all sent")
        assert calm == {
            "outbox_events": 0,
            "oldest_event_age_s": None,
            "log_lag_bytes": 0,
            "log_lost_bytes": 0,
            "logs": [],
            "logs_omitted": 0,
            "commands_redelivered": 0,
            "reconnects": 0,
        }
        told = [e for e in client.events if e["type"] == "node_changed"]
        assert told[-1]["info"]["delivery"] is None

        # Both streams are full: what is said and what happens waits on the node.
        await close_stream(fleet, "SANDFLEET_EVT")
        await close_stream(fleet, "SANDFLEET_LOG")
        await client.send("web-0", "restart")
        waiting = await delivery(
            fleet, lambda d: d["outbox_events"] >= 4 and d["log_lag_bytes"] > 1000, "waiting"
        )
        assert waiting["oldest_event_age_s"] > 0
        older = await delivery(
            fleet, lambda d: d["oldest_event_age_s"] > waiting["oldest_event_age_s"], "growing older"
        )
        assert older["outbox_events"] == waiting["outbox_events"]
        (log,) = waiting["logs"]
        assert (log["container"], log["instance"]) == ("web-0", instance)
        assert log["lag_bytes"] == waiting["log_lag_bytes"]

        # The micro service's STATS tell the same, where `info` is.
        endpoints = await stats_of(fleet)
        assert endpoints["info"]["data"]["outbox_events"] >= waiting["outbox_events"]
        assert endpoints["info"]["data"].keys() == waiting.keys()
        assert not any("data" in endpoint for name, endpoint in endpoints.items() if name != "info")

        # And so does the command line.
        await delivery(fleet, lambda d: d["oldest_event_age_s"] > 5, "late")
        code, text = await say(fleet, "info", "--node", "n1")
        assert code == 0, text
        assert "On its way to the streams" in text
        assert f"events      {waiting['outbox_events']} events unsent, the oldest for" in text
        assert "web-0" in text
        code, text = await say(fleet, "nodes")
        assert code == 0, text
        assert f"{waiting['outbox_events']} events, " in text

        code, text = await say(fleet, "doctor")
        assert f"n1: {waiting['outbox_events']} events unsent, the oldest for" in text, text

        await open_stream(fleet, "SANDFLEET_EVT")
        await open_stream(fleet, "SANDFLEET_LOG")
        again = await delivery(
            fleet, lambda d: d["outbox_events"] == 0 and not d["oldest_event_age_s"], "sent"
        )
        assert again["commands_redelivered"] == 0


async def test_lost_output_is_counted() -> None:
    async with Fleet(CONFIG) as fleet:
        client = fleet.client
        await fleet.register("base")
        # A loss is marked before what is captured next.
        script = "head -c 3000000 /dev/zero | tr '\\0' x; while :; do echo; sleep 0.1; done"
        spec = shell(script, logs={"max_rate": 100_000})
        await client.ok("loud-0", "run", spec=spec)
        await client.ok("quiet-0", "run", spec=shell("echo hello; exec sleep 1000"))
        lossy = await delivery(fleet, lambda d: d["log_lost_bytes"] > 0, "a loss")
        await client.ok("loud-0", "stop", timeout_s=0)
        log = await client.log("loud-0")
        settled = await delivery(fleet, still, "all sent")
        assert [one["container"] for one in settled["logs"]] == ["loud-0"]
        assert settled["logs"][0]["lost_bytes"] == settled["log_lost_bytes"] >= lossy["log_lost_bytes"]
        code, text = await say(fleet, "doctor")
        assert "of logs lost" in text, text
        assert code in (0, 4)
        # It is the markers' own sum.
        lost = settled["log_lost_bytes"]
        assert lost == log.lost
        await client.ok("loud-0", "remove")
        gone = await delivery(fleet, lambda d: not d["logs"], "the container's end")
        assert gone["log_lost_bytes"] == lost


async def test_reconnects_are_counted_and_a_new_worker_counts_anew() -> None:
    async with Fleet(CONFIG) as fleet:
        await fleet.register("base")
        fleet.server.stop()
        await until(
            lambda: "broke; reconnecting" in fleet.worker.log_text(), what="the loss of the connection"
        )
        fleet.server.start()
        await until(lambda: "connected again" in fleet.worker.log_text(), what="the connection")
        await fleet.client.back()
        await delivery(fleet, lambda d: d["reconnects"] == 1 and still(d), "one reconnect")
        fleet.worker.terminate()
        fleet.worker.start()
        await fleet.ready(boots=2)
        await delivery(fleet, lambda d: d["reconnects"] == 0, "none")


async def test_a_new_worker_sees_what_its_forerunner_left() -> None:
    """Also without a word of the launcher: the container has said all that it says."""
    async with Fleet(CONFIG) as fleet:
        client = fleet.client
        await fleet.register("base")
        script = "trap 'seq 1 1000; echo done' USR1; echo first; while :; do sleep 0.05; done"
        await client.ok("web-0", "run", spec=shell(script))
        await client.log_seen("web-0", b"first\n")
        await close_stream(fleet, "SANDFLEET_LOG")
        await client.ok("web-0", "kill", signal="SIGUSR1")
        said = sum(len(f"{n}\n") for n in range(1, 1001)) + len("done\n")
        state = fleet.worker.data / "containers/web-0/state"
        await until(
            lambda: sum(f.stat().st_size for f in state.glob("stdout.*.log")) == said + len("first\n")
        )
        await delivery(fleet, lambda d: d["log_lag_bytes"] == said, "the lag")
        fleet.worker.kill()
        fleet.worker.start()
        await fleet.ready(boots=2)
        await delivery(fleet, lambda d: d["log_lag_bytes"] == said, "the same lag")
        await open_stream(fleet, "SANDFLEET_LOG")
        await delivery(fleet, still, "all sent")
        assert (await client.log_seen("web-0", b"done\n")) is None


async def close_stream(fleet: Fleet, name: str) -> None:
    """The stream takes no further message."""
    await _limit(fleet, name, (await fleet.client.js.stream_info(name)).state.messages)


async def open_stream(fleet: Fleet, name: str) -> None:
    await _limit(fleet, name, -1)


async def _limit(fleet: Fleet, name: str, most: int) -> None:
    js = fleet.client.js
    config = (await js.stream_info(name)).config
    config.max_msgs = most
    config.discard = DiscardPolicy.NEW
    await js.update_stream(config)
