"""Pulling whole images from a registry process of our own into a real store."""

import asyncio
import json
import os
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest

from schemas.events import ImagePhase
from schemas.spec import PullPolicy
from tests.image_maker import DOCKER_LAYER, DOCKER_MANIFEST, Layer, here, layer, put_image, put_index
from tests.integration.pull_help import (
    APP,
    NOW,
    QUICK,
    Make,
    part_of,
    pullers,
    registry,
    store,
    tree_files,
    until,
    verified,
)
from tests.registry_server import Registry, running
from worker.errors import PolicyDenied, PullFailed, ResourceExhausted
from worker.images.flight import PullProgress
from worker.images.store import ImageStore

__all__ = ["pullers", "registry", "store"]  # fixtures

# Of random bytes, so that its blob is as large.
BIG = layer({"big": os.urandom(3 << 20)})


# -- what is pulled


@pytest.mark.parametrize(
    ("made", "media_type"),
    [
        ([layer(APP)], "application/vnd.oci.image.manifest.v1+json"),
        ([layer(APP, compress=False)], "application/vnd.oci.image.manifest.v1+json"),
        ([layer(APP, media_type=DOCKER_LAYER)], DOCKER_MANIFEST),
        ([layer({"app/run": b"old"}), layer(APP)], "application/vnd.oci.image.manifest.v1+json"),
    ],
    ids=["gzip", "tar", "docker", "two layers"],
)
async def test_an_image(
    registry: Registry, store: ImageStore, pullers: Make, made: list[Layer], media_type: str, tmp_path: Path
) -> None:
    digest = put_image(
        registry, "team/app", made, "1", media_type=media_type, Entrypoint=["/app/run"], Env=["A=b"]
    )
    name = f"{registry.host}/team/app:1"
    pulled = await pullers().pull(name, PullPolicy.IF_NOT_PRESENT)
    assert pulled.fetched
    assert pulled.warnings == ()
    assert (pulled.image.name, pulled.image.digest) == (name, digest)
    assert tree_files(store, digest) == APP
    assert pulled.image.bytes == sum(map(len, APP.values()))
    config = store.config(digest)
    assert config.entrypoint == ["/app/run"]
    assert config.environment == {"A": "b"}
    verified(store)
    await store.clone(digest, tmp_path / "root")
    assert (tmp_path / "root" / "app" / "data").read_bytes() == APP["app/data"]
    assert [entry.name for entry in store.list()] == [name]


async def test_an_index_gives_this_machines(registry: Registry, store: ImageStore, pullers: Make) -> None:
    other = put_image(registry, "app", [layer({"who": b"other"})], platform=("plan9", "mips"))
    own = put_image(registry, "app", [layer({"who": b"own"})])
    attestation = {"os": "unknown", "architecture": "unknown"}
    index = put_index(
        registry,
        "app",
        [(other, {"os": "plan9", "architecture": "mips"}), (own, here()), (other, attestation)],
        "latest",
    )
    puller = pullers()
    pulled = await puller.pull(f"{registry.host}/app", NOW)
    assert pulled.image.digest == own
    assert tree_files(store, own) == {"who": b"own"}
    # The index's digest is one of the image's names too.
    asked = len(registry.seen)
    again = await puller.pull(f"{registry.host}/app@{index}", PullPolicy.IF_NOT_PRESENT)
    assert (again.image.digest, again.fetched) == (own, False)
    assert len(registry.seen) == asked


async def test_by_digest(registry: Registry, store: ImageStore, pullers: Make) -> None:
    digest = put_image(registry, "app", [layer(APP)], "1")
    name = f"{registry.host}/app:1@{digest}"
    puller = pullers()
    assert (await puller.pull(name, NOW)).image.digest == digest
    asked = len(registry.seen)
    again = await puller.pull(name, NOW)  # content that cannot change is not asked for twice
    assert not again.fetched
    assert len(registry.seen) == asked
    with pytest.raises(PullFailed, match="not on this node"):
        await puller.pull(f"{registry.host}/app:1", PullPolicy.NEVER)


async def test_a_linux_image_on_a_mac_is_told(registry: Registry, store: ImageStore, pullers: Make) -> None:
    digest = put_image(registry, "app", [layer(APP)], "only", platform=("linux", "arm64"))
    put_index(registry, "app", [(digest, {"os": "linux", "architecture": "arm64"})], "index")
    puller = pullers(here=("darwin", "arm64"))
    for tag in ("only", "index"):
        pulled = await puller.pull(f"{registry.host}/app:{tag}", NOW)
        (warning,) = pulled.warnings
        assert "made for linux/arm64" in warning
        assert "do not run on this node (darwin/arm64)" in warning


# -- policies


async def test_policies(registry: Registry, store: ImageStore, pullers: Make) -> None:
    first = put_image(registry, "app", [layer({"v": b"1"})], "latest")
    name = f"{registry.host}/app"
    puller = pullers()
    with pytest.raises(PullFailed, match="not on this node, and the policy is never"):
        await puller.pull(name, PullPolicy.NEVER)
    assert registry.seen == []
    assert (await puller.pull(name, PullPolicy.IF_NOT_PRESENT)).image.digest == first
    second = put_image(registry, "app", [layer({"v": b"2"})], "latest")
    asked = len(registry.seen)
    for policy in (PullPolicy.IF_NOT_PRESENT, PullPolicy.NEVER):
        assert (await puller.pull(name, policy)).image.digest == first
    assert len(registry.seen) == asked
    moved = await puller.pull(name, PullPolicy.NEWER)
    assert (moved.image.digest, moved.fetched) == (second, True)
    asked = len(registry.seen)
    same = await puller.pull(name, NOW)
    assert (same.image.digest, same.fetched) == (second, False)
    assert [seen.method for seen in registry.seen[asked:] if seen.path != "/v2/"] == ["HEAD"]


async def test_newer_is_content_with_what_is_here(
    registry: Registry, store: ImageStore, pullers: Make
) -> None:
    digest = put_image(registry, "app", [layer(APP)], "latest")
    name = f"{registry.host}/app"
    puller = pullers()
    await puller.pull(name, NOW)
    registry.fault("status", times=-1, status=500)
    with pytest.raises(PullFailed, match="500"):
        await puller.pull(name, NOW)
    pulled = await puller.pull(name, PullPolicy.NEWER)
    assert pulled.image.digest == digest
    assert "500" in pulled.warnings[0]


async def test_what_was_pruned_in_part_comes_again(
    registry: Registry, store: ImageStore, pullers: Make
) -> None:
    """`if_not_present` is not fooled by a name whose tree is gone."""
    made = layer(APP)
    digest = put_image(registry, "app", [made], "latest")
    name = f"{registry.host}/app"
    puller = pullers()
    await puller.pull(name, NOW)
    tree = store.layout.tree_path(store.layout.tree_of(digest).digest)
    os.rename(tree, tree.with_name(".partial-gone"))
    damaged = store.layout.blob_path(made.digest)
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    pulled = await puller.pull(name, PullPolicy.IF_NOT_PRESENT)
    assert pulled.fetched
    assert tree_files(store, digest) == APP
    verified(store)


# -- sharing


async def test_two_pulls_of_one_image_share_the_work(
    registry: Registry, store: ImageStore, pullers: Make
) -> None:
    put_image(registry, "app", [layer(APP), BIG], "latest")
    puller = pullers()
    name = f"{registry.host}/app"
    registry.gate.clear()
    pulls = [asyncio.ensure_future(puller.pull(name, NOW)) for _ in range(5)]
    await until(lambda: registry.seen)
    registry.gate.set()
    found = await asyncio.gather(*pulls)
    assert len({one.image.digest for one in found}) == 1
    assert len(registry.asked("GET .*/manifests/")) == 1
    assert len(registry.asked("GET .*/blobs/")) == 3  # two layers and the config
    verified(store)


async def test_two_images_share_a_layer(registry: Registry, store: ImageStore, pullers: Make) -> None:
    put_image(registry, "one", [BIG, layer({"who": b"one"})], "latest")
    put_image(registry, "two", [BIG, layer({"who": b"two"})], "latest")
    puller = pullers()
    await asyncio.gather(*(puller.pull(f"{registry.host}/{name}", NOW) for name in ("one", "two")))
    assert len(registry.asked(f"GET .*/blobs/{BIG.digest}")) == 1
    verified(store)


async def test_the_one_who_stays_gets_it(registry: Registry, store: ImageStore, pullers: Make) -> None:
    put_image(registry, "app", [layer(APP)], "latest")
    puller = pullers()
    registry.gate.clear()
    leaves, stays = (asyncio.ensure_future(puller.pull(f"{registry.host}/app", NOW)) for _ in range(2))
    await until(lambda: registry.seen)
    leaves.cancel()
    await asyncio.gather(leaves, return_exceptions=True)
    registry.gate.set()
    assert (await stays).fetched


async def test_nobody_waits_and_it_ends(registry: Registry, store: ImageStore, pullers: Make) -> None:
    put_image(registry, "app", [BIG], "latest")
    puller = pullers()
    registry.fault("stall", f"blobs/{BIG.digest}", at=1 << 20)
    pull = asyncio.ensure_future(puller.pull(f"{registry.host}/app", NOW))
    part = part_of(store, BIG.digest)
    await until(lambda: part.exists() and part.stat().st_size >= 1 << 19)
    pull.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pull
    await until(lambda: not [t for t in asyncio.all_tasks() if t.get_name().startswith("pull ")])
    kept = part.stat().st_size
    assert (await puller.pull(f"{registry.host}/app", NOW)).fetched
    asked = registry.asked(f"GET .*/blobs/{BIG.digest}")[-1]
    assert asked.headers["Range"] == f"bytes={kept}-"
    verified(store)


# -- progress


async def test_progress(registry: Registry, store: ImageStore, pullers: Make) -> None:
    made = [layer(APP), BIG]
    put_image(registry, "app", made, "latest")
    told: list[PullProgress] = []

    async def tell(progress: PullProgress) -> None:
        told.append(progress)

    registry.fault("stall", f"blobs/{BIG.digest}", at=1 << 20)
    name = f"{registry.host}/app"
    await pullers(tell=tell).pull(name, NOW)
    assert {one.image for one in told} == {name}
    phases = [one.phase for one in told]
    assert phases[-1] is ImagePhase.DONE
    assert ImagePhase.DOWNLOADING in phases
    last = told[-1]
    assert [(one.digest, one.bytes_done, one.bytes_total) for one in last.layers] == [
        (one.digest, len(one.content), len(one.content)) for one in made
    ]
    downloading = [one for one in told if one.phase is ImagePhase.DOWNLOADING]
    assert any(0 < one.layers[1].bytes_done < len(BIG.content) for one in downloading)


# -- trouble


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("cut", {"at": 1 << 20}),
        ("stall", {"at": 1 << 20}),
        ("hang_up", {}),
        ("status", {"status": 503}),
        ("status", {"status": 429, "headers": {"Retry-After": "0"}}),
        ("status", {"status": 500}),
    ],
)
async def test_a_layer_that_fails_once_comes_all_the_same(
    registry: Registry, store: ImageStore, pullers: Make, kind: str, more: dict[str, Any]
) -> None:
    digest = put_image(registry, "app", [BIG, layer(APP)], "latest")
    registry.fault(kind, f"GET .*/blobs/{BIG.digest}", times=2, **more)
    pulled = await pullers().pull(f"{registry.host}/app", NOW)
    assert pulled.image.digest == digest
    if more.get("at"):
        ranges = [s.headers.get("Range") for s in registry.asked(f"blobs/{BIG.digest}")]
        assert ranges[0] is None
        assert all(one is not None for one in ranges[1:])
    verified(store)


async def test_a_registry_without_ranges(registry: Registry, store: ImageStore, pullers: Make) -> None:
    put_image(registry, "app", [BIG], "latest")
    registry.fault("cut", f"GET .*/blobs/{BIG.digest}", at=1 << 20)
    registry.fault("no_range", f"GET .*/blobs/{BIG.digest}")
    assert (await pullers().pull(f"{registry.host}/app", NOW)).fetched
    verified(store)


async def test_pieces_that_do_not_fit_together(registry: Registry, store: ImageStore, pullers: Make) -> None:
    """A partial blob of other content costs one more download, and no wrong image."""
    put_image(registry, "app", [BIG], "latest")
    puller = pullers()
    part = part_of(store, BIG.digest)
    part.write_bytes(b"something else" * 1000)
    assert (await puller.pull(f"{registry.host}/app", NOW)).fetched
    assert len(registry.asked(f"GET .*/blobs/{BIG.digest}")) == 2
    assert not part.exists()
    verified(store)


@pytest.mark.parametrize(
    ("kind", "match", "more", "message"),
    [
        ("corrupt", "blobs/{layer}", {}, "other bytes"),
        ("corrupt", "blobs/{config}", {}, "other bytes for the config"),
        ("corrupt", "manifests/", {}, "another manifest"),
        ("grow", "blobs/{layer}", {"at": 5}, "the size of sha256:"),
        ("grow", "blobs/{config}", {"at": 5}, "larger than"),
        ("endless", "blobs/{layer}", {}, "sends more than"),
        ("endless", "blobs/{config}", {}, "larger than"),
        ("endless", "manifests/", {}, "larger than"),
        ("head", "manifests/", {}, "does not (end|speak HTTP)"),
        ("continue", "manifests/", {}, "does not end"),
        ("garbage", "manifests/", {}, "does not speak HTTP"),
        ("cut", "blobs/{layer}", {"at": 10}, "broke off"),
        ("stall", "blobs/{layer}", {"at": 10}, "silent for"),
        ("hang_up", "manifests/", {}, "hung up"),
        ("status", "blobs/{layer}", {"status": 404}, "has no"),
        ("status", "blobs/{layer}", {"status": 403}, "denies access"),
        ("status", "manifests/", {"status": 502}, "502"),
        ("body", "GET .*manifests/", {"status": 200, "body": b"[" * 100_000}, "no JSON"),
        ("body", "GET .*manifests/", {"status": 200, "body": b'{"schemaVersion": 1}'}, "schema 1"),
        ("redirect", "blobs/{layer}", {"url": "http://169.254.169.254/latest/"}, "metadata"),
        ("redirect", "blobs/{layer}", {"url": "file:///etc/passwd"}, "not followed"),
        ("redirect", "blobs/{layer}", {"url": "http://u:p@localhost/"}, "holds credentials"),
    ],
)
async def test_a_registry_that_goes_on_failing(
    registry: Registry,
    store: ImageStore,
    pullers: Make,
    kind: str,
    match: str,
    more: dict[str, Any],
    message: str,
) -> None:
    digest = put_image(registry, "app", [BIG], "latest")
    config = json.loads(registry.manifests["app"][digest][1])["config"]["digest"]
    puller = pullers()
    fault = registry.fault(kind, match.format(layer=BIG.digest, config=config), times=-1, **more)
    with pytest.raises((PullFailed, PolicyDenied), match=message) as caught:
        await puller.pull(f"{registry.host}/app", NOW)
    assert caught.value.field == "image"
    assert store.list() == []
    # Nothing wrong has stayed behind: the same pull succeeds once the registry is well again.
    fault.times = 0
    assert (await puller.pull(f"{registry.host}/app", NOW)).image.digest == digest
    verified(store)


async def test_a_loop_of_redirects(registry: Registry, store: ImageStore, pullers: Make) -> None:
    put_image(registry, "app", [BIG], "latest")
    registry.fault("redirect", f"blobs/{BIG.digest}", times=-1, url=f"/v2/app/blobs/{BIG.digest}")
    with pytest.raises(PullFailed, match="more than 5 redirects"):
        await pullers().pull(f"{registry.host}/app", NOW)


async def test_a_drip_of_bytes_is_given_up(registry: Registry, store: ImageStore, pullers: Make) -> None:
    put_image(registry, "app", [BIG], "latest")
    registry.fault("drip", f"blobs/{BIG.digest}", times=-1)
    patience = msgspec.structs.replace(QUICK, slow_s=0.2, attempts=2)
    with pytest.raises(PullFailed, match=r"only \d+ bytes in 0.2 s"):
        await pullers(patience=patience).pull(f"{registry.host}/app", NOW)


async def test_retry_after_is_waited_for(
    registry: Registry, store: ImageStore, pullers: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_image(registry, "app", [layer(APP)], "latest")
    waits: list[float] = []
    monkeypatch.setattr(
        "worker.images.registry.stopping.StopSignal.wait", lambda self, seconds: waits.append(seconds)
    )
    registry.fault("status", "manifests", status=429, headers={"Retry-After": "7"})
    registry.fault("status", "manifests", status=429, headers={"Retry-After": "99999"})
    assert (await pullers().pull(f"{registry.host}/app", NOW)).fetched
    assert waits == [7.0, 120.0]


async def test_nobody_is_there(store: ImageStore, pullers: Make) -> None:
    with running() as gone:
        host = gone.host
    with pytest.raises(PullFailed, match=r"Connection refused .*tried 2 times"):
        await pullers().pull(f"{host}/app", NOW)


async def test_too_little_room_is_told_before(
    registry: Registry, store: ImageStore, pullers: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_image(registry, "app", [BIG], "latest")
    real = os.statvfs

    def scarce(path: Any) -> Any:
        found = real(path)

        class Little:
            f_bavail = (65 << 20) // found.f_frsize
            f_frsize = found.f_frsize
            f_files = f_favail = 0

        return Little

    monkeypatch.setattr(os, "statvfs", scarce)
    with pytest.raises(ResourceExhausted, match="3 MiB to fetch and about 9 MiB to unpack"):
        await pullers().pull(f"{registry.host}/app", NOW)
    assert registry.asked(f"blobs/{BIG.digest}") == []
    assert not list((store.layout.root / "ingest").iterdir())


async def test_a_disk_that_fills_up(
    registry: Registry, store: ImageStore, pullers: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_image(registry, "app", [BIG], "latest")

    def full(fd: int, chunk: memoryview) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("worker.images.registry.download._write", full)
    with pytest.raises(ResourceExhausted, match="no space left to fetch"):
        await pullers().pull(f"{registry.host}/app", NOW)
    assert not list((store.layout.root / "ingest").iterdir())


async def test_a_layer_that_is_not_what_the_config_says(
    registry: Registry, store: ImageStore, pullers: Make
) -> None:
    lie = Layer(layer(APP).content, layer({"other": b""}).tar, layer(APP).media_type)
    put_image(registry, "app", [lie], "latest")
    with pytest.raises(PullFailed, match="layer 1 of 1"):
        await pullers().pull(f"{registry.host}/app", NOW)
    assert store.list() == []
    assert not [p for p in (store.layout.root / "rootfs").iterdir()]


async def test_a_registrys_image_cannot_pass_for_one_of_ours(
    registry: Registry, store: ImageStore, pullers: Make, tmp_path: Path
) -> None:
    """The marks of registered images in a manifest from outside change nothing."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "secret").write_bytes(b"ours")
    ours = await store.register("ours", source)
    marks = {"dev.sandfleet.image.native": "1", "dev.sandfleet.image.bytes": "nonsense"}
    digest = put_image(registry, "app", [layer(APP)], "latest", changes={"annotations": marks})
    await pullers().pull(f"{registry.host}/app", NOW)
    assert tree_files(store, digest) == APP
    tree = store.layout.manifest(ours.digest).layers[0]
    stolen = {"mediaType": tree.media_type, "digest": tree.digest, "size": tree.size}
    put_image(registry, "thief", [layer(APP)], "latest", changes={"annotations": marks, "layers": [stolen]})
    with pytest.raises(PullFailed, match="unknown type"):
        await pullers().pull(f"{registry.host}/thief", NOW)


# -- pruning meanwhile


async def test_prune_leaves_an_image_on_its_way_in(
    registry: Registry, store: ImageStore, pullers: Make
) -> None:
    made = [layer(APP), BIG]
    digest = put_image(registry, "app", made, "latest")
    puller = pullers()
    registry.fault("stall", f"blobs/{BIG.digest}", at=1 << 20)
    pull = asyncio.ensure_future(puller.pull(f"{registry.host}/app", NOW))
    first = store.layout.blob_path(made[0].digest)
    await until(first.exists)
    await store.prune()
    assert first.exists()
    assert (await pull).image.digest == digest
    verified(store)


async def test_prune_and_remove(registry: Registry, store: ImageStore, pullers: Make) -> None:
    shared = layer({"shared": b"x" * 1000})
    put_image(registry, "one", [shared, layer(APP)], "latest")
    put_image(registry, "two", [shared, BIG], "latest")
    puller = pullers()
    for name in ("one", "two"):
        await puller.pull(f"{registry.host}/{name}", NOW)
    assert (await store.prune()).images == ()
    gone = await store.remove(f"{registry.host}/two")
    assert gone.bytes == (3 << 20) + 1000
    root = store.layout.root
    assert not store.layout.blob_path(BIG.digest).exists()
    assert store.layout.blob_path(shared.digest).exists()
    assert len([path for path in (root / "rootfs").iterdir() if path.is_dir()]) == 1
    verified(store)
    await store.remove(f"{registry.host}/one")
    for folder in ("rootfs", "blobs/sha256"):
        assert not list((root / folder).iterdir())


async def test_a_tag_of_a_pulled_image(registry: Registry, store: ImageStore, pullers: Make) -> None:
    digest = put_image(registry, "app", [layer(APP)], "latest")
    await pullers().pull(f"{registry.host}/app", NOW)
    await store.tag(f"{registry.host}/app", "mine:1")
    await store.remove(f"{registry.host}/app")
    assert store.resolve("mine:1").digest == digest
    assert tree_files(store, digest) == APP
    verified(store)


# -- many at once


async def test_pulls_and_prunes_race(registry: Registry, store: ImageStore, pullers: Make) -> None:
    shared = layer({"shared": os.urandom(200_000)})
    names = [f"app{number}" for number in range(6)]
    for name in names:
        put_image(registry, name, [shared, layer({"who": name.encode()})], "latest")
    puller = pullers()
    ended = threading.Event()

    async def prune() -> None:
        while not ended.is_set():
            await store.prune()

    async def churn(name: str) -> None:
        for _ in range(3):
            await puller.pull(f"{registry.host}/{name}", NOW)
            await store.remove(f"{registry.host}/{name}")
        await puller.pull(f"{registry.host}/{name}", NOW)

    pruning = asyncio.ensure_future(prune())
    try:
        await asyncio.gather(*map(churn, names))
    finally:
        ended.set()
        await pruning
    assert len(store.list()) == len(names)
    verified(store)


async def test_what_a_pull_left_goes_with_a_prune(
    registry: Registry, store: ImageStore, pullers: Make
) -> None:
    """Of a pull that was given up, not of one that is under way."""
    gone, goes_on = layer({"gone": os.urandom(1 << 20)}), BIG
    put_image(registry, "gone", [gone], "latest")
    put_image(registry, "app", [goes_on], "latest")
    puller = pullers(patience=msgspec.structs.replace(QUICK, idle_s=30))
    stalls = [registry.fault("stall", f"blobs/{one.digest}", at=1000) for one in (gone, goes_on)]
    given_up, pull = (
        asyncio.ensure_future(puller.pull(f"{registry.host}/{name}", NOW)) for name in ("gone", "app")
    )
    parts = [part_of(store, one.digest) for one in (gone, goes_on)]
    await until(lambda: all(part.exists() and part.stat().st_size == 1000 for part in parts))
    given_up.cancel()
    await asyncio.gather(given_up, return_exceptions=True)
    await until(lambda: len(puller._tasks) == 1)
    assert await puller.drop_partial() == 1000
    assert [part.exists() for part in parts] == [False, True]
    for stall in stalls:
        stall.over.set()
    assert (await pull).fetched
    verified(store)


async def test_a_registered_image_without_its_tree_is_not_looked_for_elsewhere(
    store: ImageStore, pullers: Make, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    info = await store.register("app", source)
    tree = store.layout.tree_path(store.layout.tree_of(info.digest).digest)
    os.rename(tree, tree.with_name(".partial-gone"))
    assert (await pullers().pull("app", PullPolicy.IF_NOT_PRESENT)).image.digest == info.digest
