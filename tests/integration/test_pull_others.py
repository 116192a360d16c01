"""Beside other people's programs: Docker's registry as the source, skopeo as a reader of the store.

Both are Debian packages (`docker-registry`, `skopeo`); a test whose program is not on the PATH is skipped.
"""

import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.image_maker import config_of, here, layer, manifest_of, put_image, put_index
from tests.integration.pull_help import APP, NOW, Make, pullers, registry, store, tree_files, verified
from tests.registry_server import Registry, digest_of
from worker.images.store import ImageStore

__all__ = ["pullers", "registry", "store"]  # fixtures

REGISTRY = shutil.which("docker-registry")
SKOPEO = shutil.which("skopeo")
CONFIG = """
version: 0.1
log: {{level: error}}
storage:
  filesystem: {{rootdirectory: {root}}}
http:
  addr: 127.0.0.1:{port}
"""
DEADLINE_S = 20.0


class DockerRegistry:
    def __init__(self, port: int) -> None:
        self.host = f"localhost:{port}"

    def send(self, method: str, path: str, body: bytes = b"", content_type: str = "") -> str:
        """One request; gives the Location of the answer."""
        url = path if path.startswith("http") else f"http://{self.host}{path}"
        headers = {"Content-Type": content_type or "application/octet-stream"}
        request = urllib.request.Request(url, data=body, method=method, headers=headers)
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
            return str(answer.headers.get("Location", ""))

    def add_blob(self, repository: str, content: bytes) -> None:
        place = self.send("POST", f"/v2/{repository}/blobs/uploads/")
        joint = "&" if "?" in place else "?"
        self.send("PUT", f"{place}{joint}digest={digest_of(content)}", content)


@pytest.fixture
def docker_registry(tmp_path: Path) -> Iterator[DockerRegistry]:
    if REGISTRY is None:
        pytest.skip("docker-registry is not installed (a Debian package)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "registry.yml").write_text(CONFIG.format(root=tmp_path / "registry", port=port))
    with (tmp_path / "registry.log").open("wb") as log:
        process = subprocess.Popen(
            [REGISTRY, "serve", str(tmp_path / "registry.yml")], stdout=log, stderr=log
        )
    try:
        made = DockerRegistry(port)
        end = time.monotonic() + DEADLINE_S
        while True:
            with suppress(OSError):
                made.send("GET", "/v2/")
                break
            assert time.monotonic() < end, (tmp_path / "registry.log").read_text()
            time.sleep(0.02)
        yield made
    finally:
        process.terminate()
        process.wait(10)


async def test_from_dockers_registry(
    docker_registry: DockerRegistry, store: ImageStore, pullers: Make
) -> None:
    made = [layer({"app/run": b"old"}), layer(APP, compress=False)]
    config = config_of(made, Entrypoint=["/app/run"])
    for content in (config, *(one.content for one in made)):
        docker_registry.add_blob("team/app", content)
    manifest = manifest_of(made, config)
    docker_registry.send("PUT", "/v2/team/app/manifests/1", manifest, json.loads(manifest)["mediaType"])
    name = f"{docker_registry.host}/team/app:1"
    puller = pullers()
    pulled = await puller.pull(name, NOW)
    assert pulled.image.digest == digest_of(manifest)
    assert tree_files(store, pulled.image.digest) == APP
    assert store.config(pulled.image.digest).entrypoint == ["/app/run"]
    assert not (await puller.pull(name, NOW)).fetched
    verified(store)


@pytest.mark.skipif(SKOPEO is None, reason="skopeo is not installed (a Debian package)")
async def test_skopeo_reads_the_store(
    registry: Registry, store: ImageStore, pullers: Make, tmp_path: Path
) -> None:
    own = put_image(
        registry, "team/app", [layer(APP), layer({"x": b"1"})], "1", Env=["A=b"], Labels={"l": "v"}
    )
    put_index(registry, "team/app", [(own, here())], "all")
    puller = pullers()
    for tag in ("1", "all"):
        name = f"{registry.host}/team/app:{tag}"
        await puller.pull(name, NOW)
        source = f"oci:{store.layout.root}:{name}"
        assert SKOPEO is not None
        seen = json.loads(subprocess.check_output([SKOPEO, "inspect", source]))
        assert seen["Digest"] == own
        assert seen["Env"] == ["A=b"]
        target = tmp_path / f"copy-{tag}"
        subprocess.run(
            [SKOPEO, "copy", "--insecure-policy", source, f"dir:{target}"], check=True, capture_output=True
        )
        assert digest_of((target / "manifest.json").read_bytes()) == own
