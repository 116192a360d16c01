"""A worker in a container: it runs sandboxed programs with what the engine allows, and tells what it lacks."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
from docker.models.containers import Container
from testcontainers.core.container import DockerContainer

from tests.acceptance.harness import Client, Server, shell
from tests.containers import no_engine

pytestmark = pytest.mark.timeout(900)

DATA = "/var/lib/sandfleet"
NODE = "boxed"
HEALTHY_S = 60.0
# A program's own folder can be written, the worker's files cannot even be read.
NOSY = f"""
echo "uid $(id -u)"
echo kept > file && cat file
cat {DATA}/launcher.key && echo "read the key"
echo x > {DATA}/planted && echo "wrote beside the journal"
exit 7
"""


class Box:
    """A worker's container, on a volume that outlives it."""

    def __init__(self, image: str, server: Server, images: Path, volume: str) -> None:
        self.made = (
            DockerContainer(image)
            .with_command(["worker", "--setup", "--insecure"])
            .with_env("SANDFLEET_NATS_URL", server.url)
            .with_env("SANDFLEET_NODE", NODE)
            .with_env("SANDFLEET_POLICY_REGISTER_ROOTS", "/images")
            .with_volume_mapping(str(images), "/images", "ro")
            .with_volume_mapping(volume, DATA, "rw")
            .with_kwargs(
                network_mode="host",
                init=True,
                cap_drop=["ALL"],
                security_opt=["no-new-privileges"],
                healthcheck={"interval": 10**9},  # ns; the rest is the image's
            )
        )

    @property
    def container(self) -> Container:
        return self.made.get_wrapped_container()

    def state(self) -> dict[str, Any]:
        self.container.reload()
        return dict(self.container.attrs["State"])

    async def healthy(self) -> None:
        async with asyncio.timeout(HEALTHY_S):
            while (state := self.state())["Health"]["Status"] != "healthy":
                assert state["Running"], self.container.logs().decode()
                await asyncio.sleep(0.1)

    def terminate(self) -> int:
        """Its exit code after the image's own signal."""
        self.container.stop(timeout=30)
        return int(self.state()["ExitCode"])


@pytest.fixture
def volume(client: docker.DockerClient) -> Iterator[str]:
    volume = client.volumes.create(f"sandfleet-test-{uuid.uuid4().hex[:8]}")
    yield str(volume.name)
    volume.remove(force=True)


@pytest.fixture
async def nc(server: Server) -> AsyncIterator[Client]:
    nc = await Client(NODE).connect(server.url)
    yield nc
    await nc.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    if reason := no_engine():
        pytest.skip(reason)
    server = Server(tmp_path / "nats")
    server.start()
    yield server
    server.close()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder that the worker's user can read, with an image to register."""
    tmp_path.chmod(0o755)
    (tmp_path / "images" / "base" / "etc").mkdir(parents=True)
    (tmp_path / "images" / "base" / "etc" / "motd").write_text("hello\n")
    return tmp_path / "images"


async def ready(nc: Client, boots: int) -> dict[str, Any]:
    """The node's description of its `boots`-th start."""

    def is_ready(event: dict[str, Any]) -> bool:
        return bool(event["type"] == "node_changed" and event["state"] == "ready")

    def found(event: dict[str, Any]) -> bool:
        seen = list(dict.fromkeys(e["boot"] for e in nc.events if is_ready(e)))
        return is_ready(event) and event["boot"] in seen[boots - 1 : boots]

    return dict((await nc.event(found, HEALTHY_S))["info"])


def test_the_image(client: docker.DockerClient, worker_image: str, volume: str) -> None:
    config = client.images.get(worker_image).attrs["Config"]
    assert config["User"] == "10001:10001"
    assert config["StopSignal"] == "SIGTERM"
    assert list(config["Volumes"]) == [DATA]
    assert config["Healthcheck"]["Test"][0] == "CMD"
    said = client.containers.run(
        worker_image,
        ["-c", "id -u; ls -ld /var/lib/sandfleet; ls /opt/sandfleet/bin"],
        entrypoint="sh",
        network_mode="none",
        volumes={volume: {"bind": DATA}},
        remove=True,
    ).decode()
    assert said.startswith("10001\ndrwx------")
    assert "nats-server" not in said
    assert "sandfleet\n" in said


async def test_sandboxed_programs_in_a_container(
    worker_image: str, server: Server, images: Path, volume: str, nc: Client
) -> None:
    box = Box(worker_image, server, images, volume)
    try:
        box.made.start()
        await nc.follow()
        info = await ready(nc, 1)
        await box.healthy()
        capable = info["capabilities"]

        await nc.ok(None, "register_image", image="base", source_dir="/images/base")
        await nc.ok("nosy-0", "run", spec=shell(NOSY))
        assert (await nc.state("nosy-0", "exited"))["exit_code"] == 7
        output = bytes((await nc.log("nosy-0")).data).decode()
        assert output == "uid 10001\nkept\n"

        # What the engine withholds is told, and refused to whoever insists on it.
        lacking = {lack["feature"] for lack in capable["not_enforced"] if lack["isolation"] == "process"}
        for limit, field in (("cpu", {"cpu": 0.5}), ("pids", {"pids_limit": 20})):
            assert (limit in capable["limits"]) != (limit in lacking)
            done = await nc.do(f"{limit}-0", "run", spec=shell("exit 0", resources=field))
            assert done.get("ok", False) == (limit in capable["limits"]), done
        rooted = await nc.do("rooted-0", "run", spec=shell("exit 0", sandbox={"isolation": "rootfs"}))
        assert rooted.get("ok", False) == ("rootfs" in capable["isolation"]), rooted
        insists = await nc.do(
            "insists-0", "run", spec=shell("exit 0", sandbox={"require": ["file_metadata"]})
        )
        assert not insists.get("ok", False)
        assert "file_metadata" in json.dumps(insists)
    finally:
        box.made.stop()


async def test_a_new_container_goes_on_with_the_volume(
    worker_image: str, server: Server, images: Path, volume: str, nc: Client
) -> None:
    first = Box(worker_image, server, images, volume)
    try:
        first.made.start()
        await nc.follow()
        before = await ready(nc, 1)
        await nc.ok(None, "register_image", image="base", source_dir="/images/base")
        await nc.ok("web-0", "run", spec=shell("sleep 600"))
        assert first.terminate() == 0
    finally:
        first.made.stop()

    second = Box(worker_image, server, images, volume)
    try:
        second.made.start()
        after = await ready(nc, 2)
        assert (after["epoch"], after["node"]) == (before["epoch"], NODE)
        assert after["boot"] != before["boot"]
        # Programs end with their container, and it is told why.
        assert (await nc.state("web-0", "failed"))["reason"] == "supervisor_lost"
        await nc.ok("web-0", "start")
        await nc.now("web-0", "running")
    finally:
        second.made.stop()
