"""The defects of how the reference system uses its profiles (S18, S19, S20), and the record of all of them."""

import errno
import os
import re
from pathlib import Path

import pytest

from schemas.spec import decode_spec
from worker.config import Config
from worker.images.model import ImageConfig
from worker.platform.darwin.clone import DarwinCloner
from worker.platform.darwin.driver import DarwinDriver
from worker.platform.darwin.evaluate import compile_profile
from worker.platform.darwin.libproc import LibProc
from worker.platform.darwin.proc import DarwinProcessTable, Markers
from worker.platform.darwin.seatbelt import Seatbelt
from worker.platform.darwin.timebase import Timebase
from worker.secret_files import SecretFiles
from worker.variables import build_env

from . import test_sbpl_defects as of_the_profile
from .fake_kqueue import names
from .fake_libsystem import FakeSystem, build
from .reference_profile import Machine, render
from .sbpl_help import MARKER, TMP, built, policy, policy_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def system(tmp_path_factory: pytest.TempPathFactory) -> FakeSystem:
    return FakeSystem(build(tmp_path_factory.getbasetemp()))


def test_s4_a_profile_is_made_from_the_policy_never_from_a_file(system: FakeSystem) -> None:
    driver = DarwinDriver(system.library, release=15, kqueue=names)
    plan = driver.plan(policy())
    assert plan["profile"] == built().text
    assert not any(isinstance(value, str) and "sandbox.sb" in value for value in plan.values())


def test_s18_exec_gets_the_very_sandbox_of_the_container(system: FakeSystem, tmp_path: Path) -> None:
    driver = DarwinDriver(system.library, release=15, kqueue=names)
    spec = {"resources": {"max_files": 100, "cpu_time_limit": "5s"}}
    start, execute = driver.plan(policy_of(spec, run=3)), driver.plan(policy_of(spec, run=3))
    assert start == execute
    assert ["nofile", 100, 100, True] in execute["limits"]
    assert any(limit[0] == "cpu" for limit in execute["limits"])
    # Nothing of the worker's own environment.
    environment = build_env(
        decode_spec({"image": {"name": "app"}}),
        config=Config(),
        node="n1",
        cid="web-0",
        instance="0" * 26,
        port=None,
        tmp=Path(TMP),
        image=ImageConfig(),
        secrets=SecretFiles(tmp_path),
        default_path=driver.default_path(),
        environ={"NATS_TOKEN": "secret", "HOME": "/Users/w"},
    )
    assert "NATS_TOKEN" not in environment
    assert environment["HOME"] == TMP


def test_s18_no_profile_stands_in_an_argument_list() -> None:
    sources = list((ROOT / "worker").rglob("*.py"))
    assert len(sources) > 50
    named = [
        source for source in sources if re.search(r"[\"'](/usr/bin/)?sandbox-exec[\"']", source.read_text())
    ]
    assert named == []


def test_s19_time_is_in_ticks_and_a_tree_is_all_its_processes(system: FakeSystem) -> None:
    library, mine = system.library, {"uid": os.getuid()}
    system.add(10, 2, **mine)
    system.add(11, 10, user=24_000_000, footprint=1000, **mine)
    system.add(12, 11, user=24_000_000, footprint=200, **mine)
    system.add(13, 1, footprint=70_000, parent_unique=99, **mine)  # it left its session and its parent
    system.confine(13, MARKER.encode())
    table = DarwinProcessTable(LibProc(library), Timebase(library), Markers(Seatbelt(library)))
    sample = table.tree(10)
    assert sample is not None
    assert (sample.cpu_usec, sample.memory_bytes) == (2_000_000, 1200)
    assert set(table.members(10, MARKER)) == {11, 12, 13}


def test_s20_a_place_that_is_taken_is_no_reason_to_copy(system: FakeSystem, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "f").write_text("new")
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "f").write_text("old")
    system.fail("clonefileat", errno.EEXIST)
    with pytest.raises(FileExistsError):
        DarwinCloner(system.library).clone_tree(tmp_path / "src", tmp_path / "dst")
    assert (tmp_path / "dst" / "f").read_text() == "old"


# -- the record of it


def test_every_defect_has_its_test_and_its_line() -> None:
    page = (ROOT / "docs" / "adr" / "0008-the-reference-profile-corrected.md").read_text()
    lines = re.findall(r"^\| (S[0-9]+) \| (.+) \|$", page, re.MULTILINE)
    assert [number for number, _ in lines] == [f"S{number}" for number in range(1, 22)]
    tests = [name for name in (*globals(), *vars(of_the_profile)) if name.startswith("test_s")]
    for number, rest in lines:
        assert len(rest.split(" | ")) == 3, f"{number}: what the reference does, what we do, why"
        assert all(len(cell.strip()) > 10 for cell in rest.split(" | ")), number
        assert any(name.startswith(f"test_{number.lower()}_") for name in tests), number


def test_the_reference_compiles_where_it_was_made() -> None:
    for gpu in ("none", "metal", "mps"):
        for level in ("none", "localhost", "full"):
            assert compile_profile(render(Machine(gpu=gpu, network=level)), {}, release=26).rules
