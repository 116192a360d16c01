"""The mirrors of a node: what is tried again, what is left alone, and what a dead worker left."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.integration.s3_help import Bucket, Fault, FaultProxy, Request, moto, needs_moto
from worker.config import Config, PolicyConfig
from worker.errors import Conflict, NotFound, StartFailed
from worker.volume_s3.mirrors import Mirrors, Wanted

pytestmark = needs_moto

INSTANCE = "01J0000000000000000000000A"
CID = "web-0"
POLICY = PolicyConfig(secrets={"s3": ("web",)}, s3_endpoints=("http://127.0.0.1:*",))
DEADLINE_S = 20.0


class Secrets:
    def read(self, name: str) -> str:
        return "AKIDEXAMPLE:not-a-real-key"


class Node:
    """Mirrors with an owner of their tasks, as the runtime is."""

    def __init__(self, root: Path, policy: PolicyConfig, tasks: asyncio.TaskGroup) -> None:
        self.told: list[str | None] = []
        self.running: set[asyncio.Task[None]] = set()
        self.mirrors = Mirrors(root, config=Config(policy=policy), secrets=Secrets(), first_retry_s=0.05)
        self.mirrors.tell = self._tell
        self.mirrors.spawn = self._spawn
        self._tasks = tasks

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = self._tasks.create_task(work, name=name)
        self.running.add(task)
        task.add_done_callback(self.running.discard)

    async def _tell(self, cid: str, instance: str, text: str | None) -> None:
        assert (cid, instance) == (CID, INSTANCE)
        self.told.append(text)


@asynccontextmanager
async def node(root: Path, policy: PolicyConfig = POLICY) -> AsyncIterator[Node]:
    """A worker's life; leaving it is as sudden as the worker's own end."""
    root.mkdir(exist_ok=True)
    async with asyncio.TaskGroup() as tasks:
        made = Node(root, policy, tasks)
        await asyncio.to_thread(made.mirrors.load)
        try:
            yield made
        finally:
            for task in list(made.running):
                task.cancel()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with moto(tmp_path_factory.mktemp("moto")) as url:
        yield url


@pytest.fixture
def bucket(server: str) -> Bucket:
    return Bucket(server, f"b-{uuid.uuid4().hex[:12]}")


@pytest.fixture
def proxy(server: str) -> Iterator[FaultProxy]:
    with FaultProxy(server).running() as made:
        yield made


async def until(condition: Callable[[], object], what: str) -> None:
    deadline = asyncio.get_running_loop().time() + DEADLINE_S
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, what
        await asyncio.sleep(0.01)


async def fetch(made: Node, bucket: Bucket, url: str, **fields: object) -> Path:
    """A container is about to start; its folder."""
    wanted = [Wanted(0, "/data", bucket.source(url, **fields))]

    async def say(text: str) -> None:
        return None

    await made.mirrors.fetch(CID, INSTANCE, wanted, asyncio.Event(), say)
    return made.mirrors.root / f"s3-{INSTANCE.lower()}-0" / "files"


async def test_a_failed_write_back_is_tried_until_it_works(
    tmp_path: Path, bucket: Bucket, proxy: FaultProxy
) -> None:
    async with node(tmp_path / "mirrors") as made:
        files = await fetch(made, bucket, proxy.url)
        (files / "a").write_text("x")
        attempts = 0

        def plan(request: Request) -> Fault | None:
            nonlocal attempts
            if "list-type=2" in request.query:
                attempts += 1
            return Fault(status=403, code="AccessDenied") if attempts < 4 else None

        proxy.plan = plan
        made.mirrors.ended(INSTANCE)
        await made.mirrors.written_back(INSTANCE, DEADLINE_S)
        assert made.told  # the first failure ends the waiting
        await until(lambda: bucket.get("a") == b"x", "it was never written back")
        await until(lambda: made.told[-1:] == [None], "that it was done was not told")
        assert len(made.told) == 2  # the same failure is told once
        assert "do not allow" in str(made.told[0])
        assert await made.mirrors.written_back(INSTANCE, DEADLINE_S)
        made.mirrors.released(INSTANCE)
        await until(lambda: not os.listdir(made.mirrors.root), "the mirror stays")
        assert made.mirrors.all() == []


async def test_patience_has_an_end(tmp_path: Path, bucket: Bucket, proxy: FaultProxy) -> None:
    async with node(tmp_path / "mirrors") as made:
        files = await fetch(made, bucket, proxy.url)
        (files / "a").write_text("x")
        go_on = asyncio.Event()
        loop = asyncio.get_running_loop()

        def wait() -> None:
            asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(DEADLINE_S)

        proxy.plan = lambda request: Fault(before=wait) if request.method == "PUT" else None
        made.mirrors.ended(INSTANCE)
        await until(lambda: proxy.count("PUT"), "nothing was sent")
        assert not await made.mirrors.written_back(INSTANCE, 0.05)
        assert made.told == ["the s3 volume at /data is still being written back"]
        go_on.set()
        await until(lambda: made.told[-1] is None, "the end was not told")


async def test_a_new_worker_goes_on(tmp_path: Path, bucket: Bucket, proxy: FaultProxy) -> None:
    root = tmp_path / "mirrors"
    async with node(root) as made:
        files = await fetch(made, bucket, proxy.url)
        (files / "a").write_text("x")
    async with node(root) as made:
        made.mirrors.begin(live=set(), known={INSTANCE})
        await until(lambda: bucket.get("a") == b"x", "it was not written back")
        (mirror,) = made.mirrors.all()
        await until(lambda: not mirror.pending, "it is not settled")
    proxy.seen.clear()
    async with node(root) as made:
        made.mirrors.begin(live=set(), known={INSTANCE})
        (mirror,) = made.mirrors.all()
        assert not mirror.pending
    assert proxy.seen == []  # nothing was to be asked
    async with node(root) as made:
        made.mirrors.begin(live=set(), known=set())
        await until(lambda: not os.listdir(root), "the mirror of a container that is gone stays")


async def test_a_grant_that_was_taken_back_counts(tmp_path: Path, bucket: Bucket, proxy: FaultProxy) -> None:
    root = tmp_path / "mirrors"
    async with node(root) as made:
        files = await fetch(made, bucket, proxy.url)
        (files / "a").write_text("x")
    proxy.seen.clear()
    for policy, words in (
        (PolicyConfig(s3_endpoints=POLICY.s3_endpoints), "may not have the secret"),
        (PolicyConfig(secrets=POLICY.secrets), "any more"),
    ):
        async with node(root, policy) as made:
            made.mirrors.begin(live=set(), known={INSTANCE})
            await until(lambda made=made: made.told, "nothing was told")
            assert words in str(made.told[0])
    assert proxy.seen == []
    assert (files / "a").exists()


async def test_what_cannot_be_understood_is_left_alone(
    tmp_path: Path, bucket: Bucket, proxy: FaultProxy
) -> None:
    root = tmp_path / "mirrors"
    for name, told in (("s3-damaged", "{"), ("s3-strange", '{"source": 1}')):
        (root / name / "files").mkdir(parents=True)
        (root / name / "files/precious").write_text("x")
        (root / name / "mirror.json").write_text(told)
    (root / "s3-unbegun" / "files").mkdir(parents=True)
    async with node(root) as made:
        made.mirrors.begin(live=set(), known=set())
        assert made.mirrors.all() == []
    assert sorted(os.listdir(root)) == ["s3-damaged", "s3-strange"]
    assert (root / "s3-damaged/files/precious").exists()


async def test_discarding(tmp_path: Path, bucket: Bucket, proxy: FaultProxy) -> None:
    async with node(tmp_path / "mirrors") as made:
        files = await fetch(made, bucket, proxy.url)
        name = files.parent.name
        (files / "a").write_text("x")
        proxy.plan = lambda request: Fault(status=503)
        with pytest.raises(Conflict, match=CID):
            await made.mirrors.discard(name, force=True)
        made.mirrors.released(INSTANCE)
        with pytest.raises(Conflict, match="force"):
            await made.mirrors.discard(name, force=False)
        await made.mirrors.discard(name, force=True)
        assert not files.exists()
        with pytest.raises(NotFound):
            await made.mirrors.discard(name, force=True)
    assert bucket.keys() == []


async def test_a_fetch_that_is_overtaken_ends_at_once(
    tmp_path: Path, bucket: Bucket, proxy: FaultProxy
) -> None:
    """And the next one waits for its thread, so that two never work on one mirror."""
    bucket.put("slow", os.urandom(4 << 20))
    proxy.plan = lambda request: Fault(slow_s=0.1) if request.path.endswith("/slow") else None
    async with node(tmp_path / "mirrors") as made:
        overtaken = asyncio.Event()
        said: list[str] = []

        async def say(text: str) -> None:
            said.append(text)

        wanted = [Wanted(0, "/data", bucket.source(proxy.url))]
        work = asyncio.create_task(made.mirrors.fetch(CID, INSTANCE, wanted, overtaken, say))
        await until(lambda: any(r.path.endswith("/slow") for r in proxy.seen), "the fetch did not begin")
        overtaken.set()
        await work
        assert said == ["fetching the s3 volume at /data"]
        proxy.plan = lambda request: None
        files = await fetch(made, bucket, proxy.url)
        assert (files / "slow").stat().st_size == 4 << 20


async def test_a_fetch_that_fails_names_its_place(tmp_path: Path, bucket: Bucket, proxy: FaultProxy) -> None:
    proxy.plan = lambda request: Fault(status=403, code="AccessDenied")
    async with node(tmp_path / "mirrors") as made:
        with pytest.raises(StartFailed, match="do not allow") as caught:
            await fetch(made, bucket, proxy.url)
        assert caught.value.field == "spec.storage[0]"
        made.mirrors.ended(INSTANCE)
        proxy.plan = lambda request: None
        await fetch(made, bucket, proxy.url)
