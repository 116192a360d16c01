"""Two hundred ways out of the sandbox, tried in every isolation, network level and user, with a control.

Everything runs in a machine of its own, see `attack_machine`. What should come of each attempt is in `attack_rows`.
"""

import hashlib
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.integration import attack_machine, attack_outside
from tests.integration.attack_help import USERS, Report, compile_program, run_machine, skip_unless_possible
from tests.integration.attack_table import (
    BEGIN,
    END,
    ISOLATIONS,
    LAYERS,
    LEVELS,
    ROWS,
    document,
    opening,
    stopping,
)
from tests.integration.sandbox_help import needs_sandbox

pytestmark = [needs_sandbox, pytest.mark.timeout(300)]

SECURITY = attack_outside.ROOT / "docs" / "security.md"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_program(tmp_path_factory.mktemp("attack"))


@pytest.fixture(scope="module", params=USERS)
def report(request: pytest.FixtureRequest, program: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    skip_unless_possible(request.param)
    before = _host()
    folder = tmp_path_factory.mktemp("machine")
    lines = run_machine("attack_node.py", program, folder, request.param, "attacks")
    assert _host() == before, "an attack has reached the machine that the tests run on"
    return Report(lines, root=request.param == "root")


def _host() -> dict[str, Any]:
    """What attacks would change of the host, if they could reach it."""
    files = [
        attack_outside.PRELOAD,
        attack_outside.PLANTED,
        attack_outside.TEMPORARY,
        Path(attack_machine.PLACE),
    ]
    settings = [attack_outside.DOMAIN, attack_outside.FORWARDING, Path("/proc/sys/kernel/core_pattern")]
    own = attack_outside.LAUNCHER_FILE.read_bytes()
    status = os.stat(attack_outside.PASSWORDS) if attack_outside.PASSWORDS.exists() else None
    return {
        "files": {str(path): path.exists() for path in files},
        "settings": {str(path): path.read_text() for path in settings},
        "launcher": hashlib.sha256(own).hexdigest(),
        "passwords": status and (status.st_ino, status.st_mtime_ns, status.st_mode),
        "name": socket.gethostname(),
        "mounts": [
            line for line in Path("/proc/self/mountinfo").read_text().splitlines() if "attack" in line
        ],
    }


def test_every_attempt_has_its_row(report: Report) -> None:
    assert set(report.control.told) == set(ROWS)


def test_every_attempt_is_alive_outside(report: Report) -> None:
    """But for those that need what this kernel or user has not got: `pytest -rP` lists them with what they met."""
    control = report.control
    dead = set(ROWS) - control.through
    reasons = {"kernel", "host", "user" if report.root else "root"}
    without_reason = {name for name in dead if not reasons & set(ROWS[name].needs.split())}
    assert not without_reason, control.errno_of(without_reason)
    assert len(control.through) >= 60
    print(f"{len(control.through)} alive; not available here: {json.dumps(control.errno_of(dead), indent=1)}")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_nothing_gets_through_but_what_is_declared(report: Report, isolation: str, level: str) -> None:
    run = report.find(f"{isolation}/{level}")
    expected = {}
    for name, row in ROWS.items():
        why = opening(row, isolation, level, root=report.root)
        if why is not None and name in report.control.through:
            expected[name] = why
    escaped = {name: run.told[name] for name in run.through - set(expected)}
    assert not escaped, "these get through, and nothing says so"
    stopped = {name: run.told[name] for name in set(expected) - run.through}
    assert not stopped, "these are declared open, and do not get through"
    undeclared = {
        name: why
        for name, why in expected.items()
        if why not in ("level", "granted", "user") and why not in run.not_enforced
    }
    assert not undeclared, f"not_enforced does not have these: {sorted(run.not_enforced)}"


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_an_exec_is_confined_just_so(report: Report, isolation: str) -> None:
    joined, first = report.find(f"{isolation}/none", joined=True), report.find(f"{isolation}/none")
    assert joined.through == first.through


@pytest.mark.parametrize("layer", sorted({layer for layers in LAYERS.values() for layer in layers}))
def test_each_layer_stops_by_itself_what_the_table_says(report: Report, layer: str) -> None:
    isolation = "rootfs" if layer == "namespaces" else "process"
    run = report.find(f"{isolation}/none", layer=layer)
    expected = {name for name, row in ROWS.items() if layer in stopping(row, isolation, root=report.root)}
    alive = report.control.through
    wrong = {name: run.told[name] for name in alive if (name in run.through) == (name in expected)}
    assert not wrong, f"{layer} alone; expected to stop: {sorted(set(wrong) & expected)}"


@pytest.mark.parametrize(
    ("beside", "levels"),
    [("bwrap", ("none",)), ("bwrap with the network", ("localhost", "outbound", "full"))],
)
def test_what_bubblewrap_stops_does_not_get_through_in_a_root(
    report: Report, beside: str, levels: tuple[str, ...]
) -> None:
    bubblewrap = report.find(beside)
    stops = report.control.through - bubblewrap.through
    for level in levels:
        run = report.find(f"rootfs/{level}")
        assert not stops & run.through, level
        assert len(run.through) < len(bubblewrap.through)


def test_the_table_in_the_docs_is_this_one() -> None:
    """`python -m tests.integration.attack_table` prints it."""
    page = SECURITY.read_text(encoding="utf-8")
    shown = BEGIN + page.partition(BEGIN)[2].partition(END)[0] + END
    assert shown == document()


@pytest.fixture(scope="module", params=USERS)
def trees(
    request: pytest.FixtureRequest, program: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Any]:
    skip_unless_possible(request.param)
    folder = tmp_path_factory.mktemp("machine")
    return run_machine("attack_node.py", program, folder, request.param, "trees")[1:]


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_no_tree_outlives_a_stop(trees: list[Any], isolation: str) -> None:
    """In a machine of its own every process that is left can be seen, whatever it did to hide."""
    mine = [tree for tree in trees if tree["isolation"] == isolation]
    if not mine:
        pytest.skip(f"there is no isolation {isolation} here")
    print("seconds:", {tree["tree"]: round(tree["seconds"], 3) for tree in mine})
    for tree in mine:
        assert tree["left"] == [], tree
        assert tree["most"] >= (30 if tree["tree"] == "bomb" else 0), tree
        assert tree["mounts"], tree
        assert not tree["lost"], tree
        assert tree["others"], "it has reached somebody else"


@pytest.fixture(scope="module", params=USERS)
def storms(
    request: pytest.FixtureRequest, program: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Any]:
    skip_unless_possible(request.param)
    folder = tmp_path_factory.mktemp("machine")
    return run_machine("attack_node.py", program, folder, request.param, "storms")[1:]


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_a_storm_of_forks_is_ended_and_the_node_answers_meanwhile(storms: list[Any], isolation: str) -> None:
    """How fast is measured in `make bench`."""
    storm = next((one for one in storms if one["isolation"] == isolation), None)
    if storm is None:
        pytest.skip(f"there is no isolation {isolation} here")
    print(f"answered after {storm['answered']:.3f} s, ended after {storm['seconds']:.3f} s")
    assert storm["most"] >= 100
    assert storm["answered"] is not None
    assert storm["left"] == []
    assert storm["mounts"]
    assert not storm["lost"]
    assert storm["others"], "it has reached somebody else"
