"""When a status must be published again."""

from datetime import UTC, datetime, timedelta
from typing import Any

from worker.bus.jetstream import StreamInfo
from worker.repeating import oldest_safe

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
