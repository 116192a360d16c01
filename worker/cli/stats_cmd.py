"""stats and top: measured by the node at the moment of asking, summed over each container's process tree."""

import asyncio
from datetime import datetime
from typing import Any

import msgspec

from schemas.status import ContainerStatus, State, Stats
from worker.cli.app import OK
from worker.cli.containers_cmd import Listed, list_all
from worker.cli.context import Context, Target
from worker.cli.human import brief, now, size, state_cell
from worker.cli.lifecycle_cmd import find_all
from worker.cli.output import Cell, Column, Output, Row
from worker.cli.parser import Namespace, Parser, duration, pair
from worker.cli.style import clean
from worker.client import FleetClient
from worker.errors import Conflict, ContractError, NotFound

LEAST_INTERVAL_S = 0.5
END_NOTE = "Ctrl-C ends"
COLUMNS = [
    Column("CONTAINER", keep=True),
    Column("CPU%", right=True),
    Column("MEMORY", right=True),
    Column("LIMIT", right=True),
    Column("PROCS", right=True),
    Column("FILES", right=True),
    Column("READ", right=True),
    Column("WRITTEN", right=True),
]


def options_stats(parser: Parser) -> None:
    parser.argument("containers", metavar="CONTAINER", nargs="*", complete="container", help="(all that run)")
    parser.example("sandfleet stats --json | jq 'map(.memory_bytes) | add'")


def options_top(parser: Parser) -> None:
    parser.argument(
        "-i", "--interval", type=duration, default=2.0, metavar="DURATION", help="between two looks (2s)"
    )
    parser.argument(
        "-l",
        "--label",
        type=pair,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="only containers with this label",
    )
    parser.details = "Ctrl-C ends it. Without a terminal one look is printed; --json prints a line each time."


async def verb_stats(context: Context, args: Namespace) -> int:
    out = context.out
    async with context.fleet() as fleet, out.busy("measuring"):
        if args.containers:
            targets, code = await find_all(context, fleet, args.containers)
        else:
            listed, _ = await list_all(context, fleet, State.RUNNING, {})
            targets, code = [Target(one.node, one.status.container) for one in listed if one.reachable], OK
        found = await asyncio.gather(*(_measure(fleet, target) for target in targets))
    stats = [one for one in found if isinstance(one, Stats)]
    for one in found:
        if args.containers and isinstance(one, ContractError):
            out.error(one.message)
            code = code or 4
    if out.as_json:
        out.document(stats)
    else:
        out.table(COLUMNS, [_row(one) for one in stats], empty="nothing runs")
    return code


async def _measure(fleet: FleetClient, target: Target) -> Stats | ContractError:
    try:
        return await fleet.stats(target.node, target.cid)
    except (Conflict, NotFound) as failure:
        return failure  # ended while we asked


def _row(stats: Stats) -> Row:
    return [
        stats.container,
        "-" if stats.cpu_percent is None else f"{stats.cpu_percent:.1f}",
        _memory(stats),
        size(stats.memory_limit) if stats.memory_limit else Cell("-", "dim"),
        str(stats.processes),
        "-" if stats.open_files is None else str(stats.open_files),
        size(stats.read_bytes),
        size(stats.write_bytes),
    ]


def _memory(stats: Stats) -> Cell:
    share = stats.memory_bytes / stats.memory_limit if stats.memory_limit else 0.0
    return Cell(size(stats.memory_bytes), "bad" if share > 0.9 else "warn" if share > 0.75 else "")


async def verb_top(context: Context, args: Namespace) -> int:
    interval_s = max(args.interval, LEAST_INTERVAL_S)
    labels = dict(args.label)
    async with context.fleet() as fleet:
        if context.out.as_json:
            while True:
                context.out.json_line(_plain(await _look(context, fleet, labels)))
                await asyncio.sleep(interval_s)
        if not context.out.terminal:
            context.out.table(*_table(await _look(context, fleet, labels)), empty="no containers")
            return OK
        await _live(context, fleet, labels, interval_s)
    return OK


Look = list[tuple[Listed, Stats | None]]


class Usage:
    """CPU use between two looks: a node's own figure may be older than the look."""

    def __init__(self) -> None:
        self._before: dict[tuple[str, str, str], tuple[int, datetime]] = {}

    def percent(self, stats: Stats) -> float | None:
        key = (stats.node, stats.container, stats.instance)
        before = self._before.get(key)
        self._before[key] = (stats.cpu_usec, stats.time)
        if before is None:
            return stats.cpu_percent
        passed = (stats.time - before[1]).total_seconds()
        return (stats.cpu_usec - before[0]) / passed / 10_000 if passed > 0 else stats.cpu_percent


async def _look(context: Context, fleet: FleetClient, labels: dict[str, str]) -> Look:
    listed, _ = await list_all(context, fleet, None, labels)
    listed.sort(key=lambda one: (one.node, one.status.service, one.status.replica))

    async def measured(one: Listed) -> Stats | None:
        if not one.reachable or one.status.state not in (State.RUNNING, State.STOPPING):
            return None
        found = await _measure(fleet, Target(one.node, one.status.container))
        return found if isinstance(found, Stats) else None

    stats = await asyncio.gather(*(measured(one) for one in listed))
    return list(zip(listed, stats, strict=True))


def _plain(look: Look) -> list[dict[str, Any]]:
    return [
        {"node": one.node, "status": msgspec.to_builtins(one.status), "stats": msgspec.to_builtins(stats)}
        for one, stats in look
    ]


def _table(look: Look, usage: Usage | None = None) -> tuple[list[Column], list[Row]]:
    at = now()
    columns = [Column("CONTAINER", keep=True), Column("STATE", keep=True), Column("UP", right=True)]
    columns += [Column("CPU%", right=True), Column("MEMORY", right=True), Column("LIMIT", right=True)]
    columns += [Column("PROCS", right=True), Column("PORT", right=True)]
    many = len({one.node for one, _ in look}) > 1
    if many:
        columns.append(Column("NODE"))
    rows: list[Row] = []
    for one, stats in look:
        state = state_cell(one.status) if one.reachable else Cell("unreachable", "warn")
        row: list[Cell | str] = [one.status.container, state, _up(one.status, at)]
        if stats is None:
            row += [Cell("-", "dim")] * 4
        else:
            percent = usage.percent(stats) if usage is not None else stats.cpu_percent
            row += [
                "-" if percent is None else f"{percent:.1f}",
                _memory(stats),
                size(stats.memory_limit) if stats.memory_limit else Cell("-", "dim"),
                str(stats.processes),
            ]
        row.append(str(one.status.port) if one.status.port else Cell("-", "dim"))
        rows.append([*row, one.node] if many else row)
    return columns, rows


def _up(status: ContainerStatus, at: datetime) -> str:
    if status.state not in (State.RUNNING, State.STOPPING) or status.started_at is None:
        return "-"
    return brief((at - status.started_at).total_seconds()).replace("now", "0s")


async def _live(context: Context, fleet: FleetClient, labels: dict[str, str], interval_s: float) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    out, usage = context.out, Usage()
    console = Console(file=out.stdout, highlight=False)

    def picture(look: Look, note: str) -> Text:
        width, height = console.size
        lines = screen(out, look, usage, width=width, height=height, note=note)
        return Text.from_ansi("\n".join(lines), no_wrap=True, overflow="crop")

    first = picture(await _look(context, fleet, labels), END_NOTE)
    with Live(first, console=console, screen=True, auto_refresh=False, transient=True) as live:
        live.refresh()
        look: Look = []
        while True:
            await asyncio.sleep(interval_s)
            try:
                look, note = await _look(context, fleet, labels), END_NOTE
            except ContractError as failure:
                note = f"{failure.message}; trying again"
            live.update(picture(look, note), refresh=True)


def screen(out: Output, look: Look, usage: Usage, *, width: int, height: int, note: str) -> list[str]:
    """One look as the lines of a terminal, never more than it has."""
    running = sum(one.status.state == State.RUNNING for one, _ in look)
    memory = sum(stats.memory_bytes for _, stats in look if stats is not None)
    head = f"{running} running of {len(look)}   {size(memory)} in use   {datetime.now():%H:%M:%S}"
    lines = [out.paint(head, "strong"), ""]
    lines += out.table_lines(*_table(look, usage), width=width)
    if not look:
        lines[2:] = [out.paint("no containers", "dim")]
    room = max(3, height - 2)
    hidden = len(lines) - room
    more = f"… and {hidden} more   " if hidden > 0 else ""
    return [*lines[:room], "", out.paint(clean(more + note)[:width], "dim")]
