"""The queries `profile` and `check` on a running node: what they answer is what the kernel then does."""

import asyncio
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.harness import BIN, Fleet, shell

pytestmark = pytest.mark.asyncio(loop_scope="module")

PYTHON = os.path.realpath(sys.executable)
PREFIX = os.path.realpath(sys.base_prefix)


@pytest.fixture(scope="module")
def listener() -> Iterator[int]:
    """A TCP server on loopback that takes any connection."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            client.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield int(server.getsockname()[1])
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join(5)


@pytest.fixture(scope="module")
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def outside(fleet: Fleet) -> Path:
    """A folder of the host that no spec here is granted."""
    folder = fleet.folder / "outside"
    folder.mkdir()
    (folder / "file").write_text("outside")
    tool = folder / "tool"
    tool.write_text("#!/bin/sh\nexit 0\n")
    tool.chmod(0o755)
    return folder


# What a program does for each question in plain words; it ends with 0 when it may.
DOES = {
    "read": "open({0!r}, 'rb').read(1)",
    "write": "open({0!r}, 'ab').close()",
    "exec": "import subprocess; subprocess.run([{0!r}, '-c', 'import sys'], check=True)",
    "connect": "import socket; h, _, p = {0!r}.rpartition(':'); "
    "socket.create_connection((h.replace('localhost', '127.0.0.1'), int(p)), 3).close()",
    "bind": "import socket; s = socket.socket(); s.bind(('127.0.0.1', int({0!r}))); s.listen(1); s.close()",
}


async def happens(fleet: Fleet, cid: str, operation: str, argument: str) -> str:
    """What the kernel says when a program of the container tries it."""
    code = DOES[operation].format(argument)
    done = await fleet.client.query("exec", container=cid, argv=[PYTHON, "-c", code])
    assert "exit_code" in done, done
    return "allow" if done["exit_code"] == 0 else "deny"


@pytest.mark.parametrize("access", ["none", "localhost", "full"])
async def test_a_check_says_what_the_kernel_does(
    fleet: Fleet, cid: str, access: str, listener: int, free_port: int, outside: Path
) -> None:
    shared = {"sandbox": {"read": [PREFIX]}, "network": {"access": access}}
    if access != "none":
        shared["endpoints"] = [{"name": "own", "protocol": "tcp", "port": free_port}]
    await fleet.client.ok(cid, "run", spec=shell("echo own > own.txt; exec sleep 600", **shared))
    policy = (await fleet.client.query("profile", container=cid))["policy"]
    rootfs, state = policy["rootfs"], policy["state_dir"]
    for operation, argument in (
        ("read", f"{rootfs}/etc/motd"),
        ("write", f"{rootfs}/own.txt"),
        ("write", f"{policy['tmp']}/made"),
        ("read", f"{state}/config.json"),
        ("write", f"{state}/config.json"),
        ("read", f"{outside}/file"),
        ("write", f"{outside}/file"),
        ("exec", f"{outside}/tool"),
        ("read", "/etc/passwd"),
        ("read", "/proc/1/environ"),
        ("exec", PYTHON),
        ("exec", "/bin/true"),
        ("write", "/dev/null"),
        ("read", "/bin/sh"),
        ("connect", f"localhost:{listener}"),
        ("connect", f"localhost:{fleet.server.port}"),
        ("bind", str(free_port)),
        ("bind", str(listener + 1 if listener < 65535 else listener - 1)),
    ):
        if operation == "bind" and argument != str(free_port) and access == "full":
            continue  # allowed, but the port may be somebody's
        reply = await fleet.client.query("check", container=cid, operation=operation, argument=argument)
        assert reply.get("decision") == await happens(fleet, cid, operation, argument), (
            operation,
            argument,
            reply,
        )
        assert reply["reason"]
        assert (reply["would_allow"] is None) == (reply["decision"] != "deny")
    await fleet.client.ok(cid, "remove")


async def test_a_denial_says_what_would_allow_it(fleet: Fleet, cid: str, outside: Path) -> None:
    spec = shell("sleep 600", network={"access": "localhost"})
    fields: dict[str, Any] = {"service": "what-if", "replica": 0, "spec": spec}

    async def check(operation: str, argument: str | None = None) -> dict[str, Any]:
        return await fleet.client.query("check", **fields, operation=operation, argument=argument)

    reply = await check("connect", "localhost:5432")
    assert (reply["decision"], reply["would_allow"]) == ("deny", ["network.connect_ports: [5432]"])
    spec["network"]["connect_ports"] = [5432]
    assert (await check("connect", "localhost:5432"))["decision"] == "allow"
    # The node grants this folder to whoever asks …
    assert (await check("read", f"{PREFIX}/lib"))["would_allow"] == [f"sandbox.read: [{PREFIX}/lib]"] or (
        PREFIX.startswith("/usr")
    )
    # … and this one to nobody: its operator would have to, and the answer says where.
    (told,) = (await check("read", f"{outside}/file"))["would_allow"]
    assert told.startswith(f"sandbox.read: [{outside}/file]; ")
    assert "[policy]" in told
    assert str(fleet.worker.config) in told
    # A file of the node's own: nothing does.
    database = f"{fleet.worker.data.resolve()}/worker.db"
    assert (await check("read", database))["would_allow"] == []
    assert (await check("connect", f"localhost:{fleet.server.port}"))["would_allow"] == []


async def test_the_deciding_line_stands_in_the_profile(fleet: Fleet, cid: str) -> None:
    spec = shell("true", sandbox={"read": [PREFIX]}, network={"access": "localhost", "connect_ports": [5432]})
    await fleet.client.ok(cid, "create", spec=spec)
    text = (await fleet.client.query("profile", container=cid))["text"].split("\n")
    for operation, argument in (
        ("read", "/usr/bin/env"),
        ("connect", "localhost:5432"),
        ("connect", "localhost:1"),
    ):
        reply = await fleet.client.query("check", container=cid, operation=operation, argument=argument)
        assert reply["rule"], reply
        assert text[reply["line"] - 1] == reply["rule"]
    await fleet.client.ok(cid, "remove")


async def test_a_link_of_the_host_is_followed(fleet: Fleet, cid: str) -> None:
    """/bin may be a link to /usr/bin; the sandbox has what it leads to."""
    await fleet.client.ok(cid, "create", spec=shell("true"))
    for path in ("/bin/sh", "/usr/bin/env", "/lib"):
        reply = await fleet.client.query("check", container=cid, operation="read", argument=path)
        assert reply["decision"] == "allow", reply
    await fleet.client.ok(cid, "remove")


async def test_a_volume_is_asked_where_the_container_has_it(fleet: Fleet, cid: str) -> None:
    storage = [{"type": "named", "name": "asked", "target": "/data", "readonly": True}]
    await fleet.client.ok(cid, "create", spec=shell("true", storage=storage))
    rootfs = (await fleet.client.query("profile", container=cid))["policy"]["rootfs"]
    for operation, decision in (("read", "allow"), ("write", "deny")):
        reply = await fleet.client.query(
            "check", container=cid, operation=operation, argument=f"{rootfs}/data/x"
        )
        assert reply["decision"] == decision, reply
    await fleet.client.ok(cid, "remove")


@pytest.mark.parametrize(
    ("fields", "status", "code", "field"),
    [
        ({"container": "nobody-0", "operation": "gpu"}, 404, "not_found", "container"),
        ({"service": "x", "operation": "gpu"}, 422, "invalid_command", "spec"),
        ({"operation": "gpu"}, 422, "invalid_command", "container"),
        ({"operation": "frob", "spec": True}, 422, "invalid_command", "operation"),
        ({"operation": "read", "spec": True}, 422, "invalid_command", "argument"),
        ({"operation": "read", "argument": "relative", "spec": True}, 422, "invalid_command", "argument"),
        ({"operation": "connect", "argument": "80", "spec": True}, 422, "invalid_command", "argument"),
    ],
)
async def test_what_is_no_question(
    fleet: Fleet, fields: dict[str, Any], status: int, code: str, field: str
) -> None:
    if fields.get("spec") is True:
        fields = {**fields, "service": "what-if", "spec": shell("true")}
    reply = await fleet.client.query("check", **fields)
    assert (reply["code"], reply["error"]["code"], reply["error"]["field"]) == (status, code, field)


async def test_a_spec_that_the_node_refuses_is_refused(fleet: Fleet, outside: Path) -> None:
    spec = shell("true", sandbox={"read": [str(outside)]})
    for verb, more in (("profile", {}), ("check", {"operation": "gpu"})):
        reply = await fleet.client.query(verb, service="what-if", spec=spec, **more)
        assert reply["error"]["code"] == "policy_denied"
        assert reply["error"]["field"] == "spec.sandbox.read[0]"


async def test_the_command_line_asks_the_same(fleet: Fleet, cid: str) -> None:
    spec = shell("true", network={"access": "none"}, resources={"memory": "64Mi"})
    await fleet.client.ok(cid, "create", spec=spec)

    async def say(*words: str) -> tuple[int, str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("SANDFLEET_")}
        program = await asyncio.create_subprocess_exec(
            str(BIN / "sandfleet"), "profile", *words, "--nats", fleet.server.url, "--node", fleet.client.node,
            stdout=asyncio.subprocess.PIPE, env=env,
        )  # fmt: skip
        out, _ = await program.communicate()
        assert program.returncode is not None
        return program.returncode, out.decode()

    code, out = await say("show", cid, "--json")
    assert code == 0
    assert json.loads(out) == await fleet.client.query("profile", container=cid)
    for operation, argument, wanted in (("read", "/bin/sh", 0), ("connect", "localhost:80", 4)):
        code, out = await say("check", cid, operation, argument, "--json")
        assert code == wanted
        asked = await fleet.client.query("check", container=cid, operation=operation, argument=argument)
        assert json.loads(out) == asked
    code, out = await say("show", cid)
    assert code == 0
    assert "67108864" in out
    await fleet.client.ok(cid, "remove")


async def test_the_node_answers_others_meanwhile(fleet: Fleet) -> None:
    """A denial takes a dozen more profiles; many at once do not hold up a query that takes none."""
    spec = shell("true", network={"access": "none"})
    checks = [
        asyncio.create_task(
            fleet.client.query(
                "check", timeout=30, service="x", spec=spec, operation="read", argument="/none"
            )
        )
        for _ in range(20)
    ]
    assert (await fleet.client.query("info"))["node"] == fleet.client.node
    assert {reply["decision"] for reply in await asyncio.gather(*checks)} == {"deny"}
