"""dev: a server and a worker in one foreground process, found by the other verbs without flags.

Ctrl-C stops the containers, then the worker, its launcher and the server. Nothing is left but the data.
"""

import asyncio
import os
import secrets
import signal
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from schemas.commands import Stop
from schemas.status import State
from worker.bus.server import EmbeddedServer
from worker.cli.app import OK
from worker.cli.context import Context
from worker.cli.devfile import DevFile, DevLock, dev_data_dir
from worker.cli.events_cmd import show_event
from worker.cli.parser import Namespace, Parser, whole
from worker.cli.worker_cmd import log_level, worker_flags
from worker.client import FleetClient, new_id
from worker.config import Config, NatsConfig, load_config
from worker.errors import Configuration, ContractError, Unavailable

LIVE = (State.PENDING, State.INITIALIZING, State.RUNNING, State.STOPPING)
READY_S = 30.0
END_S = 20.0


def options_dev(parser: Parser) -> None:
    parser.argument(
        "--data-dir", metavar="DIR", complete="dir", help="its data (a folder of this user's own)"
    )
    parser.argument("--config", metavar="FILE", complete="file", help="TOML file of the worker")
    parser.argument("--node", metavar="NAME", help="the node's name (the host's)")
    parser.argument("--port", type=whole(1, 65535), metavar="PORT", help="the server's port (a free one)")
    parser.argument("--keep", action="store_true", help="leave the containers running at the end")
    parser.argument("-q", "--quiet", action="store_true", help="do not show what happens")
    parser.argument("--insecure", action="store_true", help="no token: any program here may command the node")
    parser.argument(
        "--takeover", action="store_true", help="use data that belongs to another node or machine"
    )
    parser.argument("--setup", action="store_true", hidden=True)
    log_level(parser, "warning")
    parser.details = """
        The server listens on loopback and wants a token that is made anew at each start. While the configuration
        names no policy.register_roots, images may be made of folders below the working directory.
    """
    parser.example("sandfleet dev")
    parser.example("sandfleet dev --data-dir /tmp/try --port 4222")


def verb_dev(context: Context, args: Namespace) -> int:
    import uvloop

    from worker.log import setup_logging

    setup_logging(args.log_level.upper(), None)
    return uvloop.run(_Dev(context, args).run())


class _Dev:
    def __init__(self, context: Context, args: Namespace) -> None:
        self._context = context
        self._out = context.out
        self._args = args
        self._base = Path(args.data_dir).absolute() if args.data_dir else dev_data_dir(context.env)
        self._interrupts = 0
        self._stop = asyncio.Event()
        self._end = asyncio.Event()
        self._hurry = asyncio.Event()

    async def run(self) -> int:
        lock = DevLock.take(self._context.env)
        try:
            token = None if self._args.insecure else secrets.token_urlsafe(24)
            server = EmbeddedServer(
                store_dir=self._base / "nats", port=self._args.port or -1, token=token, name="sandfleet-dev"
            )
            url = await server.start()
            try:
                await self._with_server(lock, server, url, token or "")
            finally:
                await server.stop()
        finally:
            lock.close()
        self._out.note("ended; the data stays in " + str(self._base))
        return OK

    def _config(self, url: str) -> Config:
        """The user's configuration, with our server and our data directory."""
        path = Path(self._args.config) if self._args.config else None
        flags = worker_flags(self._args) | {"node.data_dir": str(self._base / "worker")}
        config = load_config(path, self._context.env, flags)
        nats = NatsConfig(url=url, insecure=self._args.insecure)
        policy = config.policy
        if "policy.register_roots" not in config.origins:
            policy = msgspec.structs.replace(policy, register_roots=(os.getcwd(),))
        if "policy.images" not in config.origins:
            # A registry on this machine is this user's own.
            images = (*policy.images, "localhost*/*", "127.0.0.1*/*")
            policy = msgspec.structs.replace(policy, images=images)
        if "policy.push" not in config.origins:
            policy = msgspec.structs.replace(policy, push=("*", "localhost*/*", "127.0.0.1*/*"))
        if "policy.s3_endpoints" not in config.origins:
            here = ("http://localhost:*", "http://127.0.0.1:*")
            policy = msgspec.structs.replace(policy, s3_endpoints=(*policy.s3_endpoints, *here))
        return msgspec.structs.replace(config, nats=nats, policy=policy)

    async def _with_server(self, lock: DevLock, server: EmbeddedServer, url: str, token: str) -> None:
        from worker.agent import run_worker

        config = self._config(url)
        ready = asyncio.Event()
        worker = asyncio.ensure_future(
            run_worker(
                config,
                setup=True,
                takeover=self._args.takeover,
                on_ready=ready.set,
                stop=self._end,
            )
        )
        try:
            if await _first(worker, ready):
                await self._serve(config, lock, server, token, worker)
        finally:
            await self._end_worker(worker)
            if not self._args.keep:
                await _end_launcher(config)
        worker.result()

    async def _serve(
        self,
        config: Config,
        lock: DevLock,
        server: EmbeddedServer,
        token: str,
        worker: "asyncio.Future[bool]",
    ) -> None:
        loop = asyncio.get_running_loop()
        # The containers come first, then the worker, then the server.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._interrupt)
        async with await FleetClient.connect(config.nats, name="sandfleet dev") as fleet:
            node = await _only_node(fleet)
            lock.publish(
                DevFile(
                    url=f"nats://{server.host}:{server.port}",
                    token=token,
                    node=node,
                    pid=os.getpid(),
                    started=datetime.now(UTC),
                    data_dir=str(config.data_dir),
                )
            )
            self._greet(node, fleet.bus.server_version, server.port, config)
            following = asyncio.ensure_future(self._follow(fleet))
            try:
                await _first(worker, self._stop)
                if not worker.done() and not self._args.keep:
                    await self._stop_containers(fleet, node)
            finally:
                following.cancel()
                (shown,) = await asyncio.gather(following, return_exceptions=True)
                if isinstance(shown, BrokenPipeError):
                    raise shown

    def _greet(self, node: str, version: str, port: int, config: Config) -> None:
        out = self._out
        secured = "any program here may command it" if self._args.insecure else "with a token"
        out.line(f"{out.paint('sandfleet dev', 'strong')}  node {out.paint(node, 'name')} is ready")
        out.fields(
            [
                ("server", f"nats-server {version} on 127.0.0.1:{port}, {secured}"),
                ("data", str(self._base)),
                ("images", f"from folders below {', '.join(config.policy.register_roots) or 'nowhere'}"),
            ]
        )
        out.line()
        out.line("Try in another terminal:")
        for line in (
            "mkdir -p hello && sandfleet register hello hello",
            "sandfleet run hello -- sh -c 'while date; do sleep 1; done'",
            "sandfleet logs -f hello",
        ):
            out.line("  " + out.paint(line, "name"))
        out.line()
        end = "ends all but the containers" if self._args.keep else "stops the containers and ends all of it"
        out.line(out.paint(f"Ctrl-C {end}.", "dim"))
        out.line()

    async def _follow(self, fleet: FleetClient) -> None:
        """What happens, a line each, until cancelled; without it when it cannot be shown."""
        if self._args.quiet:
            return
        try:
            after = await fleet.event_position()
            pattern = f"{fleet.subjects.prefix}.evt.>"
            async with aclosing(fleet.read_events((pattern,), after=after, follow=True)) as events:
                async for seen in events:
                    show_event(self._out, seen, brief=True)
        except Unavailable as failure:
            self._out.warning(f"events are not shown any more: {failure.message}")
        except BrokenPipeError:
            self._stop.set()
            raise

    def _interrupt(self) -> None:
        self._interrupts += 1
        if self._interrupts > 1:
            self._hurry.set()
        self._stop.set()

    async def _stop_containers(self, fleet: FleetClient, node: str) -> None:
        try:
            live = [status.container for status in await fleet.containers(node) if status.state in LIVE]
        except ContractError as failure:
            self._out.warning(f"containers are killed, not stopped: {failure.message}")
            return
        if not live:
            return
        self._out.break_line()
        self._out.note(f"stopping {', '.join(live)} (Ctrl-C again to kill)", "warn")
        stopping = asyncio.gather(
            *(fleet.command(node, cid, Stop(id=new_id()), check=False) for cid in live),
            return_exceptions=True,
        )
        hurry = asyncio.ensure_future(self._hurry.wait())
        both: set[asyncio.Future[Any]] = {stopping, hurry}
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (stopping, hurry):
                task.cancel()
            await asyncio.gather(stopping, hurry, return_exceptions=True)

    async def _end_worker(self, worker: "asyncio.Future[bool]") -> None:
        """In order: the worker tells the fleet that it stops."""
        if not worker.done():
            self._end.set()
            await asyncio.wait({worker}, timeout=END_S)
        if not worker.done():
            worker.cancel()
            await asyncio.gather(worker, return_exceptions=True)


async def _first(worker: "asyncio.Future[bool]", event: asyncio.Event) -> bool:
    """Wait until the event is set or the worker has ended; whether it was the event."""
    waiting = asyncio.ensure_future(event.wait())
    both: set[asyncio.Future[Any]] = {worker, waiting}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    return event.is_set() and not worker.done()


async def _only_node(fleet: FleetClient) -> str:
    """The worker's presence may come a moment after it is ready."""
    end = asyncio.get_running_loop().time() + READY_S
    while not (nodes := await fleet.nodes()):
        if asyncio.get_running_loop().time() > end:
            raise Unavailable("the worker is ready, but its presence is not to be seen")
        await asyncio.sleep(0.02)
    return nodes[0].node


async def _end_launcher(config: Config) -> None:
    """End the launcher, and with it whatever still runs."""
    from worker.datadir import DataDir
    from worker.supervisor import Launcher

    try:
        data = DataDir.open(config.data_dir, node=None)
    except Configuration:
        return  # the worker could not use it either, and has no launcher there
    try:
        launcher = await Launcher.attach(data, spawn=False)
        await launcher.shutdown(kill=True)
    except Unavailable:
        return  # there is none
    finally:
        data.close()
