"""The launcher of a worker: that it is the journal's own, and that it runs this worker's code.

A journal remembers under which launcher its containers run. When that one lives but serves another directory, the
directory is a copy, and the containers are not this worker's to report lost, or to end.

A launcher outlives its worker, so after an upgrade it runs older code. It is asked to replace itself (`reexec`) as
soon as nothing is under way in it; should the new code not work here, it goes on with the old.
"""

import asyncio
import fcntl
import os

import msgspec
from loguru import logger

from worker.datadir import DataDir
from worker.errors import Configuration, Conflict, ContractError, ResourceExhausted, Unsupported
from worker.journal import Journal
from worker.services import Services
from worker.supervisor import Launcher
from worker.supervisor_wire import is_alive, launcher_build

LAUNCHER_KEY = "launcher"
PATIENCE_S = 3.0
POLL_S = 0.02
QUIET_POLL_S = 0.1
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 60.0
ATTEMPTS = 3  # that change nothing: the code before is too old to pass on the name of the new


class _Identity(msgspec.Struct, frozen=True):
    pid: int
    start_time: int
    boot_id: str


async def attach_own(data: DataDir, journal: Journal, boot_id: str) -> Launcher:
    """Connect to the directory's launcher, or start one. Configuration when the journal's containers run elsewhere,
    Unavailable when there is none to be had.
    """
    raw = await journal.read(lambda tx: tx.get_meta(LAUNCHER_KEY))
    if raw is not None:
        await _refuse_copy(data, msgspec.convert(raw, _Identity), boot_id)
    launcher = await Launcher.attach(data)
    own = msgspec.to_builtins(_Identity(launcher.pid, launcher.start_time, boot_id))
    if own != raw:
        await journal.transact(lambda tx: tx.put_meta(LAUNCHER_KEY, own))
    return launcher


async def _refuse_copy(data: DataDir, known: _Identity, boot_id: str) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PATIENCE_S
    # One that is just ending has given its lock back already.
    while known.boot_id == boot_id and is_alive(known.pid, known.start_time) and not _is_locked(data):
        if loop.time() > deadline:
            raise Configuration(
                f"{data.root} is a copy: its containers run under the launcher {known.pid} of another directory;"
                " start the worker on that one, or end that launcher first (which ends them)"
            )
        await asyncio.sleep(POLL_S)


def _is_locked(data: DataDir) -> bool:
    """Whether a launcher holds this very directory."""
    try:
        lock = os.open(data.root / "launcher.lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


class LauncherRenewal:
    """`await run()`: returns when the launcher runs this worker's code, or cannot."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def run(self) -> None:
        wanted = await asyncio.to_thread(launcher_build)
        pause_s, attempts = FIRST_PAUSE_S, 0
        while (launcher := self._services.launcher).build != wanted:
            if attempts == ATTEMPTS:
                logger.warning("the launcher goes on with its older code: it cannot be told what replaces it")
                return
            if launcher.busy:
                await asyncio.sleep(QUIET_POLL_S)
                continue
            before = launcher.build
            try:
                await launcher.reexec()
            except Unsupported as failure:
                logger.warning("the launcher goes on with its older code: {}", failure.message)
                return
            except (Conflict, ResourceExhausted) as failure:
                logger.debug("the launcher is not replaced yet: {}", failure.message)
            except ContractError as failure:
                logger.info("the launcher could not be replaced: {}", failure.message)
            else:
                attempts += 1
                if launcher.build == wanted:
                    logger.info(
                        "the launcher was replaced by newer code ({} → {})", before or "unnamed", wanted
                    )
                    break
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
