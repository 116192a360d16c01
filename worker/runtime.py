"""All containers of the node: their actors, adoption at start, the launcher's news, draining."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from typing import Any

import msgspec
from loguru import logger

from schemas.commands import ContainerCommand, Remove
from schemas.node import NodeState
from schemas.status import ContainerStatus, Reason, State
from worker.container import ContainerActor
from worker.datadir import ContainerDirs
from worker.errors import NotFound, Unavailable
from worker.expiry import Expiry
from worker.ids import new_ulid
from worker.journal import Tx
from worker.lifecycle import LIVE
from worker.operations import ContainerOperations
from worker.owners import let_pass
from worker.reconcile import Fate, Finding, launcher_died, reconcile, tells_all
from worker.records import ContainerRecord, decode_record
from worker.services import Services
from worker.stats import Target
from worker.supervisor import ExitRecord, LaunchedContainer
from worker.volume_s3.mirrors import SAYS
from worker.waiting import NodeWaiting, Waiting
from worker.work import Work, now_utc

# States whose message is about something else.
UNTOLD = (State.PENDING, State.INITIALIZING)
DEATH_TIMEOUT_S = 3.0
LEFTOVERS_TIMEOUT_S = 10.0
DEATH_POLL_S = 0.02


class Runtime:
    """Owner of the actors and of every task that works on a container."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self.operations = ContainerOperations(services)
        self.ender = self.operations.ender
        self.starter = self.operations.starter
        self.waiting = NodeWaiting()
        self._actors: dict[str, ContainerActor] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._running: set[asyncio.Task[Any]] = set()
        self._strangers: list[LaunchedContainer] = []
        self._leaving: list[str] | None = []  # None once each may leave when its time has come
        self._expiry = Expiry(self._expire)
        services.on_record = self._expiry.watch
        services.remove_later = self._remove_later
        services.container_count = lambda: sum(1 for a in self._actors.values() if a.record is not None)
        services.live_count = self.live_count

    @asynccontextmanager
    async def open(self) -> AsyncIterator["Runtime"]:
        """Own the tasks of all actors; leaving it cancels what still works (the ledger knows of it)."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            try:
                yield self
            finally:
                self._tasks = None
                self._expiry.close()
                for task in self._running:
                    task.cancel()

    def spawn(self, work: Coroutine[Any, Any, object], name: str) -> None:
        if self._tasks is None:
            work.close()
            return
        task = self._tasks.create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    # -- actors

    def actor(self, cid: str) -> ContainerActor:
        """The actor of a name, made when it is first spoken of."""
        found = self._actors.get(cid)
        if found is None:
            found = self._actors[cid] = self._make(cid, None)
        return found

    def _make(self, cid: str, record: ContainerRecord | None) -> ContainerActor:
        return ContainerActor(
            cid,
            self.services,
            operations=self.operations,
            spawn=self.spawn,
            waiting=Waiting(self.waiting),
            on_idle=self.settle,
            record=record,
        )

    def known(self, cid: str) -> ContainerActor:
        """The actor of an existing container. Raises NotFound."""
        found = self._actors.get(cid)
        if found is None or found.record is None:
            raise NotFound(f"there is no container {cid}", field="container")
        return found

    def settle(self, actor: ContainerActor) -> None:
        """Forget an actor whose container is gone and that has nothing to do."""
        if actor.record is None and actor.idle and self._actors.get(actor.cid) is actor:
            del self._actors[actor.cid]

    def containers(self) -> list[ContainerActor]:
        """Actors of existing containers, by name."""
        return sorted((a for a in self._actors.values() if a.record is not None), key=lambda a: a.cid)

    def statuses(self) -> list[ContainerStatus]:
        return [a.status for a in self.containers()]

    def status(self, cid: str) -> ContainerStatus | None:
        """None when there is no such container."""
        actor = self._actors.get(cid)
        return None if actor is None or actor.record is None else actor.record.status

    def live(self) -> list[ContainerStatus]:
        """Of everything that starts, runs or stops."""
        return [a.status for a in self._actors.values() if a.state in LIVE]

    def live_count(self) -> int:
        return sum(1 for a in self._actors.values() if a.state in LIVE)

    def busy(self) -> bool:
        """Whether any container has a command under way."""
        return any(not actor.idle for actor in self._actors.values())

    def targets(self) -> list[Target]:
        """Everything that runs, for the sampler."""
        places = self.services.data.container
        found = (target_of(a.record, places(a.cid)) for a in self._actors.values() if a.record is not None)
        return [target for target in found if target is not None]

    def submit_internal(self, actor: ContainerActor, command: ContainerCommand, verb: str) -> None:
        """A command of our own, which no ledger knows, in the container's own queue."""
        work = Work(command=command, verb=verb, container=actor.cid, seq=0, time=now_utc(), internal=True)
        actor.accepted(work, None)

    def _remove_later(self, cid: str) -> None:
        """`delete_on_exit`: a remove of our own, in the container's own queue."""
        if self._leaving is not None:
            self._leaving.append(cid)
            return
        actor = self._actors.get(cid)
        record = None if actor is None else actor.record
        if actor is None or record is None:
            return
        command = Remove(id=f"auto-{new_ulid()}", if_instance=record.status.instance)
        self.submit_internal(actor, command, "remove")

    def _expire(self, cid: str, instance: str) -> bool:
        """`ttl_after_finished_s` is over. False while the container has something to do: it may be started."""
        actor = self._actors.get(cid)
        if actor is None:
            return True
        if not actor.idle:
            return False
        # Without force: a container that was started after all is spared.
        command = Remove(id=f"ttl-{new_ulid()}", if_instance=instance, force=False)
        self.submit_internal(actor, command, "remove")
        return True

    async def say(self, cid: str, instance: str, text: str | None) -> None:
        """What an s3 volume has to tell in its container's status; None takes back what it told."""
        actor = self._actors.get(cid)
        record = None if actor is None else actor.record
        if actor is None or record is None or record.status.instance != instance:
            return
        ours = record.status.message is None or record.status.message.startswith(SAYS)
        if ours and record.status.message != text and record.status.state not in UNTOLD:
            await actor.update(lambda r: r.with_status(message=text))

    # -- the launcher's news

    def on_exit(self, ended: ExitRecord) -> None:
        actor = self._actors.get(ended.cid)
        if actor is None:
            self.spawn(self.ender.forget(ended.cid, ended.instance), f"forget {ended.cid}")
        else:
            self.spawn(self.ender.apply_exit(actor, ended), f"exit {ended.cid}")

    def on_memory_limit(self, cid: str, used_bytes: int) -> None:
        actor = self._actors.get(cid)
        if actor is not None:
            self.spawn(self.ender.over_memory(actor, used_bytes), f"memory {cid}")

    # -- adoption

    async def adopt(self) -> int:
        """Bring the journal and the launcher together. Gives the number of containers found running.

        What the launcher runs and the journal does not know is left alone until `end_strangers`: the journal may
        be an old copy, and this worker about to be fenced.
        """
        records = await self.services.journal.read(_records)
        launched = {c.cid: c for c in await self._launched()}
        for record in records:
            status = record.status
            actor = self._actors[status.container] = self._make(status.container, record)
            found = launched.pop(status.container, None)
            self._expiry.watch(actor.cid, record)
            if status.image_digest is not None:
                self.services.images.keep_for(actor.cid, status.image_digest)
            await self._reconcile(actor, record, found)
        self._strangers += launched.values()
        if any(record.user is not None for record in records):
            await self.services.in_thread(let_pass, self.services.data)
        return self.live_count()

    async def end_strangers(self) -> None:
        """End the process trees that the journal knows nothing of, and delete what belongs to nobody: left by a
        worker whose journal is gone. Only for the one owner of the node's name, before it begins anything.
        """
        strangers, self._strangers = self._strangers, []
        for stranger in strangers:
            await self._kill_stranger(stranger)
            actor = self._actors.get(stranger.cid)
            if actor is not None and actor.record is not None:
                await self._guard_port(actor.record.status)
        known = {status.container for status in self.statuses()}
        await self.services.in_thread(self.services.sweep_strangers, known)

    def let_leave(self) -> None:
        """From now on what has ended may be removed. What a dead worker had begun stands in the queues by now: a run
        whose container was removed before would be done a second time.
        """
        leaving, self._leaving = self._leaving, None
        for cid in leaving or ():
            self._remove_later(cid)
        self._expiry.begin()

    async def _launched(self) -> list[LaunchedContainer]:
        """What the launcher has. One that dies just now has nothing, and another takes its place."""
        try:
            return await self.services.launcher.containers()
        except Unavailable:
            if self.services.attach_launcher is None:
                raise
        await self.services.attach_launcher()
        return await self.services.launcher.containers()

    async def _reconcile(
        self, actor: ContainerActor, record: ContainerRecord, found: LaunchedContainer | None
    ) -> None:
        services, status = self.services, record.status
        state_dir = services.data.container(actor.cid).state
        if status.run > 0:
            services.logs.attach(actor.cid, status.instance, state_dir, status.run)
        asked = status.state in LIVE and not tells_all(found, status)
        recorded = services.read_exit(state_dir, status) if asked else None
        finding = reconcile(record, found, recorded, services.boot_id)
        if finding.stranger and found is not None:
            self._strangers.append(found)
        if finding.forget:
            await self.ender.forget(actor.cid, status.instance)
        if finding.leaves:
            self._remove_later(actor.cid)
        if finding.began:
            await self.starter.adopt_running(actor, None if finding.fate is Fate.ENDED else found)
            early, actor.early_exit = actor.early_exit, None
            if early is not None:  # it ended while that was written
                await self.ender.apply_exit(actor, early)
        if finding.fate is Fate.STOPS:
            self.spawn(self.ender.end_run(actor, None), f"stop {actor.cid}")
        await self._settle_fate(actor, finding)
        if finding.fate not in (Fate.RUNS, Fate.STOPS):  # a launcher that runs it holds its port
            await self._guard_port(status)

    async def _settle_fate(self, actor: ContainerActor, finding: Finding) -> None:
        """Write down how a run ended that is over."""
        if finding.exit is not None:
            await self.ender.apply_exit(actor, finding.exit)
        elif finding.reason is not None and finding.message is not None:
            await self._lose(actor, finding.reason, finding.message)

    async def _guard_port(self, status: ContainerStatus) -> None:
        if status.port is None:
            return
        try:
            await self.services.launcher.reserve_port(status.container, port=status.port)
        except Unavailable as failure:
            logger.warning("port {} of {} is not guarded: {}", status.port, status.container, failure.message)

    async def _kill_stranger(self, stranger: LaunchedContainer) -> None:
        logger.warning("ending {} ({}), which this journal does not know", stranger.cid, stranger.instance)
        try:
            if stranger.exit is None:
                await self.services.launcher.kill_tree(stranger.cid, stranger.instance, stranger.run)
        except (NotFound, Unavailable) as failure:
            logger.warning("{} could not be ended: {}", stranger.cid, failure.message)
        await self.ender.forget(stranger.cid, stranger.instance)

    async def _lose(self, actor: ContainerActor, reason: Reason, message: str) -> None:
        """Report a run whose outcome is unknown, after no process of it is left."""
        record = actor.record
        if record is None or record.status.state not in LIVE:
            return
        if record.boot_id == self.services.boot_id:
            await self._await_death(record)
            await self._end_leftovers(actor.cid, record.status.instance)
        now = None if actor.record is None else actor.record.status
        same = now is not None and (now.instance, now.run) == (record.status.instance, record.status.run)
        if now is None or now.state not in LIVE or not same:
            return  # a start that was overtaken has told of its end meanwhile
        self.services.incomplete_logs(actor.cid, record.status.instance, record.status.run)
        await self.ender.lose(actor, reason, message)
        if record.spec.lifecycle.delete_on_exit:
            self._remove_later(actor.cid)

    async def _await_death(self, record: ContainerRecord) -> None:
        """The shim kills its tree when the launcher is gone; wait until it has, and help if it does not."""
        if record.shim_pid is None or record.shim_start is None:
            return
        loop = asyncio.get_running_loop()
        deadline = loop.time() + DEATH_TIMEOUT_S
        while self.services.driver.processes().alive(record.shim_pid, record.shim_start):
            if loop.time() > deadline:
                logger.error("the tree of {} outlives its launcher; killing it", record.status.container)
                for pid in self.services.driver.processes().members(record.shim_pid):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                deadline = loop.time() + DEATH_TIMEOUT_S
            await asyncio.sleep(DEATH_POLL_S)

    async def _end_leftovers(self, cid: str, instance: str) -> None:
        """Launcher and shim may have been killed at one stroke, with nobody left to end the rest."""
        services = self.services
        marker = services.data.container(cid).marker(instance)
        if not await services.in_thread(services.driver.end_leftovers, marker, LEFTOVERS_TIMEOUT_S):
            logger.error("processes of {} outlive their launcher and cannot be ended", cid)

    async def launcher_lost(self) -> None:
        """The launcher died and its containers with it: report each, then go on with a new launcher."""
        logger.error("the launcher died; its containers are lost")
        if self.services.attach_launcher is not None:
            await self.services.attach_launcher()
        for actor in self.containers():
            record = actor.record
            if record is None:
                continue
            state_dir = self.services.data.container(actor.cid).state
            recorded = self.services.read_exit(state_dir, record.status)
            await self._settle_fate(actor, launcher_died(record, recorded))
            if actor.record is not None:
                self.spawn(self._guard_at_rest(actor), f"port {actor.cid}")

    async def _guard_at_rest(self, actor: ContainerActor) -> None:
        """Hold a container's port in a new launcher: after a create or a remove that is under way, of which one has a
        port of the launcher that died, and the other may have given its own back already."""
        await actor.wait_for(lambda: actor.idle or actor.record is None)
        if actor.record is not None:
            await self._guard_port(actor.record.status)

    # -- waiting, draining, repeating

    async def wait(self, cid: str, until_final: bool, timeout_s: float) -> ContainerStatus:
        """The status once the container has ended (a removed one's last). Raises TimeoutError, NotFound."""
        actor = self.known(cid)
        last = actor.status
        instance = last.instance

        def ended() -> bool:
            nonlocal last
            record = actor.record
            if record is None or record.status.instance != instance:
                last = _removed(last)
                return True
            last = record.status
            return last.state not in LIVE and last.state is not State.PENDING

        async with asyncio.timeout(timeout_s):
            await actor.wait_for(ended)
        return last

    async def drained(self) -> None:
        """Wait until no container runs."""
        while live := [a for a in self._actors.values() if a.state in LIVE or not a.idle]:
            actor = live[0]
            await actor.wait_for(lambda a=actor: a.state not in LIVE and a.idle)  # type: ignore[misc]

    async def repeat(self, due: Callable[[ContainerRecord, datetime | None], bool]) -> int:
        """Publish the status of every container again for which `due` says so."""
        wanted = [a for a in self.containers() if a.record is not None and due(a.record, a.told_at)]
        await asyncio.gather(*(actor.update(lambda r: r, repeat=True) for actor in wanted))
        return len(wanted)

    def node_state(self) -> NodeState:
        if not self.services.draining:
            return NodeState.READY
        return NodeState.DRAINING if self.live_count() else NodeState.DRAINED


def target_of(record: ContainerRecord, dirs: ContainerDirs | None = None) -> Target | None:
    """What to measure for a container that runs; None for one that does not. `dirs` are its places."""
    status = record.status
    if status.state not in (State.RUNNING, State.STOPPING):
        return None
    if record.shim_pid is None or record.shim_start is None:
        return None
    return Target(
        container=status.container,
        instance=status.instance,
        run=status.run,
        shim_pid=record.shim_pid,
        shim_start=record.shim_start,
        memory_limit=status.memory_limit,
        marker="" if dirs is None else dirs.marker(status.instance),
    )


def _removed(status: ContainerStatus) -> ContainerStatus:
    return msgspec.structs.replace(status, state=State.REMOVED, pid=None)


def _records(tx: Tx) -> list[ContainerRecord]:
    return [decode_record(raw) for _, raw in tx.containers()]
