"""The stream table of the contract as data: what `setup` creates and what a reader may expect."""

from enum import StrEnum

import msgspec

from .subjects import DEFAULT_PREFIX

DEFAULT_STREAM_PREFIX = "SANDFLEET"
DAY_S = 86400.0
GIB = 2**30


class Retention(StrEnum):
    WORK_QUEUE = "workqueue"
    LIMITS = "limits"


class Compression(StrEnum):
    NONE = "none"
    S2 = "s2"


class Discard(StrEnum):
    """`new`: a full stream refuses the publisher. `old`: it forgets its oldest message."""

    NEW = "new"
    OLD = "old"


class StreamSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One stream on file storage. -1 is no limit; sizes are bytes, ages seconds."""

    name: str
    subjects: tuple[str, ...]
    retention: Retention
    compression: Compression = Compression.NONE
    max_age_s: float
    max_bytes: int
    max_msgs_per_subject: int = -1
    discard: Discard = Discard.OLD
    discard_new_per_subject: bool = False
    max_consumers: int = -1
    allow_msg_ttl: bool = False
    deny_delete: bool = False
    allow_direct: bool = False
    allow_atomic: bool = False
    duplicate_window_s: float | None = None


class BucketSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The key-value bucket. Without delete markers a watcher would not be told that a key expired."""

    name: str
    ttl_s: float
    marker_ttl_s: float


def stream_specs(
    prefix: str = DEFAULT_PREFIX, stream_prefix: str = DEFAULT_STREAM_PREFIX
) -> tuple[StreamSpec, ...]:
    return (
        StreamSpec(
            name=f"{stream_prefix}_CMD",
            subjects=(f"{prefix}.cmd.>",),
            retention=Retention.WORK_QUEUE,
            max_age_s=7 * DAY_S,
            max_bytes=2 * GIB,
            max_msgs_per_subject=64,
            discard=Discard.NEW,
            discard_new_per_subject=True,
            max_consumers=100_000,
            allow_msg_ttl=True,
        ),
        StreamSpec(
            name=f"{stream_prefix}_JOB",
            subjects=(f"{prefix}.job.>",),
            retention=Retention.WORK_QUEUE,
            max_age_s=7 * DAY_S,
            max_bytes=GIB,
            max_msgs_per_subject=1,
            discard=Discard.NEW,
            discard_new_per_subject=True,
            allow_msg_ttl=True,
        ),
        StreamSpec(
            name=f"{stream_prefix}_EVT",
            subjects=(f"{prefix}.evt.>",),
            retention=Retention.LIMITS,
            max_age_s=30 * DAY_S,
            max_bytes=8 * GIB,
            max_consumers=10_000,
            deny_delete=True,
            allow_direct=True,
            allow_atomic=True,
        ),
        StreamSpec(
            name=f"{stream_prefix}_LOG",
            subjects=(f"{prefix}.log.>",),
            retention=Retention.LIMITS,
            compression=Compression.S2,
            max_age_s=3 * DAY_S,
            max_bytes=8 * GIB,
            max_consumers=10_000,
            allow_direct=True,
            duplicate_window_s=120.0,
        ),
        StreamSpec(
            name=f"{stream_prefix}_STAT",
            subjects=(f"{prefix}.stat.>",),
            retention=Retention.LIMITS,
            max_age_s=3600.0,
            max_bytes=GIB,
            max_msgs_per_subject=360,
        ),
    )


def bucket_spec(stream_prefix: str = DEFAULT_STREAM_PREFIX) -> BucketSpec:
    return BucketSpec(name=f"{stream_prefix}_NODES", ttl_s=15.0, marker_ttl_s=60.0)
