"""The node's verbs of volumes, and what the query `volumes` tells."""

import asyncio
from collections import defaultdict
from typing import Any

from schemas.commands import CreateVolume, RemoveVolume
from schemas.queries import VolumeEntry, VolumeState
from schemas.spec import NamedStorage
from schemas.values import parse_memory
from worker.errors import Conflict, Internal, NotFound
from worker.images.trees import remove_tree
from worker.platform.treecopy import printable
from worker.runtime import Runtime
from worker.services import Services
from worker.volume_s3.mirror import Mirror
from worker.volumes_named import Named, Usage, about_named, create_named, list_named, take_away, usage

# For all volumes of one answer together.
MEASURE_S = 3.0
SHORT_NOTES = 3


class VolumeCommands:
    def __init__(self, services: Services, runtime: Runtime) -> None:
        self._services = services
        self._runtime = runtime
        self._turn = asyncio.Lock()

    async def perform(
        self, command: CreateVolume | RemoveVolume, *, recovered: bool
    ) -> dict[str, Any] | None:
        """One after the other, in the order they came. Gives the completion's `result`.

        `recovered`: a dead worker may have done it. Raises NotFound, Conflict, CreateFailed, ResourceExhausted.
        """
        async with self._turn:
            if isinstance(command, CreateVolume):
                size = None if command.size is None else parse_memory(command.size, field="size")
                services = self._services
                made = await services.in_thread(
                    create_named, services.data.volumes, command.name, size, services.driver.folder_limits
                )
                return {"name": command.name, "created": made}
            try:
                await self._remove(command)
            except NotFound:
                if not recovered:
                    raise
            return None

    async def _remove(self, command: RemoveVolume) -> None:
        services, name = self._services, command.name
        if services.mirrors.has(name):
            await services.mirrors.discard(name, force=command.force)
            return
        about_named(services.data.volumes, name)
        # From here to the renaming nothing else happens: no container can be made of it in between.
        if users := self.users().get(name):
            raise Conflict(f"{name} is used by {', '.join(users)}", field="name")
        gone = take_away(services.data.volumes, name)
        try:
            await services.in_thread(remove_tree, gone)
        except OSError as failure:
            raise Internal(f"{failure.filename}: {failure.strerror}") from failure

    def users(self) -> dict[str, list[str]]:
        """The containers of each named volume, in whatever state."""
        found: dict[str, list[str]] = defaultdict(list)
        for actor in self._runtime.containers():
            if actor.record is not None:
                names = {item.name for item in actor.record.spec.storage if isinstance(item, NamedStorage)}
                for name in names:
                    found[name].append(actor.cid)
        return found

    # -- the query

    async def entries(self, name: str | None) -> list[VolumeEntry]:
        """All volumes by name, or one. NotFound."""
        services = self._services
        users = self.users()
        mirrors = [m for m in services.mirrors.all() if name in (None, m.name)]
        root = services.data.volumes
        if name is None:
            named = await services.in_thread(list_named, root)
        else:
            named = [] if mirrors else [about_named(root, name)]
        loop = asyncio.get_running_loop()
        end = loop.time() + MEASURE_S
        found = []
        for volume in named:
            used = await services.in_thread(usage, root / volume.name, end - loop.time())
            found.append(_named(volume, users.get(volume.name, []), used))
        for mirror in mirrors:
            used = await services.in_thread(usage, mirror.files, end - loop.time())
            found.append(_mirrored(mirror, used, SHORT_NOTES if name is None else None))
        return sorted(found, key=lambda entry: entry.name)


def _named(volume: Named, users: list[str], used: Usage) -> VolumeEntry:
    return VolumeEntry(
        name=volume.name,
        kind="named",
        bytes=used.bytes,
        files=used.files,
        complete=used.complete,
        created_at=volume.created_at,
        containers=users,
        size_bytes=volume.size_bytes,
    )


def _mirrored(mirror: Mirror, used: Usage, most: int | None) -> VolumeEntry:
    """With at most so many notes: a list must fit in one message."""
    notes = {} if mirror.last is None else mirror.last.notes
    if mirror.running:
        state = VolumeState.MIRRORING
    else:
        state = VolumeState.WAITING if mirror.pending else VolumeState.WRITTEN_BACK
    return VolumeEntry(
        name=mirror.name,
        kind="s3",
        bytes=used.bytes,
        files=used.files,
        complete=used.complete,
        created_at=mirror.told.created_at,
        containers=[] if mirror.released else [mirror.told.container],
        source=mirror.told.source.url,
        target=mirror.told.target,
        state=state,
        error=mirror.error,
        notes={printable(path): why for path, why in list(notes.items())[:most]},
    )
