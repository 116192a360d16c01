"""journal backup: a copy of this machine's journal in one file."""

from pathlib import Path

from worker.cli.app import OK
from worker.cli.context import Context
from worker.cli.human import size
from worker.cli.parser import Namespace, Parser
from worker.cli.worker_cmd import local_config, place_options


def options_journal_backup(parser: Parser) -> None:
    parser.argument("file", metavar="FILE", complete="file", help="where the copy goes")
    parser.argument("--overwrite", action="store_true", help="replace a file that is there")
    with parser.section("Where"):
        place_options(parser)
    parser.details = """
        The worker may run: the copy is its journal as it was at one moment, checked, with nothing half-done in it.
        FILE is there when all of it is. A journal that is put back is refused if the node has told more since;
        the page on operations says how to go on.
    """
    parser.example("sandfleet journal backup /backup/worker.db")
    parser.example("sandfleet journal backup --overwrite --json /backup/worker.db")


def verb_journal_backup(context: Context, args: Namespace) -> int:
    from worker.journal_backup import back_up

    data = Path(local_config(context, args).data_dir)
    made = back_up(data / "worker.db", Path(args.file).expanduser(), overwrite=args.overwrite)
    if context.out.as_json:
        context.out.document(made)
    else:
        told = f"{size(made.bytes)}, node {made.node}, up to event {made.last_seq}"
        context.out.line(f"{made.file}  {told}")
    return OK
