"""exec: one command inside a running container's sandbox."""

import base64
import sys

from schemas.queries import BASE64, ExecRequest
from worker.cli.context import Context
from worker.cli.output import encode
from worker.cli.parser import Namespace, Parser, UsageError, duration, pair
from worker.cli.style import is_terminal
from worker.errors import InvalidSpec, Unsupported

MAX_STDIN_BYTES = 256 * 1024


def options_exec(parser: Parser) -> None:
    parser.argument("container", metavar="CONTAINER", complete="container")
    parser.argument(
        "-e", "--env", type=pair, action="append", default=[], metavar="NAME=VALUE", help="added environment"
    )
    parser.argument("-w", "--workdir", metavar="DIR", help="working directory (else the container's)")
    parser.argument("-i", "--interactive", action="store_true", help="give it this command's stdin")
    parser.argument("-t", "--tty", action="store_true", help="with a terminal (not built yet)")
    parser.argument(
        "--timeout", type=duration, default=60.0, metavar="DURATION", help="killed after this time (60s)"
    )
    parser.details = """
        The exit code is the command's, 128 + n when signal n ended it. Each output is shown up to 256 KiB.
    """
    parser.example("sandfleet exec web-0 ls -l")
    parser.example("sandfleet exec web-0 -- sh -c 'echo $PORT'")
    parser.example("echo hello | sandfleet exec -i web-0 wc -c")


async def verb_exec(context: Context, args: Namespace) -> int:
    if not args.command:
        raise UsageError("the command is missing: sandfleet exec CONTAINER COMMAND...", verb="exec")
    if args.tty:
        raise Unsupported(
            "exec with a terminal (-t) is not built yet: run one command, -i gives it this stdin"
        )
    stdin, encoding = _stdin() if args.interactive else (None, None)
    async with context.fleet() as fleet:
        target = await context.locate(fleet, args.container)
        request = ExecRequest(
            container=target.cid,
            argv=args.command,
            env=dict(args.env) or None,
            workdir=args.workdir,
            timeout_s=args.timeout,
            stdin=stdin,
            encoding=encoding,
        )
        async with context.out.busy(f"running {args.command[0]} in {target.cid}"):
            reply = await fleet.exec(target.node, request)
    if context.out.as_json:
        context.out.line(encode(reply).decode())
    else:
        decode = base64.b64decode if reply.encoding == BASE64 else str.encode
        context.out.raw(decode(reply.stdout))
        context.out.raw(decode(reply.stderr), to_stderr=True)
        if reply.truncated:
            context.out.warning("the output was longer than 256 KiB and is cut")
    return reply.exit_code if reply.exit_code >= 0 else 128 - reply.exit_code


def _stdin() -> tuple[str, str | None]:
    """All of this command's stdin, as the query wants it."""
    if is_terminal(sys.stdin):
        raise UsageError("-i reads a pipe or a file, not a terminal (-it is not built yet)", verb="exec")
    data = sys.stdin.buffer.read(MAX_STDIN_BYTES + 1)
    if len(data) > MAX_STDIN_BYTES:
        raise InvalidSpec("stdin is longer than 256 KiB", field="stdin")
    try:
        return data.decode(), None
    except UnicodeDecodeError:
        return base64.b64encode(data).decode(), BASE64
