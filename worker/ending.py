"""How a run ends, by our will or not, and how a container goes."""

import asyncio
from functools import partial

import msgspec
from loguru import logger

from schemas.decode import signal_number
from schemas.spec import ServiceSpec
from schemas.status import Reason, State
from worker.container import ContainerActor
from worker.errors import Conflict, NotFound, ResourceExhausted, Unavailable
from worker.images.honoured import DEFAULT_STOP_SIGNAL
from worker.lifecycle import LIVE, Trigger, next_state
from worker.records import ContainerRecord, from_unix_us
from worker.services import Services
from worker.supervisor import ExitRecord
from worker.work import Work, now_utc

WRITE_BACK_PATIENCE_S = 30.0
# The launcher tries every second.
WRITTEN_TIMEOUT_S, WRITTEN_POLL_S = 5.0, 0.1


class Ender:
    """Ends runs and removes containers."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def stop_signal(self, record: ContainerRecord) -> int:
        if record.stop_signal is not None:
            return record.stop_signal
        return signal_number(record.spec.stop_signal or DEFAULT_STOP_SIGNAL)

    def stop_timeout_s(self, spec: ServiceSpec, asked: float | None) -> float:
        if asked is not None:
            return asked
        return spec.stop_grace_s

    def stopping(self, record: ContainerRecord) -> ContainerRecord:
        return msgspec.structs.replace(
            record.with_status(state=next_state(record.status.state, Trigger.STOP)), intent=Reason.STOPPED
        )

    async def end_run(self, actor: ContainerActor, timeout_s: float | None) -> None:
        """Stop signal, then SIGKILL, until no process of the run is alive and the exit is in the journal."""
        record = actor.record
        if record is None:
            return
        status = record.status
        try:
            ended = await self._services.launcher.stop(
                actor.cid,
                status.instance,
                status.run,
                self.stop_signal(record),
                self.stop_timeout_s(record.spec, timeout_s),
            )
        except (Unavailable, NotFound) as failure:
            # The launcher is gone, or its exit report is on the way: either changes the state.
            logger.info("{} ends without an answer to its stop: {}", actor.cid, failure.message)
        else:
            await self.apply_exit(actor, ended)
        await actor.wait_for(lambda: actor.state not in LIVE)
        await self._written_back(actor, status.instance)

    async def _written_back(self, actor: ContainerActor, instance: str) -> None:
        """A stop has ended when what the container wrote is where others can find it: an attempt, or a while, at
        most, and not while another command waits."""
        written = asyncio.ensure_future(self._services.mirrors.written_back(instance, WRITE_BACK_PATIENCE_S))
        wanted = asyncio.ensure_future(actor.wait_for(lambda: actor.wanted))
        try:
            await asyncio.wait((written, wanted), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (written, wanted):
                task.cancel()
            await asyncio.gather(written, wanted, return_exceptions=True)

    async def end_run_now(self, actor: ContainerActor) -> None:
        """SIGKILL for every process of the container, until none is left."""
        await actor.wait_for(lambda: actor.state is not State.INITIALIZING)
        record = actor.record
        if record is None or record.status.state not in LIVE:
            return
        status = record.status
        await self.intend(actor, Reason.KILLED)
        try:
            ended = await self._services.launcher.kill_tree(actor.cid, status.instance, status.run)
        except (Unavailable, NotFound) as failure:
            logger.info("{} ends without an answer to its kill: {}", actor.cid, failure.message)
        else:
            if ended is not None:
                await self.apply_exit(actor, ended)
        await actor.wait_for(lambda: actor.state not in LIVE)

    async def intend(self, actor: ContainerActor, reason: Reason) -> None:
        if actor.record is not None and actor.record.intent is None:
            await actor.update(lambda r: msgspec.structs.replace(r, intent=reason), tell=False)

    async def teardown(self, actor: ContainerActor, work: Work, *, finish: bool = False) -> None:
        """Everything of an ended container goes, but for log bytes that are still to be sent."""
        record = actor.record
        if record is None:
            return
        services, status = self._services, record.status
        await self._let_go(actor.cid, status.instance)
        await services.logs.spool(actor.cid, status.instance, services.data.container(actor.cid).state)
        await self.clear(actor.cid)
        services.dropped(status.instance)
        services.mirrors.released(status.instance)
        await actor.transition(
            Trigger.REMOVE,
            lambda r: r.with_status(pid=None, port=None, ip=None, message=None),
            work=work,
            finish=finish,
        )

    async def clear(self, cid: str) -> None:
        """Give back the port and delete the directory of a container that is no more."""
        services = self._services
        try:
            await services.launcher.release_port(cid)
        except Unavailable as failure:
            # The guard died with the launcher.
            logger.debug("the port of {} was not released: {}", cid, failure.message)
        await services.in_thread(services.sweep_container, cid)
        services.images.let_go(cid)

    async def _let_go(self, cid: str, instance: str) -> None:
        """Have the launcher be done with its files, before they go. ResourceExhausted when the disk does not take the
        end of its output.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + WRITTEN_TIMEOUT_S
        while (kept := await self.forget(cid, instance)) is not None:
            if loop.time() > deadline:
                raise kept
            await asyncio.sleep(WRITTEN_POLL_S)

    async def forget(self, cid: str, instance: str) -> ResourceExhausted | None:
        """Let the launcher forget a run. Why it does not: the end of the output is not on the disk yet, and it goes on
        trying; a next run, or the remove, has to wait for that.
        """
        try:
            await self._services.launcher.forget(cid, instance)
        except ResourceExhausted as failure:
            logger.debug("{} is not forgotten yet: {}", cid, failure.message)
            return failure
        except (Unavailable, NotFound, Conflict) as failure:
            # Conflict: its next run has begun, and took the place of this one.
            logger.debug("{} was forgotten already: {}", cid, failure.message)
        return None

    async def apply_exit(self, actor: ContainerActor, ended: ExitRecord) -> None:
        """The program ended: tell it once, whoever brings the news, and let the launcher forget it."""
        record = actor.record
        if record is None or record.status.instance != ended.instance:
            await self.forget(ended.cid, ended.instance)
            return
        if record.status.run != ended.run:
            return
        if record.status.state is State.INITIALIZING:
            actor.early_exit = ended
            return
        moved = await actor.transition(
            Trigger.EXIT,
            partial(_exited, ended=ended),
            only_if=lambda r: (
                r.status.instance == ended.instance
                and r.status.run == ended.run
                and r.status.state in (State.RUNNING, State.STOPPING)
            ),
        )
        self._services.logs.ended(ended.instance)
        self._services.mirrors.ended(ended.instance)
        await self.forget(ended.cid, ended.instance)
        if moved and record.spec.lifecycle.delete_on_exit:
            self._services.remove_later(actor.cid)

    async def lose(self, actor: ContainerActor, reason: Reason, message: str) -> None:
        """The outcome of the run cannot be known any more."""
        await actor.transition(
            Trigger.LOST,
            lambda r: r.with_status(reason=reason, message=message, pid=None, finished_at=now_utc()),
            only_if=lambda r: r.status.state in LIVE,
        )
        if actor.record is not None:
            self._services.mirrors.ended(actor.record.status.instance)

    async def over_memory(self, actor: ContainerActor, used_bytes: int) -> None:
        """The tree outgrew its limit: all of it is killed, and the reason is kept for the exit."""
        record = actor.record
        if record is None or record.status.state not in LIVE:
            return
        status = record.status
        logger.warning("{} uses {} bytes, more than its limit; killing it", actor.cid, used_bytes)
        await actor.update(lambda r: msgspec.structs.replace(r, intent=Reason.MEMORY_LIMIT), tell=False)
        try:
            ended = await self._services.launcher.kill_tree(actor.cid, status.instance, status.run)
        except (Unavailable, NotFound) as failure:
            logger.info("{} ended before it could be killed: {}", actor.cid, failure.message)
            return
        if ended is not None:
            await self.apply_exit(actor, ended)


def _exited(record: ContainerRecord, *, ended: ExitRecord) -> ContainerRecord:
    reason = record.intent
    if reason is Reason.KILLED and ended.exit_code >= 0:
        reason = None  # it outlived the signal and ended by itself
    if reason is None and ended.cpu_limit:
        reason = Reason.CPU_LIMIT
    if reason is None and ended.memory_limit:
        reason = Reason.MEMORY_LIMIT
    return record.with_status(
        exit_code=ended.exit_code,
        reason=reason,
        message=None,
        pid=None,
        finished_at=from_unix_us(ended.finished_at_us),
    )
