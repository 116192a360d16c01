"""Images from a registry, through a whole worker: commanded over NATS, and by the command line."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.acceptance.harness import BIN, Fleet, P, until
from tests.image_maker import layer, put_image
from tests.registry_server import Registry, running

CONFIG = """
[policy]
register_roots = ["{images}"]
read = ["{prefix}"]
images = ["localhost:*/*"]

[policy.registry_secrets]
hub = ["localhost:*"]
other = ["ghcr.io"]
"""
APP = {"hello": b"hello from a registry\n"}
SCRIPT = {"Entrypoint": ["/bin/sh", "-c"], "Cmd": ["cat hello; sleep 600"]}

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet() -> AsyncIterator[Fleet]:
    async with Fleet(CONFIG) as made:
        secrets = made.folder / "node" / "data" / "secrets"
        for name, text in (("hub", "ann:s3cret"), ("other", "x:y")):
            (secrets / name).write_text(text)
            (secrets / name).chmod(0o600)
        yield made


@pytest.fixture(scope="module")
def registry() -> Any:
    with running(auth="bearer", users={"ann": "s3cret"}, public=("open", "slow", "slower", "shared")) as made:
        yield made


def events(fleet: Fleet, kind: str, **fields: Any) -> list[dict[str, Any]]:
    return [
        event
        for event in fleet.client.events
        if event["type"] == kind and all(event[key] == value for key, value in fields.items())
    ]


async def test_a_pull_and_what_it_tells(fleet: Fleet, registry: Registry) -> None:
    made = [layer(APP), layer({"big": os.urandom(2 << 20)})]
    digest = put_image(registry, "open", made, "1", **SCRIPT)
    name = f"{registry.host}/open:1"
    told: list[dict[str, Any]] = []

    async def on_progress(message: Any) -> None:
        told.append(json.loads(message.data))

    watch = await fleet.client.nc.subscribe(f"{P}.progress.{fleet.client.node}.image", cb=on_progress)
    await fleet.client.nc.flush()
    done = await fleet.client.ok(None, "pull_image", image=name)
    assert done["result"] == {"digest": digest}
    (changed,) = events(fleet, "image_changed", image=name)
    assert (changed["action"], changed["digest"]) == ("pulled", digest)
    assert changed["bytes"] == len(APP["hello"]) + (2 << 20)
    assert changed["command_id"] == done["command_id"]
    await until(lambda: told and told[-1]["phase"] == "done")
    await watch.unsubscribe()
    last = told[-1]
    assert (last["type"], last["node"], last["image"], last["layers"]) == ("image_progress", "n1", name, 2)
    assert last["bytes_done"] == last["bytes_total"] == sum(len(one.content) for one in made)
    assert [one["digest"] for one in last["by_layer"]] == [one.digest for one in made]
    listed = (await fleet.client.query("images"))["images"]
    assert [(one["name"], one["digest"]) for one in listed if one["name"] == name] == [(name, digest)]


async def test_a_create_pulls_and_runs(fleet: Fleet, registry: Registry) -> None:
    digest = put_image(registry, "open", [layer({"hello": b"created\n"})], "2", **SCRIPT)
    name = f"{registry.host}/open:2"
    await fleet.client.ok("puller-0", "run", spec={"image": {"name": name}})
    status = await fleet.client.now("puller-0", "running")
    assert status["image_digest"] == digest
    await fleet.client.log_seen("puller-0", b"created\n")
    messages = [e["status"]["message"] for e in events(fleet, "state_changed", container="puller-0")]
    assert "pulling" in messages
    assert len(events(fleet, "image_changed", image=name)) == 1
    await fleet.client.ok("puller-0", "remove")
    # Here now: nobody is asked, and nothing is told.
    asked = len(registry.seen)
    await fleet.client.ok("puller-0", "create", spec={"image": {"name": name}})
    assert len(registry.seen) == asked
    assert len(events(fleet, "image_changed", image=name)) == 1
    always = {"image": {"name": name, "pull_policy": "always"}}
    await fleet.client.ok("puller-0", "create", spec=always, replace=True)
    assert len(registry.seen) > asked
    await fleet.client.ok("puller-0", "remove")


async def test_a_repair_uses_the_secret_that_the_image_was_had_by(fleet: Fleet, registry: Registry) -> None:
    made = layer({"hello": b"for those who may\n"})
    put_image(registry, "kept", [made], "1", **SCRIPT)
    name = f"{registry.host}/kept:1"
    refused = await fleet.client.do(None, "pull_image", image=name)
    assert refused["error"]["code"] == "pull_failed"
    await fleet.client.ok(None, "pull_image", image=name, auth="hub")
    blob = fleet.folder / "node/data/images/blobs/sha256" / made.digest.removeprefix("sha256:")
    blob.write_bytes(b"damaged")
    done = await fleet.client.ok(None, "verify_images", image=name, repair=True)
    (told,) = done["result"]["damaged"]
    assert (told["repaired"], told["error"]) == (True, None)
    assert blob.read_bytes() == made.content


@pytest.mark.parametrize("verb", ["stop", "remove"])
async def test_a_create_that_pulls_is_overtaken_at_once(fleet: Fleet, registry: Registry, verb: str) -> None:
    big = layer({"big": os.urandom(1 << 20)})
    put_image(registry, "slow", [big], "latest")
    cid = f"slow-{verb}-0"
    stall = registry.fault("stall", f"blobs/{big.digest}", at=1000, times=-1)
    create = await fleet.client.send(cid, "create", spec={"image": {"name": f"{registry.host}/slow"}})
    await fleet.client.state(cid, "pending", message="pulling")
    await until(lambda: registry.asked(f"blobs/{big.digest}"))
    await fleet.client.ok(cid, verb)
    done = await fleet.client.completion(create)
    assert done["error"]["code"] == "conflict"
    assert f"later {verb}" in done["error"]["message"]
    stall.over.set()
    part = fleet.folder / "node/data/images/ingest" / f"{big.digest.removeprefix('sha256:')}.part"
    assert part.exists()  # what came is kept for the next
    assert (await fleet.client.ok(None, "pull_image", image=f"{registry.host}/slow"))["ok"]
    await fleet.client.ok(None, "remove_image", image=f"{registry.host}/slow")


async def test_pulls_run_side_by_side_and_the_rest_in_turn(fleet: Fleet, registry: Registry) -> None:
    big = layer({"big": os.urandom(1 << 20)})
    put_image(registry, "slower", [big], "latest")
    put_image(registry, "shared", [layer({"quick": b"1"})], "latest")
    stall = registry.fault("stall", f"blobs/{big.digest}", at=1000, times=-1)
    slow = await fleet.client.send(None, "pull_image", image=f"{registry.host}/slower")
    await until(lambda: registry.asked(f"blobs/{big.digest}"))
    quick = f"{registry.host}/shared"
    await fleet.client.ok(None, "pull_image", image=quick)
    tag = await fleet.client.send(None, "tag_image", source=quick, target="mine:1")
    later = await fleet.client.send(None, "pull_image", image=quick, policy="always")
    assert not [e for e in events(fleet, "command_completed") if e["command_id"] in (slow, tag, later)]
    stall.over.set()
    for command in (slow, tag, later):
        assert (await fleet.client.completion(command))["ok"]
    order = [e["command_id"] for e in events(fleet, "command_completed")]
    assert order.index(slow) < order.index(tag) < order.index(later)


async def test_refusals(fleet: Fleet, registry: Registry) -> None:
    put_image(registry, "private", [layer(APP)], "latest")
    name = f"{registry.host}/private"
    asked = len(registry.seen)
    for fields, code, field in (
        ({"image": "ghcr.io/acme/app"}, "policy_denied", "image"),
        ({"image": name, "auth": "unknown"}, "policy_denied", "auth"),
        ({"image": name, "auth": "other"}, "policy_denied", "auth"),
        ({"image": "localhost:1/app", "policy": "never"}, "pull_failed", "image"),
        ({"image": "localhost:0/app"}, "invalid_command", "image"),
    ):
        done = await fleet.client.do(None, "pull_image", **fields)
        assert (done["error"]["code"], done["error"]["field"]) == (code, field), done["error"]
    assert len(registry.seen) == asked
    done = await fleet.client.do(None, "pull_image", image=name)
    assert done["error"]["code"] == "pull_failed"
    assert "denies access" in done["error"]["message"]
    assert (await fleet.client.do(None, "pull_image", image=name, auth="hub"))["ok"]
    assert "s3cret" not in fleet.worker.log_text()


async def test_the_command_line(fleet: Fleet, registry: Registry) -> None:
    digest = put_image(registry, "open", [layer(APP)], "cli", platform=("plan9", "mips"), **SCRIPT)
    name = f"{registry.host}/open:cli"

    async def sandfleet(*argv: str) -> tuple[int, str, str]:
        process = await asyncio.create_subprocess_exec(
            str(BIN / "sandfleet"), *argv, "--nats", fleet.server.url, "--node", fleet.client.node,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await process.communicate()
        return process.returncode or 0, out.decode(), err.decode()

    code, out, err = await sandfleet("pull", name)
    assert (code, out) == (0, f"{name}  {digest}\n")
    assert err.startswith("warning: ")
    assert "made for plan9/mips" in err
    code, out, err = await sandfleet("pull", "--json", name)
    assert json.loads(out)["result"]["digest"] == digest
    code, out, err = await sandfleet("pull", f"{registry.host}/open:missing")
    assert (code, out) == (4, "")
    assert "MANIFEST_UNKNOWN" in err
    code, out, err = await sandfleet("images", "-q")
    assert name in out.splitlines()
