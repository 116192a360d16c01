"""The health check of the worker's image, on a real launcher. No engine is needed for this."""

import fcntl
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from tests.integration.conftest import home, launcher
from tests.integration.launcher_help import Home
from worker.supervisor import Launcher

__all__ = ["home", "launcher"]  # fixtures

SCRIPT = Path(__file__).parents[2] / "deploy" / "docker" / "healthcheck.py"


@pytest.fixture(scope="module")
def illness() -> Callable[[Path], str]:
    spec = importlib.util.spec_from_file_location("healthcheck", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return cast("Callable[[Path], str]", module.illness)


async def test_a_worker_and_its_launcher(
    home: Home, launcher: Launcher, illness: Callable[[Path], str]
) -> None:
    lock = home.root / "worker.lock"
    assert "worker.lock" in illness(home.root)
    lock.touch()
    assert illness(home.root) == "no worker runs"
    with lock.open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert illness(home.root) == ""
        assert illness(home.root) == ""  # it disturbs neither
        assert await launcher.containers() == []
        described = home.root / "launcher.json"
        facts = json.loads(described.read_text())
        described.write_text(json.dumps({**facts, "socket": str(home.root / "nowhere")}))
        assert "does not answer" in illness(home.root)
        described.write_text("{")
        assert "does not answer" in illness(home.root)
        described.write_text(json.dumps(facts))
        home.key_path.write_text("too short")  # it reads this file too, and takes no such key
        assert "the key is wrong" in illness(home.root)
        await launcher.shutdown(kill=True)
        assert "does not answer" in illness(home.root)
