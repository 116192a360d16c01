"""events: the fleet's events as readable lines, or as they are."""

from contextlib import aclosing
from datetime import UTC, datetime, timedelta

from schemas.events import (
    AnyEvent,
    CommandAccepted,
    CommandCompleted,
    CommandRejected,
    HealthChanged,
    ImageChanged,
    JobChanged,
    NodeChanged,
    StateChanged,
)
from schemas.status import ContainerStatus
from worker.cli.app import OK
from worker.cli.context import Context
from worker.cli.human import STATE_STYLE, clock, exit_name, rfc3339, size
from worker.cli.output import Output
from worker.cli.parser import Namespace, Parser, when
from worker.cli.style import Style, clean
from worker.client_streams import SeenEvent

DEFAULT_AGE = timedelta(hours=1)
NODE_WIDTH, NAME_WIDTH, WHAT_WIDTH = 10, 12, 12


def options_events(parser: Parser) -> None:
    parser.argument(
        "containers", metavar="CONTAINER", nargs="*", complete="container", help="(all, and the nodes')"
    )
    parser.argument("-f", "--follow", action="store_true", help="go on as more happens")
    parser.argument(
        "--since",
        type=when,
        metavar="TIME",
        help="a time (RFC 3339), or an age such as 10m (1h; with -f: from now on)",
    )
    parser.argument(
        "--type",
        action="append",
        default=[],
        metavar="TYPE",
        help="only events of this type: state_changed …",
    )
    parser.details = "With --json each line is the event as it lies in the stream."
    parser.example("sandfleet events -f")
    parser.example("sandfleet events --since 1h --json | jq -r 'select(.type==\"command_rejected\")'")


async def verb_events(context: Context, args: Namespace) -> int:
    async with context.fleet() as fleet:
        prefix, node = fleet.subjects.prefix, context.chosen_node or "*"
        names = [(await context.locate(fleet, name)) for name in args.containers]
        subjects = tuple(f"{prefix}.evt.{target.node}.{target.cid}.>" for target in names)
        subjects = subjects or (f"{prefix}.evt.{node}.>",)
        after = await fleet.event_position() if args.follow and args.since is None else None
        since = args.since or (None if args.follow else datetime.now(UTC) - DEFAULT_AGE)
        shown = 0
        async with aclosing(
            fleet.read_events(subjects, after=after, since=since, follow=args.follow)
        ) as events:
            async for seen in events:
                if args.type and _type(seen) not in args.type:
                    continue
                shown += 1
                show_event(context.out, seen)
    if not shown and not context.out.as_json:
        context.out.note("no events since " + (f"{since:%Y-%m-%d %H:%M:%SZ}" if since else "then"))
    return OK


def _type(seen: SeenEvent) -> str:
    if seen.event is not None:
        return str(type(seen.event).__struct_config__.tag)
    import json

    try:
        return str(json.loads(seen.data).get("type", ""))
    except (ValueError, AttributeError):
        return ""


def show_event(out: Output, seen: SeenEvent, *, brief: bool = False) -> None:
    """`brief` is for one node: without its name, and without what its own state says better."""
    if out.as_json:
        out.line(seen.data.decode("utf-8", "replace"))
        return
    if seen.event is None:
        out.line(f"{seen.time:%H:%M:%S}  {clean(seen.subject)}  an event of a type that is not known here")
        return
    event = seen.event
    if brief and (isinstance(event, CommandAccepted) or (isinstance(event, CommandCompleted) and event.ok)):
        return
    moment = clock(event.time) if out.terminal else rfc3339(event.time)
    what, style, detail = describe(event)
    parts = [out.paint(moment, "dim")]
    if not brief:
        parts.append(clean(event.node).ljust(NODE_WIDTH))
    parts.append(out.paint(clean(event.container or "-").ljust(NAME_WIDTH), "strong"))
    parts.append(out.paint(clean(what).ljust(WHAT_WIDTH if detail else 0), style))
    out.line("  ".join([*parts, clean(detail)]).rstrip())


def describe(event: AnyEvent) -> tuple[str, Style, str]:
    """What happened, its colour, and what is worth knowing about it. Pure."""
    match event:
        case StateChanged(status=status, repeat=repeat):
            return (
                str(status.state),
                STATE_STYLE.get(status.state, ""),
                _status(status) + (" (repeated)" if repeat else ""),
            )
        case HealthChanged(health=health, detail=detail):
            return f"health {health}", "good" if health == "healthy" else "warn", detail or ""
        case CommandAccepted(command=command, actor=actor):
            return f"{command} accepted", "dim", f"by {actor}" if actor else ""
        case CommandCompleted(command=command, ok=True, duplicate=duplicate):
            return f"{command} done", "dim", "(again, for a repeated id)" if duplicate else ""
        case CommandCompleted(command=command, error=error):
            return f"{command} failed", "bad", "" if error is None else f"{error.code}: {error.message}"
        case CommandRejected(error=error):
            field = f" ({error.field})" if error.field else ""
            return "command rejected", "bad", f"{error.code}{field}: {error.message}"
        case ImageChanged(image=image, action=action, bytes=count):
            return f"image {action}", "", f"{image}, {size(count)}"
        case NodeChanged(state=state, info=info):
            return f"node {state}", "good" if state == "ready" else "warn", f"sandfleet {info.version}"
        case JobChanged(job_id=job_id, state=state, attempt=attempt):
            return f"job {state}", "", f"{job_id}, attempt {attempt}"


def _status(status: ContainerStatus) -> str:
    parts = []
    if status.state == "running":
        parts += [f"pid {status.pid}"] if status.pid else []
        parts += [f"port {status.port}"] if status.port else []
    if status.exit_code is not None:
        parts.append(f"code {status.exit_code}" if status.exit_code >= 0 else exit_name(status.exit_code))
    if status.reason is not None:
        parts.append(str(status.reason))
    if status.message:
        parts.append(status.message)
    return ", ".join(parts)
