"""A short run of the chaos test, with seeds that do not change. The long one: `make chaos SEED=… SECONDS=…`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
SECONDS = 8
SEEDS = (1, 2)
LIMIT_S = 120.0  # a run that finds something waits long for what does not come
END_S = 40.0  # and ends what it started

pytestmark = [
    pytest.mark.skipif(
        not Path("/proc/self/mountinfo").exists(), reason="what a run leaves behind is read from /proc"
    ),
    pytest.mark.timeout(LIMIT_S + END_S + 10),
]


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_is_lost(seed: int) -> None:
    """Its output is shown when it fails: the schedule, what was done, and what the judge found."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("FAULTS", "CHAOS_PRIVATE")
    }
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.chaos", "--seed", str(seed)),
            *("--seconds", str(SECONDS), "--limit", str(LIMIT_S)),
        ],
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S + END_S,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-20_000:]}\n{done.stderr[-5_000:]}"
    assert f"SEED={seed} SECONDS={SECONDS}: 0 violations" in done.stdout
