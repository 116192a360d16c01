"""What doctor says of a data directory's launcher."""

import json
import os
from pathlib import Path

import pytest

from worker.cli.doctor_launcher import launcher_checks
from worker.launcher.processes import system
from worker.supervisor_wire import launcher_build


def describe(root: Path, **changes: object) -> None:
    """A launcher.json of this very process."""
    own = system().find(os.getpid())
    assert own is not None
    facts = {"pid": own.pid, "start_time": own.start, "build": launcher_build(), **changes}
    (root / "launcher.json").write_text(json.dumps(facts))


def test_one_of_this_version(tmp_path: Path) -> None:
    describe(tmp_path)
    assert [finding.level for finding in launcher_checks(tmp_path)] == ["ok"]


@pytest.mark.parametrize("build", ["", "0123456789abcdef", 1])
def test_one_of_another_version(tmp_path: Path, build: object) -> None:
    describe(tmp_path, build=build)
    found = list(launcher_checks(tmp_path))
    assert [finding.level for finding in found] == ["warn"]
    assert "restart the worker" in found[0].do


@pytest.mark.parametrize("content", [None, "", "{}", '{"pid": "x"}', "[]"])
def test_none_is_no_fault(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "launcher.json").write_text(content)
    assert list(launcher_checks(tmp_path)) == []


def test_one_that_is_dead(tmp_path: Path) -> None:
    describe(tmp_path, start_time=1)
    assert list(launcher_checks(tmp_path)) == []
