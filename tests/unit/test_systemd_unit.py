"""The unit file that is shipped fits what the worker does."""

from configparser import RawConfigParser
from pathlib import Path

import pytest

from worker.shutdown import LIMIT_S

UNIT = Path(__file__).parents[2] / "deploy/systemd/sandfleet-worker.service"


@pytest.fixture(scope="module")
def service() -> dict[str, str]:
    parser = RawConfigParser(strict=False, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(UNIT)
    return dict(parser["Service"])


def test_the_worker_tells_when_it_is_ready_and_alive(service: dict[str, str]) -> None:
    assert service["Type"] == "notify"
    assert float(service["WatchdogSec"]) >= 30, "a slow disk must not look like a hang"
    assert service["ExecReload"].split() == ["/bin/kill", "-HUP", "$MAINPID"]


def test_stopping_leaves_the_worker_its_time_and_the_containers_alone(service: dict[str, str]) -> None:
    assert float(service["TimeoutStopSec"]) > 2 * LIMIT_S
    assert service["KillMode"] == "process"
    assert service["Delegate"] == "yes"
