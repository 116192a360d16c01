"""The configuration read again on SIGHUP: which of it takes effect, and which waits for a restart.

Only what is looked at anew for each decision can be replaced while the worker runs. The rest was given to a part
when that was built.
"""

import asyncio
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import msgspec
from loguru import logger

from worker.config import Config
from worker.errors import Configuration
from worker.sd_notify import Notifier
from worker.settings import BY_KEY


class Difference(NamedTuple):
    """Keys whose values differ, in the order of the settings."""

    taken: tuple[str, ...]
    waiting: tuple[str, ...]


def is_live(key: str) -> bool:
    """Whether a setting takes effect without a restart."""
    return key.startswith("policy.") or key == "node.on_shutdown"


def compare(running: Config, read: Config) -> Difference:
    changed = [key for key in BY_KEY if _value(running, key) != _value(read, key)]
    return Difference(tuple(filter(is_live, changed)), tuple(key for key in changed if not is_live(key)))


def merge(running: Config, read: Config) -> Config:
    """The running configuration with what is live of the other one."""
    origins = {key: origin for key, origin in running.origins.items() if not is_live(key)}
    origins |= {key: origin for key, origin in read.origins.items() if is_live(key)}
    node = msgspec.structs.replace(running.node, on_shutdown=read.node.on_shutdown)
    return msgspec.structs.replace(running, policy=read.policy, node=node, origins=origins)


class Configured(Protocol):
    """Who goes by a configuration."""

    @property
    def config(self) -> Config: ...
    def grant(self, config: Config) -> None: ...


class Reloader:
    """`ask` from the signal's handler; `run` does it, one time after the other. `read` blocks, and raises
    Configuration."""

    def __init__(self, read: Callable[[], Config], notifier: Notifier) -> None:
        self._read = read
        self._notifier = notifier
        self._asked = asyncio.Event()

    def ask(self) -> None:
        self._asked.set()

    async def run(self, of: Configured) -> None:
        while True:
            await self._asked.wait()
            self._asked.clear()
            self._notifier.reloading()
            try:
                await self._reload(of)
            finally:
                self._notifier.ready()

    async def _reload(self, of: Configured) -> None:
        try:
            read = await asyncio.to_thread(self._read)
        except Configuration as failure:
            logger.error("the policy stays as it was: {}", failure.message)
            return
        if not read.source:
            logger.warning("there is no configuration file to read again: the worker was started without one")
            return
        difference = compare(of.config, read)
        if difference.taken:
            of.grant(merge(of.config, read))
        taken = ", ".join(difference.taken) or "nothing that takes effect without a restart"
        logger.info("{} was read again; changed: {}", read.source, taken)
        if difference.waiting:
            logger.warning("waits for a restart of the worker: {}", ", ".join(difference.waiting))


def _value(config: Config, key: str) -> Any:
    found: Any = config
    for name in key.split("."):
        found = None if found is None else getattr(found, name)
    return found
