"""What the container verbs do: the steps between a command that was accepted and its completion."""

import signal
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

import msgspec
from loguru import logger

from schemas.commands import Create, Kill, Remove, Restart, Run, Start, Stop
from schemas.decode import signal_number
from schemas.errors import ContractError, Unsupported
from schemas.spec import ServiceSpec, unsupported_fields
from schemas.status import ContainerStatus, Gpu, Reason, State
from schemas.subjects import parse_cid
from worker.container import Begin, ContainerActor
from worker.entrypoint import build_env, resolve_command, runnable
from worker.errors import Conflict, Interrupted, NotFound, StartFailed, Unavailable
from worker.ids import new_ulid
from worker.lifecycle import LIVE, Trigger, next_state
from worker.records import ContainerRecord
from worker.services import Services
from worker.supervisor import ExitRecord, LaunchedContainer, StartRequest
from worker.work import Phase, Work, now_utc, write_completion, write_state

T = TypeVar("T")


class ContainerOperations:
    """The verbs of one node. Holds no state of its own but what `services` gives."""

    def __init__(self, services: Services) -> None:
        self._services = services

    # -- the first step, in the transaction that accepts the command

    def first_step(self, actor: ContainerActor, work: Work) -> Begin | None:
        command, record = work.command, actor.record
        self._refuse_when_draining(work)
        if isinstance(command, Create | Run) and record is None:
            return self._begin(None, self._new_record(actor.cid, command.spec, work), work)
        if record is None:
            return None
        before = record.status.state
        if isinstance(command, Start):
            return self._begin(before, self._beginning(record, work), work)
        if isinstance(command, Stop) and before is State.RUNNING:
            return self._begin(before, self._stopping(record), work)
        if isinstance(command, Stop) and before is State.PENDING:
            return self._begin(before, self._cancelled(record, Reason.STOPPED), work, done=True)
        return None

    def _begin(
        self, before: State | None, record: ContainerRecord, work: Work, *, done: bool = False
    ) -> Begin:
        def write(tx: Any) -> None:
            write_state(tx, self._services.subjects, before, record, work)
            if done:
                write_completion(tx, self._services.subjects, work, error=None, status=record.status)

        return Begin(write=write, record=record, done=done)

    def _refuse_when_draining(self, work: Work) -> None:
        if (
            self._services.draining
            and not work.recovered
            and work.verb in {"create", "run", "start", "restart"}
        ):
            raise Unavailable("this node is draining and takes no new work; `resume` ends that")

    # -- the verbs

    async def perform(self, actor: ContainerActor, work: Work) -> dict[str, Any] | None:
        command = work.command
        if isinstance(command, Create):
            return await self._create(actor, work, command.spec, start=False)
        if isinstance(command, Run):
            return await self._create(actor, work, command.spec, start=True)
        if isinstance(command, Start):
            await self._start(actor, work)
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
                timeout_s = self._stop_timeout_s(record.spec, work.command.timeout_s)
                await self._services.launcher.stop(
                    actor.cid, status.instance, status.run, self._stop_signal(record.spec), timeout_s
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
        self._refuse_when_draining(work)
        work.phase = Phase.CREATING
        if actor.record is not None and actor.record.created_by != work.id:
            await self._end_run_now(actor)
            await self._teardown(actor, work)
        if actor.record is None:
            if work.overtaken_by is not None:
                raise Conflict(f"overtaken by a later {work.overtaken_by}")
            await actor.appear(self._new_record(actor.cid, spec, work), work)
        record = actor.record
        assert record is not None
        result = {"instance": record.status.instance}
        if record.status.state is State.PENDING and not record.ready:
            actor.set_phase(work, Phase.CREATING)
            try:
                ready = await self._prepare(actor, work, record)
                if not start:
                    await actor.update(ready, work=work, finish=True, result=result)
            except ContractError as failure:
                await self._abandon(actor, work, failure)
                raise
            if start:
                await self._start(actor, work, also=ready, result=result)
        elif start:
            await self._start(actor, work, result=result)
        return result

    async def _prepare(
        self, actor: ContainerActor, work: Work, record: ContainerRecord
    ) -> Callable[[ContainerRecord], ContainerRecord]:
        """Everything a create makes. Gives the change of the record that tells of it."""
        services, spec, cid = self._services, record.spec, actor.cid
        lacking = unsupported_fields(spec, services.features)
        if lacking:
            raise Unsupported(f"this node cannot honour spec.{lacking[0]}", field=f"spec.{lacking[0]}")
        services.check_platform(spec)
        services.check_slots()
        services.check_image(spec.image.name)
        image = await services.images.pull(spec.image.name, spec.image.pull_policy, None)
        dirs = services.data.container(cid)
        port = await services.launcher.reserve_port(cid)
        policy = services.make_policy(spec, cid, record.status.instance, port)
        await services.in_thread(services.sweep_container, cid)
        await services.in_thread(dirs.make)
        await self._unless_overtaken(work, services.images.clone(image.digest, dirs.rootfs))
        await services.in_thread(services.write_container_files, dirs, record, policy)
        if work.overtaken_by is not None:
            raise Conflict(f"overtaken by a later {work.overtaken_by}")
        return lambda r: msgspec.structs.replace(
            r.with_status(
                message="ready",
                port=port,
                ip="127.0.0.1",
                network=policy.network.level,
                gpu=policy.gpu,
                image_digest=image.digest,
                memory_limit=policy.limits.memory_bytes,
            ),
            ready=True,
        )

    async def _unless_overtaken(self, work: Work, step: Awaitable[T]) -> T:
        """Await `step`; when the command is overtaken, let the step end and raise Conflict.

        A step is not cut off in the middle: a thread that still writes would outlive the tree's removal.
        """
        result = await step
        if work.overtaken_by is not None:
            raise Conflict(f"overtaken by a later {work.overtaken_by}")
        return result

    async def _abandon(self, actor: ContainerActor, work: Work, failure: ContractError) -> None:
        """A create that failed leaves nothing."""
        await self._clear(actor.cid)
        reason = Reason.STOPPED if work.overtaken_by is not None else Reason.CREATE_FAILED
        await actor.transition(
            Trigger.CREATE_FAILED,
            lambda r: r.with_status(reason=reason, message=failure.message, port=None, ip=None),
            work=work,
        )

    async def _clear(self, cid: str) -> None:
        """Give back the port and delete the directory of a container that is no more."""
        services = self._services
        try:
            await services.launcher.release_port(cid)
        except Unavailable as failure:
            # The guard died with the launcher.
            logger.debug("the port of {} was not released: {}", cid, failure.message)
        await services.in_thread(services.sweep_container, cid)

    # -- start

    def _beginning(self, record: ContainerRecord, work: Work) -> ContainerRecord:
        status = record.status
        return msgspec.structs.replace(
            record.with_status(
                state=next_state(status.state, Trigger.BEGIN),
                run=status.run + 1,
                exit_code=None,
                reason=None,
                message=None,
                pid=None,
                started_at=None,
                finished_at=None,
            ),
            started_by=work.id,
            intent=None,
            boot_id=self._services.boot_id,
        )

    async def _start(
        self,
        actor: ContainerActor,
        work: Work,
        *,
        also: Callable[[ContainerRecord], ContainerRecord] = lambda r: r,
        result: dict[str, Any] | None = None,
    ) -> None:
        if actor.state is State.STOPPING:
            await actor.wait_for(lambda: actor.state not in LIVE)
        if self._was_started(actor, work):
            return
        record = actor.record
        if record is None:
            raise NotFound(f"there is no container {actor.cid}", field="container")
        if record.status.state is State.RUNNING:
            return
        if record.status.state is not State.INITIALIZING:
            self._refuse_when_draining(work)
            await actor.transition(Trigger.BEGIN, lambda r: self._beginning(also(r), work), work=work)
        actor.set_phase(work, Phase.STARTING)
        record = actor.record
        assert record is not None
        run = record.status.run
        try:
            await self._launch(actor, work, record, result)
        except ContractError as failure:
            error = failure
            if work.overtaken_by is None:
                await actor.transition(
                    Trigger.START_FAILED,
                    lambda r: r.with_status(
                        reason=Reason.EXEC_FAILED, message=error.message, finished_at=now_utc()
                    ),
                    work=work,
                    only_if=lambda r: r.status.state is State.INITIALIZING and r.status.run == run,
                )
            raise

    def _was_started(self, actor: ContainerActor, work: Work) -> bool:
        """A dead worker had begun this start; adoption has found out what became of it."""
        record = actor.record
        if not work.recovered or record is None or record.started_by != work.id:
            return False
        if record.status.state is State.INITIALIZING:
            return False
        if record.status.state is State.FAILED:
            raise Interrupted(f"the worker died while {actor.cid} was starting: {record.status.message}")
        return True

    async def _launch(
        self, actor: ContainerActor, work: Work, record: ContainerRecord, result: dict[str, Any] | None
    ) -> None:
        services, status = self._services, record.status
        services.logs.attach(actor.cid, status.instance, services.data.container(actor.cid).state, status.run)
        request = self.start_request(record)
        if work.overtaken_by is not None:
            await self._cancel_start(actor, work, 0)
        started = await services.launcher.start(request)
        if work.overtaken_by is not None:
            exit_record = await services.launcher.kill_tree(actor.cid, status.instance, status.run)
            await services.launcher.forget(actor.cid, status.instance)
            await self._cancel_start(actor, work, exit_record.exit_code if exit_record else -signal.SIGKILL)
        moved = await actor.transition(
            Trigger.SPAWNED,
            lambda r: msgspec.structs.replace(
                r.with_status(pid=started.pid, started_at=from_unix_us(started.started_at_us)),
                shim_pid=started.shim_pid,
                shim_start=started.shim_start_time,
            ),
            work=work,
            only_if=lambda r: r.status.state is State.INITIALIZING and r.status.run == status.run,
            finish=True,
            result=result,
        )
        if not moved:
            raise StartFailed(f"{actor.cid} was lost while it started")
        early, actor.early_exit = actor.early_exit, None
        if early is not None:
            await self.apply_exit(actor, early)

    async def _cancel_start(self, actor: ContainerActor, work: Work, exit_code: int) -> None:
        reason = Reason.STOPPED if work.overtaken_by == "stop" else Reason.KILLED
        await actor.transition(
            Trigger.CANCEL,
            lambda r: self._cancelled(r, reason, exit_code),
            work=work,
            only_if=lambda r: r.status.state is State.INITIALIZING,
        )
        raise Conflict(f"overtaken by a later {work.overtaken_by}")

    def _cancelled(self, record: ContainerRecord, reason: Reason, exit_code: int = 0) -> ContainerRecord:
        return record.with_status(
            state=State.EXITED,
            exit_code=exit_code,
            reason=reason,
            message=None,
            finished_at=now_utc(),
        )

    def start_request(self, record: ContainerRecord) -> StartRequest:
        """What the launcher needs for a run of this container under the policy of now."""
        services, status, spec = self._services, record.status, record.spec
        policy = services.make_policy(spec, status.container, status.instance, status.port)
        plan = services.plan(policy)
        dirs = services.data.container(status.container)
        image = services.image_config(status.image_digest)
        environment = build_env(
            spec,
            config=services.config,
            node=services.node,
            cid=status.container,
            instance=status.instance,
            port=status.port,
            tmp=dirs.tmp,
            image=image,
            secrets=services.secrets,
            default_path=services.driver.default_path(),
        )
        command = resolve_command(
            spec,
            image,
            dirs.rootfs,
            environment["PATH"],
            volumes=policy.volumes,
            may_run=runnable(policy, services.driver.search_dirs()),
        )
        return StartRequest(
            cid=status.container,
            instance=status.instance,
            run=status.run,
            program=command.program,
            argv=command.argv,
            env=environment,
            cwd=command.cwd,
            plan=plan,
            state_dir=str(dirs.state),
            max_log_bytes=None if spec.logs is None else spec.logs.kept_bytes,
            max_rate=None if spec.logs is None else spec.logs.max_rate_bytes,
        )

    # -- stop, kill, restart, remove

    def _stop_signal(self, spec: ServiceSpec) -> int:
        return signal_number(spec.stop_signal or "SIGTERM")

    def _stop_timeout_s(self, spec: ServiceSpec, asked: float | None) -> float:
        if asked is not None:
            return asked
        return spec.stop_grace_s

    def _stopping(self, record: ContainerRecord) -> ContainerRecord:
        return msgspec.structs.replace(
            record.with_status(state=next_state(record.status.state, Trigger.STOP)), intent=Reason.STOPPED
        )

    async def _stop(self, actor: ContainerActor, work: Work, timeout_s: float | None) -> None:
        await actor.wait_for(lambda: actor.state is not State.INITIALIZING)
        if actor.state is State.PENDING:
            await actor.transition(
                Trigger.CANCEL, lambda r: self._cancelled(r, Reason.STOPPED), work=work, finish=True
            )
            return
        if actor.state is State.RUNNING:
            await actor.transition(
                Trigger.STOP, self._stopping, work=work, only_if=lambda r: r.status.state is State.RUNNING
            )
        if actor.state is State.STOPPING:
            actor.set_phase(work, Phase.STOPPING)
            await self._end_run(actor, timeout_s)

    async def _end_run(self, actor: ContainerActor, timeout_s: float | None) -> None:
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
                self._stop_signal(record.spec),
                self._stop_timeout_s(record.spec, timeout_s),
            )
        except (Unavailable, NotFound) as failure:
            # The launcher is gone, or its exit report is on the way: either changes the state.
            logger.info("{} ends without an answer to its stop: {}", actor.cid, failure.message)
        else:
            await self.apply_exit(actor, ended)
        await actor.wait_for(lambda: actor.state not in LIVE)

    async def _end_run_now(self, actor: ContainerActor) -> None:
        """SIGKILL for every process of the container, until none is left."""
        await actor.wait_for(lambda: actor.state is not State.INITIALIZING)
        record = actor.record
        if record is None or record.status.state not in LIVE:
            return
        status = record.status
        await self._intend(actor, Reason.KILLED)
        try:
            ended = await self._services.launcher.kill_tree(actor.cid, status.instance, status.run)
        except (Unavailable, NotFound) as failure:
            logger.info("{} ends without an answer to its kill: {}", actor.cid, failure.message)
        else:
            if ended is not None:
                await self.apply_exit(actor, ended)
        await actor.wait_for(lambda: actor.state not in LIVE)

    async def _intend(self, actor: ContainerActor, reason: Reason) -> None:
        if actor.record is not None and actor.record.intent is None:
            await actor.update(lambda r: msgspec.structs.replace(r, intent=reason), tell=False)

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
        await self._intend(actor, Reason.KILLED)
        try:
            await self._services.launcher.signal(actor.cid, record.status.instance, record.status.run, number)
        except NotFound as failure:
            raise Conflict(f"kill is not possible: {actor.cid} has just ended") from failure

    async def _restart(self, actor: ContainerActor, work: Work, command: Restart) -> None:
        self._refuse_when_draining(work)
        if not self._was_started(actor, work):
            await self._stop_for_restart(actor, work, command.timeout_s)
            if work.overtaken_by is not None:
                raise Conflict(f"overtaken by a later {work.overtaken_by}")
            await self._start(actor, work)

    async def _stop_for_restart(self, actor: ContainerActor, work: Work, timeout_s: float | None) -> None:
        if actor.state is State.RUNNING:
            await actor.transition(
                Trigger.STOP, self._stopping, work=work, only_if=lambda r: r.status.state is State.RUNNING
            )
        if actor.state is State.STOPPING:
            actor.set_phase(work, Phase.STOPPING)
            await self._end_run(actor, timeout_s)

    async def _remove(self, actor: ContainerActor, work: Work) -> None:
        if actor.record is None:
            return
        await self._end_run_now(actor)
        await self._teardown(actor, work, finish=True)

    async def _teardown(self, actor: ContainerActor, work: Work, *, finish: bool = False) -> None:
        """Everything of an ended container goes, but for log bytes that are still to be sent."""
        record = actor.record
        if record is None:
            return
        services, status = self._services, record.status
        await services.logs.spool(actor.cid, status.instance, services.data.container(actor.cid).state)
        await self._forget(actor.cid, status.instance)
        await self._clear(actor.cid)
        services.dropped(status.instance)
        await actor.transition(
            Trigger.REMOVE,
            lambda r: r.with_status(pid=None, port=None, ip=None, message=None),
            work=work,
            finish=finish,
        )

    async def _forget(self, cid: str, instance: str) -> None:
        try:
            await self._services.launcher.forget(cid, instance)
        except (Unavailable, NotFound) as failure:
            logger.debug("{} was forgotten already: {}", cid, failure.message)

    # -- what happens without a command

    async def apply_exit(self, actor: ContainerActor, ended: ExitRecord) -> None:
        """The program ended: tell it once, whoever brings the news, and let the launcher forget it."""
        record = actor.record
        if record is None or record.status.instance != ended.instance:
            await self._forget(ended.cid, ended.instance)
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
        await self._forget(ended.cid, ended.instance)
        if moved and record.spec.lifecycle.delete_on_exit:
            self._services.remove_later(actor)

    async def adopt_running(self, actor: ContainerActor, found: LaunchedContainer | None) -> None:
        """The worker died between the launcher's start and its own commit: the program does run (or did)."""
        await actor.transition(
            Trigger.SPAWNED,
            lambda r: msgspec.structs.replace(
                r.with_status(
                    pid=None if found is None else found.pid,
                    started_at=now_utc() if found is None else from_unix_us(found.started_at_us),
                ),
                shim_pid=None if found is None else found.shim_pid,
                shim_start=None if found is None else found.shim_start_time,
            ),
        )

    async def finish_stop(self, actor: ContainerActor) -> None:
        """Go on with a stop that a dead worker had begun."""
        await self._end_run(actor, None)

    async def lose(self, actor: ContainerActor, reason: Reason, message: str) -> None:
        """The outcome of the run cannot be known any more."""
        await actor.transition(
            Trigger.LOST,
            lambda r: r.with_status(reason=reason, message=message, finished_at=now_utc()),
            only_if=lambda r: r.status.state in LIVE,
        )

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
    return record.with_status(
        exit_code=ended.exit_code,
        reason=reason,
        message=None,
        pid=None,
        finished_at=from_unix_us(ended.finished_at_us),
    )


def from_unix_us(unix_us: int) -> datetime:
    """Microseconds since 1970 as a UTC time."""
    seconds, micros = divmod(unix_us, 1_000_000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=micros)
