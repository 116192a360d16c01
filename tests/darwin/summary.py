"""Says in words what stands in the report of verify_on_a_mac.sh: `python summary.py report.json`."""

import json
import sys
from pathlib import Path
from typing import Any


def summary(report: dict[str, Any]) -> str:
    """Counts, then what failed and why, what was skipped and why, and every fact that was measured."""
    tests: dict[str, dict[str, Any]] = report["tests"]
    lines = []
    for outcome in ("passed", "failed", "skipped"):
        lines.append(f"{outcome}: {sum(test['outcome'] == outcome for test in tests.values())}")
    for outcome in ("failed", "skipped"):
        chosen = {name: test for name, test in tests.items() if test["outcome"] == outcome}
        if chosen:
            lines += ["", f"{outcome}:"]
            lines += [f"  {name}: {_last_line(test['why'])}" for name, test in sorted(chosen.items())]
    lines += ["", "facts:"]
    lines += [f"  {name}: {json.dumps(value)}" for name, value in sorted(report["facts"].items())]
    return "\n".join(lines)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else ""


if __name__ == "__main__":
    try:
        print(summary(json.loads(Path(sys.argv[1]).read_text())))
    except FileNotFoundError:
        sys.exit("there is no report: the tests did not run")
