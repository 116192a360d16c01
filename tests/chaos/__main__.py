"""`SEED=7 SECONDS=30 python -m tests.chaos [--cluster] [--faults worker_kill,purge] [--record FILE] [--keep]`.

Prints the schedule, which is a function of seed and length alone, what was done when, and what the judge
found. Exit code 1 when that was anything. The same seed gives the same schedule again; what the machine makes
of it may differ.
"""

import argparse
import asyncio
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from .faults import FAULTS
from .history import History, Violation, dump
from .run import run

PRIVATE = "CHAOS_PRIVATE"
CLUSTER_SIZE = 3
AFTER_S = 240.0  # for all that comes after the storm


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--seed", type=int, default=int(os.environ.get("SEED") or time.time_ns() % 1_000_000))
    parser.add_argument("--seconds", type=float, default=float(os.environ.get("SECONDS") or 30))
    parser.add_argument("--faults", default=os.environ.get("FAULTS") or None, help="only these, by comma")
    parser.add_argument(
        "--cluster", action="store_true", default=os.environ.get("CLUSTER", "") == "1", help="three servers"
    )
    parser.add_argument("--record", type=Path, help="write the history that was judged")
    parser.add_argument("--limit", type=float, help="seconds after which a run that hangs is given up")
    parser.add_argument("--keep", action="store_true", help="leave the folder of the run")
    args = parser.parse_args()
    if not Path("/proc/self/mountinfo").exists():
        print("what a run leaves behind is read from /proc, which this system has not")
        return 2
    if PRIVATE not in os.environ:
        _enter_private_mounts()
    private = os.environ.get(PRIVATE) == "1"
    kinds = list(FAULTS) if args.faults is None else [name for name in args.faults.split(",") if name]
    if not private and "disk_full" in kinds:
        kinds.remove("disk_full")
        print("left out: disk_full (without root there is no small disk of our own to fill)")
    form = " CLUSTER=1" if args.cluster else ""
    print(f"SEED={args.seed} SECONDS={args.seconds:g}{form} FAULTS={','.join(kinds)}", flush=True)
    limit_s = args.limit or args.seconds + AFTER_S
    history, found = asyncio.run(_within(limit_s, args, kinds, private))
    if args.record is not None:
        args.record.write_bytes(dump(history))
    print(
        f"{len(history.published)} commands, {len(history.events)} events, {len(history.logs)} chunks,"
        f" {len(history.losses)} streams robbed, {len(history.witnesses)} programs"
    )
    for violation in found:
        print(f"VIOLATION {violation}")
    print(f"SEED={args.seed} SECONDS={args.seconds:g}{form}: {len(found)} violations")
    return 1 if found else 0


async def _within(
    limit_s: float, args: argparse.Namespace, kinds: list[str], private: bool
) -> tuple[History, list[Violation]]:
    """A run that hangs, or is told to end, still ends everything that it started."""
    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    loop.call_later(limit_s - 1, _show_tasks)
    async with asyncio.timeout(limit_s):
        return await run(
            args.seed,
            args.seconds,
            faults=kinds,
            private=private,
            servers=CLUSTER_SIZE if args.cluster else 1,
            say=lambda text: print(text, flush=True),
            keep=args.keep,
        )


def _show_tasks() -> None:
    print("the run hangs; what it waits for:")
    for task in asyncio.all_tasks():
        task.print_stack(file=sys.stdout)


def _enter_private_mounts() -> None:
    """Go on in a mount namespace of our own, as root on Linux; else without one."""
    able = os.geteuid() == 0 and shutil.which("unshare") is not None and shutil.which("mount") is not None
    os.environ[PRIVATE] = "1" if able else "0"
    if able:
        again = ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", "tests.chaos"]
        os.execvp("unshare", [*again, *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
