"""Answers to the queries of `P.rpc.<node>.<verb>`: each takes a request and gives a reply, and changes nothing."""

import asyncio
import base64
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import msgspec

from schemas import queries as q
from schemas.errors import InvalidSpec, Unsupported
from schemas.events import CommandCompleted
from schemas.node import DeliveryInfo, NodeInfo, NodeState
from schemas.spec import CommandSpec
from schemas.status import State, Stats
from worker.disk_use import DiskMeter
from worker.downloads import Downloads
from worker.entrypoint import ResolvedCommand, resolve_command
from worker.errors import Conflict, DeadlineExceeded, NotFound
from worker.log_query import read_lines
from worker.platform.base import ROOTED, Profile, SandboxPolicy
from worker.records import ContainerRecord
from worker.runtime import Runtime, target_of
from worker.services import Services
from worker.supervisor import ExecRequest, ExecResult
from worker.volumes_commands import VolumeCommands

if TYPE_CHECKING:
    from worker.platform.darwin.unified_log import UnifiedLog
    from worker.sandbox_queries import SandboxQueries

LIST_PAGE = 250
IMPLEMENTED = frozenset(q.QUERY_VERBS) - {"cancel"}

Query = Callable[[bytes, dict[str, str]], Awaitable[bytes]]

_encode = msgspec.json.Encoder().encode
_completed = msgspec.json.Decoder(CommandCompleted)


class Queries:
    """The handlers of the node's micro service."""

    def __init__(
        self,
        services: Services,
        runtime: Runtime,
        *,
        info: Callable[[NodeState], NodeInfo],
        delivery: Callable[[], Awaitable[DeliveryInfo]],
        log: "UnifiedLog | None" = None,
    ) -> None:
        """`log`: see `SandboxQueries`."""
        self._services = services
        self._runtime = runtime
        self._info = info
        self._delivery = delivery
        self._log = log
        self._asked: SandboxQueries | None = None
        self._measuring = asyncio.Lock()
        self._meter = DiskMeter(services.data.root)
        self._volumes = VolumeCommands(services, runtime)
        self._downloads = Downloads(services, runtime)

    async def close(self) -> None:
        await self._downloads.close()

    def handlers(self) -> dict[str, Query]:
        """One for every verb of the contract; what is not built yet answers `unsupported`."""
        return {verb: self._handler(verb) for verb in q.QUERY_VERBS}

    def _handler(self, verb: str) -> Query:
        async def unsupported(body: bytes, headers: dict[str, str]) -> bytes:
            raise Unsupported(f"the query {verb} is not supported by this node", field="verb")

        if verb not in IMPLEMENTED:
            return unsupported
        answer: Callable[[Any], Awaitable[Any]] = getattr(self, verb)

        async def query(body: bytes, headers: dict[str, str]) -> bytes:
            return _encode(await answer(q.decode_request(verb, body)))

        return query

    async def info(self, request: q.InfoRequest) -> NodeInfo:
        delivery = await self._delivery()
        return msgspec.structs.replace(self._info(self._runtime.node_state()), delivery=delivery)

    async def list(self, request: q.ListRequest) -> q.ListReply:
        wanted = (request.labels or {}).items()
        found = [
            s
            for s in self._runtime.statuses()
            if (request.state is None or s.state == request.state)
            and (request.cursor is None or s.container > request.cursor)
            and all(s.labels.get(k) == v for k, v in wanted)
        ]
        page = found[:LIST_PAGE]
        return q.ListReply(containers=page, cursor=page[-1].container if len(found) > len(page) else None)

    async def state(self, request: q.StateRequest) -> Any:
        actor = self._runtime.known(request.container)
        if not request.spec or actor.record is None:
            return actor.status
        return {**msgspec.structs.asdict(actor.status), "spec": actor.record.spec}

    async def command(self, request: q.CommandRequest) -> q.CommandReply:
        entry = await self._services.journal.read(lambda tx: tx.command(request.id))
        if entry is None:
            raise NotFound(f"there is no command {request.id}", field="id")
        return q.CommandReply(
            id=entry.id,
            command=entry.verb,
            container=entry.container,
            state=q.CommandState(entry.state.value),
            result=None if entry.result is None else _completed.decode(entry.result),
        )

    async def stats(self, request: q.StatsRequest) -> Stats:
        actor = self._runtime.known(request.container)
        record = actor.record
        if record is None or record.status.state not in (State.RUNNING, State.STOPPING):
            raise Conflict(f"{request.container} is {actor.state}: nothing runs that could be measured")
        target = target_of(record, self._services.data.container(request.container))
        measure = self._services.measure
        sample = None if target is None or measure is None else await measure(target)
        if sample is None:
            raise Conflict(f"{request.container} has just ended")
        return sample

    async def logs(self, request: q.LogsRequest) -> q.LogsReply:
        actor = self._runtime.known(request.container)
        state_dir = self._services.data.container(actor.cid).state
        lines, cursor = await read_lines(
            state_dir,
            stream=request.stream.value,
            tail=request.tail,
            since=request.since,
            cursor=request.cursor,
            instance=actor.status.instance,
        )
        return q.LogsReply(lines=lines, cursor=cursor)

    async def wait(self, request: q.WaitRequest) -> Any:
        try:
            return await self._runtime.wait(
                request.container, request.until is q.WaitUntil.FINAL, request.timeout_s
            )
        except TimeoutError:
            raise DeadlineExceeded(
                f"{request.container} has not ended within {request.timeout_s:g} s", field="timeout_s"
            ) from None

    async def exec(self, request: q.ExecRequest) -> q.ExecReply:
        if request.stream or request.tty or request.session is not None:
            raise Unsupported("interactive exec is not supported by this node", field="stream")
        actor = self._runtime.known(request.container)
        record = actor.record
        if record is None or record.status.state is not State.RUNNING:
            raise Conflict(f"exec is not possible: {request.container} is {actor.state}")
        policy = self._services.policy_of(record)
        start = self._runtime.starter.start_request(record, policy)
        environment = {**start.env, **(request.env or {})}
        command = self._exec_command(record, policy, request, environment.get("PATH", ""))
        result = await self._services.launcher.exec(
            actor.cid,
            ExecRequest(
                program=command.program,
                argv=command.argv,
                env=environment,
                cwd=command.cwd,
                stdin=_stdin(request),
                timeout_s=request.timeout_s,
                max_bytes=q.MAX_OUTPUT_BYTES,
            ),
        )
        if result.timed_out:
            raise DeadlineExceeded(
                f"the command had not ended within {request.timeout_s:g} s and was killed", field="timeout_s"
            )
        return _exec_reply(result)

    def _exec_command(
        self, record: ContainerRecord, policy: SandboxPolicy, request: q.ExecRequest, path: str
    ) -> ResolvedCommand:
        """The program of an exec is found as the container's own is."""
        services, spec = self._services, record.spec
        status = record.status
        words = CommandSpec(entrypoint=request.argv, workdir=request.workdir or spec.command.workdir)
        return resolve_command(
            msgspec.structs.replace(spec, command=words),
            services.image_config(status.image_digest),
            services.data.container(status.container).rootfs,
            path,
            volumes=policy.volumes,
            may_run=services.may_run(policy),
            rooted=policy.isolation == ROOTED,
        )

    async def profile(self, request: q.ProfileRequest) -> Profile:
        return await (await self._sandboxes()).profile(request)

    async def check(self, request: q.CheckRequest) -> q.CheckReply:
        return await (await self._sandboxes()).check(request)

    async def denials(self, request: q.DenialsRequest) -> q.DenialsReply:
        return await (await self._sandboxes()).denials(request)

    async def _sandboxes(self) -> "SandboxQueries":
        """Loaded when a sandbox is first asked about, in a thread: a tenth of all that a worker would import before it
        is ready is two platforms' rules and their evaluators.
        """
        if self._asked is None:
            kind = await self._services.in_thread(_sandbox_queries)
            self._asked = self._asked or kind(self._services, self._runtime, log=self._log)
        return self._asked

    async def export(self, request: q.ExportRequest) -> q.PieceReply:
        return await self._downloads.export(request)

    async def save(self, request: q.SaveRequest) -> q.PieceReply:
        return await self._downloads.save(request)

    async def volumes(self, request: q.VolumesRequest) -> q.VolumesReply:
        return q.VolumesReply(volumes=await self._volumes.entries(request.name))

    async def images(self, request: q.ImagesRequest) -> q.ImagesReply:
        return q.ImagesReply(images=self._services.images.list())

    async def image(self, request: q.ImageRequest) -> q.ImageReply:
        return self._services.images.describe(request.image)

    async def df(self, request: q.DfRequest) -> q.DfReply:
        """One at a time: who comes meanwhile is told what the first one counted."""
        services = self._services
        async with self._measuring:
            images = await services.images.use()
            names = [status.container for status in self._runtime.statuses()]
            return await services.in_thread(
                self._meter.measure, images, names, services.cloner.told(), refresh=request.refresh
            )


def _sandbox_queries() -> "type[SandboxQueries]":
    from worker.sandbox_queries import SandboxQueries

    return SandboxQueries


def _stdin(request: q.ExecRequest) -> bytes:
    if request.stdin is None:
        return b""
    if request.encoding != q.BASE64:
        return request.stdin.encode()
    try:
        return base64.b64decode(request.stdin, validate=True)
    except ValueError:
        raise InvalidSpec("is not base64", field="stdin") from None


def _exec_reply(result: ExecResult) -> q.ExecReply:
    """Both texts as they are, or both as base64 when one is not UTF-8."""
    try:
        return q.ExecReply(
            exit_code=result.exit_code,
            stdout=_text(result.stdout, cut=result.truncated),
            stderr=_text(result.stderr, cut=result.truncated),
            truncated=result.truncated,
        )
    except UnicodeDecodeError:
        return q.ExecReply(
            exit_code=result.exit_code,
            stdout=base64.b64encode(result.stdout).decode(),
            stderr=base64.b64encode(result.stderr).decode(),
            truncated=result.truncated,
            encoding=q.BASE64,
        )


def _text(raw: bytes, *, cut: bool) -> str:
    """UTF-8; a character that the size limit cut in two is left out."""
    try:
        return raw.decode()
    except UnicodeDecodeError as failure:
        if cut and len(raw) - failure.start < 4 and failure.reason == "unexpected end of data":
            return raw[: failure.start].decode()
        raise
