"""logs: from the node's own files while it is there, else from the log stream; `-f` follows the stream.

The stream keeps the logs of removed containers and of nodes that are away, as long as its limits allow.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import datetime

from schemas.queries import LogLine, LogsReply, LogsRequest, LogStream
from schemas.status import State
from worker.bus.failures import NoResponders
from worker.cli.app import OK
from worker.cli.context import Context, Target
from worker.cli.human import clock, rfc3339, size
from worker.cli.parser import Namespace, Parser, UsageError, when, whole
from worker.client import FleetClient
from worker.client_logs import Line, LineCutter, LogChunk, LogOrder, Piece
from worker.errors import ContractError, NotFound, Unavailable

ENDED = (State.EXITED, State.FAILED, State.REMOVED)
HOLD_S = 1.0
FIRST_REACH = 64
REACH_FACTOR = 8
WHY_LOST = {
    "size": "the size limit",
    "rate": "the rate limit",
    "disk": "a disk error",
    "evicted": "the age and size limits of the stream",
    "missing": "an unknown cause",
}


def options_logs(parser: Parser) -> None:
    parser.argument("container", metavar="CONTAINER", complete="container")
    parser.argument("-f", "--follow", action="store_true", help="go on as more is written")
    parser.argument("-n", "--tail", type=whole(0), metavar="N", help="only the last N lines")
    parser.argument(
        "--since", type=when, metavar="TIME", help="a time (RFC 3339), or an age such as 10m or 2h"
    )
    parser.argument("-t", "--timestamps", action="store_true", help="begin each line with its capture time")
    parser.argument("--stdout", action="store_true", help="standard output only")
    parser.argument("--stderr", action="store_true", help="standard error only")
    parser.argument(
        "--raw",
        action="store_true",
        help="every byte that the stream keeps of the newest instance, exactly as it was written",
    )
    parser.details = """
        Standard output goes to stdout, standard error to stderr. --json prints one object for each line:
        time, stream, text.
    """
    parser.example("sandfleet logs -f --tail 20 web-0")
    parser.example("sandfleet logs --since 10m -t web-0")
    parser.example("sandfleet logs --raw --stdout job-0 | sha256sum")


async def verb_logs(context: Context, args: Namespace) -> int:
    if args.raw and (args.tail is not None or args.since or args.timestamps or context.out.as_json):
        raise UsageError("--raw goes with -f, --stdout and --stderr only", verb="logs")
    if args.stdout and args.stderr:
        args.stdout = args.stderr = False
    async with context.fleet() as fleet:
        target = await _target(context, fleet, args.container)
        show = _Show(context, args)
        if args.raw:
            await _Stream(fleet, target, args).show_raw(show)
        elif args.follow:
            await _Stream(fleet, target, args).show_lines(show, follow=True)
        else:
            try:
                await _from_node(fleet, target, args, show)
            except (NotFound, NoResponders) as failure:
                found = await _Stream(fleet, target, args).show_lines(show, follow=False)
                if not found:
                    raise failure
    return OK


async def _target(context: Context, fleet: FleetClient, name: str) -> Target:
    """Where the container is, or was."""
    try:
        return await context.locate(fleet, name)
    except NotFound:
        node = await _last_node(fleet, name)
        if node is None:
            raise
        return Target(node, name)


async def _last_node(fleet: FleetClient, cid: str) -> str | None:
    """The node that wrote the newest log of a container that no node knows any more."""
    from schemas.subjects import parse_cid

    try:
        parse_cid(cid)
    except ContractError:
        return None
    newest = None
    for stream in ("stdout", "stderr"):
        pattern = f"{fleet.subjects.prefix}.log.*.{cid}.{stream}"
        message = await fleet.bus.js.last_message(fleet.names.logs, pattern)
        if message is not None and (newest is None or message.stream_seq > newest.stream_seq):
            newest = message
    return None if newest is None else fleet.subjects.parse(newest.subject).node


async def _from_node(fleet: FleetClient, target: Target, args: Namespace, show: "_Show") -> None:
    cursor: str | None = None
    while True:
        request = LogsRequest(
            container=target.cid,
            stream=LogStream.STDOUT if args.stdout else LogStream.STDERR if args.stderr else LogStream.BOTH,
            tail=args.tail or 0,
            since=args.since,
            cursor=cursor,
        )
        if args.tail == 0:
            return
        page = await fleet.query(target.node, "logs", request, LogsReply)
        for line in page.lines:
            show.line(_line_of(line))
        if not page.lines or not page.cursor or page.cursor == cursor:
            return
        cursor = page.cursor


def _line_of(line: LogLine) -> Line:
    import base64

    data = base64.b64decode(line.text) if line.encoding == "base64" else line.text.encode()
    return Line(time=line.time, stream=line.stream, data=data)


class _Show:
    """Lines and bytes to where they belong."""

    def __init__(self, context: Context, args: Namespace) -> None:
        self._out = context.out
        self._timestamps: bool = args.timestamps
        self._since: datetime | None = args.since

    def line(self, line: Line) -> None:
        if self._since is not None and line.time < self._since:
            return
        if self._out.as_json:
            self._out.json_line(line.wire())
            return
        head = b""
        if self._timestamps:
            moment = clock(line.time) if self._out.terminal else rfc3339(line.time)
            head = self._out.paint(moment, "dim").encode() + b" "
        end = b"" if line.partial and not self._timestamps else b"\n"
        self._out.raw(head + line.data + end, to_stderr=line.stream == "stderr")

    def raw(self, piece: Piece) -> None:
        self._out.raw(piece.data, to_stderr=piece.stream == "stderr")

    def lost(self, piece: Piece) -> None:
        self._out.warning(lost_text(piece))

    def note(self, text: str) -> None:
        self._out.note(text)


def lost_text(piece: Piece) -> str:
    why = WHY_LOST.get(piece.reason or "", piece.reason or "an unknown cause")
    return f"{size(piece.missing)} of {piece.stream} at offset {piece.offset} are lost to {why}"


class _Stream:
    """A container's logs out of the log stream."""

    def __init__(self, fleet: FleetClient, target: Target, args: Namespace) -> None:
        self._fleet = fleet
        self._target = target
        self._tail: int | None = args.tail
        self._since: datetime | None = args.since
        self._subject = "stdout" if args.stdout else "stderr" if args.stderr else "*"
        self._follow: bool = args.follow
        self._streams = ("stdout", "stderr") if self._subject == "*" else (self._subject,)
        self._eofs: dict[str, int] = {}

    async def show_raw(self, show: _Show) -> None:
        instance = await self._newest_instance()
        if instance is None:
            raise NotFound(f"the log stream has nothing of {self._target.cid}")
        order = LogOrder(from_start=True, instance=None if self._follow else instance)
        async for piece in self._pieces(order, start_seq=None, follow=self._follow):
            if piece.instance < instance:
                continue
            if piece.missing:
                show.lost(piece)
            if piece.data:
                show.raw(piece)

    async def show_lines(self, show: _Show, *, follow: bool) -> bool:
        """Whether there was anything."""
        last = await self._fleet.log_position()
        start = await self._tail_start(last) if self._tail is not None else None
        order = LogOrder(from_start=start is None and self._since is None)
        cutter, shown = LineCutter(), False
        history: deque[Line] | None = None if self._tail is None else deque(maxlen=max(self._tail, 1))
        async for piece, old in self._with_age(order, start, last, follow):
            if not old and history is not None:
                self._flush(history, show)
                history = None
            shown = True
            if piece.missing and piece.reason != "evicted":
                show.lost(piece)
            for line in cutter.put(piece):
                if history is None:
                    show.line(line)
                else:
                    history.append(line)
        rest = cutter.rest()
        if history is not None:
            history.extend(rest)
            self._flush(history, show)
        else:
            for line in rest:
                show.line(line)
        return shown

    def _flush(self, history: deque[Line], show: _Show) -> None:
        if self._tail:
            for line in history:
                show.line(line)

    async def _with_age(
        self, order: LogOrder, start: int | None, last: int, follow: bool
    ) -> AsyncGenerator[tuple[Piece, bool], None]:
        """The pieces, and whether each was there when we began."""
        async for piece in self._pieces(order, start_seq=start, follow=False, since=self._since):
            yield piece, True
        if follow:
            async for piece in self._pieces(order, start_seq=last + 1, follow=True):
                yield piece, False

    async def _pieces(
        self, order: LogOrder, *, start_seq: int | None, follow: bool, since: datetime | None = None
    ) -> AsyncGenerator[Piece, None]:
        """Pieces in order; following ends once the container has ended for good."""
        chunks = self._fleet.log_chunks(
            self._target.node,
            self._target.cid,
            stream=self._subject,
            start_seq=start_seq,
            since=since,
            follow=follow,
        )
        if not follow:
            async with aclosing(chunks):
                async for chunk in chunks:
                    for piece in order.put(chunk):
                        self._note_eof(piece)
                        yield piece
            for piece in order.give_up():
                yield piece
            return
        pauses = 0
        async for coming in _with_pauses(chunks):
            pauses = pauses + 1 if coming is None else 0
            told_end = False
            for piece in order.give_up() if coming is None else order.put(coming):
                told_end = told_end or piece.eof is not None
                self._note_eof(piece)
                yield piece
            # Ask again after 1, 2, 4, 8 … pauses: a quiet container must not cost its node a query a second.
            if (told_end or pauses & (pauses - 1) == 0 < pauses) and await self._is_over(pauses):
                return

    def _note_eof(self, piece: Piece) -> None:
        if piece.eof is not None:
            self._eofs[piece.stream] = piece.eof

    async def _is_over(self, pauses: int) -> bool:
        """Whether the container has ended for good and all of it was shown (or nothing comes any more)."""
        try:
            status = await self._fleet.state(self._target.node, self._target.cid)
        except NotFound:
            return True
        except Unavailable:
            return False  # the node may come back with more
        if status.state not in ENDED or status.next_start_at is not None:
            return False
        return pauses > 1 or all(self._eofs.get(stream, -1) >= status.run for stream in self._streams)

    async def _newest_instance(self) -> str | None:
        found = None
        for stream in self._streams:
            subject = self._fleet.subjects.log(self._target.node, self._target.cid, stream)
            message = await self._fleet.bus.js.last_message(self._fleet.names.logs, subject)
            if message is not None:
                instance = message.headers.get("Sandfleet-Instance", "")
                found = max(found or "", instance)
        return found

    async def _tail_start(self, last: int) -> int | None:
        """A sequence from which on there are at least `tail` lines; null: begin with the first chunk."""
        reach = FIRST_REACH
        while reach < last:
            start, lines = last - reach + 1, 0
            chunks = self._fleet.log_chunks(
                self._target.node, self._target.cid, stream=self._subject, start_seq=start
            )
            async with aclosing(chunks):
                async for chunk in chunks:
                    lines += chunk.data.count(b"\n")
            # One more for each stream: its first line may have begun before.
            if lines >= (self._tail or 0) + len(self._streams):
                return start
            reach *= REACH_FACTOR
        return None


async def _with_pauses(
    chunks: AsyncGenerator[LogChunk, None],
) -> AsyncGenerator[LogChunk | None, None]:
    """The chunks, and null whenever none has come for a while."""
    async with aclosing(chunks):
        coming = asyncio.ensure_future(anext(chunks, None))
        try:
            while True:
                done, _ = await asyncio.wait({coming}, timeout=HOLD_S)
                if not done:
                    yield None
                    continue
                chunk = coming.result()
                if chunk is None:
                    return
                coming = asyncio.ensure_future(anext(chunks, None))
                yield chunk
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
