"""worker: this machine's worker in the foreground. setup: the streams of a server."""

import gc
import os
from pathlib import Path
from typing import Any

from worker.cli.app import OK, REFUSED
from worker.cli.context import Context
from worker.cli.parser import Namespace, Parser, UsageError, whole
from worker.config import Config, load_config
from worker.settings import CONFIG_VARIABLE, SETTINGS

LOG_LEVELS = ("debug", "info", "warning", "error")


def place_options(parser: Parser) -> None:
    """Which worker's directory and configuration are meant."""
    parser.argument(
        "--data-dir",
        metavar="DIR",
        complete="dir",
        help="the worker's data directory (or SANDFLEET_DATA_DIR; else a running dev's)",
    )
    parser.argument(
        "--config", metavar="FILE", complete="file", help=f"the worker's configuration (or {CONFIG_VARIABLE})"
    )


def local_config(context: Context, args: Namespace) -> Config:
    """The configuration of the worker here that is meant: a running `dev` when nothing says another."""
    path = Path(args.config) if args.config else None
    config = load_config(path, context.env, {"node.data_dir": args.data_dir})
    running = context.running_dev()
    if running is None or config.source or "node.data_dir" in config.origins:
        return config
    return load_config(path, context.env, {"node.data_dir": running.data_dir})


def options_worker(parser: Parser) -> None:
    parser.argument("--config", metavar="FILE", complete="file", help=f"TOML file (or {CONFIG_VARIABLE})")
    parser.argument(
        "--data-dir",
        metavar="DIR",
        complete="dir",
        help="its data (or SANDFLEET_DATA_DIR; by platform and user)",
    )
    parser.argument("--nats", metavar="URL", help="the server (or SANDFLEET_NATS_URL)")
    parser.argument(
        "--creds", metavar="FILE", complete="file", help="its NATS user (or SANDFLEET_NATS_CREDS)"
    )
    parser.argument("--node", metavar="NAME", help="its name (or SANDFLEET_NODE; the host's)")
    parser.argument("--setup", action="store_true", help="create the streams that are missing")
    parser.argument(
        "--insecure",
        action="store_true",
        help="start without credentials: whoever reaches the server commands it",
    )
    parser.argument(
        "--takeover",
        action="store_true",
        help="take this node's name over from another worker or machine; that one ends",
    )
    log_level(parser, "info")
    parser.details = """
        Runs until SIGTERM or Ctrl-C; containers go on and the next worker adopts them. A second one ends it at
        once. SIGHUP reads the policy anew. Settings come from the TOML file, then the environment, then the flags;
        a later one wins. An unknown key is an error.
    """
    for setting in SETTINGS:
        name = f"[{setting.section}] {setting.name}"
        default = f"; default {setting.default}" if setting.default else ""
        parser.setting(name, f"{setting.doc} ({setting.kind}{default})  {setting.env}")
    parser.example("sandfleet worker --nats tls://nats.example.net --creds /etc/sandfleet/node.creds --setup")


def log_level(parser: Parser, default: str) -> None:
    parser.argument(
        "--log-level",
        choices=LOG_LEVELS,
        default=default,
        metavar="LEVEL",
        help=f"{', '.join(LOG_LEVELS)} ({default})",
    )


def worker_flags(args: Namespace) -> dict[str, Any]:
    """The flags of `worker` and `dev` as settings; None for what was not given."""
    return {
        "nats.url": getattr(args, "nats", None),
        "nats.creds": getattr(args, "creds", None),
        "nats.insecure": True if args.insecure else None,
        "node.name": args.node,
        "node.data_dir": args.data_dir,
    }


def verb_worker(context: Context, args: Namespace) -> int:
    # Nothing of what is imported is garbage, and looking for some takes a tenth of the start.
    gc.disable()
    import uvloop

    from worker.agent import run_worker
    from worker.log import setup_logging
    from worker.sd_notify import Notifier

    gc.enable()

    def read() -> Config:
        return load_config(Path(args.config) if args.config else None, context.env, worker_flags(args))

    config = read()
    setup_logging(args.log_level.upper(), None)
    # Before anything is started that would inherit it.
    notifier = Notifier.take(os.environ)
    orderly = uvloop.run(
        run_worker(config, setup=args.setup, takeover=args.takeover, reread=read, notifier=notifier)
    )
    return OK if orderly else REFUSED


def options_setup(parser: Parser) -> None:
    parser.argument(
        "--replicas",
        type=whole(1, 5),
        metavar="N",
        help="of each new stream, on a cluster (or nats.replicas; 1)",
    )
    parser.argument(
        "--pool", action="append", default=[], metavar="NAME", help="also this pool's consumer of jobs"
    )
    with parser.section("Sites (leaf nodes)"):
        parser.argument(
            "--collect",
            action="append",
            default=[],
            metavar="SITE",
            help="on the hub: its streams also hold the events, logs, stats and presence of this domain",
        )
        parser.argument(
            "--commands-from",
            metavar="HUB",
            help="at a site: take over commands that were stored in this domain, --for each of its nodes",
        )
        parser.argument(
            "--for", dest="nodes", action="append", default=[], metavar="NODE", help="a node of this site"
        )
    parser.details = "What exists keeps its settings; sandfleet doctor says what differs from the contract."
    parser.example("sandfleet setup --replicas 3")
    parser.example("sandfleet setup --commands-from hub --for mac-1 --for mac-2")


async def verb_setup(context: Context, args: Namespace) -> int:
    from worker.bus.sites import collect, forward_commands
    from worker.bus.streams import setup_streams

    if bool(args.commands_from) != bool(args.nodes):
        raise UsageError("--commands-from HUB and --for NODE belong together", verb="setup")
    out = context.out
    async with context.fleet(replicas=args.replicas) as fleet:
        async with out.busy("creating the streams"):
            bus, subjects = fleet.bus, fleet.subjects
            result = await setup_streams(bus, subjects=subjects, pools=args.pool)
            joined = [f"{name} from {site}" for site in args.collect for name in await collect(bus, site)]
            if hub := args.commands_from:
                new = await forward_commands(bus, hub, args.nodes, subjects=subjects)
                joined += [f"commands for {node} from {hub}" for node in new]
        url = bus.url
    if out.as_json:
        out.document({"url": url, "created": result.made, "kept": result.kept, "joined": joined})
        return OK
    for name in result.made:
        out.line(f"{out.paint('created', 'good')}  {name}")
    for name in result.kept:
        out.line(f"{out.paint('kept', 'dim')}     {name}")
    for what in joined:
        out.line(f"{out.paint('joined', 'good')}   {what}")
    return OK
