"""The composition root: builds the parts, wires them, owns their start and their end.

Order of a start: data directory and journal, launcher and adoption (containers are looked after at once, also
without a server), then the connection, the fence, and only then commands: whoever is not sure to be the only
owner of the name begins nothing.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loguru import logger

from schemas.node import Capabilities
from schemas.spec import SpecFeature
from schemas.subjects import Subjects
from worker.bus.credentials import check_credentials, has_credentials, parse_servers
from worker.config import Config
from worker.config_model import STOP
from worker.datadir import DataDir, machine_boot_id
from worker.errors import Configuration, Conflict, Unavailable
from worker.host_api import HostApi, TokenRenewer
from worker.images.cloning import MeasuredCloner
from worker.images.pull import Puller
from worker.images.store import ImageStore
from worker.images.transfers import Transfers
from worker.journal import Journal
from worker.late import LateSink
from worker.log import register_secret
from worker.logs import LogShipper
from worker.node_commands import DRAINING_KEY
from worker.node_info import NodeDescription
from worker.own_launcher import LauncherRenewal, attach_own
from worker.platform import driver as platform_driver
from worker.policy import HostFacts
from worker.reload import Reloader
from worker.runtime import Runtime
from worker.sd_notify import Notifier, watch
from worker.secret_files import SecretFiles
from worker.services import Services
from worker.serving import Serving
from worker.shutdown import SENDING_S, Shutdown, on_signals
from worker.stats import Sampler
from worker.supervisor import Launcher
from worker.volume_s3.mirrors import Mirrors
from worker.volumes import find_limits
from worker.volumes_named import sweep_gone

# What of a spec this worker honours; the rest is refused by name.
FEATURES = frozenset(
    {
        SpecFeature.ULIMITS,
        SpecFeature.SECRETS,
        SpecFeature.VOLUMES_BIND,
        SpecFeature.VOLUMES_NAMED,
        SpecFeature.VOLUMES_ANONYMOUS,
        SpecFeature.VOLUMES_TMPFS,
        SpecFeature.VOLUMES_S3,
        SpecFeature.DEVICES,
        SpecFeature.LOGS_MAX_RATE,
        SpecFeature.PLATFORM,
        SpecFeature.GPU,
        SpecFeature.TTL_AFTER_FINISHED,
    }
)
# Features that depend on the machine.
_ABLE = {
    "rootfs": SpecFeature.ISOLATION_ROOTFS,
    "pids": SpecFeature.RESOURCES_PIDS,
    "cpu": SpecFeature.RESOURCES_CPU,
}
THREADS = 8


def features_of(capabilities: Capabilities, *, changes_user: bool = False) -> frozenset[str]:
    """The fields of a spec that this node honours, by the names of `api.features`."""
    named = (*capabilities.isolation, *capabilities.limits)
    user = {SpecFeature.USER} if changes_user else set()
    return FEATURES | user | {_ABLE[name] for name in named if name in _ABLE}


async def run_worker(
    config: Config,
    *,
    setup: bool,
    takeover: bool,
    on_ready: Callable[[], None] | None = None,
    stop: asyncio.Event | None = None,
    reread: Callable[[], Config] | None = None,
    notifier: Notifier | None = None,
) -> bool:
    """Run the node until `stop` is set; without one the process is this worker's own, and ends by SIGTERM or SIGINT.

    `reread` gives the configuration of now, for SIGHUP. False when it was forced to end and gave up what was under
    way. Raises Configuration.
    """
    notifier = notifier or Notifier()
    shutdown = Shutdown(stop)
    reloader = Reloader(reread or (lambda: config), notifier)
    try:
        with on_signals(shutdown, reloader.ask) if stop is None else nullcontext():
            notifier.status("adopting containers")
            async with Agent.build(config, takeover=takeover) as agent:
                serving = agent.serving(shutdown, notifier)
                try:
                    await agent.serve(
                        serving,
                        shutdown,
                        reloader,
                        notifier,
                        lambda: serving.run(setup=setup, takeover=takeover, on_ready=on_ready),
                    )
                except* Configuration:
                    await agent.end_idle_launcher()
                    raise
                if agent.stops and not shutdown.forced.is_set():
                    await agent.end_idle_launcher()
    except BaseExceptionGroup as group:
        raise _first(group) from group
    return not shutdown.forced.is_set()


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The failure that ended the worker, without the wrapping of the tasks it happened in."""
    failure: BaseException = group
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    return failure


class Agent:
    """All parts of one worker."""

    def __init__(
        self,
        config: Config,
        services: Services,
        runtime: Runtime,
        sampler: Sampler,
        sink: LateSink,
        description: NodeDescription,
    ) -> None:
        self.config = config
        self.services = services
        self.runtime = runtime
        self.sampler = sampler
        self.sink = sink
        self.description = description
        self._lost = asyncio.Event()
        self._renewer = TokenRenewer(services.host_api, runtime.live, services.data.container)

    @classmethod
    @asynccontextmanager
    async def build(cls, config: Config, *, takeover: bool) -> AsyncIterator["Agent"]:
        """Everything that needs no server: after this, containers are adopted and looked after."""
        async with AsyncExitStack() as stack:
            check_credentials(config.nats)
            for server in parse_servers(config.nats.url):
                for kind in ("password", "token"):
                    if kind in server.secret:
                        register_secret(server.secret[kind])
            driver = platform_driver()
            # What the machine can do is tried out in a process: that takes its time beside the rest.
            probing = asyncio.get_running_loop().run_in_executor(None, driver.capabilities)
            probing.add_done_callback(lambda probe: probe.cancelled() or probe.exception())
            data = DataDir.open(config.data_dir, node=config.node.name, takeover=takeover)
            stack.callback(data.close)
            host_api = HostApi.open(config.host_api, node=data.node, data_root=data.root)
            journal = await Journal.open(
                data.journal_path, node=data.node, expected_epoch=data.epoch, takeover=takeover
            )
            stack.push_async_callback(journal.close)
            data.bind_epoch(journal.epoch)
            cloner = MeasuredCloner(driver, data.images, data.containers)
            images = ImageStore.open(data.images, cloner, max_bytes=config.images.limit_bytes)
            stack.callback(images.close)
            subjects = Subjects()
            sink = LateSink()
            secrets = SecretFiles(Path(config.secrets.dir) if config.secrets.dir else data.secrets)
            puller = Puller(images, config, secrets, tell=sink.publish_progress_of(subjects, data.node))
            stack.push_async_callback(puller.close)
            transfers = Transfers(images, config, secrets, tell=sink.publish_progress_of(subjects, data.node))
            stack.push_async_callback(transfers.close)
            threads = ThreadPoolExecutor(THREADS, thread_name_prefix="runtime")
            stack.callback(threads.shutdown)
            boot_id = machine_boot_id() or ""
            launcher = await attach_own(data, journal, boot_id)
            slots = config.node.slots or os.cpu_count() or 1
            await probing
            await asyncio.to_thread(find_limits, driver, data.volumes)
            capabilities = driver.capabilities()
            features = features_of(capabilities, changes_user=driver.changes_user())
            services = Services(
                config=config,
                node=data.node,
                subjects=subjects,
                journal=journal,
                data=data,
                driver=driver,
                images=images,
                cloner=cloner,
                puller=puller,
                transfers=transfers,
                logs=LogShipper(
                    sink=sink,
                    journal=journal,
                    subjects=subjects,
                    node=data.node,
                    spool_dir=data.spool,
                    ack_output=lambda cid, stream, offset: services.launcher.ack_output(cid, stream, offset),
                ),
                launcher=launcher,
                host=_host_facts(config, data, host_api),
                secrets=secrets,
                host_api=host_api,
                mirrors=Mirrors(data.mirrors, config=config, secrets=secrets),
                boot_id=boot_id,
                features=features,
                slots=slots,
                threads=threads,
            )
            runtime = await stack.enter_async_context(Runtime(services).open())
            description = NodeDescription(
                config.node,
                node=data.node,
                epoch=lambda: journal.epoch,
                boot=journal.boot,
                insecure=not has_credentials(config.nats),
                capabilities=capabilities,
                features=features,
                slots=slots,
                slots_used=runtime.live_count,
                started_at=datetime.now(UTC),
            )
            sampler = Sampler(
                node=data.node,
                interval_s=config.node.stats_interval_s,
                targets=runtime.targets,
                processes=driver.processes,
                allocated_bytes=driver.allocated_bytes,
                publish=sink.publish_stats_of(subjects),
                on_memory_limit=runtime.on_memory_limit,
            )
            stack.callback(sampler.close)
            services.measure = sampler.measure
            agent = cls(config, services, runtime, sampler, sink, description)
            services.attach_launcher = agent.attach_launcher
            agent._wire(launcher)
            stack.push_async_callback(agent._detach)
            services.draining = bool(await journal.read(lambda tx: tx.get_meta(DRAINING_KEY)))
            services.mirrors.spawn, services.mirrors.tell = runtime.spawn, runtime.say
            await services.in_thread(services.mirrors.load)
            await services.in_thread(sweep_gone, data.volumes)
            adopted = await runtime.adopt()
            services.mirrors.begin(
                {status.instance for status in runtime.live()},
                {status.instance for status in runtime.statuses()},
            )
            resumed = services.logs.resume_spool()
            logger.info("node {}: {} containers adopted, {} logs to finish", data.node, adopted, resumed)
            yield agent

    # -- the launcher

    def _wire(self, launcher: Launcher) -> None:
        launcher.on_exit = self.runtime.on_exit
        launcher.on_output = self.services.logs.notify
        launcher.on_lost = self._lost.set
        self.services.launcher = launcher

    async def attach_launcher(self) -> None:
        """A new launcher in the place of one that died."""
        services = self.services
        await services.launcher.close()
        self._lost.clear()  # by the one that died; the next one is told of anew
        self._wire(await attach_own(services.data, services.journal, services.boot_id))

    async def end_idle_launcher(self) -> None:
        """A worker that may not run here leaves no launcher behind, unless that has containers to look after."""
        try:
            await self.services.launcher.shutdown(kill=False)
        except (Conflict, Unavailable) as failure:
            logger.info("the launcher goes on: {}", failure.message)

    async def _detach(self) -> None:
        await self.services.launcher.close()

    async def _watch_launcher(self) -> None:
        while True:
            await self._lost.wait()
            self._lost.clear()
            await self.runtime.launcher_lost()

    # -- serving

    def serving(self, shutdown: Shutdown, notifier: Notifier) -> Serving:
        return Serving(
            self.services,
            self.runtime,
            description=self.description,
            sink=self.sink,
            shutdown=shutdown,
            notifier=notifier,
        )

    async def serve(
        self,
        serving: Serving,
        shutdown: Shutdown,
        reloader: Reloader,
        notifier: Notifier,
        obey: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        """Connect and obey until the shutdown, and through it."""
        services = self.services
        notifier.ready()
        async with asyncio.TaskGroup() as tasks:
            jobs = [
                tasks.create_task(watch(notifier, self._probe), name="watchdog"),
                tasks.create_task(self._watch_launcher(), name="launcher"),
                tasks.create_task(services.logs.run(), name="logs"),
                tasks.create_task(self.sampler.run(), name="stats"),
                tasks.create_task(self._renewer.run(), name="tokens"),
                tasks.create_task(LauncherRenewal(services).run(), name="launcher renewal"),
                tasks.create_task(reloader.run(services), name="reload"),
                tasks.create_task(services.journal.sound(), name="journal"),
            ]
            obeying = tasks.create_task(obey(), name="bus")
            await shutdown.begun()
            notifier.stopping()
            logger.info("stopping; containers {}", "are stopped" if self.stops else "go on")
            if not serving.ready:
                # Nothing was begun for anybody; containers are stopped all the same where that is configured.
                await serving.winding_up.run()
            if not serving.ready:
                obeying.cancel()
            await shutdown.give(asyncio.wait({obeying}), SENDING_S)
            for job in (obeying, *reversed(jobs)):
                job.cancel()

    @property
    def stops(self) -> bool:
        return self.services.config.node.on_shutdown == STOP

    async def _probe(self) -> None:
        """Returns when the journal's thread has come by."""
        await self.services.journal.read(lambda tx: None)


def _host_facts(config: Config, data: DataDir, host_api: HostApi) -> HostFacts:
    """What no container may reach, whatever a spec asks for and an operator grants."""
    ports = tuple(sorted({server.port for server in parse_servers(config.nats.url)}))
    tls = config.nats.tls
    files = (
        config.nats.creds,
        config.nats.nkey,
        config.nats.token_file,
        config.images.docker_config,
        None if tls is None else tls.key,
        config.host_api.secret_file,
        config.source,
        config.secrets.dir,
    )
    protected = tuple(os.path.realpath(f) for f in files if f)
    return HostFacts(
        data_root=str(data.root),
        protected=protected,
        nats_ports=ports,
        api_socket=host_api.socket,
        api_tokens=host_api.mints,
    )
