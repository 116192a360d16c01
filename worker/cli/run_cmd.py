"""run and create: from a spec file or an image to a container; `run --wait` until its program has ended."""

import asyncio
import signal
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from schemas.commands import Create, Kill, Remove, Run, Stop
from schemas.events import CommandCompleted
from schemas.spec import ServiceSpec
from schemas.status import ContainerStatus, State
from schemas.subjects import STREAMS, build_cid
from worker.bus.failures import NoAnswer
from worker.cli.app import OK, REFUSED
from worker.cli.context import Context, Target
from worker.cli.failures import exit_code, sentence
from worker.cli.human import exit_name
from worker.cli.lifecycle_cmd import shell_code
from worker.cli.logs_cmd import lost_text
from worker.cli.parser import Namespace, Parser, UsageError, duration, pair, whole
from worker.cli.specs import is_file, specs_of
from worker.client import FleetClient, new_id
from worker.client_logs import LogOrder
from worker.errors import Conflict, ContractError, from_wire

LAST_LOGS_S = 10.0
ENDED = (State.EXITED, State.FAILED, State.REMOVED)

T = TypeVar("T")


def _options(parser: Parser) -> None:
    parser.argument(
        "source",
        metavar="FILE|IMAGE",
        complete="image",
        help="a spec or deployment file (.yaml, .yml, .json), or the name of an image",
    )
    parser.argument("--name", metavar="NAME", help="service name (else of the file or the image)")
    parser.argument(
        "--replica", type=whole(0, 2**32 - 1), default=0, metavar="N", help="container NAME-N (0)"
    )
    parser.argument("--service", metavar="NAME", help="only this service of a deployment file")
    parser.argument("--replace", action="store_true", help="stop and remove a container of that name first")
    with parser.section("With an image"):
        parser.argument(
            "-e", "--env", type=pair, action="append", default=[], metavar="NAME=VALUE", help="environment"
        )
        parser.argument(
            "-v",
            "--volume",
            action="append",
            default=[],
            metavar="SRC:TARGET[:ro]",
            help="a folder of the node, or a named volume, at TARGET",
        )
        parser.argument(
            "-p",
            "--port",
            type=whole(1, 65535),
            action="append",
            default=[],
            metavar="PORT",
            help="the program listens on PORT (besides the assigned $PORT)",
        )
        parser.argument("--rm", action="store_true", help="remove the container when it has ended")
        parser.argument("-m", "--memory", metavar="SIZE", help="memory limit: 512Mi, 2Gi")
        parser.argument("--cpu-time", type=duration, metavar="DURATION", help="CPU time limit: 30s, 5m")
        parser.argument(
            "--network", metavar="LEVEL", help="none, localhost, outbound, full (auto: by endpoints)"
        )
        parser.argument(
            "-l", "--label", type=pair, action="append", default=[], metavar="NAME=VALUE", help="label"
        )
        parser.argument("--entrypoint", metavar="PROGRAM", help="instead of the image's own")
        parser.argument("--workdir", metavar="DIR", help="working directory inside the rootfs")
        parser.argument("--pull", metavar="POLICY", help="always, newer, if_not_present, never")


def options_run(parser: Parser) -> None:
    _options(parser)
    parser.argument(
        "-d", "--detach", action="store_true", help="return once the program runs (as without --wait)"
    )
    parser.argument("-w", "--wait", action="store_true", help="show its output, exit with its exit code")
    parser.details = """
        With --wait the program's output is shown and its exit code is this command's (128 + n for signal n).
        Ctrl-C then stops the container, a second one kills it.
    """
    parser.example("sandfleet run web.yaml")
    parser.example("sandfleet run demo -p 8080 -e MODE=fast -- python3 serve.py")
    parser.example("sandfleet run --rm --wait demo -- sh -c 'echo hello'")


def options_create(parser: Parser) -> None:
    _options(parser)
    parser.example("sandfleet create web.yaml && sandfleet start web")


async def verb_create(context: Context, args: Namespace) -> int:
    return await _each(context, args, start=False)


async def verb_run(context: Context, args: Namespace) -> int:
    if args.wait and args.detach:
        raise UsageError("--wait and --detach exclude each other", verb="run")
    if not args.wait:
        return await _each(context, args, start=True)
    specs = specs_of(args, verb="run")
    if len(specs) > 1:
        raise UsageError(f"--wait fits one service, the file has {len(specs)}: use --service", verb="run")
    (service, spec), *_ = specs.items()
    async with context.fleet() as fleet:
        target = Target(await context.node(fleet), build_cid(service, args.replica))
        command = Run(id=new_id(), spec=spec, replace=args.replace)
        try:
            return await _Attached(context, fleet, target).run(command)
        except Conflict as failure:
            raise explain(failure, args) from None


async def _each(context: Context, args: Namespace, *, start: bool) -> int:
    """Create (and start) every service; the container's name for each that is done."""
    specs = specs_of(args, verb="run" if start else "create")
    async with context.fleet() as fleet:
        node = await context.node(fleet)

        async def one(service: str, spec: ServiceSpec) -> int:
            cid = build_cid(service, args.replica)
            make = Run if start else Create
            command = make(id=new_id(), spec=spec, replace=args.replace)
            try:
                done = await begin(context, fleet, Target(node, cid), command)
            except ContractError as failure:
                context.out.error(f"{cid}: {sentence(explain(failure, args))}")
                return exit_code(failure)
            if context.out.as_json:
                context.out.json_line(done)
            else:
                context.out.line(cid)
            return OK

        async with context.out.busy(f"{'starting' if start else 'creating'} {', '.join(specs)}"):
            codes = await asyncio.gather(*(one(service, spec) for service, spec in specs.items()))
    return next((code for code in codes if code), OK)


async def begin(
    context: Context, fleet: FleetClient, target: Target, command: Run | Create
) -> CommandCompleted:
    """Create or run. A container that is to go when it has ended goes too when it could not start."""
    done = await fleet.command(target.node, target.cid, command, on_absent=context.tell_absent, check=False)
    if done.error is None:
        return done
    failed = done.status is not None and done.status.state == State.FAILED
    if failed and command.spec.lifecycle.delete_on_exit and done.instance:
        remove = Remove(id=new_id(), if_instance=done.instance)
        await fleet.command(target.node, target.cid, remove, check=False)
    raise from_wire(done.error)


def explain(failure: ContractError, args: Namespace) -> ContractError:
    """The failure with what the command line offers against it."""
    if isinstance(failure, Conflict) and not args.replace:
        name = "--service" if is_file(args.source) else "--name"
        return Conflict(f"{failure.message}; take --replace, or another {name} or --replica")
    return failure


class _Attached:
    """A container in the foreground: its output here, its end ours."""

    def __init__(self, context: Context, fleet: FleetClient, target: Target) -> None:
        self._context = context
        self._out = context.out
        self._fleet = fleet
        self._target = target
        self._interrupts = 0
        self._eofs: dict[str, int] = {}
        self._eof = asyncio.Event()
        self._sending: set[asyncio.Task[int]] = set()
        self._main = asyncio.current_task()

    async def run(self, command: Run) -> int:
        fleet, cid = self._fleet, self._target.cid
        events_from, logs_from = await fleet.event_position(), await fleet.log_position() + 1
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        logs: asyncio.Task[None] | None = None
        try:
            async with self._out.busy(f"starting {cid}"):
                done = await begin(self._context, fleet, self._target, command)
            instance = str((done.result or {}).get("instance") or done.instance)
            logs = asyncio.create_task(self._show_logs(instance, logs_from))
            status = await _before(logs, self._ended(instance, events_from))
            await _before(logs, self._last_output(status.run))
            return self._tell(status)
        finally:
            loop.remove_signal_handler(signal.SIGINT)
            tasks = [*self._sending, *([logs] if logs is not None else [])]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ended(self, instance: str, after: int) -> ContainerStatus:
        """The status with which this instance ended for good."""
        subject = self._fleet.subjects.state(self._target.node, self._target.cid)
        async with aclosing(self._fleet.read_events((subject,), after=after, follow=True)) as events:
            async for seen in events:
                status = getattr(seen.event, "status", None)
                if not isinstance(status, ContainerStatus) or status.instance != instance:
                    continue
                if status.state in ENDED and status.next_start_at is None:
                    return status
        raise NoAnswer("the connection to the server was closed")

    async def _show_logs(self, instance: str, start_seq: int) -> None:
        chunks = self._fleet.log_chunks(self._target.node, self._target.cid, start_seq=start_seq, follow=True)
        order = LogOrder(from_start=True, instance=instance)
        async with aclosing(chunks):
            async for chunk in chunks:
                for piece in order.put(chunk):
                    if piece.missing:
                        self._out.warning(lost_text(piece))
                    if piece.data:
                        self._out.raw(piece.data, to_stderr=piece.stream == "stderr")
                    if piece.eof is not None:
                        self._eofs[piece.stream] = piece.eof
                        self._eof.set()

    async def _last_output(self, run: int) -> None:
        """Wait for the end of both streams of the last run, but not for ever."""
        if run == 0:
            return
        try:
            async with asyncio.timeout(LAST_LOGS_S):
                while any(self._eofs.get(stream, 0) < run for stream in STREAMS):
                    self._eof.clear()
                    await self._eof.wait()
        except TimeoutError:
            cid = self._target.cid
            self._out.warning(f"the last output of {cid} has not come: see sandfleet logs {cid}")

    def _tell(self, status: ContainerStatus) -> int:
        code = shell_code(status)
        if status.state == State.FAILED or code is None:
            self._out.error(f"{status.container} {status.state}: {status.reason}: {status.message or ''}")
            return REFUSED
        if status.reason not in (None, "stopped") and status.exit_code is not None:
            detail = f": {status.message}" if status.message else ""
            self._out.note(f"{status.container}: {exit_name(status.exit_code)}, {status.reason}{detail}")
        return code

    def _interrupt(self) -> None:
        """Ctrl-C: stop; again: kill; once more: leave the container alone and go."""
        self._interrupts += 1
        cid = self._target.cid
        if self._interrupts == 1:
            self._out.break_line()
            self._out.note(f"stopping {cid} (again to kill it)", "warn")
            self._send(Stop(id=new_id()))
        elif self._interrupts == 2:
            self._out.break_line()
            self._out.note(f"killing {cid} (again to leave)", "warn")
            self._send(Kill(id=new_id()))
        elif self._main is not None:
            self._main.cancel()

    def _send(self, command: Stop | Kill) -> None:
        task = asyncio.create_task(self._fleet.send(self._target.node, self._target.cid, command))
        self._sending.add(task)


async def _before(logs: asyncio.Task[None], work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, unless showing the output fails first (a reader of our pipe is gone)."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task, logs}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            logs.result()
        return await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
