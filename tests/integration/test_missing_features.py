"""Kernels without a feature: the node says so, what it still can it does, and what a spec insists on is refused.

Such kernels are simulated by a filter that answers ENOSYS, see `attack_old_kernel`.
"""

from typing import Any

import pytest

from tests.integration.attack_help import USERS, compile_program, run_machine, skip_unless_possible
from tests.integration.attack_old_kernel import CASES
from tests.integration.sandbox_help import needs_sandbox

pytestmark = [needs_sandbox, pytest.mark.timeout(300)]

RAN = "it ran, descriptors: 0\n"
SECRET = "the secret"
# Without one of these there is no root of its own, and a spec that asks for it is refused.
ROOTLESS = ("no openat2", "no new mount calls", "no close_range", "no namespaces", "nothing new")
# What `not_enforced` then has beyond what it has with everything there; none of it, and nothing is lost.
LOST = {
    "no Landlock": {
        "process/abstract_sockets",
        "process/files",
        "process/gpu",
        "process/signals",
        "rootfs/abstract_sockets",
        "rootfs/network.localhost",
    },
    "no pidfds": {"rootfs/network.localhost"},
    "no pidfd_getfd": {"rootfs/network.localhost"},
    "no seccomp call": {"rootfs/network.localhost"},
    "no filters at all": {
        "process/network.none",
        "rootfs/ipc",
        "rootfs/network.localhost",
        "rootfs/network.none",
    },
    "nothing new": {
        "process/abstract_sockets",
        "process/files",
        "process/gpu",
        "process/network.none",
        "process/signals",
    },
}
WITHOUT_LANDLOCK = ("no Landlock", "nothing new")

Told = dict[str, dict[str, Any]]


@pytest.fixture(scope="module", params=USERS)
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Told:
    skip_unless_possible(request.param)
    program = compile_program(tmp_path_factory.mktemp("attack"))
    folder = tmp_path_factory.mktemp("machine")
    lines = run_machine("attack_old_kernel.py", program, folder, request.param)
    found = {line["case"]: line for line in lines}
    if "rootfs" not in found["everything"]["isolation"]:
        pytest.skip("there is no isolation rootfs here to begin with")
    return found


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, told: Told) -> dict[str, Any]:
    found = told[request.param]
    assert "error" not in found, found["error"]
    return found


def test_the_node_says_what_is_lost(told: Told, case: dict[str, Any]) -> None:
    all_of_it = set(told["everything"]["not_enforced"])
    name = case["case"]
    assert case["isolation"] == (["process"] if name in ROOTLESS else ["process", "rootfs"])
    lost = set(case["not_enforced"]) - all_of_it
    assert lost == LOST.get(name, set())


def test_a_container_runs_and_ends_all_the_same(case: dict[str, Any]) -> None:
    for isolation, run in case["runs"].items():
        if "refused" in run:
            assert isolation == "rootfs"
            continue
        assert "failed" not in run, run
        assert run["said"].endswith(RAN), run
        assert run["exec"] == RAN
        assert run["ended"] == -15


def test_what_is_not_there_is_refused_by_its_field(case: dict[str, Any]) -> None:
    run = case["runs"]["rootfs"]
    if case["case"] in ROOTLESS:
        assert run["field"] == "spec.sandbox.isolation"
        assert "rootfs" in run["refused"]
    else:
        assert "refused" not in run


def test_a_spec_that_requires_what_is_missing_is_refused(case: dict[str, Any]) -> None:
    for run in case["runs"].values():
        if "refused" not in run:
            assert run["require"] == run["missing"]
            assert run["require"]


def test_files_are_open_only_where_it_says_so(case: dict[str, Any]) -> None:
    for isolation, run in case["runs"].items():
        if "refused" in run:
            continue
        is_open = isolation == "process" and case["case"] in WITHOUT_LANDLOCK
        assert (SECRET in run["said"]) == is_open
        assert ("files" in run["missing"]) == is_open
