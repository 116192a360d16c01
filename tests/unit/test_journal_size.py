"""The file stays small however many events and commands go through it. `make bench` has the million."""

from pathlib import Path

import pytest

from tests.bench.journal import MOST_BYTES, churn


@pytest.mark.timeout(180)
async def test_the_file_stays_small_while_events_come_and_go(tmp_path: Path) -> None:
    sizes = await churn(tmp_path / "worker.db", events=12_000, kept=1_000)
    # The log is laid out once, and pages of what is gone are used again.
    assert max(sizes[len(sizes) // 2 :]) <= max(sizes[: len(sizes) // 2]) * 1.1
    assert max(sizes) < MOST_BYTES
