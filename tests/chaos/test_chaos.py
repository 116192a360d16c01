"""Short runs of the chaos test, with seeds that do not change. Long ones: `make chaos SEED=… SECONDS=… [CLUSTER=1]`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
# form → seed and length. A cluster takes longer to come to rest.
FORMS = {"one server": (2, 8), "cluster": (15, 4)}
LIMIT_S = 120.0  # a run that finds something waits long for what does not come
END_S = 40.0  # and ends what it started

pytestmark = [
    pytest.mark.skipif(
        not Path("/proc/self/mountinfo").exists(), reason="what a run leaves behind is read from /proc"
    ),
    pytest.mark.timeout(LIMIT_S + END_S + 10),
]


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_lost(form: str) -> None:
    """Its output is shown when it fails: the schedule, what was done, and what the judge found."""
    seed, seconds = FORMS[form]
    ours = ("FAULTS", "CHAOS_PRIVATE", "CLUSTER", "SEED", "SECONDS")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.chaos", "--seed", str(seed)),
            *("--seconds", str(seconds), "--limit", str(LIMIT_S)),
            *(["--cluster"] if form == "cluster" else []),
        ],
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S + END_S,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-20_000:]}\n{done.stderr[-5_000:]}"
    assert ": 0 violations" in done.stdout
