"""What the container verbs do: the steps between a command that was accepted and its completion."""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
from loguru import logger

from schemas.commands import Create, Kill, Remove, Restart, Run, Start, Stop
from schemas.decode import signal_number
from schemas.errors import ContractError, Unsupported
from schemas.spec import ServiceSpec
from schemas.status import ContainerStatus, Gpu, Reason, State
from schemas.subjects import parse_cid
from worker.container import Begin, ContainerActor
from worker.datadir import ContainerDirs
from worker.ending import Ender
from worker.errors import Conflict, Interrupted, NotFound, Unavailable
from worker.ids import new_ulid
from worker.image_upkeep import tell_pulled
from worker.images.honoured import check_config, labels, stop_signal
from worker.images.model import ImageInfo
from worker.lifecycle import LIVE, Trigger
from worker.platform.base import SandboxPolicy
from worker.records import ContainerRecord
from worker.services import Services
from worker.starting import Starter, refuse_when_draining, refuse_when_full
from worker.work import Phase, Work, now_utc, write_completion, write_state

CLONE_TRIES = 5


class ContainerOperations:
    """The verbs of one node. Holds no state of its own but what `services` gives."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self.ender = Ender(services)
        self.starter = Starter(services, self.ender)

    # -- the first step, in the transaction that accepts the command

    def first_step(self, actor: ContainerActor, work: Work) -> Begin | None:
        command, record = work.command, actor.record
        refuse_when_draining(self._services, work)
        if isinstance(command, Create | Run) and record is None:
            return self._begin(None, self._new_record(actor.cid, command.spec, work), work)
        if record is None:
            return None
        before = record.status.state
        if isinstance(command, Start):
            refuse_when_full(self._services)
            begin = self._begin(before, self.starter.beginning(record, work), work)
            if begin.record is not None:
                self.starter.foresee(work, begin.record)
            return begin
        if isinstance(command, Stop) and before is State.RUNNING:
            return self._begin(before, self.ender.stopping(record), work)
        if isinstance(command, Stop) and before is State.PENDING:
            return self._begin(before, self.starter.cancelled(record, Reason.STOPPED), work, done=True)
        return None

    def _begin(
        self, before: State | None, record: ContainerRecord, work: Work, *, done: bool = False
    ) -> Begin:
        def write(tx: Any) -> None:
            write_state(tx, self._services.subjects, before, record, work)
            if done:
                write_completion(tx, self._services.subjects, work, error=None, status=record.status)

        return Begin(write=write, record=record, done=done)

    # -- the verbs

    async def perform(self, actor: ContainerActor, work: Work) -> dict[str, Any] | None:
        command = work.command
        if isinstance(command, Create):
            return await self._create(actor, work, command.spec, start=False)
        if isinstance(command, Run):
            return await self._create(actor, work, command.spec, start=True)
        if isinstance(command, Start):
            await self.starter.start(actor, work)
        elif isinstance(command, Stop):
            await self._stop(actor, work, command.timeout_s)
        elif isinstance(command, Kill):
            await self._kill(actor, work, command)
        elif isinstance(command, Restart):
            await self._restart(actor, work, command)
        elif isinstance(command, Remove):
            await self._remove(actor, work)
        else:
            raise Unsupported(f"{work.verb} is not a verb of a container", field="type")
        return None

    async def hasten(self, actor: ContainerActor, work: Work) -> None:
        """A stop or remove that arrived while another stop waits: its own, shorter, patience counts."""
        record = actor.record
        if record is None or record.status.state is not State.STOPPING:
            return
        status = record.status
        try:
            if isinstance(work.command, Stop):
                timeout_s = self.ender.stop_timeout_s(record.spec, work.command.timeout_s)
                await self._services.launcher.stop(
                    actor.cid, status.instance, status.run, self.ender.stop_signal(record), timeout_s
                )
            else:
                await self._services.launcher.kill_tree(actor.cid, status.instance, status.run)
        except (Unavailable, NotFound) as failure:
            # The stop that waits sees the same and says so.
            logger.debug("{} could not be hastened: {}", actor.cid, failure.message)

    # -- create

    def _new_record(self, cid: str, spec: ServiceSpec, work: Work) -> ContainerRecord:
        service, replica = parse_cid(cid)
        status = ContainerStatus(
            container=cid,
            service=service,
            replica=replica,
            instance=new_ulid(),
            state=State.PENDING,
            message="cloning",
            image=spec.image.name,
            labels=dict(spec.labels),
            gpu=Gpu.NONE,
            created_at=now_utc(),
        )
        return ContainerRecord(status=status, spec=spec, created_by=work.id)

    async def _create(
        self, actor: ContainerActor, work: Work, spec: ServiceSpec, *, start: bool
    ) -> dict[str, Any]:
        if actor.record is None or actor.record.created_by != work.id:  # what was begun goes on
            refuse_when_draining(self._services, work)
        work.phase = Phase.CREATING
        if actor.record is not None and actor.record.created_by != work.id:
            await self.ender.end_run_now(actor)
            await self.ender.teardown(actor, work)
        if actor.record is None:
            work.refuse_if_overtaken()
            await actor.appear(self._new_record(actor.cid, spec, work), work)
        record = actor.record
        assert record is not None
        result = {"instance": record.status.instance}
        if record.status.state is State.PENDING and not record.ready:
            actor.set_phase(work, Phase.CREATING)
            try:
                policy, ready = await self._prepare(actor, work, record)
                if not start:
                    await actor.update(ready, work=work, finish=True, result=result)
            except ContractError as failure:
                await self._abandon(actor, work, failure)
                raise
            if start:
                try:
                    await self.starter.start(actor, work, also=ready, result=result, policy=policy)
                except ContractError:
                    if actor.state is State.PENDING:  # refused before it began: the container is there
                        await actor.update(ready, work=work)
                    raise
        elif start:
            await self.starter.start(actor, work, result=result)
        return result

    async def _prepare(
        self, actor: ContainerActor, work: Work, record: ContainerRecord
    ) -> tuple[SandboxPolicy, Callable[[ContainerRecord], ContainerRecord]]:
        """Everything a create makes. Gives the sandbox, and the change of the record that tells of it."""
        services, spec, cid = self._services, record.spec, actor.cid
        services.check_features(spec)
        services.check_platform(spec)
        services.check_slots()
        services.check_image(spec.image.name)
        image = await self._image(actor, work, spec)
        dirs = services.data.container(cid)
        port = await services.launcher.reserve_port(cid)
        policy = services.make_policy(spec, cid, record.status.instance, port)
        await services.in_thread(services.new_container, dirs, cid)
        # Not cut off in the middle: a thread that still writes would outlive the tree's removal.
        digest = await self._clone(actor, work, image.digest, dirs)
        work.refuse_if_overtaken()
        config = services.image_config(digest)
        check_config(config)
        number, told = stop_signal(spec, config), labels(spec, config)
        policy = await services.in_thread(services.write_container_files, dirs, record, policy, config)
        work.refuse_if_overtaken()
        return policy, lambda r: msgspec.structs.replace(
            r.with_status(
                message="ready",
                port=port,
                ip="127.0.0.1",
                network=policy.network.level,
                gpu=policy.gpu,
                image_digest=digest,
                memory_limit=policy.limits.memory_bytes,
                labels=told,
            ),
            ready=True,
            user=policy.user,
            stop_signal=number,
        )

    async def _clone(self, actor: ContainerActor, work: Work, digest: str, dirs: ContainerDirs) -> str:
        """Make the rootfs. Gives the digest of the image, which a prune may take away in the moment between the
        pull's end and its being known here: then it is pulled once more.
        """
        for _ in range(CLONE_TRIES - 1):
            try:
                await self._services.images.clone(digest, dirs.rootfs, container=actor.cid)
                return digest
            except NotFound as failure:
                logger.info("{}: {}", actor.cid, failure.message)
            work.refuse_if_overtaken()
            record = actor.record
            assert record is not None
            digest = (await self._image(actor, work, record.spec)).digest
        await self._services.images.clone(digest, dirs.rootfs, container=actor.cid)
        return digest

    async def _image(self, actor: ContainerActor, work: Work, spec: ServiceSpec) -> ImageInfo:
        """The spec's image, from a registry where its policy says so; the container's from here on.

        A stop does not wait for that.
        """
        services = self._services

        async def telling() -> None:
            await actor.update(lambda r: r.with_status(message="pulling"), work=work)

        pull = asyncio.ensure_future(
            services.puller.pull(spec.image.name, spec.image.pull_policy, on_fetch=telling)
        )
        overtaken = asyncio.ensure_future(work.overtaken.wait())
        try:
            await asyncio.wait((pull, overtaken), return_when=asyncio.FIRST_COMPLETED)
            work.refuse_if_overtaken()
            pulled = await pull
            services.images.keep_for(actor.cid, pulled.image.digest)
        finally:
            for task in (pull, overtaken):
                task.cancel()
            await asyncio.gather(pull, overtaken, return_exceptions=True)
        if pulled.fetched:
            await actor.update(lambda r: r.with_status(message="cloning"), work=work)
            await tell_pulled(services, work, pulled.image)
        return pulled.image

    async def _abandon(self, actor: ContainerActor, work: Work, failure: ContractError) -> None:
        """A create that failed leaves nothing; one commit says so and answers, or a crash would begin it again."""
        await self.ender.clear(actor.cid)
        reason = Reason.STOPPED if work.overtaken_by is not None else Reason.CREATE_FAILED
        await actor.transition(
            Trigger.CREATE_FAILED,
            lambda r: r.with_status(reason=reason, message=failure.message, port=None, ip=None),
            work=work,
            finish=True,
            error=failure,
        )

    # -- stop, kill, restart, remove

    async def _stop(self, actor: ContainerActor, work: Work, timeout_s: float | None) -> None:
        await actor.wait_for(lambda: actor.state is not State.INITIALIZING)
        if actor.state is State.PENDING:
            await actor.transition(
                Trigger.CANCEL, lambda r: self.starter.cancelled(r, Reason.STOPPED), work=work, finish=True
            )
            return
        if actor.state is State.RUNNING:
            await actor.transition(
                Trigger.STOP,
                self.ender.stopping,
                work=work,
                only_if=lambda r: r.status.state is State.RUNNING,
            )
        if actor.state is State.STOPPING:
            actor.set_phase(work, Phase.STOPPING)
            await self.ender.end_run(actor, timeout_s)

    async def _kill(self, actor: ContainerActor, work: Work, command: Kill) -> None:
        record = actor.record
        if record is None or record.status.state not in LIVE:
            if work.overtook:
                return  # the start it overtook has ended by it
            if work.recovered:
                raise Interrupted("the worker died before it knew whether the signal was sent")
            raise Conflict(f"kill is not possible: {actor.cid} is {actor.state}")
        if work.recovered:
            raise Interrupted("the worker died before it knew whether the signal was sent")
        number = signal_number(command.signal)
        await self.ender.intend(actor, Reason.KILLED)
        try:
            await self._services.launcher.signal(actor.cid, record.status.instance, record.status.run, number)
        except NotFound as failure:
            raise Conflict(f"kill is not possible: {actor.cid} has just ended") from failure

    async def _restart(self, actor: ContainerActor, work: Work, command: Restart) -> None:
        refuse_when_draining(self._services, work)
        if not self.starter.was_started(actor, work):
            await self._stop_for_restart(actor, work, command.timeout_s)
            work.refuse_if_overtaken()
            await self.starter.start(actor, work)

    async def _stop_for_restart(self, actor: ContainerActor, work: Work, timeout_s: float | None) -> None:
        if actor.state is State.RUNNING:
            await actor.transition(
                Trigger.STOP,
                self.ender.stopping,
                work=work,
                only_if=lambda r: r.status.state is State.RUNNING,
            )
        if actor.state is State.STOPPING:
            actor.set_phase(work, Phase.STOPPING)
            await self.ender.end_run(actor, timeout_s)

    async def _remove(self, actor: ContainerActor, work: Work) -> None:
        if actor.record is None:
            return
        await self.ender.end_run_now(actor)
        await self.ender.teardown(actor, work, finish=True)

    async def finish_stop(self, actor: ContainerActor) -> None:
        """Go on with a stop that a dead worker had begun."""
        await self.ender.end_run(actor, None)
