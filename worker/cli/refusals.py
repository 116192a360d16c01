"""What `inspect` shows of the refusals of a container's sandbox, where the node's system records any."""

from datetime import datetime, timedelta

from schemas.errors import Unsupported
from schemas.queries import MAX_SINCE_S, DenialsReply, DenialsRequest
from schemas.status import ContainerStatus
from worker.cli.context import Context, Target
from worker.cli.human import age, now
from worker.cli.output import Output
from worker.cli.style import clean
from worker.client import FleetClient
from worker.errors import ContractError

# A Mac's log is slow to search: about a second for five minutes of it.
MOST_S = 3600.0
LEAST_S = 60.0
TIMEOUT_S = 60.0


async def ask_refusals(
    context: Context, fleet: FleetClient, target: Target, status: ContainerStatus, since: datetime | None
) -> DenialsReply | None:
    """None where the node has none to tell; what keeps it from telling is said in a warning."""
    request = DenialsRequest(container=target.cid, since_s=window_s(status, since))
    async with context.out.busy(f"reading the log of {target.node}"):
        try:
            return await fleet.query(target.node, "denials", request, DenialsReply, timeout_s=TIMEOUT_S)
        except Unsupported:
            return None  # not a Mac, or a worker that does not know the question
        except ContractError as failure:
            context.out.warning(f"what the sandbox refused is not known: {failure.message}")
            return None


def window_s(status: ContainerStatus, since: datetime | None) -> float:
    """How many seconds to look back: since `since`, else since the newest start, an hour at most."""
    if since is not None:
        return min(max((now() - since).total_seconds(), 1.0), MAX_SINCE_S)
    begun = status.started_at or status.created_at
    ran_s = MOST_S if begun is None else (now() - begun + timedelta(seconds=5)).total_seconds()
    return min(max(ran_s, LEAST_S), MOST_S)


def show_refusals(out: Output, reply: DenialsReply) -> None:
    out.line(out.paint("\nRefused by the sandbox", "strong"))
    for entry in reply.denials:
        what = entry.operation if entry.argument is None else f"{entry.operation} {entry.argument}"
        who = f"({entry.process}, pid {entry.pid}, {age(entry.time_last)})"
        out.hanging(f"{entry.count}x ".rjust(7), clean(f"{what}  {who}"))
        if entry.allow is not None:
            out.hanging("       to allow it: ", clean(entry.allow), style="name")
    if not reply.denials:
        out.line("nothing on record")
    out.hanging("" if reply.complete else "incomplete: ", clean(reply.note), style="dim")
