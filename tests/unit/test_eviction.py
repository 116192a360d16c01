"""Which images go."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.images.eviction import Held, choose, total_bytes

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def held(digest: str, age_s: float, *, used: bool = False, **parts: int) -> Held:
    return Held(
        digest=digest,
        blobs={digest: 1},
        trees=parts or {f"tree-{digest}": 99},
        last_used=NOW - timedelta(seconds=age_s),
        used=used,
    )


def test_nothing_is_chosen_without_a_reason() -> None:
    assert choose([held("a", 1e9)], now=NOW) == []


def test_by_age() -> None:
    images = [held("new", 10), held("old", 100), held("older", 200), held("used", 300, used=True)]
    assert choose(images, now=NOW, older_than_s=50) == ["older", "old"]
    assert choose(images, now=NOW, older_than_s=0) == ["older", "old", "new"]


def test_by_size_the_least_recently_used_first() -> None:
    images = [held("c", 1), held("b", 2), held("a", 3)]
    assert choose(images, now=NOW, keep_bytes=300) == []
    assert choose(images, now=NOW, keep_bytes=299) == ["a"]
    assert choose(images, now=NOW, keep_bytes=100) == ["a", "b"]
    assert choose(images, now=NOW, keep_bytes=0) == ["a", "b", "c"]


def test_what_is_used_stays_whatever_the_size() -> None:
    images = [held("a", 3, used=True), held("b", 2)]
    assert choose(images, now=NOW, keep_bytes=0) == ["b"]


def test_both_together() -> None:
    images = [held("a", 300), held("b", 200), held("c", 10)]
    assert choose(images, now=NOW, older_than_s=100, keep_bytes=250) == ["a"]
    assert choose(images, now=NOW, older_than_s=100, keep_bytes=0) == ["a", "b"]


def test_what_is_shared_is_free_with_the_last_one_only() -> None:
    images = [held("a", 3, shared=100), held("b", 2, shared=100), held("c", 1)]
    assert total_bytes(images) == 202
    assert choose(images, now=NOW, keep_bytes=201) == ["a"]
    assert choose(images, now=NOW, keep_bytes=200) == ["a", "b"]


@pytest.mark.parametrize("keep", [0, 150, 10_000])
@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0, 1e6), st.booleans()), max_size=12))
def test_laws(keep: int, made: list[tuple[int, float, bool]]) -> None:
    images = [
        held(f"i{n}", age, used=used, **{f"part{part}": 10 * part + 1})
        for n, (part, age, used) in enumerate(made)
    ]
    chosen = choose(images, now=NOW, keep_bytes=keep)
    kept = [image for image in images if image.digest not in chosen]
    assert all(image in kept for image in images if image.used)
    # Small enough, or nothing is left that could go.
    assert total_bytes(kept) <= keep or all(image.used for image in kept)
    # None that was used later goes before one that was not.
    if chosen:
        newest = max(image.last_used for image in images if image.digest in chosen)
        assert all(image.used or image.last_used >= newest for image in kept)
