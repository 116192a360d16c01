"""s3 volumes as a container and a scheduler see them: fetched, written back, and nothing lost when anything fails."""

import asyncio
import hashlib
import json
import os
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.acceptance.harness import DEADLINE_S, Fleet, shell
from tests.integration.s3_help import Bucket, Fault, FaultProxy, Request, moto, needs_moto
from worker.platform.linux.able import Able

pytestmark = [pytest.mark.asyncio(loop_scope="module"), needs_moto]

CONFIG = """
[policy]
register_roots = ["{images}"]
s3_endpoints = ["http://127.0.0.1:*", "https://*"]
[policy.secrets]
s3 = ["*"]
hidden = ["somebody-else"]
"""
FOREVER = "while :; do sleep 0.05; done"
ROOTED = pytest.param(
    "rootfs",
    marks=pytest.mark.skipif(bool(Able().reason), reason=f"no isolation rootfs here: {Able().reason}"),
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet() -> AsyncIterator[Fleet]:
    async with Fleet(CONFIG) as made:
        secret = made.worker.data / "secrets" / "s3"
        secret.write_text(json.dumps({"access_key_id": "AKIDEXAMPLE", "secret_access_key": "not-a-real-key"}))
        secret.chmod(0o600)
        await made.register("base")
        yield made


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


class Case:
    """A container with one s3 volume at /data."""

    def __init__(self, fleet: Fleet, cid: str, bucket: Bucket, proxy: FaultProxy) -> None:
        self.fleet = fleet
        self.client = fleet.client
        self.cid = cid
        self.bucket = bucket
        self.proxy = proxy

    def spec(self, script: str, isolation: str = "process", **volume: Any) -> dict[str, Any]:
        storage = {
            "type": "s3",
            "bucket": self.bucket.name,
            "target": "/data",
            "endpoint": self.proxy.url,
            "credentials": "$S:s3",
            **volume,
        }
        return shell(
            f"exec 2>&1; cd $SANDFLEET_VOLUME_DATA; {script}",
            storage=[storage],
            network={"access": "none"},
            sandbox={"isolation": isolation},
        )

    async def run(self, script: str, **volume: Any) -> None:
        await self.client.ok(self.cid, "run", spec=self.spec(script, **volume))

    async def mirrors(self) -> list[dict[str, Any]]:
        reply = await self.client.query("volumes")
        return [v for v in reply["volumes"] if (v["source"] or "").startswith(f"s3://{self.bucket.name}/")]

    def down(self) -> None:
        self.proxy.plan = lambda request: Fault(status=503)

    def up(self) -> None:
        self.proxy.plan = lambda request: None


@pytest.fixture
def case(fleet: Fleet, cid: str, bucket: Bucket, proxy: FaultProxy) -> Case:
    return Case(fleet, cid, bucket, proxy)


async def until(condition: Callable[[], object], what: str) -> None:
    deadline = asyncio.get_running_loop().time() + DEADLINE_S
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, what
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("isolation", ["process", ROOTED])
async def test_there_at_the_start_and_back_at_the_stop(case: Case, isolation: str) -> None:
    case.bucket.put("in/given", "given\n")
    await case.run(
        f"cat in/given; cat in/given > seen; echo made > made; echo ready; {FOREVER}", isolation=isolation
    )
    await case.client.log_seen(case.cid, b"ready\n")
    assert case.bucket.get("made") is None
    await case.client.ok(case.cid, "stop")
    assert case.bucket.get("made") == b"made\n"  # when the stop is done
    assert (await case.client.log(case.cid)).data == b"given\nready\n"
    (mirror,) = await case.mirrors()
    assert (mirror["kind"], mirror["state"], mirror["containers"]) == ("s3", "written_back", [case.cid])
    # What others did meanwhile is there at the next start.
    case.bucket.put("in/given", "newer\n")
    case.bucket.delete("made")
    await case.client.ok(case.cid, "start")
    files = case.fleet.worker.data / "mirrors" / mirror["name"] / "files"
    await until(
        lambda: (files / "made").exists() and (files / "seen").read_text() == "newer\n",
        "the newer object is not there",
    )
    await case.client.ok(case.cid, "remove")
    await until(lambda: case.bucket.get("made") == b"made\n", "the second run's file was not written back")
    await _gone(case)


async def _gone(case: Case) -> None:
    deadline = asyncio.get_running_loop().time() + DEADLINE_S
    while await case.mirrors():
        assert asyncio.get_running_loop().time() < deadline, await case.mirrors()
        await asyncio.sleep(0.05)
    assert not [n for n in os.listdir(case.fleet.worker.data / "mirrors") if _of(case, n)]


def _of(case: Case, name: str) -> bool:
    told = json.loads((case.fleet.worker.data / "mirrors" / name / "mirror.json").read_text())
    return bool(told["source"]["bucket"] == case.bucket.name)


@pytest.mark.parametrize("isolation", ["process", ROOTED])
async def test_read_only_is_the_kernels_word(case: Case, isolation: str) -> None:
    case.bucket.put("given", "given")
    await case.run(
        "cat given; echo x > given || echo refused; echo x > new || echo refused; rm given || echo refused",
        isolation=isolation,
        readonly=True,
    )
    said = (await case.client.log(case.cid)).data.decode()
    assert said.count("refused\n") == 3, said
    await case.client.ok(case.cid, "remove")
    assert case.bucket.keys() == ["given"]
    assert not [r for r in case.proxy.seen if r.method in ("PUT", "POST", "DELETE")]
    await _gone(case)


@pytest.mark.skipif(bool(Able().reason), reason=f"no isolation rootfs here: {Able().reason}")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs containers as somebody else")
async def test_of_another_user(case: Case) -> None:
    case.bucket.put("in/given", "given\n")
    script = "id -u; echo more >> in/given && echo new > in/new && mkdir sub && echo x > sub/x && echo ready"
    body = case.spec(f"{script}; {FOREVER}", isolation="rootfs") | {"user": "4711:4712"}
    await case.client.ok(case.cid, "run", spec=body)
    await case.client.log_seen(case.cid, b"ready\n")
    await case.client.ok(case.cid, "stop")
    assert (await case.client.log(case.cid)).data == b"4711\nready\n"
    assert case.bucket.keys() == ["in/given", "in/new", "sub/x"]
    assert case.bucket.get("in/given") == b"given\nmore\n"
    await case.client.ok(case.cid, "remove")
    await _gone(case)


async def test_it_is_written_back_while_it_runs(case: Case) -> None:
    await case.run(f"echo one > file; {FOREVER}", sync_interval="200ms")
    await until(lambda: case.bucket.get("file") == b"one\n", "the interval wrote nothing back")
    assert (await case.client.query("state", container=case.cid))["state"] == "running"
    await case.client.ok(case.cid, "remove")


async def test_an_end_by_itself_is_written_back_too(case: Case) -> None:
    await case.run("echo done > file")
    await until(lambda: case.bucket.get("file") == b"done\n", "it was not written back")
    await case.client.ok(case.cid, "remove")


async def test_a_stop_is_done_though_the_server_is_down(case: Case) -> None:
    await case.run(f"echo kept > file; echo ready; {FOREVER}")
    await case.client.log_seen(case.cid, b"ready\n")
    case.down()
    stopped = await case.client.ok(case.cid, "stop")
    assert stopped["status"]["state"] == "exited"

    def told(event: dict[str, Any]) -> bool:
        message = (event.get("status") or {}).get("message") or ""
        return (
            event.get("container") == case.cid and "the s3 volume at /data is not written back yet" in message
        )

    event = await case.client.event(told)
    assert "SlowDown" in event["status"]["message"]
    (mirror,) = await case.mirrors()
    assert mirror["state"] == "waiting"
    assert "SlowDown" in mirror["error"]
    case.up()
    await until(lambda: case.bucket.get("file") == b"kept\n", "it was not written back later")
    await case.client.event(
        lambda e: (
            e["seq"] > event["seq"]
            and e.get("container") == case.cid
            and e["type"] == "state_changed"
            and e["status"]["message"] is None
        )
    )
    await case.client.ok(case.cid, "remove")
    await _gone(case)


async def test_a_removal_loses_nothing(case: Case) -> None:
    await case.run(f"echo kept > file; echo ready; {FOREVER}")
    await case.client.log_seen(case.cid, b"ready\n")
    case.down()
    await case.client.ok(case.cid, "remove")
    (mirror,) = await case.mirrors()
    assert (mirror["state"], mirror["containers"]) == ("waiting", [])
    refused = await case.client.do(None, "remove_volume", name=mirror["name"])
    assert refused["error"]["code"] == "conflict"
    assert case.bucket.name in refused["error"]["message"]
    case.up()
    await until(lambda: case.bucket.get("file") == b"kept\n", "it was not written back after the removal")
    await _gone(case)


async def test_what_cannot_go_back_can_be_given_up(case: Case) -> None:
    await case.run(f"echo lost > file; echo ready; {FOREVER}")
    await case.client.log_seen(case.cid, b"ready\n")
    (mirror,) = await case.mirrors()
    used = await case.client.do(None, "remove_volume", name=mirror["name"], force=True)
    assert used["error"]["code"] == "conflict"
    assert case.cid in used["error"]["message"]
    case.down()
    await case.client.ok(case.cid, "remove")
    await case.client.ok(None, "remove_volume", name=mirror["name"], force=True)
    assert await case.mirrors() == []
    assert case.bucket.keys() == []


async def test_a_worker_that_is_killed_goes_on(case: Case) -> None:
    """The container ends while nobody looks."""
    await case.run("echo ready; while [ ! -e stop ]; do sleep 0.02; done; echo late > late")
    await case.client.log_seen(case.cid, b"ready\n")
    (mirror,) = await case.mirrors()
    files = case.fleet.worker.data / "mirrors" / mirror["name"] / "files"
    case.fleet.worker.kill()
    (files / "stop").write_text("x")
    await until(lambda: (files / "late").exists(), "the program did not end")
    boots = len({e["boot"] for e in case.client.events if e["type"] == "node_changed"})
    case.fleet.worker.start()
    await case.fleet.ready(boots + 1)
    await until(lambda: case.bucket.get("late") == b"late\n", "the new worker wrote nothing back")
    await case.client.ok(case.cid, "remove")
    await _gone(case)


async def test_a_mirror_of_a_removed_container_survives_a_kill(case: Case) -> None:
    await case.run(f"echo kept > file; echo ready; {FOREVER}")
    await case.client.log_seen(case.cid, b"ready\n")
    case.down()
    await case.client.ok(case.cid, "remove")
    case.fleet.worker.kill()
    boots = len({e["boot"] for e in case.client.events if e["type"] == "node_changed"})
    case.fleet.worker.start()
    await case.fleet.ready(boots + 1)
    assert [m["state"] for m in await case.mirrors()] == ["waiting"]
    case.up()
    await until(lambda: case.bucket.get("file") == b"kept\n", "the new worker wrote nothing back")
    await _gone(case)


async def test_a_worker_that_is_killed_in_the_middle_of_an_upload(case: Case) -> None:
    """Of three parts the first is there; the next worker sends the file whole and leaves no half one behind."""
    await case.run(
        "dd if=/dev/urandom of=big bs=1M count=40 2>/dev/null; sha256sum big; echo ready; sleep 600"
    )
    await case.client.log_seen(case.cid, b"ready\n")
    reached, go_on = threading.Event(), threading.Event()

    def plan(request: Request) -> Fault | None:
        if "partNumber=2" not in request.query or reached.is_set():
            return None
        reached.set()
        return Fault(before=lambda: go_on.wait(20) and None)

    case.proxy.plan = plan
    try:
        await case.client.ok(case.cid, "kill")
        await until(reached.is_set, "no part was sent")
        case.fleet.worker.kill()
    finally:
        go_on.set()
    boots = len({e["boot"] for e in case.client.events if e["type"] == "node_changed"})
    case.fleet.worker.start()
    await case.fleet.ready(boots + 1)
    await until(lambda: case.bucket.get("big") is not None, "the new worker wrote nothing back")
    said = (await case.client.log(case.cid)).data.decode()
    assert hashlib.sha256(case.bucket.get("big") or b"").hexdigest() in said
    assert case.bucket.keys() == ["big"]
    assert case.proxy.count("DELETE", "uploadId=") == 1
    await case.client.ok(case.cid, "remove")
    await _gone(case)


async def test_a_stop_does_not_wait_for_a_slow_fetch(case: Case) -> None:
    case.bucket.put("slow", os.urandom(8 << 20))
    case.proxy.plan = lambda request: Fault(slow_s=0.2) if request.path.endswith("/slow") else None
    run = await case.client.send(case.cid, "run", spec=case.spec(FOREVER))
    await case.client.event(
        lambda e: (
            e.get("container") == case.cid
            and "fetching the s3 volume at /data" in ((e.get("status") or {}).get("message") or "")
        )
    )
    await until(lambda: any(r.path.endswith("/slow") for r in case.proxy.seen), "the fetch did not begin")
    await case.client.ok(case.cid, "stop")
    done = await case.client.completion(run)
    assert done["error"]["code"] == "conflict"
    assert (await case.client.query("state", container=case.cid))["state"] == "exited"
    case.up()
    await case.client.ok(case.cid, "start")
    await case.client.ok(case.cid, "remove")
    await _gone(case)


@pytest.mark.parametrize(
    ("volume", "code", "field", "words"),
    [
        ({"bucket": "no-such-bucket"}, "start_failed", "spec.storage[0]", "no such bucket"),
        ({"credentials": "hidden"}, "policy_denied", "spec.storage[0].credentials", "hidden"),
        ({"endpoint": "https://localhost:1"}, "start_failed", "spec.storage[0]", "cannot be reached"),
        ({"endpoint": "http://s3.example.net"}, "policy_denied", "spec.storage[0].endpoint", "s3_endpoints"),
        ({"endpoint": "http://user@127.0.0.1"}, "invalid_spec", "spec.storage[0].endpoint", "user"),
        ({"bucket": "a/../b"}, "invalid_spec", "spec.storage[0].bucket", "bucket"),
    ],
)
async def test_refusals(case: Case, volume: dict[str, Any], code: str, field: str, words: str) -> None:
    done = await case.client.do(case.cid, "run", spec=case.spec("true", **volume))
    error = done["error"]
    assert (error["code"], error["field"]) == (code, field), error
    assert words in error["message"]
    await case.client.ok(case.cid, "remove")


async def test_the_secret_is_nowhere(fleet: Fleet) -> None:
    """Neither in the log nor in what is kept of the mirrors."""
    text = fleet.worker.log_text()
    for path in Path(fleet.worker.data).rglob("*"):
        if path.is_file() and path.parent.name != "secrets" and path.stat().st_size < 8 << 20:
            text += path.read_bytes().decode(errors="replace")
    assert "not-a-real-key" not in text
