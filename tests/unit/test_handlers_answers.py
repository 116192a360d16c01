"""What a command is answered that is refused in the very transaction that would accept it."""

import asyncio
from collections.abc import Coroutine
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import msgspec
import pytest

from schemas.spec import CommandSpec, ServiceSpec
from schemas.spec_parts import ImageSpec
from schemas.status import ContainerStatus, State
from schemas.subjects import Subjects
from tests.unit.journal_help import NODE, all_rows
from worker.handlers import CommandHandler
from worker.journal import Journal, Tx
from worker.records import ContainerRecord
from worker.work import Work, write_state

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
SUBJECTS = Subjects()


def record(instance: str, state: State) -> ContainerRecord:
    status = ContainerStatus(container="a-0", service="a", replica=0, instance=instance, state=state)
    return ContainerRecord(
        status=status, spec=ServiceSpec(image=ImageSpec(name="base"), command=CommandSpec())
    )


class Actor:
    """A container's actor, that hears of a step only after the step's commit."""

    def __init__(self, known: ContainerRecord | None, refusal: str | None) -> None:
        self.record = known
        self._refusal = refusal

    def refusal(self, work: Work) -> str | None:
        return self._refusal

    def reserve(self, work: Work) -> None:
        return None

    def release(self, work: Work) -> None:
        return None


class Delivered:
    subject = f"{SUBJECTS.prefix}.cmd.{NODE}.a-0.stop"
    headers: ClassVar[dict[str, str]] = {}

    def __init__(self, command_id: str, seq: int) -> None:
        self.data = msgspec.json.encode({"type": "stop", "id": command_id})
        self.stream_seq = seq
        self.time = NOW
        self.acked = False

    async def ack(self) -> None:
        self.acked = True

    async def nak(self, delay_s: float) -> None:
        raise AssertionError("the journal takes it")

    async def term(self) -> None:
        raise AssertionError("it can be decoded")


@pytest.mark.parametrize("crowded", [False, True])
@pytest.mark.parametrize(
    ("known", "written"),
    [
        (record("I1", State.INITIALIZING), record("I1", State.RUNNING)),
        (record("I1", State.RUNNING), record("I2", State.PENDING)),
        (record("I1", State.RUNNING), None),
        (None, record("I1", State.PENDING)),
    ],
)
async def test_the_status_is_that_of_the_transaction(
    tmp_path: Path, known: ContainerRecord | None, written: ContainerRecord | None, crowded: bool
) -> None:
    journal = await Journal.open(tmp_path / "worker.db", node=NODE)
    actor = Actor(known, "1000 commands wait" if crowded else None)
    tasks: list[asyncio.Task[None]] = []

    def spawn(work: Coroutine[Any, Any, None], name: str) -> None:
        tasks.append(asyncio.create_task(work, name=name))

    runtime = SimpleNamespace(actor=lambda cid: actor, settle=lambda actor: None)
    services = SimpleNamespace(journal=journal, subjects=SUBJECTS)
    handler = CommandHandler(services, runtime, None, spawn)  # type: ignore[arg-type]

    def step(tx: Tx) -> None:
        """A commit of which the actor has not heard."""
        if written is not None:
            write_state(tx, SUBJECTS, None, written, None)

    try:
        if not crowded:
            actor._refusal = "not yet"
            await handler.handle(Delivered("later", 9))
            await asyncio.gather(*tasks)
            actor._refusal = None
        await journal.transact(step)
        delivery = Delivered("now", 5)
        await handler.handle(delivery)
        await asyncio.gather(*tasks)
        assert delivery.acked
        rows = await all_rows(journal)
    finally:
        await journal.close()
    accepted, completed = (msgspec.json.decode(row.payload) for row in rows[-2:])
    instance = None if written is None else written.status.instance
    assert (accepted["type"], accepted["command_id"], accepted["instance"]) == (
        "command_accepted", "now", instance,
    )  # fmt: skip
    assert completed["error"]["code"] == ("resource_exhausted" if crowded else "conflict")
    told = None if written is None else msgspec.to_builtins(written.status)
    assert completed["status"] == told
    assert completed["instance"] == instance
