"""The queries of the contract, their errors, and the node's own commands."""

import asyncio
import json
import os
import sys
import urllib.request

import pytest

from tests.acceptance.harness import Fleet, P, new_id, shell, until

PYTHON = os.path.realpath(sys.executable)
PREFIX = os.path.realpath(sys.base_prefix)

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_info(fleet: Fleet) -> None:
    info = await fleet.client.query("info")
    assert info["node"] == fleet.client.node
    assert info["labels"] == {"rack": "a"}
    assert info["insecure"] is True
    assert info["api"]["version"] == 1
    assert info["state"] == "ready"
    assert "process" in info["capabilities"]["isolation"]
    for key in ("epoch", "boot", "version", "hostname", "os", "os_version", "arch", "cpus", "memory_bytes", "gpus",
                "pools", "slots", "slots_used", "started_at"):  # fmt: skip
        assert key in info


async def test_list_by_label_and_state(fleet: Fleet, cid: str) -> None:
    await fleet.client.ok(cid, "create", spec=shell("true", labels={"only": cid, "x": "1"}))
    listed = await fleet.client.query("list", labels={"only": cid, "x": "1"})
    assert [c["container"] for c in listed["containers"]] == [cid]
    assert (await fleet.client.query("list", labels={"only": cid, "x": "2"}))["containers"] == []
    assert (await fleet.client.query("list", labels={"only": cid}, state="running"))["containers"] == []
    assert len((await fleet.client.query("list", labels={"only": cid}, state="pending"))["containers"]) == 1
    await fleet.client.ok(cid, "remove")


async def test_command(fleet: Fleet, cid: str) -> None:
    done = await fleet.client.ok(cid, "create", spec=shell("true"))
    reply = await fleet.client.query("command", id=done["command_id"])
    assert reply["state"] == "completed"
    assert reply["container"] == cid
    assert reply["result"]["ok"] is True
    assert (await fleet.client.query("command", id=new_id()))["code"] == 404
    await fleet.client.ok(cid, "remove")


async def test_wait(fleet: Fleet, cid: str) -> None:
    await fleet.client.ok(cid, "run", spec=shell("sleep 0.3; exit 9"))
    status = await fleet.client.query("wait", container=cid, until="exit", timeout_s=10)
    assert status["exit_code"] == 9
    await fleet.client.ok(cid, "run", spec=shell("sleep 600"), replace=True)
    late = await fleet.client.query("wait", container=cid, until="final", timeout_s=0.1)
    assert late["error"]["code"] == "deadline_exceeded"
    assert late["code"] == 503
    waiting = asyncio.create_task(fleet.client.query("wait", container=cid, until="exit", timeout_s=10))
    await fleet.client.ok(cid, "remove")
    assert (await waiting)["state"] in ("exited", "removed")


async def test_exec(fleet: Fleet, cid: str) -> None:
    await fleet.client.ok(cid, "run", spec=shell("sleep 600", env={"GREETING": "hello"}))
    reply = await fleet.client.query("exec", container=cid, argv=["/bin/sh", "-c", "echo $GREETING $1; cat; exit 3", "sh", "you"],
                                     stdin="in")  # fmt: skip
    assert reply == {"exit_code": 3, "stdout": "hello you\nin", "stderr": "", "truncated": False}
    env = await fleet.client.query("exec", container=cid, argv=["/usr/bin/env"], env={"EXTRA": "1"})
    names = {line.split("=")[0] for line in env["stdout"].splitlines()}
    assert {
        "EXTRA",
        "GREETING",
        "PORT",
        "SANDFLEET_CONTAINER",
        "ZLAYER_PORT",
        "HOME",
        "TMPDIR",
        "PATH",
    } <= names
    binary = await fleet.client.query("exec", container=cid, argv=["/bin/sh", "-c", "printf '\\377'"])
    assert binary["encoding"] == "base64"
    outside = await fleet.client.query("exec", container=cid, argv=["/bin/cat", "/etc/shadow"])
    assert outside["exit_code"] != 0
    assert "denied" in outside["stderr"]
    big = await fleet.client.query("exec", container=cid, argv=["/bin/sh", "-c", "seq 1 100000"])
    assert big["truncated"] is True
    assert len(big["stdout"]) == 256 * 1024
    slow = await fleet.client.query("exec", container=cid, argv=["/bin/sleep", "50"], timeout_s=0.3)
    assert slow["error"]["code"] == "deadline_exceeded", slow
    empty = await fleet.client.query("exec", container=cid, argv=[])
    assert empty["error"]["code"] == "invalid_spec"
    assert empty["code"] == 422
    streamed = await fleet.client.query("exec", container=cid, argv=["/bin/true"], stream=True, session="s1")
    assert streamed["error"]["code"] == "unsupported"
    assert streamed["code"] == 501
    await fleet.client.ok(cid, "stop", timeout_s=1)
    assert (await fleet.client.query("exec", container=cid, argv=["/bin/true"]))["code"] == 409
    await fleet.client.ok(cid, "remove")


async def test_profile(fleet: Fleet, cid: str) -> None:
    spec = shell("true", network={"access": "none"})
    before = await fleet.client.query("profile", service="what-if", replica=0, spec=spec)
    assert before["policy"]["network"]["level"] == "none"
    assert before["text"]
    await fleet.client.ok(cid, "create", spec=spec)
    made = await fleet.client.query("profile", container=cid)
    assert made["language"] == before["language"]
    assert made["policy"]["network"]["level"] == "none"
    await fleet.client.ok(cid, "remove")


async def test_images(fleet: Fleet) -> None:
    digest = await fleet.register("one:1.0", {"a": "1"})
    await fleet.client.ok(None, "tag_image", source="one:1.0", target="one:stable")
    images = (await fleet.client.query("images"))["images"]
    found = {i["name"]: i for i in images}
    assert found["one:1.0"]["digest"] == found["one:stable"]["digest"] == digest
    await fleet.client.ok("img-0", "create", spec={"image": {"name": "one:stable"}})
    refused = await fleet.client.do(None, "remove_image", image="one:stable")
    for name in ("one:1.0", "one:stable"):
        await fleet.client.do(None, "remove_image", image=name, force=True)
    assert refused["type"] == "command_completed"
    await fleet.client.ok("img-0", "remove")
    pruned = await fleet.client.ok(None, "prune_images")
    assert set(pruned["result"]) == {"removed", "bytes"}
    missing = await fleet.client.do(None, "pull_image", image="no/such:1", policy="never")
    assert missing["error"]["code"] == "pull_failed"
    outside = await fleet.client.do(None, "register_image", image="x", source_dir="/etc")
    assert outside["error"]["code"] == "policy_denied"
    assert "register_roots" in outside["error"]["message"]
    told = [e for e in fleet.client.events if e["type"] == "image_changed"]
    assert {"registered", "tagged", "removed"} <= {e["action"] for e in told}


async def test_a_fifo_in_a_source_is_named(fleet: Fleet) -> None:
    folder = fleet.image("fifo", {"x": "1"})
    os.mkfifo(f"{folder}/pipe")
    done = await fleet.client.do(None, "register_image", image="fifo", source_dir=folder)
    assert not done["ok"]
    assert "pipe" in done["error"]["message"]


async def test_drain_and_resume(fleet: Fleet, cid: str) -> None:
    await fleet.client.ok(cid, "run", spec=shell("sleep 600"))
    late = await fleet.client.do(None, "drain", timeout_s=0.2)
    assert late["error"]["code"] == "deadline_exceeded"
    assert (await fleet.client.query("info"))["state"] == "draining"
    refused = await fleet.client.do("other-0", "run", spec=shell("true"))
    assert refused["error"]["code"] == "unavailable"
    done = await fleet.client.ok(None, "drain", timeout_s=10, stop_containers=True)
    assert done["status"] is None
    assert (await fleet.client.query("info"))["state"] == "drained"
    await fleet.client.ok(None, "resume")
    assert (await fleet.client.query("info"))["state"] == "ready"
    states = [e["state"] for e in fleet.client.events if e["type"] == "node_changed"]
    assert states[-3:] == ["draining", "drained", "ready"]
    await fleet.client.ok(cid, "remove")


async def test_presence(fleet: Fleet) -> None:
    kv = await fleet.client.js.key_value("SANDFLEET_NODES")
    entry = json.loads((await kv.get(fleet.client.node)).value)
    assert set(entry) == {"node", "boot", "epoch", "state", "slots", "slots_used"}


async def test_unknown_query_and_no_such_node(fleet: Fleet) -> None:
    for verb in ("cancel", "frobnicate"):
        reply = await fleet.client.query(verb)
        assert reply["error"]["code"] == "unsupported", (verb, reply)
        assert reply["code"] == 501
    reply = await fleet.client.query("denials", container="nope-0")
    assert reply["error"]["code"] in ("unsupported", "not_found")  # only a Mac has them
    from nats.errors import NoRespondersError

    with pytest.raises(NoRespondersError):
        await fleet.client.nc.request(f"{P}.rpc.elsewhere.info", b"{}")


async def test_micro_discovery(fleet: Fleet) -> None:
    reply = await fleet.client.nc.request("$SRV.INFO.sandfleet", b"")
    info = json.loads(reply.data)
    assert info["name"] == "sandfleet"
    assert any(e["subject"].startswith(f"{P}.rpc.{fleet.client.node}.") for e in info["endpoints"])


async def test_two_web_servers_on_their_own_ports(fleet: Fleet) -> None:
    script = f"exec {PYTHON} -m http.server --bind 127.0.0.1 $PORT"
    statuses = []
    for replica in (0, 1):
        endpoints = [{"name": "http", "protocol": "http", "port": 8080}]
        spec = shell(script, endpoints=endpoints, sandbox={"read": [PREFIX]})
        done = await fleet.client.ok(f"web-{replica}", "run", spec=spec)
        statuses.append(done["status"])
    assert statuses[0]["port"] != statuses[1]["port"]

    def answers(port: int) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=1) as reply:
                return reply.status == 200
        except OSError:
            return False

    for status in statuses:
        await until(lambda port=status["port"]: answers(port), what="the web server")
        await fleet.client.ok(status["container"], "remove")
