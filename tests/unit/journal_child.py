"""A process that writes to a journal, for tests that kill it or take its disk away.

burst PATH    transactions without end; each one that is answered is a line on stdout
full PATH     writes until the file may not grow, then after a line on stdin, with space again, until done
"""

import asyncio
import os
import resource
import sys
from pathlib import Path

from tests.unit.journal_help import NODE, entry, say
from worker.errors import ResourceExhausted
from worker.journal import Journal, Tx


def put(line: str) -> None:
    os.write(1, f"{line}\n".encode())


async def burst(path: Path) -> None:
    journal = await Journal.open(path, node=NODE)

    async def write(lane: int) -> None:
        number = 0
        while True:
            number += 1
            name = f"{journal.boot}-{lane}-{number}"

            def step(tx: Tx, name: str = name) -> int:
                tx.accept(entry(name, stream_seq=tx.last_seq + 1))
                tx.put_container(f"lane-{lane}", "I", name.encode())
                return say(tx, name).seq

            put(f"{await journal.transact(step)} {name}")

    async with asyncio.TaskGroup() as tasks:
        for lane in range(16):
            tasks.create_task(write(lane))


async def full(path: Path) -> None:
    journal = await Journal.open(path, node=NODE)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    written = 0
    try:
        while True:
            await journal.transact(lambda tx: say(tx, "x" * 20_000))
            written += 1
    except ResourceExhausted as failure:
        put(f"full {written} {failure.message}")
    try:
        await journal.transact(lambda tx: say(tx, "x" * 20_000))
    except ResourceExhausted:
        put("still full")
    sys.stdin.readline()
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    event = await journal.transact(lambda tx: say(tx, "after"))
    put(f"after {event.seq}")
    await journal.close()


if __name__ == "__main__":
    asyncio.run({"burst": burst, "full": full}[sys.argv[1]](Path(sys.argv[2])))
