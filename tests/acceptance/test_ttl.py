"""Finished containers go after their `ttl_after_finished_s`, whoever looks after them then."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.acceptance.conftest import CONFIG
from tests.acceptance.harness import Fleet, shell

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet() -> AsyncIterator[Fleet]:
    async with Fleet(CONFIG) as made:
        await made.register("base")
        yield made


async def test_it_goes_by_itself_and_that_is_told(fleet: Fleet, cid: str) -> None:
    await fleet.client.ok(cid, "run", spec=shell("echo done", ttl_after_finished_s=0.2))
    exited = await fleet.client.state(cid, "exited")
    removed = await fleet.client.state(cid, "removed")
    assert removed["instance"] == exited["instance"]
    assert removed["exit_code"] == 0
    assert not (fleet.folder / "node/data/containers" / cid).exists()
    assert (await fleet.client.query("state", container=cid))["code"] == 404
    # Its output was kept until it was sent.
    assert (await fleet.client.log(cid)).data == b"done\n"


async def test_one_that_cannot_start_goes_too(fleet: Fleet, cid: str) -> None:
    spec = {"image": {"name": "base"}, "command": {"entrypoint": ["/no/such"]}, "ttl_after_finished_s": 0.1}
    assert not (await fleet.client.do(cid, "run", spec=spec))["ok"]
    await fleet.client.state(cid, "failed")
    await fleet.client.state(cid, "removed")


async def test_a_started_one_is_spared(fleet: Fleet, cid: str) -> None:
    script = "test -f again || { touch again; exit 0; }; sleep 600"
    await fleet.client.ok(cid, "run", spec=shell(script, ttl_after_finished_s=3))
    await fleet.client.state(cid, "exited", run=1)
    await fleet.client.ok(cid, "start")
    other = f"other-{cid}"
    await fleet.client.ok(other, "run", spec=shell("true", ttl_after_finished_s=3))
    # The other one finished later and is gone: the time of this one is over.
    await fleet.client.state(other, "removed")
    status = await fleet.client.query("state", container=cid)
    assert (status["state"], status["run"]) == ("running", 2)
    await fleet.client.ok(cid, "stop", timeout_s=0)
    await fleet.client.state(cid, "removed")


async def test_it_goes_when_the_worker_was_away(fleet: Fleet, cid: str) -> None:
    boots = len({event["boot"] for event in fleet.client.events})
    long, short = f"long-{cid}", f"short-{cid}"
    await fleet.client.ok(long, "run", spec=shell("true", ttl_after_finished_s=3600))
    await fleet.client.ok(short, "run", spec=shell("sleep 0.3", ttl_after_finished_s=1))
    await fleet.client.state(long, "exited")
    fleet.worker.kill()
    fleet.worker.start()
    await fleet.ready(boots + 1)
    await fleet.client.state(short, "removed")
    assert (await fleet.client.query("state", container=long))["state"] == "exited"
    await fleet.client.ok(long, "remove")
