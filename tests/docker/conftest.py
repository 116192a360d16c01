"""What the tests with containers share. They skip, with the reason, where no engine answers."""

from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from tests.containers import engine, no_engine
from tests.docker.base_image import wheels, write_base

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def client() -> Iterator[docker.DockerClient]:
    if reason := no_engine():
        pytest.skip(reason)
    with engine() as client:
        yield client


@pytest.fixture(scope="session")
def worker_image(client: docker.DockerClient, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The image of deploy/docker/Dockerfile, built without a network on a base that is made here."""
    folder = tmp_path_factory.mktemp("worker-image")
    (folder / "wheels").mkdir()
    wheels(ROOT, folder / "wheels")
    write_base(folder / "base.tar", folder / "wheels")
    base, stage, tag = (f"sandfleet/test-{name}:latest" for name in ("base", "build", "worker"))
    client.api.import_image_from_file(str(folder / "base.tar"), repository="sandfleet/test-base")
    # The first stage by itself, so that it has a name to be removed by.
    for target, name in (("build", stage), (None, tag)):
        client.images.build(
            path=str(ROOT),
            dockerfile="deploy/docker/Dockerfile",
            buildargs={"BASE": base},
            network_mode="none",
            target=target,
            tag=name,
            rm=True,
            forcerm=True,
        )
    yield tag
    for name in (tag, stage, base):
        client.images.remove(name, force=True)
