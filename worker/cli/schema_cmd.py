"""schema export: the wire contract as JSON Schema and AsyncAPI."""

from pathlib import Path

from worker.cli.app import OK, REFUSED
from worker.cli.context import Context
from worker.cli.parser import Namespace, Parser


def options_schema_export(parser: Parser) -> None:
    parser.argument(
        "directory", metavar="DIRECTORY", nargs="?", complete="dir", help="(the installed package schemas)"
    )
    parser.argument("--check", action="store_true", help="write nothing; fail when a file there is stale")


def verb_schema_export(context: Context, args: Namespace) -> int:
    import schemas
    from schemas import export

    out = context.out
    directory = Path(args.directory) if args.directory else Path(schemas.__path__[0])
    if args.check:
        stale = export.check(directory)
        if out.as_json:
            out.document({"directory": str(directory), "stale": stale})
        elif not stale:
            out.line("up to date")
        for name in stale if not out.as_json else []:
            out.error(
                f"{directory / name} is stale: run sandfleet schema export {args.directory or ''}".rstrip()
            )
        return REFUSED if stale else OK
    directory.mkdir(parents=True, exist_ok=True)
    written = export.write(directory)
    names = [str(path) for path in written]
    if out.as_json:
        out.document({"directory": str(directory), "written": names})
    else:
        for name in names:
            out.line(name)
    return OK
