"""All mirrors of the node: fetched before a start, written back while the container runs and when it has ended.

    {data_dir}/mirrors/{name}/  files/  incoming/  state.db  mirror.json

A mirror belongs to one storage entry of one instance of a container. It outlives the container until everything in
it is in the bucket: a stop, a removal or a killed worker loses nothing, and what fails is tried again for as long as
it takes, or until an operator removes the mirror by force.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from loguru import logger

from schemas.subjects import parse_cid
from worker.config import Config
from worker.errors import Conflict, ContractError, NotFound, ResourceExhausted, StartFailed
from worker.images.trees import remove_tree
from worker.log import register_secret
from worker.node_file import replace_file
from worker.secret_files import SecretReader

from .failures import NoRoom, S3Failure, Stopped
from .mirror import Mirror, MirrorFile
from .outcome import Outcome
from .source import S3Credentials, S3Source, credentials_of, mirror_name
from .threads import in_daemon_thread

PASSES_AT_A_TIME = 4
FIRST_RETRY_S = 5.0
LONGEST_RETRY_S = 300.0
PROGRESS_S = 1.0
PASSABLE = 0o711
SAYS = "the s3 volume at "

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(MirrorFile).decode

Say = Callable[[str], Awaitable[None]]


class Wanted(msgspec.Struct, frozen=True):
    """A storage entry of a container: its place in the spec, its target and what it mirrors."""

    index: int
    target: str
    source: S3Source


class Mirrors:
    """Owner of the folder `root`. `spawn` and `tell` are given before the first use."""

    def __init__(
        self,
        root: Path,
        *,
        config: Config,
        secrets: SecretReader,
        first_retry_s: float = FIRST_RETRY_S,
    ) -> None:
        self.root = root
        self.spawn: Callable[[Coroutine[Any, Any, None], str], object] = lambda work, name: work.close()
        self.tell: Callable[[str, str, str | None], Awaitable[None]] = _tell_nobody
        self._config = config
        self._secrets = secrets
        self._first_retry_s = first_retry_s
        self._mirrors: dict[str, Mirror] = {}
        self._passes = asyncio.Semaphore(PASSES_AT_A_TIME)

    def grant(self, config: Config) -> None:
        """Go by the policy of `config` from now on."""
        self._config = config

    # -- from one worker to the next

    def load(self) -> None:
        """Find what a worker before this one kept. Blocking, before any task."""
        for name in sorted(os.listdir(self.root)):
            folder = self.root / name
            try:
                told = _decode((folder / "mirror.json").read_bytes())
            except FileNotFoundError:
                remove_tree(folder)  # not begun: nothing was ever in it
            except (OSError, msgspec.DecodeError) as failure:
                logger.error(
                    "the mirror {} is left alone, as its mirror.json cannot be read: {}", folder, failure
                )
            else:
                mirror = self._mirrors[name] = Mirror(name, folder, told)
                mirror.pending = not told.source.readonly and not mirror.settled()

    def begin(self, live: set[str], known: set[str]) -> None:
        """Go on with what a dead worker left: `live` are the instances that run, `known` all that there are."""
        for mirror in self._mirrors.values():
            mirror.running = mirror.told.instance in live
            mirror.released = mirror.told.instance not in known
            self._look_after(mirror)

    # -- a container's life

    async def fetch(
        self,
        cid: str,
        instance: str,
        wanted: Iterable[Wanted],
        overtaken: asyncio.Event,
        say: Say,
        *,
        owner: tuple[int, int] | None = None,
    ) -> None:
        """Bring a container's mirrors up to date, before its start: from here to `ended` it may write into them. Ends
        early when it was `overtaken`.

        Raises StartFailed or ResourceExhausted, naming the storage entry.
        """
        for entry in wanted:
            field = f"spec.storage[{entry.index}]"
            mirror = await self._made(cid, instance, entry)
            mirror.owner = owner
            if owner is not None:
                # The way to its files, which by isolation `process` is the host's; nothing of it can be listed.
                for folder in (self.root, mirror.folder):
                    os.chmod(folder, PASSABLE)
            try:
                await self._fetch(mirror, overtaken, say)
            except NoRoom as failure:
                raise ResourceExhausted(f"{SAYS}{entry.target}: {failure}", field=field) from failure
            except S3Failure as failure:
                raise StartFailed(
                    f"{SAYS}{entry.target} cannot be fetched: {failure}", field=field
                ) from failure
            except OSError as failure:
                raise StartFailed(
                    f"{SAYS}{entry.target} cannot be fetched: {failure.strerror or failure}", field=field
                ) from failure
            if overtaken.is_set():
                return

    def ended(self, instance: str) -> None:
        """Nothing of the container runs any more: all that it wrote goes to the bucket."""
        for mirror in self._of(instance):
            mirror.running = False
            mirror.attempted.clear()
            self._look_after(mirror)

    def released(self, instance: str) -> None:
        """The container is gone: its mirrors go, too, once everything is in the bucket."""
        for mirror in self._of(instance):
            mirror.running = False
            mirror.released = True
            if mirror.fetching:
                mirror.stopped.set()
            self._look_after(mirror)

    async def written_back(self, instance: str, timeout_s: float) -> bool:
        """Wait until all of a container's mirrors were written back, or one attempt has failed, or a while."""
        waiting = [asyncio.ensure_future(m.attempted.wait()) for m in self._of(instance) if m.pending]
        if waiting:
            try:
                await asyncio.wait(waiting, timeout=timeout_s)
            finally:
                for task in waiting:
                    task.cancel()
                await asyncio.gather(*waiting, return_exceptions=True)
        late = [m for m in self._of(instance) if m.pending and m.error is None]
        for mirror in late:
            await self._say(mirror, f"{SAYS}{mirror.told.target} is still being written back")
        return not any(m.pending for m in self._of(instance))

    # -- for operators

    def has(self, name: str) -> bool:
        return name in self._mirrors

    def all(self) -> list[Mirror]:
        return sorted(self._mirrors.values(), key=lambda m: m.name)

    async def discard(self, name: str, *, force: bool) -> None:
        """Delete a mirror whose container is gone. NotFound; Conflict while it holds what nobody else has."""
        mirror = self._mirrors.get(name)
        if mirror is None:
            raise NotFound(f"there is no volume {name}", field="name")
        if not mirror.released:
            raise Conflict(f"{name} belongs to {mirror.told.container}: remove that", field="name")
        if mirror.pending and not force:
            why = mirror.error or "that is under way"
            raise Conflict(
                f"{name} holds changes that are not in {mirror.told.source.url} yet ({why}); "
                "with force they are lost",
                field="name",
            )
        mirror.pending = False
        mirror.stopped.set()
        self._look_after(mirror)
        await mirror.gone.wait()

    # -- making and fetching

    def _of(self, instance: str) -> list[Mirror]:
        return [m for m in self._mirrors.values() if m.told.instance == instance]

    async def _made(self, cid: str, instance: str, entry: Wanted) -> Mirror:
        name = mirror_name(instance, entry.index)
        known = self._mirrors.get(name)
        if known is not None:
            return known
        told = MirrorFile(
            source=entry.source,
            container=cid,
            instance=instance,
            target=entry.target,
            created_at=datetime.now(UTC),
        )
        mirror = Mirror(name, self.root / name, told)
        try:
            await in_daemon_thread(lambda: _make(mirror), f"make {name}")
        except OSError as failure:
            raise StartFailed(
                f"{failure.filename} cannot be made: {failure.strerror}", field=f"spec.storage[{entry.index}]"
            ) from failure
        self._mirrors[name] = mirror
        return mirror

    async def _fetch(self, mirror: Mirror, overtaken: asyncio.Event, say: Say) -> None:
        mirror.running = False
        mirror.fetching = True
        await say(f"fetching {SAYS}{mirror.told.target}")
        work = asyncio.ensure_future(self._pass(mirror, fetching=True))
        over = asyncio.ensure_future(overtaken.wait())
        shown = ""
        try:
            while not work.done():
                await asyncio.wait((work, over), timeout=PROGRESS_S, return_when=asyncio.FIRST_COMPLETED)
                if overtaken.is_set():
                    return
                if mirror.progress != shown and not work.done():
                    shown = mirror.progress
                    await say(f"fetching {SAYS}{mirror.told.target}: {shown}")
            outcome = work.result()
            mirror.running = True
            mirror.pending = not mirror.told.source.readonly
        except Stopped:
            return  # the container is being removed
        finally:
            mirror.fetching = False
            self._look_after(mirror)
            for task in (work, over):
                task.cancel()
            await asyncio.gather(work, over, return_exceptions=True)
        mirror.error = None
        logger.info("{} of {}: {}", mirror.name, mirror.told.container, _in_words(outcome))

    async def _pass(self, mirror: Mirror, *, fetching: bool) -> Outcome:
        """One pass, alone on its mirror. When it is cancelled its thread ends by itself, and the next one waits."""
        async with mirror.lock, self._passes:
            if mirror.thread is not None:
                await asyncio.wait((mirror.thread,))
            mirror.begin()
            credentials = self._credentials(mirror)
            owned = not mirror.running
            private = self._private(mirror)
            thread = mirror.thread = in_daemon_thread(
                lambda: mirror.work(credentials, self._ca(), private=private, fetching=fetching, owned=owned),
                f"mirror {mirror.name}",
            )
            thread.add_done_callback(_noticed)
            try:
                return await asyncio.shield(thread)
            finally:
                mirror.stopped.set()

    def _ca(self) -> Path | None:
        return None if self._config.volumes.s3_ca is None else Path(self._config.volumes.s3_ca)

    def _private(self, mirror: Mirror) -> bool:
        """Whether the server's address need not be public. S3Failure when the operator has taken its grant back."""
        policy, origin = self._config.policy, mirror.told.source.origin
        if not policy.may_use_s3(origin):
            raise S3Failure(f"{origin} is not where s3 volumes of this node may be any more")
        return policy.names_s3(origin)

    def _credentials(self, mirror: Mirror) -> S3Credentials | None:
        """Read for each pass, so that a new secret or grant counts at once. S3Failure, never with any of it."""
        name = mirror.told.source.credentials
        if name is None:
            return None
        service, _ = parse_cid(mirror.told.container)
        if not self._config.policy.may_have_secret(name, service):
            raise S3Failure(f"the service {service} may not have the secret {name!r} any more")
        try:
            found = credentials_of(self._secrets.read(name), name)
        except (ContractError, ValueError) as failure:
            raise S3Failure(
                failure.message if isinstance(failure, ContractError) else str(failure)
            ) from failure
        for secret in (found.secret_access_key, found.session_token):
            if secret:
                register_secret(secret)
        return found

    # -- writing back

    def _look_after(self, mirror: Mirror) -> None:
        """See to it that one task works on the mirror while there is anything to do, and that it looks now."""
        mirror.kick.set()
        if not mirror.kept and (mirror.running or mirror.pending or mirror.released):
            mirror.kept = True
            self.spawn(self._keep(mirror), f"mirror {mirror.name}")

    async def _keep(self, mirror: Mirror) -> None:
        failures = 0
        try:
            while True:
                mirror.kick.clear()
                if mirror.running:
                    interval_s = mirror.told.source.interval_s
                    pause_s = (
                        None if mirror.told.source.readonly else max(interval_s, self._pause_s(failures))
                    )
                    if not await mirror.kicked(pause_s):
                        failures = 0 if await self._write_back(mirror) else failures + 1
                    continue
                if mirror.fetching:
                    await mirror.kicked(None)
                    continue
                if mirror.pending:
                    if await self._write_back(mirror):
                        failures = 0
                    else:
                        failures += 1
                        mirror.attempted.set()
                        await mirror.kicked(self._pause_s(failures))
                    continue
                mirror.attempted.set()
                if mirror.released:
                    await self._delete(mirror)
                return
        finally:
            mirror.kept = False

    def _pause_s(self, failures: int) -> float:
        return 0.0 if failures == 0 else min(self._first_retry_s * 2 ** (failures - 1), LONGEST_RETRY_S)

    async def _write_back(self, mirror: Mirror) -> bool:
        """One attempt. When nothing runs and it went well, there is nothing to write back any more."""
        was_running = mirror.running
        try:
            outcome = await self._pass(mirror, fetching=False)
            if outcome.left and not was_running:
                raise S3Failure(f"{outcome.left} files could not be settled", again=True)
        except Stopped:
            return True
        except (S3Failure, OSError) as failure:
            text = str(failure)
            if mirror.error != text:
                logger.warning("{} of {} is not written back: {}", mirror.name, mirror.told.container, text)
            mirror.error = text
            await self._say(mirror, f"{SAYS}{mirror.told.target} is not written back yet: {text}")
            return False
        if outcome.uploaded or outcome.deleted_there:
            logger.info("{} of {}: {}", mirror.name, mirror.told.container, _in_words(outcome))
        for name in outcome.kept_both:
            logger.warning("{}: somebody else changed it too; ours is now {}", mirror.told.source.url, name)
        mirror.error = None
        if not mirror.running and not was_running:
            mirror.pending = False
        await self._say(mirror, None)
        return True

    async def _say(self, mirror: Mirror, text: str | None) -> None:
        """The status message of a container that is still there."""
        if text != mirror.said:
            mirror.said = text
            if not mirror.released:
                await self.tell(mirror.told.container, mirror.told.instance, text)

    async def _delete(self, mirror: Mirror) -> None:
        if mirror.thread is not None:
            await asyncio.wait((mirror.thread,))
        try:
            await in_daemon_thread(lambda: remove_tree(mirror.folder), f"remove {mirror.name}")
        except OSError as failure:
            # The next worker finds it again.
            logger.error("{} cannot be deleted: {}", mirror.folder, failure)
        self._mirrors.pop(mirror.name, None)
        mirror.gone.set()


async def _tell_nobody(cid: str, instance: str, text: str | None) -> None:
    return None


def _make(mirror: Mirror) -> None:
    mirror.folder.mkdir(mode=0o700, exist_ok=True)
    for folder in (mirror.files, mirror.incoming):
        folder.mkdir(mode=0o700, exist_ok=True)
    replace_file(mirror.folder / "mirror.json", _encode(mirror.told))


def _noticed(thread: "asyncio.Future[Outcome]") -> None:
    """A pass that was given up must not complain that nobody heard how it ended."""
    if not thread.cancelled():
        thread.exception()


def _in_words(outcome: Outcome) -> str:
    counts = {
        "fetched": outcome.downloaded,
        "written back": outcome.uploaded,
        "deleted here": outcome.deleted_here,
        "deleted there": outcome.deleted_there,
        "left alone": len(outcome.notes),
    }
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "nothing to do"
