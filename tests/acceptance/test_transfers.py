"""Images packed, loaded, pushed and saved, and a container's files exported: over NATS and by the command line."""

import asyncio
import base64
import hashlib
import io
import json
import os
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.acceptance.harness import BIN, Fleet, new_id
from tests.registry_server import Registry, running

CONFIG = """
[policy]
register_roots = ["{images}"]
read = ["{prefix}"]
images = ["*", "localhost:*/*"]
push = ["localhost:*/team/*"]

[policy.registry_secrets]
hub = ["localhost:*"]
other = ["ghcr.io"]
"""
PIECE = 256 * 1024

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet() -> AsyncIterator[Fleet]:
    async with Fleet(CONFIG) as made:
        secrets = made.folder / "node" / "data" / "secrets"
        for name, text in (("hub", "ann:s3cret"), ("other", "x:y")):
            (secrets / name).write_text(text)
            (secrets / name).chmod(0o600)
        yield made


@pytest.fixture(scope="module")
def registry() -> Any:
    with running(auth="basic", users={"ann": "s3cret"}) as made:
        yield made


class Shell:
    """`sandfleet` with the fleet's server and a home of its own."""

    def __init__(self, fleet: Fleet, home: Path) -> None:
        self.fleet = fleet
        self.home = home

    async def __call__(
        self, verb: str, *argv: str | Path, given: bytes = b"", connect: bool = True
    ) -> tuple[int, bytes, str]:
        place = ("--nats", self.fleet.server.url, "--node", self.fleet.client.node) if connect else ()
        process = await asyncio.create_subprocess_exec(
            str(BIN / "sandfleet"), verb, *map(str, argv), *place,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "HOME": str(self.home), "DOCKER_CONFIG": str(self.home / "docker")}, cwd=self.home,
        )  # fmt: skip
        out, err = await process.communicate(given)
        return process.returncode or 0, out, err.decode()

    async def ok(self, verb: str, *argv: str | Path, given: bytes = b"", connect: bool = True) -> bytes:
        code, out, err = await self(verb, *argv, given=given, connect=connect)
        assert code == 0, err
        return out


@pytest.fixture
def shell(fleet: Fleet, tmp_path: Path) -> Shell:
    return Shell(fleet, tmp_path)


def source(fleet: Fleet, name: str, files: dict[str, bytes] | None = None) -> Path:
    """A folder that may be registered."""
    top = fleet.images / name
    for path, content in (
        files or {"bin/hello": b"#!/bin/sh\necho hello\nsleep 600\n", "data": b"x" * 5000}
    ).items():
        (top / path).parent.mkdir(parents=True, exist_ok=True)
        (top / path).write_bytes(content)
        (top / path).chmod(0o755)
    return top


def events(fleet: Fleet, kind: str, **fields: Any) -> list[dict[str, Any]]:
    return [
        event
        for event in fleet.client.events
        if event["type"] == kind and all(event[key] == value for key, value in fields.items())
    ]


async def digest_of(fleet: Fleet, name: str) -> str | None:
    listed = (await fleet.client.query("images"))["images"]
    return next((one["digest"] for one in listed if one["name"] == name), None)


# -- pack and load


async def test_packed_loaded_run(fleet: Fleet, shell: Shell) -> None:
    top = source(fleet, "app")
    out = await shell.ok("pack", top, "app:1", "--cmd", "/bin/sh bin/hello")
    digest = out.decode().split()[1]
    assert await digest_of(fleet, "app:1") == digest
    (changed,) = events(fleet, "image_changed", image="app:1")
    assert (changed["action"], changed["digest"]) == ("loaded", digest)
    assert sorted(path.name for path in fleet.images.iterdir() if path.name.startswith(".")) == []
    await fleet.client.ok("packed-0", "run", spec={"image": {"name": "app:1", "pull_policy": "never"}})
    await fleet.client.log_seen("packed-0", b"hello\n")
    await fleet.client.ok("packed-0", "remove")
    # The same again, by other means: an archive, and a load by hand.
    archive = fleet.images / "app.tar"
    out = await shell.ok(
        "pack", top, "app:1", "--cmd", '["/bin/sh", "bin/hello"]', "-o", archive, "--json", connect=False
    )
    assert json.loads(out)["digest"] == digest
    assert await shell.ok("load", archive, "--name", "again:1") == f"again:1  {digest}\n".encode()


async def test_a_load_and_what_it_tells(fleet: Fleet, shell: Shell) -> None:
    archive = fleet.images / "told.tar"
    await shell.ok(
        "pack", source(fleet, "told"), "told:1", "-o", archive, "--platform", "plan9/mips", connect=False
    )
    command = {"source_file": str(archive), "id": new_id()}
    await fleet.client.publish(
        f"sandfleet.v1.cmd.{fleet.client.node}._.load_image",
        json.dumps({"type": "load_image", **command}).encode(),
    )
    done = await fleet.client.completion(command["id"])
    assert done["ok"], done
    digest = done["result"]["digest"]
    assert done["result"]["images"] == [{"image": "told:1", "digest": digest}]
    assert "made for plan9/mips" in done["result"]["warnings"][0]
    # The same id executes nothing, another one gives the same.
    await fleet.client.publish(
        f"sandfleet.v1.cmd.{fleet.client.node}._.load_image",
        json.dumps({"type": "load_image", **command}).encode(),
    )
    assert (await fleet.client.completion(command["id"], duplicate=True))["result"] == done["result"]
    again = await fleet.client.ok(None, "load_image", source_file=str(archive))
    assert again["result"] == done["result"]


async def test_what_may_not_be_loaded(fleet: Fleet, shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "outside.tar").write_bytes(b"")
    (fleet.images / "bad.tar").write_bytes(b"hello" * 1000)
    (fleet.images / "leads-out.tar").unlink(missing_ok=True)
    (fleet.images / "leads-out.tar").symlink_to(tmp_path / "outside.tar")
    images = str(fleet.images)
    for fields, code, field in (
        ({"source_file": str(tmp_path / "outside.tar")}, "policy_denied", "source_file"),
        ({"source_file": f"{images}/leads-out.tar"}, "policy_denied", "source_file"),
        ({"source_file": str(fleet.folder / "node/data/worker.db")}, "policy_denied", "source_file"),
        ({"source_file": f"{images}/missing.tar"}, "pull_failed", "source_file"),
        ({"source_file": f"{images}/bad.tar"}, "pull_failed", "source_file"),
        ({"source_file": images}, "pull_failed", "source_file"),
    ):
        done = await fleet.client.do(None, "load_image", **fields)
        assert (done["error"]["code"], done["error"]["field"]) == (code, field), done["error"]
    await shell.ok("pack", source(fleet, "x"), "ghcr.io/x:1", "-o", fleet.images / "x.tar", connect=False)
    for fields in ({"source_file": "relative.tar"}, {"source_file": "/x", "image": "a b"}, {"source_file": "/x", "y": 1}):  # fmt: skip
        done = await fleet.client.do(None, "load_image", **fields)
        assert done["type"] == "command_rejected"
    code, _, err = await shell("load", tmp_path / "outside.tar")
    assert code == 4
    assert "register_roots" in err


# -- push


async def test_a_push_by_the_node(fleet: Fleet, shell: Shell, registry: Registry) -> None:
    out = await shell.ok("pack", source(fleet, "pushed"), "pushed:1", "--label", "a=b")
    digest = out.decode().split()[1]
    target = f"{registry.host}/team/pushed:1"
    done = await fleet.client.ok(None, "push_image", image="pushed:1", target=target, auth="hub")
    assert done["result"]["digest"] == digest
    assert done["result"]["sent"] == 2
    assert registry.tags["team/pushed"]["1"] == digest
    again = await fleet.client.ok(None, "push_image", image="pushed:1", target=target, auth="hub")
    assert (again["result"]["digest"], again["result"]["sent"]) == (digest, 0)
    pulled = await fleet.client.ok(None, "pull_image", image=target, auth="hub", policy="always")
    assert pulled["result"]["digest"] == digest
    out = await shell.ok("push", "pushed:1", "--to", f"{registry.host}/team/other:2", "--auth", "hub")
    assert out.decode() == f"{registry.host}/team/other:2  {digest}\n"
    assert "s3cret" not in fleet.worker.log_text()


async def test_a_registered_image_is_packed_and_pushed(
    fleet: Fleet, shell: Shell, registry: Registry
) -> None:
    top = source(fleet, "registered")
    os.utime(top / "data", ns=(10**18, 10**18 + 7))
    await fleet.client.ok(None, "register_image", image="registered:1", source_dir=str(top))
    target = f"{registry.host}/team/registered:1"
    first = await fleet.client.ok(None, "push_image", image="registered:1", target=target, auth="hub")
    again = await fleet.client.ok(None, "push_image", image="registered:1", target=target, auth="hub")
    assert first["result"]["digest"] == again["result"]["digest"]
    pulled = await fleet.client.ok(None, "pull_image", image=target, auth="hub")
    assert pulled["result"]["digest"] == first["result"]["digest"]
    await shell.ok("save", target, "-o", "pulled.tar")
    with tarfile.open(shell.home / "pulled.tar") as outer:
        blobs = {m.name: outer.extractfile(m).read() for m in outer if m.isfile()}  # type: ignore[union-attr]
    manifest = json.loads(blobs[f"blobs/sha256/{first['result']['digest'].removeprefix('sha256:')}"])
    layer = blobs[manifest["layers"][0]["digest"].replace("sha256:", "blobs/sha256/")]
    with tarfile.open(fileobj=io.BytesIO(layer)) as inner:
        assert inner.getmember("data").mtime == pytest.approx(10**9, abs=1e-3)


async def test_what_may_not_be_pushed(fleet: Fleet, shell: Shell, registry: Registry) -> None:
    await shell.ok("pack", source(fleet, "kept"), "kept:1")
    asked = len(registry.seen)
    allowed = f"{registry.host}/team/kept:1"
    for fields, code, field in (
        ({"target": f"{registry.host}/kept:1"}, "policy_denied", "target"),
        ({"target": "ghcr.io/acme/kept:1"}, "policy_denied", "target"),
        ({"target": allowed, "auth": "other"}, "policy_denied", "auth"),
        ({"target": allowed, "auth": "unknown"}, "policy_denied", "auth"),
        ({"target": f"{allowed}@sha256:{'0' * 64}"}, "invalid_command", "target"),
        ({"target": allowed, "image": "nothing:1"}, "not_found", "image"),
    ):
        done = await fleet.client.do(None, "push_image", **{"image": "kept:1", **fields})
        assert (done["error"]["code"], done["error"]["field"]) == (code, field), done["error"]
    assert len(registry.seen) == asked
    done = await fleet.client.do(None, "push_image", image="kept:1", target=allowed)
    assert (done["error"]["code"], done["error"]["field"]) == ("pull_failed", "target")
    with running() as gone:
        away = f"{gone.host}/team/kept:1"
    code, _, err = await shell("push", "kept:1", "--to", f"{registry.host}/kept:1")
    assert code == 4
    assert "push" in err
    command = await fleet.client.send(None, "push_image", image="kept:1", target=away)
    done = await fleet.client.completion(command)
    assert (done["error"]["code"], done["error"]["field"]) == ("unavailable", "target")


async def test_login_push_logout(shell: Shell, fleet: Fleet, registry: Registry) -> None:
    top = source(fleet, "own")
    await shell.ok("pack", top, "own:1", "-o", "own.tar", connect=False)
    target = f"{registry.host}/own:1"
    code, _, err = await shell("push", "--archive", "own.tar", target)
    assert code == 4
    assert "log in" in err
    login = ("login", registry.host, "-u", "ann", "--password-stdin")
    code, _, err = await shell(*login, given=b"wrong\n", connect=False)
    assert code == 4
    assert "refused" in err
    config = shell.home / "docker" / "config.json"
    assert not config.exists()
    assert await shell.ok(*login, given=b"s3cret\n", connect=False) == f"{registry.host}  ann\n".encode()
    assert config.stat().st_mode & 0o777 == 0o600
    out = await shell.ok("push", "--archive", "own.tar", target)
    assert registry.tags["own"]["1"] == out.decode().split()[1]
    out = await shell.ok("pack", top, f"{registry.host}/packed:1", "--push", "--json", connect=False)
    assert registry.tags["packed"]["1"] == json.loads(out)["digest"] == registry.tags["own"]["1"]
    await shell.ok("logout", registry.host, connect=False)
    assert json.loads(config.read_text()) == {"auths": {}}
    code, _, err = await shell("push", "--archive", "own.tar", f"{registry.host}/own:2")
    assert code == 4


# -- save


async def test_saved_and_loaded_again(fleet: Fleet, shell: Shell) -> None:
    out = await shell.ok("pack", source(fleet, "saved", {"noise": os.urandom(3 << 20), "x": b"1"}), "saved:1")
    digest = out.decode().split()[1]
    await fleet.client.ok(None, "tag_image", source="saved:1", target="registry.lan/saved:2")
    await fleet.client.ok(None, "register_image", image="folder:1", source_dir=str(source(fleet, "folder")))
    archive = fleet.images / "saved.tar"
    archive.unlink(missing_ok=True)
    out = await shell.ok("save", "saved:1", "registry.lan/saved:2", "folder:1", "-o", archive, "--json")
    assert json.loads(out)["bytes"] == archive.stat().st_size
    piped = await shell.ok("save", "saved:1", "registry.lan/saved:2", "folder:1")
    assert piped == archive.read_bytes()
    for name in ("saved:1", "registry.lan/saved:2"):
        await fleet.client.ok(None, "remove_image", image=name)
    await fleet.client.ok(None, "prune_images")
    assert await digest_of(fleet, "saved:1") is None
    loaded = (await shell.ok("load", archive)).decode().splitlines()
    assert loaded[:2] == [f"saved:1  {digest}", f"registry.lan/saved:2  {digest}"]
    code, _, err = await shell("save", "nothing:1", "-o", "nothing.tar")
    assert (code, "nothing:1" in err) == (3, True)
    assert not (shell.home / "nothing.tar").exists()


# -- export


async def running_container(fleet: Fleet, shell: Shell, cid: str, script: str) -> None:
    top = source(fleet, "base", {"keep/me": b"kept\n", "noise": os.urandom(6 << 20)})
    (top / "link").unlink(missing_ok=True)
    (top / "link").symlink_to("/etc/passwd")
    await fleet.client.ok(None, "register_image", image="base:1", source_dir=str(top))
    spec = {
        "image": {"name": "base:1", "pull_policy": "never"},
        "command": {"args": ["/bin/sh", "-c", script]},
    }
    await fleet.client.ok(cid, "run", spec=spec)
    await fleet.client.log_seen(cid, b"ready\n")


async def test_a_running_container_is_exported(fleet: Fleet, shell: Shell) -> None:
    script = "ln keep/me hard; mkfifo pipe; echo new > made; echo ready; while :; do date > busy; rm -f gone; : > gone; done"
    await running_container(fleet, shell, "exported-0", script)
    out = await shell.ok("export", "exported-0", "-o", "all.tar", "--json")
    told = json.loads(out)
    assert told["bytes"] == (shell.home / "all.tar").stat().st_size
    assert told["notes"] == ["pipe: a socket, fifo or device, left out"]
    with tarfile.open(shell.home / "all.tar") as archive:
        members = {member.name: member for member in archive}
        assert archive.extractfile("made").read() == b"new\n"  # type: ignore[union-attr]
        assert archive.extractfile("noise").read() == (fleet.images / "base/noise").read_bytes()  # type: ignore[union-attr]
        first, second = sorted(("hard", "keep/me"))
        assert {members[first].type, members[second].type} == {tarfile.REGTYPE, tarfile.LNKTYPE}
    assert (members["link"].type, members["link"].linkname) == (tarfile.SYMTYPE, "/etc/passwd")
    assert "pipe" not in members
    assert members["noise"].mode == 0o755
    await fleet.client.ok("exported-0", "stop", timeout_s=0)
    piped = await shell.ok("export", "exported-0")
    with tarfile.open(fileobj=io.BytesIO(piped)) as archive:
        assert set(archive.getnames()) >= {"made", "noise", "link", "hard", "keep", "keep/me"}
    await fleet.client.ok("exported-0", "remove")
    code, _, _ = await shell("export", "exported-0", "-o", "gone.tar")
    assert code == 3
    assert not (shell.home / "gone.tar").exists()


async def test_pieces_are_asked_for_by_their_place(fleet: Fleet, shell: Shell) -> None:
    await running_container(fleet, shell, "pieces-0", "echo ready; sleep 600")
    session = new_id()

    async def ask(offset: int, acked: int = 0, **more: Any) -> dict[str, Any]:
        fields = {"session": session, "container": "pieces-0", "offset": offset, "acked": acked, **more}
        return await fleet.client.query("export", **fields)

    first = await ask(0)
    while not first["ready"]:
        first = await ask(0)
    assert len(base64.b64decode(first["data"])) == PIECE
    assert await ask(0) == first  # its answer was lost
    third = await ask(2 * PIECE)
    second = await ask(PIECE)
    assert await ask(2 * PIECE) == third
    assert (await ask(0, acked=PIECE))["error"]["code"] == "invalid_command"
    assert (await ask(PIECE, acked=PIECE)) == second
    assert (await ask(17))["error"]["field"] == "offset"
    assert (await ask(200 * PIECE, acked=PIECE))["error"]["code"] == "resource_exhausted"
    data = b"".join(base64.b64decode(one["data"]) for one in (first, second, third))
    while not (reply := await ask(len(data), acked=len(data)))["eof"]:
        data += base64.b64decode(reply["data"])
    data += base64.b64decode(reply["data"])
    assert reply["total"] == len(data)
    assert reply["sha256"] == hashlib.sha256(data).hexdigest()
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert "noise" in archive.getnames()
    assert (await ask(len(data), acked=len(data)))["eof"]
    assert (await ask(PIECE))["error"]["code"] == "not_found"
    # One session is for one container.
    session = new_id()
    await ask(0)
    assert (await ask(0, container="missing-0"))["error"]["code"] == "not_found"
    assert (await fleet.client.query("save", session=session, images=["base:1"]))["error"][
        "code"
    ] == "conflict"
    assert (await fleet.client.query("save", session=new_id(), images=[]))["error"]["field"] == "images"
    await fleet.client.ok("pieces-0", "remove")


async def test_a_container_that_is_replaced_ends_its_export(fleet: Fleet, shell: Shell) -> None:
    await running_container(fleet, shell, "replaced-0", "echo ready; sleep 600")
    fields = {"session": new_id(), "container": "replaced-0"}
    assert "error" not in await fleet.client.query("export", **fields)
    await fleet.client.ok("replaced-0", "create", spec={"image": {"name": "base:1"}}, replace=True)
    reply = await fleet.client.query("export", **fields, offset=PIECE)
    assert reply["error"]["code"] == "conflict"
    await fleet.client.ok("replaced-0", "remove")


async def test_there_are_so_many_sessions_and_no_more(fleet: Fleet, shell: Shell) -> None:
    await running_container(fleet, shell, "many-0", "echo ready; sleep 600")
    sessions = [new_id() for _ in range(12)]
    replies = [await fleet.client.query("export", session=one, container="many-0") for one in sessions]
    refused = [reply for reply in replies if "error" in reply]
    assert refused
    assert {reply["error"]["code"] for reply in refused} == {"resource_exhausted"}
    for session in sessions:
        reply = {"eof": False}
        offset = 0
        while not reply["eof"] and "error" not in reply:
            reply = await fleet.client.query(
                "export", session=session, container="many-0", offset=offset, acked=offset
            )
            offset += len(base64.b64decode(reply.get("data", "")))
        await fleet.client.query("export", session=session, container="many-0", offset=offset, acked=offset)
    await shell.ok("export", "many-0", "-o", "fine.tar")
    await fleet.client.ok("many-0", "remove")
