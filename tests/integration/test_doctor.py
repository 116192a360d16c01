"""doctor against a real server: with the configuration of a worker, and as a user who may do no more than a node."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import Connect, ServerFactory
from worker.bus.permissions import config_block, node_permissions
from worker.bus.server import EmbeddedServer
from worker.bus.streams import setup_streams

NODE = "mac-1"
SANDFLEET = str(Path(sys.executable).parent / "sandfleet")


async def doctor(tmp_path: Path, *words: str) -> dict[str, dict[str, Any]]:
    """Its findings by check, from a process without any setting of its own."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("SANDFLEET_")}
    env |= {"XDG_RUNTIME_DIR": str(tmp_path), "XDG_DATA_HOME": str(tmp_path / "share")}
    process = await asyncio.create_subprocess_exec(
        SANDFLEET, "doctor", "--json", *words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode in (0, 4), err
    return {one["check"]: one for one in json.loads(out)}


async def confined(start_server: ServerFactory, connect: Connect) -> tuple[EmbeddedServer, Any]:
    server = await start_server(
        config='accounts { A: { jetstream: enabled, users: [ { user: "admin", password: "a" }\n'
        f'{{ user: "node", password: "n"\n{config_block(node_permissions(NODE))} }} ] }} }}'
    )
    return server, await connect(f"nats://admin:a@127.0.0.1:{server.port}")


def configuration(tmp_path: Path, text: str) -> str:
    path = tmp_path / "node.toml"
    path.write_text(f"[node]\ndata_dir = '{tmp_path / 'data'}'\n{text}")
    return str(path)


async def test_the_server_of_the_workers_configuration_is_looked_at(
    start_server: ServerFactory, connect: Connect, tmp_path: Path
) -> None:
    server = await start_server(domain="site", token="s3cret")
    token = tmp_path / "token"
    token.write_text("s3cret")
    token.chmod(0o600)
    path = configuration(
        tmp_path,
        f"[nats]\nurl = 'nats://127.0.0.1:{server.port}'\ntoken_file = '{token}'\nstream_prefix = 'ACME'\n"
        "domain = 'site'\n",
    )
    found = await doctor(tmp_path, "--config", path)
    assert (found["server"]["level"], found["credentials"]["level"]) == ("ok", "ok")
    assert found["ACME_EVT"]["level"] == "fail"
    await setup_streams(await connect(server, domain="site", stream_prefix="ACME"))
    found = await doctor(tmp_path, "--config", path)
    assert [found[check]["level"] for check in ("server", "streams", "clock")] == ["ok"] * 3
    # A flag wins over the file.
    assert (await doctor(tmp_path, "--config", path, "--nats", "nats://127.0.0.1:1"))["server"][
        "level"
    ] == "fail"


@pytest.mark.parametrize("named_by", ["the configuration", "node.json"])
async def test_a_nodes_own_key(
    start_server: ServerFactory, connect: Connect, tmp_path: Path, named_by: str
) -> None:
    server, admin = await confined(start_server, connect)
    name = f"name = '{NODE}'\n" if named_by == "the configuration" else ""
    path = configuration(tmp_path, f"{name}[nats]\nurl = 'nats://node:n@127.0.0.1:{server.port}'\n")
    if named_by == "node.json":
        (tmp_path / "data").mkdir(mode=0o700)
        (tmp_path / "data" / "node.json").write_text(json.dumps({"name": NODE, "machine_id": "m"}))
    missing = await doctor(tmp_path, "--config", path)
    # What it may ask about is missing, and its consumer's stream, too.
    assert {check for check, one in missing.items() if one["level"] == "fail"} == {
        "SANDFLEET_CMD", "SANDFLEET_EVT", "SANDFLEET_LOG",
    }  # fmt: skip
    await setup_streams(admin)
    found = await doctor(tmp_path, "--config", path)
    assert [one for one in found.values() if one["level"] == "fail"] == []
    assert (found["server"]["level"], found["clock"]["level"]) == ("ok", "ok")
    assert (found["nodes"]["level"], found["nodes"]["found"]) == (
        "unknown",
        "not allowed to ask which are there",
    )
    assert found["streams"]["level"] == "unknown"
    assert "not allowed to ask about SANDFLEET_CMD" in found["streams"]["found"]


async def test_a_key_of_another_node_is_no_fault_of_the_server(
    start_server: ServerFactory, connect: Connect, tmp_path: Path
) -> None:
    server, admin = await confined(start_server, connect)
    await setup_streams(admin)
    url = f"nats://node:n@127.0.0.1:{server.port}"
    for named in ((), ("--node", "mac-2")):
        found = await doctor(tmp_path, "--data-dir", str(tmp_path / "data"), "--nats", url, *named)
        assert found["streams"]["level"] == "unknown"
        assert "--node" in found["streams"]["do"]
        assert [one for one in found.values() if one["level"] == "fail"] == []


@pytest.mark.skipif(
    shutil.which("unshare") is None or shutil.which("setpriv") is None, reason="needs util-linux"
)
def test_namespaces_are_tried_and_not_read_from_a_setting() -> None:
    """In a user namespace that allows none below it, without capabilities: as a container engine leaves a process."""
    program = (
        "from worker.cli.doctor_namespaces import namespaces_check, trial\n"
        "found = namespaces_check(trial())\n"
        "print(found.level, found.found, found.do, sep='|')"
    )
    inside = (
        'echo 0 > /proc/sys/user/max_user_namespaces && exec setpriv --bounding-set=-all --inh-caps=-all "$@"'
    )
    argv = [
        "unshare",
        "--user",
        "--map-root-user",
        "/bin/sh",
        "-c",
        inside,
        "sh",
        sys.executable,
        "-c",
        program,
    ]
    tried = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    if tried.returncode != 0 and "unshare" in tried.stderr:
        pytest.skip(f"no user namespace to try it in: {tried.stderr.strip()}")
    level, found, do = tried.stdout.strip().split("|")
    assert level == "warn", tried.stdout
    assert found
    assert "max_user_namespaces" in do
