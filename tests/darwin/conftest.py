"""Tests of the real thing, on a real Mac only. Facts that they measure go into the report of verify_on_a_mac.sh."""

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPORT = "SANDFLEET_MAC_REPORT"  # a file to write; without it nothing is written

Note = Callable[[str, Any], None]

_outcomes: dict[str, dict[str, Any]] = {}
_facts: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def only_on_a_mac() -> None:
    if os.uname().sysname != "Darwin":
        pytest.skip("needs a real Mac")


@pytest.fixture
def note() -> Note:
    """Keeps a fact for the report: `note("what", value)`."""

    def keep(name: str, value: Any) -> None:
        _facts[name] = value

    return keep


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "tests/darwin" not in report.nodeid:
        return
    known = _outcomes.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0, "why": ""})
    known["seconds"] = round(known["seconds"] + report.duration, 3)
    if report.outcome != "passed":
        known["outcome"] = report.outcome
        known["why"] = _why(report)


def _why(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    return str(report.longrepr)[-4000:]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish() -> None:
    path = os.environ.get(REPORT)
    if path and _outcomes:
        system = {
            "macos": platform.mac_ver()[0],
            "kernel": os.uname().release,
            "machine": os.uname().machine,
            "python": platform.python_version(),
        }
        report = {"version": 1, "system": system, "tests": _outcomes, "facts": _facts}
        Path(path).write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")
