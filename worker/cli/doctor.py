"""doctor: what is well, what lacks, what each lack costs and what to do about it."""

import asyncio
from pathlib import Path

from worker.cli.app import OK, REFUSED
from worker.cli.context import Context, quiet_logs
from worker.cli.doctor_checks import PROC, Finding, data_dir_checks, machine_checks
from worker.cli.doctor_launcher import launcher_checks
from worker.cli.doctor_namespaces import namespaces_check, trial
from worker.cli.doctor_server import server_checks
from worker.cli.parser import Namespace, Parser, page_width, wrapped
from worker.cli.style import Style, clean
from worker.cli.worker_cmd import local_config, place_options
from worker.config import NatsConfig, load_config
from worker.errors import Configuration
from worker.node_file import read_node_file

MARKS: dict[str, tuple[str, Style]] = {
    "ok": ("ok", "good"),
    "warn": ("warn", "warn"),
    "fail": ("FAIL", "bad"),
    "unknown": ("?", "dim"),
}
INDENT = " " * 24


def options_doctor(parser: Parser) -> None:
    with parser.section("Whose directory"):
        place_options(parser)
    parser.details = """
        With --config the server is looked at as that worker would: its address, credentials and domain. A node's own
        key may not ask about everything; what it may not is marked `?`. Exit code 0 when nothing stands in a worker's
        way (there may be warnings), 4 when something does.
    """


async def verb_doctor(context: Context, args: Namespace) -> int:
    quiet_logs()
    config = local_config(context, args)
    async with context.out.busy("looking"):
        root = config.data_dir
        local = await asyncio.to_thread(_local, root)
        nats = _nats_config(context, args)
        node = context.chosen_node or config.node.name or _name_in(root)
        remote = await server_checks(nats, f"name the server with --nats (now {_plain(nats.url)})", node)
    findings = [*local, *remote]
    if context.out.as_json:
        context.out.document(findings)
    else:
        for finding, following in zip(findings, [*findings[1:], None], strict=True):
            # Several lacks of one kind have one remedy.
            last = following is None or following.do != finding.do
            _show(context, finding, with_remedy=last)
        _sum_up(context, findings)
    return REFUSED if any(finding.level == "fail" for finding in findings) else OK


def _local(root: Path) -> list[Finding]:
    found = list(machine_checks())
    if (PROC / "self/ns").is_dir():  # Linux
        found.append(namespaces_check(trial()))
    return [*found, *data_dir_checks(root), *launcher_checks(root)]


def _nats_config(context: Context, args: Namespace) -> NatsConfig:
    """What the worker of this --config would connect to; without one, what the other verbs do."""
    if args.config is None:
        return context.nats_config()
    flags = {"nats.url": args.nats, "nats.creds": args.creds}
    return load_config(Path(args.config), context.env, flags).nats


def _name_in(root: Path) -> str | None:
    """The node whose data directory it is; None before the first start, or when its file cannot be read."""
    try:
        known = read_node_file(root / "node.json")
    except (OSError, Configuration):
        return None  # the checks of the directory tell it
    return known.name if known is not None else None


def _plain(url: str) -> str:
    """Without what stands before an @: that is a secret."""
    return ", ".join(part.rpartition("@")[2].removeprefix("nats://") for part in url.split(","))


def _show(context: Context, finding: Finding, *, with_remedy: bool) -> None:
    out = context.out
    mark, style = MARKS[finding.level]
    lines = wrapped(clean(finding.found), page_width(), INDENT) or [INDENT]
    out.line(f"{out.paint(mark.ljust(5), style)} {clean(finding.check).ljust(17)} {lines[0].strip()}")
    for line in lines[1:]:
        out.line(line)
    for lead, text in (("costs: ", finding.cost), ("do:    ", finding.do if with_remedy else "")):
        for number, line in enumerate(wrapped(clean(text), page_width() - len(INDENT + lead), "")):
            out.line(INDENT + out.paint(lead if number == 0 else " " * len(lead), "dim") + line)


def _sum_up(context: Context, findings: list[Finding]) -> None:
    fails = sum(finding.level == "fail" for finding in findings)
    warns = sum(finding.level == "warn" for finding in findings)
    out = context.out
    out.line()
    if fails:
        out.line(out.paint(f"{fails} of {len(findings)} checks failed", "bad") + f", {warns} warnings")
    elif warns:
        out.line(f"A worker can run here; {warns} warnings say what it cannot do.")
    else:
        out.line(out.paint("All is well.", "good"))
