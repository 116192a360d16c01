"""What `doctor` says of the nodes that are there: whether what they have to tell arrives."""

import asyncio

from schemas.node import NodeInfo
from worker.bus.confined import NotAllowed, ask
from worker.cli.delivery_view import complaints
from worker.cli.doctor_checks import Finding, lack, ok
from worker.client import FleetClient
from worker.errors import Unavailable

CHECK = "delivery"
COST = "dashboards are behind; what is unsent stays on the node's disk, what is lost is marked as lost"
DO = "look for a full or missing stream (sandfleet doctor, nats stream report), then at the worker's log"


async def delivery_checks(fleet: FleetClient, nodes: list[str]) -> list[Finding]:
    """Nothing for whoever may not ask them."""
    try:
        answers = await asyncio.gather(*(_info(fleet, node) for node in nodes))
    except NotAllowed:
        return []
    findings = [judge(node, info) for node, info in zip(nodes, answers, strict=True)]
    lacks = [finding for finding in findings if finding is not None]
    return lacks or ([ok(CHECK, "events and logs of all nodes arrive")] if nodes else [])


async def _info(fleet: FleetClient, node: str) -> NodeInfo | str:
    try:
        return await ask(fleet.bus, fleet.info(node))
    except NotAllowed:
        raise
    except Unavailable as failure:
        return failure.message


def judge(node: str, info: NodeInfo | str) -> Finding | None:
    """None when nothing is wrong, or when the node is of a version that does not tell."""
    if isinstance(info, str):
        return lack(
            "warn", CHECK, f"{node}: {info}", "it cannot be asked for anything", "see the worker's log"
        )
    found = [] if info.delivery is None else complaints(info.delivery)
    return lack("warn", CHECK, f"{node}: {'; '.join(found)}", COST, DO) if found else None
