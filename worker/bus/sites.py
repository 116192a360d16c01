"""Sites: streams of one JetStream domain that copy from another's, across a leaf node connection.

A site is a leaf node with a domain and streams of its own. Between it and the hub no publish to a stream's
subject may cross, or the streams of both would capture it (`deploy/nats/` denies these subjects on both ends).
What the other side needs, its streams fetch by themselves:

events, logs, stats, presence     site → hub     `collect`: the hub's streams source the site's
commands of the site's nodes      hub → site     `forward_commands`: the site's stream sources the hub's

A source goes on after a cut from the last message that its stream holds. From the hub's work queue it takes each
command with an acknowledgement, so the hub keeps what the site has not stored (nats-server 2.14 or newer, ADR-60).
"""

from collections.abc import Sequence
from typing import Any

from schemas.subjects import Subjects
from worker.bus.connection import Bus
from worker.bus.jetstream import StreamNames
from worker.bus.streams import find_stream, names_of
from worker.errors import Configuration

UPDATE_TIMEOUT_S = 15.0
# A source of a work queue without acknowledgements loses what a cut catches on its way.
SAFE_QUEUE_SOURCES = (2, 14)


async def collect(bus: Bus, site: str) -> list[str]:
    """On the hub: its streams also hold what the domain `site` has. The names of the streams that were changed.

    Configuration: `site` is this connection's own domain, or a stream is missing here.
    """
    _check_other(bus, site)
    names = names_of(bus)
    changed = []
    for name in (names.events, names.logs, names.stats, names.nodes):
        if await _add_sources(bus, name, [source(name, site)]):
            changed.append(name)
    return changed


async def forward_commands(bus: Bus, hub: str, nodes: Sequence[str], *, subjects: Subjects) -> list[str]:
    """At a site: its stream takes over the commands for `nodes` that are stored at the domain `hub`.

    Each node by a source of its own, so that adding one leaves the others where they are. Gives the names of the
    nodes that are new. Configuration: as `collect`, or the server is too old to do it without loss.
    """
    _check_other(bus, hub)
    if _version(bus.server_version) < SAFE_QUEUE_SOURCES:
        raise Configuration(
            f"nats-server {bus.server_version} takes commands from another domain without acknowledging them: "
            f"it must be 2.14 or newer here and there"
        )
    name = StreamNames(bus.cfg.stream_prefix).commands
    return [
        node
        for node in nodes
        if await _add_sources(bus, name, [source(name, hub, subject=subjects.commands_of(node))])
    ]


def source(stream: str, domain: str, *, subject: str | None = None) -> dict[str, Any]:
    """A source as the API has it: the stream of that name in another domain."""
    found: dict[str, Any] = {"name": stream, "external": {"api": f"$JS.{domain}.API"}}
    if subject is not None:
        found["filter_subject"] = subject
    return found


def with_sources(config: dict[str, Any], sources: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """A stream's configuration with these sources as well; None when it has them. All else stays. Pure."""
    present = [_identity(one) for one in config.get("sources") or ()]
    missing = [one for one in sources if _identity(one) not in present]
    return {**config, "sources": [*(config.get("sources") or ()), *missing]} if missing else None


def _identity(source: dict[str, Any]) -> tuple[str, str, str]:
    api = (source.get("external") or {}).get("api", "")
    return str(source.get("name")), str(api), str(source.get("filter_subject") or "")


async def _add_sources(bus: Bus, name: str, sources: Sequence[dict[str, Any]]) -> bool:
    info = await find_stream(bus, name)
    if info is None:
        raise Configuration(f"{bus.url} has no stream {name}: create it with `sandfleet setup` first")
    config = with_sources(info.config, sources)
    if config is None:
        return False
    await bus.js.api(f"STREAM.UPDATE.{name}", config, timeout=UPDATE_TIMEOUT_S)
    return True


def _check_other(bus: Bus, domain: str) -> None:
    if domain == bus.cfg.domain:
        raise Configuration(f"{domain} is this connection's own domain: a stream cannot copy from itself")


def _version(text: str) -> tuple[int, int]:
    numbers = text.split(".")
    try:
        return int(numbers[0]), int(numbers[1])
    except (IndexError, ValueError):
        return 0, 0  # an odd one is taken for an old one
