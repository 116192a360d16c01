"""Run a Python command with SANDFLEET_TEST_NATS at a server that docker-compose.test.yml starts for it:

python -m tests.docker.at_an_address -m pytest tests/integration
"""

import os
import subprocess
import sys

from tests.broker import VARIABLE
from tests.containers import server_image
from tests.docker.compose import Compose, program


def main(arguments: list[str]) -> int:
    """The command's exit code."""
    if program() is None:
        print("not run: the suite at an address: no Compose here", file=sys.stderr)
        return 0
    compose = Compose(image=server_image())
    try:
        compose("up", "-d")
        compose.wait(22)
        env = {**os.environ, VARIABLE: compose.url(22)}
        return subprocess.run([sys.executable, *arguments], env=env, check=False).returncode
    finally:
        compose("down", "-v")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
