"""A node that makes and publishes events as fast as it can, until it is killed: `SERVER JOURNAL`.

Prints the number of the newest event after each commit.
"""

import asyncio
import sys
from pathlib import Path

from schemas.events import CommandAccepted
from schemas.subjects import Subjects
from worker.bus.connection import Bus
from worker.bus.outbox import OutboxPublisher
from worker.config import NatsConfig
from worker.journal import EventHead, Journal, Tx

SUBJECTS = Subjects()


def add(tx: Tx) -> int:
    def make(head: EventHead) -> CommandAccepted:
        return CommandAccepted(**head.fields(), container="web-0", command="run")

    for _ in range(1 + tx.last_seq % 60):
        tx.event(SUBJECTS.command_event(tx.node, "web-0"), make)
    return tx.last_seq


async def main(url: str, path: str) -> None:
    journal = await Journal.open(Path(path), node="n1")
    bus = await Bus.connect(NatsConfig(url=url, insecure=True), node="n1", name="test", retry=False)
    publisher = OutboxPublisher(bus, journal, SUBJECTS)
    await publisher.fence()

    async def make() -> None:
        while True:
            print(await journal.transact(add), flush=True)

    await asyncio.gather(publisher.run(), make())


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
