"""What an image says about how to run it, with the spec on top: through a whole worker, in both isolations."""

import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.acceptance.harness import Fleet, alive, until
from tests.image_maker import layer, put_image
from tests.registry_server import Registry, running
from worker.platform.linux.able import Able

CONFIG = """
[node]
stats_interval_s = 0.5
[policy]
register_roots = ["{images}"]
images = ["*", "localhost:*/*"]
"""
PASSWD = b"root:x:0:0::/:/bin/sh\napp:x:4711:4712::/home/app:/bin/sh\nevil:x:-5:0::/:\n"
GROUP = b"root:x:0:\nstaff:x:4800:\n"
FILES = {
    "etc/passwd": PASSWD,
    "etc/group": GROUP,
    "srv/app/greet": b"#!/bin/sh\necho hello $1 $WHO in $PWD\n",
}

pytestmark = pytest.mark.asyncio(loop_scope="module")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="containers of other users need a worker that is root")
rooted = pytest.param(
    "rootfs",
    marks=pytest.mark.skipif(bool(Able().reason), reason=f"no isolation rootfs here: {Able().reason}"),
)
isolations = pytest.mark.parametrize("isolation", ["process", rooted])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet() -> AsyncIterator[Fleet]:
    async with Fleet(CONFIG) as made:
        for folder in (made.folder, made.folder / "node"):
            folder.chmod(0o711)
        yield made


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with running() as made:
        yield made


async def pulled(fleet: Fleet, registry: Registry, tag: str, **config: Any) -> str:
    """An image of that configuration, on the node; gives its name."""
    put_image(registry, "app", [layer(FILES)], tag, **config)
    name = f"{registry.host}/app:{tag}"
    await fleet.client.ok(None, "pull_image", image=name)
    return name


def spec(image: str, isolation: str, **fields: Any) -> dict[str, Any]:
    return {
        "image": {"name": image},
        "sandbox": {"isolation": isolation},
        "network": {"access": "none"},
        **fields,
    }


def script(text: str) -> dict[str, Any]:
    return {"entrypoint": ["/bin/sh", "-c", f"exec 2>&1; {text}"]}


async def printed(fleet: Fleet, cid: str, asked: dict[str, Any]) -> str:
    """What a container prints before it ends; it must end well."""
    instance = (await fleet.client.ok(cid, "run", spec=asked, replace=True))["result"]["instance"]
    log = await fleet.client.log(cid, instance=instance)
    status = await fleet.client.state(cid, "exited", instance=instance)
    assert status["exit_code"] == 0, log.data.decode()
    return log.data.decode()


@isolations
async def test_the_image_says_how_and_the_spec_comes_first(
    fleet: Fleet, registry: Registry, isolation: str
) -> None:
    image = await pulled(
        fleet,
        registry,
        "greet",
        Entrypoint=["/bin/sh", "./greet"],
        Cmd=["you"],
        Env=["WHO=image", "PATH=/bin:/usr/bin"],
        WorkingDir="/srv/app",
        Labels={"vendor": "acme", "app": "image", "bad\n": "x"},
        StopSignal="SIGINT",
        ExposedPorts={"8080/tcp": {}},
    )
    said = await printed(fleet, "greet-0", spec(image, isolation, labels={"app": "spec"}))
    assert said.startswith("hello you image in ")
    assert said.rstrip().endswith("/srv/app")
    status = await fleet.client.query("state", container="greet-0")
    assert status["labels"] == {"app": "spec", "vendor": "acme"}
    listed = await fleet.client.query("list", labels={"vendor": "acme"})
    assert [one["container"] for one in listed["containers"]] == ["greet-0"]
    asked = spec(
        image,
        isolation,
        env={"WHO": "spec"},
        command={"args": ["/bin/sh", "-c", "echo $WHO in $PWD"], "workdir": "/etc"},
    )
    said = await printed(fleet, "greet-0", asked)
    assert said.startswith("spec in ")
    assert said.rstrip().endswith("/etc")
    shown = await fleet.client.query("image", image=image)
    assert shown["config"]["exposed_ports"] == {"8080/tcp": {}}
    assert shown["config"]["labels"]["vendor"] == "acme"
    assert (shown["containers"], shown["registered"]) == (["greet-0"], False)
    await fleet.client.ok("greet-0", "remove")


@isolations
async def test_the_stop_signal(fleet: Fleet, registry: Registry, isolation: str) -> None:
    image = await pulled(fleet, registry, "stop", StopSignal="SIGINT")
    waiting = script(
        'trap "echo INT; exit 3" INT; trap "echo HUP; exit 4" HUP; trap "" TERM; '
        "echo ready; while :; do sleep 0.05; done"
    )
    for fields, code in (({}, 3), ({"stop_signal": "SIGHUP"}, 4)):
        await fleet.client.ok(
            "stop-0", "run", spec=spec(image, isolation, command=waiting, **fields), replace=True
        )
        await fleet.client.log_seen("stop-0", b"ready\n")
        done = await fleet.client.ok("stop-0", "stop", timeout_s=30)
        assert done["status"]["exit_code"] == code
    await fleet.client.ok("stop-0", "remove")


@as_root
@isolations
@pytest.mark.parametrize(
    ("image_user", "spec_user", "uid", "gid"),
    [
        ("app", None, 4711, 4712),
        ("4711:staff", None, 4711, 4800),
        ("root", "app", 4711, 4712),
        ("app", "5000", 5000, 5000),
        ("app", "5000:4800", 5000, 4800),
        ("app", "root", 0, 0),
        ("", None, 0, 0),
    ],
)
async def test_the_user(
    fleet: Fleet,
    registry: Registry,
    isolation: str,
    image_user: str,
    spec_user: str | None,
    uid: int,
    gid: int,
) -> None:
    image = await pulled(fleet, registry, f"user-{image_user.replace(':', '-') or 'none'}", User=image_user)
    asked = spec(
        image,
        isolation,
        command=script(
            "echo $(id -u) $(id -g) $(id -G); "
            # By the shell itself: under `process` a program reads its own part of /proc only.
            "while read l; do case $l in Cap*|NoNewPrivs*|Uid*|Gid*) echo $l;; esac; done < /proc/self/status; "
            "echo made > file && echo tmp > $TMPDIR/file && echo again > srv/app/greet && mkdir etc/new && "
            "echo out > /dev/stdout && cat file"
        ),
        **({} if spec_user is None else {"user": spec_user}),
    )
    lines = (await printed(fleet, "user-0", asked)).splitlines()
    assert lines[0].split() == [str(uid), str(gid), str(gid)]
    told = dict(line.split(":", 1) for line in lines if ":" in line)
    assert told["Uid"].split() == [str(uid)] * 4
    assert told["Gid"].split() == [str(gid)] * 4
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(told[name], 16) == 0, name
    assert told["NoNewPrivs"].strip() == "1"
    assert lines[-2:] == ["out", "made"]
    rootfs = fleet.folder / "node/data/containers/user-0/rootfs"
    for path in ("file", "etc/passwd", "srv/app"):
        found = (rootfs / path).stat()
        assert (found.st_uid, found.st_gid) == (uid, gid), path
    # The image's own are the worker's, as they were.
    trees = fleet.folder / "node/data/images/rootfs"
    assert {path.stat().st_uid for path in trees.glob("*/**/*")} == {0}
    await fleet.client.ok("user-0", "remove")


@as_root
@isolations
async def test_a_user_has_its_volumes(fleet: Fleet, registry: Registry, isolation: str) -> None:
    image = await pulled(fleet, registry, "volumes", User="app")
    name = f"kept-{isolation}"
    asked = spec(
        image,
        isolation,
        command=script(
            "for v in named anon scratch; do echo $v >> $v/file || exit 1; done; cat named/file; ls -n named | tail -1"
        ),
        storage=[
            {"type": "named", "name": name, "target": "/named"},
            {"type": "anonymous", "target": "/anon"},
            {"type": "tmpfs", "target": "/scratch"},
        ],
    )
    said = await printed(fleet, "volumes-0", asked)
    assert said.splitlines()[0] == "named"
    assert said.split()[3:5] == ["4711", "4712"]
    await fleet.client.ok("volumes-0", "start")
    await fleet.client.state("volumes-0", "exited", run=2, exit_code=0)
    assert (fleet.folder / f"node/data/volumes/{name}/file").read_text() == "named\nnamed\n"
    await fleet.client.ok("volumes-0", "remove")


@as_root
@isolations
async def test_an_exec_is_the_same_user_and_everything_ends(
    fleet: Fleet, registry: Registry, isolation: str
) -> None:
    image = await pulled(fleet, registry, "exec", User="app")
    loop = script("(while :; do sleep 1; done) & echo ready; while :; do sleep 0.05; done")
    await fleet.client.ok("exec-0", "run", spec=spec(image, isolation, command=loop))
    await fleet.client.log_seen("exec-0", b"ready\n")
    reply = await fleet.client.query(
        "exec",
        container="exec-0",
        argv=["/bin/sh", "-c", "id -u; id -G; echo x > made; echo o > /dev/stdout"],
    )
    assert (reply["stdout"], reply["stderr"]) == ("4711\n4712\no\n", "")
    stats = await fleet.client.query("stats", container="exec-0")
    assert stats["processes"] >= 2
    pid = (await fleet.client.query("state", container="exec-0"))["pid"]
    assert Path(f"/proc/{pid}").stat().st_uid == 4711
    await fleet.client.ok("exec-0", "stop", timeout_s=20)
    own = _processes_of(4711)
    assert own == []
    await fleet.client.ok("exec-0", "remove")


def _processes_of(uid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if entry.stat().st_uid == uid:
                    found.append(int(entry.name))
            except FileNotFoundError:
                continue
    return found


@as_root
async def test_a_container_cannot_become_root_by_its_own_files(fleet: Fleet, registry: Registry) -> None:
    image = await pulled(fleet, registry, "passwd", User="app")
    asked = spec(
        image,
        "process",
        command=script("id -u; echo 'app:x:0:0::/:/bin/sh' > etc/passwd"),
    )
    await fleet.client.ok("passwd-0", "run", spec=asked)
    await fleet.client.state("passwd-0", "exited", run=1, exit_code=0)
    await fleet.client.ok("passwd-0", "start")
    await fleet.client.state("passwd-0", "exited", run=2, exit_code=0)
    log = await fleet.client.log("passwd-0", run=2)
    assert log.data == b"4711\n4711\n"
    await fleet.client.ok("passwd-0", "remove")


@as_root
async def test_users_that_cannot_be_had(fleet: Fleet, registry: Registry) -> None:
    image = await pulled(fleet, registry, "plain")
    for user, field, words in (
        ("nobody-there", "spec.user", "no user nobody-there"),
        ("evil", "spec.user", "no user evil"),
        ("app:nogroup", "spec.user", "no group nogroup"),
        (str(2**31), "spec.user", "numbers go up to"),
    ):
        done = await fleet.client.do("bad-0", "create", spec=spec(image, "process", user=user))
        assert (done["error"]["code"], done["error"]["field"]) == ("invalid_spec", field), done["error"]
        assert words in done["error"]["message"]
        await fleet.client.state("bad-0", "removed")
    for config, words in (
        ({"User": "ghost"}, "the image is to run as ghost"),
        ({"StopSignal": "SIGNONE"}, "the image's stop signal"),
        ({"Env": ["no equals sign"]}, "the image's variable 0"),
    ):
        name = await pulled(fleet, registry, f"bad-{next(iter(config)).lower()}", **config)
        done = await fleet.client.do("bad-0", "create", spec=spec(name, "process"))
        assert done["error"]["code"] == "create_failed"
        assert words in done["error"]["message"]
    # Nothing of them is left.
    assert not (fleet.folder / "node/data/containers/bad-0").exists()
    listed = {one["name"]: one["containers"] for one in (await fleet.client.query("images"))["images"]}
    assert listed[image] == 0


@as_root
async def test_accounts_are_never_the_hosts(fleet: Fleet, registry: Registry) -> None:
    """A name that only the host has, by a link that would lead there."""
    folder = fleet.images / "linked"
    (folder / "etc").mkdir(parents=True)
    (folder / "etc/passwd").symlink_to("/etc/passwd")
    await fleet.client.ok(None, "register_image", image="linked", source_dir=str(folder))
    done = await fleet.client.do("linked-0", "create", spec=spec("linked", "process", user="nobody"))
    assert done["error"]["code"] == "invalid_spec"
    assert "no user nobody" in done["error"]["message"]


@as_root
async def test_another_user_outlives_the_worker_and_not_the_launcher(registry: Registry) -> None:
    async with Fleet(CONFIG) as fleet:
        image = await pulled(fleet, registry, "lives", User="app")
        asked = spec(image, "process", command=script("echo ready; while :; do sleep 0.05; done"))
        # A folder above that is closed to others is told at once.
        done = await fleet.client.do("lives-0", "create", spec=asked)
        assert (done["error"]["code"], done["error"]["field"]) == ("create_failed", "spec.user")
        assert str(fleet.folder) in done["error"]["message"]
        for folder in (fleet.folder, fleet.folder / "node"):
            folder.chmod(0o711)
        await fleet.client.ok("lives-0", "run", spec=asked)
        await fleet.client.log_seen("lives-0", b"ready\n")
        status = await fleet.client.query("state", container="lives-0")
        data = fleet.folder / "node/data"
        for closed in ("images", "secrets", "spool", "containers/lives-0/state"):
            assert (data / closed).stat().st_mode & 0o077 == 0, closed
        assert (data / "containers/lives-0").stat().st_mode & 0o777 == 0o710
        fleet.worker.kill()
        fleet.worker.start()
        await fleet.ready(2)
        again = await fleet.client.query("state", container="lives-0")
        assert (again["state"], again["pid"]) == ("running", status["pid"])
        assert "was open to others" not in fleet.worker.log_text()
        reply = await fleet.client.query("exec", container="lives-0", argv=["/usr/bin/id", "-u"])
        assert reply["stdout"] == "4711\n"
        launcher = fleet.worker.launcher_pid()
        assert launcher is not None
        os.kill(launcher, signal.SIGKILL)
        await until(lambda: not alive(status["pid"]))
        await fleet.client.state("lives-0", "failed", reason="supervisor_lost")


async def test_the_node_says_whether_it_can(fleet: Fleet) -> None:
    features = (await fleet.client.query("info"))["api"]["features"]
    assert ("user" in features) == (os.geteuid() == 0)
    assert "ttl_after_finished" in features
