"""Streams: creating what is missing, judging what is there, waiting for it.

What exists keeps its operator's settings. A worker creates none unless told to: in the domain of a leaf node a
client that finds no stream would make a local one, and both would capture each publish. Where both sides have
streams on purpose the link must keep their subjects apart (sites.py).
"""

import asyncio
from typing import Any

import msgspec
from loguru import logger

from schemas.streams import BucketSpec, StreamSpec, bucket_spec, stream_specs
from schemas.subjects import DEFAULT_PREFIX, Subjects
from worker.bus.confined import NotAllowed, ask
from worker.bus.connection import Bus
from worker.bus.failures import JetStreamError, NoResponders
from worker.bus.jetstream import StreamInfo, StreamNames
from worker.errors import Configuration, Unavailable

NANOS = 1_000_000_000
JOB_ACK_WAIT_S = 60.0
JOB_MAX_ACK_PENDING = 10_000
RETRY_S = 1.0
REPORT_EVERY_S = 30.0


class Created(msgspec.Struct, frozen=True):
    """What `setup_streams` found missing and made, and what was there."""

    made: tuple[str, ...]
    kept: tuple[str, ...]


class Finding(msgspec.Struct, frozen=True):
    """`stream` is missing, or has a setting that costs something. `fatal`: a worker cannot run with it. `unknown`:
    this user may not ask about it, and nothing is known to be wrong.
    """

    stream: str
    problem: str
    cost: str
    fatal: bool = False
    unknown: bool = False


def names_of(bus: Bus) -> StreamNames:
    return StreamNames(bus.cfg.stream_prefix)


def stream_config(spec: StreamSpec, *, replicas: int) -> dict[str, Any]:
    """A stream of the contract as the API's configuration."""
    config: dict[str, Any] = {
        "name": spec.name,
        "subjects": list(spec.subjects),
        "retention": spec.retention.value,
        "storage": "file",
        "compression": spec.compression.value,
        "max_age": int(spec.max_age_s * NANOS),
        "max_bytes": spec.max_bytes,
        "max_msgs": -1,
        "max_msgs_per_subject": spec.max_msgs_per_subject,
        "max_msg_size": -1,
        "max_consumers": spec.max_consumers,
        "discard": spec.discard.value,
        "discard_new_per_subject": spec.discard_new_per_subject,
        "allow_msg_ttl": spec.allow_msg_ttl,
        "deny_delete": spec.deny_delete,
        "allow_direct": spec.allow_direct,
        "allow_atomic": spec.allow_atomic,
        "num_replicas": replicas,
    }
    if spec.duplicate_window_s is not None:
        config["duplicate_window"] = int(spec.duplicate_window_s * NANOS)
    return config


def bucket_config(spec: BucketSpec, *, replicas: int) -> dict[str, Any]:
    """The stream behind a key-value bucket (ADR-8), with markers for keys that expired (ADR-48)."""
    return {
        "name": f"KV_{spec.name}",
        "subjects": [f"$KV.{spec.name}.>"],
        "retention": "limits",
        "storage": "file",
        "max_age": int(spec.ttl_s * NANOS),
        "max_bytes": -1,
        "max_msgs": -1,
        "max_msgs_per_subject": 1,
        "max_msg_size": -1,
        "max_consumers": -1,
        "discard": "new",
        "allow_rollup_hdrs": True,
        "allow_direct": True,
        "deny_delete": True,
        "allow_msg_ttl": True,
        "subject_delete_marker_ttl": int(spec.marker_ttl_s * NANOS),
        "duplicate_window": int(min(spec.ttl_s, 120.0) * NANOS),
        "num_replicas": replicas,
    }


def wanted(bus: Bus, prefix: str = DEFAULT_PREFIX) -> list[dict[str, Any]]:
    """The configuration of every stream of the contract under this bus's settings."""
    replicas, stream_prefix = bus.cfg.replicas, bus.cfg.stream_prefix
    configs = [stream_config(spec, replicas=replicas) for spec in stream_specs(prefix, stream_prefix)]
    return [*configs, bucket_config(bucket_spec(stream_prefix), replicas=replicas)]


async def setup_streams(
    bus: Bus, *, subjects: Subjects | None = None, pools: tuple[str, ...] | list[str] = ()
) -> Created:
    """Create the streams, the bucket and one durable consumer per pool, where they are missing.

    Configuration: JetStream is off, or a stream of another name has our subjects. JetStreamError: any other
    refusal, such as replicas on a single server.
    """
    subjects = subjects or Subjects()
    made: list[str] = []
    kept: list[str] = []
    try:
        for config in wanted(bus, subjects.prefix):
            name = config["name"]
            (made if await _create(bus, name, config) else kept).append(name)
        for pool in pools:
            name = f"{names_of(bus).jobs}/{pool}"
            (made if await _create_pool(bus, subjects, pool) else kept).append(name)
    except NoResponders:
        raise _no_jetstream(bus) from None
    except JetStreamError as error:
        if error.jetstream_off:
            raise _no_jetstream(bus) from None
        raise
    return Created(tuple(made), tuple(kept))


async def set_up_at_last(bus: Bus, *, subjects: Subjects, pools: tuple[str, ...] | list[str] = ()) -> Created:
    """As `setup_streams`, for a worker: a server that does not answer, or a cluster without a leader, is waited
    for. Raises what waiting does not mend.
    """
    loop = asyncio.get_running_loop()
    told: float | None = None
    while True:
        await bus.wait_connected()
        try:
            return await setup_streams(bus, subjects=subjects, pools=pools)
        except Unavailable as failure:
            if isinstance(failure, JetStreamError) and not failure.passing:
                raise
            if told is None or loop.time() - told > REPORT_EVERY_S:
                told = loop.time()
                logger.warning("the streams cannot be set up yet: {}; trying again", failure.message)
        await asyncio.sleep(RETRY_S)


async def _create(bus: Bus, name: str, config: dict[str, Any]) -> bool:
    if await find_stream(bus, name) is not None:
        return False
    try:
        await bus.js.api(f"STREAM.CREATE.{name}", config, timeout=15.0)
    except JetStreamError as error:
        if error.err_code == JetStreamError.STREAM_NAME_IN_USE:
            return False  # somebody was faster, with settings of their own
        if error.err_code == JetStreamError.SUBJECT_OVERLAP:
            raise Configuration(
                f"the stream {name} cannot be made: another stream captures {config['subjects'][0]}"
            ) from None
        raise
    return True


async def _create_pool(bus: Bus, subjects: Subjects, pool: str) -> bool:
    stream, pattern = names_of(bus).jobs, subjects.jobs_of(pool)
    try:
        await bus.js.api(f"CONSUMER.INFO.{stream}.{pool}")
        return False
    except JetStreamError as error:
        if error.err_code != JetStreamError.CONSUMER_NOT_FOUND:
            raise
    config = {
        "name": pool,
        "durable_name": pool,
        "filter_subject": pattern,
        "ack_policy": "explicit",
        "ack_wait": int(JOB_ACK_WAIT_S * NANOS),
        "max_ack_pending": JOB_MAX_ACK_PENDING,
        "max_deliver": -1,
        "deliver_policy": "all",
        "replay_policy": "instant",
    }
    request = {"stream_name": stream, "config": config, "action": "create"}
    try:
        await bus.js.api(f"CONSUMER.CREATE.{stream}.{pool}.{pattern}", request, timeout=15.0)
    except JetStreamError as error:
        if error.err_code == JetStreamError.CONSUMER_EXISTS:
            return False
        raise
    return True


async def find_stream(bus: Bus, name: str) -> StreamInfo | None:
    """None when there is no such stream."""
    try:
        return await bus.js.stream_info(name)
    except JetStreamError as error:
        if error.err_code == JetStreamError.STREAM_NOT_FOUND:
            return None
        raise


async def wait_for_streams(bus: Bus) -> None:
    """Return once the streams that a worker asks about are there (its permissions show it EVT and LOG only).

    Creates none; says what it waits for. Configuration when JetStream is off on a server that answers.
    """
    names = names_of(bus)
    loop = asyncio.get_running_loop()
    told: float | None = None
    while True:
        missing = await _missing(bus, (names.events, names.logs))
        if not missing:
            return
        if told is None or loop.time() - told > REPORT_EVERY_S:
            told = loop.time()
            logger.warning("waiting for {}: create it with `sandfleet setup` or start with --setup", missing)
        await asyncio.sleep(RETRY_S)


async def _missing(bus: Bus, names: tuple[str, ...]) -> str:
    """What is not there (yet), in words; empty when all is."""
    await bus.wait_connected()
    missing = []
    for name in names:
        try:
            if await find_stream(bus, name) is None:
                missing.append(f"the stream {name}")
        except JetStreamError as error:
            if error.jetstream_off:
                raise _no_jetstream(bus) from None
            return f"JetStream ({error.description})"
        except NoResponders:
            return "JetStream"
        except Unavailable as failure:
            return f"JetStream ({failure.message})"
    return ", ".join(missing)


async def check_streams(bus: Bus, *, subjects: Subjects | None = None) -> list[Finding]:
    """What is missing or set in a way that costs something; empty when all is as the contract has it.

    A node's own user may ask about some streams only: of the others it says just that.
    """
    findings: list[Finding] = []
    try:
        for config in wanted(bus, (subjects or Subjects()).prefix):
            name = str(config["name"])
            try:
                info = await ask(bus, find_stream(bus, name))
            except NotAllowed:
                findings.append(Finding(name, "not allowed to ask", "", unknown=True))
                continue
            if info is None:
                findings.append(Finding(name, "is missing", "run `sandfleet setup`", fatal=True))
            else:
                findings += judge(name, wanted=config, found=info.config)
    except NoResponders:
        return [Finding("JetStream", "does not answer", "no command can be received", fatal=True)]
    except JetStreamError as error:
        if not error.jetstream_off:
            raise
        return [Finding("JetStream", "is off", "no command can be received", fatal=True)]
    return findings


# setting, what its absence costs, whether a worker cannot run without it
_SWITCHES = (
    ("allow_atomic", "events go out one by one, which is slow far away from the server", False),
    ("allow_direct", "a worker cannot find its own last message", True),
    ("deny_delete", "events can be deleted, and a node takes the gap for a loss", False),
    ("allow_msg_ttl", "publishers cannot let a message expire", False),
    ("allow_rollup_hdrs", "a key cannot be purged", False),
    ("discard_new_per_subject", "old messages give way to new ones unanswered", False),
)


def judge(name: str, *, wanted: dict[str, Any], found: dict[str, Any]) -> list[Finding]:
    """A stream's settings against the contract's: only what matters, limits are the operator's. Pure."""
    findings = []
    if missing := [subject for subject in wanted["subjects"] if subject not in found.get("subjects", [])]:
        problem = f"does not capture {', '.join(missing)}"
        findings.append(Finding(name, problem, "what is published there is lost", fatal=True))
    if found.get("retention") != wanted["retention"]:
        problem = f"has retention {found.get('retention')}, not {wanted['retention']}"
        findings.append(Finding(name, problem, "messages go too early or never", fatal=True))
    for setting, cost, fatal in _SWITCHES:
        if wanted.get(setting) and not found.get(setting):
            findings.append(Finding(name, f"has no {setting}", cost, fatal=fatal))
    if found.get("storage") == "memory":
        findings.append(Finding(name, "is in memory", "a server's restart loses it"))
    if wanted["discard"] == "new" and found.get("discard") != "new":
        findings.append(Finding(name, "discards old messages", "a full stream loses what nobody answered"))
    if wanted.get("subject_delete_marker_ttl") and not found.get("subject_delete_marker_ttl"):
        findings.append(Finding(name, "has no delete markers", "watchers do not see a node vanish"))
    limit = int(found.get("max_consumers", -1))
    if wanted["max_consumers"] > 1000 and 0 < limit < wanted["max_consumers"]:
        findings.append(Finding(name, f"allows {limit} consumers", "no more nodes or readers than that"))
    window = int(wanted.get("duplicate_window") or 0)
    if window and int(found.get("duplicate_window", 0)) < window:
        findings.append(Finding(name, "has a short duplicate window", "a repeated chunk may be stored twice"))
    return findings


def _no_jetstream(bus: Bus) -> Configuration:
    return Configuration(
        f"JetStream is off at {bus.url}: enable it in the server's configuration (jetstream)"
    )
