"""What an operator reads of a node's deliveries: calm where all arrives, a warning where it does not."""

import io
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from schemas.node import DeliveryInfo, LogBacklog, NodeInfo
from tests.integration.fake_node import FakeNode
from worker.cli.delivery_view import complaints, delivery_rows, show_logs, waiting_cell
from worker.cli.doctor_delivery import judge
from worker.cli.output import Cell, Output

CALM: dict[str, Any] = {
    "outbox_events": 0,
    "oldest_event_age_s": None,
    "log_lag_bytes": 0,
    "log_lost_bytes": 0,
    "logs": [],
    "logs_omitted": 0,
    "commands_redelivered": 0,
    "reconnects": 0,
}


def delivery(**changes: Any) -> DeliveryInfo:
    return DeliveryInfo(**(CALM | changes))


def node(told: DeliveryInfo | None) -> NodeInfo:
    made = FakeNode.__new__(FakeNode)
    made.node = "pc"
    return msgspec.structs.replace(made.info(), delivery=told, started_at=datetime(2026, 11, 24, tzinfo=UTC))


def text(value: Cell | str) -> str:
    return value.text if isinstance(value, Cell) else value


@pytest.mark.parametrize(
    ("changes", "said", "warned"),
    [
        ({}, "-", False),
        ({"outbox_events": 1, "oldest_event_age_s": 0.002}, "1 event", False),
        ({"outbox_events": 1204, "oldest_event_age_s": 90.0}, "1204 events", True),
        ({"log_lag_bytes": 4096}, "4.0 KiB of logs", False),
        (
            {"outbox_events": 2, "oldest_event_age_s": 1.0, "log_lag_bytes": 32 << 20},
            "2 events, 32.0 MiB of logs",
            True,
        ),
        ({"outbox_events": None}, "unknown", True),
    ],
)
def test_the_column(changes: dict[str, Any], said: str, warned: bool) -> None:
    cell = waiting_cell(node(delivery(**changes)))
    assert (cell.text, cell.style == "warn") == (said, warned)


def test_the_column_of_a_node_that_does_not_tell() -> None:
    assert waiting_cell(None).text == waiting_cell(node(None)).text == "-"


def test_the_rows_of_a_calm_node() -> None:
    rows = {name: text(value) for name, value in delivery_rows(delivery())}
    assert rows == {
        "events": "all sent",
        "logs": "all sent",
        "lost": "nothing since the start",
        "commands": "0 redelivered since the start",
        "connection": "0 reconnects since the start",
    }


def test_the_rows_of_one_that_is_not() -> None:
    told = delivery(
        outbox_events=1204,
        oldest_event_age_s=192.0,
        log_lag_bytes=3 << 20,
        log_lost_bytes=2048,
        commands_redelivered=3,
        reconnects=1,
    )
    rows = {name: text(value) for name, value in delivery_rows(told)}
    assert rows == {
        "events": "1204 events unsent, the oldest for 3m 12s",
        "logs": "3.0 MiB unsent",
        "lost": "2.0 KiB of logs since the start",
        "commands": "3 redelivered since the start",
        "connection": "1 reconnect since the start",
    }
    unknown = {name: text(value) for name, value in delivery_rows(delivery(outbox_events=None))}
    assert "the journal does not answer" in unknown["events"]


def test_the_containers_that_are_furthest_behind() -> None:
    logs = [
        LogBacklog(container=f"c-{n}", instance="I", lag_bytes=2048 - n, lost_bytes=n % 2) for n in range(12)
    ]
    out = Output(stdout=io.StringIO(), stderr=io.StringIO())
    show_logs(out, delivery(logs=logs, logs_omitted=4))
    shown, noted = out.stdout.getvalue(), out.stderr.getvalue()  # type: ignore[attr-defined]
    assert "c-9" in shown
    assert "c-10" not in shown
    assert "6 more containers" in noted
    show_logs(out, delivery())
    assert out.stdout.getvalue() == shown  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"outbox_events": 5, "oldest_event_age_s": 0.5, "log_lag_bytes": 100, "reconnects": 9}, []),
        ({"outbox_events": 5, "oldest_event_age_s": 6.0}, ["5 events unsent, the oldest for 6s"]),
        ({"outbox_events": None}, ["its journal does not answer"]),
        (
            {"log_lag_bytes": 17 << 20, "log_lost_bytes": 1},
            ["17.0 MiB of logs unsent", "1 B of logs lost"],
        ),
    ],
)
def test_what_doctor_warns_of(changes: dict[str, Any], expected: list[str]) -> None:
    told = delivery(**changes)
    assert complaints(told) == expected
    found = judge("pc", node(told))
    assert (found is not None) == bool(expected)
    if found is not None:
        assert found.level == "warn"
        assert found.found == f"pc: {'; '.join(expected)}"
        assert found.cost
        assert found.do


def test_doctor_on_a_node_that_does_not_tell_or_answer() -> None:
    assert judge("pc", node(None)) is None
    silent = judge("pc", "no answer within 5 s")
    assert silent is not None
    assert silent.found == "pc: no answer within 5 s"
