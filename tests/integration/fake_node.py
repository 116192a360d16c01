"""A scripted node on a real server: answers queries, completes commands, publishes events and logs as told."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Self

import msgspec

from schemas import queries as q
from schemas.errors import ContractError, Error, ErrorCode, Unsupported
from schemas.events import AnyEvent, CommandCompleted, CommandRejected, NodeChanged, StateChanged
from schemas.node import ApiInfo, Capabilities, Feature, NodeInfo, NodeState, NotEnforced, Presence
from schemas.status import ContainerStatus, Network, State, Stats
from schemas.subjects import Subjects
from worker.bus.connection import Bus
from worker.bus.messages import Message
from worker.bus.rpc import Service, serve_queries
from worker.bus.streams import setup_streams
from worker.errors import NotFound

INSTANCE = "01J00000000000000000000000"
EPOCH = "01HEPCH0000000000000000000"
STARTED = datetime(2026, 11, 24, 3, 0, tzinfo=UTC)


def status(cid: str, state: State = State.RUNNING, **changes: Any) -> ContainerStatus:
    service, _, replica = cid.rpartition("-")
    given: dict[str, Any] = {
        "container": cid,
        "service": service,
        "replica": int(replica),
        "instance": INSTANCE,
        "run": 1,
        "state": state,
        "pid": 4711,
        "port": 20001,
        "ip": "127.0.0.1",
        "network": Network.LOCALHOST,
        "image": "ghcr.io/acme/web:1",
        "image_digest": "sha256:" + "ab" * 32,
        "memory_limit": 512 * 2**20,
        "created_at": STARTED,
        "started_at": STARTED,
    }
    return ContainerStatus(**{**given, **changes})


class FakeNode:
    """`containers` is what it has; `on_command` may give an error, or null for success."""

    def __init__(self, bus: Bus, node: str) -> None:
        self.bus = bus
        self.node = node
        self.subjects = Subjects()
        self.containers: dict[str, ContainerStatus] = {}
        self.lines: list[q.LogLine] = []
        self.commands: list[dict[str, Any]] = []
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.on_command: Callable[[str | None, dict[str, Any]], Error | None] = lambda cid, body: None
        self.result: dict[str, Any] | None = {"instance": INSTANCE}
        self.silent = False
        self.rejecting = False
        self.exec_reply = q.ExecReply(exit_code=0, stdout="hello\n", stderr="", truncated=False)
        self.images = [
            q.ImageEntry(
                name="web:1", digest="sha256:" + "ab" * 32, bytes=3 * 2**20, created_at=STARTED, containers=1
            )
        ]
        self.spec: dict[str, Any] | None = None
        self.denials: q.DenialsReply | ContractError = Unsupported("no log of refusals here", field="verb")
        self._seq = 0
        self._service: Service | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    async def start(cls, bus: Bus, node: str, *containers: ContainerStatus) -> Self:
        await setup_streams(bus)
        self = cls(bus, node)
        self.containers = {one.container: one for one in containers}
        handlers = {
            verb: self._handler(verb)
            for verb in (
                "info",
                "list",
                "state",
                "stats",
                "logs",
                "wait",
                "exec",
                "profile",
                "images",
                "denials",
            )
        }
        self._service = await serve_queries(bus, node, handlers, version="0.1.0")
        await bus.subscribe(f"{self.subjects.prefix}.cmd.{node}.>", self._on_command)
        await self.appear()
        await self.event(self.subjects.node_event(node), NodeChanged, state=NodeState.READY, info=self.info())
        return self

    async def appear(self, state: NodeState = NodeState.READY) -> None:
        presence = Presence(node=self.node, boot="b", epoch=EPOCH, state=state, slots=8, slots_used=1)
        await self.bus.js.publish(f"$KV.SANDFLEET_NODES.{self.node}", msgspec.json.encode(presence))

    async def vanish(self) -> None:
        """As a node that was killed: no presence and no answers."""
        headers = {"KV-Operation": "DEL"}
        await self.bus.js.publish(f"$KV.SANDFLEET_NODES.{self.node}", b"", headers)
        if self._service is not None:
            await self._service.stop()

    def info(self) -> NodeInfo:
        return NodeInfo(
            node=self.node, epoch=EPOCH, boot="b", version="0.1.0", api=ApiInfo(version=1, features=["ulimits"]),
            hostname="host", os="linux", os_version="6.8", arch="x86_64", cpus=8, memory_bytes=16 * 2**30, gpus=[],
            labels={"rack": "a"}, pools=[], slots=8, slots_used=1, state=NodeState.READY, insecure=True,
            capabilities=Capabilities(
                sandbox="landlock:7", network=["none", "full"], gpu=["none"], isolation=["process"], clone="copy",
                limits=["memory"],
                not_enforced=[NotEnforced(feature=Feature.NETWORK_UDP, isolation=None, reason="no UDP rules")],
            ),
            started_at=STARTED,
        )  # fmt: skip

    async def event(self, subject: str, kind: type[AnyEvent], /, **fields: Any) -> None:
        self._seq += 1
        event = kind(node=self.node, epoch=EPOCH, boot="b", seq=self._seq, time=datetime.now(UTC), **fields)
        await self.bus.js.publish(subject, msgspec.json.encode(event))

    async def become(self, cid: str, state: State, **changes: Any) -> None:
        """A state event; the container is then in that state."""
        before = self.containers.get(cid)
        now = status(cid, state, **changes)
        self.containers[cid] = now
        await self.event(
            self.subjects.state(self.node, cid),
            StateChanged,
            container=cid,
            instance=now.instance,
            from_=None if before is None else before.state,
            status=now,
        )
        if state == State.REMOVED:
            del self.containers[cid]

    async def log(
        self, cid: str, stream: str, offset: int, data: bytes = b"", *, eof: int | None = None, lost: int = 0,
        instance: str = INSTANCE,
    ) -> None:  # fmt: skip
        micros = int(datetime.now(UTC).timestamp() * 1e6)
        headers = {
            "Sandfleet-Instance": instance,
            "Sandfleet-Run": "1",
            "Sandfleet-Offset": str(offset),
            "Sandfleet-Times": f"0:{micros}",
        }
        if eof is not None:
            headers["Sandfleet-Eof"] = str(eof)
        if lost:
            headers |= {"Sandfleet-Lost": str(lost), "Sandfleet-Lost-Reason": "rate"}
        await self.bus.js.publish(self.subjects.log(self.node, cid, stream), data, headers)

    # -- commands

    def _on_command(self, message: Message) -> None:
        task = asyncio.ensure_future(self._complete(message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _complete(self, message: Message) -> None:
        parsed = self.subjects.parse(message.subject)
        body = msgspec.json.decode(message.data)
        self.commands.append({"container": parsed.cid, **body})
        if self.silent:
            return
        subject = self.subjects.command_event(self.node, parsed.cid)
        if self.rejecting:
            error = Error(code=ErrorCode.INVALID_SPEC, message="no such field", field="spec.nope")
            await self.event(
                subject,
                CommandRejected,
                command_id=body["id"],
                error=error,
                subject=message.subject,
                size=len(message.data),
                sha256="00",
            )
            return
        failure = self.on_command(parsed.cid, body)
        await self.event(
            subject,
            CommandCompleted,
            container=parsed.cid,
            instance=INSTANCE if parsed.cid else None,
            command_id=body["id"],
            command=body["type"],
            ok=failure is None,
            error=failure,
            status=self.containers.get(parsed.cid or ""),
            result=self.result if failure is None else None,
        )

    # -- queries

    def _handler(self, verb: str) -> Any:
        async def handle(body: bytes, headers: dict[str, str]) -> bytes:
            request = q.decode_request(verb, body)
            self.requests.append((verb, msgspec.json.decode(body)))
            return msgspec.json.encode(getattr(self, f"_{verb}")(request))

        return handle

    def _known(self, cid: str | None) -> ContainerStatus:
        if cid not in self.containers:
            raise NotFound(f"there is no container {cid}", field="container")
        return self.containers[cid]

    def _info(self, request: q.InfoRequest) -> NodeInfo:
        return self.info()

    def _list(self, request: q.ListRequest) -> q.ListReply:
        """Two a page, so that paging is used."""
        names = sorted(name for name in self.containers if request.cursor is None or name > request.cursor)
        found = [self.containers[name] for name in names]
        found = [one for one in found if request.state in (None, one.state)]
        page = found[:2]
        return q.ListReply(containers=page, cursor=page[-1].container if len(found) > 2 else None)

    def _state(self, request: q.StateRequest) -> Any:
        known = self._known(request.container)
        return {**msgspec.structs.asdict(known), "spec": self.spec} if request.spec else known

    def _stats(self, request: q.StatsRequest) -> Stats:
        self._known(request.container)
        return Stats(
            node=self.node, container=request.container, instance=INSTANCE, time=datetime.now(UTC), cpu_usec=1500000,
            cpu_percent=12.5, memory_bytes=100 * 2**20, memory_limit=512 * 2**20, processes=3, threads=9,
            open_files=12, read_bytes=1024, write_bytes=0,
        )  # fmt: skip

    def _logs(self, request: q.LogsRequest) -> q.LogsReply:
        self._known(request.container)
        lines = self.lines[-request.tail :] if request.tail and not request.cursor else self.lines
        start = int(request.cursor or 0)
        page = lines[start : start + 2]
        return q.LogsReply(lines=page, cursor=str(start + len(page)))

    def _wait(self, request: q.WaitRequest) -> ContainerStatus:
        found = self._known(request.container)
        if found.state == State.RUNNING:
            raise ContractErrorDeadline("still running", field="timeout_s")
        return found

    def _exec(self, request: q.ExecRequest) -> q.ExecReply:
        self._known(request.container)
        return self.exec_reply

    def _profile(self, request: q.ProfileRequest) -> q.ProfileReply:
        self._known(request.container)
        return q.ProfileReply(
            language="landlock", text="allow read /usr\n", params={}, policy={"a": 1}, not_enforced=[]
        )

    def _denials(self, request: q.DenialsRequest) -> q.DenialsReply:
        self._known(request.container)
        if isinstance(self.denials, ContractError):
            raise self.denials
        return self.denials

    def _images(self, request: q.ImagesRequest) -> q.ImagesReply:
        return q.ImagesReply(images=self.images)


class ContractErrorDeadline(ContractError):
    code = ErrorCode.DEADLINE_EXCEEDED
