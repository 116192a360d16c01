"""A worker that does nothing but ship one container's log, to be killed by a test: FOLDER URL INSTANCE."""

import asyncio
import sys
from pathlib import Path

from schemas.subjects import Subjects
from tests.integration.conftest import NatsSettings
from worker.bus.chunks import ChunkPublisher
from worker.bus.connection import Bus
from worker.capture_files import STREAMS
from worker.journal import Journal
from worker.log_lines import stream_end
from worker.logs import LogShipper


async def main(folder: Path, url: str, instance: str) -> None:
    bus = await Bus.connect(NatsSettings(url=url), node="n1", name="test", retry=True)  # type: ignore[arg-type]
    shipper = LogShipper(
        sink=ChunkPublisher(bus),
        journal=await Journal.open(folder / "worker.db", node="n1"),
        subjects=Subjects(),
        node="n1",
        spool_dir=folder / "spool",
        ack_output=lambda cid, stream, offset: None,
    )
    shipper.attach("web-0", instance, folder / "state", 1)
    shipper.resume_spool()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(shipper.run())
        while True:  # in place of a launcher's notices
            shipper.notify([("web-0", stream, stream_end(folder / "state", stream)) for stream in STREAMS])
            await asyncio.sleep(0.003)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
