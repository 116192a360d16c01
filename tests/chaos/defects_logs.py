"""Deliberate defects of the logs, each with the name under which it must be found."""

import copy

from .breaking import Defect, data_chunk, event, rename
from .history import History


def lost_log_byte(history: History) -> None:
    chunk = data_chunk(history)
    chunk.data = chunk.data[:-1]
    rename(chunk)


def lost_chunk(history: History) -> None:
    history.logs.remove(data_chunk(history))


def lost_end_of_a_log(history: History) -> None:
    """The last line is missing, and the end of the run says nothing of it."""
    chunk = data_chunk(history, last=True)
    chunk.data = chunk.data[: chunk.data.rstrip(b"\n").rfind(b"\n") + 1]
    rename(chunk)
    after = [
        m
        for m in history.logs
        if m.headers["Sandfleet-Instance"] == chunk.headers["Sandfleet-Instance"]
        and m.subject == chunk.subject
        and m.stream_seq > chunk.stream_seq
    ]
    assert not after, "the end of the run must stand in this chunk"


def too_small_a_gap_marker(history: History) -> None:
    chunk = data_chunk(history)
    lost = len(chunk.data) - 1
    chunk.data = b""
    chunk.headers |= {"Sandfleet-Lost": str(lost), "Sandfleet-Lost-Reason": "size"}
    head = chunk.headers["Nats-Msg-Id"].rpartition("+")[0]
    chunk.headers["Nats-Msg-Id"] = f"{head}+lost{lost}"


def duplicated_chunk(history: History) -> None:
    chunk = data_chunk(history)
    history.logs.insert(history.logs.index(chunk) + 1, copy.deepcopy(chunk))


def swapped_chunks(history: History) -> None:
    chunk = data_chunk(history)
    following = next(
        m
        for m in history.logs
        if m.subject == chunk.subject
        and m.stream_seq > chunk.stream_seq
        and m.headers["Sandfleet-Instance"] == chunk.headers["Sandfleet-Instance"]
    )
    here, there = history.logs.index(chunk), history.logs.index(following)
    history.logs[here], history.logs[there] = following, chunk


def another_log_byte(history: History) -> None:
    chunk = data_chunk(history)
    chunk.data = b"?" + chunk.data[1:]


def log_of_another_container(history: History) -> None:
    chunk = data_chunk(history)
    other = next(
        m
        for m in history.logs
        if m.data and m.headers["Sandfleet-Instance"] != chunk.headers["Sandfleet-Instance"]
    )
    chunk.data = (other.data * 100)[: len(chunk.data)]


def line_that_was_never_printed(history: History) -> None:
    for witness in history.witnesses:
        witness.stdout = max(0, witness.stdout - 2)


def no_eof(history: History) -> None:
    at = next(i for i, m in enumerate(history.logs) if "Sandfleet-Eof" in m.headers and not m.data)
    del history.logs[at]


def eof_twice(history: History) -> None:
    at = next(i for i, m in enumerate(history.logs) if "Sandfleet-Eof" in m.headers and not m.data)
    history.logs.insert(at + 1, copy.deepcopy(history.logs[at]))


def incomplete_without_a_cause(history: History) -> None:
    codes = {
        (s["instance"], s["run"]): s["reason"]
        for m in history.events
        if (s := event(m).get("status")) is not None and s["state"] in ("exited", "failed")
    }
    chunk = next(
        m
        for m in history.logs
        if "Sandfleet-Eof" in m.headers
        and codes[m.headers["Sandfleet-Instance"], int(m.headers["Sandfleet-Run"])] is None
    )
    chunk.headers["Sandfleet-Incomplete"] = "supervisor_lost"


DEFECTS: list[tuple[Defect, str]] = [
    (lost_log_byte, "log bytes lost"),
    (lost_chunk, "log bytes lost"),
    (lost_end_of_a_log, "log bytes lost"),
    (too_small_a_gap_marker, "log bytes lost"),
    (duplicated_chunk, "log bytes twice"),
    (swapped_chunks, "log out of order"),
    (another_log_byte, "wrong log bytes"),
    (log_of_another_container, "wrong log bytes"),
    (line_that_was_never_printed, "log bytes invented"),
    (no_eof, "no eof"),
    (eof_twice, "eof twice"),
    (incomplete_without_a_cause, "incomplete without a cause"),
]
