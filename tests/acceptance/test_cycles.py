"""Many starts and stops of programs that fork as they like leave nothing behind.

`SANDFLEET_CYCLES` says how many; the default is for every day.
"""

import os
from pathlib import Path

import pytest

from tests.integration.attack_help import USERS, compile_program, run_machine, skip_unless_possible
from worker.platform.linux import landlock

CYCLES = int(os.environ.get("SANDFLEET_CYCLES", "60"))
# Of a busy machine.
A_CYCLE_S, A_NODE_S = 3.0, 60.0

pytestmark = [
    pytest.mark.skipif(not landlock.abi(), reason="needs Landlock"),
    pytest.mark.timeout(CYCLES * A_CYCLE_S + 2 * A_NODE_S),
]


@pytest.mark.parametrize("user", USERS)
def test_nothing_is_left(user: str, tmp_path: Path) -> None:
    skip_unless_possible(user)
    program = compile_program(tmp_path)
    folder = tmp_path / "machine"
    folder.mkdir()
    patience_s = CYCLES * A_CYCLE_S + A_NODE_S
    before, after, ended, last = run_machine(
        "attack_cycles.py", program, folder, user, str(CYCLES), patience_s=patience_s
    )
    print(f"{CYCLES} cycles, the last of them in {ended['seconds']:.1f} s: {after}")
    assert before["programs"] == 0
    assert after == before
    assert ended["containers"] == []
    assert last["left"] == []
