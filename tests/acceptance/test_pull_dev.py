"""`sandfleet dev` and a registry on the same machine, without any setting."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.test_cli import Dev, make_home
from tests.image_maker import layer, put_image
from tests.registry_server import running

pytestmark = pytest.mark.timeout(120)
home = pytest.fixture(make_home, name="home")


@pytest.fixture
def dev(home: Path) -> Iterator[Dev]:
    made = Dev(home)
    yield made
    made.end()


def test_an_image_is_pulled_and_run(dev: Dev) -> None:
    with running() as registry:
        files = {"hello": b"hello from localhost\n"}
        put_image(
            registry, "app", [layer(files)], "1", Entrypoint=["/bin/sh", "-c"], Cmd=["cat hello; exit 7"]
        )
        name = f"{registry.host}/app:1"
        done = dev.run("run", "--wait", "--name", "app", name, check=False)
        assert done.returncode == 7, done.stderr + dev.said()
        assert "hello from localhost" in dev.run("logs", "app").stdout
        pulled = dev.run("pull", name)
        assert pulled.stdout.startswith(f"{name}  sha256:")
        assert name in dev.run("images", "-q").stdout
