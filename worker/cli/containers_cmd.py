"""ps and inspect."""

import asyncio
from typing import Any

from schemas.node import NodeState, NotEnforced
from schemas.queries import DenialsReply
from schemas.status import ContainerStatus, State, Stats
from worker.bus.failures import NoAnswer, NoResponders
from worker.cli.app import OK
from worker.cli.context import Context, Target
from worker.cli.human import exit_name, now, since_cell, size, span, stamp, state_cell
from worker.cli.lifecycle_cmd import find_all
from worker.cli.output import Cell, Column, Row
from worker.cli.parser import Namespace, Parser, pair, when
from worker.cli.refusals import ask_refusals, show_refusals
from worker.cli.style import clean
from worker.client import Detail, FleetClient
from worker.errors import Conflict, ContractError

HIDDEN = "(hidden: --show-env)"


def options_ps(parser: Parser) -> None:
    parser.argument(
        "-s",
        "--state",
        metavar="STATE",
        choices=[str(state) for state in State if state != State.REMOVED],
        help="only containers in this state",
    )
    parser.argument(
        "-l",
        "--label",
        type=pair,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="only containers with this label; all given ones must match",
    )
    parser.argument("-q", "--quiet", action="store_true", help="names only")
    parser.details = """
        Asks every node that is there. Containers of a node that does not answer are shown as it last told
        them, as unreachable.
    """
    parser.example("sandfleet ps")
    parser.example("sandfleet rm $(sandfleet ps -q --state exited)", "tidy up")


class Listed:
    """A container with its node; `reachable` is false when the node is away and the status its last word."""

    def __init__(self, node: str, status: ContainerStatus, *, reachable: bool = True) -> None:
        self.node = node
        self.status = status
        self.reachable = reachable


async def verb_ps(context: Context, args: Namespace) -> int:
    async with context.fleet() as fleet, context.out.busy("asking the nodes"):
        listed, away = await list_all(context, fleet, args.state, dict(args.label))
    listed.sort(key=lambda one: (one.node, one.status.service, one.status.replica))
    out = context.out
    if out.as_json:
        out.document([as_json(one) for one in listed])
    elif args.quiet:
        for one in listed:
            out.line(clean(one.status.container))
    else:
        many = len({one.node for one in listed}) > 1
        out.table(*ps_table(listed, with_node=many), empty="no containers")
    for node in away:
        out.warning(f"node {node} does not answer: its containers are shown as it last told them")
    return OK


def as_json(one: Listed) -> dict[str, Any]:
    import msgspec

    return {"node": one.node, "reachable": one.reachable, **msgspec.to_builtins(one.status)}


def ps_table(listed: list[Listed], *, with_node: bool) -> tuple[list[Column], list[Row]]:
    """CONTAINER STATE SINCE PORT IMAGE, and NODE when there are several."""
    at = now()
    columns = [Column("CONTAINER", keep=True), Column("STATE", keep=True), Column("SINCE", keep=True)]
    columns += [Column("PORT", right=True), Column("IMAGE")]
    if with_node:
        columns.append(Column("NODE"))
    rows: list[Row] = []
    for one in listed:
        status = one.status
        state = state_cell(status)
        if not one.reachable:
            state = Cell(f"unreachable ({state.text})", "warn")
        row: list[Cell | str] = [
            status.container,
            state,
            since_cell(status, at),
            Cell(str(status.port), "" if status.state == State.RUNNING else "dim")
            if status.port
            else Cell("-", "dim"),
            status.image or "-",
        ]
        rows.append([*row, one.node] if with_node else row)
    return columns, rows


async def list_all(
    context: Context, fleet: FleetClient, state: str | None, labels: dict[str, str]
) -> tuple[list[Listed], list[str]]:
    """Every container that fits, and the nodes that do not answer."""
    wanted = None if state is None else State(state)
    chosen = context.chosen_node
    present = [chosen] if chosen else [presence.node for presence in await fleet.nodes()]
    seen = await fleet.last_seen()
    listed: list[Listed] = []
    away = [node for node in seen if node not in present and chosen in (None, node)]

    async def ask(node: str) -> None:
        try:
            for status in await fleet.containers(node, state=wanted, labels=labels):
                listed.append(Listed(node, status))
        except (NoResponders, NoAnswer):
            if node not in seen:
                raise
            away.append(node)

    await asyncio.gather(*(ask(node) for node in present))
    if away:
        for (node, _), status in (await fleet.snapshot()).items():
            fits = wanted is None or status.state == wanted
            if node in away and fits and all(status.labels.get(k) == v for k, v in labels.items()):
                listed.append(Listed(node, status, reachable=False))
    # A worker that was stopped in order and has nothing is no news.
    quiet = {node for node, event in seen.items() if event.state == NodeState.STOPPED}
    quiet -= {one.node for one in listed}
    return listed, sorted(node for node in away if node not in quiet)


def options_inspect(parser: Parser) -> None:
    parser.argument("containers", metavar="CONTAINER", nargs="+", complete="container")
    parser.argument("--show-env", action="store_true", help="show the values of the environment too")
    parser.argument(
        "--since",
        type=when,
        metavar="TIME",
        help="how far back to look for what the sandbox refused (a Mac's log): a time or an age such as 10m; "
        "else to the newest start, an hour at most",
    )
    parser.example("sandfleet inspect web-0")
    parser.example("sandfleet inspect --json web-0 | jq .port")


async def verb_inspect(context: Context, args: Namespace) -> int:
    async with context.fleet() as fleet:
        targets, code = await find_all(context, fleet, args.containers)
        for number, target in enumerate(targets):
            detail = await fleet.detail(target.node, target.cid)
            refused = await ask_refusals(context, fleet, target, detail, args.since)
            if context.out.as_json:
                context.out.json_line(_shown(target, detail, refused, show_env=args.show_env))
                continue
            if number:
                context.out.line()
            await _describe(context, fleet, target, detail, show_env=args.show_env)
            if refused is not None:
                show_refusals(context.out, refused)
    return code


def _shown(target: Target, detail: Detail, refused: DenialsReply | None, *, show_env: bool) -> dict[str, Any]:
    import msgspec

    plain: dict[str, Any] = {"node": target.node, **msgspec.to_builtins(detail)}
    if refused is not None:
        plain["denials"] = msgspec.to_builtins(refused)
    if plain.get("spec") is None:
        plain.pop("spec", None)
    elif not show_env and plain["spec"].get("env"):
        plain["spec"] = {**plain["spec"], "env": dict.fromkeys(plain["spec"]["env"], HIDDEN)}
    return plain


async def _describe(
    context: Context, fleet: FleetClient, target: Target, detail: Detail, *, show_env: bool
) -> None:
    out = context.out
    stats, not_enforced = await asyncio.gather(_stats(fleet, target), _not_enforced(fleet, target))
    out.line(f"{out.paint(detail.container, 'strong')}  {out.paint(f'on {target.node}', 'dim')}")
    out.fields(_rows(detail, stats, not_enforced))
    if detail.spec is None:
        return
    spec = {name: value for name, value in detail.spec.items() if name not in ("env", "labels")}
    env: dict[str, str] = detail.spec.get("env") or {}
    if env:
        out.line(out.paint("\nEnvironment", "strong"))
        out.fields((name, value if show_env else Cell(HIDDEN, "dim")) for name, value in sorted(env.items()))
    if spec:
        import json

        out.line(out.paint("\nSpec", "strong"))
        for name, value in spec.items():
            out.line(f"{out.paint(name + ':', 'dim')} {json.dumps(value, ensure_ascii=False)}")


def _rows(
    detail: Detail, stats: Stats | None, not_enforced: list[NotEnforced]
) -> list[tuple[str, Cell | str]]:
    """What is there, in the order in which one asks for it."""
    rows: list[tuple[str, Cell | str | None]] = [("state", state_cell(detail))]
    rows.append(("reason", detail.reason and str(detail.reason)))
    rows.append(("message", detail.message))
    if detail.exit_code is not None:
        rows.append(("exit code", exit_name(detail.exit_code)))
    rows.append(("image", detail.image))
    rows.append(("digest", detail.image_digest))
    rows.append(("address", f"{detail.ip}:{detail.port}" if detail.port else None))
    rows.append(("network", detail.network and str(detail.network)))
    rows.append(("pid", str(detail.pid) if detail.pid else None))
    rows.append(("health", None if detail.health == "none" else str(detail.health)))
    rows.append(("gpu", None if detail.gpu == "none" else str(detail.gpu)))
    rows.append(("memory limit", size(detail.memory_limit) if detail.memory_limit else None))
    if stats is not None:
        rows.append(("memory", size(stats.memory_bytes)))
        rows.append(("cpu time", span(stats.cpu_usec / 1e6)))
        rows.append(("processes", f"{stats.processes} ({stats.threads} threads)"))
    rows.append(("created", stamp(detail.created_at) if detail.created_at else None))
    rows.append(("started", stamp(detail.started_at) if detail.started_at else None))
    rows.append(("finished", stamp(detail.finished_at) if detail.finished_at else None))
    rows.append(("next start", stamp(detail.next_start_at) if detail.next_start_at else None))
    rows.append(("run", f"{detail.run}" + (f", {detail.restarts} restarts" if detail.restarts else "")))
    rows.append(("instance", detail.instance))
    rows += [(f"label {name}", value) for name, value in sorted(detail.labels.items())]
    gaps = ", ".join(str(one.feature) for one in not_enforced)
    rows.append(("not enforced", f"{gaps} (sandfleet profile show says why)" if gaps else None))
    return [(name, value) for name, value in rows if value]


async def _stats(fleet: FleetClient, target: Target) -> Stats | None:
    try:
        return await fleet.stats(target.node, target.cid)
    except Conflict:
        return None  # nothing runs


async def _not_enforced(fleet: FleetClient, target: Target) -> list[NotEnforced]:
    from schemas.queries import ProfileReply, ProfileRequest

    try:
        request = ProfileRequest(container=target.cid)
        return (await fleet.query(target.node, "profile", request, ProfileReply)).not_enforced
    except ContractError:
        return []  # the profile cannot be made any more: the rest is still worth showing
