"""What `doctor` says of the server, as the user that the configuration names: an operator's, or a node's own, whom the
contract lets ask about little. What that one may not ask is unknown, and no lack.
"""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

from worker.bus.confined import NotAllowed, ask, can_hear
from worker.bus.connection import Bus
from worker.bus.credentials import has_credentials
from worker.bus.failures import JetStreamError
from worker.bus.messages import parse_time
from worker.bus.streams import Finding as StreamFinding
from worker.bus.streams import check_streams, names_of
from worker.cli.doctor_checks import Finding, Level, lack, ok
from worker.cli.doctor_delivery import delivery_checks
from worker.cli.human import size, span
from worker.client import FleetClient
from worker.config import NatsConfig
from worker.errors import Configuration, ContractError, Unavailable

SKEW_WARN_S = 1.0
SKEW_FAIL_S = 30.0
WANTED_PAYLOAD = 2**20
CLIENT = "sandfleet doctor"


async def server_checks(config: NatsConfig, where: str, node: str | None) -> list[Finding]:
    """Reachable, new enough, credentials, clock, streams, nodes. `node`: whose these credentials may be."""
    findings = [credentials_check(config)]
    try:
        async with _connected(config, node) as fleet:
            findings += await _reached(fleet, node)
    except (Unavailable, Configuration) as failure:
        cost = "nothing can be commanded or seen; a worker waits for it"
        do = f"{where}; or start sandfleet dev to try things out"
        findings.append(lack("fail", "server", failure.message, cost, do))
    return findings


@asynccontextmanager
async def _connected(config: NatsConfig, node: str | None) -> AsyncIterator[FleetClient]:
    """A client; with a node's own key one that is answered where that node may listen."""
    fleet = await FleetClient.connect(config, name=CLIENT)
    try:
        if node is not None and not await can_hear(fleet.bus):
            await fleet.close()
            fleet = FleetClient(await Bus.connect(config, node=node, name=CLIENT, retry=False))
        yield fleet
    finally:
        await fleet.close()


async def _reached(fleet: FleetClient, node: str | None) -> list[Finding]:
    bus = fleet.bus
    findings = [ok("server", f"{bus.url}, nats-server {bus.server_version}")]
    if bus.max_payload < WANTED_PAYLOAD:
        cost = "large commands, replies and log chunks are refused"
        do = "max_payload: 1MB in the server's file"
        findings.append(lack("fail", "max payload", size(bus.max_payload), cost, do))
    if not await can_hear(bus):
        said = f"these credentials let no answer reach {bus.inbox_prefix}"
        do = "name the node whose they are with --node, or use an operator's"
        return [*findings, _unknown("streams", said, do)]
    streams = await stream_checks(fleet, node)
    findings += streams
    if all(finding.level != "fail" for finding in streams):
        findings.append(await clock_check(fleet))
        try:
            nodes = sorted(presence.node for presence in await ask(bus, fleet.nodes()))
        except NotAllowed:
            return [*findings, _unknown("nodes", "not allowed to ask which are there")]
        findings += [nodes_check(nodes), *await delivery_checks(fleet, nodes)]
    return findings


def _unknown(check: str, found: str, do: str = "") -> Finding:
    return Finding(check=check, level="unknown", found=found, do=do)


def credentials_check(config: NatsConfig) -> Finding:
    try:
        if has_credentials(config):
            return ok("credentials", "configured")
    except Configuration as failure:
        return lack("fail", "credentials", failure.message, "no connection is made")
    return lack(
        "warn",
        "credentials",
        "none",
        "whoever reaches the server commands the fleet; a worker starts only with --insecure",
        "--creds FILE, or [nats] creds, nkey, token_file or tls.cert in the configuration",
    )


async def stream_checks(fleet: FleetClient, node: str | None) -> list[Finding]:
    bus = fleet.bus
    try:
        found = await check_streams(bus, subjects=fleet.subjects)
        unknown = [finding.stream for finding in found if finding.unknown]
        if node is not None and fleet.names.commands in unknown and not await _has_commands(fleet, node):
            missing = StreamFinding(fleet.names.commands, "is missing", "run `sandfleet setup`", fatal=True)
            found = [missing, *found]
    except ContractError as failure:
        return [lack("fail", "streams", failure.message, "no command can be received")]
    lacks = [_of_stream(finding) for finding in found if not finding.unknown]
    prefix = f"{bus.cfg.stream_prefix}_"
    if not lacks and not unknown:
        return [ok("streams", f"all there ({prefix}…)")]
    if not lacks:
        seen = [name for name in (fleet.names.events, fleet.names.logs) if name not in unknown]
        lacks = [ok("streams", f"{' and '.join(seen)} are as they should be")] if seen else []
    return (
        [*lacks, _unknown("streams", f"not allowed to ask about {', '.join(unknown)}")] if unknown else lacks
    )


async def _has_commands(fleet: FleetClient, node: str) -> bool:
    """Whether there is a stream of commands, by what a node may ask: its consumer on it, which need not exist yet."""
    try:
        await ask(fleet.bus, fleet.bus.js.api(f"CONSUMER.INFO.{fleet.names.commands}.{node}"))
    except NotAllowed:
        return True  # somebody else's key: nothing is known
    except JetStreamError as failure:
        return failure.err_code != JetStreamError.STREAM_NOT_FOUND
    return True


def _of_stream(finding: StreamFinding) -> Finding:
    level: Level = "fail" if finding.fatal else "warn"
    if finding.problem == "is missing":
        return lack(
            level, finding.stream, "is missing", "a worker waits until it is there", "sandfleet setup"
        )
    return lack(level, finding.stream, finding.problem, finding.cost, "change it with nats stream edit")


def nodes_check(nodes: list[str]) -> Finding:
    if nodes:
        return ok("nodes", ", ".join(nodes))
    return lack("warn", "nodes", "none is there", "commands wait", "sandfleet worker, or sandfleet dev")


async def clock_check(fleet: FleetClient) -> Finding:
    """The server stamps its answers; half of the round trip is the doubt."""
    before = time.time()
    try:
        answer = await ask(fleet.bus, fleet.bus.js.api(f"STREAM.INFO.{names_of(fleet.bus).events}"))
        server = parse_time(str(answer["ts"]))
    except NotAllowed:
        return _unknown("clock", "not allowed to ask the server for its time")
    except (JetStreamError, KeyError, ValueError):
        return lack("warn", "clock", "the server does not tell its time", "a wrong clock stays unseen")
    after = time.time()
    skew_s = (datetime.fromtimestamp((before + after) / 2, UTC) - server).total_seconds()
    doubt_s = (after - before) / 2
    return judge_clock(skew_s, doubt_s)


def judge_clock(skew_s: float, doubt_s: float) -> Finding:
    """Positive: this machine is ahead."""
    off = max(0.0, abs(skew_s) - doubt_s)
    if off < SKEW_WARN_S:
        return ok("clock", f"within {span(max(off, doubt_s, 0.001))} of the server's")
    found = f"{span(off)} {'ahead of' if skew_s > 0 else 'behind'} the server's"
    cost = "deadlines pass too early or too late, times of events and logs are wrong"
    return lack("fail" if off >= SKEW_FAIL_S else "warn", "clock", found, cost, "run an NTP client on both")
