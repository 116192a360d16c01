"""Commands of the node itself: images, in stream order but for pulls and pushes side by side, drain and resume."""

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from loguru import logger

from schemas.commands import (
    CreateVolume,
    Drain,
    LoadImage,
    PruneImages,
    PullImage,
    PushImage,
    RegisterImage,
    RemoveImage,
    RemoveVolume,
    Resume,
    Stop,
    TagImage,
    VerifyImages,
)
from schemas.errors import ContractError, Unsupported
from schemas.events import ImageAction, NodeChanged
from schemas.node import NodeInfo, NodeState
from worker.errors import Conflict, DeadlineExceeded, unforeseen
from worker.ids import new_ulid
from worker.image_upkeep import evict, prune, verify, write_pruned
from worker.images.store import ImageInfo
from worker.images.transfers import load_result, push_result
from worker.journal import EventHead, Tx
from worker.lifecycle import LIVE
from worker.runtime import Runtime
from worker.services import Services
from worker.volumes_commands import VolumeCommands
from worker.waiting import Waiting
from worker.work import Work, now_utc, write_completion, write_image

DRAINING_KEY = "draining"

Write = Callable[[Tx], None]


class NodeCommands:
    """Owner of the node's own queue and of its draining."""

    def __init__(
        self,
        services: Services,
        runtime: Runtime,
        *,
        info: Callable[[NodeState], NodeInfo],
        spawn: Callable[[Coroutine[Any, Any, None], str], object],
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._services = services
        self._runtime = runtime
        self._info = info
        self._spawn = spawn
        self._state_changed = changed
        # Of each image command that has not ended: when it does, and whether it is a pull.
        self._images: dict[asyncio.Event, bool] = {}
        self._waiting = Waiting(runtime.waiting)
        self._resumed = asyncio.Event()
        self._volumes = VolumeCommands(services, runtime)

    def refusal(self, work: Work) -> str | None:
        """Why `work` is to be refused at once though accepted: so much is in hand already."""
        return self._waiting.refusal(work)

    def accepted(self, work: Work) -> None:
        """The command stands in the journal; do it in its turn. A resume does not wait for a drain."""
        self._waiting.add(work)
        if isinstance(work.command, Drain):
            self._spawn(self._finish(work, self._drain(work, work.command)), "drain")
        elif isinstance(work.command, Resume):
            self._spawn(self._finish(work, self._resume(work)), "resume")
        elif isinstance(work.command, VerifyImages):
            # Reads for long and changes no name: nobody waits for it.
            self._spawn(self._finish(work, self._verify(work, work.command)), "verify images")
        elif isinstance(work.command, CreateVolume | RemoveVolume):
            self._spawn(self._finish(work, self._volume(work, work.command)), f"volumes {work.verb}")
        else:
            pull = isinstance(work.command, PullImage | PushImage)
            before = [ended for ended, is_pull in self._images.items() if not (pull and is_pull)]
            ended = asyncio.Event()
            self._images[ended] = pull
            self._spawn(self._in_turn(work, before, ended), f"images {work.verb}")

    async def _in_turn(self, work: Work, before: list[asyncio.Event], ended: asyncio.Event) -> None:
        """A pull or push waits for all before it but others of these, which may take their time; the rest for all."""
        try:
            for earlier in before:
                await earlier.wait()
            await self._finish(work, self._image(work))
        finally:
            del self._images[ended]
            ended.set()

    async def _finish(self, work: Work, doing: Coroutine[Any, Any, None]) -> None:
        error: ContractError
        try:
            if not work.recovered and work.is_late(now_utc()):
                doing.close()
                raise DeadlineExceeded(
                    f"the deadline {work.deadline.isoformat()} passed before {work.verb} began"
                )
            await doing
            return
        except ContractError as failure:
            error = failure
        except Exception as failure:
            logger.exception("{} failed", work.verb)
            error = unforeseen(work.verb, failure)
        finally:
            self._waiting.remove(work)
        await self._services.journal.transact(
            lambda tx: write_completion(tx, self._services.subjects, work, error=error, status=None)
        )

    async def _complete(self, work: Work, result: dict[str, Any] | None, *also: Write) -> None:
        def write(tx: Tx) -> None:
            for part in also:
                part(tx)
            write_completion(tx, self._services.subjects, work, error=None, status=None, result=result)

        await self._services.journal.transact(write)

    async def _volume(self, work: Work, command: CreateVolume | RemoveVolume) -> None:
        result = await self._volumes.perform(command, recovered=work.recovered)
        await self._complete(work, result)

    # -- images

    async def _verify(self, work: Work, command: VerifyImages) -> None:
        await self._complete(work, await verify(self._services, command, work))

    async def _image(self, work: Work) -> None:
        images, command = self._services.images, work.command
        if isinstance(command, PullImage):
            self._services.check_image(command.image, field="image")
            pulled = await self._services.puller.pull(command.image, command.policy, command.auth)
            result: dict[str, Any] = {"digest": pulled.image.digest}
            if pulled.warnings:
                result["warnings"] = list(pulled.warnings)
            await self._complete(work, result, self._changed(work, pulled.image, ImageAction.PULLED))
            await evict(self._services, spare=pulled.image.digest)
        elif isinstance(command, RegisterImage):
            source = self._services.register_source(command.source_dir)
            made = await images.register(command.image, source)
            await self._complete(
                work, {"digest": made.digest}, self._changed(work, made, ImageAction.REGISTERED)
            )
            await evict(self._services, spare=made.digest)
        elif isinstance(command, LoadImage):
            await self._load(work, command)
        elif isinstance(command, PushImage):
            self._services.check_image(command.image, field="image")
            pushed = await self._services.transfers.push(command.image, command.target, command.auth)
            await self._complete(work, push_result(pushed))
        elif isinstance(command, TagImage):
            tagged = await images.tag(command.source, command.target)
            await self._complete(
                work, {"digest": tagged.digest}, self._changed(work, tagged, ImageAction.TAGGED)
            )
        elif isinstance(command, RemoveImage):
            gone = await images.remove(command.image, force=command.force)
            await self._complete(
                work, {"digest": gone.digest}, self._changed(work, gone, ImageAction.REMOVED)
            )
        elif isinstance(command, PruneImages):
            result, pruned = await prune(self._services, command)
            await self._complete(work, result, lambda tx: write_pruned(tx, self._services, work, pruned))
        else:
            raise Unsupported(f"{work.verb} is not a verb of this node", field="type")

    async def _load(self, work: Work, command: LoadImage) -> None:
        source = self._services.archive_source(command.source_file)
        loaded = await self._services.transfers.load(
            source, command.image, lambda name: self._services.check_image(name, field="image")
        )
        changed = [self._changed(work, image, ImageAction.LOADED) for image in loaded.images]
        await self._complete(work, load_result(loaded), *changed)
        await evict(self._services, spare=loaded.images[-1].digest)

    def _changed(self, work: Work, image: ImageInfo, action: ImageAction) -> Write:
        return lambda tx: write_image(tx, self._services.subjects, work, image, action)

    # -- drain and resume

    def write_node(self, tx: Tx, state: NodeState, work: Work | None = None) -> None:
        """Write a `node_changed`."""
        info = self._info(state)

        def make(head: EventHead) -> NodeChanged:
            return NodeChanged(
                node=head.node,
                epoch=head.epoch,
                boot=head.boot,
                seq=head.seq,
                time=head.time,
                command_id=None if work is None else work.id,
                state=state,
                info=info,
            )

        tx.event(
            self._services.subjects.node_event(tx.node), make, headers=None if work is None else work.headers
        )

    async def _drain(self, work: Work, command: Drain) -> None:
        services = self._services
        services.draining = True
        self._resumed.clear()

        def begin(tx: Tx) -> None:
            tx.put_meta(DRAINING_KEY, True)
            self.write_node(tx, NodeState.DRAINING, work)

        await services.journal.transact(begin)
        self._state_changed()
        if command.stop_containers:
            for actor in self._runtime.containers():
                if actor.state in LIVE:
                    self._runtime.submit_internal(actor, Stop(id=f"drain-{new_ulid()}"), "stop")
        waiting = asyncio.create_task(self._runtime.drained())
        resumed = asyncio.create_task(self._resumed.wait())
        try:
            await asyncio.wait(
                {waiting, resumed}, timeout=command.timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            done = waiting.done()
            for task in (waiting, resumed):
                task.cancel()
            await asyncio.gather(waiting, resumed, return_exceptions=True)
        if self._resumed.is_set():
            raise Conflict("overtaken by a later resume")
        if not done:
            left = self._runtime.live_count()
            raise DeadlineExceeded(f"{left} containers still run; the node stays draining")
        await self._complete(work, None, partial(self.write_node, state=NodeState.DRAINED, work=work))
        self._state_changed()

    async def _resume(self, work: Work) -> None:
        self._services.draining = False
        self._resumed.set()

        def ready(tx: Tx) -> None:
            tx.put_meta(DRAINING_KEY, False)
            self.write_node(tx, NodeState.READY, work)

        await self._complete(work, None, ready)
        self._state_changed()
