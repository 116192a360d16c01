"""docker-compose.test.yml under whichever Compose is here: the plugin of docker, or the program of Debian."""

import functools
import os
import shutil
import socket
import subprocess
import time
import uuid
from pathlib import Path

FILE = Path(__file__).parents[2] / "docker-compose.test.yml"
PORTS = (22, 31, 32, 33, 41, 61, 62, 63, 71, 72, 73)
UP_S = 120
READY_S = 20.0


@functools.cache
def program() -> tuple[str, ...] | None:
    """How Compose is called here; None where it is not installed."""
    plugin = ("docker", "compose")
    if shutil.which("docker") and _works(*plugin, "version"):
        return plugin
    return ("docker-compose",) if shutil.which("docker-compose") else None


class Compose:
    """One project of its own name and ports."""

    def __init__(self, image: str = "", context: Path | None = None) -> None:
        self.name = f"sandfleet-test-{uuid.uuid4().hex[:8]}"
        self.ports = _free_prefix()
        self._env = {**os.environ, "SANDFLEET_TEST_NATS_PORTS": self.ports}
        if image:
            self._env["SANDFLEET_TEST_NATS_IMAGE"] = image
        if context is not None:
            self._env["SANDFLEET_TEST_NATS_CONTEXT"] = str(context)

    def url(self, number: int) -> str:
        return f"nats://127.0.0.1:{self.ports}{number}"

    def wait(self, number: int) -> None:
        """Until a server accepts connections. AssertionError when it does not."""
        deadline = time.monotonic() + READY_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", int(f"{self.ports}{number}")), 1).close()
                return
            except OSError:
                assert time.monotonic() < deadline, self("logs", "--tail=20")
                time.sleep(0.05)

    def __call__(self, *arguments: str) -> str:
        """Its output. AssertionError, with all that it said, when it fails."""
        found = program()
        assert found is not None
        done = subprocess.run(
            [*found, "-f", str(FILE), "-p", self.name, *arguments],
            env=self._env,
            capture_output=True,
            text=True,
            timeout=UP_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def _works(*argv: str) -> bool:
    return subprocess.run(argv, capture_output=True, check=False).returncode == 0


def _free_prefix() -> str:
    """What all ports begin with, below those that the kernel gives away by itself."""
    return next(str(prefix) for prefix in range(200, 320) if all(_free(prefix * 100 + n) for n in PORTS))


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
