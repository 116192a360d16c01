"""The life of each container as its events tell it: the table of states, and statuses that agree with
themselves.
"""

from collections.abc import Iterator
from typing import Any

from .history import Violation
from .judge_events import Told

NEXT: dict[str | None, frozenset[str]] = {
    None: frozenset({"pending"}),
    "pending": frozenset({"initializing", "exited", "removed"}),
    "initializing": frozenset({"running", "exited", "failed", "removed"}),
    "running": frozenset({"stopping", "exited", "failed", "removed"}),
    "stopping": frozenset({"exited", "failed", "removed"}),
    "exited": frozenset({"initializing", "removed"}),
    "failed": frozenset({"initializing", "removed"}),
    "removed": frozenset(),
}
LIVE = frozenset({"initializing", "running", "stopping"})
FIELDS = frozenset(
    {
        "container", "service", "replica", "instance", "run", "state", "exit_code", "reason",
        "message", "pid", "port", "ip", "network", "image", "image_digest", "health", "gpu",
        "memory_limit", "labels", "restarts", "created_at", "started_at", "finished_at",
        "next_start_at",
    }
)  # fmt: skip
REASONS = frozenset(
    {
        "stopped", "killed", "memory_limit", "cpu_limit", "exec_failed", "init_failed",
        "create_failed", "unhealthy", "supervisor_lost", "node_rebooted",
    }
)  # fmt: skip
UNKNOWN_OUTCOME = frozenset({"supervisor_lost", "node_rebooted"})
SIGNALS = frozenset({-1, -2, -9, -10, -12, -15})  # those that a command can send
EXITS = "exits"  # the label in which a program of the run says how it may end: "3" or "0,7"

Status = dict[str, Any]


def check_states(events: list[Told]) -> Iterator[Violation]:
    """Each container from event to event."""
    last: dict[str, Status] = {}
    gone: set[str] = set()
    for told in events:
        status = told.status
        cid = told.event.get("container")
        if status is None or cid is None:
            continue
        yield from _check_status(told, status)
        before = last.get(cid)
        if status["instance"] in gone and status["state"] != "removed":
            yield Violation("event of a removed instance", f"{told} of {status['instance']}")
        if told.event["type"] == "state_changed":
            yield from _check_step(told, before, status)
            yield from _check_from(told, status)
        elif status != (before or {}):
            yield Violation("status differs", f"{told} does not carry the newest status of {cid}")
        if status["state"] == "removed":
            gone.add(status["instance"])
        last[cid] = status


def _check_from(told: Told, status: Status) -> Iterator[Violation]:
    """The table, from what the event itself says."""
    origin, state = told.event["from"], status["state"]
    if told.event.get("repeat") or (origin == state == "pending"):
        if origin != state:
            yield Violation("impossible transition", f"{told}: a repetition from {origin} to {state}")
    elif state not in NEXT.get(origin, frozenset()):
        yield Violation("impossible transition", f"{told}: from {origin} to {state}")


def _check_step(told: Told, before: Status | None, status: Status) -> Iterator[Violation]:
    """One event against the one before it."""
    gone = before is None or before["state"] == "removed"
    origin = None if gone or before is None else before["state"]
    if told.event["from"] != origin:
        yield Violation("impossible transition", f"{told} comes from {told.event['from']}, it was {origin}")
    if before is None or gone:
        if before is not None and before["instance"] == status["instance"]:
            yield Violation("event of a removed instance", str(told))
        if status["run"] != 0:
            yield Violation("wrong run", f"{told}: a new instance begins with run {status['run']}")
        return
    if before["instance"] != status["instance"]:
        yield Violation("wrong instance", f"{told}: {before['instance']} was not removed")
    began = status["state"] == "initializing" != before["state"]
    if status["run"] != before["run"] + began:
        yield Violation("wrong run", f"{told}: run {status['run']} follows run {before['run']}")
    if told.event.get("repeat") and status != before:
        yield Violation("status differs", f"{told} repeats another status than the newest")


def _check_status(told: Told, status: Status) -> Iterator[Violation]:
    """What a status owes itself."""
    state, code, reason = status.get("state"), status.get("exit_code"), status.get("reason")
    if missing := FIELDS - status.keys():
        yield Violation("incomplete status", f"{told} lacks {' '.join(sorted(missing))}")
        return
    if state not in NEXT:
        yield Violation("unknown state", f"{told}: {state}")
    if reason is not None and reason not in REASONS:
        yield Violation("unknown reason", f"{told}: {reason}")
    event = told.event
    if (event.get("container"), event.get("instance")) != (status["container"], status["instance"]):
        yield Violation("wrong instance", f"{told}: the status is of {status['instance']}")
    if f"{status['service']}-{status['replica']}" != status["container"]:
        yield Violation("wrong container", f"{told}: {status['service']}, {status['replica']}")
    if state == "exited":
        if code is None or status["finished_at"] is None:
            yield Violation("wrong exit code", f"{told}: exited without code or time")
        elif not _may_end_so(status):
            yield Violation("wrong exit code", f"{told}: {code} ({reason}), labels {status['labels']}")
    elif state != "removed" and code is not None:
        yield Violation("wrong exit code", f"{told}: {code} while {state}")
    if state == "failed" and reason in (None, "stopped", "killed"):
        yield Violation("wrong reason", f"{told}: failed because of {reason}")
    if (state in LIVE and status["run"] < 1) or (state == "pending" and status["run"] != 0):
        yield Violation("wrong run", f"{told}: {state} in run {status['run']}")
    if state not in LIVE and status["pid"] is not None:
        yield Violation("pid of nobody", f"{told}: pid {status['pid']} while {state}")
    if state == "running" and status["started_at"] is None:
        yield Violation("incomplete status", f"{told}: running since when?")


def _may_end_so(status: Status) -> bool:
    code, exits = status["exit_code"], status["labels"].get(EXITS)
    if exits is None or code in SIGNALS or code in {int(word) for word in exits.split(",")}:
        return True
    return code == 0 and status["reason"] in ("stopped", "killed")  # before it ran
