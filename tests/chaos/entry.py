"""A worker whose disk and clock a test can turn, otherwise the real one: `python -m tests.chaos.entry worker …`.

`CHAOS_KNOBS` names a file that holds two numbers: how many ms each commit of the journal takes longer, and
how many seconds the worker's clock is ahead. It may change at any time.
"""

import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

LOOK_EVERY_S = 0.05


class Knobs:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._looked = float("-inf")
        self._values = (0.0, 0.0)

    def _read(self) -> tuple[float, float]:
        now = time.monotonic()
        if now - self._looked > LOOK_EVERY_S:
            self._looked = now
            commit_ms, clock_s = self._path.read_text().split()
            self._values = float(commit_ms), float(clock_s)
        return self._values

    @property
    def commit_s(self) -> float:
        return self._read()[0] / 1000

    def now(self) -> datetime:
        return datetime.now(UTC) + timedelta(seconds=self._read()[1])


def write_knobs(path: Path, *, commit_ms: float = 0, clock_s: float = 0) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text(f"{commit_ms} {clock_s}")
    fresh.replace(path)


def main() -> None:
    # The clocks go first: who imports them later imports these.
    import worker.clock

    knobs = Knobs(Path(os.environ["CHAOS_KNOBS"]))
    worker.clock.utc_now = knobs.now
    import worker.work

    worker.work.now_utc = knobs.now
    from worker.journal import _Owner, _State

    commit = _Owner._flush_and_commit

    def slow_commit(self: _Owner, before: _State) -> None:
        time.sleep(knobs.commit_s)
        commit(self, before)

    _Owner._flush_and_commit = slow_commit  # type: ignore[method-assign]
    from worker.__main__ import main as worker_main

    worker_main()


if __name__ == "__main__":
    main()
