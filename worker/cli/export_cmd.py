"""export: a container's files as a tar archive."""

from schemas.queries import ExportRequest
from worker.cli.context import Context
from worker.cli.download import fetch_to, output_options
from worker.cli.parser import Namespace, Parser
from worker.client_downloads import Download


def options_export(parser: Parser) -> None:
    parser.argument("container", metavar="CONTAINER", complete="container")
    output_options(parser)
    parser.details = """
        The container may run: each file is as it was when its turn came. Volumes are not part of it, nor are
        sockets, fifos and devices.
    """
    parser.example("sandfleet export web-0 -o web.tar")
    parser.example("sandfleet export web-0 | tar -tv")


async def verb_export(context: Context, args: Namespace) -> int:
    async with context.fleet() as fleet:
        target = await context.locate(fleet, args.container)
        download = Download(
            fleet,
            target.node,
            "export",
            lambda session, offset, acked: ExportRequest(
                session=session, container=target.cid, offset=offset, acked=acked
            ),
        )
        return await fetch_to(context, args, download, f"exporting {target.cid}")
