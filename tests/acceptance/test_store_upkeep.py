"""Pruning, the limit, verifying and repairing, and what takes room: over NATS and by the command line."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.acceptance.harness import BIN, Fleet, shell
from tests.image_maker import Layer, layer, put_image
from tests.registry_server import Registry, running

CONFIG = """
[policy]
register_roots = ["{images}"]
images = ["*", "localhost:*/*"]
"""
LIMITED = CONFIG + "[images]\nmax_bytes = '1Mi'\n"

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet() -> AsyncIterator[Fleet]:
    async with Fleet(CONFIG) as made:
        await made.register("base")
        yield made


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with running() as made:
        yield made


async def sandfleet(fleet: Fleet, *argv: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        str(BIN / "sandfleet"), *argv, "--nats", fleet.server.url, "--node", fleet.client.node,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


async def listed(fleet: Fleet) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in (await fleet.client.query("images"))["images"]}


def blob(fleet: Fleet, digest: str) -> Path:
    return fleet.folder / "node/data/images/blobs/sha256" / digest.removeprefix("sha256:")


def unused_for(fleet: Fleet, digest: str, seconds: float) -> None:
    at = blob(fleet, digest).stat().st_mtime - seconds
    os.utime(blob(fleet, digest), (at, at))


def damage(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


async def test_prune_by_age_and_size_spares_what_is_used(fleet: Fleet) -> None:
    digests = {name: await fleet.register(name, {"f": name * 100_000}) for name in ("old", "used", "new")}
    await fleet.client.ok("user-0", "create", spec={"image": {"name": "used"}})
    for name in ("old", "used"):
        unused_for(fleet, digests[name], 7200)
    assert (await listed(fleet))["used"]["containers"] == 1
    done = await fleet.client.ok(None, "prune_images", older_than_s=3600)
    assert done["result"]["removed"] == 1
    assert done["result"]["bytes"] >= 300_000
    gone = await fleet.client.event(lambda e: e["type"] == "image_changed" and e["action"] == "pruned")
    assert (gone["image"], gone["digest"], gone["bytes"]) == ("old", digests["old"], 300_000)
    assert {"used", "new", "base"} <= (await listed(fleet)).keys()
    code, out, err = await sandfleet(fleet, "images", "prune", "--keep", "1Ki", "--json")
    assert code == 0, err
    assert json.loads(out)["result"]["removed"] >= 2
    assert list(await listed(fleet)) == ["used"]
    done = await fleet.client.do(None, "remove_image", image="used")
    assert done["error"]["code"] == "conflict"
    await fleet.client.ok("user-0", "remove")
    await fleet.client.ok(None, "remove_image", image="used")
    await fleet.register("base")


async def test_a_prune_that_makes_no_sense(fleet: Fleet) -> None:
    for fields, field in (({"older_than_s": -1}, "older_than_s"), ({"keep_bytes": -1}, "keep_bytes")):
        done = await fleet.client.do(None, "prune_images", **fields)
        assert done["type"] == "command_rejected"
        assert done["error"]["field"] == field
    assert (await sandfleet(fleet, "prune", "--keep", "some"))[0] == 2


async def test_the_limit(registry: Registry) -> None:
    async with Fleet(LIMITED) as fleet:
        digests = []
        for number in range(3):
            digests.append(
                put_image(registry, f"limit-{number}", [layer({"f": os.urandom(250_000)})], "latest")
            )
        names = [f"{registry.host}/limit-{number}" for number in range(3)]
        await fleet.client.ok("limit-0", "create", spec={"image": {"name": names[0]}})
        await fleet.client.ok(None, "pull_image", image=names[1])
        for age_s, digest in ((2000, digests[0]), (1000, digests[1])):
            unused_for(fleet, digest, age_s)
        await fleet.client.ok("limit-1", "create", spec={"image": {"name": names[2]}})
        gone = await fleet.client.event(lambda e: e["type"] == "image_changed" and e["action"] == "pruned")
        assert gone["image"] == names[1]
        assert list(await listed(fleet)) == [names[0], names[2]]
        # One that went is pulled again when it is needed, and the used ones stay.
        await fleet.client.ok("limit-2", "run", spec={**shell("cat f | wc -c"), "image": {"name": names[1]}})
        assert list(await listed(fleet)) == names


async def test_damage_is_found_and_repaired(fleet: Fleet, registry: Registry) -> None:
    made = layer({"bin/run": b"#!/bin/sh\n", "data": os.urandom(1000)})
    digest = put_image(registry, "repair", [made], "latest")
    name = f"{registry.host}/repair"
    await fleet.client.ok(None, "pull_image", image=name)
    code, out, err = await sandfleet(fleet, "images", "verify")
    assert (code, err) == (0, "")
    assert out == "2 images read, all sound\n"
    await recorded(fleet)
    damage(blob(fleet, made.digest))
    (tree,) = (fleet.folder / "node/data/images/rootfs").glob("*/bin/run")
    damage(tree)
    code, out, err = await sandfleet(fleet, "verify", name)
    assert code == 4
    assert f"blob {made.digest}" in out
    assert "tree bin/run" in out
    # A create fetches what is missing, and gets good files.
    await fleet.client.ok("repaired-0", "run", spec={**shell("cat bin/run"), "image": {"name": name}})
    assert (await fleet.client.log("repaired-0")).data == b"#!/bin/sh\n"
    assert (await fleet.client.ok(None, "verify_images"))["result"]["damaged"] == []
    await fleet.client.ok("repaired-0", "remove")
    await the_next_pull_fetches_a_missing_layer(fleet, name, digest, made)
    await repaired_at_once(fleet, name, made)


async def the_next_pull_fetches_a_missing_layer(fleet: Fleet, name: str, digest: str, made: Layer) -> None:
    damage(blob(fleet, made.digest))
    done = await fleet.client.ok(None, "verify_images", image=name)
    (told,) = done["result"]["damaged"]
    assert (told["image"], told["digest"], told["repaired"], told["error"]) == (name, digest, False, None)
    await fleet.client.ok(None, "pull_image", image=name, policy="always")
    assert (await fleet.client.ok(None, "verify_images"))["result"]["damaged"] == []


async def repaired_at_once(fleet: Fleet, name: str, made: Layer) -> None:
    damage(blob(fleet, made.digest))
    own = await fleet.register("own", {"f": "text"})
    (tree,) = (fleet.folder / "node/data/images/rootfs").glob("*/f")
    damage(tree)
    code, out, _ = await sandfleet(fleet, "verify", "--repair", "--json")
    assert code == 4
    told = {one["image"]: one for one in json.loads(out)["result"]["damaged"]}
    assert (told[name]["repaired"], told[name]["error"]) == (True, None)
    assert (told["own"]["repaired"], told["own"]["digest"]) == (False, own)
    assert "register it again" in told["own"]["error"]
    await fleet.client.ok(None, "remove_image", image="own")
    await fleet.client.ok(None, "prune_images")
    assert (await sandfleet(fleet, "verify"))[0] == 0


async def recorded(fleet: Fleet) -> None:
    """What the trees hold is written down a moment after a pull."""
    rootfs = fleet.folder / "node/data/images/rootfs"
    async with asyncio.timeout(15):
        while not list(rootfs.glob("*.list")):
            await asyncio.sleep(0.02)


async def test_a_container_writes_to_its_own_files_only(fleet: Fleet) -> None:
    files = {"shared": "as it was\n", "folder/inner": "inner\n"}
    await fleet.register("shared", files)
    write = "echo changed > shared; rm -r folder; mkdir new; ln shared again; chmod 600 shared; cat shared"
    await fleet.client.ok("writes-0", "run", spec={**shell(write), "image": {"name": "shared"}})
    await fleet.client.state("writes-0", "exited", exit_code=0)
    await fleet.client.ok(
        "writes-1", "run", spec={**shell("cat shared folder/inner; ls"), "image": {"name": "shared"}}
    )
    assert (await fleet.client.log("writes-1")).data == b"as it was\ninner\nfolder\nshared\n"
    assert (await fleet.client.ok(None, "verify_images", image="shared"))["result"]["damaged"] == []
    for number in (0, 1):
        await fleet.client.ok(f"writes-{number}", "remove")


async def test_df(fleet: Fleet) -> None:
    before = await fleet.client.query("df", refresh=True)
    spec = {
        **shell(
            "head -c 3000000 /dev/zero > big; ln -s /usr link; ln big same; head -c 100000 /dev/zero; sleep 600"
        ),
        "storage": [{"type": "named", "name": "df-volume", "target": "/v"}],
    }
    await fleet.client.ok("df-0", "run", spec=spec)
    await fleet.client.log_seen("df-0", b"\0" * 1000)
    after = await fleet.client.query("df", refresh=True)
    grown = after["containers"]["bytes"] - before["containers"]["bytes"]
    # Neither the file's second name nor what a link leads to counts.
    assert 3_000_000 <= grown < 3_500_000
    assert after["containers"]["count"] == before["containers"]["count"] + 1
    assert after["volumes"]["count"] == before["volumes"]["count"] + 1
    assert 100_000 <= after["logs"]["bytes"] - before["logs"]["bytes"] < 500_000
    assert 0 < after["free"] < after["total"]
    assert after["images"]["count"] == len(await listed(fleet))
    # Kept for a while, and counted anew when asked for.
    again = await fleet.client.query("df")
    assert again["measured_at"] == after["measured_at"]
    assert (await fleet.client.query("df", refresh=True))["measured_at"] > after["measured_at"]
    code, out, err = await sandfleet(fleet, "df")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["images", "containers", "volumes", "logs"]
    assert "cloned by" in lines[-1]
    await fleet.client.ok("df-0", "remove")


async def test_images_shows_use_and_inspect_shows_all(fleet: Fleet) -> None:
    code, out, err = await sandfleet(fleet, "images")
    assert (code, err) == (0, "")
    assert "LAST USED" in out.splitlines()[0]
    code, out, err = await sandfleet(fleet, "images", "inspect", "base")
    assert (code, err) == (0, "")
    shown = json.loads(out)
    assert (shown["name"], shown["registered"], shown["containers"]) == ("base", True, [])
    code, _, err = await sandfleet(fleet, "images", "inspect", "missing")
    assert code == 3
    assert "no image missing" in err


async def test_the_way_of_cloning_is_measured_once(fleet: Fleet) -> None:
    kept = fleet.folder / "node/data/images/clone.json"
    first = kept.read_bytes()
    assert json.loads(first)["choice"]["method"] in ("reflink", "copy")
    boots = len({event["boot"] for event in fleet.client.events})
    fleet.worker.kill()
    fleet.worker.start()
    await fleet.ready(boots + 1)
    await fleet.client.ok("measured-0", "create", spec={"image": {"name": "base"}})
    assert kept.read_bytes() == first
    assert (await fleet.client.query("df"))["clone"] != "not measured yet"
    await fleet.client.ok("measured-0", "remove")
