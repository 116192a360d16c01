"""The host API: a server of the operator's on a unix socket, and containers that call it with their tokens."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import os
import socket
import socketserver
import stat
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
import pytest_asyncio

from tests.acceptance.harness import DEADLINE_S, Fleet, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

PYTHON = os.path.realpath(sys.executable)
PREFIX = os.path.realpath(sys.base_prefix)
KEY = os.urandom(32).hex().encode()
TTL_S = 600
SHORT_TTL_S = 4
ALL = ("none", "localhost", "outbound", "full")

# What a container does: `ask(token)` gives the API's answer.
CLIENT = """
import http.client, json, os, socket, sys, time
class Call(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(os.environ["SANDFLEET_API_SOCKET"])
def ask(token):
    call = Call("api")
    call.request("GET", "/", headers={"Authorization": "Bearer " + token})
    answer = call.getresponse()
    text = answer.read().decode()
    call.close()
    return answer.status, text
def filed():
    return open(os.environ["SANDFLEET_TOKEN_FILE"]).read()
def attempt(what, *args):
    try:
        what(*args)
    except OSError as failure:
        return failure.errno
    return "done"
"""
CALLS = (
    CLIENT
    + """
print("env", *ask(os.environ["SANDFLEET_TOKEN"]))
print("file", *ask(filed()))
print("forged", *ask("a" + os.environ["SANDFLEET_TOKEN"]))
sys.stdout.flush()
"""
)
STAYS = (
    CLIENT
    + """
seen = None
while True:
    token = filed()
    if token != seen:
        seen = token
        print("token", *ask(token), flush=True)
    time.sleep(0.05)
"""
)


class Api:
    """The operator's program: checks each token and keeps what it said."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokens: list[str] = []
        api = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                code, body = api.judge(self.headers.get("Authorization", ""))
                self.send_response(code)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def address_string(self) -> str:
                return "container"

            def log_message(self, *_: Any) -> None:
                return None

        class Server(socketserver.ThreadingUnixStreamServer):
            daemon_threads = True
            request_queue_size = 32

        self._server = Server(str(path), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def judge(self, header: str) -> tuple[int, bytes]:
        token = header.removeprefix("Bearer ")
        try:
            said = jwt.decode(token, KEY, algorithms=["HS256"], options={"require": ["sub", "iat", "exp"]})
        except jwt.InvalidTokenError as failure:
            return 401, type(failure).__name__.encode()
        self.tokens.append(token)
        return 200, json.dumps(said, sort_keys=True).encode()

    def said(self, cid: str) -> list[dict[str, Any]]:
        """The claims of every token of a container that was good when it was shown."""
        options: Any = {"verify_exp": False}
        every = (jwt.decode(t, KEY, algorithms=["HS256"], options=options) for t in list(self.tokens))
        return [claims for claims in every if claims["container"] == cid]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)
        self.path.unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def node(folder: Path, **settings: Any) -> AsyncIterator[tuple[Fleet, Api]]:
    """A fleet whose node has a host API, in a folder that is not the node's own."""
    secret = folder / "api.key"
    secret.write_bytes(KEY + b"\n")
    secret.chmod(0o600)
    known = {
        "url": "http://api",
        "socket": str(folder / "api.sock"),
        "secret_file": str(secret),
        "ttl_s": TTL_S,
    }
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in {**known, **settings}.items())
    grants = f'[policy]\nregister_roots = ["{{images}}"]\nread = ["{{prefix}}", "{folder}/readable"]\n'
    api = Api(folder / "api.sock")
    try:
        async with Fleet(f"[host_api]\n{lines}\n{grants}") as fleet:
            await fleet.register("base")
            yield fleet, api
    finally:
        api.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Fleet, Api]]:
    async with node(tmp_path_factory.mktemp("api")) as made:
        yield made


def program(code: str, access: str = "localhost", **spec: Any) -> dict[str, Any]:
    return {
        "image": {"name": "base"},
        "command": {"entrypoint": [PYTHON, "-c", code]},
        "sandbox": {"read": [PREFIX]},
        "network": {"access": access},
        **spec,
    }


async def output(fleet: Fleet, cid: str, spec: dict[str, Any]) -> str:
    """What a container printed, errors included."""
    instance = (await fleet.client.ok(cid, "run", spec=spec))["result"]["instance"]
    log = await fleet.client.log(cid, instance=instance)
    errors = await fleet.client.log(cid, "stderr", instance=instance)
    await fleet.client.ok(cid, "remove")
    return (log.data + errors.data).decode()


@pytest.mark.parametrize("access", ALL)
async def test_a_container_calls_the_api_at_every_level(
    running: tuple[Fleet, Api], cid: str, access: str
) -> None:
    fleet, api = running
    before = time.time()
    seen = await output(fleet, cid, program(CALLS, access))
    lines = [line.split(" ", 2) for line in seen.splitlines()]
    assert [(kind, code) for kind, code, _ in lines] == [
        ("env", "200"),
        ("file", "200"),
        ("forged", "401"),
    ], seen
    for said in (json.loads(lines[0][2]), json.loads(lines[1][2])):
        assert set(said) == {"sub", "container", "instance", "node", "iat", "exp"}
        assert (said["container"], said["node"]) == (cid, "n1")
        assert said["sub"] == cid.rpartition("-")[0]
        assert said["exp"] - said["iat"] == TTL_S
        assert int(before) <= said["iat"] <= time.time()
    assert lines[0][2] == lines[1][2]
    assert len(api.said(cid)) == 2


@pytest.fixture
def stranger(running: tuple[Fleet, Api]) -> Iterator[tuple[str, list[int]]]:
    """Another server of the same user, and how often it was connected to."""
    path = str(running[1].path.parent / "stranger.sock")
    calls: list[int] = []
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(64)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                server.accept()[0].close()
                calls.append(1)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with socket.socket(socket.AF_UNIX) as control:
        control.connect(path)  # it can be reached from outside
    yield path, calls
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join(5)
    os.unlink(path)


@pytest.mark.parametrize("access", ALL)
async def test_no_other_socket_can_be_reached(
    running: tuple[Fleet, Api], stranger: tuple[str, list[int]], cid: str, access: str
) -> None:
    fleet, api = running
    path, calls = stranger
    code = (
        CLIENT
        + f"""
api, other = {str(api.path)!r}, {path!r}
print("other", attempt(socket.socket(socket.AF_UNIX).connect, other))
turned = socket.socket(socket.AF_UNIX)
print("again", attempt(turned.connect, other), attempt(turned.connect, api), attempt(turned.connect, other))
pair, _ = socket.socketpair()
print("pair", attempt(pair.connect, other))
print("datagram", attempt(socket.socket, socket.AF_UNIX, socket.SOCK_DGRAM))
print("packets", attempt(socket.socket, socket.AF_UNIX, socket.SOCK_SEQPACKET))
print("abstract", attempt(socket.socket(socket.AF_UNIX).connect, "\\0" + other))
os.chdir(os.environ["TMPDIR"])
print("serve", attempt(socket.socket(socket.AF_UNIX).bind, "own.sock"))
print("api", *ask(filed())[:1])
"""
    )
    seen = dict(line.split(" ", 1) for line in (await output(fleet, cid, program(code, access))).splitlines())
    assert seen == {
        "other": "13",
        "again": "13 done 106",  # EACCES, then EISCONN: it is connected to the API for good
        "pair": "106",
        "datagram": "13",
        "packets": "13",
        "abstract": "13",
        "serve": "13",
        "api": "200",
    }, seen
    await until(lambda: len(calls) >= 1, what="the control's connection")
    assert len(calls) == 1


async def test_threads_that_change_address_and_descriptor_get_nowhere(
    running: tuple[Fleet, Api], stranger: tuple[str, list[int]], cid: str
) -> None:
    """A call that goes on in the kernel may be another by then: the kernel itself must refuse what it becomes."""
    fleet, api = running
    path, calls = stranger
    code = (
        CLIENT
        + f"""
import ctypes, threading
libc = ctypes.CDLL(None, use_errno=True)
def address(path):
    return b"\\1\\0" + path.encode().ljust(108, b"\\0")
api, other = address({str(api.path)!r}), address({path!r})
buffer = ctypes.create_string_buffer(api, 110)
tcp = socket.socket()
fd = os.dup(tcp.fileno())
going = True
def change():
    while going:
        ctypes.memmove(buffer, other, 110)
        one = socket.socket(socket.AF_UNIX)
        os.dup2(one.fileno(), fd)
        one.close()
        ctypes.memmove(buffer, api, 110)
        os.dup2(tcp.fileno(), fd)
threads = [threading.Thread(target=change) for _ in range(2)]
for thread in threads: thread.start()
tried = 0
until = time.monotonic() + 2
while time.monotonic() < until:
    libc.connect(fd, buffer, 110)
    tried += 1
going = False
for thread in threads: thread.join()
print("tried", tried)
"""
    )
    seen = await output(fleet, cid, program(code, "outbound"))
    assert seen.startswith("tried "), seen
    assert int(seen.split()[1]) > 100
    await until(lambda: len(calls) >= 1, what="the control's connection")
    assert len(calls) == 1


async def test_tcp_keeps_its_rules(running: tuple[Fleet, Api], cid: str) -> None:
    fleet, _ = running
    with socket.create_server(("127.0.0.1", 0)) as named, socket.create_server(("127.0.0.1", 0)) as other:
        code = CLIENT + "".join(
            f"print(attempt(socket.create_connection, ('127.0.0.1', {server.getsockname()[1]}), 5))\n"
            for server in (named, other)
        )
        spec = program(code, network={"access": "localhost", "connect_ports": [named.getsockname()[1]]})
        assert (await output(fleet, cid, spec)).split() == ["done", "13"]


async def test_the_token_can_be_read_and_nothing_else_of_it(running: tuple[Fleet, Api], cid: str) -> None:
    fleet, api = running
    code = (
        CLIENT
        + f"""
path = os.environ["SANDFLEET_TOKEN_FILE"]
print(os.listdir(os.path.dirname(path)))
print(attempt(open, path, "a"), attempt(os.unlink, path), attempt(os.rename, path, path + "2"))
print(attempt(open, os.path.dirname(path) + "/more", "w"))
print(attempt(open, {str(api.path.parent / "api.key")!r}))
"""
    )
    seen = (await output(fleet, cid, program(code))).splitlines()
    assert seen == ["['token']", "13 13 13", "13", "13"], seen


async def test_a_spec_cannot_forge_what_the_node_sets(running: tuple[Fleet, Api], cid: str) -> None:
    fleet, api = running
    names = ["SANDFLEET_API_SOCKET", "SANDFLEET_API_URL", "SANDFLEET_TOKEN", "ZLAYER_TOKEN", "ZLAYER_SOCKET"]
    code = (
        CLIENT
        + "print(ask(os.environ['ZLAYER_TOKEN'])[0]); print(os.environ['ZLAYER_API_URL'], os.environ['ZLAYER_SOCKET'])"
    )
    seen = await output(fleet, cid, program(code, env=dict.fromkeys(names, "forged")))
    assert seen.split() == ["200", "http://api", str(api.path)]


async def test_a_container_with_a_root_of_its_own(running: tuple[Fleet, Api], cid: str) -> None:
    fleet, api = running
    if "rootfs" not in (await fleet.client.query("info"))["capabilities"]["isolation"]:
        pytest.skip("this node has no isolation rootfs")
    code = (
        CALLS
        + "print('other', attempt(open, os.environ['SANDFLEET_TOKEN_FILE'], 'w'), os.path.exists(os.environ['ZLAYER_SOCKET']))"
    )
    spec = program(code, sandbox={"read": [PREFIX], "isolation": "rootfs"})
    lines = [line.split(" ")[:2] for line in (await output(fleet, cid, spec)).splitlines()]
    assert lines == [["env", "200"], ["file", "200"], ["forged", "401"], ["other", "30"]], lines  # EROFS
    assert len(api.said(cid)) == 2


async def test_an_exec_has_the_same_variables_and_a_token_of_its_own(
    running: tuple[Fleet, Api], cid: str
) -> None:
    fleet, api = running
    await fleet.client.ok(cid, "run", spec=program(STAYS, "none"))
    first = await shown(api, cid, 1)
    names = "n for n in os.environ if 'API' in n or 'TOKEN' in n or n == 'ZLAYER_SOCKET'"
    code = (
        CLIENT + f"print(*sorted({names})); print(*ask(os.environ['SANDFLEET_TOKEN'])); print(*ask(filed()))"
    )
    done = await fleet.client.query("exec", container=cid, argv=[PYTHON, "-c", code])
    assert done["exit_code"] == 0, done
    told, own, filed = done["stdout"].splitlines()
    assert told.split() == [
        "SANDFLEET_API_SOCKET", "SANDFLEET_API_URL", "SANDFLEET_TOKEN", "SANDFLEET_TOKEN_FILE",
        "ZLAYER_API_URL", "ZLAYER_SOCKET", "ZLAYER_TOKEN",
    ]  # fmt: skip
    for code, text in (line.split(" ", 1) for line in (own, filed)):
        assert code == "200"
        assert json.loads(text)["instance"] == first["instance"]
    await fleet.client.ok(cid, "remove")


async def test_an_api_that_is_down_refuses_and_is_there_again(tmp_path: Path, cid: str) -> None:
    async with node(tmp_path) as (fleet, api):
        code = (
            CLIENT
            + """
def state():
    try: return ask(filed())[0]
    except OSError as failure: return failure.errno
seen = None
while True:
    if (now := state()) != seen:
        seen = now
        print("state", now, flush=True)
    time.sleep(0.02)
"""
        )
        await fleet.client.ok(cid, "run", spec=program(code, "none"))
        await fleet.client.log_seen(cid, b"state 200\n")
        api.close()
        await fleet.client.log_seen(cid, b"state 2\n")  # ENOENT
        again = Api(api.path)
        try:
            await fleet.client.log_seen(cid, b"state 200\n")
        finally:
            again.close()
        await fleet.client.ok(cid, "remove")


async def test_the_file_is_renewed_through_the_workers_death_and_nothing_is_left(tmp_path: Path) -> None:
    async with node(tmp_path, ttl_s=SHORT_TTL_S) as (fleet, api):
        client, worker = fleet.client, fleet.worker
        await client.ok("long-0", "run", spec=program(STAYS, "none"))
        first = await shown(api, "long-0", 1)
        second = await shown(api, "long-0", 2)
        assert second["iat"] > first["iat"]
        assert second["instance"] == first["instance"]

        before = await client.query("state", container="long-0")
        worker.kill()
        dead_since = time.time()
        worker.start()
        await fleet.ready(boots=2)
        after = await client.query("state", container="long-0", spec=True)
        assert (after["pid"], after["run"]) == (before["pid"], before["run"])
        await until(lambda: api.said("long-0")[-1]["iat"] > dead_since, what="a token of the next worker")
        assert (await shown(api, "long-0", 4))["instance"] == first["instance"]

        file = worker.data / "containers" / "long-0" / "api" / "token"
        found = file.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o400, os.geteuid())
        profile = await client.query("profile", container="long-0")
        told = json.dumps([after, profile, client.events]) + worker.log_text()
        assert_no_secret(told.encode(), api.tokens, "what the node tells")
        for path in worker.data.rglob("*"):
            if path.is_file() and path != file and not path.is_socket():
                assert_no_secret(path.read_bytes(), api.tokens, str(path))

        folder = file.parent.parent
        await client.ok("long-0", "remove")
        assert not folder.exists()
        assert not list((worker.data / "containers").iterdir())


def assert_no_secret(content: bytes, tokens: list[str], where: str) -> None:
    assert KEY not in content, where
    assert len(set(tokens)) >= 3
    for token in tokens:
        assert token.encode() not in content, where


async def shown(api: Api, cid: str, count: int) -> dict[str, Any]:
    """What the `count`th good token of a container said."""
    await until(lambda: len(api.said(cid)) >= count, what=f"{count} tokens of {cid}")
    return api.said(cid)[count - 1]


@pytest.mark.parametrize(
    ("settings", "spoil", "text"),
    [
        ({"secret_file": "/nowhere/api.key"}, None, "/nowhere/api.key"),
        ({}, 0o644, "mode 0644"),
        ({"ttl_s": 1}, None, "host_api.ttl_s"),
        ({"socket": "{data}/api.sock"}, None, "data directory"),
    ],
)
async def test_a_section_that_cannot_work_is_refused_in_one_line(
    tmp_path: Path, settings: dict[str, Any], spoil: int | None, text: str
) -> None:
    async with Fleet('[policy]\nregister_roots = ["{images}"]\n') as fleet:
        assert fleet.worker.terminate() == 0
        secret = tmp_path / "api.key"
        secret.write_bytes(KEY)
        secret.chmod(spoil or 0o600)
        known = {"socket": str(tmp_path / "api.sock"), "secret_file": str(secret), **settings}
        lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in known.items())
        fleet.worker.config.write_text(f"[host_api]\n{lines}\n".replace("{data}", str(fleet.worker.data)))
        logged = len(fleet.worker.log_text())
        fleet.worker.start()
        process = fleet.worker.process
        assert process is not None
        await asyncio.to_thread(process.wait, DEADLINE_S)
        assert process.returncode not in (0, None)
        fleet.worker.process = None
        said = fleet.worker.log_text()[logged:].strip().splitlines()
        assert text in said[-1], said
        assert "Traceback" not in "".join(said)
        assert KEY.decode() not in "".join(said)
