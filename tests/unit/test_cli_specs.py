"""`run` and `create`: options to a spec, files as they are."""

from pathlib import Path

import pytest

from schemas.errors import ContractError, InvalidSpec
from schemas.spec import BindStorage, NamedStorage, NetworkAccess, PullPolicy, ServiceSpec
from worker.cli.app import BY_NAME, make_parser
from worker.cli.parser import Namespace, UsageError
from worker.cli.specs import is_file, name_of_image, specs_of
from worker.errors import NotFound

LONE = "image: {name: demo}\nenv: {A: b}\n"
DEPLOYMENT = """
version: v1
deployment: shop
services:
  web: {image: {name: "web:1"}}
  db: {image: {name: "db:1"}}
"""


def parse(*words: str) -> Namespace:
    return make_parser(BY_NAME["run"]).read(words)


def specs(*words: str) -> dict[str, ServiceSpec]:
    return specs_of(parse(*words), verb="run")


def test_an_image_with_everything(tmp_path: Path) -> None:
    (found,) = specs(
        "ghcr.io/acme/Web:7".lower(), "--name", "shop", "-e", "A=1", "-e", "B=x=y", "-v", f"{tmp_path}:/data:ro",
        "-v", "cache:/cache", "-p", "8080", "-p", "9090", "--rm", "-m", "512Mi", "--network", "localhost",
        "-l", "tier=front", "--workdir", "/app", "--entrypoint", "bin/run", "--pull", "never", "--cpu-time", "5m",
        "--", "serve", "--port", "80",
    ).items()  # fmt: skip
    name, spec = found
    assert name == "shop"
    assert spec.image.name == "ghcr.io/acme/web:7"
    assert spec.image.pull_policy is PullPolicy.NEVER
    assert spec.command.entrypoint == ["bin/run"]
    assert spec.command.args == ["serve", "--port", "80"]
    assert spec.command.workdir == "/app"
    assert spec.env == {"A": "1", "B": "x=y"}
    assert spec.storage == [
        BindStorage(source=str(tmp_path), target="/data", readonly=True),
        NamedStorage(name="cache", target="/cache"),
    ]
    assert [endpoint.listen_port for endpoint in spec.endpoints] == [8080, 9090]
    assert spec.lifecycle.delete_on_exit
    assert spec.resources.memory_bytes == 512 * 2**20
    assert spec.resources.cpu_time_limit_s == 300
    assert spec.network.access is NetworkAccess.LOCALHOST
    assert spec.labels == {"tier": "front"}


def test_an_image_alone_is_the_smallest_spec() -> None:
    assert specs("demo") == {"demo": ServiceSpec(image=specs("demo")["demo"].image)}


def test_a_relative_bind_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = specs("demo", "-v", "./data:/data")["demo"].storage[0]
    assert isinstance(storage, BindStorage)
    assert storage.source == str(tmp_path / "data")


@pytest.mark.parametrize(
    ("image", "name"),
    [("demo", "demo"), ("ghcr.io/acme/cache:7", "cache"), ("localhost:5000/a/My.App@sha256:00", "my-app")],
)
def test_a_service_is_named_after_its_image(image: str, name: str) -> None:
    assert name_of_image(image) == name


def test_a_name_that_cannot_be_made_is_asked_for() -> None:
    with pytest.raises(InvalidSpec, match="--name"):
        name_of_image("___")


def test_a_lone_spec_file(tmp_path: Path) -> None:
    path = tmp_path / "my_web.yaml"
    path.write_text(LONE)
    assert list(specs(str(path))) == ["my-web"]
    assert list(specs(str(path), "--name", "other")) == ["other"]
    assert is_file(str(path))


def test_a_deployment_runs_all_or_one(tmp_path: Path) -> None:
    path = tmp_path / "shop.yaml"
    path.write_text(DEPLOYMENT)
    assert list(specs(str(path))) == ["web", "db"]
    assert list(specs(str(path), "--service", "db")) == ["db"]
    assert list(specs(str(path), "--service", "db", "--name", "data")) == ["data"]
    with pytest.raises(NotFound, match="it has web, db"):
        specs(str(path), "--service", "nope")
    with pytest.raises(UsageError, match="--service"):
        specs(str(path), "--name", "one")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-e", "A=1"), "-e goes with an image"),
        (("--rm",), "--rm goes with an image"),
        (("--", "ls"), "a command goes with an image"),
    ],
)
def test_a_file_leaves_no_room_for_the_options_of_an_image(
    words: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "web.yaml"
    path.write_text(LONE)
    with pytest.raises(UsageError, match=message):
        specs(str(path), *words)


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (("demo", "--memory", "512MB"), "resources.memory"),
        (("demo", "--network", "some"), "network.access"),
        (("demo", "--name", "No Name"), "--name"),
        (("demo", "--pull", "sometimes"), "image.pull_policy"),
        (("Demo Image", "--name", "demo"), "image.name"),
        (("demo", "-v", "/a:/../b"), "storage"),
    ],
)
def test_a_wrong_value_names_its_field(words: tuple[str, ...], field: str) -> None:
    with pytest.raises(ContractError) as caught:
        specs(*words)
    assert field in (caught.value.field or "")


@pytest.mark.parametrize("volume", ["/a", "/a:", ":/b", "/a:/b:rx", ""])
def test_a_wrong_volume_says_how_it_is_written(volume: str) -> None:
    with pytest.raises(UsageError, match="SOURCE:TARGET"):
        specs("demo", "-v", volume)


def test_a_file_that_is_not_there_is_not_an_image() -> None:
    with pytest.raises(NotFound, match=r"there is no file nope\.yaml"):
        specs("nope.yaml")
    with pytest.raises(UsageError, match="--service"):
        specs("demo", "--service", "x")
