"""What the trial of isolation `rootfs` makes goes again, also when the worker is killed meanwhile."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="namespaces")
REPO = Path(__file__).parents[2]
DEADLINE_S = 20.0


def test_a_kill_leaves_no_folder(tmp_path: Path) -> None:
    trial = "from worker.platform.linux import able; able._try_out('root')"
    with subprocess.Popen(
        [sys.executable, "-c", trial], cwd=REPO, env={**os.environ, "TMPDIR": str(tmp_path)}
    ) as worker:
        _until(lambda: any(tmp_path.iterdir()) or worker.poll() is not None)
        worker.kill()
    _until(lambda: not any(tmp_path.iterdir()))


def _until(condition) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
