"""tests/with-docker where it can do nothing: it says why, and runs the command all the same."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "with-docker"


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """As a user who is not root, with an engine's address at which nobody listens unless `env` says otherwise."""
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    return subprocess.run(
        [*nobody, "bash", "-s", "--", *command],
        input=SCRIPT.read_text(),
        env={"PATH": os.environ["PATH"], "DOCKER_HOST": "unix:///nowhere.sock", **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


@pytest.mark.parametrize("code", [0, 7])
def test_the_command_runs_without_an_engine(code: int) -> None:
    done = run("sh", "-c", f"echo ran; exit {code}")
    assert done.returncode == code
    assert done.stdout == "ran\n"
    assert "none can be started: this is not" in done.stderr


def test_nothing_to_run() -> None:
    done = run()
    assert done.returncode == 2
    assert "usage" in done.stderr
