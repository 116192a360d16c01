"""When a status must be published again."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from schemas.status import ContainerStatus, State
from worker.bus.jetstream import StreamInfo
from worker.repeating import oldest_safe, shows

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
DAY = timedelta(days=1)


def info(used: int = 0, first: datetime | None = None, **config: Any) -> StreamInfo:
    return StreamInfo(
        created="",
        first_seq=1,
        last_seq=2,
        messages=2,
        bytes=used,
        num_deleted=0,
        deleted=frozenset(),
        config=config,
        first_time=first,
        last_time=NOW if first else None,
    )


def test_no_limit_no_repeat() -> None:
    assert oldest_safe(info(max_age=0, max_bytes=-1), NOW) is None


def test_by_age_half_of_the_limit_is_left() -> None:
    assert oldest_safe(info(max_age=int(30 * DAY.total_seconds() * 1e9)), NOW) == NOW - 15 * DAY


def test_by_size_only_when_nearly_full() -> None:
    first = NOW - 10 * DAY
    assert oldest_safe(info(used=700, first=first, max_bytes=1000), NOW) is None
    assert oldest_safe(info(used=900, first=first, max_bytes=1000), NOW) == NOW - 5 * DAY


def test_the_stricter_of_both_counts() -> None:
    age = int(4 * DAY.total_seconds() * 1e9)
    found = oldest_safe(info(used=900, first=NOW - 10 * DAY, max_bytes=1000, max_age=age), NOW)
    assert found == NOW - 2 * DAY


SHOWN = {"status": {"instance": "I", "run": 2, "state": "exited", "exit_code": 3, "more": "is not looked at"}}


def exited(**changes: Any) -> ContainerStatus:
    given = {"run": 2, "state": State.EXITED, "exit_code": 3, **changes}
    return ContainerStatus(container="a-0", service="a", replica=0, instance="I", **given)


def test_a_status_is_shown_by_its_event() -> None:
    assert shows(json.dumps(SHOWN).encode(), exited())
    assert shows(json.dumps(SHOWN).encode(), exited(message="told otherwise"))


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (None, exited()),
        (b"", exited()),
        (b"\xff", exited()),
        (b'{"status": null}', exited()),
        (json.dumps(SHOWN).encode(), exited(run=3)),
        (json.dumps(SHOWN).encode(), exited(exit_code=0)),
        (json.dumps(SHOWN).encode(), exited(state=State.RUNNING, exit_code=None)),
    ],
)
def test_what_does_not_show_it(data: bytes | None, status: ContainerStatus) -> None:
    assert not shows(data, status)
