"""SIGHUP on a whole worker: a grant that the file gains or loses counts for what comes afterwards."""

import signal

from tests.acceptance.conftest import CONFIG
from tests.acceptance.harness import Fleet, shell, until


async def hang_up(fleet: Fleet, expected: str) -> str:
    """Reload; the new part of the log, once `expected` stands in it."""
    before = len(fleet.worker.log_text())
    assert fleet.worker.process is not None
    fleet.worker.process.send_signal(signal.SIGHUP)
    await until(lambda: expected in fleet.worker.log_text()[before:], what=expected)
    return fleet.worker.log_text()[before:]


def write(fleet: Fleet, text: str) -> None:
    fleet.worker.config.write_text(text.replace("{images}", str(fleet.images)))


async def test_the_policy_is_read_again() -> None:
    async with Fleet(CONFIG) as fleet:
        client = fleet.client
        await fleet.register("base")
        assert fleet.worker.process is not None
        process, boot = fleet.worker.process.pid, client.events[0]["boot"]
        text = fleet.worker.config.read_text()
        await client.ok("old-0", "run", spec=shell("exec sleep 1000"))
        spec = shell("exec sleep 1000", sandbox={"read": ["/etc/ssl"]})
        refused = await client.do("web-0", "run", spec=spec)
        assert refused["error"]["code"] == "policy_denied"

        # A further grant, and what must wait beside it.
        wider = text.replace("read = [", 'read = ["/etc/ssl", ').replace("[node]", "[node]\nslots = 77")
        write(fleet, wider)
        said = await hang_up(fleet, "waits for a restart")
        assert "changed: policy.read" in said
        assert "waits for a restart of the worker: node.slots" in said
        assert (await client.ok("web-0", "run", spec=spec))["status"]["state"] == "running"
        assert (await client.query("info"))["slots"] != 77

        # An error: one line with file and key, and the policy from before.
        write(fleet, wider.replace("[policy]", '[policy]\nnetwork = ["wifi"]'))
        said = await hang_up(fleet, "the policy stays as it was")
        line = next(line for line in said.splitlines() if "the policy stays as it was" in line)
        assert str(fleet.worker.config) in line
        assert "policy.network" in line
        await client.ok("web-1", "run", spec=spec)

        # A grant that is taken back: what runs goes on, what comes is refused. Images and registering go by it, too.
        write(fleet, text + 'images = ["other*"]\n')
        await hang_up(fleet, "changed: policy.read, policy.images")
        assert (await client.now("web-0", "running"))["run"] == 1
        again = await client.do("web-0", "restart")
        assert again["error"]["code"] == "policy_denied"
        pulled = await client.do(None, "pull_image", image="127.0.0.1:1/base:1")
        assert pulled["error"]["code"] == "policy_denied"
        assert "policy" in pulled["error"]["message"]
        assert (await client.do("new-0", "run", spec=shell("true")))["error"]["code"] == "policy_denied"
        assert (await client.now("old-0", "running"))["run"] == 1

        # It was the same worker all along.
        assert fleet.worker.process.pid == process
        assert {event["boot"] for event in client.events} == {boot}


async def test_the_shutdown_goes_by_what_was_read_last() -> None:
    async with Fleet(CONFIG) as fleet:
        client = fleet.client
        await fleet.register("base")
        await client.ok("web-0", "run", spec=shell("exec sleep 1000"))
        write(fleet, fleet.worker.config.read_text().replace("[node]", '[node]\non_shutdown = "stop"'))
        await hang_up(fleet, "changed: node.on_shutdown")
        assert fleet.worker.terminate() == 0
        await client.state("web-0", "exited", reason="stopped")


async def test_a_reload_without_a_connection() -> None:
    async with Fleet(CONFIG) as fleet:
        fleet.server.kill()
        await until(
            lambda: "broke; reconnecting" in fleet.worker.log_text(), what="the loss of the connection"
        )
        write(fleet, fleet.worker.config.read_text() + "max_containers = 0\n")
        await hang_up(fleet, "changed: policy.max_containers")
        fleet.server.start()
        await until(lambda: "connected again" in fleet.worker.log_text(), what="the connection")
        await fleet.client.back()
        folder = fleet.image("base", {"etc/motd": "hello\n"})
        await fleet.client.ok(None, "register_image", image="base", source_dir=folder)
        done = await fleet.client.do("web-0", "run", spec=shell("true"))
        assert done["error"]["code"] == "resource_exhausted"
