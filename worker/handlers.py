"""From a delivered message to an accepted command: decode, ledger, acknowledge, hand on.

A message is acknowledged after the journal's commit and never before. What cannot be decoded is answered by
`command_rejected` and never delivered again. The ledger is the only judge of repetition.
"""

import asyncio
import hashlib
import re
from collections.abc import Callable, Coroutine
from datetime import datetime
from enum import Enum, auto
from typing import Any, Protocol

import msgspec
from loguru import logger

from schemas.commands import CONTAINER_VERBS, AnyCommand, Resume
from schemas.decode import MAX_COMMAND_BYTES, canonical, decode_command
from schemas.errors import ContractError, InvalidCommand
from schemas.events import CommandCompleted, CommandRejected
from schemas.status import ContainerStatus
from schemas.values import check_id
from worker.admission import was_dropped
from worker.container import write_accepted
from worker.errors import Conflict, Interrupted, ResourceExhausted
from worker.journal import EventHead, LedgerEntry, Tx
from worker.node_commands import NodeCommands
from worker.records import decode_record
from worker.runtime import Runtime
from worker.services import Services
from worker.waiting import weight_of
from worker.work import OVERTAKERS, Work, now_utc, write_completion

MAX_IN_ACCEPTANCE = 512
TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")

_completed = msgspec.json.Decoder(CommandCompleted)


class Delivery(Protocol):
    """One message of the command stream, as the bus gives it."""

    subject: str
    headers: dict[str, str]
    data: bytes
    stream_seq: int
    time: datetime

    async def ack(self) -> None: ...
    async def nak(self, delay_s: float) -> None: ...
    async def term(self) -> None: ...


class Outcome(Enum):
    ACCEPTED = auto()
    ANSWERED = auto()
    KNOWN = auto()
    REJECTED = auto()


class CommandHandler:
    """Takes deliveries in stream order and keeps that order per container."""

    def __init__(
        self,
        services: Services,
        runtime: Runtime,
        node_commands: NodeCommands,
        spawn: Callable[[Coroutine[Any, Any, None], str], object],
    ) -> None:
        self._services = services
        self._runtime = runtime
        self._node_commands = node_commands
        self._spawn = spawn
        self._slots = asyncio.Semaphore(MAX_IN_ACCEPTANCE)

    async def handle(self, delivery: Delivery) -> None:
        """Begin the acceptance of a message; its order is settled when this returns."""
        await self._slots.acquire()
        try:
            cid, command = self._decode(delivery)
        except ContractError as failure:
            self._spawn(self._reject(delivery, failure, command_id=_id_of(delivery.data)), "reject")
            return
        work = Work(
            command=command,
            verb=type(command).__struct_config__.tag,  # type: ignore[arg-type]
            container=cid,
            seq=delivery.stream_seq,
            time=delivery.time,
            headers=_trace(delivery.headers),
            size=len(delivery.data),
            weight=weight_of(delivery.data),
        )
        self._spawn(self._accept(delivery, work), f"accept {work.id}")

    def _decode(self, delivery: Delivery) -> tuple[str | None, AnyCommand]:
        parsed = self._services.subjects.parse(delivery.subject)
        if parsed.verb is None:
            raise InvalidCommand("the subject names no verb", field="subject")
        command = decode_command(parsed.verb, delivery.data)
        if (parsed.cid is not None) != (parsed.verb in CONTAINER_VERBS):
            kind = "a container" if parsed.verb in CONTAINER_VERBS else "the node"
            raise InvalidCommand(f"{parsed.verb} is a command for {kind}", field="subject")
        return parsed.cid, command

    async def _accept(self, delivery: Delivery, work: Work) -> None:
        actor = None if work.container is None else self._runtime.actor(work.container)
        full = (self._node_commands if actor is None else actor).refusal(work)
        crowded = None if full is None else ResourceExhausted(full)
        begin = None if actor is None else actor.reserve(work)
        body = delivery.data
        digest = hashlib.sha256(canonical(work.command)).hexdigest()

        def accept(tx: Tx) -> Outcome:
            known = tx.command(work.id)
            if known is None:
                tx.accept(
                    LedgerEntry(
                        id=work.id,
                        verb=work.verb,
                        container=work.container,
                        digest=digest,
                        subject=delivery.subject,
                        stream_seq=work.seq,
                        stream_time=work.time,
                        deadline=work.deadline,
                        headers=work.headers,
                        body=body,
                    )
                )
                write_accepted(tx, self._services, work)
                refused: ContractError | None = crowded
                if tx.overtaken(work.container, work.seq, work.time):
                    refused = Conflict("a later command was applied already")
                if refused is not None:
                    status = _status(tx, work.container)
                    write_completion(tx, self._services.subjects, work, error=refused, status=status)
                    return Outcome.ANSWERED
                if begin is not None:
                    begin.write(tx)
                return Outcome.ACCEPTED
            if known.digest != digest or known.container != work.container:
                error = Conflict(f"the id {work.id} belongs to another command", field="id")
                self._write_rejection(tx, delivery, work.container, error, work.id)
                return Outcome.REJECTED
            if known.result is not None and known.stream_seq != work.seq:
                self._write_duplicate(tx, work, known.result)
            return Outcome.KNOWN

        try:
            outcome = await self._services.journal.transact(accept)
        except ContractError as failure:
            if actor is not None:
                actor.release(work)
                self._runtime.settle(actor)
            if isinstance(failure, ResourceExhausted):
                logger.error("{} waits for the journal: {}", work.id, failure.message)
                self._slots.release()
                await delivery.nak(1.0)
                return
            await self._reject(delivery, failure, command_id=work.id, container=work.container)
            return
        self._slots.release()
        if outcome is Outcome.ACCEPTED:
            if work.container is None:
                self._node_commands.accepted(work)
            elif actor is not None:
                actor.accepted(work, begin)
        elif actor is not None:
            actor.release(work)
            self._runtime.settle(actor)
        await delivery.ack()

    async def _reject(
        self,
        delivery: Delivery,
        failure: ContractError,
        *,
        command_id: str | None = None,
        container: str | None = None,
    ) -> None:
        cid = container
        if cid is None:
            try:
                cid = self._services.subjects.parse(delivery.subject).cid
            except ContractError:
                cid = None  # the subject itself is what is wrong: told on the node's subject
        try:
            await self._services.journal.transact(
                lambda tx: self._write_rejection(tx, delivery, cid, failure, command_id)
            )
        except ContractError as again:
            logger.error("a rejection waits for the journal: {}", again.message)
            await delivery.nak(1.0)
        else:
            await delivery.term()
        finally:
            self._slots.release()

    def _write_rejection(
        self, tx: Tx, delivery: Delivery, cid: str | None, failure: ContractError, command_id: str | None
    ) -> None:
        if not tx.first_rejection(delivery.stream_seq, delivery.time):
            return

        def make(head: EventHead) -> CommandRejected:
            return CommandRejected(
                node=head.node,
                epoch=head.epoch,
                boot=head.boot,
                seq=head.seq,
                time=head.time,
                container=cid,
                command_id=command_id,
                error=failure.to_error(),
                subject=delivery.subject[:1024],
                size=len(delivery.data),
                sha256=hashlib.sha256(delivery.data).hexdigest(),
            )

        tx.event(self._services.subjects.command_event(tx.node, cid), make, headers=_trace(delivery.headers))

    def _write_duplicate(self, tx: Tx, work: Work, result: bytes) -> None:
        first = _completed.decode(result)

        def make(head: EventHead) -> CommandCompleted:
            return msgspec.structs.replace(
                first,
                epoch=head.epoch,
                boot=head.boot,
                seq=head.seq,
                time=head.time,
                duplicate=True,
                status=None,
            )

        tx.event(self._services.subjects.command_event(tx.node, work.container), make, headers=work.headers)

    async def recover(self) -> int:
        """Go on with what a dead worker had accepted and not completed, in stream order."""
        found = await self._services.journal.read(_to_recover)
        waited: set[str | None] = set()  # containers of which an earlier command has not ended
        for entry, overtaker in found:
            try:
                command = decode_command(entry.verb, entry.body)
            except ContractError as failure:
                # Accepted by a worker that knew more than this one does: answered all the same.
                logger.error("the accepted command {} cannot be read: {}", entry.id, failure.message)
                await self._give_up(entry)
                continue
            work = Work(
                command=command,
                verb=entry.verb,
                container=entry.container,
                seq=entry.stream_seq,
                time=entry.stream_time or now_utc(),
                headers=entry.headers,
                size=len(entry.body),
                weight=weight_of(entry.body),
                recovered=True,
            )
            if entry.container is None:
                self._node_commands.accepted(work)
                continue
            actor = self._runtime.actor(entry.container)
            if overtaker is not None and was_dropped(work, actor.record, waited=entry.container in waited):
                actor.drop(work, overtaker)
                self._runtime.settle(actor)
            else:
                actor.accepted(work, None)
            waited.add(entry.container)
        return len(found)

    async def _give_up(self, entry: LedgerEntry) -> None:
        work = Work(
            command=Resume(id=entry.id),
            verb=entry.verb,
            container=entry.container,
            seq=entry.stream_seq,
            time=entry.stream_time or now_utc(),
            headers=entry.headers,
        )
        error = Interrupted("the worker that accepted this command is gone, and this one cannot read it")
        await self._services.journal.transact(
            lambda tx: write_completion(tx, self._services.subjects, work, error=error, status=None)
        )


def _to_recover(tx: Tx) -> list[tuple[LedgerEntry, str | None]]:
    """What was accepted and not completed, each with the verb of a later command that dropped it, if one did."""
    return [(entry, tx.overtaker(entry, OVERTAKERS)) for entry in tx.accepted_commands()]


class _Named(msgspec.Struct):
    id: str


_named = msgspec.json.Decoder(_Named)


def _id_of(body: bytes) -> str | None:
    """The id of a command that is refused, where it can be read: its sender waits for it."""
    if len(body) > MAX_COMMAND_BYTES:
        return None
    try:
        return check_id(_named.decode(body).id)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ContractError):
        return None


def _trace(headers: dict[str, str]) -> dict[str, str] | None:
    value = headers.get("traceparent", "")
    return {"traceparent": value} if TRACEPARENT.fullmatch(value) else None


def _status(tx: Tx, cid: str | None) -> ContainerStatus | None:
    """As it was last told: the actor hears of a step only after its commit, and this transaction may come between."""
    raw = None if cid is None else tx.container(cid)
    return None if raw is None else decode_record(raw).status
