"""nodes, info, drain, resume."""

import asyncio

from schemas.commands import Drain, Resume
from schemas.node import NodeInfo, NodeState
from worker.cli.app import OK
from worker.cli.context import Context
from worker.cli.delivery_view import delivery_rows, show_logs, waiting_cell
from worker.cli.human import age, now, size, stamp
from worker.cli.output import Cell, Column, Row
from worker.cli.parser import Namespace, Parser, duration
from worker.cli.style import Style, clean
from worker.client import FleetClient, new_id
from worker.errors import Unavailable

STATE_STYLE: dict[str, Style] = {
    NodeState.READY: "good",
    NodeState.DRAINING: "warn",
    NodeState.DRAINED: "warn",
    NodeState.STOPPED: "dim",
}


def options_nodes(parser: Parser) -> None:
    parser.argument("-a", "--all", action="store_true", help="also those that are away")
    parser.argument("-q", "--quiet", action="store_true", help="names only")


async def verb_nodes(context: Context, args: Namespace) -> int:
    out = context.out
    async with context.fleet() as fleet:
        present = await fleet.nodes()
        seen = await fleet.last_seen()
        infos = await asyncio.gather(*(_info(fleet, presence.node) for presence in present))
    names = {presence.node for presence in present}
    away = sorted((event for node, event in seen.items() if node not in names), key=lambda event: event.node)
    if out.as_json:
        listed: list[object] = [
            {"node": one.node, "present": True, "state": one.state, "presence": one, "info": info}
            for one, info in zip(present, infos, strict=True)
        ]
        if args.all:
            listed += [
                {"node": one.node, "present": False, "state": one.state, "presence": None, "info": one.info}
                for one in away
            ]
        out.document(listed)
        return OK
    if args.quiet:
        for name in sorted(names | ({event.node for event in away} if args.all else set())):
            out.line(clean(name))
        return OK
    rows: list[Row] = [
        [
            one.node,
            Cell(str(one.state), STATE_STYLE.get(one.state, "")),
            f"{one.slots_used}/{one.slots}",
            *_machine(info),
            waiting_cell(info),
            age(info.started_at, now()) if info else "-",
        ]
        for one, info in zip(present, infos, strict=True)
    ]
    if args.all:
        rows += [
            [
                event.node,
                Cell(
                    "stopped" if event.state == "stopped" else "away",
                    "dim" if event.state == "stopped" else "bad",
                ),
                Cell("-", "dim"),
                *_machine(event.info),
                Cell("-", "dim"),
                Cell("-", "dim"),
            ]
            for event in away
        ]
    columns = [Column("NODE", keep=True), Column("STATE", keep=True), Column("SLOTS", right=True)]
    columns += [Column("SYSTEM"), Column("SANDBOX"), Column("WAITING"), Column("STARTED")]
    out.table(columns, rows, empty="no node is there: start one with sandfleet dev or sandfleet worker")
    unexpected = [event.node for event in away if event.state != "stopped"]
    if unexpected and not args.all:
        out.note(f"{len(unexpected)} more known but away: see sandfleet nodes --all")
    return OK


async def _info(fleet: FleetClient, node: str) -> NodeInfo | None:
    try:
        return await fleet.info(node)
    except Unavailable:
        return None  # it went while we asked: its presence is shown all the same


def _machine(info: NodeInfo | None) -> list[Cell | str]:
    if info is None:
        return [Cell("-", "dim"), Cell("-", "dim")]
    return [f"{info.os} {info.arch}, {info.cpus} cpus", info.capabilities.sandbox]


def options_info(parser: Parser) -> None:
    parser.example("sandfleet info --json | jq .capabilities")


async def verb_info(context: Context, args: Namespace) -> int:
    out = context.out
    async with context.fleet() as fleet:
        info = await fleet.info(await context.node(fleet))
    if out.as_json:
        out.document(info)
        return OK
    capabilities = info.capabilities
    out.line(
        f"{out.paint(info.node, 'strong')}  {out.paint(str(info.state), STATE_STYLE.get(info.state, ''))}"
    )
    rows: list[tuple[str, Cell | str | None]] = [
        ("worker", f"sandfleet {info.version}, api {info.api.version}"),
        ("host", f"{info.hostname}: {info.os} {info.os_version}, {info.arch}"),
        ("machine", f"{info.cpus} cpus, {size(info.memory_bytes)}"),
        ("gpus", ", ".join(info.gpus)),
        ("slots", f"{info.slots_used} of {info.slots} used"),
        ("pools", ", ".join(info.pools)),
        ("labels", ", ".join(f"{name}={value}" for name, value in sorted(info.labels.items()))),
        ("started", stamp(info.started_at)),
        ("boot", info.boot),
        ("epoch", info.epoch),
        ("nats", Cell("no credentials (--insecure)", "warn") if info.insecure else "with credentials"),
        ("sandbox", capabilities.sandbox),
        ("isolation", ", ".join(capabilities.isolation)),
        ("network", ", ".join(capabilities.network)),
        ("limits", ", ".join(capabilities.limits)),
        ("clone", capabilities.clone),
        ("features", ", ".join(info.api.features)),
    ]
    out.fields((name, value) for name, value in rows if value)
    if info.delivery is not None:
        out.line(out.paint("\nOn its way to the streams", "strong"))
        out.fields(delivery_rows(info.delivery))
        show_logs(out, info.delivery)
    if capabilities.not_enforced:
        out.line(out.paint("\nNot enforced here", "warn"))
        for lack in capabilities.not_enforced:
            where = f" ({lack.isolation})" if lack.isolation else ""
            out.hanging("  ", clean(f"{lack.feature}{where}: {lack.reason}"))
    return OK


def options_drain(parser: Parser) -> None:
    parser.argument("--stop", action="store_true", help="stop what runs instead of waiting for its end")
    parser.argument(
        "-t", "--timeout", type=duration, metavar="DURATION", help="give up waiting; the node stays draining"
    )
    parser.details = "Returns when nothing runs on the node any more. `sandfleet resume` takes it back."
    parser.example("sandfleet drain --node mac-1 --stop")


async def verb_drain(context: Context, args: Namespace) -> int:
    command = Drain(id=new_id(), timeout_s=args.timeout, stop_containers=args.stop)
    return await _node_command(context, command, "drained")


def options_resume(parser: Parser) -> None:
    parser.example("sandfleet resume --node mac-1")


async def verb_resume(context: Context, args: Namespace) -> int:
    return await _node_command(context, Resume(id=new_id()), "ready")


async def _node_command(context: Context, command: Drain | Resume, told: str) -> int:
    async with context.fleet() as fleet:
        node = await context.node(fleet)
        doing = f"draining {node}" if isinstance(command, Drain) else f"resuming {node}"
        async with context.out.busy(doing):
            done = await fleet.command(node, None, command, on_absent=context.tell_absent)
    if context.out.as_json:
        context.out.json_line(done)
    else:
        context.out.line(f"{node} {told}")
    return OK
