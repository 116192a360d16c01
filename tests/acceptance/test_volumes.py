"""Volumes of every kind as a container sees them, and the node's verbs for those that have names."""

import json
import os
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.acceptance.harness import BIN, Fleet, new_id, shell
from worker.platform.linux.able import Able

pytestmark = pytest.mark.asyncio(loop_scope="module")

CONFIG = """
[policy]
register_roots = ["{images}"]
bind_sources = ["{images}"]
"""
FOREVER = "while :; do sleep 0.05; done"
ROOTED = pytest.param(
    "rootfs",
    marks=pytest.mark.skipif(bool(Able().reason), reason=f"no isolation rootfs here: {Able().reason}"),
)
ISOLATIONS = ["process", ROOTED]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet() -> AsyncIterator[Fleet]:
    async with Fleet(CONFIG) as made:
        await made.register("base")
        yield made


def spec(script: str, isolation: str, storage: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    sandbox = {"isolation": isolation}
    return shell(
        f"exec 2>&1; {script}", storage=storage, network={"access": "none"}, sandbox=sandbox, **fields
    )


async def printed(
    fleet: Fleet, cid: str, script: str, isolation: str, storage: list[dict[str, Any]], **fields: Any
) -> str:
    """What a script says before it ends by itself."""
    await fleet.client.ok(cid, "run", spec=spec(script, isolation, storage, **fields))
    log = await fleet.client.log(cid)
    await fleet.client.state(cid, "exited", run=1)
    return log.data.decode()


def named(name: str, target: str, **fields: Any) -> dict[str, Any]:
    return {"type": "named", "name": name, "target": target, **fields}


async def volumes(fleet: Fleet) -> dict[str, dict[str, Any]]:
    reply = await fleet.client.query("volumes")
    return {volume["name"]: volume for volume in reply["volumes"]}


def folder(fleet: Fleet) -> Path:
    return fleet.worker.data / "volumes"


# -- what the kernel holds


@pytest.mark.parametrize("isolation", ISOLATIONS)
@pytest.mark.parametrize("kind", ["bind", "named"])
async def test_read_only_is_the_kernels_word(fleet: Fleet, cid: str, isolation: str, kind: str) -> None:
    name = f"fixed-{kind}-{isolation}"
    if kind == "bind":
        source = fleet.images / name
        source.mkdir()
        volume = {"type": "bind", "source": str(source), "target": "/fixed", "readonly": True}
    else:
        source = folder(fleet) / name
        await fleet.client.ok(None, "create_volume", name=name)
        volume = named(name, "/fixed", readonly=True)
    (source / "given").write_text("given")
    said = await printed(
        fleet,
        cid,
        'cd "$SANDFLEET_VOLUME_' + ("FIXED" if kind == "bind" else name.upper().replace("-", "_")) + '"; '
        "cat given; for try in 'echo x > given' 'echo x > new' 'rm given' 'mkdir folder' 'ln -s x link' "
        "'mv given other' 'touch new' 'mkfifo fifo'; do sh -c \"$try\" && echo BROKEN; done; exit 0",
        isolation,
        [volume],
    )
    assert said.startswith("given")
    assert "BROKEN" not in said
    assert said.count("Read-only file system" if isolation == "rootfs" else "Permission denied") == 8, said
    assert os.listdir(source) == ["given"]
    assert (source / "given").read_text() == "given"


async def test_one_folder_cannot_be_both_without_mounts(fleet: Fleet, cid: str) -> None:
    storage = [named("both", "/ro", readonly=True), named("both", "/rw")]
    done = await fleet.client.do(cid, "create", spec=spec("true", "process", storage))
    assert done["error"]["code"] == "unsupported"
    assert done["error"]["field"] == "spec.storage[0].readonly"


@pytest.mark.skipif(bool(Able().reason), reason=f"no isolation rootfs here: {Able().reason}")
async def test_one_folder_is_both_with_mounts(fleet: Fleet, cid: str) -> None:
    storage = [named("both", "/ro", readonly=True), named("both", "/rw")]
    said = await printed(fleet, cid, "echo x > /rw/made; cat /ro/made; echo y > /ro/made", "rootfs", storage)
    assert said.splitlines()[0] == "x"
    assert "Read-only file system" in said


@pytest.mark.parametrize("isolation", ISOLATIONS)
async def test_where_the_volumes_are(fleet: Fleet, cid: str, isolation: str) -> None:
    storage = [
        named("my-data", "/somewhere"),
        {"type": "anonymous", "target": "/var/cache.d"},
        {"type": "tmpfs", "target": "/other/cache.d", "mode": 0o750},
    ]
    said = await printed(
        fleet,
        cid,
        "for v in MY_DATA CACHE_D CACHE_D_2; do eval d=\\$SANDFLEET_VOLUME_$v; echo x > $d/file && echo $v=$d; done",
        isolation,
        storage,
    )
    found = dict(line.split("=", 1) for line in said.splitlines())
    assert set(found) == {"MY_DATA", "CACHE_D", "CACHE_D_2"}
    container = fleet.worker.data / "containers" / cid
    if isolation == "rootfs":
        assert list(found.values()) == ["/somewhere", "/var/cache.d", "/other/cache.d"]
    else:
        assert found["MY_DATA"] == str(folder(fleet) / "my-data")
        assert os.readlink(container / "rootfs/somewhere") == found["MY_DATA"]
        assert os.readlink(container / "rootfs/var/cache.d") == found["CACHE_D"]
    assert (folder(fleet) / "my-data/file").exists()


@pytest.mark.parametrize("isolation", ISOLATIONS)
async def test_an_anonymous_one_dies_with_its_container(fleet: Fleet, cid: str, isolation: str) -> None:
    storage = [{"type": "anonymous", "target": "/own"}]
    script = "cat $SANDFLEET_VOLUME_OWN/file; echo kept > $SANDFLEET_VOLUME_OWN/file"
    await fleet.client.ok(cid, "run", spec=spec(script, isolation, storage))
    await fleet.client.state(cid, "exited", run=1)
    await fleet.client.ok(cid, "start")
    assert (await fleet.client.log(cid, run=2)).data.endswith(b"kept\n")
    own = fleet.worker.data / "containers" / cid / "volumes" / "0"
    assert (own / "file").exists()
    await fleet.client.ok(cid, "remove")
    assert not own.exists()
    assert "own" not in await volumes(fleet)


@pytest.mark.skipif(bool(Able().reason), reason=f"no isolation rootfs here: {Able().reason}")
async def test_a_tmpfs_is_one_and_has_its_size(fleet: Fleet, cid: str) -> None:
    storage = [{"type": "tmpfs", "target": "/scratch", "size": "1Mi"}]
    script = (
        "grep ' /scratch ' /proc/self/mounts; ls /scratch; "
        "dd if=/dev/zero of=/scratch/big bs=64k count=64 && echo BROKEN; wc -c < /scratch/big"
    )
    said = await printed(fleet, cid, script, "rootfs", storage, **{})
    assert "/scratch tmpfs" in said
    assert "size=1024k" in said
    assert "No space left on device" in said
    assert said.splitlines()[-1] == "1048576"
    await fleet.client.ok(cid, "start")
    again = (await fleet.client.log(cid, run=2)).data.decode()
    assert again.count("BROKEN") == 0
    assert again.splitlines().count("big") == 0


@pytest.mark.skipif(bool(Able().reason), reason=f"no isolation rootfs here: {Able().reason}")
async def test_volumes_inside_of_volumes(fleet: Fleet, cid: str) -> None:
    await fleet.client.ok(None, "create_volume", name="outer")
    storage = [
        named("inner", "/data/deep/inner"),
        named("outer", "/data", readonly=True),
        {"type": "tmpfs", "target": "/data/scratch"},
    ]
    said = await printed(
        fleet,
        cid,
        "echo x > /data/no; echo x > /data/deep/inner/yes && echo x > /data/scratch/yes && ls /data /data/deep/inner",
        "rootfs",
        storage,
    )
    assert said.count("Read-only file system") == 1
    assert (folder(fleet) / "inner/yes").exists()
    assert sorted(os.listdir(folder(fleet) / "outer")) == ["deep", "scratch"]
    done = await fleet.client.do("nested-0", "create", spec=spec("true", "process", storage))
    assert done["error"]["code"] == "unsupported"
    assert "isolation rootfs" in done["error"]["message"]


# -- named volumes, by their verbs


async def test_a_named_one_outlives_its_containers(fleet: Fleet, cid: str) -> None:
    script = 'cat "$SANDFLEET_VOLUME_LONG_LIVED/file"; echo hello > "$SANDFLEET_VOLUME_LONG_LIVED/file"'
    await printed(fleet, cid, script, "process", [named("long-lived", "/x", size="1Gi")])
    known = (await volumes(fleet))["long-lived"]
    assert known["kind"] == "named"
    assert known["containers"] == [cid]
    assert known["size_bytes"] == 1 << 30
    assert known["files"] == 1
    assert known["complete"]
    refused = await fleet.client.do(None, "remove_volume", name="long-lived")
    assert (refused["error"]["code"], refused["error"]["field"]) == ("conflict", "name")
    assert cid in refused["error"]["message"]
    await fleet.client.ok(cid, "remove")
    said = await printed(fleet, "second-0", script, "process", [named("long-lived", "/x")])
    assert said == "hello\n"
    await fleet.client.ok("second-0", "remove")
    await fleet.client.ok(None, "remove_volume", name="long-lived")
    assert "long-lived" not in await volumes(fleet)
    assert not (folder(fleet) / "long-lived").exists()
    assert not [name for name in os.listdir(folder(fleet)) if name.startswith(".gone")]


async def test_the_verbs_and_their_refusals(fleet: Fleet) -> None:
    client = fleet.client
    made = await client.ok(None, "create_volume", name="made", size="2Gi")
    assert made["result"] == {"name": "made", "created": True}
    assert (await client.ok(None, "create_volume", name="made"))["result"]["created"] is False
    other = await client.do(None, "create_volume", name="made", size="3Gi")
    assert other["error"]["code"] == "conflict"
    assert other["error"]["field"] == "size"
    found = await client.query("volumes", name="made")
    assert [v["size_bytes"] for v in found["volumes"]] == [2 << 30]
    for name in ("../up", "UP", "", ".about", "a/b"):
        bad = await client.do(None, "create_volume", name=name)
        assert (bad["type"], bad["error"]["code"]) == ("command_rejected", "invalid_command"), name
    assert (await client.do(None, "remove_volume", name="nobody"))["error"]["code"] == "not_found"
    assert (await client.query("volumes", name="nobody"))["code"] == 404


async def test_a_repeated_removal_gives_the_first_answer(fleet: Fleet) -> None:
    client = fleet.client
    await client.ok(None, "create_volume", name="twice")
    body = json.dumps({"type": "remove_volume", "id": new_id(), "name": "twice"}).encode()
    subject = f"sandfleet.v1.cmd.{client.node}._.remove_volume"
    await client.publish(subject, body)
    command_id = json.loads(body)["id"]
    assert (await client.completion(command_id))["ok"]
    await client.ok(None, "create_volume", name="twice")
    await client.publish(subject, body)
    again = await client.completion(command_id, duplicate=True)
    assert again["ok"]
    assert "twice" in await volumes(fleet)  # it executed nothing


async def test_a_container_and_a_removal_that_race(fleet: Fleet) -> None:
    """Whoever comes first: the container has its volume, or the name was free for a moment."""
    client = fleet.client
    for number in range(10):
        await client.ok(None, "create_volume", name="raced")
        cid = f"racer-{number}"
        ids = [
            await client.send(cid, "run", spec=spec(FOREVER, "process", [named("raced", "/raced")])),
            await client.send(None, "remove_volume", name="raced"),
        ]
        run, removal = [await client.completion(one) for one in ids]
        assert run["ok"], run["error"]
        assert removal["ok"] or removal["error"]["code"] == "conflict"
        assert (folder(fleet) / "raced").is_dir()
        await client.ok(cid, "remove")
        await client.do(None, "remove_volume", name="raced")


def cli(fleet: Fleet, *words: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("SANDFLEET_")}
    return subprocess.run(
        [str(BIN / "sandfleet"), *words, "--nats", fleet.server.url, "--node", "n1"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**env, "NO_COLOR": "1", "COLUMNS": "200"},
        check=False,
    )


async def test_on_the_command_line(fleet: Fleet, cid: str) -> None:
    assert cli(fleet, "volume", "create", "typed", "--size", "1Gi").stdout == "typed\n"
    assert "was there already" in cli(fleet, "volume", "create", "typed").stdout
    (folder(fleet) / "typed/file").write_bytes(bytes(100_000))
    await printed(fleet, cid, "true", "process", [named("typed", "/typed")])
    listed = cli(fleet, "volume", "ls")
    row = next(line.split() for line in listed.stdout.splitlines() if line.startswith("typed "))
    assert row[1] == "named"
    assert cid in row
    assert "typed" in cli(fleet, "volume", "ls", "-q").stdout.split()
    shown = json.loads(cli(fleet, "volume", "inspect", "typed", "--json").stdout)
    assert shown["containers"] == [cid]
    assert shown["bytes"] >= 100_000
    assert "used by" in cli(fleet, "volume", "inspect", "typed").stdout
    refused = cli(fleet, "volume", "rm", "typed")
    assert refused.returncode == 4
    assert cid in refused.stderr
    await fleet.client.ok(cid, "remove")
    assert cli(fleet, "volume", "rm", "typed").returncode == 0
    gone = cli(fleet, "volume", "rm", "typed", "typed-too")
    assert gone.returncode == 3
    assert "no volume typed-too" in gone.stderr
    assert cli(fleet, "volume", "inspect", "typed").returncode == 3


async def test_a_removal_that_a_killed_worker_had_begun(fleet: Fleet) -> None:
    await fleet.client.ok(None, "create_volume", name="half")
    fleet.worker.kill()
    # As it stands when it dies between the renaming and the deletion.
    half = folder(fleet) / "half"
    half.rename(folder(fleet) / ".gone-01J0000000000000000000000A")
    boots = len({e["boot"] for e in fleet.client.events if e["type"] == "node_changed"})
    fleet.worker.start()
    await fleet.ready(boots + 1)
    deadline = time.monotonic() + 15
    while [n for n in os.listdir(folder(fleet)) if n.startswith(".gone")]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert "half" not in await volumes(fleet)
