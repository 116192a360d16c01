"""The ledger forgets a command when it is old and the stream cannot deliver it again.

How long that is only the stream knows: its operator may have set any age, and an acknowledgement can be lost. So the
consumer is asked up to where everything was acknowledged; what is newer stays, however old it is.
"""

import asyncio
from datetime import timedelta

from loguru import logger

from worker.bus.consumer import CommandConsumer
from worker.clock import Clock, utc_now
from worker.errors import ContractError
from worker.journal import Journal

KEPT = timedelta(days=8)  # the contract: at least 7
EVERY_S = 3600.0
AGAIN_S = 60.0
AT_ONCE = 1000


class LedgerKeeper:
    """`await run()` until cancelled; only while `consumer` runs."""

    def __init__(self, journal: Journal, consumer: CommandConsumer, *, clock: Clock = utc_now) -> None:
        self._journal = journal
        self._consumer = consumer
        self._clock = clock

    async def run(self) -> None:
        while True:
            pause_s = EVERY_S
            try:
                await self.prune()
            except ContractError as failure:
                logger.info("the ledger is not pruned now: {}", failure.message)
                pause_s = AGAIN_S
            await asyncio.sleep(pause_s)

    async def prune(self) -> int:
        """Gives how many commands were forgotten. Unavailable when the consumer does not answer."""
        settled = await self._consumer.settled()
        before = self._clock() - KEPT
        total, count = 0, AT_ONCE
        while count == AT_ONCE:
            count = await self._journal.transact(
                lambda tx: tx.prune_commands(before, settled=settled, limit=AT_ONCE), lazy=True
            )
            total += count
        return total
