"""Judging a stream's settings, choosing a pace: rules without a server."""

from typing import Any

import pytest

from schemas.streams import bucket_spec, stream_specs
from worker.bus.batches import Pace
from worker.bus.streams import bucket_config, judge, stream_config

CONFIGS = {
    str(config["name"]): config
    for config in (
        *(stream_config(spec, replicas=1) for spec in stream_specs()),
        bucket_config(bucket_spec(), replicas=1),
    )
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_contracts_own_settings_are_fine(name: str) -> None:
    assert judge(name, wanted=CONFIGS[name], found=CONFIGS[name]) == []


@pytest.mark.parametrize(
    ("name", "change", "problem", "fatal"),
    [
        ("SANDFLEET_EVT", {"allow_atomic": False}, "has no allow_atomic", False),
        ("SANDFLEET_EVT", {"allow_direct": None}, "has no allow_direct", True),
        ("SANDFLEET_EVT", {"deny_delete": False}, "has no deny_delete", False),
        ("SANDFLEET_EVT", {"subjects": ["other.>"]}, "does not capture sandfleet.v1.evt.>", True),
        ("SANDFLEET_EVT", {"storage": "memory"}, "is in memory", False),
        ("SANDFLEET_EVT", {"max_consumers": 100}, "allows 100 consumers", False),
        ("SANDFLEET_CMD", {"retention": "limits"}, "has retention limits, not workqueue", True),
        ("SANDFLEET_CMD", {"discard": "old"}, "discards old messages", False),
        ("SANDFLEET_CMD", {"discard_new_per_subject": False}, "has no discard_new_per_subject", False),
        ("SANDFLEET_LOG", {"duplicate_window": 1}, "has a short duplicate window", False),
        ("KV_SANDFLEET_NODES", {"subject_delete_marker_ttl": 0}, "has no delete markers", False),
    ],
)
def test_what_costs_something(name: str, change: dict[str, Any], problem: str, fatal: bool) -> None:
    [finding] = judge(name, wanted=CONFIGS[name], found={**CONFIGS[name], **change})
    assert (finding.problem, finding.fatal) == (problem, fatal)
    assert finding.cost


@pytest.mark.parametrize(
    "change", [{"max_age": 1}, {"max_bytes": 5}, {"num_replicas": 3}, {"max_consumers": -1}]
)
def test_limits_are_the_operators(change: dict[str, Any]) -> None:
    config = CONFIGS["SANDFLEET_EVT"]
    assert judge("SANDFLEET_EVT", wanted=config, found={**config, **change}) == []


def test_few_events_go_one_by_one_near_the_server_and_in_a_batch_far_away() -> None:
    near = Pace()
    for _ in range(50):
        near.single_took(0.0003)
        near.batch_took(0.006)
    assert [near.batch_is_better(waiting) for waiting in (1, 2, 10, 25, 200)] == [
        False,
        False,
        False,
        True,
        True,
    ]
    far = Pace()
    for _ in range(50):
        far.single_took(0.02)
        far.batch_took(0.025)
    assert [far.batch_is_better(waiting) for waiting in (1, 2, 10)] == [False, True, True]


def test_one_stall_does_not_change_the_pace_for_long() -> None:
    pace = Pace()
    for _ in range(50):
        pace.single_took(0.0003)
        pace.batch_took(0.006)
    pace.batch_took(60.0)
    pace.single_took(60.0)
    assert pace.batch_is_better(32)
    for _ in range(20):
        pace.single_took(0.0003)
    assert not pace.batch_is_better(2)
