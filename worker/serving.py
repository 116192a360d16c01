"""What a worker does while it has a server: from the first connection to the last event.

Nothing is begun before the fence is passed and an event of ours is stored: whoever is not sure to be the only owner
of the name leaves everything as it is.
"""

import asyncio
import gc
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import msgspec
from loguru import logger

from schemas.node import NodeState
from schemas.node import Presence as PresenceValue
from worker.bus.chunks import ChunkPublisher
from worker.bus.connection import Bus
from worker.bus.consumer import CommandConsumer
from worker.bus.outbox import OutboxPublisher
from worker.bus.presence import Presence
from worker.bus.rpc import serve_queries
from worker.bus.streams import set_up_at_last, wait_for_streams
from worker.delivery_gauge import DeliveryGauge
from worker.handlers import CommandHandler
from worker.image_upkeep import evict
from worker.late import LateSink
from worker.ledger_upkeep import LedgerKeeper
from worker.node_commands import NodeCommands
from worker.node_info import NodeDescription, package_version
from worker.queries import Queries, Query
from worker.repeating import Repeater
from worker.runtime import Runtime
from worker.sd_notify import Notifier
from worker.services import Services
from worker.shutdown import SENDING_S, Shutdown
from worker.winding_up import WindingUp

HOUSEKEEPING_S = 3600.0
ACTING_QUERIES = frozenset({"exec"})
OWNED_TIMEOUT_S = 5.0


class Serving:
    """`ready` once commands are taken; from then on `run` ends in order when the shutdown is asked for."""

    def __init__(
        self,
        services: Services,
        runtime: Runtime,
        *,
        description: NodeDescription,
        sink: LateSink,
        shutdown: Shutdown,
        notifier: Notifier,
    ) -> None:
        self.ready = False
        self.winding_up = WindingUp(shutdown, services, runtime)
        self._services = services
        self._runtime = runtime
        self._description = description
        self._sink = sink
        self._shutdown = shutdown
        self._notifier = notifier

    async def run(self, *, setup: bool, takeover: bool, on_ready: Callable[[], None] | None) -> None:
        """Connect and obey. Raises Configuration, Fenced among it."""
        services, config = self._services, self._services.config
        self._notifier.status(f"{services.node} looks after its containers and waits for the NATS server")
        bus = await Bus.connect(
            config.nats, node=services.node, name=f"sandfleet {services.node}", retry=True
        )
        services.server_ports = lambda: bus.peer_ports
        try:
            if setup:
                await set_up_at_last(bus, subjects=services.subjects, pools=config.node.pools)
            await wait_for_streams(bus)
            outbox = OutboxPublisher(bus, services.journal, services.subjects)
            if await outbox.fence(takeover):
                services.data.bind_epoch(services.journal.epoch)
            await self._serve(bus, outbox, on_ready)
        finally:
            await bus.close()

    async def _serve(self, bus: Bus, outbox: OutboxPublisher, on_ready: Callable[[], None] | None) -> None:
        services, runtime = self._services, self._runtime
        presence = Presence(bus, services.node, self._presence, allowed=lambda: outbox.owns)
        consumer = CommandConsumer(
            bus, node=services.node, subjects=services.subjects, check_fence=outbox.check_fence
        )
        node_commands = NodeCommands(
            services,
            runtime,
            info=self._description.info,
            spawn=self.winding_up.node_work.spawn,
            changed=presence.refresh,
        )
        handler = CommandHandler(services, runtime, node_commands, self.winding_up.accepting.spawn)
        gauge = DeliveryGauge(services.journal, services.logs, bus=bus, outbox=outbox, consumer=consumer)
        queries = Queries(services, runtime, info=self._description.info, delivery=gauge.measure)

        async def statistics() -> Mapping[str, Any]:
            return {"info": msgspec.to_builtins(await gauge.measure())}

        sending = asyncio.create_task(outbox.run(), name="outbox")
        try:
            async with asyncio.TaskGroup() as group:
                helpers: list[asyncio.Task[Any]] = []

                def help_with(work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
                    helpers.append(group.create_task(work, name=name))
                    return helpers[-1]

                help_with(_until_cancelled(sending), "outbox watch")
                service = await serve_queries(
                    bus,
                    services.node,
                    {
                        verb: _for_owner(query, outbox) if verb in ACTING_QUERIES else query
                        for verb, query in queries.handlers().items()
                    },
                    version=package_version(),
                    description=f"node {services.node}",
                    data=statistics,
                )
                # Whoever hears that the node is ready may ask it at once.
                await self._tell(node_commands, runtime.node_state())
                # From here on nobody else is let into the stream under this name; before, nothing is begun.
                await outbox.claim()
                self._sink.open(ChunkPublisher(bus))
                await runtime.end_strangers()
                recovered = await handler.recover()
                runtime.let_leave()
                help_with(self._keep_images(), "images")
                help_with(presence.run(), "presence")
                commands = help_with(consumer.run(handler.handle), "commands")
                help_with(Repeater(bus, outbox, runtime, services.subjects).run(), "repeat")
                await consumer.ready.wait()
                help_with(LedgerKeeper(services.journal, consumer).run(), "ledger")
                gc.freeze()  # a full collection of all modules stops the loop for 30 ms, measured
                logger.info("ready as {} ({} commands to finish)", services.node, recovered)
                unlisten = self._report_connection(bus)
                self.ready = True
                if on_ready is not None:
                    on_ready()
                try:
                    await self._shutdown.asked.wait()
                    # What is not in hand stays in the stream, for the next worker.
                    commands.cancel()
                    await asyncio.gather(commands, return_exceptions=True)
                    await self.winding_up.run()
                finally:
                    unlisten()
                    await service.stop()
                    await queries.close()
                for task in helpers:
                    task.cancel()
        finally:
            if self._shutdown.asked.is_set() and not self._shutdown.forced.is_set():
                await presence.withdraw()
                await self._tell(node_commands, NodeState.STOPPED)
                await self._send_the_rest(bus, outbox)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    # -- at the end

    async def _send_the_rest(self, bus: Bus, outbox: OutboxPublisher) -> None:
        """Events and logs, if the server is there; what it does not take is kept."""
        if not bus.connected:
            logger.info("there is no connection: events and logs are kept for the next worker")
            return
        gone = asyncio.Event()
        unlisten = bus.listen(lambda connected: None if connected else gone.set())
        sending = asyncio.ensure_future(self._send(outbox))
        losing = asyncio.ensure_future(gone.wait())
        both: set[asyncio.Future[Any]] = {sending, losing}
        try:
            waiting = asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not await self._shutdown.give(waiting, SENDING_S) or not sending.done():
                logger.warning("not all events and logs were sent: the next worker goes on with them")
        finally:
            unlisten()
            for task in (sending, losing):
                task.cancel()
            await asyncio.gather(sending, losing, return_exceptions=True)

    async def _send(self, outbox: OutboxPublisher) -> None:
        logs = self._services.logs
        await outbox.drained(SENDING_S)
        if not self.ready:
            return
        for status in self.winding_up.stopped:
            await logs.drained(status.container, status.instance, status.run, SENDING_S)
        await logs.caught_up()

    # -- what is told

    async def _tell(self, node_commands: NodeCommands, state: NodeState) -> None:
        await self._services.journal.transact(lambda tx: node_commands.write_node(tx, state))

    def _report_connection(self, bus: Bus) -> Callable[[], None]:
        def report(connected: bool) -> None:
            state = "is ready" if connected else "looks after its containers; the connection to NATS broke"
            self._notifier.status(f"{self._services.node} {state}")

        report(bus.connected)
        return bus.listen(report)

    def _presence(self) -> PresenceValue:
        services = self._services
        return PresenceValue(
            node=services.node,
            boot=services.journal.boot,
            epoch=services.journal.epoch,
            state=self._runtime.node_state(),
            slots=services.slots,
            slots_used=self._runtime.live_count(),
        )

    async def _keep_images(self) -> None:
        """Find out how trees are best copied here, and forget images that are too many."""
        await self._services.in_thread(self._services.cloner.choose)
        while True:
            await evict(self._services)
            await asyncio.sleep(HOUSEKEEPING_S)


def _for_owner(query: Query, outbox: OutboxPublisher) -> Query:
    """A query that acts, and so waits until the name is known to be ours."""

    async def answer(body: bytes, headers: dict[str, str]) -> bytes:
        await outbox.owned(OWNED_TIMEOUT_S)
        return await query(body, headers)

    return answer


async def _until_cancelled(task: "asyncio.Task[None]") -> None:
    """Pass on the failure of a task that must outlive its watcher."""
    await asyncio.shield(task)
