"""The report of the tests that need a real Mac: its script, its summary, and that the tests are listed here."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.darwin.summary import summary

DARWIN = Path(__file__).parents[1] / "darwin"
SCRIPT = DARWIN / "verify_on_a_mac.sh"


def test_the_summary_says_what_failed_and_what_was_measured() -> None:
    report = {
        "tests": {
            "a.py::one": {"outcome": "passed", "seconds": 1, "why": ""},
            "a.py::two": {"outcome": "failed", "seconds": 1, "why": "def two():\nE  assert 1 == 2\n"},
            "a.py::three": {"outcome": "skipped", "seconds": 0, "why": "no clang"},
        },
        "facts": {"time base": [125, 3, False]},
    }
    said = summary(report)
    assert said.splitlines()[:3] == ["passed: 1", "failed: 1", "skipped: 1"]
    assert "  a.py::two: E  assert 1 == 2" in said
    assert "  a.py::three: no clang" in said
    assert "  time base: [125, 3, false]" in said


@pytest.mark.skipif(os.uname().sysname == "Darwin", reason="here they run")
def test_elsewhere_each_is_skipped_with_its_reason(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "darwin", "-n0", "-p", "no:cacheprovider", str(DARWIN)],
        env={**os.environ, "SANDFLEET_MAC_REPORT": str(report)},
        cwd=DARWIN.parents[1],
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert done.returncode == 0, done.stdout
    told = json.loads(report.read_text())
    assert {test["outcome"] for test in told["tests"].values()} == {"skipped"}
    assert {test["why"] for test in told["tests"].values()} == {"Skipped: needs a real Mac"}
    named = {name.partition("::")[0].rpartition("/")[2] for name in told["tests"]}
    assert named == {path.name for path in DARWIN.glob("test_*.py")}, "every file has the mark"


class TestScript:
    def test_the_shell_takes_it(self) -> None:
        subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
        assert os.access(SCRIPT, os.X_OK)

    def test_it_keeps_to_what_macos_ships(self) -> None:
        """bash 3.2 has no associative arrays, no mapfile, no ${x,,}, no |&, no &>>."""
        text = SCRIPT.read_text()
        for newer in (
            "declare -A",
            "mapfile",
            "readarray",
            ",,}",
            "^^}",
            "|&",
            "&>>",
            "coproc",
            "${!",
            "wait -n",
        ):
            assert newer not in text, newer

    def test_shellcheck(self) -> None:
        checker = shutil.which("shellcheck")
        if checker is None:
            pytest.skip("no shellcheck here")
        done = subprocess.run([checker, str(SCRIPT)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout

    @pytest.mark.skipif(os.uname().sysname == "Darwin", reason="here it would run")
    def test_elsewhere_it_says_so(self, tmp_path: Path) -> None:
        done = subprocess.run(
            ["bash", str(SCRIPT), str(tmp_path)], capture_output=True, text=True, check=False, timeout=30
        )
        assert (done.returncode, done.stderr) == (2, "this is no Mac\n")
        assert list(tmp_path.iterdir()) == []
