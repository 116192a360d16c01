"""start, stop, kill, restart, rm and wait: the same command to one or more containers."""

import asyncio
from collections.abc import Callable, Sequence

from schemas.commands import AnyCommand, Kill, Remove, Restart, Start, Stop
from schemas.queries import WaitUntil
from schemas.status import ContainerStatus
from schemas.values import KILL_SIGNALS, normalize_signal
from worker.cli.app import OK
from worker.cli.context import Context, Target
from worker.cli.failures import exit_code, sentence
from worker.cli.human import exit_name
from worker.cli.output import encode
from worker.cli.parser import Namespace, Parser, duration
from worker.client import FleetClient, new_id
from worker.errors import ContractError

Make = Callable[[], AnyCommand]


def _containers(parser: Parser) -> None:
    parser.argument(
        "containers",
        metavar="CONTAINER",
        nargs="+",
        complete="container",
        help="web-0; or web while that service has one container",
    )


def _no_wait(parser: Parser) -> None:
    parser.argument(
        "--no-wait",
        action="store_true",
        help="store the command and return: a node that is away does it when it is back",
    )


def _timeout(parser: Parser, what: str) -> None:
    parser.argument("-t", "--timeout", type=duration, metavar="DURATION", help=what)


def options_start(parser: Parser) -> None:
    _containers(parser)
    _no_wait(parser)


def options_stop(parser: Parser) -> None:
    _containers(parser)
    _timeout(parser, "before SIGKILL (else the spec's stop_grace_period, or 10s)")
    _no_wait(parser)
    parser.example("sandfleet stop web-0 web-1")
    parser.example("sandfleet stop -t 1m30s db")


def options_kill(parser: Parser) -> None:
    _containers(parser)
    parser.argument(
        "-s",
        "--signal",
        default="SIGKILL",
        metavar="SIGNAL",
        help=f"{', '.join(name.removeprefix('SIG') for name in KILL_SIGNALS)} (KILL)",
    )
    _no_wait(parser)
    parser.example("sandfleet kill -s HUP web-0", "reload")


def options_restart(parser: Parser) -> None:
    _containers(parser)
    _timeout(parser, "before SIGKILL (else the spec's stop_grace_period, or 10s)")
    _no_wait(parser)


def options_rm(parser: Parser) -> None:
    _containers(parser)
    parser.argument(
        "--if-stopped", action="store_true", help="refuse a container that runs instead of killing it"
    )
    _no_wait(parser)
    parser.details = "Kills what still runs. A container that is not there counts as removed."


def options_wait(parser: Parser) -> None:
    _containers(parser)
    _timeout(parser, "give up after this time (never)")
    parser.argument("--final", action="store_true", help="until no restart is due either")
    parser.example("code=$(sandfleet wait job-0)", "prints the exit code; 128 + n for signal n")


async def verb_start(context: Context, args: Namespace) -> int:
    return await _act(context, args, lambda: Start(id=new_id()), "starting")


async def verb_stop(context: Context, args: Namespace) -> int:
    return await _act(context, args, lambda: Stop(id=new_id(), timeout_s=args.timeout), "stopping")


async def verb_kill(context: Context, args: Namespace) -> int:
    signal = normalize_signal(args.signal.upper(), field="--signal")
    return await _act(context, args, lambda: Kill(id=new_id(), signal=signal), f"sending {signal} to")


async def verb_restart(context: Context, args: Namespace) -> int:
    return await _act(context, args, lambda: Restart(id=new_id(), timeout_s=args.timeout), "restarting")


async def verb_rm(context: Context, args: Namespace) -> int:
    return await _act(
        context, args, lambda: Remove(id=new_id(), force=not args.if_stopped), "removing", gone_is_done=True
    )


async def _act(
    context: Context, args: Namespace, make: Make, doing: str, *, gone_is_done: bool = False
) -> int:
    """Send a command to all containers at once; a line for each that is done, an error for each other."""
    async with context.fleet() as fleet:
        targets, code = await find_all(context, fleet, args.containers, gone_is_done=gone_is_done)

        async def one(target: Target) -> int:
            try:
                await _command(context, fleet, target, make(), wait=not args.no_wait)
            except ContractError as failure:
                context.out.error(f"{target.cid}: {sentence(failure)}")
                return exit_code(failure)
            return OK

        names = ", ".join(target.cid for target in targets)
        async with context.out.busy(f"{doing} {names}"):
            codes = await asyncio.gather(*(one(target) for target in targets))
    return next((other for other in (code, *codes) if other), OK)


async def _command(
    context: Context, fleet: FleetClient, target: Target, command: AnyCommand, *, wait: bool
) -> None:
    out = context.out
    if not wait:
        await fleet.send(target.node, target.cid, command)
        if out.as_json:
            out.json_line({"node": target.node, "container": target.cid, "command_id": command.id})
        else:
            out.line(target.cid)
        return
    done = await fleet.command(target.node, target.cid, command, on_absent=context.tell_absent)
    if out.as_json:
        out.json_line(done)
    else:
        out.line(target.cid)


async def find_all(
    context: Context, fleet: FleetClient, names: Sequence[str], *, gone_is_done: bool = False
) -> tuple[list[Target], int]:
    """The containers that are meant, and the exit code of the first that cannot be told."""
    targets: list[Target] = []
    code = OK
    for name in dict.fromkeys(names):
        try:
            targets.append(await context.locate(fleet, name))
        except ContractError as failure:
            if gone_is_done and exit_code(failure) == 3 and not context.out.as_json:
                context.out.note(f"{name}: nothing to remove")
                continue
            context.out.error(sentence(failure))
            code = code or exit_code(failure)
    return targets, code


async def verb_wait(context: Context, args: Namespace) -> int:
    until = WaitUntil.FINAL if args.final else WaitUntil.EXIT
    async with context.fleet() as fleet:
        targets, code = await find_all(context, fleet, args.containers)

        async def one(target: Target) -> int:
            try:
                status = await fleet.wait(target.node, target.cid, until=until, timeout_s=args.timeout)
            except ContractError as failure:
                context.out.error(f"{target.cid}: {sentence(failure)}")
                return exit_code(failure)
            _tell_end(context, status, alone=len(args.containers) == 1)
            return OK

        names = ", ".join(target.cid for target in targets)
        async with context.out.busy(f"waiting for {names}"):
            codes = await asyncio.gather(*(one(target) for target in targets))
    return next((other for other in (code, *codes) if other), OK)


def _tell_end(context: Context, status: ContainerStatus, *, alone: bool) -> None:
    if context.out.as_json:
        context.out.line(encode(status).decode())
        return
    code = shell_code(status)
    text = "-" if code is None else str(code)
    context.out.line(text if alone else f"{status.container}  {text}")
    if status.reason is not None or (status.exit_code or 0) < 0:
        how = exit_name(status.exit_code) if status.exit_code is not None else str(status.state)
        why = f", {status.reason}" if status.reason else ""
        context.out.note(f"{status.container}: {how}{why}{f': {status.message}' if status.message else ''}")


def shell_code(status: ContainerStatus) -> int | None:
    """The exit code as a shell writes it: 128 + n for signal n; null for a program that never ended."""
    if status.exit_code is None:
        return None
    return status.exit_code if status.exit_code >= 0 else 128 - status.exit_code
