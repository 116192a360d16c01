"""From `pending`, `exited` or `failed` to a program that runs under its sandbox."""

import asyncio
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from loguru import logger

from schemas.errors import ContractError
from schemas.spec import S3Storage
from schemas.status import ContainerStatus, Reason, State
from schemas.values import normal_target
from worker.container import ContainerActor
from worker.ending import Ender
from worker.entrypoint import build_env, resolve_command
from worker.errors import (
    Conflict,
    Interrupted,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from worker.lifecycle import LIVE, Trigger, next_state
from worker.owners import give_volumes
from worker.platform.base import ROOTED, ROOTED_TMP, SandboxPolicy
from worker.records import ContainerRecord, from_unix_us
from worker.services import Services
from worker.supervisor import LaunchedContainer, LauncherGone, StartRequest
from worker.volume_s3.mirrors import Wanted
from worker.volume_s3.source import source_of
from worker.volumes import empty_tmpfs, make_places
from worker.volumes_env import volume_variables
from worker.work import STARTS, Phase, PreparedStart, Work, now_utc


class Starter:
    """Starts runs. `ender` is told of a program that ended before its start was told."""

    def __init__(self, services: Services, ender: Ender) -> None:
        self._services = services
        self._ender = ender

    def beginning(self, record: ContainerRecord, work: Work) -> ContainerRecord:
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

    async def start(
        self,
        actor: ContainerActor,
        work: Work,
        *,
        also: Callable[[ContainerRecord], ContainerRecord] = lambda r: r,
        result: dict[str, Any] | None = None,
        policy: SandboxPolicy | None = None,
    ) -> None:
        """`policy` is the sandbox when it was made by this very command, else it is made of what holds now."""
        if actor.state is State.STOPPING:
            await actor.wait_for(lambda: actor.state not in LIVE)
        if self.was_started(actor, work):
            return
        record = actor.record
        if record is None:
            raise NotFound(f"there is no container {actor.cid}", field="container")
        if record.status.state is State.RUNNING:
            return
        if record.status.state is not State.INITIALIZING:
            refuse_when_draining(self._services, work)
            refuse_when_full(self._services)
            self.foresee(work, self.beginning(also(record), work), policy)
            await actor.transition(Trigger.BEGIN, lambda r: self.beginning(also(r), work), work=work)
        actor.set_phase(work, Phase.STARTING)
        record = actor.record
        assert record is not None
        run = record.status.run
        try:
            await self._launch(actor, work, record, result, policy)
        except BaseException as failure:
            self._services.mirrors.ended(record.status.instance)
            if not isinstance(failure, ContractError):
                raise
            error = failure
            if isinstance(failure, Unavailable) and await self._was_lost(actor, record.status, failure):
                raise Interrupted(f"the launcher died while {actor.cid} was starting") from failure
            if work.overtaken_by is not None and actor.state is State.INITIALIZING:
                await self._cancel_start(actor, work, 0)  # it failed by itself before it noticed
            await actor.transition(
                Trigger.START_FAILED,
                lambda r: r.with_status(
                    reason=Reason.EXEC_FAILED, message=error.message, finished_at=now_utc()
                ),
                work=work,
                only_if=lambda r: r.status.state is State.INITIALIZING and r.status.run == run,
                finish=True,
                error=error,
            )
            raise

    async def _was_lost(self, actor: ContainerActor, status: ContainerStatus, failure: Unavailable) -> bool:
        """After a start whose outcome is not known. True when the launcher has died, which is told by whoever looks
        after that; else nothing of the run is alive, and none of it will be, however late the launcher comes to it.
        """
        while not isinstance(failure, LauncherGone):
            try:
                await self._services.launcher.kill_tree(actor.cid, status.instance, status.run)
            except NotFound:
                return False
            except Unavailable as again:
                failure = again
            else:
                await self._ender.forget(actor.cid, status.instance)
                return False
        await actor.wait_for(lambda: actor.state is not State.INITIALIZING)
        return True

    def foresee(self, work: Work, record: ContainerRecord, policy: SandboxPolicy | None = None) -> None:
        """Soon, while the journal writes the beginning of this run, make what the launcher will be asked for.

        What cannot be made now is made when its turn has come, and fails then.
        """
        asyncio.get_running_loop().call_soon(self._prepare, work, record, policy)

    def _prepare(self, work: Work, record: ContainerRecord, policy: SandboxPolicy | None) -> None:
        if any(isinstance(item, S3Storage) for item in record.spec.storage):
            return  # their folders change first
        try:
            policy = policy or self._services.policy_of(record)
            request = self.start_request(record, policy, {})
        except (ContractError, OSError) as failure:
            logger.debug("{} of {} is not prepared: {}", work.verb, record.status.container, failure)
            return
        work.prepared = PreparedStart(record.status.instance, record.status.run, policy, request)

    def was_started(self, actor: ContainerActor, work: Work) -> bool:
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
        self,
        actor: ContainerActor,
        work: Work,
        record: ContainerRecord,
        result: dict[str, Any] | None,
        policy: SandboxPolicy | None,
    ) -> None:
        services, status = self._services, record.status
        prepared, work.prepared = work.prepared, None
        if prepared is not None and (prepared.instance, prepared.run) != (status.instance, status.run):
            prepared = None
        if policy is None:
            policy = services.policy_of(record) if prepared is None else prepared.policy
        await self._fetch(actor, work, record, policy)
        if policy.isolation == ROOTED and len(policy.volumes) > 1:
            await services.in_thread(make_places, policy.volumes)
        dirs = services.data.container(actor.cid)
        told = services.host_api.begin(status, dirs, rooted=policy.isolation == ROOTED)
        if prepared is not None and not told:
            request = prepared.request
        else:
            request = self.start_request(record, policy, told)
        scratch = [volume for volume in policy.volumes if volume.kind == "tmpfs"]
        if scratch:
            await services.in_thread(empty_tmpfs, scratch, services.driver.folder_limits)
            if policy.user is not None:
                await services.in_thread(give_volumes, scratch, policy.user)
        if work.overtaken_by is not None:
            await self._cancel_start(actor, work, 0)
        starting = asyncio.create_task(services.launcher.start(request), name=f"launch {actor.cid}")
        try:
            await asyncio.sleep(0)  # the request is on its way; its log is looked for meanwhile
            state_dir = services.data.container(actor.cid).state
            services.logs.attach(actor.cid, status.instance, state_dir, status.run)
            started = await starting
        except BaseException:
            starting.cancel()
            raise
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
            # The launcher before this one died on the way, and the run is told as lost: it may not go on.
            with suppress(NotFound, Unavailable):
                await services.launcher.kill_tree(actor.cid, status.instance, status.run)
            await self._ender.forget(actor.cid, status.instance)
            raise Interrupted(f"the launcher died while {actor.cid} was starting")
        early, actor.early_exit = actor.early_exit, None
        if early is not None:
            await self._ender.apply_exit(actor, early)

    async def _fetch(
        self, actor: ContainerActor, work: Work, record: ContainerRecord, policy: SandboxPolicy
    ) -> None:
        """Bring the s3 volumes up to date; the status tells while that takes. Raises StartFailed, ResourceExhausted,
        and Conflict when a stop or remove does not wait for it."""
        wanted = [
            Wanted(index, f"/{normal_target(item.target)}", source_of(item, field=f"spec.storage[{index}]"))
            for index, item in enumerate(record.spec.storage)
            if isinstance(item, S3Storage)
        ]
        if not wanted:
            return

        async def say(text: str | None) -> None:
            await actor.update(lambda r: r.with_status(message=text), work=work)

        owner = None if policy.user is None else (policy.user.uid, policy.user.gid)
        await self._services.mirrors.fetch(
            actor.cid, record.status.instance, wanted, work.overtaken, say, owner=owner
        )
        if work.overtaken_by is not None:
            await self._cancel_start(actor, work, 0)
        await actor.update(lambda r: r.with_status(message=None), tell=False)

    async def _cancel_start(self, actor: ContainerActor, work: Work, exit_code: int) -> None:
        reason = Reason.STOPPED if work.overtaken_by == "stop" else Reason.KILLED
        error = Conflict(f"overtaken by a later {work.overtaken_by}")
        moved = await actor.transition(
            Trigger.CANCEL,
            lambda r: self.cancelled(r, reason, exit_code),
            work=work,
            only_if=lambda r: r.status.state is State.INITIALIZING,
            finish=True,
            error=error,
        )
        if moved and actor.record is not None and actor.record.spec.lifecycle.delete_on_exit:
            self._services.remove_later(actor.cid)
        raise error

    def cancelled(self, record: ContainerRecord, reason: Reason, exit_code: int = 0) -> ContainerRecord:
        return record.with_status(
            state=State.EXITED,
            exit_code=exit_code,
            reason=reason,
            message=None,
            finished_at=now_utc(),
        )

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

    def start_request(
        self, record: ContainerRecord, policy: SandboxPolicy, told: Mapping[str, str] | None = None
    ) -> StartRequest:
        """What the launcher needs for a run of this container under `policy`.

        `told` are the variables of the host API that this run began with; without them it gets new ones.
        """
        services, status, spec = self._services, record.status, record.spec
        rooted = policy.isolation == ROOTED
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
            tmp=Path(ROOTED_TMP) if rooted else dirs.tmp,
            image=image,
            secrets=services.secrets,
            default_path=services.driver.default_path(),
            host_api=services.host_api.variables(status, dirs, rooted=rooted) if told is None else told,
            volumes=volume_variables(policy.volumes, rooted=rooted),
        )
        command = resolve_command(
            spec,
            image,
            dirs.rootfs,
            environment["PATH"],
            volumes=policy.volumes,
            may_run=services.may_run(policy),
            rooted=rooted,
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


def refuse_when_draining(services: Services, work: Work) -> None:
    """Raises Unavailable for new work on a draining node; what a dead worker had begun goes on."""
    if services.draining and not work.recovered and work.verb in STARTS:
        raise Unavailable("this node is draining and takes no new work; `resume` ends that")


def refuse_when_full(services: Services) -> None:
    """Raises ResourceExhausted when the operator has bounded how many containers run, and so many do."""
    slots = services.config.node.slots
    if slots is not None and services.live_count() >= slots:
        raise ResourceExhausted(f"all {slots} slots of this node are taken (node.slots)")
