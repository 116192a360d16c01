"""Logs to the byte, stats of whole trees, the memory limit."""

import hashlib

import pytest

from tests.acceptance.harness import Fleet, shell

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_200_000_lines_by_hash(fleet: Fleet, cid: str) -> None:
    await fleet.client.ok(cid, "run", spec=shell("seq 1 200000"))
    log = await fleet.client.log(cid)
    expected = b"".join(b"%d\n" % n for n in range(1, 200001))
    assert hashlib.sha256(log.data).digest() == hashlib.sha256(expected).digest()
    assert log.lost == 0
    assert all(len(h["Nats-Msg-Id"].split("/")) == 3 for h in log.headers)
    assert all(h["Sandfleet-Run"] == "1" for h in log.headers)
    await fleet.client.ok(cid, "remove")


async def test_both_streams_any_bytes_and_several_runs(fleet: Fleet, cid: str) -> None:
    script = "printf 'a\\000\\377b'; printf err >&2; exit 0"
    await fleet.client.ok(cid, "run", spec=shell(script))
    await fleet.client.state(cid, "exited", run=1)
    await fleet.client.ok(cid, "start")
    await fleet.client.state(cid, "exited", run=2)
    out = await fleet.client.log(cid, run=2)
    err = await fleet.client.log(cid, "stderr", run=2)
    assert bytes(out.data) == b"a\x00\xffb" * 2
    assert bytes(err.data) == b"err" * 2
    assert out.has_eof(1)
    lines = (await fleet.client.query("logs", container=cid))["lines"]
    assert any(line.get("encoding") == "base64" for line in lines)
    await fleet.client.ok(cid, "remove")


async def test_logs_query_tail_and_paging(fleet: Fleet, cid: str) -> None:
    await fleet.client.ok(cid, "run", spec=shell("seq 1 3000; echo oops >&2"))
    await fleet.client.state(cid, "exited")
    tail = await fleet.client.query("logs", container=cid, stream="stdout", tail=2)
    assert [line["text"] for line in tail["lines"]] == ["2999", "3000"]
    assert {line["stream"] for line in tail["lines"]} == {"stdout"}
    texts: list[str] = []
    cursor = None
    for _ in range(50):
        fields = {} if cursor is None else {"cursor": cursor}
        page = await fleet.client.query("logs", container=cid, stream="stdout", **fields)
        texts += [line["text"] for line in page["lines"]]
        cursor = page["cursor"]
        if not page["lines"] or cursor is None:
            break
    assert texts == [str(n) for n in range(1, 3001)]
    await fleet.client.ok(cid, "remove")


async def test_what_remove_finds_unsent_is_sent(fleet: Fleet, cid: str) -> None:
    await fleet.client.ok(cid, "run", spec=shell("seq 1 50000; sleep 600"))
    await fleet.client.log_seen(cid, b"\n")
    done = await fleet.client.ok(cid, "remove")
    log = await fleet.client.log(cid, instance=done["status"]["instance"] if done["status"] else None)
    assert log.has_eof(1)
    assert log.lost == 0


async def test_stats_count_the_whole_tree(fleet: Fleet, cid: str) -> None:
    script = "(setsid sleep 500 &) ; setsid sleep 501 & echo ready; while :; do :; done"
    await fleet.client.ok(cid, "run", spec=shell(script))
    await fleet.client.log_seen(cid, b"ready\n")
    stats = await fleet.client.query("stats", container=cid)
    assert stats["processes"] == 3, stats
    assert stats["threads"] >= 3
    assert stats["memory_bytes"] > 0
    assert stats["container"] == cid
    again = await fleet.client.query("stats", container=cid)
    assert again["cpu_usec"] >= stats["cpu_usec"]
    message = await fleet.client.stat_message(cid)
    assert message["container"] == cid
    assert message["instance"] == stats["instance"]
    await fleet.client.ok(cid, "remove")


async def test_stats_before_a_start_conflict(fleet: Fleet, cid: str) -> None:
    await fleet.client.ok(cid, "create", spec=shell("true"))
    assert (await fleet.client.query("stats", container=cid))["code"] == 409
    await fleet.client.ok(cid, "remove")


async def test_memory_limit(fleet: Fleet, cid: str) -> None:
    script = "a=x; while :; do a=$a$a$a$a; done"
    spec = shell(script, resources={"memory": "48Mi"})
    done = await fleet.client.ok(cid, "run", spec=spec)
    assert done["status"]["memory_limit"] == 48 * 1024 * 1024
    status = await fleet.client.state(cid, "exited")
    assert status["reason"] == "memory_limit", status
    assert status["exit_code"] == -9
    await fleet.client.ok(cid, "remove")


async def test_cpu_limit(fleet: Fleet, cid: str) -> None:
    spec = shell("while :; do :; done", resources={"cpu_time_limit": 1})
    await fleet.client.ok(cid, "run", spec=spec)
    status = await fleet.client.state(cid, "exited")
    assert status["reason"] == "cpu_limit", status
    await fleet.client.ok(cid, "remove")
